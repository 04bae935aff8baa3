r"""How far to go along a direction: the lengths $\eta_i$ in $x_i \leftarrow x_i + lr \, \eta_i \, \mathrm{lmo}_i$."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class StepRule(ABC):
    """The lengths of a step, one per matrix, from the dual norms of all matrices.

    Attributes:
        needs_duals: whether `lengths` reads the dual norms. If so the engine computes the directions of all
            parameters before it moves the first, and holds them meanwhile.
        scaled: whether the dual norms count the factors of `adjust_lr_fn`, as radii of the balls.
    """

    needs_duals: ClassVar[bool] = True
    scaled: ClassVar[bool] = False

    @property
    def needs_sizes(self) -> bool:
        """Whether `lengths` takes a second argument, the norms of v in the constrained form (else ones)."""
        return False

    def check(self, group: Mapping[str, Any], where: str = "") -> None:  # noqa: B027
        """Raise ValueError if the settings of a parameter group do not go with this rule."""

    @abstractmethod
    def lengths(
        self, duals: Float[Tensor, "matrices"], sizes: Float[Tensor, "matrices"] | None = None
    ) -> Float[Tensor, "matrices"]:
        r"""Lengths for the dual norms of all matrices that the optimizer holds.

        In the constrained form, where the step goes against $v = x - \mathrm{lmo}(m)$, the numbers are
        $\langle m, v \rangle$.
        """


@dataclass(frozen=True)
class Unit(StepRule):
    """Length one: the conditional-gradient (LMO) step of Muon, Scion and sign descent."""

    needs_duals: ClassVar[bool] = False

    def lengths(
        self, duals: Float[Tensor, "matrices"], sizes: Float[Tensor, "matrices"] | None = None
    ) -> Float[Tensor, "matrices"]:
        return torch.ones_like(duals)


@dataclass(frozen=True)
class Sharp(StepRule):
    r"""Length $\|g_i\|_*$: steepest descent, $x_i \leftarrow x_i - lr \, g_i^\sharp$; Euclidean: gradient descent."""

    def lengths(
        self, duals: Float[Tensor, "matrices"], sizes: Float[Tensor, "matrices"] | None = None
    ) -> Float[Tensor, "matrices"]:
        return duals

    def check(self, group: Mapping[str, Any], where: str = "") -> None:
        if group["constrained"]:
            raise ValueError(
                f"constrained {where}must be False with {self}, whose steps may leave the ball; Clip keeps to it"
            )


@dataclass(frozen=True)
class Joint(StepRule):
    r"""Unit step in the l2 product of the norms, $\eta_i = \|g_i\|_* / (\sum_j \|g_j\|_*^2)^{1/2}$.

    With Euclidean norms this is normalised gradient descent over all parameters at once.
    """

    def lengths(
        self, duals: Float[Tensor, "matrices"], sizes: Float[Tensor, "matrices"] | None = None
    ) -> Float[Tensor, "matrices"]:
        tiny = torch.finfo(duals.dtype).tiny
        scaled = duals / duals.max().clamp_min(tiny)
        return scaled / scaled.square().sum().sqrt().clamp_min(tiny)


ShortStep = Literal["plain", "ball", "norm"]


@dataclass(frozen=True)
class Clip(StepRule):
    r"""Clipped steepest descent: one length for all matrices, $\eta = \min(\rho, \sum_l \|m_l\|_{l,*})$.

    This is steepest descent in the product norm $\max_l \|x_l\|_l$ whose steps are cut at the length $lr\,\rho$; with
    one Euclidean norm it is gradient clipping. In the constrained form, with $v_l = x_l - \mathrm{lmo}_l(m_l)$ and
    $\gamma = \max(0, \sum_l \langle m_l, v_l \rangle)$, the lengths are those of the Frank-Wolfe short step:

    | short_step | $\eta$ |
    |---|---|
    | ``"plain"`` | $\min(\rho, \gamma)$ |
    | ``"ball"`` | $\min(\rho, \gamma / 4)$ |
    | ``"norm"`` | $\min(\rho, \gamma / \max_l \|v_l\|_l^2)$ |

    Args:
        threshold: $\rho$; infinity: never clip.
        short_step: see the table; other than "plain" only in the constrained form.
        relative: divide by $\rho$, $\min(1, \cdot / \rho)$, so that lr is the longest step, whatever the threshold.

    Raises:
        ValueError: the threshold is not positive (or infinite, if relative), or `short_step` is unknown. At the
            optimizer: heavy-ball momentum, a sum on another scale than the gradient; constrained, steps longer than 1.

    Source:
        Pethick, Xie, Erdogan, Antonakopoulos, Silveti-Falls and Cevher 2025, arXiv 2506.01913, algorithms 1 to 4.
    """

    needs_duals: ClassVar[bool] = True
    scaled: ClassVar[bool] = True

    threshold: float
    short_step: ShortStep = "plain"
    relative: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise TypeError(f"threshold must be a number, got {self.threshold!r}")
        if not self.threshold > 0 or (self.relative and math.isinf(self.threshold)):
            raise ValueError(f"threshold must be a positive {'finite ' * self.relative}number, got {self.threshold!r}")
        if self.short_step not in get_args(ShortStep):
            raise ValueError(f"short_step must be one of {', '.join(get_args(ShortStep))}; got {self.short_step!r}")

    @property
    def needs_sizes(self) -> bool:
        return self.short_step == "norm"

    def check(self, group: Mapping[str, Any], where: str = "") -> None:
        if group["momentum_form"] == "heavy_ball" and group["momentum"]:
            raise ValueError(
                f"momentum_form {where}must be 'ema' or 'lion' with clipping: the threshold is compared with the size "
                "of the momentum, and a heavy-ball sum has another scale than the gradient"
            )
        if self.short_step != "plain" and not group["constrained"]:
            raise ValueError(f"constrained {where}must be True with short_step={self.short_step!r}, got False")
        lr = group["lr"]
        if not group["constrained"] or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
            return
        longest = float(lr) * (1.0 if self.relative else self.threshold)
        if longest > 1 + 1e-12:
            raise ValueError(
                f"lr times threshold {where}must be at most 1 when constrained=True, or weights leave the ball; "
                f"got {longest:g}"
            )

    def lengths(
        self, duals: Float[Tensor, "matrices"], sizes: Float[Tensor, "matrices"] | None = None
    ) -> Float[Tensor, "matrices"]:
        total = duals.sum().clamp_min(0)
        if self.short_step == "ball":
            total = total / 4
        if self.short_step == "norm" and sizes is not None:
            total = total / sizes.max().square().clamp_min(torch.finfo(duals.dtype).tiny)
        length = (total / self.threshold).clamp_max(1) if self.relative else total.clamp_max(self.threshold)
        return length.expand_as(duals)
