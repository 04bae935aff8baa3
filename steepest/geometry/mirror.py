r"""Mirror maps: a strongly convex potential $\psi$, its gradient, and the inverse of that gradient."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.norms import check_tensor, entrywise_norm, largest_entry


@dataclass(frozen=True)
class MirrorMap(ABC):
    r"""A mirror map on vectors, batched over leading dimensions.

    Mirror descent is ``to_primal(to_dual(x) - step * g)``, which minimises
    $\langle g, y \rangle + D_\psi(y, x) / step$.
    """

    @abstractmethod
    def potential(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""$\psi(x)$."""

    @abstractmethod
    def to_dual(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""$\nabla \psi(x)$."""

    @abstractmethod
    def to_primal(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""$\nabla \psi^*(y)$: the inverse of `to_dual` (on the map's domain)."""

    def conjugate(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""$\psi^*(y) = \max_x \langle x, y \rangle - \psi(x)$ over the map's domain."""
        x = self.to_primal(y)
        return (x * y).sum(-1) - self.potential(x)

    def divergence(self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""Bregman divergence $D_\psi(x, y) = \psi(x) - \psi(y) - \langle \nabla\psi(y), x - y \rangle \ge 0$."""
        return self.potential(x) - self.potential(y) - (self.to_dual(y) * (x - y)).sum(-1)

    def step(
        self, x: Float[Tensor, "*batch d"], g: Float[Tensor, "*batch d"], size: float | Tensor
    ) -> Float[Tensor, "*batch d"]:
        r"""One mirror-descent step of length `size` along the gradient `g`."""
        return self.to_primal(self.to_dual(x) - size * g)


@dataclass(frozen=True)
class EuclideanMap(MirrorMap):
    r"""$\psi(x) = \|x\|_2^2 / 2$: gradient descent."""

    def potential(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        check_tensor(x)
        return x.square().sum(-1) / 2

    def to_dual(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(x)
        return x

    def to_primal(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(y, "y")
        return y


@dataclass(frozen=True)
class EntropyMap(MirrorMap):
    r"""Negative entropy $\psi(x) = \sum_i x_i \log x_i - x_i$ on the positive orthant, or on the simplex.

    On the simplex `to_primal` is the softmax (exponentiated gradient); on the orthant it is $\exp$. $0 \log 0 = 0$.

    Args:
        simplex: whether the domain is the probability simplex.

    """

    simplex: bool = True

    def potential(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        check_tensor(x)
        return (torch.xlogy(x, x) - x).sum(-1)

    def to_dual(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(x)
        return x.log()

    def to_primal(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(y, "y")
        return y.softmax(-1) if self.simplex else y.exp()

    def divergence(self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""$\sum_i x_i \log(x_i / y_i) - x_i + y_i$; infinite where $x_i > 0 = y_i$."""
        check_tensor(x)
        return (torch.xlogy(x, x) - torch.xlogy(x, y) - x + y).sum(-1)


@dataclass(frozen=True)
class NegentropyMap(MirrorMap):
    r"""Negative entropy, $\psi(x) = \sum_i x_i \log x_i$, on the positive orthant: $\nabla\psi(x) = 1 + \log x$."""

    def potential(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        check_tensor(x)
        return torch.xlogy(x, x).sum(-1)

    def to_dual(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(x)
        return 1 + x.log()

    def to_primal(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(y, "y")
        return (y - 1).exp()

    def conjugate(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""$\sum_i e^{y_i - 1}$."""
        return self.to_primal(y).sum(-1)


@dataclass(frozen=True)
class PowerMap(MirrorMap):
    r"""$\psi(x) = \sum_i x_i^\alpha / (\alpha (\alpha - 1))$, $\alpha > 1$, on the non-negative orthant.

    $\nabla\psi(x) = x^{\alpha - 1} / (\alpha - 1)$. It is the Tsallis entropy up to an affine term. $\alpha = 2$ is
    `EuclideanMap`, and $\alpha \to 1$ tends to `NegentropyMap` up to a constant in the gradient.
    """

    alpha: float = 1.5

    def __post_init__(self) -> None:
        if not 1 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be above 1 and finite, got {self.alpha!r}")

    def potential(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        check_tensor(x)
        return x.pow(self.alpha).sum(-1) / (self.alpha * (self.alpha - 1))

    def to_dual(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(x)
        return x.pow(self.alpha - 1) / (self.alpha - 1)

    def to_primal(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(y, "y")
        return ((self.alpha - 1) * y.clamp_min(0)).pow(1 / (self.alpha - 1))


@dataclass(frozen=True)
class LogBarrierMap(MirrorMap):
    r"""$\psi(x) = -\sum_i \log x_i$ on the positive orthant (Burg's entropy): $\nabla\psi(x) = -1 / x$.

    Its dual is the negative orthant: `to_primal` of an entry that is not negative has no meaning.
    """

    def potential(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        check_tensor(x)
        return -x.log().sum(-1)

    def to_dual(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(x)
        return -x.reciprocal()

    def to_primal(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(y, "y")
        return -y.reciprocal()


@dataclass(frozen=True)
class PNormMap(MirrorMap):
    r"""$\psi(x) = \|x\|_p^2 / 2$, $1 < p < \infty$: $(p-1)$-strongly convex in $\ell_p$ for $p \le 2$.

    $\nabla\psi(x)_i = \mathrm{sign}(x_i) |x_i|^{p-1} / \|x\|_p^{p-2}$, inverted by the same formula with the conjugate
    exponent.

    Source:
        Gentile 2003, The robustness of the p-norm algorithms.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not 1 < self.p < float("inf"):
            raise ValueError(f"p must be above 1 and finite, got {self.p!r}")

    def potential(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        check_tensor(x)
        return entrywise_norm(x, self.p, (-1,)).square() / 2

    def to_dual(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(x)
        return _p_gradient(x, self.p)

    def to_primal(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        check_tensor(y, "y")
        return _p_gradient(y, self.p / (self.p - 1))


def _p_gradient(x: Tensor, p: float) -> Tensor:
    scale = largest_entry(x, (-1,), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    unit = x / scale
    length = entrywise_norm(unit, p, (-1,)).unsqueeze(-1).clamp_min(torch.finfo(x.dtype).tiny)
    return scale * length * unit.sign() * (unit.abs() / length).pow(p - 1)
