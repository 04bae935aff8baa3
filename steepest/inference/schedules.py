"""Schedules of the learning rate that the methods of this room ask for."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RootDecay:
    r"""$\gamma_k = \gamma_0 (1 - \sqrt{k / T})$: fast down, and slowly to zero; from step T on it stays as at T - 1.

    Args:
        start: $\gamma_0$, positive.
        steps: T, at least 1.

    Raises:
        ValueError: An argument is not as described.

    Examples:
        >>> [RootDecay(1.0, 4)(step) for step in (0, 1, 3, 9)]
        [1.0, 0.5, 0.1339745962155614, 0.1339745962155614]
    """

    start: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and self.start > 0):
            raise ValueError(f"start must be positive and finite, got {self.start}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}")

    def __call__(self, step: int) -> float:
        return self.start * (1 - math.sqrt(min(step, self.steps - 1) / self.steps))
