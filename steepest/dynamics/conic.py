r"""The largest margin itself, by an interior-point method with a certificate.

$\gamma_N = \max \{t : a_j^\top w \ge t \ \forall j,\ N(w) \le 1\}$ with one constraint $a_j$ for each sample and wrong
class. For the largest entry and the absolute sum this is a linear program; else a primal-dual interior-point method
solves it, with a cone of positive definite matrices for the spectral norm. Each iterate gives a classifier, and any
weights of the constraints give an upper bound by duality: $\gamma_N \le \|g\|_*$ for every convex combination $g$ of
the $a_j$.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest.dynamics.log_domain import check_data, label_mask
from steepest.dynamics.margins import MarginBounds, exact_norm
from steepest.geometry import Lp, Norm, Scaled, Schatten

# How much of the way to the boundary a step goes.
_BACKOFF = 0.95


@dataclass(frozen=True)
class MaxMargin:
    r"""The largest margin and the classifier that has it.

    Several classifiers may share the margin: in the largest entry some entries are free, in the spectral norm the sums
    of the columns are. `weight` is one of them, in the spectral and Frobenius norm one with column sums of zero.

    Attributes:
        margin: (*batch,), $\gamma_N$: what `weight` attains; zero if the data are not separable.
        weight: (*batch, k, d), $V_N$, of norm one; zero if the data are not separable.
        upper: (*batch,), a bound on the margin of every classifier of norm one.
    """

    margin: Float[Tensor, "*batch"]
    weight: Float[Tensor, "*batch k d"]
    upper: Float[Tensor, "*batch"]

    @property
    def bounds(self) -> MarginBounds:
        """Both sides, as a bracket."""
        return MarginBounds(self.margin, self.upper)


@torch.no_grad()
def max_margin(
    features: Float[Tensor, "*batch n d"],
    labels: Int[Tensor, "*#batch n"],
    norm: str | Norm,
    *,
    classes: int | None = None,
    tolerance: float = 1e-5,
) -> MaxMargin:
    r"""The classifier of largest margin, $\gamma_N = \max_{N(W) \le 1} \min_{i, c \ne y_i} (e_{y_i} - e_c)^\top W h_i$.

    Computed in float64, one problem after the other; a step costs the cube of k d, so this is for k d up to about 2000.

    Args:
        features: (*batch, n, d).
        labels: (*batch, n) or (n,), integers 0 .. k - 1.
        norm: N: "max", "l1", "euclidean", "spectral", `Lp(p)` with p >= 2, or one of these in `Scaled`. For others use
            `LinearSteepestDescent`, whose bounds bracket the margin in any norm.
        classes: k; None: the largest label plus one.
        tolerance: a larger relative difference of the bounds is warned of. The solver goes on until it is 1e-9, or
            rounding stops it.

    Raises:
        TypeError, ValueError: wrong data (see `log_domain.check_data`), or a norm that is not in the list.
        RuntimeError: the linear program was not solved.

    Source:
        Boyd and Vandenberghe 2004, Convex Optimization, section 11.7 (primal-dual methods); Helmberg, Rendl, Vanderbei
        and Wolkowicz 1996 (the direction for the spectral norm).

    Examples:
        >>> found = max_margin(torch.eye(3, dtype=torch.float64), torch.arange(3), "euclidean")
        >>> round(float(found.margin), 6), round(float(found.upper), 6)
        (0.707107, 0.707107)
    """
    count = check_data(features, labels, classes)
    norm = exact_norm(norm).at((count, features.shape[-1]))
    if not (isinstance(tolerance, int | float) and 0 < tolerance < 1):
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance!r}")
    _base(norm)
    flat = features.reshape(-1, *features.shape[-2:])
    every = labels.to(torch.int64).expand(features.shape[:-1]).reshape(len(flat), -1)
    found = [_solve(x, label_mask(y, count), norm, min(tolerance, 1e-9)) for x, y in zip(flat, every, strict=True)]
    for _, lower, upper in found:
        if lower > 0 and upper > (1 + tolerance) * lower:
            warnings.warn(f"the largest margin is only known to lie in [{lower:.9g}, {upper:.9g}]", stacklevel=3)
    batch = features.shape[:-2]
    weight = torch.stack([each[0] for each in found]).to(features).reshape(*batch, count, -1)
    lower, upper = (
        torch.tensor([each[i] for each in found], dtype=torch.float64).to(features).reshape(batch) for i in (1, 2)
    )
    return MaxMargin(lower, weight, upper)


def is_separable(
    features: Float[Tensor, "n d"], labels: Int[Tensor, "n"], classes: int | None = None, *, tolerance: float = 1e-10
) -> bool:
    """Whether some linear classifier is right on all samples: an exact test, up to rounding.

    Args:
        features: (n, d).
        labels: (n,), integers 0 .. k - 1.
        classes: k; None: the largest label plus one.
        tolerance: data whose largest Frobenius margin is below this, relative to the longest sample, count as not
            separable.

    Raises:
        TypeError, ValueError: see `log_domain.check_data`.
    """
    count = check_data(features, labels, classes)
    norm = Lp(2.0)
    own = label_mask(labels.to(torch.int64), count)
    _, lower, _ = _solve(features, own, norm, 0.5, give_up=tolerance)
    return lower > tolerance * float(features.norm(dim=-1).max())


def _solve(
    features: Tensor, own: Tensor, norm: Norm, tolerance: float, give_up: float = 1e-12
) -> tuple[Tensor, float, float]:
    """(weight of norm one, its margin, upper bound)."""
    unit = float(features.norm(dim=-1).max()) or 1.0
    norm, radius = _base(norm)
    x = features.double() / unit
    if isinstance(norm, Lp) and (norm.p == 1 or math.isinf(norm.p)):
        weight, dual = _linear_program(x, own, norm.p)
        best, lower, upper = _judge(weight, dual, x, own, norm, (torch.zeros_like(weight), 0.0, math.inf))
    else:
        ball = _SpectralBall(own.shape[-1], x) if isinstance(norm, Schatten) else _PowerBall(norm.p)  # type: ignore
        best, lower, upper = _interior_point(x, own, norm, ball, tolerance, give_up)
    return best * radius, lower * unit * radius, upper * unit * radius


def _judge(
    weight: Tensor, dual: Tensor, x: Tensor, own: Tensor, norm: Norm, best: tuple[Tensor, float, float]
) -> tuple[Tensor, float, float]:
    """The better of `best` and what this classifier and these weights of the constraints show."""
    known, lower, upper = best
    if isinstance(norm, Schatten):
        # Margins do not see a row that is added to all rows, and without it no singular value is larger.
        weight = weight - weight.mean(0)
    dual = dual.clamp_min(0) / dual.clamp_min(0).sum()
    upper = min(upper, float(norm.dual(_pull(dual, own).mT @ x)))
    length, raw = float(norm.norm(weight)), float(_gaps(weight, x, own).min())
    if length > 0 and raw / length > lower:
        return weight / length, raw / length, upper
    return known, lower, upper


def _pull(values: Tensor, own: Tensor) -> Tensor:
    """sum_c v_c (e_y - e_c) for each sample, (n, k)."""
    return torch.where(own, values.sum(-1, keepdim=True), 0.0) - values


def _gaps(weight: Tensor, x: Tensor, own: Tensor) -> Tensor:
    """(n, k): the margin of each sample against each class; infinite against its own."""
    logits = x @ weight.mT
    gaps = logits.masked_fill(~own, 0.0).sum(-1, keepdim=True) - logits
    return gaps.masked_fill(own, math.inf)


def _linear_program(x: Tensor, own: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The best weight of largest entry one (p infinite) or of absolute sum one (p = 1), and the dual variables."""
    import numpy as np
    from scipy.optimize import linprog

    classes, size = own.shape[-1], x.shape[-1]
    count = classes * size
    difference = own.to(x)[:, None, :] - torch.eye(classes, dtype=x.dtype, device=x.device)
    rows = torch.einsum("ica,ip->icap", difference, x)[~own].flatten(1).cpu().numpy()
    ones = np.ones((len(rows), 1))
    if math.isinf(p):
        matrix, bounds, extra = np.hstack([-rows, ones]), [(-1.0, 1.0)] * count, None
    else:
        matrix, bounds, extra = np.hstack([-rows, rows, ones]), [(0.0, None)] * (2 * count), np.ones((1, 2 * count + 1))
        extra[0, -1] = 0.0
    limits, right = [*bounds, (None, None)], np.zeros(len(rows))
    if extra is not None:
        matrix, right = np.vstack([matrix, extra]), np.append(right, 1.0)
    goal = np.append(np.zeros(len(bounds)), -1.0)
    found = linprog(goal, A_ub=matrix, b_ub=right, bounds=limits, method="highs")
    if found.status != 0:
        raise RuntimeError(f"the linear program for the largest margin was not solved: {found.message}")
    parts = torch.from_numpy(found.x[:-1]).to(x)
    weight = parts if math.isinf(p) else parts[:count] - parts[count:]
    dual = torch.zeros_like(own, dtype=x.dtype)
    dual[~own] = torch.from_numpy(-found.ineqlin.marginals[: len(rows)]).to(x)
    return weight.reshape(classes, size), dual


