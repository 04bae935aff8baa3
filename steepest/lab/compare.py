"""Numbers that compare methods: spread over seeds, paired differences, and when a loss was reached."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.05


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; None where a value is not finite or is missing."""

    mean: float | None
    std: float | None
    values: list[float | None]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"mean": self.mean, "std": self.std, "values": self.values}


def spread(values: Sequence[float]) -> Spread:
    """The spread of values over seeds; without a mean if any is not finite, since a failed seed must not be hidden."""
    shown = [value if math.isfinite(value) else None for value in values]
    finite = [value for value in shown if value is not None]
    if not finite or len(finite) < len(shown):
        return Spread(None, None, shown)
    return Spread(statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None, shown)


@dataclass(frozen=True)
class Difference:
    """How much lower the first of two methods ends, over the seeds that both ran."""

    mean: float | None
    p_value: float | None
    seeds: int
    significant: bool


def margin(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Mean of `theirs - mine` over shared seeds, and a paired two-sided t-test of it at the 5 % level.

    Paired, since at one seed all methods see the same initial weights and the same batches. One seed is never
    significant.
    """
    shared = sorted(seed for seed in mine if seed in theirs)
    pairs = [theirs[seed] - mine[seed] for seed in shared if math.isfinite(mine[seed]) and math.isfinite(theirs[seed])]
    if not pairs:
        return Difference(None, None, 0, False)
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, None, len(pairs), False)
    deviation = statistics.stdev(pairs)
    if deviation == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        from scipy.stats import t

        p = float(2 * t.sf(abs(mean) / (deviation / math.sqrt(len(pairs))), len(pairs) - 1))
    return Difference(mean, p, len(pairs), p < LEVEL)


def reach(steps: Sequence[float], losses: Sequence[float | None], target: float) -> float:
    """The step at which a curve first comes down to the target, linear between its points; infinity if never."""
    before: tuple[float, float] | None = None
    for step, loss in zip(steps, losses, strict=False):
        if loss is None:
            return math.inf
        if loss <= target:
            if before is None or before[1] <= loss:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (float(step), loss)
    return math.inf
