"""Integrate a flow: Runge-Kutta steps, a high-order adaptive method, or the exact solution on a quadratic loss."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Inexact
from torch import Tensor

from steepest.dynamics._derivatives import Derivatives, check_point

if TYPE_CHECKING:
    from steepest.dynamics.flows import Flow

Method = Literal["rk4", "dop853", "exact_quadratic"]


def integrate(
    flow: "Flow",
    theta: Inexact[Tensor, "*shape"],
    t: float | Sequence[float] | Tensor,
    method: Method = "rk4",
    dt: float | None = None,
    *,
    tol: float = 1e-10,
) -> Inexact[Tensor, "..."]:
    r"""The state at time `t` of the flow that starts at `theta` at time 0. One step of gradient descent is time h.

    Args:
        flow: the flow.
        theta: the start, of any shape; it is not changed.
        t: the time, or several in a list or a vector, one after another (increasing or decreasing).
        method: ``"rk4"`` steps of length `dt`; ``"dop853"`` (SciPy) steps adaptively to `tol`; ``"exact_quadratic"``
            solves the flow of a quadratic loss in its eigenbasis at any t: for the principal flow
            $\theta(t) = \theta^* + \sum_i (1 - h\lambda_i)^{t/h} (u_i^\top (\theta - \theta^*)) u_i$.
        dt: the longest step of ``"rk4"``; None: h/10.
        tol: relative tolerance of ``"dop853"``.

    Returns:
        The state, complex for a flow that becomes complex; for several times one more leading dimension.

    Raises:
        TypeError: a wrong type; or the state becomes complex and the loss takes no complex tensors.
        ValueError: a wrong number or method, or a loss that is not quadratic under ``"exact_quadratic"``.
        ArithmeticError: ``"dop853"`` cannot go on (the flow meets a pole).
    """
    check_point(theta)
    t = t.tolist() if isinstance(t, Tensor) else t
    times = [float(time) for time in (t if isinstance(t, Sequence) else [t])]
    if not times or not all(map(math.isfinite, times)):
        raise ValueError(f"t must be a finite time, or several; got {t!r}")
    if dt is not None and not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be positive and finite, got {dt!r}")
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, got {tol!r}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    start = theta.detach()
    if method == "exact_quadratic":
        states = _exact(flow, start, times)
    else:
        if flow.becomes_complex and not start.is_complex():
            start = torch.complex(start, torch.zeros_like(start))
        states, before = [], 0.0
        for time in times:
            start = (
                _rk4(flow, start, time - before, dt) if method == "rk4" else _dop853(flow, start, time - before, tol)
            )
            states.append(start)
            before = time
    return torch.stack(states) if isinstance(t, Sequence) else states[0]


def _rk4(flow: "Flow", theta: Tensor, time: float, dt: float | None) -> Tensor:
    longest = flow.h / 10 if dt is None else dt
    steps = max(1, math.ceil(abs(time) / longest - 1e-9)) if time else 0
    for _ in range(steps):
        step = time / steps
        a = flow.velocity(theta)
        b = flow.velocity(theta + step / 2 * a)
        c = flow.velocity(theta + step / 2 * b)
        d = flow.velocity(theta + step * c)
        theta = theta + step / 6 * (a + 2 * b + 2 * c + d)
    return theta.clone() if not steps else theta


def _dop853(flow: "Flow", theta: Tensor, time: float, tol: float) -> Tensor:
    import numpy as np
    from scipy.integrate import solve_ivp

    if not time:
        return theta.clone()

    def velocity(_: float, state):  # type: ignore[no-untyped-def]
        point = torch.as_tensor(state, device=theta.device).to(theta.dtype).reshape(theta.shape)
        return flow.velocity(point).flatten().cpu().numpy().astype(state.dtype)

    start = theta.flatten().cpu().numpy()
    start = start.astype(np.complex128 if theta.is_complex() else np.float64)
    found = solve_ivp(velocity, (0.0, time), start, method="DOP853", rtol=max(tol, 1e-13), atol=1e-2 * tol)
    if not found.success:
        raise ArithmeticError(f"the flow could not be integrated to t={time:g}: {found.message}")
    return torch.as_tensor(found.y[:, -1], device=theta.device).to(theta.dtype).reshape(theta.shape)


def _exact(flow: "Flow", theta: Tensor, times: list[float]) -> list[Tensor]:
    from steepest.dynamics.flows import check_size

    if theta.is_complex():
        raise TypeError("theta must be real with method='exact_quadratic', got a complex tensor")
    if getattr(flow, "k", None) is not None:
        raise ValueError("method='exact_quadratic' uses every eigenpair; leave k out")
    check_size(theta, None)
    at = Derivatives(flow.loss, theta)
    hessian, gradient = at.hessian(), at.gradient.flatten()
    _check_quadratic(flow, theta, hessian, gradient)
    values, vectors = torch.linalg.eigh(hessian)
    response = flow.response(flow.h * values)
    values, vectors, overlaps = (x.to(response.dtype) for x in (values, vectors, vectors.mT @ gradient))
    states = []
    for time in times:
        rate = values * response * time
        moved = torch.where(values == 0, response * time, torch.expm1(rate) / torch.where(values == 0, 1, values))
        states.append((theta.flatten() + vectors @ (moved * overlaps)).reshape(theta.shape))
    return states


def _check_quadratic(flow: "Flow", theta: Tensor, hessian: Tensor, gradient: Tensor) -> None:
    """The gradient elsewhere must be the one that a constant Hessian predicts."""
    scale = 1 + theta.abs().max() if theta.numel() else 1.0
    away = scale * torch.linspace(0.5, 1.5, theta.numel(), dtype=theta.dtype, device=theta.device)
    there = Derivatives(flow.loss, theta + away.reshape(theta.shape)).gradient.flatten()
    expected = gradient + hessian @ away
    size = gradient.abs().max() + (hessian.abs() @ away.abs()).max()
    if not bool((there - expected).abs().max() <= 1e3 * torch.finfo(theta.dtype).eps * size):
        raise ValueError("method='exact_quadratic' needs a quadratic loss, and this one's Hessian is not constant")
