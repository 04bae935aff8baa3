r"""How far one step of gradient descent is from the flow that it discretises."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from steepest.dynamics.flows import Flow
from steepest.dynamics.integration import Method, integrate


class Curvature(Protocol):
    """What `step_drift` needs of an operator: `steepest.curvature.Hessian` and `GaussNewton` have it."""

    def gradient(self) -> Tensor:
        """The gradient of the loss, flat."""
        ...

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """The product with a flat vector."""
        ...


@dataclass(frozen=True)
class StepDrift:
    r"""The estimated drift of one step $\theta - h g$. Tensors without shape, on the device of the operator.

    Attributes:
        distance: $\frac{h^2}2 \|Hg\|$: how far the step ends from the gradient flow, to leading order.
        relative: `distance` over the length of the step, $\frac h2 \|Hg\| / \|g\|$. DAL holds it at one. Above one, on
            a quadratic, the gradient is longer after the step than before.
        curvature: $v = \|Hg\| / \|g\|$, the curvature that the step meets.
        lr: $2 / v$, the step at which the drift is as long as the step: DAL's with p = 1. Infinite if v is zero.
    """

    distance: Float[Tensor, ""]
    relative: Float[Tensor, ""]
    curvature: Float[Tensor, ""]
    lr: Float[Tensor, ""]


@torch.no_grad()
def step_drift(curvature: Curvature, h: float | Tensor) -> StepDrift:
    r"""The drift of one step of gradient descent with learning rate `h`, from one gradient and one product.

    Args:
        curvature: the Hessian at the point: `gradient()` and `@`, as `steepest.curvature.Hessian` has them.
        h: the learning rate, not negative.

    Raises:
        ValueError: `h` is negative or not finite.

    Source:
        Rosca, Wu, Qin and Dherin 2023, arXiv 2302.01952.

    Examples:
        >>> import torch
        >>> from steepest.curvature import Hessian
        >>> from steepest.dynamics import step_drift
        >>> A = Hessian.of(lambda x: (x * x).sum(), torch.tensor([3.0, 4.0]))
        >>> drift = step_drift(A, 0.1)
        >>> round(float(drift.distance), 6), round(float(drift.lr), 6)
        (0.1, 1.0)
    """
    if not isinstance(h, Tensor) and not (math.isfinite(h) and h >= 0):
        raise ValueError(f"h must be a finite number, at least 0; got {h!r}")
    gradient = curvature.gradient()
    length = torch.linalg.vector_norm(gradient)
    moved = torch.linalg.vector_norm(curvature @ gradient)
    v = torch.where(length > 0, moved / torch.where(length > 0, length, 1), 0)
    return StepDrift(h * h / 2 * moved, h / 2 * v, v, 2 / v)


def local_error(
    flow: Flow, theta: Inexact[Tensor, "*shape"], method: Method = "rk4", dt: float | None = None, *, tol: float = 1e-10
) -> Float[Tensor, ""]:
    r"""The local error of a flow, $\|\theta(h) - (\theta - h g)\|$: its distance from one step of gradient descent.

    Args:
        flow: the flow, with its loss and h.
        theta: the point.
        method: how to integrate, see `integrate`. Its error must be smaller than the one measured.
        dt: see `integrate`.
        tol: see `integrate`.

    Examples:
        >>> import torch
        >>> from steepest.dynamics import IGR, NGF, local_error
        >>> loss, theta = lambda x: (x**4).sum() / 4, torch.ones(1, dtype=torch.float64)
        >>> bool(local_error(IGR(loss, 0.1), theta) < local_error(NGF(loss, 0.1), theta))
        True
    """
    from steepest.dynamics._derivatives import Derivatives

    end = integrate(flow, theta, flow.h, method, dt, tol=tol)
    stepped = theta.detach() - flow.h * Derivatives(flow.loss, theta).gradient
    return torch.linalg.vector_norm(end - stepped)
