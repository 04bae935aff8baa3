"""What the methods of entropic transport share: potentials, the ladder of temperatures, and their state."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.loop import Resumable
from steepest.transport.problem import Transport

Continuation = bool | Literal["auto"]
RUNG_TOLERANCE = 1e-4
AUTO_FROM = 200.0
GENTLE = 40.0
LEAST_RUNGS = 5
LATER_SWEEPS = 5


def default_tolerance(dtype: torch.dtype) -> float:
    """1e-10 in float64 and 1e-5 in float32."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def ladder(problem: Transport, continuation: Continuation) -> tuple[float, ...]:
    r"""The inverse temperatures to solve at, the wanted one last.

    $\eta / 2^k, \dots, \eta / 2, \eta$, with k = 5, or more until $\eta\,(\max C - \min C) / 2^k \le 40$. "auto" climbs
    if $\eta\,(\max C - \min C) > 200$.
    """
    steepness = problem.eta * problem.spread
    if continuation == "auto":
        continuation = steepness > AUTO_FROM
    if not continuation:
        return (problem.eta,)
    rungs = max(LEAST_RUNGS, math.ceil(math.log2(max(steepness / GENTLE, 1.0))))
    return tuple(problem.eta / 2**k for k in range(rungs, -1, -1))


class TransportStepper(Resumable):
    r"""Base of `Sinkhorn`, `SinkhornNewton` and `DenseNewton`.

    `step()` returns ``error`` (the largest over the batch), ``value`` (f, the mean over the batch), ``eta``, ``stage``
    (0 for a sweep, 1 for a Newton step), ``length`` of the step (the mean over the batch), ``cg_steps``, ``kept``
    entries of the plan, and ``rung`` of the ladder of temperatures.

    Attributes:
        x: potentials of the rows, (*batch, n), in the units of the costs.
        y: potentials of the columns, (*batch, m).
        problem: the problem at the wanted temperature.
        etas: the ladder of inverse temperatures.
        error: $(|P 1 - r|_1 + |P^\top 1 - c|_1) / \text{mass}$ at the present temperature, (*batch,).
        value: f there, (*batch,).
        steps: how many steps were made.
        newton_steps: how many of them were meant as Newton steps at the wanted temperature; where one fails, a sweep
            stands for it.
    """

    _state = ("x", "y", "rung", "rung_steps", "steps", "newton_steps")

    def __init__(
        self,
        C: Float[Tensor, "*#batch n m"],
        r: Float[Tensor, "*#batch n"] | None,
        c: Float[Tensor, "*#batch m"] | None,
        eta: float,
        *,
        tol: float | None,
        n_sinkhorn: int,
        continuation: Continuation,
        rung_steps: int,
        warm_start: tuple[Tensor, Tensor] | None,
        forbidden: bool,
    ) -> None:
        self.problem = Transport.of(C, r, c, eta, forbidden=forbidden)
        dtype = self.problem.C.dtype
        least = 10 * torch.finfo(dtype).eps
        tol = default_tolerance(dtype) if tol is None else tol
        if isinstance(tol, bool) or not isinstance(tol, int | float) or not tol >= least or not math.isfinite(tol):
            raise ValueError(f"tol must be at least 10 eps = {least:.2g} in {dtype}, got {tol!r}")
        check_int("n_sinkhorn", n_sinkhorn, least=0)
        if continuation not in (True, False, "auto"):
            raise ValueError(f"continuation must be True, False or 'auto', got {continuation!r}")
        self.tol, self.n_sinkhorn, self._rung_limit = float(tol), n_sinkhorn, rung_steps
        self.x, self.y = self._start(warm_start)
        self.etas = ladder(self.problem, continuation)
        self.rung = self.rung_steps = self.steps = self.newton_steps = 0
        self._at = self.problem.at(self.etas[0])
        self._forget()

    def _start(self, warm_start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        p = self.problem
        if warm_start is None:
            return torch.zeros_like(p.r), torch.zeros_like(p.c)
        if not isinstance(warm_start, tuple | list) or len(warm_start) != 2:
            raise TypeError(f"warm_start must be a pair of potentials (x, y), got {type(warm_start).__name__}")
        found = []
        for name, value, like in zip("xy", warm_start, (p.r, p.c), strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"warm_start: {name} must be a real tensor, got {type(value).__name__}")
            if value.shape != like.shape:
                raise ValueError(f"warm_start: {name} must be {tuple(like.shape)}, got {tuple(value.shape)}")
            if not bool(value.isfinite().all()):
                raise ValueError(f"warm_start: {name} must be finite")
            found.append(value.detach().to(like, copy=True))
        return found[0], found[1]

    @property
    def eta(self) -> float:
        """The present inverse temperature."""
        return self.etas[self.rung]

    @property
    def converged(self) -> bool:
        """Whether every problem is solved at the wanted temperature, to the tolerance."""
        return self.rung == len(self.etas) - 1 and bool((self.error < self.tol).all())

    @property
    def rung_tol(self) -> float:
        """The tolerance at the present temperature."""
        return self.tol if self.rung == len(self.etas) - 1 else max(self.tol, RUNG_TOLERANCE)

    @torch.no_grad()
    def step(self) -> Mapping[str, Any]:
        """Make one sweep or one Newton step, and climb the ladder when the present temperature is done."""
        eta, rung = self.eta, self.rung
        sweep = self._wants_sweep()
        metrics = self._sweep() if sweep else self._newton()
        self.steps += 1
        self.rung_steps += 1
        if not sweep and rung == len(self.etas) - 1:
            self.newton_steps += 1
        if not bool(self.error.isfinite().all()):
            raise FloatingPointError(f"the marginals of the plan are not finite after step {self.steps}")
        found = {
            "error": self.error.max() if self.error.numel() else self.error.sum(),
            "value": self.value.mean() if self.error.numel() else self.value.sum(),
            "eta": eta,
            "rung": rung,
            **metrics,
        }
        last = self.rung == len(self.etas) - 1
        if not last and (bool((self.error < self.rung_tol).all()) or self.rung_steps >= self._rung_limit):
            self._climb()
        return found

    def _climb(self) -> None:
        self.rung, self.rung_steps = self.rung + 1, 0
        self._at = self.problem.at(self.eta)
        self._forget()

    def _wants_sweep(self) -> bool:
        return self.rung_steps < (self.n_sinkhorn if self.rung == 0 else min(self.n_sinkhorn, LATER_SWEEPS))

    @property
    def error(self) -> Float[Tensor, "*batch"]:
        """The marginal error of the present plan."""
        if self._error is None:
            with torch.no_grad():
                self._error = self._measure()
        return self._error

    def _measure(self) -> Float[Tensor, "*batch"]:
        raise NotImplementedError

    @property
    def value(self) -> Float[Tensor, "*batch"]:
        """The dual function."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop what was computed from other potentials or at another temperature."""
        self._error: Tensor | None = None

    def _sweep(self) -> dict[str, Any]:
        self.x, self.y = self._at.sweep(self.y)
        self._forget()
        return {"stage": 0, "length": 1.0, "cg_steps": 0, "kept": 0}

    def _newton(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is of another problem; nothing is changed then.
        """
        rung = state.get("rung") if isinstance(state, Mapping) else None
        if isinstance(rung, int) and not 0 <= rung < len(self.etas):
            raise ValueError(f"state: rung must be below {len(self.etas)}, got {rung}: it has another ladder")
        super().load_state_dict(state)
        self._at = self.problem.at(self.eta)
        self._forget()
