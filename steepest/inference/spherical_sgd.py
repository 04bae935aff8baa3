"""SGD on the sphere with single samples: its own noise takes the place of the Brownian motion."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry import sphere
from steepest.inference.averaged_sphere import AveragedEstimate, AveragedSphere, DriftError, Order, positive
from steepest.loop import Schedule
from steepest.loop.schedules import value_at

Sampling = Literal["replacement", "one_pass"]


class Samples(Protocol):
    """What `SphericalSGD` needs of a problem: gradients that are a number times the input."""

    d: int
    n: int
    x: Float[Tensor, "n d"]

    def multiplier(self, theta: Float[Tensor, "*batch d"], index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]: ...


class SphericalSGD(AveragedSphere):
    r"""$\theta \leftarrow (\theta + \eta g) / |\cdot|$, $g = y_i\,\sigma'(\langle \theta, x_i \rangle) P_\theta x_i$.

    Every chain draws its own samples from the n that are there. For $\eta \ll d^{-1/2}$ the noise of the samples acts
    like that of `SphericalLangevin` with $\epsilon = 1 / \eta$ in a time of its own, and the averages recover the
    direction in the same way. One difference matters: the noise depends on the point. With an even exponent it
    concentrates around the planted direction by itself, even if all labels lose their signs.

    With ``sampling="one_pass"`` step t uses sample t, the same for all chains, and each only once: online SGD.

    `step()` returns ``time`` (the mean of $|\eta g|^2 / (d - 1)$, added up: the Brownian time that has passed),
    ``signal`` as in `SphericalLangevin`, and ``clipped``, the share of the multipliers that were clipped.

    Args:
        problem: samples, such as `SingleIndex`: attributes ``d``, ``n``, ``x`` (n, d), and
            ``multiplier(theta, index)``, the factors $y_i\,\sigma'(\langle \theta, x_i \rangle)$.
        lr: $\eta$, a number or a schedule: step to number.
        chains: C.
        clip: the multipliers are clipped to [-clip, clip]; None: not.
        batch_size: samples of a step, whose gradients are averaged.
        sampling: "replacement" or "one_pass".
        start: first points, shape (*batch, C, d), made unit vectors; None: uniform.
        order: see `SphericalLangevin`, as the next ones.
        burn_in: steps that are not averaged.
        every: average one iterate in so many.
        rank: of a sketch of the second moment.
        generator: source of the start and of the samples; None: a new one with seed 0.
        dtype: of the chains; None: that of `start`, or of the problem.

    Raises:
        TypeError, ValueError: an argument is wrong. From `step`: `DriftError`, if a multiplier is not finite or of a
            wrong shape; RuntimeError, if one pass is over. Nothing was changed then.

    Source:
        Wei, Damian and Lee 2026, arXiv 2603.06028, section on minibatch SGD and simulations.
    """

    _state: ClassVar[tuple[str, ...]] = ("theta", "steps", "time", "average")

    def __init__(
        self,
        problem: Samples,
        *,
        lr: float | Schedule = 0.1,
        chains: int = 64,
        clip: float | None = None,
        batch_size: int = 1,
        sampling: Sampling = "replacement",
        start: Float[Tensor, "*batch c d"] | None = None,
        order: Order = "auto",
        burn_in: int = 0,
        every: int = 1,
        rank: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if missing := [name for name in ("d", "n", "x", "multiplier") if not hasattr(problem, name)]:
            raise TypeError(f"problem must have {', '.join(missing)}; SphericalSGD needs single samples")
        if not callable(lr):
            positive("lr", lr)
        if clip is not None:
            positive("clip", clip)
        if sampling not in get_args(Sampling):
            raise ValueError(f"sampling must be one of {', '.join(get_args(Sampling))}; got {sampling!r}")
        check_int("batch_size", batch_size)
        super().__init__(
            problem,
            d=None,
            chains=chains,
            start=start,
            order=order,
            burn_in=burn_in,
            every=every,
            rank=rank,
            generator=generator,
            dtype=dtype,
        )
        self.lr, self.clip, self.batch_size, self.sampling = lr, clip, batch_size, sampling
        self._samples: Samples = problem

    def _index(self) -> Int[Tensor, "*batch"]:
        shape = (*self.theta.shape[:-1], self.batch_size)
        if self.sampling == "replacement":
            drawn = torch.randint(self._samples.n, shape, generator=self.generator, device=self.generator.device)
            return drawn.to(self.theta.device)
        first = self.steps * self.batch_size
        if first + self.batch_size > self._samples.n:
            raise RuntimeError(f"the one pass over {self._samples.n} samples is over after {self.steps} steps")
        return torch.arange(first, first + self.batch_size, device=self.theta.device).expand(shape)

    @torch.no_grad()
    def step(self) -> dict[str, Any]:
        """Move all chains by one step.

        Raises:
            DriftError: a multiplier is not finite or of a wrong shape; nothing was changed.
            RuntimeError: all samples of one pass are used.
        """
        lr = positive("lr", value_at(self.lr, self.steps, "lr"))
        before = self.generator.get_state()
        index, theta = self._index(), self.theta
        try:
            factor = self._factor(theta, index)
        except BaseException:
            self.generator.set_state(before)
            raise
        clipped = theta.new_zeros(())
        if self.clip is not None:
            clipped = (factor.abs() > self.clip).to(theta.dtype).mean()
            factor = factor.clamp(-self.clip, self.clip)
        x = self._samples.x[index].to(theta)
        step = lr * sphere.tangent(theta, (factor.unsqueeze(-1) * x).mean(-2))
        squared = step.double().square().sum(-1).mean()
        moved = theta + step
        # A huge step is a unit vector all the same.
        moved = moved / moved.abs().amax(-1, keepdim=True)
        moved = moved / moved.norm(dim=-1, keepdim=True)
        return {**self._moved(moved, squared / (self.d - 1)), "clipped": clipped}

    def _factor(self, theta: Tensor, index: Tensor) -> Tensor:
        points = theta.unsqueeze(-2).expand(*index.shape, theta.shape[-1])
        factor: Any = self._samples.multiplier(points, index)
        if not isinstance(factor, Tensor) or not factor.is_floating_point() or factor.shape != index.shape:
            found = tuple(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
            raise DriftError(f"multiplier must return a real tensor of the shape {tuple(index.shape)}, got {found}")
        factor = factor.to(theta)
        if not bool(factor.isfinite().all()):
            raise DriftError(f"multiplier returned NaN or infinity at step {self.steps}; nothing was changed")
        return factor


@dataclass(frozen=True)
class TwoStages:
    """The result of `two_stages`.

    Attributes:
        first: the estimate of the averages.
        theta: the direction after the pass over fresh samples, shape (d,).
    """

    first: AveragedEstimate
    theta: Float[Tensor, "d"]


def two_stages(
    problem: Samples,
    fresh: Samples,
    *,
    steps: int,
    lr: float | Schedule = 0.05,
    chains: int = 64,
    second_lr: float | Schedule = 0.001,
    clip: float | None = 4.0,
    order: Order = "auto",
    generator: torch.Generator | None = None,
) -> TwoStages:
    r"""A warm start by averaging, then one pass of online SGD over fresh samples.

    About $d^{k/2}$ samples give the average an overlap of $d^{-1/4}$ and more; from there online SGD with clipped
    multipliers finishes. The second stage needs samples that the first has not seen: on the same ones the empirical
    loss has better optima far from the planted direction. Unclipped, its steps are ruined by heavy tails.

    Args:
        problem: samples of the first stage.
        fresh: samples of the second one, used once each.
        steps: of the first stage.
        lr: of the first stage.
        chains: of the first stage.
        second_lr: of the second stage.
        clip: bound of the multipliers in the second stage.
        order: see `SphericalLangevin`.
        generator: source of randomness of the first stage; None: a new one with seed 0.

    Returns:
        The average's estimate and the final direction. For an even exponent its sign is arbitrary.

    Source:
        Wei, Damian and Lee 2026, arXiv 2603.06028, corollary on warm starts; the clipping is ours.
    """
    check_int("steps", steps)
    first = SphericalSGD(problem, lr=lr, chains=chains, order=order, generator=generator)
    for _ in range(steps):
        first.step()
    estimate = first.estimate()
    second = SphericalSGD(
        fresh, lr=second_lr, clip=clip, sampling="one_pass", start=estimate.direction.unsqueeze(0), order="auto"
    )
    for _ in range(fresh.n):
        second.step()
    return TwoStages(estimate, second.theta[0])


def steps_needed(d: int, exponent: int, eps: float, h: float, chains: int, factor: float = 1.0) -> int:
    r"""Steps after which the average stands out: total time $T C = c\,d^k / \epsilon^2$.

    Args:
        d: dimension.
        exponent: k, the information exponent.
        eps: scale of the drift; of SGD 1 / lr.
        h: time of a step.
        chains: C.
        factor: c.
    """
    check_int("d", d, 2)
    check_int("exponent", exponent)
    check_int("chains", chains)
    return math.ceil(positive("factor", factor) * d**exponent / (positive("eps", eps) ** 2 * positive("h", h) * chains))
