"""Langevin dynamics on the sphere: noise moves the iterate everywhere, and its average points at the signal."""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry import sphere
from steepest.inference.averaged_sphere import AveragedSphere, DriftError, Order, check_drift, positive
from steepest.loop import Schedule
from steepest.loop.schedules import value_at


class SphericalLangevin(AveragedSphere):
    r"""$d\theta = (-\frac{d-1}{2}\theta + \epsilon P_\theta b(\theta))\,dt + P_\theta\,dW$, many chains at once.

    One step draws $\xi \sim N(0, I)$ and goes from $\theta$ along $t = h \epsilon P b(\theta) + \sqrt h P \xi$, by
    retraction or geodesic. The drift $-\frac{d-1}{2}\theta$ comes out of the normalisation. The stationary density is
    proportional to $\exp(-2 \epsilon L)$ where $b = -\nabla L$. With eps = 0 it is Brownian motion, and b is not asked.

    The iterate may stay near the equator of the planted direction for ever: the estimate is in its time average, for
    an odd information exponent in the mean, for an even one in the second moment. Averaging over T C units of time
    leaves noise of squared norm $4 / ((d - 1) T C)$ in the mean; with exponent k it takes about $d^k / \epsilon^2$.

    `step()` returns ``time`` T, ``perturbation`` $2 \epsilon |P b| / (d - 1)$ (keep it below about 0.3), and, once
    something is averaged, ``signal``, the mean's norm over its level without drift; over a batch, means.

    Args:
        problem: an object with ``neg_grad(theta)``, such as `TensorPCA` or `SingleIndex`, or that function itself: b,
            from points of shape (*batch, C, d) to the same shape.
        eps: $\epsilon$, the scale of the drift against the noise, a number of at least 0 or a schedule: step to
            number. None: d / 4, half of where the chains condense on a signal of size one with exponent 3, as the
            planted problems here have it. "auto": for losses of another scale, see `automatic_eps`.
        h: time of a step. None: 0.1 / d.
        chains: C.
        d: the dimension, needed if the problem is a function without attribute ``d``.
        start: first points, shape (*batch, C, d), made unit vectors; None: uniform.
        step: "retraction" or "geodesic".
        order: which average is the estimate: "first", "second", or "auto": the mean if it is three times above its
            level without drift, else the second moment if that is, else the one that stands out more.
        burn_in: steps that are not averaged; $4 / ((d - 1) h)$ steps forget the start.
        every: average one iterate in so many.
        rank: keep the second moment in a sketch of this rank; None: the full d x d matrix.
        generator: source of the start and of the noise; None: a new one with seed 0.
        dtype: of the chains; None: that of `start`, or of the problem.

    Attributes:
        eps, h: see above; numbers where they were chosen here.

    Raises:
        TypeError, ValueError: an argument is wrong. From `step`: `DriftError`, a RuntimeError and ValueError, if b is
            not finite or of a wrong shape; nothing was changed then.

    Source:
        Wei, Damian and Lee 2026, arXiv 2603.06028 (the dynamics and the two estimators; the discretisation is ours).

    Examples:
        >>> import torch
        >>> from steepest.inference import SphericalLangevin, TensorPCA, overlap
        >>> problem = TensorPCA(d=20, k=3, n=8000, generator=torch.Generator().manual_seed(0))
        >>> chains = SphericalLangevin(problem, eps=5.0)
        >>> result = chains.run(500, progress=False)
        >>> bool(overlap(chains.estimate().first, problem.theta_star) > 0.8)
        True
    """

    def __init__(
        self,
        problem: Any,
        *,
        eps: float | Schedule | Literal["auto"] | None = None,
        h: float | None = None,
        chains: int = 64,
        d: int | None = None,
        start: Float[Tensor, "*batch c d"] | None = None,
        step: sphere.Step = "retraction",
        order: Order = "auto",
        burn_in: int = 0,
        every: int = 1,
        rank: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._b = drift_of(problem)
        self._move = sphere.stepper(step)
        if isinstance(eps, str) and eps != "auto":
            raise ValueError(f"eps must be a number, a schedule, or 'auto', got {eps!r}")
        if eps is not None and not isinstance(eps, str) and not callable(eps):
            _check_eps(value_at(eps, 0, "eps"))
        if h is not None:
            positive("h", h)
        super().__init__(
            problem,
            d=d,
            chains=chains,
            start=start,
            order=order,
            burn_in=burn_in,
            every=every,
            rank=rank,
            generator=generator,
            dtype=dtype,
        )
        self.h = 0.1 / self.d if h is None else float(h)
        if self.h * (self.d - 1) > 0.5:
            warnings.warn(
                f"h (d - 1) is {self.h * (self.d - 1):.3g}: above 0.5 the discretisation is biased; the default "
                f"is h = {0.1 / self.d:.3g}",
                UserWarning,
                stacklevel=2,
            )
        self.eps: float | Schedule = self.d / 4 if eps is None else self._automatic() if isinstance(eps, str) else eps

    def _automatic(self) -> float:
        points = sphere.uniform(256, self.d, generator=self.generator, dtype=self.theta.dtype, device=self.theta.device)
        return automatic_eps(self._b, points.expand(*self.theta.shape[:-2], -1, -1))

    @torch.no_grad()
    def step(self) -> dict[str, Any]:
        """Move all chains by one step of time h.

        Raises:
            DriftError: b is not finite or of a wrong shape; nothing was changed.
        """
        eps = _check_eps(value_at(self.eps, self.steps, "eps"))
        theta, drift = self.theta, None
        length = theta.new_zeros(())
        if eps:
            b = check_drift(self._b(theta.clone()), theta)
            b = sphere.tangent(theta, b)
            length = 2 * eps * b.norm(dim=-1).mean() / (self.d - 1)
            if not bool(length.isfinite()):
                raise DriftError(f"eps times the drift is not finite at step {self.steps}; nothing was changed")
            drift = self.h * eps * b
        noise = torch.randn(theta.shape, generator=self.generator, dtype=theta.dtype, device=self.generator.device)
        t = sphere.tangent(theta, math.sqrt(self.h) * noise.to(theta.device))
        moved = self._move(theta, t if drift is None else t + drift)
        self._perturbation = length
        return {**self._moved(moved, self.h), "perturbation": length}


def automatic_eps(
    problem: Any,
    points: Float[Tensor, "*batch m d"] | None = None,
    *,
    d: int | None = None,
    generator: torch.Generator | None = None,
) -> float:
    r"""$\epsilon = 0.15\,d / \mathrm{median}\,|P_\theta b(\theta)|$ over uniform points.

    At this scale the drift changes the uniform law by about a third: $2 \epsilon |P b| / (d - 1) \approx 0.3$. It does
    not know how steep b is near its optima. After a run look at ``estimate().condensed``, and lower eps if it says so.

    Args:
        problem: see `SphericalLangevin`.
        points: where b is asked; None: 256 uniform points.
        d: the dimension, if neither the problem nor the points tell.
        generator: source of the points; None: a new one with seed 0.

    Raises:
        DriftError: b is not finite, or of a wrong shape.
        ValueError: b is zero at most points, or d is not known.
    """
    if points is None:
        own = getattr(problem, "d", None) if d is None else d
        if own is None:
            raise ValueError("d must be given: the problem is a function, and does not know its dimension")
        check_int("d", own, 2)
        generator = generator or torch.Generator().manual_seed(0)
        points = sphere.uniform(256, own, generator=generator, dtype=getattr(problem, "dtype", None))
        points = points.to(getattr(problem, "device", points.device))
    with torch.no_grad():
        b = sphere.tangent(points, check_drift(drift_of(problem)(points.clone()), points))
    # Of a batch of problems the steepest one decides.
    middle = float(b.norm(dim=-1).median(-1).values.max())
    if middle == 0:
        raise ValueError("eps cannot be chosen: the drift is zero at most points of the sphere; give a number")
    return 0.15 * points.shape[-1] / middle


def drift_of(problem: Any) -> Callable[[Tensor], Tensor]:
    """The function b of a problem: its method ``neg_grad``, or the problem itself.

    Args:
        problem: see `SphericalLangevin`.

    Raises:
        TypeError: it is neither.
    """
    found: Any = getattr(problem, "neg_grad", problem)
    if not callable(found):
        raise TypeError(
            f"problem must have a method neg_grad(theta), or be that function, got {type(problem).__name__}"
        )
    return cast(Callable[[Tensor], Tensor], found)


def _check_eps(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {value!r}")
    return value
