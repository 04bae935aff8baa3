"""The polar factor of a matrix, exactly and by matrix products alone; batched, for every floating dtype."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.coefficients import Triple, coefficient_schedule

Method = Literal["auto", "svd", "eigh", "newton_schulz", "gram"]
Normalize = Literal["schatten4", "frobenius", "aol"]

# Gram iterations square the spectrum: rounding errors of size eps grow by the product of a^2. Past this the iteration
# needs a fresh Gram matrix. Half precision follows published practice (a restart after two steps).
_LARGEST_GRAM_ERROR = {torch.float64: 1e-8, torch.float32: 0.05, torch.float16: 1.2, torch.bfloat16: 1.2}
# Smaller than any norm of a matrix whose largest entry is one; its reciprocal is a number in every dtype.
_SMALLEST_SQUARE = 2.0**-13
_AMX_SHORT_SIDE = 192
_TENSOR_CORE_GRAM_SHORT_SIDE = 256


def polar(
    x: Float[Tensor, "*batch m n"],
    method: Method = "auto",
    *,
    coefficients: str | Triple | Sequence[Triple] = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    normalize: Normalize = "schatten4",
) -> Float[Tensor, "*batch m n"]:
    r"""The polar factor $U V^\top$ of $X = U \Sigma V^\top$ (thin SVD over the non-zero singular values).

    It is the nearest matrix with singular values one, and minus the step of steepest descent in the spectral norm.
    Zero singular values stay zero, so a zero matrix gives zero, and a rank-deficient one a partial isometry. The result
    does not depend on the scale of `x`, from the smallest to the largest normal numbers of its dtype.

    Args:
        x: a matrix or a batch of them, float16, bfloat16, float32 or float64.
        method: how.

            - ``"svd"``: by `torch.linalg.svd`; exact, the reference.
            - ``"eigh"``: $(X X^\top)^{-1/2} X$ by an eigendecomposition of the smaller Gram matrix, in float64 unless
              `dtype` says otherwise; exact for singular values above about $\sqrt{m \varepsilon}$ times the largest
              (2e-7 in float64 for m = 200), those below count as zero.
            - ``"newton_schulz"``: quintic steps $X \leftarrow a X + (b A + c A^2) X$, $A = X X^\top$;
              $T(4 m^2 n + 2 m^3)$ flops for T steps, m the short side.
            - ``"gram"``: the same polynomial evaluated on the m x m Gram matrix, $4 m^2 n + (8 T - 6) m^3$ flops plus
              $4 m^2 n$ for each restart that rounding asks for; faster when n is well above m.
            - ``"auto"``: whichever of the last two is faster for this shape, dtype and device (`choose_backend`).
        coefficients: for the iterations: a key of `COEFFICIENTS`, or (a, b, c), or one such triple per step.
        steps: number of iterations; default: the table's own. Five Polar Express steps leave singular values that were
            above 1e-3 of the normalisation within [0.84, 1.13]; eight leave them at one to 1e-4.
        dtype: dtype of the arithmetic; default: the fastest for the device ("auto"), float64 ("eigh"), else that of `x`
            (float32 for half-precision `x` with "svd").
        normalize: how an iteration brings the singular values into [0, 1] first: divides by the Schatten-4 norm
            (``"schatten4"``, $\|X X^\top\|_F^{1/2}$, tighter than Frobenius by up to $\min(m, n)^{1/4}$ and free, since
            the Gram matrix is needed anyway), by the Frobenius norm (as in Muon), or scales the rows by the
            almost-orthogonal preconditioner ``"aol"`` (which changes the matrix, and so the factor, too).

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not a real floating-point tensor.
        ValueError: fewer than two dimensions, or an unknown method, table or normalisation.

    Source:
        Jordan et al. 2024 (Muon); Amsel, Persson, Musco and Gower 2025, arXiv 2505.16932 (Polar Express); Zhang et al.
        2026 (the Gram form); Higham 2008, Functions of Matrices, chapter 8.

    Examples:
        >>> import torch
        >>> from steepest.geometry import polar
        >>> q = polar(torch.randn(4, 8, dtype=torch.float64), "svd")
        >>> torch.allclose(q @ q.mT, torch.eye(4, dtype=torch.float64))
        True

    """
    _check(x, method, normalize)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    triples = coefficient_schedule(coefficients, steps)
    if x.numel() == 0:
        return torch.zeros_like(x)
    flat = x.reshape(-1, *x.shape[-2:])
    wide = flat if flat.shape[1] <= flat.shape[2] else flat.mT
    if method in ("auto", "newton_schulz", "gram"):
        backend = choose_backend(wide.shape, x.dtype, x.device, triples)
        work = dtype or (backend.dtype if method == "auto" else x.dtype)
        method = backend.method if method == "auto" else method
        iterate = _newton_schulz if method == "newton_schulz" else _gram_newton_schulz
        result = iterate(_unit_entries(wide, work), triples, normalize)
    else:
        single = torch.float64 if x.dtype == torch.float64 else torch.float32
        work = dtype or (single if method == "svd" else torch.float64)
        exact = _polar_svd if method == "svd" else _polar_eigh
        result = exact(_unit_entries(wide, work))
    result = result if wide is flat else result.mT
    return result.to(x.dtype).reshape(x.shape)


@dataclass(frozen=True)
class Backend:
    """How an iterative polar factor is computed: which form, in which dtype."""

    method: Literal["newton_schulz", "gram"]
    dtype: torch.dtype


def choose_backend(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, triples: Sequence[Triple]
) -> Backend:
    """The fastest form and dtype for matrices of this shape on this device; a pure function, so that runs repeat.

    float64 stays float64. On CPUs, bfloat16 pays where the processor multiplies it natively (AMX) and the short side is
    192 or more; elsewhere it is slower than float32. On CUDA half precision always pays: bfloat16 directly, and float16
    (three more bits) in Gram form. The Gram form is chosen when it takes fewer flops, restarts included.
    """
    short, long = sorted(shape[-2:])
    if dtype == torch.float64:
        return Backend(_cheaper_form(short, long, triples, dtype), dtype)
    if device.type == "cuda":
        bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if short > _TENSOR_CORE_GRAM_SHORT_SIDE and _cheaper_form(short, long, triples, torch.float16) == "gram":
            return Backend("gram", torch.float16)
        return Backend("newton_schulz", torch.bfloat16 if bfloat16 else torch.float16)
    if device.type == "cpu" and short >= _AMX_SHORT_SIDE and _cpu_multiplies_bfloat16():
        return Backend("newton_schulz", torch.bfloat16)
    return Backend(_cheaper_form(short, long, triples, torch.float32), torch.float32)


def _cpu_multiplies_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()) and torch.backends.mkldnn.is_available()


def _cheaper_form(
    short: int, long: int, triples: Sequence[Triple], dtype: torch.dtype
) -> Literal["newton_schulz", "gram"]:
    steps, restarts = len(triples), len(_restarts(triples, dtype))
    direct = steps * (4 * short**2 * long + 2 * short**3)
    gram = (1 + restarts) * (4 * short**2 * long) + (8 * steps - 6 * (1 + restarts)) * short**3
    return "gram" if gram < direct else "newton_schulz"


def _restarts(triples: Sequence[Triple], dtype: torch.dtype) -> tuple[int, ...]:
    """The steps before which the Gram matrix is formed anew, because its rounding errors have grown too large."""
    epsilon, growth, found = torch.finfo(dtype).eps, 1.0, []
    for step, (a, _, _) in enumerate(triples):
        if step and epsilon * growth > _LARGEST_GRAM_ERROR[dtype]:
            found.append(step)
            growth = 1.0
        growth *= a * a
    return tuple(found)


def _check(x: Tensor, method: str, normalize: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a real floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 2:
        raise ValueError(f"x must be a matrix or a batch of matrices (..., m, n), got shape {tuple(x.shape)}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")


def _unit_entries(x: Float[Tensor, "batch m n"], dtype: torch.dtype) -> Float[Tensor, "batch m n"]:
    """`x` with its largest entry scaled to one, in `dtype`: squares of tiny or huge entries stay representable."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    largest = torch.maximum(wide.amax((-2, -1), keepdim=True), -wide.amin((-2, -1), keepdim=True))
    smallest_normal = torch.finfo(wide.dtype).tiny
    # Two divisors, both invertible: 1 / tiny overflows for no normal number, 1 / huge underflows for none.
    return (wide / largest.clamp_min(smallest_normal)).to(dtype)


