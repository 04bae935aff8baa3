"""A few eigenpairs at an end of the spectrum, by Lanczos with thick restarts."""

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.curvature.operator import LinearOperator, symmetric_operator

_BYTES = 2**30
_FRESH = 10


class Eigenpairs(NamedTuple):
    r"""What `top_eigenpairs` found; a column of `vectors` for each of `values`.

    Attributes:
        values: The eigenvalues, the wanted end first.
        vectors: Orthonormal columns.
        residuals: $|A v - \lambda v|$ of each pair: A has an eigenvalue within this distance of the value.
        products: How many products with A it took.
        converged: Whether every residual is within the tolerance.
    """

    values: Float[Tensor, "k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float[Tensor, "k"]
    products: int
    converged: bool


def top_eigenpairs(
    A: LinearOperator | Tensor,
    k: int = 1,
    *,
    tol: float = 1e-4,
    max_products: int | None = None,
    start: Float[Tensor, "n"] | None = None,
    which: Literal["largest", "magnitude", "smallest"] = "largest",
    basis: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""The `k` eigenpairs at one end of the spectrum of a symmetric operator.

    Lanczos with full reorthogonalisation: the Krylov basis grows by one product at a time until
    $|A v - \lambda v| \le \text{tol} \cdot \max|\lambda|$ for all wanted pairs. When the basis is full, the best
    Ritz vectors stay and the rest is dropped (a thick restart). By full orthogonality no pair is found twice; when the
    Krylov space is exhausted, it goes on with a fresh vector, so that multiple eigenvalues are found, too. From a given
    `start` it stops as soon as the residuals allow it, which may leave out copies of a multiple eigenvalue.

    Args:
        A: Symmetric.
        k: How many.
        tol: Largest residual, relative to the largest |eigenvalue|. The error of a value that is apart from the
            others is about the square of that.
        max_products: Products to spend at most; max(100, 20 k) if None.
        start: First vector, for example the last top eigenvector of a slowly changing operator; random if None.
        which: "largest", "smallest", or "magnitude" for the largest absolute values.
        basis: Vectors kept at once; if None as many as fit into 1 GiB, at most 128, at least 2 k + 10.
        generator: Source of the random vectors; a new one with seed 0 if None, so that the result is reproducible.

    Raises:
        TypeError, ValueError: an argument is wrong.
        FloatingPointError: a product is not finite.

    Source:
        Wu and Simon 2000, SIAM J. Matrix Anal. Appl. 22(2), 602-616 (thick restarts).

    Examples:
        >>> pairs = top_eigenpairs(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 2)
        >>> pairs.values.round()
        tensor([5., 3.])
    """
    A = symmetric_operator(A)
    n = A.shape[0]
    k, limit, capacity = _check(A, k, tol, max_products, start, which, basis)
    random = _Random(A, generator)
    q = random.unit() if start is None else _unit(start.detach().to(A.device, A.dtype))
    Q = torch.empty(min(capacity, 32), n, dtype=A.dtype, device=A.device)  # rows: the basis, grown as needed
    H = torch.zeros(capacity, capacity, dtype=torch.float64)  # Q A Q^T
    size = products = 0
    fresh, broken = 0, False  # products since the last fresh vector, and whether a Krylov space was exhausted
    while True:
        if size == Q.shape[0]:
            Q = torch.cat([Q, Q.new_empty(min(size, capacity - size), n)])
        Q[size] = q
        w = A @ q
        products, fresh, size = products + 1, fresh + 1, size + 1
        h, w = _orthogonalise(Q[:size], w)
        beta = float(torch.linalg.vector_norm(w))
        H[:size, size - 1] = H[size - 1, :size] = h.double().cpu()
        if not (math.isfinite(beta) and bool(H[:size, size - 1].isfinite().all())):
            raise FloatingPointError(f"product {products} with the operator is not finite")
        theta, S = torch.linalg.eigh(H[:size, :size])
        order = _order(theta, which)
        scale = float(theta.abs().max())
        rounding = torch.finfo(A.dtype).eps * max(scale, torch.finfo(A.dtype).tiny)
        exhausted = beta <= max(4 * math.sqrt(n), 64) * rounding
        wanted = order[:k]
        residuals = torch.zeros(len(wanted)).double() if exhausted else beta * S[-1, wanted].abs()
        if start is None and not broken and not exhausted and beta <= tol * scale:
            broken, fresh = True, 0  # exhausted to within tol: small residuals prove nothing, the rest must be seen
        broken |= exhausted
        explored = exhausted or not broken or fresh >= _FRESH
        # What the newest vector has seen of the rest may belong among the wanted ones: there may be more of it.
        left = _key(H[size - 1, size - 1], which) < _key(theta[wanted[-1]], which) - tol * scale
        # A fresh vector follows every exhausted space, unless it is the last one or nothing is left to find.
        enough = size >= k and bool((residuals <= tol * scale).all()) and explored and not (broken and bool(left))
        if (enough and (not exhausted or fresh == 1 or scale == 0.0)) or size == n or products >= limit:
            converged = size >= k and bool((residuals <= tol * scale).all())
            vectors = S[:, wanted].to(Q).T @ Q[:size]
            values = theta[wanted].to(Q)
            return Eigenpairs(values, vectors.T, residuals.to(Q), products, converged)
        if size == capacity:
            keep = order[: min(size - 2, k + (size - k) // 2)]
            Q[: len(keep)] = S[:, keep].to(Q).T @ Q[:size]
            H.zero_()
            H[range(len(keep)), range(len(keep))] = theta[keep]
            size = len(keep)
        if exhausted:
            q, fresh = random.unit(Q[:size]), 0
        else:
            q = _unit(w)
            if size < len(theta):  # after a restart the basis was rotated; keep the new vector orthogonal to rounding
                q = _unit(_orthogonalise(Q[:size], q)[1])


def _check(
    A: LinearOperator,
    k: int,
    tol: float,
    max_products: int | None,
    start: Any,
    which: str,
    basis: int | None,
) -> tuple[int, int, int]:
    n = A.shape[0]
    check_int("k", k)
    if k > n:
        raise ValueError(f"k must be at most the size of the operator, {n}, got {k}")
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol must be positive, got {tol}")
    if which not in ("largest", "magnitude", "smallest"):
        raise ValueError(f"which must be largest, magnitude or smallest, got {which!r}")
    if max_products is not None:
        check_int("max_products", max_products, least=k)
    if start is not None:
        if not isinstance(start, Tensor) or start.shape != (n,) or start.is_complex():
            raise ValueError(f"start must be a real vector ({n},), got {getattr(start, 'shape', type(start).__name__)}")
        if not (bool(start.isfinite().all()) and bool(start.any())):
            raise ValueError("start must be finite and not zero")
    if basis is None:
        fitting = _BYTES // (n * torch.finfo(A.dtype).bits // 8)
        basis = max(min(fitting, 128), 2 * k + 10)
    else:
        check_int("basis", basis, least=k + 3)
    return k, max(100, 20 * k) if max_products is None else max_products, min(basis, n)


def _order(theta: Tensor, which: str) -> list[int]:
    return torch.argsort(_key(theta, which)).tolist()


def _key(theta: Tensor, which: str) -> Tensor:
    """Smaller is more wanted."""
    return {"largest": -theta, "smallest": theta, "magnitude": -theta.abs()}[which]


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v)


def _orthogonalise(Q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of `w` along the rows of Q and what is left; twice, which is enough (Kahan)."""
    h = Q @ w
    w = w - h @ Q
    again = Q @ w
    return h + again, w - again @ Q


class _Random:
    def __init__(self, A: LinearOperator, generator: torch.Generator | None) -> None:
        self.A = A
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def unit(self, Q: Tensor | None = None) -> Tensor:
        """A random unit vector, orthogonal to the rows of Q."""
        v = torch.randn(self.A.shape[0], dtype=torch.float64, generator=self.generator, device=self.generator.device)
        v = v.to(self.A.device, self.A.dtype)
        if Q is not None:
            v = _unit(_orthogonalise(Q, _unit(v))[1])
        return _unit(v)
