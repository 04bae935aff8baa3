"""Newton's method on the dual with the whole Hessian, for many problems at once."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.couplings import exponent_floor
from steepest.transport._stepper import LATER_SWEEPS, Continuation, TransportStepper
from steepest.transport.newton_system import augmented_direction, newton_direction
from steepest.transport.problem import Transport

ARMIJO = 1e-4
HALVINGS = 30
WORTH = 100
LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING = 1e-6, 1.0, 1e8


class DenseNewton(TransportStepper):
    r"""Newton's method with every entry of the plan, batched.

    Sweeps of Sinkhorn's iteration come first. They go on as long as their rate promises to reach the tolerance within
    100 more; otherwise each step solves $H d = \nabla f$ by a Cholesky factorisation (see `newton_direction`). Each
    problem has its own step length, makes a sweep where no length raises f, and damps its later steps then (as
    Levenberg and Marquardt do). Problems that are solved rest. For n up to about 500 this is faster than SNS.

    Between Newton steps a sweep is two products with a plan that was computed once; the scalings are put back into the
    potentials before they leave the range of floats.

    Args:
        C: costs, (*batch, n, m), float32 or float64.
        r: row sums, positive; None: uniform.
        c: column sums, positive, with the total of r; None: uniform.
        eta: inverse temperature.
        n_sinkhorn: sweeps before the first Newton step, at least; 5 after each change of temperature.
        tol: what counts as solved; None: 1e-10 in float64, 1e-5 in float32.
        continuation: whether to climb from high temperatures, each solved to 1e-4; "auto": if
            $\eta\,(\max C - \min C) > 200$.
        augmented: add $w w^\top$, w = (1, -1), to H: the Newton step of $f - \frac12 (1^\top x - 1^\top y)^2$. It
            factors a matrix of size n + m.
        warm_start: potentials (x, y) to start from; zeros if None.
        forbidden: whether infinite costs forbid their entries.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Examples:
        >>> C = torch.rand(5, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> stepper = DenseNewton(C, None, None, 30.0)
        >>> while not stepper.converged:
        ...     metrics = stepper.step()
        >>> stepper.error.shape
        torch.Size([5])
    """

    _state = (*TransportStepper._state, "from_x", "from_y", "u", "v", "mu", "last_error", "tried")

    def __init__(
        self,
        C: Float[Tensor, "*#batch n m"],
        r: Float[Tensor, "*#batch n"] | None,
        c: Float[Tensor, "*#batch m"] | None,
        eta: float,
        *,
        n_sinkhorn: int = 10,
        tol: float | None = None,
        continuation: Continuation = "auto",
        augmented: bool = False,
        warm_start: tuple[Tensor, Tensor] | None = None,
        forbidden: bool = False,
    ) -> None:
        self.augmented = bool(augmented)
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
        self._restart()

    def _restart(self) -> None:
        """The plan is that of x and y, at a new place or temperature: u = v = 1."""
        self.from_x, self.from_y = self.x, self.y
        self.u, self.v = torch.ones_like(self.x), torch.ones_like(self.y)
        self.mu = torch.zeros_like(self.problem.mass)
        self.last_error = torch.full_like(self.problem.mass, torch.inf)
        self.tried = 0

    def _climb(self) -> None:
        super()._climb()
        self._restart()

    def _forget(self) -> None:
        super()._forget()
        self._kernel: Tensor | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    def _plan(self) -> Tensor:
        """The plan at `from_x` and `from_y`; the present one is u * plan * v."""
        if self._kernel is None:
            self._kernel = self._at.plan(self.from_x, self.from_y)
        return self._kernel

    def _absorb(self) -> Tensor:
        """The present plan, after the scalings are put into the potentials."""
        if self.from_x is not self.x or self.from_y is not self.y:
            self.from_x, self.from_y = self.x, self.y
            self.u, self.v = torch.ones_like(self.x), torch.ones_like(self.y)
            self._forget()
        return self._plan()

    def _marginals(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            plan = self._plan()
            self._sums = (
                self.u * (plan @ self.v[..., None])[..., 0],
                self.v * (plan.mT @ self.u[..., None])[..., 0],
            )
        return self._sums

    def _measure(self) -> Float[Tensor, "*batch"]:
        return self._at.error(*self._marginals())

    @property
    def value(self) -> Float[Tensor, "*batch"]:
        """The dual function."""
        return self._at.value(self.x, self.y, self._marginals()[0].sum(-1))

    def _wants_sweep(self) -> bool:
        if self.tried:
            return False
        if self.rung_steps < (self.n_sinkhorn if self.rung == 0 else min(self.n_sinkhorn, LATER_SWEEPS)):
            return True
        error = self.error
        rate = (error / self.last_error).clamp(1e-3, 1 - 1e-9)
        left = torch.where(error < self.rung_tol, 0.0, (self.rung_tol / error).log() / rate.log())
        return self.n_sinkhorn > 0 and self.rung_steps > 1 and bool((left <= WORTH).all())

    def _sweep(self) -> dict[str, Any]:
        self.last_error = self.error
        p, plan, range_ = self._at, self._plan(), -exponent_floor(self.x.dtype) / 4
        u = self.u * p.r / self._marginals()[0]
        v = p.c / (plan.mT @ u[..., None])[..., 0]
        far = torch.maximum(u.log().abs().amax(-1), v.log().abs().amax(-1))
        if bool((far < range_).all()):
            super()._forget()
            self.u, self.v = u, v
            self.x, self.y = self.from_x + u.log() / self.eta, self.from_y + v.log() / self.eta
            self._sums = (u * (plan @ v[..., None])[..., 0], p.c)
        else:
            self.x, self.y = p.sweep(self.y)
            self._absorb()
        return {"stage": 0, "length": 1.0, "cg_steps": 0, "kept": 0}

    def _newton(self) -> dict[str, Any]:
        self.tried = 1
        whole_plan = self._absorb()
        p = self._at.flat()
        x, y, mu = self.x.reshape(p.r.shape), self.y.reshape(p.c.shape), self.mu.reshape(-1)
        plan = whole_plan.reshape(p.C.shape)
        # A problem whose plan overflowed, after a warm start, has an error that is no number: it is not solved.
        open_ = torch.nonzero(~(self.error.reshape(-1) < self.rung_tol))[:, 0]
        if len(open_) in (0, len(x)):
            found = _step(p, x, y, plan, mu, self.augmented)
            new = list(found[:4])
        else:
            found = _step(p.select(open_), x[open_], y[open_], plan[open_], mu[open_], self.augmented)
            new = [each.index_copy(0, open_, part) for each, part in zip((x, y, plan, mu), found, strict=False)]
        self.x, self.y = new[0].reshape(self.x.shape), new[1].reshape(self.y.shape)
        self.from_x, self.from_y, self.mu = self.x, self.y, new[3].reshape(self.mu.shape)
        super()._forget()
        self._kernel, self._sums = new[2].reshape(self._at.C.shape), None
        return {"stage": 1, "length": found[4].mean(), "cg_steps": 0, "kept": p.C.shape[-1] * p.C.shape[-2]}


def _step(
    p: Transport, x: Tensor, y: Tensor, plan: Tensor, mu: Tensor, augmented: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """New potentials, their plans, the new damping, and the step lengths: 0 where a sweep was made."""
    a, b = plan.sum(-1), plan.sum(-2)
    gx, gy = p.r - a, p.c - b
    shift = mu * (gx.abs().sum(-1) + gy.abs().sum(-1)) / (p.r.shape[-1] + p.c.shape[-1])
    if augmented:
        tilt = (x.sum(-1) - y.sum(-1))[:, None]
        dx, dy = augmented_direction(plan, gx - tilt, gy + tilt, p.eta, shift)
    else:
        dx, dy = newton_direction(plan, gx, gy, p.eta, shift)
    slope = (gx * dx).sum(-1) + (gy * dy).sum(-1)
    length = _search(p, x, y, dx, dy, slope, a.sum(-1))
    failed = torch.nonzero(length == 0)[:, 0]
    zero = (length == 0)[:, None]
    new_x = torch.where(zero, x, x + length[:, None] * dx)
    new_y = torch.where(zero, y, y + length[:, None] * dy)
    if len(failed):
        new_x[failed], new_y[failed] = p.select(failed).sweep(y[failed])
    mu = torch.where(length == 1, mu / 2, torch.where(length < 0.25, 4 * mu, mu))
    mu = torch.where(length == 0, mu.clamp_min(FIRST_DAMPING), torch.where(mu < LEAST_DAMPING, 0.0, mu))
    return new_x, new_y, p.plan(new_x, new_y), mu.clamp_max(MOST_DAMPING), length


def _search(p: Transport, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, slope: Tensor, total: Tensor) -> Tensor:
    """The step length of each problem: the first of 1, 1/2, ... that raises f enough; 0 if there is none."""
    length = torch.zeros_like(slope)
    trying, t = torch.nonzero(slope.isfinite() & (slope > 0))[:, 0], 1.0
    for _ in range(HALVINGS):
        if len(trying) == 0:
            break
        q = p if len(trying) == len(x) else p.select(trying)
        ex, ey, s = dx[trying], dy[trying], slope[trying]
        trial = q.plan(x[trying] + t * ex, y[trying] + t * ey)
        a, b = trial.sum(-1), trial.sum(-2)
        gain = t * ((q.r * ex).sum(-1) + (q.c * ey).sum(-1)) - (a.sum(-1) - total[trying]) / p.eta
        rounding = t * ((q.r * ex.abs()).sum(-1) + (q.c * ey.abs()).sum(-1)) + q.mass / p.eta
        # Where f cannot be told apart any more, its slope still can (Hager and Zhang 2005).
        later = ((q.r - a) * ex).sum(-1) + ((q.c - b) * ey).sum(-1)
        level = (gain.abs() <= 8 * torch.finfo(x.dtype).eps * rounding) & (later.abs() <= (1 - 2 * ARMIJO) * s)
        good = gain.isfinite() & ((gain >= ARMIJO * t * s) | level)
        length[trying[good]] = t
        trying, t = trying[~good], t / 2
    return length
