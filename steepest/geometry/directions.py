"""Directions: what a step goes against. A norm's steepest direction is one; a rule that no norm explains is another."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Direction(ABC):
    r"""A rule $T$ from a gradient (or its momentum) to what a step goes against, $x \leftarrow x - lr\,T(g)$.

    Batched over leading dimensions; zero maps to zero. A subclass says how it behaves under scaling, $T(tg)$: a `Norm`
    gives directions that do not change. Subclasses are frozen dataclasses whose text tells them apart, since optimizers
    group parameters by them and keep the text in their state.
    """

    @abstractmethod
    def direction(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""$T(g)$, in the dtype of `g`; zero at zero. Always a new tensor, which the caller may overwrite."""

    def direction_(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""$T(g)$, which may lie in the memory of `g`."""
        return self.direction(g)

    def direction_and_dual(self, g: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        r"""($T(g)$, $\langle g, T(g) \rangle$): the pairing, one number per element of the space, is for step rules."""
        direction = self.direction(g)
        wide = torch.promote_types(g.dtype, torch.float32)
        return direction, (g.to(wide) * direction.to(wide)).sum(self.dims(g))

    def multiplier(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """The factor f, broadcastable to `g`, with ``direction(g) == f * g``; None where there is none.

        It lets a caller scale and apply a direction in one pass over memory.
        """
        return None

    def at(self, shape: tuple[int, ...]) -> Self:
        """The rule for parameters of this shape (out, in, *kernel), checked against it."""
        return self

    def dims(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of `x` that make one element of the space."""
        return tuple(range(-min(2, x.ndim), 0))

    @property
    def takes_vectors(self) -> bool:
        """Whether it is defined for vectors and scalars, not only for matrices."""
        return False

    @property
    def costly(self) -> bool:
        """Whether it multiplies or factorises matrices, so that as many as fit in memory are treated at once."""
        return False

    @property
    def rowwise(self) -> bool:
        """Whether each row depends on that row alone, so that a large matrix may be treated in pieces of rows."""
        return False

    @property
    def spans_batch(self) -> bool:
        """Whether dimension -3 belongs to the element too: the matrices of one parameter (its experts) are coupled."""
        return False
