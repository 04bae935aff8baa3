r"""How far to go along a direction: the lengths $\eta_i$ in $x_i \leftarrow x_i + lr \, \eta_i \, \mathrm{lmo}_i$."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class StepRule(ABC):
    """The lengths of a step, one per matrix, from the dual norms of all matrices.

    Attributes:
        needs_duals: whether `lengths` reads the dual norms. If so the engine computes the directions of all
            parameters before it moves the first, and holds them meanwhile.
    """

    needs_duals: ClassVar[bool] = True

    @abstractmethod
    def lengths(self, duals: Float[Tensor, "matrices"]) -> Float[Tensor, "matrices"]:
        """Lengths for the dual norms of all matrices that the optimizer holds."""


@dataclass(frozen=True)
class Unit(StepRule):
    """Length one: the conditional-gradient (LMO) step of Muon, Scion and sign descent."""

    needs_duals: ClassVar[bool] = False

    def lengths(self, duals: Float[Tensor, "matrices"]) -> Float[Tensor, "matrices"]:
        return torch.ones_like(duals)


@dataclass(frozen=True)
class Sharp(StepRule):
    r"""Length $\|g_i\|_*$: steepest descent, $x_i \leftarrow x_i - lr \, g_i^\sharp$; Euclidean: gradient descent."""

    def lengths(self, duals: Float[Tensor, "matrices"]) -> Float[Tensor, "matrices"]:
        return duals


@dataclass(frozen=True)
class Joint(StepRule):
    r"""Unit step in the l2 product of the norms, $\eta_i = \|g_i\|_* / (\sum_j \|g_j\|_*^2)^{1/2}$.

    With Euclidean norms this is normalised gradient descent over all parameters at once.
    """

    def lengths(self, duals: Float[Tensor, "matrices"]) -> Float[Tensor, "matrices"]:
        tiny = torch.finfo(duals.dtype).tiny
        scaled = duals / duals.max().clamp_min(tiny)
        return scaled / scaled.square().sum().sqrt().clamp_min(tiny)
