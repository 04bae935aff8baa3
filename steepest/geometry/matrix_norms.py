"""Norms of matrices: spectral, nuclear, Schatten-p, and the mixed norms of rows and columns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.coefficients import Triple, coefficient_schedule
from steepest.geometry.norms import Norm, check_tensor, euclidean, inverse_length, normalized, one_hot_largest, single
from steepest.geometry.polar import Method, Normalize, polar, singular_value_map


@dataclass(frozen=True)
class Schatten(Norm):
    r"""$\|X\|_{S_p} = (\sum_i \sigma_i^p)^{1/p}$ for any $p > 0$ (a quasi-norm below one).

    For $p \ge 1$ the dual is $S_q$, $1/p + 1/q = 1$, and
    $\mathrm{lmo}(G) = -U \mathrm{diag}(\sigma_i^{q-1} / \|\sigma\|_q^{q-1}) V^\top$. For $p \le 1$ the convex hull
    of the ball is that of the nuclear norm, so the dual is the largest singular value and
    $\mathrm{lmo}(G) = -u_1 v_1^\top$.

    Args:
        p: the exponent; 1 nuclear, 2 Frobenius, infinity spectral.

    Source:
        Bhatia 1997, Matrix Analysis, chapter IV.

    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ValueError(f"p must be positive, got {self.p!r}")

    @property
    def costly(self) -> bool:
        return True

    @property
    def _dual_exponent(self) -> float:
        if self.p <= 1:
            return math.inf
        return 1.0 if math.isinf(self.p) else self.p / (self.p - 1)

    @property
    def dual_norm(self) -> Norm:
        """For p < 1 this is the spectral norm, whose own dual is nuclear, the largest norm below the quasi-norm."""
        return Schatten(self._dual_exponent)

    def norm(self, x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
        check_tensor(x, least_ndim=2)
        return _schatten(x, self.p)

    def dual(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
        check_tensor(g, "g", least_ndim=2)
        return _schatten(g, self._dual_exponent)

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        check_tensor(g, "g", least_ndim=2)
        if g.numel() == 0:
            return torch.zeros_like(g)
        return singular_value_map(single(g), self._direction_values).to(g.dtype)

    def _direction_values(self, values: Tensor) -> Tensor:
        q = self._dual_exponent
        if math.isinf(q):
            return torch.zeros_like(values).index_fill_(-1, torch.tensor(0, device=values.device), 1.0)
        if q == 1:
            return torch.ones_like(values)
        tiny = torch.finfo(values.dtype).tiny
        unit = values / values[..., :1].clamp_min(tiny)
        return unit.pow(q - 1) / unit.pow(q).sum(-1, keepdim=True).pow((q - 1) / q).clamp_min(tiny)


def _schatten(x: Tensor, p: float) -> Tensor:
    if x.numel() == 0:
        return single(x).sum((-2, -1))
    values = torch.linalg.svdvals(single(x))
    largest = values[..., :1]
    if math.isinf(p):
        return largest[..., 0]
    if p == 1:
        return values.sum(-1)
    unit = values / largest.clamp_min(torch.finfo(values.dtype).tiny)
    return unit.pow(p).sum(-1).pow(1 / p) * largest[..., 0]


@dataclass(frozen=True)
class Spectral(Schatten):
    r"""$\|X\| = \sigma_1$; dual nuclear, $\mathrm{lmo}(G) = -U V^\top$, the polar factor: Muon's direction.

    Args:
        method: how the polar factor is computed, see `steepest.geometry.polar`. ``"svd"`` (the default) is exact; the
            iterations of ``"auto"``, ``"newton_schulz"`` and ``"gram"`` are many times faster, and their singular
            values are near one rather than one; `sharp` then takes its length from the direction itself,
            $\langle G, -\mathrm{lmo}(G) \rangle$.
        coefficients: of the iterations.
        steps: number of iterations; None: the table's own.
        dtype: dtype of the iterations; None: by method.
        normalize: how the iterations bring singular values into [0, 1].

    """

    p: float = math.inf
    method: Method = "svd"
    coefficients: str | Triple | tuple[Triple, ...] = "polar_express"
    steps: int | None = None
    dtype: torch.dtype | None = None
    normalize: Normalize = "schatten4"

    def __post_init__(self) -> None:
        coefficient_schedule(self.coefficients, self.steps)
        polar(
            torch.zeros(1, 0),
            self.method,
            coefficients=self.coefficients,
            steps=self.steps,
            dtype=self.dtype,
            normalize=self.normalize,
        )

    @property
    def dual_norm(self) -> Norm:
        return Nuclear()

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        check_tensor(g, "g", least_ndim=2)
        return polar(
            g,
            self.method,
            coefficients=self.coefficients,
            steps=self.steps,
            dtype=self.dtype,
            normalize=self.normalize,
        )

    def direction_and_dual(self, g: Float[Tensor, "*batch m n"]) -> tuple[Tensor, Tensor]:
        direction = self.direction(g)
        return direction, (single(g) * single(direction)).sum((-2, -1))


@dataclass(frozen=True)
class Nuclear(Schatten):
    r"""$\|X\|_1 = \sum_i \sigma_i$; dual spectral, $\mathrm{lmo}(G) = -u_1 v_1^\top$."""

    p: float = 1.0

    @property
    def dual_norm(self) -> Norm:
        return Spectral()


@dataclass(frozen=True)
class _Mixed(Norm):
    """l2 within the rows (or columns), then max or sum over them."""

    _inner = -1  # the dimension of the l2 norms: -1 within rows, -2 within columns
    _outer_max = True

    def _lengths(self, x: Tensor) -> Tensor:
        return euclidean(x, (self._inner,))

    def _reduce(self, x: Tensor, take_max: bool) -> Tensor:
        lengths = self._lengths(x)
        if take_max and lengths.shape[-1]:
            return lengths.amax(-1)
        return lengths.sum(-1)

    def norm(self, x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
        check_tensor(x, least_ndim=2)
        return self._reduce(x, self._outer_max)

    def dual(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
        check_tensor(g, "g", least_ndim=2)
        return self._reduce(g, not self._outer_max)

    def multiplier(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "..."] | None:
        return inverse_length(g, (self._inner,)) if self._outer_max else None

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        check_tensor(g, "g", least_ndim=2)
        if g.numel() == 0:
            return torch.zeros_like(g)
        direction = normalized(g, (self._inner,))
        if self._outer_max:
            return direction
        return direction * one_hot_largest(self._lengths(g)).unsqueeze(self._inner).to(g.dtype)


@dataclass(frozen=True)
class MaxRow(_Mixed):
    r"""$\max_i \|x_{i:}\|_2$, operator norm $\ell_2 \to \ell_\infty$; dual `SumRow`; lmo: rows over their lengths."""

    @property
    def dual_norm(self) -> Norm:
        return SumRow()


@dataclass(frozen=True)
class SumRow(_Mixed):
    r"""$\sum_i \|x_{i:}\|_2$; dual `MaxRow`; lmo: minus the longest row over its length, zero elsewhere."""

    _outer_max = False

    @property
    def dual_norm(self) -> Norm:
        return MaxRow()


@dataclass(frozen=True)
class MaxColumn(_Mixed):
    r"""$\max_j \|x_{:j}\|_2$, operator norm $\ell_1 \to \ell_2$; dual `SumColumn`; lmo: columns over their lengths."""

    _inner = -2

    @property
    def dual_norm(self) -> Norm:
        return SumColumn()


@dataclass(frozen=True)
class SumColumn(_Mixed):
    r"""$\sum_j \|x_{:j}\|_2$; dual `MaxColumn`; lmo: minus the longest column over its length, zero elsewhere."""

    _inner = -2
    _outer_max = False

    @property
    def dual_norm(self) -> Norm:
        return MaxColumn()


def as_tuple(coefficients: str | Triple | Sequence[Triple]) -> str | Triple | tuple[Triple, ...]:
    """Coefficients in a hashable form, as `Spectral` keeps them."""
    if isinstance(coefficients, str):
        return coefficients
    return tuple(item if isinstance(item, int | float) else tuple(item) for item in coefficients)  # type: ignore[return-value]
