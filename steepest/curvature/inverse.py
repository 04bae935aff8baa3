"""Inverse products: solve (A + damping I) x = b."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steepest._checks import check_int
from steepest.curvature.lanczos import top_eigenpairs
from steepest.curvature.operator import LinearOperator, as_operator, symmetric_operator

Apply = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    r"""What `solve` found.

    Attributes:
        x: Of the shape of b.
        residual: $|b - (A + \text{damping}) x| / |b|$, the largest over columns.
        products: How many products with A it took; a product with k columns counts k.
        converged: Whether the residual is within the tolerance.
    """

    x: Tensor
    residual: float
    products: int
    converged: bool


def solve(
    A: LinearOperator | Tensor,
    b: Tensor,
    *,
    damping: float = 0.0,
    method: Literal["cg", "neumann"] = "cg",
    tol: float = 1e-5,
    max_products: int | None = None,
    preconditioner: LinearOperator | Tensor | Apply | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Solution:
    r"""Solve $(A + \text{damping} \cdot I) x = b$ for a symmetric operator.

    "cg" is the conjugate gradient method. "neumann" sums $x = s \sum_j (I - s P (A + \text{damping}))^j P b$, which
    needs the eigenvalues of $s P (A + \text{damping})$ in (0, 2); cut short by `max_products` it is a smooth, biased
    inverse that many bilevel methods use. Columns of b are solved at once.

    Args:
        A: Symmetric; with the damping positive definite.
        b: (n,) or (n, k).
        damping: Added to the diagonal, at least 0.
        method: "cg" or "neumann".
        tol: Largest residual relative to |b|.
        max_products: Products for each column at most; 10 n for "cg" within 10 to 1000, and 1000 for "neumann" if None.
        preconditioner: P, an approximation of the inverse; positive definite.
        start: First x; zeros if None.
        scale: s of "neumann"; if None, 1 over the largest |eigenvalue| of $P(A + \text{damping})$ without P, found by
            Lanczos (its products count), and 1 with P.

    Raises:
        TypeError, ValueError: an argument is wrong; the matrix turns out not to be positive definite.
        FloatingPointError: a product is not finite, or the series diverges.

    Examples:
        >>> solve(torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2), damping=1.0).x
        tensor([0.5000, 0.2500])
    """
    A = symmetric_operator(A)
    n = A.shape[0]
    if not isinstance(b, Tensor) or b.ndim not in (1, 2) or b.shape[0] != n or b.is_complex():
        raise ValueError(f"b must be a real tensor ({n},) or ({n}, k), got {getattr(b, 'shape', type(b).__name__)}")
    if not bool(b.isfinite().all()):
        raise ValueError("b must be finite")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be at least 0, got {damping}")
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol must be positive, got {tol}")
    if method not in ("cg", "neumann"):
        raise ValueError(f"method must be cg or neumann, got {method!r}")
    if scale is not None and not (math.isfinite(scale) and scale > 0 and method == "neumann"):
        raise ValueError(f"scale must be positive, and is of method neumann only, got {scale}")
    if start is not None and start.shape != b.shape:
        raise ValueError(f"start must have the shape of b, {tuple(b.shape)}, got {tuple(start.shape)}")
    if max_products is None:
        max_products = min(max(10 * n, 10), 1000) if method == "cg" else 1000
    check_int("max_products", max_products)
    columns = (b if b.ndim == 2 else b[:, None]).detach().to(A.device, A.dtype)
    x = torch.zeros_like(columns) if start is None else start.detach().reshape(columns.shape).to(columns).clone()
    apply, shifted = _preconditioner(preconditioner, n), _Counted(A, damping)
    if columns.shape[1] == 0:
        return Solution(x.reshape(b.shape), 0.0, 0, True)
    if method == "cg":
        x, residual = _cg(shifted, columns, x, apply, tol, max_products, start is not None)
    else:
        if scale is None and preconditioner is None:
            pairs = top_eigenpairs(A + damping, 1, which="magnitude", tol=1e-2, max_products=min(20, max_products))
            shifted.count += pairs.products
            scale = 1.0 / max(1.05 * float(pairs.values[0].abs() + pairs.residuals[0]), torch.finfo(A.dtype).tiny)
        x, residual = _neumann(shifted, columns, x, apply, scale or 1.0, tol, max_products, start is not None)
    return Solution(x.reshape(b.shape), residual, shifted.count, residual <= tol)


class _Counted:
    """A + damping, which counts its products and checks them."""

    def __init__(self, A: LinearOperator, damping: float) -> None:
        self.A, self.damping, self.count = A, damping, 0

    def __call__(self, columns: Tensor) -> Tensor:
        self.count += columns.shape[1]
        result = torch.add(self.A @ columns, columns, alpha=self.damping)
        if not bool(result.isfinite().all()):
            raise FloatingPointError("a product with the operator is not finite")
        return result


def _cg(A: _Counted, b: Tensor, x: Tensor, apply: Apply, tol: float, limit: int, started: bool) -> tuple[Tensor, float]:
    lengths = _lengths(b)
    r = b - A(x) if started else b.clone()
    z = apply(r)
    p, rho = z.clone(), (r * z).sum(0)
    residual = _relative(r, lengths)
    for _ in range(limit - started):
        open_ = torch.nonzero(residual > tol)[:, 0]  # columns that are done take no more products
        if not len(open_):
            break
        w = A(p[:, open_])
        curvature = (p[:, open_] * w).sum(0)
        if bool((curvature <= 0).any()):
            raise ValueError(
                f"A + damping must be positive definite, but p^T (A + damping) p = {float(curvature.min()):.3g} for a "
                f"direction p: use a damping above {A.damping:.3g}, or a Gauss-Newton operator"
            )
        step = rho[open_] / curvature
        x[:, open_] += step * p[:, open_]
        r[:, open_] -= step * w
        z = apply(r[:, open_])
        again = (r[:, open_] * z).sum(0)
        p[:, open_] = z + (again / rho[open_]) * p[:, open_]
        rho[open_] = again
        residual = _relative(r, lengths)
    return x, float(residual.max())


def _neumann(
    A: _Counted, b: Tensor, x: Tensor, apply: Apply, scale: float, tol: float, limit: int, started: bool
) -> tuple[Tensor, float]:
    lengths = _lengths(b)
    r = b - A(x) if started else b
    residual = _relative(r, lengths)
    for _ in range(limit - started):
        if bool((residual <= tol).all()):
            break
        x = x + scale * apply(r)
        r = b - A(x)
        residual = _relative(r, lengths)
        if bool((residual > 1e6).any()):
            raise FloatingPointError(
                f"the Neumann series diverges at scale = {scale:.3g}: the eigenvalues of scale (A + damping) must lie "
                "in (0, 2); use a smaller scale or more damping"
            )
    return x, float(residual.max())


def _lengths(b: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(b, dim=0)
    return torch.where(lengths > 0, lengths, 1.0)


def _relative(r: Tensor, lengths: Tensor) -> Tensor:
    return torch.linalg.vector_norm(r, dim=0) / lengths


def _preconditioner(value: Any, n: int) -> Apply:
    if value is None:
        return lambda columns: columns.clone()
    if isinstance(value, LinearOperator | Tensor):
        matrix = as_operator(value, "preconditioner")
        if tuple(value.shape) != (n, n):
            raise ValueError(f"preconditioner must be of shape {(n, n)}, got {tuple(value.shape)}")
        return lambda columns: matrix @ columns
    if not callable(value):
        raise TypeError(f"preconditioner must be an operator, a matrix or a function, got {type(value).__name__}")
    function: Any = value
    return function
