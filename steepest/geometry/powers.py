"""Matrix powers (G G')^{-c} G and other maps of singular values: batched, for every floating dtype, scale-safe."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.norms import check_tensor
from steepest.geometry.rational import Factorization, as_root, effective_rank, inverse_norm, inverse_root

PowerMethod = Literal["auto", "svd", "eigh", "rational"]
PowerNormalization = Literal["mean", "schatten", "none"]

# The floor of the rational iteration, relative to the Frobenius norm.
_FLOOR = 1e-6
# The part of the result that may be rounding; beyond, eigenvectors take the place of the rational iteration.
_MOST_NOISE = 1e-3
# Singular values below these, relative to the Frobenius norm, are not resolved by the rational iteration.
_RESOLVED = {torch.float32: 1e-4, torch.float64: 1e-5}
# Eigenvalues of a Gram matrix below these fractions of its largest are computed anew, from their rows alone.
_RELIABLE = {torch.float32: 1e-3, torch.float64: 1e-6}
# Generations of NVIDIA's processors for data centres, which compute float64 fast.
_FAST_FLOAT64 = frozenset({(7, 0), (8, 0), (9, 0), (10, 0)})


@dataclass(frozen=True)
class PowerBackend:
    """How a matrix power is computed: which algorithm, in which dtype, and by which factorisation if rational."""

    method: Literal["svd", "eigh", "rational"]
    dtype: torch.dtype
    factorization: Factorization = "qr"


def choose_power_backend(shape: Sequence[int], dtype: torch.dtype, device: torch.device, c: float) -> PowerBackend:
    """The fastest backend for matrices of this shape on this device; a pure function, so that runs repeat.

    On CPUs eigenvectors of the smaller Gram matrix, at every size. On CUDA, where eigenvectors are slow, the rational
    iteration (if c is a fraction it knows, and there is more than one row): with Cholesky factors in float64 on the
    processors that compute float64 fast, else with QR in the input's precision.
    """
    single = _single(dtype)
    if device.type != "cuda" or as_root(c) is None or min(shape[-2:]) < 2:
        return PowerBackend("eigh", single)
    if torch.cuda.get_device_capability(device) in _FAST_FLOAT64:
        return PowerBackend("rational", torch.float64, "cholesky")
    return PowerBackend("rational", single)


def matrix_power_direction(
    x: Float[Tensor, "*batch m n"],
    c: float = 0.5,
    backend: PowerMethod = "auto",
    *,
    normalize: PowerNormalization = "mean",
    rank_tol: float | None = None,
    damping: float = 0.0,
    factorization: Factorization | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch m n"]:
    r"""$D_c(G) = (G G^\top)^{-c} G = U \mathrm{diag}(\sigma^{1-2c}) V^\top$, $0 \le c \le 1$, times a scale.

    | c | q = 2(1 - c) | direction |
    |---|---|---|
    | 0 | 2 | G: gradient descent |
    | 1/2 | 1 | $U V^\top$, the polar factor: Muon |
    | 1/2 to 1 | below 1 | inverted spectra: small directions are amplified |
    | 1 | 0 | transposed pseudo-inverse |

    For $q > 1$ and the Schatten scale this is the steepest direction of the Schatten-p norm, $1/p + 1/q = 1$:
    $\langle G, D \rangle = \|\sigma\|_q$ and $\|D\|_{S_p} = 1$. Zero maps to zero.

    Args:
        x: a matrix or a batch of them, float16, bfloat16, float32 or float64.
        c: the exponent.
        backend: ``"eigh"``: eigenvectors of the smaller Gram matrix, computed anew in the subspace of the small
            singular values, so that those are as accurate as an SVD's; ``"svd"``; ``"rational"``: a coupled QDWH-type
            iteration of 4 to 5 steps for c = a/b, b even and at most 10 (others fall back to eigh, with a warning);
            ``"auto"``: the fastest for the shape, dtype and device (`choose_power_backend`).
        normalize: the scale. ``"schatten"``: $\|\sigma\|_q^{1-q}$; ``"mean"``: $(\mathrm{mean}\,\sigma^q)^{(1-q)/q}$,
            and the geometric mean for q = 0, so that the new singular values are of order one and learning rates carry
            over between exponents; ``"none"``: 1. The first two make the result independent of the scale of `x`.
        rank_tol: singular values up to `rank_tol` times the largest count as zero: they are dropped, also from the
            mean for c > 1/2. Default: max(m, n) times the rounding unit of `x` (of float32 for half precision). The
            rational backend cannot drop; it has a floor.
        damping: $\delta$: $(G G^\top + \delta^2 \|G\|_F^2 I)^{-c}\, G$ instead; bounds what small and noisy directions
            gain for c > 1/2. The means then take $\sigma^q$ as $\sigma^2 (\sigma^2 + \delta^2 \|G\|_F^2)^{-c}$, and the
            number of directions as $\sum \sigma^2 / (\sigma^2 + \delta^2 \|G\|_F^2)$. The rational backend has a
            damping of at least 1e-6, its floor.
        factorization: of the rational backend: ``"qr"`` (default), or ``"cholesky"``, faster and less accurate in
            float32.
        dtype: dtype of the arithmetic; default: float64 for float64, else float32 (float64 where that is fast).

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not a real floating-point tensor.
        ValueError: c outside [0, 1], the Schatten scale at c = 1, fewer than two dimensions, a NaN or infinity in `x`,
            or an unknown backend or scale.

    Warns:
        RuntimeWarning: the rational backend meets singular values too small for it (below 1e-4 of the Frobenius norm in
            float32, 1e-5 in float64), and there is no damping.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181 (Freon).

    Examples:
        >>> import torch
        >>> g = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]], dtype=torch.float64)
        >>> matrix_power_direction(g, c=1.0, normalize="none")
        tensor([[0.3333, 0.0000, 0.0000],
                [0.0000, 0.2500, 0.0000]], dtype=torch.float64)

    """
    check_tensor(x, "x", least_ndim=2)
    check_power(c, backend, normalize, rank_tol, damping, factorization, dtype)
    if x.numel() == 0:
        return torch.zeros_like(x)
    _check_finite(x)
    if backend == "rational" and as_root(c) is None:
        warnings.warn(no_root(c), UserWarning, stacklevel=2)
        backend = "eigh"
    return power(x, c, backend, normalize, rank_tol, damping, factorization, dtype, watch=damping == 0)


def check_power(
    c: float,
    backend: str,
    normalize: str,
    rank_tol: float | None,
    damping: float | None,
    factorization: str | None,
    dtype: torch.dtype | None,
) -> None:
    """Raise unless these are settings of a matrix power."""
    if isinstance(c, bool) or not isinstance(c, int | float):
        raise TypeError(f"c must be a number in [0, 1], got {c!r}")
    if not 0 <= c <= 1:
        raise ValueError(f"c must lie in [0, 1], got {c!r}")
    if backend not in get_args(PowerMethod):
        raise ValueError(f"backend must be one of {', '.join(get_args(PowerMethod))}; got {backend!r}")
    if normalize not in get_args(PowerNormalization):
        raise ValueError(f"normalize must be one of {', '.join(get_args(PowerNormalization))}; got {normalize!r}")
    if normalize == "schatten" and c == 1:
        raise ValueError("normalize='schatten' is not defined at c = 1 (q = 0); use normalize='mean'")
    if factorization not in (None, *get_args(Factorization)):
        raise ValueError(f"factorization must be one of {', '.join(get_args(Factorization))}; got {factorization!r}")
    for name, value in (("rank_tol", rank_tol), ("damping", damping)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {dtype!r}")


def no_root(c: float) -> str:
    """The notice that the rational backend cannot have this exponent."""
    return f"the rational backend needs c = a / b with an even b up to 10, got c = {c!r}; eigh is used instead"


def power(
    x: Float[Tensor, "*batch m n"],
    c: float,
    backend: PowerMethod,
    normalize: PowerNormalization,
    rank_tol: float | None,
    damping: float,
    factorization: Factorization | None,
    dtype: torch.dtype | None,
    *,
    watch: bool,
) -> Float[Tensor, "*batch m n"]:
    """`matrix_power_direction` of what has been checked; `watch` says whether small singular values are warned of."""
    chosen = choose_power_backend(x.shape, x.dtype, x.device, c)
    work = dtype or (chosen.dtype if backend == "auto" else _single(x.dtype))
    method = chosen.method if backend == "auto" else backend
    unit, scale = unit_entries(x, work)
    tolerance = default_rank_tol(x) if rank_tol is None else rank_tol
    if c == 0:
        total = unit.square().sum((-2, -1))
        statistics = _Statistics(total, torch.full_like(total, unit.shape[1]))
        result = unit * _scale(statistics, c, normalize, scale)[:, None, None]
    elif method == "rational":
        root = as_root(c)
        assert root is not None
        kind = factorization or (chosen.factorization if backend == "auto" else "qr")
        result, statistics, noisy = _rational(unit, c, root, max(damping, _FLOOR), kind, watch)
        result = result * _scale(statistics, c, normalize, scale)[:, None, None]
        if not torch.compiler.is_compiling() and bool(noisy.any()):
            again = decompose(unit[noisy], "eigh")
            result[noisy] = _rebuilt(again, c, tolerance, damping, normalize, scale[noisy])
    else:
        result = _rebuilt(decompose(unit, method), c, tolerance, damping, normalize, scale)
    result = result if x.shape[-2] <= x.shape[-1] else result.mT
    return result.to(x.dtype).reshape(x.shape)


def _rebuilt(
    parts: "Decomposition", c: float, rank_tol: float, damping: float, normalize: PowerNormalization, scale: Tensor
) -> Float[Tensor, "batch k n"]:
    values, statistics = _spectral(parts.values, c, rank_tol, damping)
    return parts.rebuild(values * _scale(statistics, c, normalize, scale)[:, None])


@dataclass(frozen=True)
class _Statistics:
    """Of the spectrum of each matrix: the sum of s^q, and over how many directions; mean log s (only for q = 0)."""

    total: Tensor
    count: Tensor
    log_mean: Tensor | None = None


def _scale(statistics: _Statistics, c: float, normalize: PowerNormalization, scale: Tensor) -> Float[Tensor, " batch"]:
    """The factor of each matrix; `scale` is what its entries were divided by."""
    q, total = 2 - 2 * c, statistics.total
    if normalize == "none":
        return scale ** (1 - 2 * c)
    if q == 0:
        assert statistics.log_mean is not None
        return statistics.log_mean.exp()
    if normalize == "mean":
        total = total / statistics.count
    return torch.where(total > 0, total.clamp_min(torch.finfo(total.dtype).tiny) ** ((1 - q) / q), 0.0)


def _spectral(
    values: Float[Tensor, "batch k"], c: float, rank_tol: float, damping: float
) -> tuple[Float[Tensor, "batch k"], _Statistics]:
    """The new singular values, before the scale."""
    tiny = torch.finfo(values.dtype).tiny
    kept = (values > rank_tol * values.amax(-1, keepdim=True)) & (values > 0)
    square = values * values
    ridge = damping**2 * square.sum(-1, keepdim=True)
    damped = (square + ridge).clamp_min(tiny)
    gain = torch.where(kept, damped**-c, 0.0)
    shares = torch.where(kept, square / damped, 0.0).sum(-1) if damping else kept.sum(-1)
    total = (square * gain).sum(-1)
    count = shares.to(total.dtype).clamp_min(0.5) if c > 0.5 else torch.full_like(total, values.shape[-1])
    log_mean = None
    if c == 1:
        low = (ridge if damping else torch.ones_like(ridge)).clamp_min(tiny)
        logs = torch.where(kept, (damped / low).log(), 0.0).sum(-1) / 2
        log_mean = logs / count + low[:, 0].log() / 2
    return gain * values, _Statistics(total, count, log_mean)


def _rational(
    x: Float[Tensor, "batch k n"], c: float, root: tuple[int, int], floor: float, kind: Factorization, watch: bool
) -> tuple[Tensor, _Statistics, Tensor]:
    """Of x / ||x||_F, whose floor is absolute; then back to the scale of x. Last, where rounding shows in the result.

    The gain of directions that x does not have is the largest, and meets what rounding left of x there.
    """
    size = torch.linalg.vector_norm(x, dim=(-2, -1)).clamp_min(torch.finfo(x.dtype).tiny)
    x = x / size[:, None, None]
    gain, upper = inverse_root(x, *root, floor, kind)
    if watch:
        _warn_of_small(upper, x)
    result = torch.bmm(gain, x)
    noise = torch.finfo(x.dtype).eps / 2 * gain.flatten(1).norm(dim=1)
    noisy = x.flatten(1).any(1) & (noise > _MOST_NOISE * result.flatten(1).norm(dim=1))
    total = (x * result).sum((-2, -1))
    count = torch.full_like(total, x.shape[1])
    if c > 0.5:
        count = effective_rank(upper, floor).clamp_min(0.5)
    log_mean = None
    if c == 1:
        logs = upper.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        low = math.log(floor)
        log_mean = (logs - x.shape[1] * low) / count + low + size.log()
    result = result * (size ** (1 - 2 * c))[:, None, None]
    return result, _Statistics(total * size ** (2 - 2 * c), count, log_mean), noisy


def _warn_of_small(upper: Float[Tensor, "batch k k"], x: Float[Tensor, "batch k n"]) -> None:
    limit = _RESOLVED[upper.dtype]
    smallest = inverse_norm(upper).reciprocal()[x.flatten(1).any(1)]
    if not bool((smallest < limit).any()):
        return
    warnings.warn(
        f"the rational iteration in {upper.dtype} is inaccurate for singular values below {limit:g} of the Frobenius "
        f"norm; here some are near {float(smallest.min()):.1e}. Give damping={limit:g}, or use backend='eigh'",
        RuntimeWarning,
        stacklevel=5,
    )


@dataclass(frozen=True)
class Decomposition:
    """X = U diag(s) V', with diag(s) V' or V' itself in `rows`: singular values in no particular order."""

    left: Float[Tensor, "batch k k"]
    values: Float[Tensor, "batch k"]
    rows: Float[Tensor, "batch k n"]
    unit_rows: bool

    def rebuild(self, values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k n"]:
        """U diag(values) V', in place; values that belong to zero singular values must be zero."""
        if not self.unit_rows:
            values = values / self.values.clamp_min(torch.finfo(values.dtype).tiny)
        return torch.bmm(self.left, self.rows.mul_(values[..., None]))


def decompose(x: Float[Tensor, "batch k n"], method: str) -> Decomposition:
    """The singular value decomposition of wide matrices (k <= n), directly or by eigenvectors of the Gram matrix."""
    if method == "svd":
        left, values, rows = torch.linalg.svd(x, full_matrices=False)
        return Decomposition(left, values, rows, True)
    # The transpose, with its upper half, is what LAPACK takes without a copy.
    left = torch.linalg.eigh(torch.bmm(x, x.mT).mT, UPLO="U").eigenvectors
    rows = torch.bmm(left.mT, x)
    values = torch.linalg.vector_norm(rows, dim=-1)
    _refine(left, rows, values, max(x.shape[1:]) * torch.finfo(x.dtype).eps * values.amax(-1, keepdim=True))
    return Decomposition(left, values, rows, False)


def _refine(
    left: Float[Tensor, "batch m k"],
    rows: Float[Tensor, "batch k n"],
    values: Float[Tensor, "batch k"],
    floor: Float[Tensor, "batch 1"],
) -> None:
    """Diagonalise anew, in place, within the span of the small singular values, which a Gram matrix mixes.

    Rounding of the Gram matrix blurs eigenvalues below eps times its largest; the Gram matrix of their rows alone does
    not have the large ones. Rows come in ascending order of their eigenvalues; those up to `floor` need nothing.
    """
    low = values < math.sqrt(_RELIABLE[rows.dtype]) * values.amax(-1, keepdim=True)
    needy = (low & (values > floor)).sum(-1) > 1
    if not bool(needy.any()):
        return
    chosen = needy.nonzero().flatten()
    size = int(torch.where(low[chosen], torch.arange(1, low.shape[-1] + 1, device=low.device), 0).max())
    size = min(size, low.shape[-1] - 1)
    part = rows[chosen, :size]
    vectors = torch.linalg.eigh(torch.bmm(part, part.mT)).eigenvectors
    part = torch.bmm(vectors.mT, part)
    sub_left, sub_values = torch.bmm(left[chosen, :, :size], vectors), torch.linalg.vector_norm(part, dim=-1)
    _refine(sub_left, part, sub_values, floor[chosen])
    left[chosen, :, :size], rows[chosen, :size], values[chosen, :size] = sub_left, part, sub_values


def apply_spectrum(
    x: Float[Tensor, "*batch m n"],
    function: Callable[[Tensor], Tensor],
    backend: Literal["svd", "eigh"] = "eigh",
    *,
    rank_tol: float | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch m n"]:
    r"""$U f(\sigma) V^\top$ for any function of the spectrum; zero singular values stay zero.

    Args:
        x: a matrix or a batch of them, of any floating dtype.
        function: maps singular values (batch, min(m, n)), in descending order and divided by the largest entry of their
            matrix, to as many numbers.
        backend: by eigenvectors of the smaller Gram matrix, or by the SVD.
        rank_tol: singular values up to this fraction of the largest count as zero; default as in
            `matrix_power_direction`.
        dtype: float32 or float64; default: float64 for float64, else float32.

    Raises:
        TypeError: `x` is not a real floating-point tensor.
        ValueError: a NaN or infinity in `x`, fewer than two dimensions, or an unknown backend.

    """
    check_tensor(x, "x", least_ndim=2)
    if backend not in ("svd", "eigh"):
        raise ValueError(f"backend must be svd or eigh, got {backend!r}")
    check_power(0.5, "auto", "mean", rank_tol, 0.0, None, dtype)
    if x.numel() == 0:
        return torch.zeros_like(x)
    _check_finite(x)
    unit, _ = unit_entries(x, dtype or _single(x.dtype))
    parts = decompose(unit, backend)
    values, order = parts.values.sort(-1, descending=True)
    kept = (values > (default_rank_tol(x) if rank_tol is None else rank_tol) * values[:, :1]) & (values > 0)
    mapped = torch.where(kept, function(values), 0.0)
    result = parts.rebuild(torch.zeros_like(values).scatter_(-1, order, mapped.to(values.dtype)))
    result = result if x.shape[-2] <= x.shape[-1] else result.mT
    return result.to(x.dtype).reshape(x.shape)


def unit_entries(x: Tensor, dtype: torch.dtype) -> tuple[Float[Tensor, "batch k n"], Float[Tensor, " batch"]]:
    """Wide matrices with largest entry one, and what they were divided by (one for zero matrices)."""
    flat = x.reshape(-1, *x.shape[-2:])
    wide = (flat if flat.shape[1] <= flat.shape[2] else flat.mT).to(torch.promote_types(x.dtype, torch.float32))
    largest = torch.maximum(wide.amax((-2, -1)), -wide.amin((-2, -1)))
    divisor = torch.where(largest > 0, largest.clamp_min(torch.finfo(wide.dtype).tiny), 1.0)
    return (wide / divisor[:, None, None]).to(dtype), divisor.to(dtype)


def default_rank_tol(x: Tensor) -> float:
    """Relative size of a singular value that rounding of `x` may have made."""
    return max(x.shape[-2:]) * torch.finfo(_single(x.dtype)).eps


def _single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_finite(x: Tensor) -> None:
    if not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
        raise ValueError("x must be finite, but it holds NaN or infinity")
