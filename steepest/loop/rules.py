"""Stop rules: callables that look at a `Record` and say why to stop, or None."""

import math
import operator
from dataclasses import dataclass

from steepest.loop.record import Record


def positive_int(name: str, value: object) -> int:
    """`value` as an int, or a clear error that names the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a positive integer, got {value!r}")
    number = operator.index(value)  # type: ignore[arg-type]
    if number <= 0:
        raise ValueError(f"{name} must be a positive integer, got {number}")
    return number


def positive_seconds(name: str, value: object) -> float:
    """`value` as a float > 0 (infinity allowed), or a clear error that names the argument."""
    number = real(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
    return number


def real(name: str, value: object) -> float:
    """`value` as a float that is not nan, or a clear error that names the argument."""
    if isinstance(value, (bool, str)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)  # type: ignore[arg-type]
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, got nan")
    return number


def _metric(rule: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"{rule}: metric must be the name of a metric (a str), got {name!r}")


@dataclass(frozen=True)
class Steps:
    """Stop after `n` complete steps, those before a resume included.

    Raises:
        TypeError, ValueError: `n` is not a positive integer.
    """

    n: int

    def __post_init__(self):
        object.__setattr__(self, "n", positive_int("Steps: n", self.n))

    def __call__(self, record: Record) -> str | None:
        return f"steps: {record.step} done" if record.step >= self.n else None


@dataclass(frozen=True)
class Seconds:
    """Stop after the step in which the running time reaches `limit` seconds, the time before a resume included.

    Raises:
        TypeError, ValueError: `limit` is not a positive number.
    """

    limit: float

    def __post_init__(self):
        object.__setattr__(self, "limit", positive_seconds("Seconds: limit", self.limit))

    def __call__(self, record: Record) -> str | None:
        if record.seconds < self.limit:
            return None
        return f"seconds: {record.seconds:.4g} s passed, the limit was {self.limit:.4g} s"


@dataclass(frozen=True)
class Tolerance:
    """Stop when a metric is at or below (or at or above) a value, `patience` recorded values in a row.

    Looks at recorded steps only. Records in which the metric is missing or not a number neither count nor reset.

    Args:
        metric: name of the metric.
        below: stop at metric <= below.
        above: stop at metric >= above. Give one of the two.
        patience: how many recorded values in a row must satisfy it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, both bounds, or none.
    """

    metric: str
    below: float | None = None
    above: float | None = None
    patience: int = 1

    def __post_init__(self):
        _metric("Tolerance", self.metric)
        if (self.below is None) == (self.above is None):
            raise ValueError(f"Tolerance: give either below or above, got below={self.below}, above={self.above}")
        for side in ("below", "above"):
            if getattr(self, side) is not None:
                object.__setattr__(self, side, real(f"Tolerance: {side}", getattr(self, side)))
        object.__setattr__(self, "patience", positive_int("Tolerance: patience", self.patience))

    def __call__(self, record: Record) -> str | None:
        if not record.recorded or self.metric not in record.metrics or not self._reached(record.metrics[self.metric]):
            return None
        count = 0
        for value in reversed(record.history.get(self.metric, [])):
            if count == self.patience or not (math.isnan(value) or self._reached(value)):
                break
            count += not math.isnan(value)
        if count < self.patience:
            return None
        sign, bound = ("<=", self.below) if self.below is not None else (">=", self.above)
        times = f" {self.patience} times in a row" if self.patience > 1 else ""
        return f"tolerance: {self.metric} {record.metrics[self.metric]:.4g} {sign} {bound:.4g}{times}"

    def _reached(self, value: float) -> bool:
        return value <= self.below if self.below is not None else value >= (self.above or 0.0)


@dataclass(frozen=True)
class Diverged:
    """Stop when a metric is not finite, or exceeds `factor` times the size of its first recorded finite value.

    Looks at recorded steps only. If the first value is zero, only the finiteness is judged.

    Args:
        metric: name of the metric.
        factor: stop at metric > factor * |first value|; None judges the finiteness only.

    Raises:
        TypeError, ValueError: `metric` is not a name, or `factor` is not a number above 1.
    """

    metric: str = "loss"
    factor: float | None = 100.0

    def __post_init__(self):
        _metric("Diverged", self.metric)
        if self.factor is not None:
            object.__setattr__(self, "factor", real("Diverged: factor", self.factor))
            if self.factor <= 1:
                raise ValueError(f"Diverged: factor must be above 1 or None, got {self.factor}")

    def __call__(self, record: Record) -> str | None:
        if not record.recorded or self.metric not in record.metrics:
            return None
        value = record.metrics[self.metric]
        if not math.isfinite(value):
            return f"diverged: {self.metric} is {value} at step {record.step}"
        first = abs(next((v for v in record.history.get(self.metric, []) if math.isfinite(v)), 0.0))
        if self.factor is None or first == 0 or value <= self.factor * first:
            return None
        return (
            f"diverged: {self.metric} is {value:.4g} at step {record.step}, "
            f"over {self.factor:.4g} times its first value ({first:.4g} in size)"
        )