def _normalized_gram(
    x: Float[Tensor, "batch m n"], normalize: Normalize
) -> tuple[Float[Tensor, "batch m n"], Float[Tensor, "batch m m"]]:
    """Scale `x` (entries in [-1, 1]) so that its singular values lie in [0, 1]; with its Gram matrix."""
    if x.dtype == torch.float16:  # a sum of m n squares may pass 65504
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        x = (x / norm.clamp_min(torch.finfo(torch.float32).tiny)).half()
    gram = torch.bmm(x, x.mT)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    if normalize == "aol":
        rows = gram.abs().sum(-1, keepdim=True, dtype=accumulate).clamp_min(torch.finfo(torch.float16).tiny).rsqrt()
        x = x * rows.to(x.dtype)
        return x, torch.bmm(x, x.mT)
    if normalize == "schatten4":
        square = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=accumulate)
    else:
        square = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=accumulate).reshape(-1, 1, 1)
    # Rounding must not leave a singular value above one, where some tables grow quickly: the factor and the entries
    # are each off by eps / 4 in half precision, the square by eps. More would bias the iteration.
    square = square.clamp_min(_SMALLEST_SQUARE) * (1 + torch.finfo(x.dtype).eps)
    return x.mul_(square.rsqrt().to(x.dtype)), gram.mul_(square.reciprocal().to(x.dtype))


