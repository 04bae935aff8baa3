"""SNS: Sinkhorn sweeps, then Newton steps whose Hessian keeps only the largest entries of the plan."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.curvature.inverse import solve
from steepest.transport._stepper import Continuation, TransportStepper
from steepest.transport.problem import Transport
from steepest.transport.sparse_hessian import (
    ReducedHessian,
    SparseHessian,
    largest_entries,
    smallest_support,
)

Damping = Literal["auto", "none", "levenberg"]
ARMIJO = 1e-4
HALVINGS = 30
KEEP_CAP = 30
LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING = 1e-6, 1.0, 1e8


@dataclass(frozen=True)
class _Point:
    """Potentials with their plan and its sums."""

    x: Tensor
    y: Tensor
    plan: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, problem: Transport, x: Tensor, y: Tensor) -> "_Point":
        plan = problem.plan(x, y)
        return cls(x, y, plan, plan.sum(-1), plan.sum(-2))


class SinkhornNewton(TransportStepper):
    r"""Sinkhorn-Newton-Sparse (SNS), for one problem.

    After `n_sinkhorn` sweeps of Sinkhorn's iteration, each step solves $\tilde H d = \nabla f$ by conjugate gradients,
    where $\tilde H$ is minus the Hessian of the dual function f with the largest entries of the plan only (see
    `SparseHessian`), and moves by $\alpha d$, $\alpha = 1, 1/2, \dots$ until f increases enough. The system is reduced
    to the shorter side first. Where a step fails, a sweep is made instead.

    Args:
        C: costs, (n, m), float32 or float64.
        r: row sums, positive; None: uniform.
        c: column sums, positive, with the total of r; None: uniform.
        eta: inverse temperature.
        n_sinkhorn: sweeps before the first Newton step; at most 5 after each change of temperature.
        keep: kept entries, divided by max(n, m); "auto": the fewest that leave out no more than the mass
            $\min(10^{-4}, \max(10^{-8}, |g|_1 / 100))$, and at most 30 max(n, m).
        tol: what counts as solved; None: 1e-10 in float64, 1e-5 in float32.
        damping: "none"; "levenberg" adds $\eta \mu |g|_1 / (n + m)$ to the diagonal, with $\mu$ adapted by how well the
            quadratic model foretells f; "auto" does so from the first step that fails.
        continuation: whether to climb from high temperatures, each solved to 1e-4; "auto": if
            $\eta\,(\max C - \min C) > 200$.
        augmented: work with $f - \frac12 (1^\top x - 1^\top y)^2$, whose maximiser is unique.
        max_cg: steps of conjugate gradients for one Newton step, at most.
        warm_start: potentials (x, y) to start from; zeros if None.
        forbidden: whether infinite costs forbid their entries.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Source:
        Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao and Ying 2024, arXiv 2401.12253, algorithm 1. The
        safeguards, the reduction of the system and the continuation are ours.

    Examples:
        >>> C = torch.rand(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> stepper = SinkhornNewton(C, None, None, 1000.0)
        >>> while not stepper.converged:
        ...     metrics = stepper.step()
        >>> stepper.steps < 100
        True
    """

    _state = (*TransportStepper._state, "mu")
    _now: _Point | None

    def __init__(
        self,
        C: Float[Tensor, "n m"],
        r: Float[Tensor, "n"] | None,
        c: Float[Tensor, "m"] | None,
        eta: float,
        *,
        n_sinkhorn: int = 20,
        keep: float | Literal["auto"] = "auto",
        tol: float | None = None,
        damping: Damping = "auto",
        continuation: Continuation = "auto",
        augmented: bool = False,
        max_cg: int = 500,
        warm_start: tuple[Tensor, Tensor] | None = None,
        forbidden: bool = False,
    ) -> None:
        number = isinstance(keep, int | float) and not isinstance(keep, bool)
        if keep != "auto" and not (number and math.isfinite(keep) and keep >= 1):
            raise ValueError(f"keep must be 'auto' or a number of at least 1 (entries a row), got {keep!r}")
        if damping not in get_args(Damping):
            raise ValueError(f"damping must be one of {', '.join(get_args(Damping))}, got {damping!r}")
        check_int("max_cg", max_cg)
        self.keep, self.damping, self.augmented, self.max_cg = keep, damping, bool(augmented), max_cg
        self.mu = FIRST_DAMPING if damping == "levenberg" else 0.0
        super().__init__(
            C,
            r,
            c,
            eta,
            tol=tol,
            n_sinkhorn=n_sinkhorn,
            continuation=continuation,
            rung_steps=n_sinkhorn + 40,
            warm_start=warm_start,
            forbidden=forbidden,
        )
        if self.problem.batch:
            raise ValueError(
                f"C must be one matrix here, as r and c one vector each; got a batch {self.problem.batch}. "
                "DenseNewton and Sinkhorn take batches"
            )

    def _forget(self) -> None:
        super()._forget()
        self._now = None

    def _present(self) -> _Point:
        if self._now is None:
            self._now = _Point.of(self._at, self.x, self.y)
        return self._now

    def _measure(self) -> Float[Tensor, ""]:
        point = self._present()
        return self._at.error(point.a, point.b)

    @property
    def value(self) -> Float[Tensor, ""]:
        """The dual function."""
        point = self._present()
        return self._at.value(self.x, self.y, point.a.sum())

    def _newton(self) -> dict[str, Any]:
        if not math.isfinite(float(self.error)):
            return self._sweep()
        point, p = self._present(), self._at
        gx, gy = p.r - point.a, p.c - point.b
        norm = float(gx.abs().sum() + gy.abs().sum())
        kept = self._kept(point.plan, norm)
        shift = self.mu * norm / (len(gx) + len(gy))
        hessian = SparseHessian.of_plan(point.plan, kept, self.eta, shift=shift)
        found = self._direction(hessian, gx, gy, norm / float(p.mass))
        info: dict[str, Any] = {"stage": 1, "length": 0.0, "cg_steps": 0, "kept": len(kept)}
        if found is not None:
            dx, dy, info["cg_steps"] = found
            reached = (
                self._one_trial(point, dx, dy, gx, gy, hessian) if self.mu else self._line_search(point, dx, dy, gx, gy)
            )
            if reached is not None:
                self._forget()
                self._now, info["length"] = reached
                self.x, self.y = self._now.x, self._now.y
                return info
        if self.damping == "auto" and self.mu == 0:
            self.mu = FIRST_DAMPING
        elif self.mu:
            self.mu = min(4 * self.mu, MOST_DAMPING)
        return {**info, **self._sweep(), "cg_steps": info["cg_steps"]}

    def _kept(self, plan: Tensor, norm: float) -> Tensor:
        longer = max(plan.shape)
        if self.keep != "auto":
            return largest_entries(plan, math.ceil(float(self.keep) * longer))
        mass = float(self._at.mass)
        dropped = min(1e-4 * mass, max(1e-8 * mass, 0.01 * norm))
        return smallest_support(plan, dropped, KEEP_CAP * longer, least=sum(plan.shape))

    def _direction(
        self, hessian: SparseHessian, gx: Tensor, gy: Tensor, relative: float
    ) -> tuple[Tensor, Tensor, int] | None:
        """The Newton direction and how many CG steps it took; None where the system cannot be solved."""
        # As accurate as quadratic convergence needs, but not more than what is left to the tolerance.
        needed = max(relative, 0.1 * self.rung_tol / relative, math.sqrt(torch.finfo(gx.dtype).eps))
        tol = min(1e-2, needed)
        if self.augmented:
            gx, gy = self._augment(gx, gy)
            hessian = SparseHessian(
                hessian.a, hessian.b, hessian.rows, hessian.columns, hessian.values, self.eta,
                shift=hessian.shift, augmented=True,
            )  # fmt: skip
            found = self._cg(hessian, torch.cat([gx, gy]), hessian.diagonal(), tol)
            return None if found is None else (found[0][: len(gx)], found[0][len(gx) :], found[1])
        wide = len(gy) > len(gx)
        if wide:
            hessian = SparseHessian(
                hessian.b, hessian.a, hessian.columns, hessian.rows, hessian.values, self.eta, shift=hessian.shift
            )
            gx, gy = gy, gx
        reduced = ReducedHessian(hessian)
        found = self._cg(reduced, reduced.right_side(gx, gy), reduced.diagonal(), tol)
        if found is None:
            return None
        dy, products = found
        dx = reduced.back(gx, dy)
        return (dy / self.eta, dx / self.eta, products) if wide else (dx / self.eta, dy / self.eta, products)

    def _cg(self, A: Any, b: Tensor, diagonal: Tensor, tol: float) -> tuple[Tensor, int] | None:
        inverse = (1 / diagonal)[:, None]
        precondition: Callable[[Tensor], Tensor] = lambda columns: columns * inverse  # noqa: E731
        try:
            solution = solve(A, b, tol=tol, max_products=self.max_cg, preconditioner=precondition)
        except (ValueError, FloatingPointError):  # a direction of no curvature to rounding
            return None
        return (solution.x, solution.products) if bool(solution.x.isfinite().all()) else None

    def _augment(self, gx: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        tilt = self.x.sum() - self.y.sum()
        return gx - tilt, gy + tilt

    def _trial(self, point: _Point, dx: Tensor, dy: Tensor, length: float) -> tuple[_Point, float, float]:
        """The point at this length, the gain of f, and what rounding can make of the gain."""
        p = self._at
        new = _Point.of(p, point.x + length * dx, point.y + length * dy)
        gain = length * ((p.r * dx).sum() + (p.c * dy).sum()) - (new.a.sum() - point.a.sum()) / self.eta
        size = length * ((p.r * dx.abs()).sum() + (p.c * dy.abs()).sum()) + p.mass / self.eta
        if self.augmented:
            tilt, turn = point.x.sum() - point.y.sum(), length * (dx.sum() - dy.sum())
            gain = gain - turn * (tilt + turn / 2)
            size = size + turn.abs() * (tilt + turn).abs()
        return new, float(gain), 8 * torch.finfo(dx.dtype).eps * float(size)

    def _line_search(
        self, point: _Point, dx: Tensor, dy: Tensor, gx: Tensor, gy: Tensor
    ) -> tuple[_Point, float] | None:
        if self.augmented:
            gx, gy = self._augment(gx, gy)
        slope = float((gx * dx).sum() + (gy * dy).sum())
        if not (math.isfinite(slope) and slope > 0):
            return None
        length = 1.0
        for _ in range(HALVINGS):
            new, gain, rounding = self._trial(point, dx, dy, length)
            if math.isfinite(gain):
                if gain >= ARMIJO * length * slope:
                    return new, length
                # Where f cannot be told apart any more, its slope still can (Hager and Zhang 2005).
                if abs(gain) <= rounding and abs(self._slope_at(new, dx, dy)) <= (1 - 2 * ARMIJO) * slope:
                    return new, length
            length /= 2
        return None

    def _slope_at(self, new: _Point, dx: Tensor, dy: Tensor) -> float:
        gx, gy = self._at.r - new.a, self._at.c - new.b
        if self.augmented:
            tilt = new.x.sum() - new.y.sum()
            gx, gy = gx - tilt, gy + tilt
        return float((gx * dx).sum() + (gy * dy).sum())

    def _one_trial(
        self, point: _Point, dx: Tensor, dy: Tensor, gx: Tensor, gy: Tensor, hessian: SparseHessian
    ) -> tuple[_Point, float] | None:
        """Levenberg and Marquardt: the whole step or none, and the damping from how well the model foretold it."""
        if self.augmented:
            gx, gy = self._augment(gx, gy)
        slope = float((gx * dx).sum() + (gy * dy).sum())
        plain = SparseHessian(
            hessian.a, hessian.b, hessian.rows, hessian.columns, hessian.values, self.eta, augmented=self.augmented
        )
        d = torch.cat([dx, dy])
        model = slope - float((d * (plain @ d)).sum()) / 2
        new, gain, rounding = self._trial(point, dx, dy, 1.0)
        if not (math.isfinite(gain) and model > 0):
            return None
        ratio = gain / model
        if abs(gain) <= rounding and float(self._at.error(new.a, new.b)) < float(self.error):
            ratio = 1.0
        if not ratio > ARMIJO:
            return None
        if ratio < 0.25:
            self.mu = min(4 * self.mu, MOST_DAMPING)
        elif ratio > 0.75:
            self.mu = max(self.mu / 2, LEAST_DAMPING)
        if self.damping == "auto" and self.mu <= LEAST_DAMPING:
            self.mu = 0.0
        return new, 1.0

    def _climb(self) -> None:
        super()._climb()
        self.mu = FIRST_DAMPING if self.damping == "levenberg" else 0.0
