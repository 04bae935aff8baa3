"""Norms scaled by a radius: the operator norms between RMS, l1 and max that give each layer of a network its unit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from steepest.geometry.matrix_norms import MaxColumn, MaxRow, Spectral
from steepest.geometry.norms import Euclidean, Max, Norm

RadiusRule = Callable[[tuple[int, ...]], float]


@dataclass(frozen=True)
class Scaled(Norm):
    r"""The norm whose unit ball is the ball of radius $r$ of `base`.

    $\|x\| = \|x\|_{base} / r$ and $\|g\|_* = r \|g\|_{base,*}$.

    Args:
        base: the norm to scale.
        radius: a positive number, or a function of the parameter's shape (out, in, *kernel) that returns one.

    Raises:
        ValueError: the radius is not positive and finite.

    """

    base: Norm
    radius: float | RadiusRule = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.base, Norm):
            raise TypeError(f"base must be a Norm, got {type(self.base).__name__}")
        if not callable(self.radius):
            _positive(self.radius)

    def at(self, shape: tuple[int, ...]) -> "Scaled":
        radius = self.radius(shape) if callable(self.radius) else self.radius
        return replace(self, base=self.base.at(shape), radius=_positive(radius))

    @property
    def takes_vectors(self) -> bool:
        return self.base.takes_vectors

    @property
    def costly(self) -> bool:
        return self.base.costly

    @property
    def rowwise(self) -> bool:
        return self.base.rowwise

    def _radius(self, x: Tensor) -> float:
        return _positive(self.radius(tuple(x.shape[-2:]))) if callable(self.radius) else self.radius

    def dims(self, x: Tensor) -> tuple[int, ...]:
        return self.base.dims(x)

    @property
    def dual_norm(self) -> Norm:
        if not callable(self.radius):
            return Scaled(self.base.dual_norm, 1 / self.radius)
        return Scaled(self.base.dual_norm, _Inverse(self.radius))

    def norm(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.base.norm(x) / self._radius(x)

    def dual(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.base.dual(g) * self._radius(g)

    def direction_(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.base.direction_(g).mul_(self._radius(g))

    def multiplier(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        multiplier = self.base.multiplier(g)
        return None if multiplier is None else multiplier.mul_(self._radius(g))

    def direction(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.base.direction(g).mul_(self._radius(g))

    def direction_and_dual(self, g: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        direction, dual = self.base.direction_and_dual(g)
        radius = self._radius(g)
        return direction.mul_(radius), dual * radius


def _positive(radius: float) -> float:
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be a positive number, got {radius!r}")
    return float(radius)


@dataclass(frozen=True)
class _Inverse:
    rule: RadiusRule

    def __call__(self, shape: tuple[int, ...]) -> float:
        return 1 / self.rule(shape)


@dataclass(frozen=True)
class ShapeRadius:
    r"""Radii $r\,d_{out}^{\alpha/2} d_{in}^{\beta/2} / \prod k$ for parameters of shape (out, in, *kernel).

    Args:
        radius: r.
        out_power: alpha.
        in_power: beta.
        at_least_one: the dimensional factor is never below one ("input form" of the spectral norm).

    """

    radius: float = 1.0
    out_power: float = 0.0
    in_power: float = 0.0
    at_least_one: bool = False

    def __call__(self, shape: tuple[int, ...]) -> float:
        out = shape[0] if shape else 1
        into = shape[1] if len(shape) > 1 else 1
        factor = max(out, 1) ** (self.out_power / 2) * max(into, 1) ** (self.in_power / 2)
        if self.at_least_one:
            factor = max(1.0, factor)
        return self.radius * factor / max(math.prod(shape[2:]), 1)


def rms_to_rms(radius: float = 1.0, *, at_least_one: bool = False, base: Norm | None = None) -> Scaled:
    r"""Operator norm between RMS norms: direction $r \sqrt{d_{out}/d_{in}}\; U V^\top$ (divided by the kernel size).

    Source: Pethick et al. 2025, arXiv 2502.07529 ("Spectral"); Bernstein and Newhouse 2024, arXiv 2409.20325.
    """
    return Scaled(base or Spectral(), ShapeRadius(radius, 1.0, -1.0, at_least_one))


def one_to_rms(radius: float = 1.0) -> Scaled:
    r"""Operator norm from $\ell_1$ to RMS: direction $r \sqrt{d_{out}}$ times unit columns ("ColNorm")."""
    return Scaled(MaxColumn(), ShapeRadius(radius, 1.0))


def rms_to_max(radius: float = 1.0) -> Scaled:
    r"""Operator norm from RMS to max: direction $r / \sqrt{d_{in}}$ times each row over its length ("RowNorm")."""
    return Scaled(MaxRow(), ShapeRadius(radius, 0.0, -1.0))


def one_to_max(radius: float = 1.0, *, by_fan_in: bool = True) -> Scaled:
    r"""Largest entry: direction $r\,\mathrm{sign}(g)$, over $d_{in}$ if `by_fan_in` (Scion's "Sign")."""
    return Scaled(Max(), ShapeRadius(radius, 0.0, -2.0 if by_fan_in else 0.0))


def vector_rms(radius: float = 1.0) -> Scaled:
    r"""RMS norm of a vector: direction $r \sqrt{n}\, g / \|g\|_2$ ("BiasRMS")."""
    return Scaled(Euclidean(event_ndim=1), ShapeRadius(radius, 1.0))
