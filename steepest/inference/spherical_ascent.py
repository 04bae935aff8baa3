"""Ascent on the sphere without noise: gradient ascent, and the power iteration of tensors. Baselines."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry import sphere
from steepest.inference.averaged_sphere import DriftError, check_drift, positive
from steepest.inference.spherical_langevin import drift_of
from steepest.loop import Resumable


class SphericalAscent(Resumable):
    r"""$\theta \leftarrow (\theta + \eta P_\theta b(\theta)) / |\cdot|$ from many starts.

    Infinite $\eta$ is $\theta \leftarrow b / |b|$, with b of an order-k tensor the tensor power iteration.
    `step()` returns ``gradient``, the mean of $|P_\theta b|$ before the step; `best` is the start that got furthest.

    Args:
        problem: an object with ``neg_grad(theta)``, or that function: b, the gradient of what is maximised.
        lr: $\eta$; infinity: the power iteration.
        starts: how many, if `start` is None.
        d: the dimension, needed if the problem is a function without attribute ``d``.
        start: first points, shape (..., C, d), made unit vectors; None: uniform.
        generator: source of the starts; None: a new one with seed 0.
        dtype: of the points; None: that of `start`, or of the problem.

    Attributes:
        theta: the points, shape (..., C, d).
        steps: how many steps were made.

    Raises:
        TypeError, ValueError: an argument is wrong. From `step`: `DriftError`.

    Source:
        Kolda and Mayo 2011, SIAM J. Matrix Anal. Appl. 32(4), 1095-1124 (tensor power iteration).
    """

    _state: ClassVar[tuple[str, ...]] = ("theta", "steps")

    def __init__(
        self,
        problem: Any,
        *,
        lr: float = math.inf,
        starts: int = 64,
        d: int | None = None,
        start: Float[Tensor, "*batch c d"] | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._b, self.problem = drift_of(problem), problem
        self.lr = math.inf if lr == math.inf else positive("lr", lr)
        check_int("starts", starts)
        if start is None:
            own = getattr(problem, "d", None) if d is None else d
            if own is None:
                raise ValueError("d must be given: the problem is a function, and does not know its dimension")
            check_int("d", own, 2)
            device = getattr(problem, "device", None)
            generator = generator or torch.Generator(device or "cpu").manual_seed(0)
            wanted = dtype or getattr(problem, "dtype", None)
            self.theta = sphere.uniform(starts, own, generator=generator, dtype=wanted, device=device)
        else:
            if not isinstance(start, Tensor) or not start.is_floating_point() or start.ndim < 1:
                raise TypeError("start must be a real tensor of the shape (..., d)")
            self.theta = sphere.normalise(start.detach().to(dtype or start.dtype))
        self.steps = 0

    @torch.no_grad()
    def step(self) -> dict[str, Any]:
        """Move all points by one step.

        Raises:
            DriftError: b is not finite or of a wrong shape, or zero in the power iteration; nothing was changed.
        """
        b = check_drift(self._b(self.theta.clone()), self.theta)
        along = sphere.tangent(self.theta, b)
        if math.isinf(self.lr):
            if not bool((b != 0).any(-1).all()):
                raise DriftError("the power iteration cannot go on: b is zero at a point; nothing was changed")
            self.theta = sphere.normalise(b)
        else:
            step = self.lr * along
            if not bool(step.isfinite().all()):
                raise DriftError(f"lr times b is not finite at step {self.steps}; use a smaller lr")
            self.theta = sphere.normalise(self.theta + step)
        self.steps += 1
        return {"gradient": along.norm(dim=-1).mean()}

    def best(self) -> Float[Tensor, "d"]:
        """The point with the lowest loss, of a problem that has ``loss``.

        Raises:
            TypeError: the problem has none.
        """
        loss = getattr(self.problem, "loss", None)
        if not callable(loss):
            raise TypeError("best needs a problem with a method loss(theta)")
        values: Any = loss(self.theta)
        return self.theta.reshape(-1, self.theta.shape[-1])[values.reshape(-1).argmin()]
