"""Directions that keep the singular vectors of a gradient and give it another spectrum; most belong to no norm."""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry.directions import Direction
from steepest.geometry.norms import check_tensor
from steepest.geometry.polar import polar
from steepest.geometry.powers import (
    PowerMethod,
    PowerNormalization,
    apply_spectrum,
    check_power,
    no_root,
    power,
)
from steepest.geometry.rational import Factorization, as_root

# What singular values gain for c > 1/2 in float32 is bounded by this part of the Frobenius norm.
DEFAULT_DAMPING = 1e-4


@dataclass(frozen=True)
class SpectralPower(Direction):
    r"""$U \mathrm{diag}(\sigma^{1-2c}) V^\top$ times a scale: Freon's direction.

    $T(tG) = T(G)$ for the scales "mean" and "schatten", $t^{1-2c}\,T(G)$ for "none".

    Args:
        c: 0 gradient descent, 1/2 Muon, above 1/2 inverted spectra.
        normalize: the scale, see `steepest.geometry.matrix_power_direction`.
        backend: how it is computed.
        damping: relative to the Frobenius norm; None: 1e-4 where c > 1/2 and the input is not float64, else 0.
        rank_tol: singular values up to this fraction of the largest are dropped; None: rounding.
        factorization: of the rational backend.
        dtype: of the arithmetic.

    Raises:
        ValueError: c outside [0, 1], or another setting that `matrix_power_direction` refuses.

    Warns:
        UserWarning: c = 1, where the smallest singular values rule the step; or the rational backend cannot have c.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181 (Freon).

    """

    c: float = 0.5
    normalize: PowerNormalization = "mean"
    backend: PowerMethod = "auto"
    damping: float | None = None
    rank_tol: float | None = None
    factorization: Factorization | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_power(self.c, self.backend, self.normalize, self.rank_tol, self.damping, self.factorization, self.dtype)
        if self.c == 1:
            warnings.warn("c = 1 follows the smallest singular values most and is unstable", UserWarning, stacklevel=3)
        if self.backend == "rational" and as_root(self.c) is None:
            warnings.warn(no_root(self.c), UserWarning, stacklevel=3)
            object.__setattr__(self, "backend", "eigh")

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        check_tensor(g, "g", least_ndim=2)
        if g.numel() == 0:
            return torch.zeros_like(g)
        damping = self.damping
        if damping is None:
            damping = 0.0 if self.c <= 0.5 or g.dtype == torch.float64 else DEFAULT_DAMPING
        return power(
            g,
            self.c,
            self.backend,
            self.normalize,
            self.rank_tol,
            damping,
            self.factorization,
            self.dtype,
            watch=False,
        )

    @property
    def costly(self) -> bool:
        return True


@dataclass(frozen=True)
class ChaoticSpectrum(Direction):
    r"""Kaon: each singular value of $G / \|G\|_F$ goes `steps` times through $s \mapsto r\,s (1 - s^2)^2$.

    At the end the values are divided by `divisor`. At r = 4.1 the map is chaotic: the new spectrum looks random,
    though it is a function of the old one. It is never negative, so the direction descends, and it is bounded: the
    map's largest value is 1.1735, whose image is 0.6841.
    $T(tG) = T(G)$. Rounding grows about 85 times, so that half precision keeps only the distribution of the spectrum.

    Args:
        steps: how often, 1 or more.
        factor: r, above 0 and at most 4.2: beyond, values run away.
        divisor: what the result is divided by.
        dtype: of the arithmetic; None: float64 for float64, else float32.

    Raises:
        ValueError: a setting out of its range.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181 (Kaon).

    """

    steps: int = 5
    factor: float = 4.1
    divisor: float = 1.175
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_int("steps", self.steps)
        for name, value, top in (("factor", self.factor, 4.2), ("divisor", self.divisor, math.inf)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 < value <= top or math.isinf(value):
                raise ValueError(f"{name} must be above 0" + f" and at most {top}" * (top < 9) + f", got {value!r}")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype or None, got {self.dtype!r}")

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        check_tensor(g, "g", least_ndim=2)
        # r (I - A)^2 X = (r - 2 r A + r A^2) X with A = X X': a quintic Newton-Schulz step with other coefficients.
        triple = (self.factor, -2 * self.factor, self.factor)
        dtype = self.dtype or torch.promote_types(g.dtype, torch.float32)
        wide = g.to(torch.promote_types(g.dtype, dtype))
        image = polar(wide, "newton_schulz", coefficients=[triple] * self.steps, normalize="frobenius", dtype=dtype)
        return image.div_(self.divisor).to(g.dtype)

    @property
    def costly(self) -> bool:
        return True


@dataclass(frozen=True)
class _Control(Direction):
    """A spectrum of RMS one over the directions whose singular value is not zero. T(tG) = T(G)."""

    backend: Literal["eigh", "svd"] = "eigh"

    def __post_init__(self) -> None:
        if self.backend not in ("eigh", "svd"):
            raise ValueError(f"backend must be eigh or svd, got {self.backend!r}")

    def _map(self, g: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        check_tensor(g, "g", least_ndim=2)

        def of_rms_one(values: Tensor) -> Tensor:
            positive = values > values[..., :1] * _ROUNDING[values.dtype]
            mapped = torch.where(positive, function(values), 0.0)
            count = positive.sum(-1, keepdim=True).clamp_min(1)
            rms = (mapped.square().sum(-1, keepdim=True) / count).sqrt()
            return mapped / rms.clamp_min(torch.finfo(values.dtype).tiny)

        return apply_spectrum(
            g, of_rms_one, self.backend, rank_tol=_ROUNDING[torch.promote_types(g.dtype, torch.float32)]
        )

    @property
    def costly(self) -> bool:
        return True


_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class RandomSpectrum(_Control):
    r"""Singular values drawn uniformly from (0, 1), then scaled to RMS 1.

    A pure function of its settings and the shape: the same on every device and process.

    Args:
        seed: of the draws.
        stream: names the matrix; different streams have independent draws.
        draw: number of the draw; an optimizer counts it up at each step.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181 (a control of Kaon).

    """

    seed: int = 0
    stream: tuple[int, ...] = ()
    draw: int = 0

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        return self._map(g, self._draws)

    def _draws(self, values: Tensor) -> Tensor:
        text = repr((self.seed, self.stream, self.draw)).encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(number)
        drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        return drawn.clamp_min(1e-6).to(values.device, values.dtype)


@dataclass(frozen=True)
class ReversedSpectrum(_Control):
    """The singular values in reversed order, the smallest on the largest direction, scaled to RMS 1."""

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        return self._map(g, _reverse)


def _reverse(values: Tensor) -> Tensor:
    """Reverse the positive part of descending values."""
    positive = values > values[..., :1] * _ROUNDING[values.dtype]
    last = positive.sum(-1, keepdim=True) - 1
    places = torch.arange(values.shape[-1], device=values.device)
    return values.gather(-1, (last - places).clamp_min(0))


@dataclass(frozen=True)
class TruncatedSpectrum(_Control):
    """The largest singular values set to zero, the others kept, scaled to RMS 1.

    Args:
        fraction: of the min(m, n) singular values, rounded up.

    """

    fraction: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction must lie in [0, 1), got {self.fraction!r}")

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        def cut(values: Tensor) -> Tensor:
            count = math.ceil(self.fraction * values.shape[-1] - 1e-9)
            return torch.cat([torch.zeros_like(values[..., :count]), values[..., count:]], -1)

        return self._map(g, cut)
