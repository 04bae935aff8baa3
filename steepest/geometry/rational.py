"""Inverse p-th roots of Gram matrices by a rational iteration: no eigenvalues, no singular values."""

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.coefficients import Triple

Factorization = Literal["qr", "cholesky"]

LARGEST_ROOT = 10
_BISECTIONS = 150


def as_root(c: float) -> tuple[int, int] | None:
    """(a, b) with c = a / b, b even and at most `LARGEST_ROOT`; the smallest such b, or None."""
    for b in range(2, LARGEST_ROOT + 1, 2):
        if abs(c * b - round(c * b)) < 1e-9:
            return round(c * b), b
    return None


@lru_cache
def rational_schedule(b: int, smallest: float = 1e-12, tolerance: float = 1e-9) -> tuple[Triple, ...]:
    r"""Coefficients $(\alpha, \beta, \gamma)$ per step of the fastest iteration for $x^{-1/b}$, $x \in [l, 1]$.

    With $s = x^{1/b}$, a step maps s to $f(s) = s (\alpha + \beta s^b) / (1 + \gamma s^b)$. Its coefficients make
    $f(1) = 1$ and the interior maximum 1, and raise the lower end of the range as far as they can: $f(l)$ equals the
    interior minimum. The next step starts from there. The limit is $((b+1)/(b-1), 1, (b+1)/(b-1))$; for b = 2 the
    schedule is that of QDWH.

    Args:
        b: the root, even, 2 or more.
        smallest: the lower end l of the range of x, in (0, 1].
        tolerance: the schedule ends once s lies in [1 - tolerance, 1]; four or five steps for the defaults.

    Raises:
        ValueError: an odd b, or one below 2; `smallest` outside (0, 1].

    Source:
        Nakatsukasa, Bai and Gygi 2010, Optimizing Halley's iteration for computing the matrix polar decomposition
        (b = 2); derived here for b > 2.

    Examples:
        >>> [round(value, 6) for value in rational_schedule(4)[3]]
        [1.671721, 1.015233, 1.686955]

    """
    if isinstance(b, bool) or not isinstance(b, int) or b < 2 or b % 2:
        raise ValueError(f"b must be an even integer of at least 2, got {b!r}")
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must lie in (0, 1], got {smallest!r}")
    with localcontext() as context:
        context.prec = 60
        low, found = Decimal(smallest) ** (Decimal(1) / b), []
        while not found or 1 - low > Decimal(tolerance):
            triple = _best_step(b, low)
            low = _step(low, b, triple)
            found.append(triple)
    return tuple((float(alpha), float(beta), float(gamma)) for alpha, beta, gamma in found)


def _step(s: Decimal, b: int, triple: tuple[Decimal, Decimal, Decimal]) -> Decimal:
    alpha, beta, gamma = triple
    return s * (alpha + beta * s**b) / (1 + gamma * s**b)


def _best_step(b: int, low: Decimal) -> tuple[Decimal, Decimal, Decimal]:
    if 1 - low < Decimal("1e-15"):
        limit = Decimal(b + 1) / (b - 1)
        return limit, Decimal(1), limit
    left, right = low, Decimal(1)
    for _ in range(_BISECTIONS):
        peak = (left + right) / 2
        alpha, beta, gamma = triple = _with_peak(b, peak)
        valley = (alpha / (beta * gamma * peak**b)) ** (Decimal(1) / b)
        if _step(low, b, triple) > _step(valley, b, triple):
            left = peak
        else:
            right = peak
    return triple  # pyright: ignore[reportPossiblyUnboundVariable]


def _with_peak(b: int, s: Decimal) -> tuple[Decimal, Decimal, Decimal]:
    """The coefficients with f(1) = 1, f(s) = 1 and f'(s) = 0: three linear equations."""
    t = s**b
    # alpha = 1 + gamma - beta, so s (1 + gamma - beta (1 - t)) = 1 + gamma t, and numerator' = denominator':
    # 1 + gamma + beta ((b + 1) t - 1) = b gamma t / s.
    a11, a12, r1 = s - t, -s * (1 - t), 1 - s
    a21, a22, r2 = 1 - b * t / s, (b + 1) * t - 1, Decimal(-1)
    determinant = a11 * a22 - a12 * a21
    gamma, beta = (r1 * a22 - a12 * r2) / determinant, (a11 * r2 - r1 * a21) / determinant
    return 1 + gamma - beta, beta, gamma


def inverse_root(
    x: Float[Tensor, "batch k n"], power: int, root: int, floor: float, factorization: Factorization
) -> tuple[Float[Tensor, "batch k k"], Float[Tensor, "batch k k"]]:
    r"""$(X X^\top + \epsilon I)^{-a/b}$, $\epsilon$ = `floor` squared, for X of Frobenius norm one; and a factor.

    The second result is the triangular R with $R^\top R = X X^\top + \epsilon I$. QR of the stack of $X^\top$ and
    $\sqrt\epsilon I$ keeps $\epsilon$ meaningful where a Gram matrix would lose it to rounding.
    """
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    if factorization == "qr" or x.dtype != torch.float64:
        upper = torch.linalg.qr(torch.cat([x.mT, floor * identity], 1), mode="r").R
    else:
        gram = torch.baddbmm(identity, x, x.mT, beta=floor**2)
        upper = torch.linalg.cholesky_ex(gram, upper=True).L
    factor, product = upper.mT, identity
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-7
    for step, (alpha, beta, gamma) in enumerate(rational_schedule(root, floor**2, tolerance)):
        rho = beta / gamma
        inverse = _resolvent(factor, gamma, factorization)
        update = rho * identity + (alpha - rho) * inverse
        product = torch.bmm(update, product) if step else update
        for _ in range(root // 2):
            factor = torch.bmm(update, factor)
    return torch.linalg.matrix_power(product, power), upper


def _resolvent(factor: Float[Tensor, "batch k k"], gamma: float, factorization: Factorization) -> Tensor:
    r"""$(I + \gamma L L^\top)^{-1}$, symmetric."""
    size = factor.shape[1]
    identity = torch.eye(size, dtype=factor.dtype, device=factor.device).expand(len(factor), -1, -1)
    if factorization == "cholesky":
        shifted = torch.baddbmm(identity, factor, factor.mT, alpha=gamma)
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)
    scale = min(1.0, 1 / math.sqrt(gamma))
    stack = torch.cat([math.sqrt(gamma) * scale * factor.mT, scale * identity], 1)
    lower = torch.linalg.qr(stack).Q[:, size:]
    return torch.bmm(lower, lower.mT)


def effective_rank(upper: Float[Tensor, "batch k k"], floor: float) -> Float[Tensor, " batch"]:
    r"""$\mathrm{tr}\,XX^\top (XX^\top + \epsilon I)^{-1}$ from the factor that `inverse_root` returns."""
    return upper.shape[-1] - floor**2 * inverse_norm(upper).square()


def inverse_norm(upper: Float[Tensor, "batch k k"]) -> Float[Tensor, " batch"]:
    r"""$\|R^{-1}\|_F$: one over it is just below the smallest singular value, at most by $\sqrt{k}$."""
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True).flatten(1).norm(dim=1)
