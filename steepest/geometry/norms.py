"""Norms with their duals and linear minimisation oracles: the base class and the entrywise norms."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.directions import Direction


@dataclass(frozen=True)
class Norm(Direction):
    r"""A norm $\|\cdot\|$ on matrices or vectors, batched over leading dimensions.

    Entrywise norms read the last `event_ndim` dimensions of a tensor as one element (all of them if it has fewer);
    matrix norms always read the last two. Values of half-precision tensors come in float32; `lmo` and `sharp` keep
    the dtype of their input. Everything holds from the smallest to the largest normal numbers, and zero maps to zero.
    """

    @abstractmethod
    def norm(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""$\|x\|$."""

    @abstractmethod
    def dual(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""$\|g\|_* = \max_{\|x\| \le 1} \langle g, x \rangle$."""

    @abstractmethod
    def direction(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""A maximiser of $\langle g, x \rangle$ over the unit ball, minus `lmo`; zero at zero. Always a new tensor."""

    def lmo(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""A minimiser of $\langle g, x \rangle$ over the unit ball; zero where `g` is zero."""
        return self.direction(g).neg_()

    @property
    @abstractmethod
    def dual_norm(self) -> "Norm":
        r"""The dual norm as a `Norm`: ``dual_norm.norm(g) == dual(g)``."""

    def sharp(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""$g^\sharp = \arg\max_x \langle g, x \rangle - \|x\|^2 / 2 = -\|g\|_*\,\mathrm{lmo}(g)$."""
        direction, length = self.direction_and_dual(g)
        return direction.mul_(_expand(length, self.dims(g)).to(g.dtype))

    def direction_and_dual(self, g: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        """(`direction(g)`, `dual(g)`); where the direction is approximate, the dual is what it attains."""
        return self.direction(g), self.dual(g)


def check_tensor(x: Tensor, name: str = "x", least_ndim: int = 0) -> None:
    """Raise unless `x` is a real floating-point tensor of at least `least_ndim` dimensions."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.ndim < least_ndim:
        raise ValueError(f"{name} must be a matrix or a batch of matrices (..., m, n), got shape {tuple(x.shape)}")


def single(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def largest_entry(x: Tensor, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Max |x| over `dims`; zero over no entries."""
    if x.ndim == 0:
        return x.abs()
    if x.numel() == 0:
        return single(x).abs().sum(dims, keepdim=keepdim)
    return torch.maximum(x.amax(dims, keepdim=keepdim), -x.amin(dims, keepdim=keepdim))


def euclidean(x: Tensor, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """l2 norm over `dims`, without underflow or overflow of the squares."""
    x = single(x)
    if x.ndim == 0:
        return x.abs()
    # Summing down the columns, torch's vector_norm is an order of magnitude slower than this.
    down = dims == (-2,)
    plain = _sum_of_squares_down(x, keepdim).sqrt_() if down else torch.linalg.vector_norm(x, dim=dims, keepdim=keepdim)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # reading the values costs nothing here
        low, high = _safe_range(x.dtype)
        if plain.numel() == 0:
            return plain
        least, most = torch.aminmax(plain)
        if low < least.item() and most.item() < high:
            return plain
    scale = largest_entry(x, dims, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    scaled = torch.linalg.vector_norm(x / scale, dim=dims, keepdim=True) * scale
    return scaled if keepdim else scaled.reshape(plain.shape)


def _sum_of_squares_down(x: Tensor, keepdim: bool) -> Tensor:
    """Over dimension -2, as a product with ones: on CPUs the fastest way down the columns."""
    total = torch.matmul(x.new_ones(1, x.shape[-2]), x.square())
    return total if keepdim else total.squeeze(-2)


def inverse_length(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """1 / ||x||_2 over `dims`, kept as dimensions of size one; a finite number where x is zero."""
    wide = single(x)
    return euclidean(wide, dims, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny).reciprocal()


def normalized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """X / ||x||_2 over `dims`, zero where x is zero, in the dtype of `x`."""
    wide = single(x)
    length = euclidean(wide, dims, keepdim=True)
    tiny = torch.finfo(wide.dtype).tiny
    return (wide / length.clamp_min(tiny)).to(x.dtype)


def _safe_range(dtype: torch.dtype) -> tuple[float, float]:
    """Norms whose squares, and those of entries 1e-4 times smaller, are normal numbers."""
    finfo = torch.finfo(dtype)
    return math.sqrt(finfo.tiny) * 1e8, math.sqrt(finfo.max) * 0.5


def one_hot_largest(values: Tensor) -> Tensor:
    """One at the first largest entry of the last dimension, zero elsewhere."""
    return torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)


def _expand(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    return value.reshape(*value.shape, *(1 for _ in dims))


@dataclass(frozen=True)
class Lp(Norm):
    r"""The entrywise $\ell_p$ norm $(\sum_i |x_i|^p)^{1/p}$, $1 \le p \le \infty$; dual $\ell_q$, $1/p + 1/q = 1$.

    $\mathrm{lmo}(g) = -\mathrm{sign}(g)\,|g|^{q-1} / \|g\|_q^{q-1}$; for $p = 1$ minus the sign at one largest entry
    (the first, on ties); for $p = \infty$ minus the sign of every entry.

    Args:
        p: the exponent.
        event_ndim: how many trailing dimensions make one element (2: matrices; 1: vectors).

    Source:
        Boyd and Vandenberghe 2004, Convex Optimization, section 9.4.

    """

    p: float = 2.0
    event_ndim: int = 2

    @property
    def takes_vectors(self) -> bool:
        return True

    @property
    def rowwise(self) -> bool:
        return math.isinf(self.p) or self.event_ndim == 1

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"p must be at least 1 (below it, the ball is not convex), got {self.p!r}")
        if self.event_ndim < 1:
            raise ValueError(f"event_ndim must be 1 or more, got {self.event_ndim!r}")

    def dims(self, x: Tensor) -> tuple[int, ...]:
        return tuple(range(-min(self.event_ndim, x.ndim), 0))

    @property
    def dual_norm(self) -> Norm:
        return Lp(_conjugate(self.p), self.event_ndim)

    def norm(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        check_tensor(x)
        return entrywise_norm(x, self.p, self.dims(x))

    def dual(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        check_tensor(g, "g")
        return entrywise_norm(g, _conjugate(self.p), self.dims(g))

    def direction_(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return g.sign_() if math.isinf(self.p) else self.direction(g)

    def multiplier(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        return inverse_length(g, self.dims(g)) if self.p == 2 and g.ndim else None

    def direction(self, g: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        check_tensor(g, "g")
        dims = self.dims(g)
        if math.isinf(self.p):
            return g.sign()
        if self.p == 2:
            return normalized(g, dims)
        if g.ndim == 0:
            return g.sign()
        if g.numel() == 0:
            return torch.zeros_like(g)
        if self.p == 1:
            flat = g.flatten(-len(dims))
            return (one_hot_largest(flat.abs()) * flat.sign()).reshape(g.shape)
        wide = single(g)
        unit = wide / largest_entry(wide, dims, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
        q = _conjugate(self.p)
        powers = unit.abs().pow(q - 1)
        length = powers.mul(unit.abs()).sum(dims, keepdim=True).pow((q - 1) / q)
        return (unit.sign() * powers / length.clamp_min(torch.finfo(wide.dtype).tiny)).to(g.dtype)


def entrywise_norm(x: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    """l_p over `dims`, scaled so that no power leaves the range of the dtype."""
    wide = single(x)
    if math.isinf(p):
        return largest_entry(wide, dims)
    if p == 2:
        return euclidean(wide, dims)
    if wide.ndim == 0:
        return wide.abs()
    if p == 1:
        return wide.abs().sum(dims)
    scale = largest_entry(wide, dims, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    length = (wide / scale).abs().pow(p).sum(dims, keepdim=True).pow(1 / p) * scale
    return length.reshape([size for index, size in enumerate(wide.shape) if index - wide.ndim not in dims])


def _conjugate(p: float) -> float:
    if p == 1:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1)


@dataclass(frozen=True)
class Euclidean(Lp):
    r"""$\|x\|_2$; on matrices the Frobenius norm. Self-dual, $\mathrm{lmo}(g) = -g / \|g\|_2$."""

    p: float = 2.0

    @property
    def dual_norm(self) -> Norm:
        return self


Frobenius = Euclidean


@dataclass(frozen=True)
class Max(Lp):
    r"""$\|x\|_\infty = \max_i |x_i|$; dual $\ell_1$, $\mathrm{lmo}(g) = -\mathrm{sign}(g)$: sign descent."""

    p: float = math.inf

    @property
    def dual_norm(self) -> Norm:
        return L1(event_ndim=self.event_ndim)


@dataclass(frozen=True)
class L1(Lp):
    r"""$\|x\|_1 = \sum_i |x_i|$; dual max, lmo: minus the sign at one largest entry (greedy coordinate descent)."""

    p: float = 1.0

    @property
    def dual_norm(self) -> Norm:
        return Max(event_ndim=self.event_ndim)