def _newton_schulz(
    x: Float[Tensor, "batch m n"], triples: Sequence[Triple], normalize: Normalize
) -> Float[Tensor, "batch m n"]:
    x, gram = _normalized_gram(x, normalize)
    spare, update = torch.empty_like(x), torch.empty_like(gram)
    for step, (a, b, c) in enumerate(triples):
        if step:
            torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=update) if c else torch.mul(gram, b, out=update)
        torch.baddbmm(x, update, x, beta=a, out=spare)
        x, spare = spare, x
    return x


def _gram_newton_schulz(
    x: Float[Tensor, "batch m n"], triples: Sequence[Triple], normalize: Normalize
) -> Float[Tensor, "batch m n"]:
    """With R = X X' and Q the product of the polynomials so far, step: P = aI + bR + cR^2, Q <- Q P, R <- P R P."""
    x, gram = _normalized_gram(x, normalize)
    restarts = {*_restarts(triples, x.dtype), len(triples)}
    product: Tensor | None = None
    for step, (a, b, c) in enumerate(triples):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else gram * b
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else torch.bmm(product, polynomial)
        if step + 1 in restarts:
            x = torch.bmm(product, x)
            product = None
            if step + 1 < len(triples):
                gram = torch.bmm(x, x.mT)
        else:
            gram = torch.bmm(polynomial, torch.bmm(gram, polynomial))
    return x


def _polar_svd(x: Float[Tensor, "batch m n"]) -> Float[Tensor, "batch m n"]:
    return singular_value_map(x, torch.ones_like)


def _polar_eigh(x: Float[Tensor, "batch m n"]) -> Float[Tensor, "batch m n"]:
    values, vectors = torch.linalg.eigh(torch.bmm(x, x.mT))
    floor = values[:, -1:].clamp_min(0) * (x.shape[1] * torch.finfo(x.dtype).eps)
    inverse_root = torch.where(values > floor, values.clamp_min(torch.finfo(x.dtype).tiny).rsqrt(), 0.0)
    return torch.bmm(torch.bmm(vectors * inverse_root[:, None, :], vectors.mT), x)


def singular_value_map(
    x: Float[Tensor, "*batch m n"], function: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch m n"]:
    r"""$U f(\Sigma) V^\top$ by the SVD, for the singular values above rounding; the others map to zero.

    Args:
        x: matrices in float32 or float64.
        function: maps the singular values (*batch, min(m, n)), in descending order, to as many numbers. Entries that
            belong to zero singular values are ignored, whatever `function` makes of them.

    """
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    floor = values[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    mapped = torch.where(values > floor, function(values), 0.0)
    return (u * mapped[..., None, :]) @ vh


def polar_error(q: Float[Tensor, "*batch m n"], x: Float[Tensor, "*batch m n"], floor: float = 1e-3) -> float:
    r"""How far `q` is from a polar factor of `x`: $\max_i |\sigma_i - 1|$ with $\sigma = \mathrm{diag}(U^\top Q V)$.

    Only directions whose singular value in `x` is above `floor` times the largest count; computed in float64, one
    number for the whole batch.
    """
    u, values, vh = torch.linalg.svd(x.double(), full_matrices=False)
    gains = torch.einsum("...mk,...mn,...kn->...k", u, q.double(), vh)
    counted = values > floor * values[..., :1]
    return float((gains - 1).abs()[counted].max()) if bool(counted.any()) else math.nan
