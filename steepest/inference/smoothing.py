"""Explicit smoothing: online SGD on a loss that is averaged over a cap of the sphere. A baseline."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry import sphere
from steepest.inference.averaged_sphere import AveragedSphere, DriftError, positive
from steepest.inference.single_index import SingleIndex
from steepest.loop import Schedule
from steepest.loop.schedules import value_at


class SmoothedSGD(AveragedSphere):
    r"""One pass of SGD on $L_\lambda(\theta) = E_z L\big((\theta + \lambda z) / \sqrt{1 + \lambda^2}\big)$.

    z is uniform on the unit sphere of the tangent space. For one sample $L_\lambda$ depends on $u = \langle \theta, x
    \rangle$ alone, and with $w = \langle z, x \rangle / (|x|^2 - u^2)^{1/2}$ the gradient is $-y\,m\,P_\theta x$,
    $m = E_z\,\sigma'\big(\frac{u + \lambda w (|x|^2 - u^2)^{1/2}}{\sqrt{1 + \lambda^2}}\big)
    \frac{1 - \lambda w u (|x|^2 - u^2)^{-1/2}}{\sqrt{1 + \lambda^2}}$.
    With $\lambda \approx d^{1/4}$ about $d^{k/2}$ samples suffice; go to $\lambda = 0$ once the overlap is above
    $d^{-1/4}$. For $\lambda \to \infty$ the gradient is a partial trace.

    `step()` returns ``smoothing`` $\lambda$, ``time`` and ``signal``, as `SphericalSGD` does.

    Args:
        problem: the samples; step t uses sample t.
        smoothing: $\lambda$, a number of at least 0 or a schedule: step to number. None: $d^{1/4}$.
        samples: how many z estimate m, in pairs of opposite sign; even. None: the exact mean, by quadrature.
        lr: step size, a number or a schedule. None: 0.1 / d.
        chains: C, independent starts.
        clip: y m is clipped to [-clip, clip]; None: not.
        start: first points, shape (C, d); None: uniform.
        generator: source of the start and of z; None: a new one with seed 0.

    Raises:
        TypeError, ValueError: an argument is wrong. From `step`: RuntimeError when all samples are used, `DriftError`
            if a multiplier is not finite.

    Source:
        Damian, Nichani, Ge and Lee 2023, arXiv 2305.10633 (the smoothing; this form of the gradient is ours).
    """

    _state: ClassVar[tuple[str, ...]] = ("theta", "steps", "time", "average")

    def __init__(
        self,
        problem: SingleIndex,
        *,
        smoothing: float | Schedule | None = None,
        samples: int | None = 16,
        lr: float | Schedule | None = None,
        chains: int = 1,
        clip: float | None = None,
        start: Float[Tensor, "c d"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(problem, SingleIndex):
            raise TypeError(f"problem must be a SingleIndex, got {type(problem).__name__}")
        if samples is not None:
            check_int("samples", samples, 2)
            if samples % 2:
                raise ValueError(f"samples must be even, since they come in pairs of opposite sign; got {samples}")
        if clip is not None:
            positive("clip", clip)
        self.smoothing: float | Schedule = problem.d**0.25 if smoothing is None else smoothing
        if not callable(self.smoothing):
            _check_smoothing(value_at(self.smoothing, 0, "smoothing"))
        self.lr: float | Schedule = 0.1 / problem.d if lr is None else lr
        if not callable(self.lr):
            positive("lr", self.lr)
        super().__init__(
            problem,
            d=None,
            chains=chains,
            start=start,
            order="auto",
            burn_in=0,
            every=1,
            rank=None,
            generator=generator,
            dtype=None,
        )
        self.samples, self.clip, self._model = samples, clip, problem
        nodes, weights = sphere.coordinate_rule(max(self.d - 1, 2), 32)
        if self.d == 2:  # the tangent sphere has two points
            nodes, weights = torch.tensor([-1.0, 1.0]).double(), torch.tensor([0.5, 0.5]).double()
        self._nodes, self._weights = nodes.to(self.theta), weights.to(self.theta)

    @torch.no_grad()
    def step(self) -> dict[str, Any]:
        """Move all chains by the next sample.

        Raises:
            RuntimeError: all samples are used.
            DriftError: the multiplier is not finite; nothing was changed.
        """
        if self.steps >= self._model.n:
            raise RuntimeError(f"the one pass over {self._model.n} samples is over")
        lam = _check_smoothing(value_at(self.smoothing, self.steps, "smoothing"))
        lr = positive("lr", value_at(self.lr, self.steps, "lr"))
        x, y = self._model.x[self.steps], self._model.y[self.steps]
        factor = y * self.multiplier(self.theta, x, lam)
        if not bool(factor.isfinite().all()):
            raise DriftError(f"the multiplier of sample {self.steps} is not finite; nothing was changed")
        if self.clip is not None:
            factor = factor.clamp(-self.clip, self.clip)
        step = lr * sphere.tangent(self.theta, factor.unsqueeze(-1) * x)
        squared = step.double().square().sum(-1).mean()
        return {**self._moved(sphere.retract(self.theta, step), squared / (self.d - 1)), "smoothing": lam}

    def multiplier(self, theta: Float[Tensor, "c d"], x: Float[Tensor, "d"], smoothing: float) -> Float[Tensor, "c"]:
        r"""m: the derivative of $E_z\,\sigma$ by $\langle \theta, x \rangle$.

        Args:
            theta: points.
            x: one input.
            smoothing: $\lambda$.
        """
        u = theta @ x
        if smoothing == 0:
            return self._model.slope(u)
        rest = (x.square().sum() - u.square()).clamp_min(torch.finfo(u.dtype).tiny).sqrt().unsqueeze(-1)
        w, weights = self._directions(theta, x / rest)
        scale = math.sqrt(1 + smoothing**2)
        inner = (u.unsqueeze(-1) + smoothing * w * rest) / scale
        return (self._model.slope(inner) * (1 - smoothing * w * u.unsqueeze(-1) / rest) / scale) @ weights

    def _directions(self, theta: Tensor, unit: Tensor) -> tuple[Float[Tensor, "c m"], Float[Tensor, "m"]]:
        """Values of w for each chain, and their weights; `unit` is x over the length of its tangent part."""
        if self.samples is None:
            return self._nodes.expand(len(theta), -1), self._weights
        half = self.samples // 2
        shape = (len(theta), half, self.d)
        z = torch.randn(shape, generator=self.generator, dtype=theta.dtype, device=self.generator.device)
        z = sphere.tangent(theta.unsqueeze(1).expand(shape), z.to(theta.device))
        w = (z * unit.unsqueeze(1)).sum(-1) / z.norm(dim=-1)
        return torch.cat([w, -w], dim=-1), theta.new_full((self.samples,), 1 / self.samples)


def _check_smoothing(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"smoothing must be a finite number of at least 0, got {value!r}")
    return value