class _PowerBall:
    """The objective t - sum |w|^p / p in place of the ball: the same direction, since both are homogeneous."""

    order = 0

    def __init__(self, p: float):
        self.p = p

    def start(self, pull: Tensor) -> float:
        """The complementarity to begin with, for each constraint."""
        return float(pull.norm()) / pull.numel()

    def curvature(self, weight: Tensor) -> Tensor:
        """The ball's part of the Newton matrix."""
        return torch.diag(((self.p - 1) * weight.abs().pow(self.p - 2)).flatten())

    def push(self, weight: Tensor, target: float, corrected: bool) -> Tensor:
        """The ball's part of the right side."""
        return -weight.sign() * weight.abs().pow(self.p - 1)

    def move(self, weight: Tensor, step: Tensor, target: float, corrected: bool) -> tuple[float, float]:
        """Where the ball lets weight and multiplier go at most, along their steps."""
        return math.inf, math.inf

    def complementarity(self, weight: Tensor, step: Tensor, length: float, dual_length: float) -> float:
        """The inner product of the ball's matrix and its multiplier, after steps of these lengths."""
        return 0.0

    def advance(self, length: float) -> None:
        """Move the multiplier along its step."""


class _SpectralBall(_PowerBall):
    r"""$M = \begin{pmatrix} I & W \\ W^\top & I \end{pmatrix} \succeq 0$ with a multiplier $Y \succeq 0$, where
    $M Y = \text{target} \cdot I$; the HKM direction.
    """

    def __init__(self, classes: int, x: Tensor):
        self.classes, self.order = classes, classes + x.shape[-1]
        self.inverse = self.multiplier = torch.eye(self.order, dtype=x.dtype, device=x.device)
        self.change = self.second = torch.zeros_like(self.inverse)

    def start(self, pull: Tensor) -> float:
        size = float(torch.linalg.matrix_norm(pull, 2))
        self.multiplier = self._block(-pull / 2, size)
        return size

    def _block(self, weight: Tensor, diagonal: float) -> Tensor:
        block = diagonal * torch.eye(self.order, dtype=weight.dtype, device=weight.device)
        block[: self.classes, self.classes :] = weight
        block[self.classes :, : self.classes] = weight.mT
        return block

    def curvature(self, weight: Tensor) -> Tensor:
        k, y = self.classes, self.multiplier
        self.inverse = p = torch.linalg.inv(self._block(weight, 1.0))
        found = torch.einsum("pq,ba->apbq", p[k:, k:], y[:k, :k]) + torch.einsum("ab,qp->apbq", p[:k, :k], y[k:, k:])
        cross = torch.einsum("pb,qa->apbq", p[k:, :k], y[k:, :k])
        return (found + cross + cross.permute(2, 3, 0, 1)).reshape(weight.numel(), -1)

    def push(self, weight: Tensor, target: float, corrected: bool) -> Tensor:
        aim = target * self.inverse - (self.second if corrected else 0.0)
        return 2 * aim[: self.classes, self.classes :]

    def move(self, weight: Tensor, step: Tensor, target: float, corrected: bool) -> tuple[float, float]:
        step_block = self._block(step, 0.0)
        moved = _symmetric(self.inverse @ step_block @ self.multiplier)
        self.change = target * self.inverse - self.multiplier - moved - (self.second if corrected else 0.0)
        self.second = _symmetric(self.inverse @ step_block @ self.change)
        return _to_the_edge(self._block(weight, 1.0), step_block), _to_the_edge(self.multiplier, self.change)

    def complementarity(self, weight: Tensor, step: Tensor, length: float, dual_length: float) -> float:
        moved = self._block(weight + length * step, 1.0)
        return float((moved * (self.multiplier + dual_length * self.change)).sum())

    def advance(self, length: float) -> None:
        self.multiplier = _symmetric(self.multiplier + length * self.change)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _to_the_edge(matrix: Tensor, step: Tensor) -> float:
    """The largest length at which `matrix + length * step` is positive semidefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return 0.0
    half = torch.linalg.solve_triangular(factor, step, upper=False)
    half = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    lowest = float(torch.linalg.eigvalsh(_symmetric(half))[0])
    return -1 / lowest if lowest < 0 else math.inf


def _interior_point(
    x: Tensor, own: Tensor, norm: Norm, ball: _PowerBall, tolerance: float, give_up: float
) -> tuple[Tensor, float, float]:
    """Mehrotra's predictor and corrector: Newton on slack * dual = target for every constraint."""
    classes, size = own.shape[-1], x.shape[-1]
    outer = (x[:, :, None] * x[:, None, :]).flatten(1)
    constraints = int((~own).sum())
    dual = torch.where(own, 0.0, torch.full_like(x[:, :1], 1 / constraints))
    weight = x.new_zeros(classes, size)
    best = _judge(weight, dual, x, own, norm, (weight, 0.0, math.inf))
    if best[2] < give_up:
        return best
    level = -constraints * ball.start(_pull(dual, own).mT @ x)
    for _ in range(100):
        slack = torch.where(own, 1.0, _gaps(weight, x, own) - level)
        ratio = dual / slack
        total = ratio.sum(-1, keepdim=True)
        # sum_c r_c (e_y - e_c)(e_y - e_c)' for each sample
        mixed = own[:, :, None] * ratio[:, None, :]
        pairs = torch.diag_embed(torch.where(own, total, ratio)) - mixed - mixed.mT
        hessian = (pairs.flatten(1).mT @ outer).reshape(classes, classes, size, size).permute(0, 2, 1, 3)
        hessian = hessian.reshape(classes * size, -1) + ball.curvature(weight)
        edge = -(_pull(ratio, own).mT @ x).flatten()
        whole = torch.cat([torch.cat([hessian, edge[:, None]], 1), torch.cat([edge, total.sum()[None]])[None]])
        # Scaled to a unit diagonal: near the end the ratios span many decades.
        scale = whole.diagonal().clamp_min(torch.finfo(whole.dtype).tiny).rsqrt()
        factor = _factor(scale[:, None] * whole * scale)
        if factor is None:
            break
        gap = float((dual * slack).sum()) + ball.complementarity(weight, weight, 0.0, 0.0)
        target, second = 0.0, torch.zeros_like(dual)
        for corrected in (False, True):
            aim = torch.where(own, 0.0, target / slack) - second
            right = (_pull(aim, own).mT @ x + ball.push(weight, target, corrected)).flatten()
            right = torch.cat([right, (1 - aim.sum())[None]])
            step = scale * torch.cholesky_solve((scale * right)[:, None], factor)[:, 0]
            move, rise = step[:-1].view_as(weight), float(step[-1])
            slack_step = torch.where(own, 0.0, _gaps(move, x, own) - rise)
            dual_step = torch.where(own, 0.0, aim - dual - ratio * slack_step)
            far, dual_far = ball.move(weight, move, target, corrected)
            length = min(1.0, _BACKOFF * min(far, _to_zero(slack, slack_step)))
            dual_length = min(1.0, _BACKOFF * min(dual_far, _to_zero(torch.where(own, 1.0, dual), dual_step)))
            if not corrected:
                left = ((slack + length * slack_step) * (dual + dual_length * dual_step)).sum()
                reached = float(left) + ball.complementarity(weight, move, length, dual_length)
                target = min(1.0, max(reached / gap, 0.0)) ** 3 * gap / (constraints + ball.order)
                second = slack_step * dual_step / slack
        weight, level, dual = weight + length * move, level + length * rise, dual + dual_length * dual_step
        ball.advance(dual_length)
        best = _judge(weight, dual, x, own, norm, best)
        if best[2] - best[1] <= tolerance * best[2] or best[2] < give_up or max(length, dual_length) < 1e-8:
            break
    return best


