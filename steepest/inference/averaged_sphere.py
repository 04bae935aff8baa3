"""Chains on the sphere whose average is the estimate, and what that average says of itself."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.averages import IterateAverage
from steepest.geometry import sphere
from steepest.loop import Resumable

Order = Literal["auto", "first", "second"]
_CONFIDENT = 3.0  # times the level of an average of pure noise


class DriftError(RuntimeError, ValueError):
    """What a drift returned cannot be used: it is of another shape or type, or it is not finite."""


@dataclass(frozen=True)
class AveragedEstimate:
    r"""The direction that an average of iterates shows.

    Attributes:
        mean: $\bar\theta$, the average over time and chains, shape (*batch, d).
        moment: $\bar M$, the average of $\theta \theta^\top$, shape (*batch, d, d); None if it was not kept.
        signal: $|\bar\theta|$ over its level for chains without drift, $(4 / ((d - 1) T C))^{1/2}$, per problem.
        gap: the gap of the two largest eigenvalues of $\bar M$ over the level $2 (d / N)^{1/2} / d$,
            $N = C T (d - 1)$, per problem; None if M was not kept, or in a sketch of rank one.
        iterate_overlap: mean over the chains of $|\langle \theta, \hat\theta \rangle|$ at the end: near
            $(2 / (\pi d))^{1/2}$ if the iterates still wander over the sphere, near one if they have condensed.
        perturbation: $2 \epsilon |P b| / (d - 1)$, the mean over the chains at the last step; NaN without a step.
        time: T, the time that is averaged over.
        samples: iterates times chains in the average.
        order: "first" or "second": which of the two `direction` is.
    """

    mean: Float[Tensor, "*batch d"]
    moment: Float[Tensor, "*batch d d"] | None
    signal: Float[Tensor, "*batch"]
    gap: Float[Tensor, "*batch"] | None
    iterate_overlap: Float[Tensor, "*batch"]
    perturbation: float
    time: float
    samples: int
    order: Literal["first", "second"]
    top: Float[Tensor, "*batch d"] | None

    @property
    def first(self) -> Float[Tensor, "*batch d"]:
        r"""$\bar\theta / |\bar\theta|$: the estimate for an odd exponent, sign included.

        Raises:
            RuntimeError: the average is zero.
        """
        if not bool((self.mean != 0).any(-1).all()):
            raise RuntimeError("the average vanished: increase the time or the signal scale")
        return sphere.normalise(self.mean)

    @property
    def second(self) -> Float[Tensor, "*batch d"]:
        r"""The top eigenvector of $\bar M$: the estimate for an even exponent, up to its sign.

        Raises:
            RuntimeError: M was not kept.
        """
        if self.top is None:
            raise RuntimeError('the second moment was not kept: use order="auto" or "second"')
        return self.top

    @property
    def direction(self) -> Float[Tensor, "*batch d"]:
        """`first` or `second`, as `order` says."""
        return self.first if self.order == "first" else self.second

    @property
    def confident(self) -> bool:
        """Whether the average that was chosen is three times above its level without signal, for all problems."""
        ratio = self.signal if self.order == "first" else self.gap
        return ratio is not None and bool((ratio > _CONFIDENT).all())

    @property
    def condensed(self) -> bool:
        r"""Whether the iterates themselves have left the equator: `iterate_overlap` of $3 / \sqrt d$ or more.

        Then the estimate does not come from averaging: eps is larger than the theory wants.
        """
        return bool((self.iterate_overlap >= 3 / math.sqrt(self.mean.shape[-1])).any())


class AveragedSphere(Resumable):
    """What the samplers on the sphere share: the chains, their average, the estimate.

    Attributes:
        theta: the chains, shape (*batch, C, d).
        average: the `IterateAverage`.
        steps: how many steps were made.
        time: the time that is in the average, a float64 tensor.
    """

    _state: ClassVar[tuple[str, ...]] = ("theta", "steps", "time", "average")

    def __init__(
        self,
        problem: Any,
        *,
        d: int | None,
        chains: int,
        start: Float[Tensor, "*batch c d"] | None,
        order: Order,
        burn_in: int,
        every: int,
        rank: int | None,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
    ) -> None:
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}; got {order!r}")
        check_int("chains", chains)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        own: Any = getattr(problem, "d", None) if d is None else d
        if start is not None:
            start = _check_start(start, own)
            own = start.shape[-1]
        if own is None:
            raise ValueError("d must be given: the problem is a function, and does not know its dimension")
        check_int("d", own, 2)
        device = getattr(problem, "device", None) if start is None else start.device
        self.problem, self.d = problem, int(own)
        self.order: Order = order
        self.generator = generator or torch.Generator(device or "cpu").manual_seed(0)
        if start is None:
            wanted = dtype or getattr(problem, "dtype", None)
            start = sphere.uniform(chains, self.d, generator=self.generator, dtype=wanted, device=device)
        self.theta = start.clone() if dtype is None else start.to(dtype, copy=True)
        self._warn_of_order(getattr(problem, "exponent", None))
        self.average = IterateAverage(
            burn_in=burn_in,
            every=every,
            second_moment=order != "first",
            rank=rank if order != "first" else None,
            batch_dims=self.theta.ndim - 2,
            sample_dims=1,
            nonfinite="ignore",
        )
        self.steps = 0
        self.time = torch.zeros((), dtype=torch.float64, device=self.theta.device)
        self._perturbation: Tensor | None = None

    @property
    def chains(self) -> int:
        """How many chains."""
        return self.theta.shape[-2]

    def _moved(self, theta: Tensor, time: float | Tensor) -> dict[str, Any]:
        """Take new points as the state, and say where the average stands."""
        self.theta = theta
        self.steps += 1
        self.average.update(theta)
        if self.steps > self.average.burn_in:
            self.time = self.time + time
        metrics: dict[str, Any] = {"time": self.time}
        if self.average.count:
            mean = self.average.value(torch.float64)
            metrics["signal"] = (mean.norm(dim=-1) / self._level()).mean()
        return metrics

    def _level(self) -> Tensor:
        """The norm of the mean of chains without drift."""
        return (4 / ((self.d - 1) * self.time * self.chains)).sqrt()

    @torch.no_grad()
    def estimate(self) -> AveragedEstimate:
        """The estimate that the average holds by now.

        Raises:
            RuntimeError: no iterate is in the average yet.
        """
        mean = self.average.value()
        signal = mean.norm(dim=-1) / self._level().to(mean)
        moment = top = gap = None
        if self.average.second_moment:
            moment = self.average.moment() if self.average.rank is None else None
            values, vectors = self.average.top(min(2, self.average.rank or 2))
            top = vectors[..., 0].to(mean)
            level = 2 * (self.d / (self.chains * self.time * (self.d - 1))).sqrt() / self.d
            gap = ((values[..., 0] - values[..., 1]) / level).to(mean) if values.shape[-1] > 1 else None
        # The mean has the sign, too: it comes first where it stands out.
        clear = gap is None or bool((signal > _CONFIDENT).all()) or bool(((signal >= gap) & (gap <= _CONFIDENT)).all())
        auto: Literal["first", "second"] = "first" if clear else "second"
        order = auto if self.order == "auto" else self.order
        direction = top if order == "second" else mean / mean.norm(dim=-1, keepdim=True)
        assert direction is not None
        along = (self.theta @ direction.unsqueeze(-1)).squeeze(-1).abs().mean(-1)
        perturbation = math.nan if self._perturbation is None else float(self._perturbation)
        return AveragedEstimate(
            mean, moment, signal, gap, along, perturbation, float(self.time), self.average.samples, order, top
        )

    def _warn_of_order(self, exponent: int | None) -> None:
        if exponent is None or self.order == "auto":
            return
        if (exponent % 2 == 1) != (self.order == "first"):
            right = "first" if exponent % 2 else "second"
            warnings.warn(
                f"order={self.order!r} with the information exponent {exponent}: "
                + ("the sign of theta is not identified, and the mean tends to zero" if right == "second" else "")
                + ("the second moment carries less signal than the mean" if right == "first" else "")
                + f"; use order={right!r} or 'auto'",
                UserWarning,
                stacklevel=4,
            )


def check_drift(value: Any, theta: Tensor, name: str = "neg_grad") -> Tensor:
    """`value`, as the drift at `theta`.

    Args:
        value: what the user's function returned.
        theta: the points.
        name: of the function, for the message.

    Raises:
        DriftError: it is no real tensor of the shape of theta, or not finite.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DriftError(f"{name} must return a real tensor of the shape {tuple(theta.shape)}, got {kind}")
    if value.shape != theta.shape:
        raise DriftError(f"{name} must return the shape {tuple(theta.shape)}, got {tuple(value.shape)}")
    value = value.detach().to(theta)
    if not bool(value.isfinite().all()):
        raise DriftError(f"{name} returned NaN or infinity; nothing was changed")
    return value


def positive(name: str, value: Any) -> float:
    """`value` as a finite positive float; raises TypeError or ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite positive number, got {value!r}")
    return float(value)


def _check_start(start: Any, d: int | None) -> Tensor:
    if not isinstance(start, Tensor) or not start.is_floating_point():
        raise TypeError(f"start must be a real tensor of the shape (..., chains, d), got {type(start).__name__}")
    if start.ndim < 2 or start.shape[-2] < 1 or start.shape[-1] < 2 or (d is not None and start.shape[-1] != d):
        raise ValueError(f"start must have the shape (..., chains, {d or 'd'}), got {tuple(start.shape)}")
    return sphere.normalise(start.detach())
