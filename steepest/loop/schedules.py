"""Schedules: a number that changes with the step. Any callable from the step (0 for the first) to a float is one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Linear:
    r"""$v_t = a + (b - a) \min(t, T) / T$.

    Args:
        start: a, the value at step 0.
        end: b, the value from step T on.
        steps: T, at least 1.

    Examples:
        >>> [Linear(1.0, 0.0, 4)(step) for step in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.steps, start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        share = min(step, self.steps) / self.steps
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True, slots=True)
class Cosine:
    r"""$v_t = b + \tfrac12 (a - b) (1 + \cos(\pi \min(t, T) / T))$.

    Args:
        start: a, the value at step 0.
        end: b, the value from step T on.
        steps: T, at least 1.

    Examples:
        >>> [round(Cosine(1.0, 0.0, 4)(step), 3) for step in (0, 1, 2, 4, 9)]
        [1.0, 0.854, 0.5, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.steps, start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        share = min(step, self.steps) / self.steps
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * share))


@dataclass(frozen=True, slots=True)
class Geometric:
    r"""$v_t = a\,q^{\lfloor t / n \rfloor}$, no further than `limit`.

    Args:
        start: a, the value at step 0.
        factor: q, positive.
        every: n, how many steps a value lasts.
        limit: the value stays here once it is reached; None: never.

    Examples:
        >>> [Geometric(1.0, 2.0, every=2, limit=3.0)(step) for step in range(6)]
        [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    """

    start: float
    factor: float
    every: int = 1
    limit: float | None = None

    def __post_init__(self) -> None:
        _check(self.every, start=self.start, factor=self.factor)
        if self.factor <= 0:
            raise ValueError(f"factor must be positive, got {self.factor}")

    def __call__(self, step: int) -> float:
        turns = step // self.every
        try:
            value = self.start * self.factor**turns
        except OverflowError:
            value = math.copysign(math.inf, self.start)
        if self.limit is None:
            return value
        growing = (abs(self.factor) > 1) == (self.start > 0)
        return min(value, self.limit) if growing else max(value, self.limit)


def value_at(schedule: Schedule | float, step: int, name: str) -> float:
    """The value of a schedule, or of a plain number, at a step.

    Raises:
        TypeError: it is neither a number nor callable, or it returned no number.
        ValueError: the value is NaN. The message names the argument `name`.
    """
    value = schedule(step) if callable(schedule) else schedule
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, or a schedule: step -> number; got {value!r}")
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"{name} is NaN at step {step}")
    return number


def _check(count: int, **numbers: float) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"the number of steps must be an integer of at least 1, got {count!r}")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