def _factor(matrix: Tensor) -> Tensor | None:
    """The Cholesky factor, with as little added to the (unit) diagonal as it takes; None if that is too much."""
    added = 1e-15
    while added < 1e-6:
        shifted = matrix.clone()
        shifted.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return factor
        added *= 10
    return None


def _to_zero(values: Tensor, step: Tensor) -> float:
    """The largest length at which `values + length * step` is not negative."""
    lowest = float((step / values).min())
    return -1 / lowest if lowest < 0 else math.inf


def _base(norm: Norm) -> tuple[Norm, float]:
    """The norm inside `Scaled`, with the Frobenius norm as entrywise l2, and its radius; or an error."""
    radius, inner = 1.0, norm
    while isinstance(inner, Scaled):
        radius, inner = radius * inner.radius, inner.base  # type: ignore[operator]
    if isinstance(inner, Schatten) and inner.p == 2:
        inner = Lp(2.0)
    entrywise = isinstance(inner, Lp) and inner.event_ndim >= 2 and (inner.p == 1 or inner.p >= 2)
    if not entrywise and not (isinstance(inner, Schatten) and math.isinf(inner.p)):
        raise ValueError(
            "max_margin solves for Max, L1, Euclidean, Lp with p >= 2, Spectral, and these in Scaled; "
            f"got {norm!r}. LinearSteepestDescent brackets the margin in any norm"
        )
    return inner, radius
