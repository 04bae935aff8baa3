"""`entropic_ot`: the methods behind one function."""

import warnings
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.transport._stepper import Continuation, TransportStepper
from steepest.transport.dense_newton import DenseNewton
from steepest.transport.result import OTResult
from steepest.transport.sinkhorn import Sinkhorn
from steepest.transport.sinkhorn_newton import Damping, SinkhornNewton

# Up to here, on the shorter side, a factorisation takes less time than conjugate gradients.
DENSE = 1000

Method = Literal["auto", "sns", "newton", "sinkhorn"]


def entropic_ot(
    C: Float[Tensor, "*#batch n m"],
    r: Float[Tensor, "*#batch n"] | None,
    c: Float[Tensor, "*#batch m"] | None,
    eta: float,
    method: Method = "auto",
    *,
    n_sinkhorn: int | None = None,
    keep: float | Literal["auto"] = "auto",
    max_newton: int = 100,
    max_sweeps: int = 10_000,
    tol: float | None = None,
    damping: Damping = "auto",
    continuation: Continuation = "auto",
    augmented: bool = False,
    warm_start: tuple[Tensor, Tensor] | OTResult | None = None,
    forbidden: bool = False,
) -> OTResult:
    r"""Entropic optimal transport, to machine precision also where the entropy is weak.

    $$\min_P \langle C, P \rangle + \frac{1}{\eta} \sum_{ij} P_{ij} \log P_{ij}, \quad P 1 = r, \quad P^\top 1 = c.$$

    If only the cost of the best plan without entropy is wanted and n is at most about 1000, an exact network simplex is
    faster than any of these.

    Args:
        C: costs, (*batch, n, m), float32 or float64. Digits are lost to a large common constant: subtract it.
        r: row sums, (*batch, n), positive; None: uniform. Batches of C, r and c broadcast.
        c: column sums, (*batch, m), positive, with the same total as r; None: uniform.
        eta: inverse temperature $\eta$, in units of 1 / cost; other packages' `reg` is $1/\eta$.
        method: "sns" (`SinkhornNewton`, one problem), "newton" (`DenseNewton`), "sinkhorn" (`Sinkhorn`); "auto":
            "newton" for a batch, and for min(n, m) <= 1000 unless `keep` or `damping` is given; otherwise "sns".
        n_sinkhorn: sweeps before the first Newton step; None: 20 for "sns", 5 for "newton".
        keep: entries of the plan that "sns" keeps, divided by max(n, m), or "auto".
        max_newton: Newton steps at the wanted temperature, at most.
        max_sweeps: steps of "sinkhorn", at most.
        tol: largest $(|P 1 - r|_1 + |P^\top 1 - c|_1) / \text{mass}$; None: 1e-10 in float64, 1e-5 in float32. Below
            about $10^{-14}\,n$ rounding is in the way.
        damping: of "sns": "none", "levenberg", or "auto".
        continuation: whether to climb from high temperatures; "auto": for "sns" and "newton", if $\eta$ times the range
            of C is above 200.
        augmented: of "sns" and "newton": work with the augmented potential, whose maximiser is unique.
        warm_start: potentials (x, y), or an `OTResult`, to start from. It switches "auto" continuation off.
        forbidden: whether $+\infty$ in C forbids an entry; otherwise it is an error.

    Returns:
        The solution. If it is not solved to the tolerance, ``converged`` is False, and a warning says so.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Source:
        Tang et al. 2024, arXiv 2401.12253.

    Examples:
        >>> C = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]], dtype=torch.float64)
        >>> r, c = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
        >>> result = entropic_ot(C, r, c, 3.0)
        >>> print(f"{result.cost:.6f} {result.value:.6f}")
        0.628603 0.134880
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    check_int("max_newton", max_newton)
    check_int("max_sweeps", max_sweeps)
    if isinstance(warm_start, OTResult):
        warm_start = warm_start.potentials
    if warm_start is not None and continuation == "auto":
        continuation = False
    if method == "auto":
        marginals = [each for each in (r, c) if isinstance(each, Tensor)]
        several = getattr(C, "ndim", 2) > 2 or any(each.ndim > 1 for each in marginals)
        small = isinstance(C, Tensor) and C.ndim >= 2 and min(C.shape[-2:]) <= DENSE
        method = "newton" if several or (small and keep == damping == "auto") else "sns"
    stepper: TransportStepper
    shared: dict[str, Any] = {"tol": tol, "warm_start": warm_start, "forbidden": forbidden}
    if method == "sinkhorn":
        stepper = Sinkhorn(C, r, c, eta, continuation=continuation, **shared)
    else:
        shared |= {"continuation": continuation, "augmented": augmented}
        if n_sinkhorn is not None:
            shared["n_sinkhorn"] = n_sinkhorn
        if method == "sns":
            stepper = SinkhornNewton(C, r, c, eta, keep=keep, damping=damping, **shared)
        else:
            stepper = DenseNewton(C, r, c, eta, **shared)
    history = _drive(stepper, max_newton, max_sweeps)
    return result_of(stepper, history, method)


def result_of(stepper: TransportStepper, history: list[dict[str, Any]] | None = None, method: str = "") -> OTResult:
    """The result at the present state of a stepper.

    Args:
        stepper: a `Sinkhorn`, `SinkhornNewton` or `DenseNewton`, however far it got.
        history: its metrics, if they are to be kept.
        method: name for the result; None: that of the class.
    """
    p, x, y = stepper.problem, stepper.x.clone(), stepper.y.clone()
    plan = p.plan(x, y)
    a, b = plan.sum(-1), plan.sum(-2)
    forbidden = torch.isposinf(p.C)
    cost = (plan * (torch.where(forbidden, 0.0, p.C) if bool(forbidden.any()) else p.C)).sum((-2, -1))
    name = method or type(stepper).__name__
    return OTResult(
        (x, y), cost, p.value(x, y, a.sum(-1)), p.error(a, b), stepper.converged, stepper.steps, history or [], name, p
    )


def _drive(stepper: TransportStepper, max_newton: int, max_sweeps: int) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    sweeps_only = isinstance(stepper, Sinkhorn)
    while not stepper.converged:
        if stepper.steps >= max_sweeps if sweeps_only else stepper.newton_steps >= max_newton:
            break
        metrics = stepper.step()
        history.append({"iteration": stepper.steps, **{name: float(value) for name, value in metrics.items()}})
    if not stepper.converged:
        warnings.warn(
            f"not solved after {stepper.steps} steps: the error is {float(stepper.error.max()):.3g}, the tolerance "
            f"{stepper.tol:.3g}. {_advice(stepper)}",
            UserWarning,
            stacklevel=3,
        )
    return history


def _advice(stepper: TransportStepper) -> str:
    if not bool(stepper.problem.C.isfinite().all()):
        return "Perhaps no plan avoids the forbidden entries"
    if isinstance(stepper, Sinkhorn):
        return "A weak entropy makes Sinkhorn slow: take method='sns' or 'newton', or more max_sweeps"
    if len(stepper.etas) == 1:
        return "continuation=True may help, or float64 and a larger tol"
    return "A larger max_newton may help, or float64 and a larger tol"
