"""Evolution strategies in the form of OpenAI: the gradient of a smoothed objective from ranks."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free._point_arguments import check_start, gaussian, scale_at
from steepest.gradient_free.search import Objective, Search
from steepest.loop.schedules import Schedule

Shaping = Literal["ranks", "standardized", "none"]


class EvolutionStrategy(Search):
    r"""Evolution strategy of OpenAI: $x \leftarrow (1 - \eta \omega) x - \eta g$, $g = \sum_i u_i \xi_i / (n \sigma)$.

    The points are $x + \sigma \xi_i$, in pairs $\pm \xi_i$ if `antithetic`; $u_i$ is the shaped value of point i. With
    ranks, in [-1/2, 1/2], only the order of the values counts: outliers and any increasing transformation change
    nothing; equal values have equal ranks, so a flat objective gives no step. Without shaping, g is an unbiased
    estimate of the gradient of $\mathbb{E}\,f(x + \sigma \xi)$.

    A value that is not finite counts as the worst. The metrics of a step are ``best``, ``mean`` (of the finite values),
    ``gradient`` (its norm, the mean over runs), ``lr`` and ``sigma``.

    Args:
        objective: points (..., n, d) to values (..., n), or None to use `ask` and `tell`.
        x0: where to start, (*batch, d); leading dimensions are independent runs. It is not changed.
        population: n, the points of a step, at least 2, and even if `antithetic`.
        sigma: the deviation of the points, positive: a number or a schedule of the step.
        lr: eta, a number or a schedule.
        weight_decay: omega, at least 0; decoupled from `optimizer`.
        shaping: "ranks"; "standardized": values less their mean, over their deviation; "none": the values.
        antithetic: draw the points in pairs on both sides of x.
        optimizer: "sgd" takes the step above, "adam" passes g through Adam first.
        betas: Adam's rates.
        eps: Adam's constant.
        generator: source of the draws. None: torch's global one.

    Attributes:
        x: the present centre, (*batch, d). It is not itself evaluated.
        best: the best point that was evaluated, (*batch, d).
        best_value: its value.

    Raises:
        TypeError, ValueError: an argument that is not as described.
        RuntimeError: in a step, if no value of a run is finite; nothing is changed then.

    Source:
        Salimans et al. 2017, arXiv 1703.03864, algorithm 1 with mirrored sampling and rank shaping.

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import EvolutionStrategy
        >>> search = EvolutionStrategy(
        ...     lambda x: (x - 1).square().sum(-1),
        ...     torch.zeros(5),
        ...     sigma=0.1,
        ...     lr=0.02,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> _ = search.run(200, progress=False)
        >>> bool((search.x - 1).norm() < 0.1)
        True
    """

    _state: ClassVar[tuple[str, ...]] = (*Search._state, "x", "first_moment", "second_moment")

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "*batch d"],
        *,
        population: int = 50,
        sigma: float | Schedule = 0.02,
        lr: float | Schedule = 0.01,
        weight_decay: float = 0.0,
        shaping: Shaping = "ranks",
        antithetic: bool = True,
        optimizer: Literal["sgd", "adam"] = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        generator: torch.Generator | None = None,
    ) -> None:
        x = check_start(x0)
        check_int("population", population, 2)
        if antithetic and population % 2:
            raise ValueError(f"population must be even for antithetic pairs, got {population}")
        if shaping not in get_args(Shaping):
            raise ValueError(f"shaping must be one of {', '.join(map(repr, get_args(Shaping)))}, got {shaping!r}")
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        scale_at("weight_decay", weight_decay, 0, positive=False)
        scale_at("eps", eps, 0)
        scale_at("sigma", sigma, 0)
        scale_at("lr", lr, 0, positive=False)
        super().__init__(objective, x)
        self.x = x
        self.population, self.sigma, self.lr, self.weight_decay = population, sigma, lr, weight_decay
        self.shaping: Shaping = shaping
        self.antithetic, self.optimizer = antithetic, optimizer
        self.betas, self.eps, self.generator = betas, eps, generator
        adam = optimizer == "adam"
        self.first_moment = torch.zeros_like(x) if adam else None
        self.second_moment = torch.zeros_like(x) if adam else None

    def _propose(self) -> Float[Tensor, "*batch n d"]:
        *batch, d = self.x.shape
        half = self.population // 2 if self.antithetic else self.population
        noise = gaussian((*batch, half, d), self.x, self.generator)
        if self.antithetic:
            noise = torch.cat((noise, -noise), -2)
        return torch.add(self.x.unsqueeze(-2), noise, alpha=scale_at("sigma", self.sigma, self.steps))

    def _move(self, points: Float[Tensor, "*batch n d"], values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        sigma = scale_at("sigma", self.sigma, self.steps)
        lr = scale_at("lr", self.lr, self.steps, positive=False)
        shaped = shape_values(values, self.shaping)
        noise = (points - self.x.unsqueeze(-2)) / sigma
        gradient = torch.einsum("...n,...nd->...d", shaped, noise) / (values.shape[-1] * sigma)
        if not bool(gradient.isfinite().all()):
            raise FloatingPointError("the estimated gradient is not finite: the values are too large for their dtype")
        direction = gradient if self.optimizer == "sgd" else self._adam(gradient)
        self.x = torch.add(self.x * (1 - lr * self.weight_decay), direction, alpha=-lr)
        finite = values.isfinite()
        mean = values.where(finite, 0).sum() / finite.sum()
        return {"mean": mean, "gradient": gradient.norm(dim=-1).mean(), "lr": lr, "sigma": sigma}

    def _adam(self, gradient: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        assert self.first_moment is not None
        assert self.second_moment is not None
        first, second = self.betas
        self.first_moment = torch.lerp(gradient, self.first_moment, first)
        self.second_moment = torch.lerp(gradient.square(), self.second_moment, second)
        mean = self.first_moment / (1 - first ** (self.steps + 1))
        scale = (self.second_moment / (1 - second ** (self.steps + 1))).sqrt()
        return mean / (scale + self.eps)


def shape_values(values: Float[Tensor, "*batch n"], shaping: Shaping) -> Float[Tensor, "*batch n"]:
    """What stands for the values in a weighted sum of directions.

    Args:
        values: what is not finite counts as the worst finite value of its row; with ranks, as worse than all.
        shaping: "ranks": mean ranks, from -1/2 for the least to 1/2 for the largest; "standardized": less the mean,
            over the deviation, 0 if all are equal; "none": as they are.
    """
    finite = values.isfinite()
    if shaping == "ranks":
        return centred_ranks(torch.where(finite, values, torch.inf))
    worst = values.where(finite, -torch.inf).amax(-1, keepdim=True)
    values = torch.where(finite, values, worst)
    if shaping == "none":
        return values
    centred = values - values.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / deviation.where(deviation > 0, 1)


def centred_ranks(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Ranks from -1/2 (least) to 1/2 (largest); equal values share the mean of their ranks. Zero for one value.

    Examples:
        >>> centred_ranks(torch.tensor([3.0, 1.0, 1.0]))
        tensor([ 0.5000, -0.2500, -0.2500])
    """
    values = values.contiguous()
    order = values.sort(-1).values
    below = torch.searchsorted(order, values)
    up_to = torch.searchsorted(order, values, right=True)
    rank = (below + up_to - 1).to(values) / 2
    return rank / max(values.shape[-1] - 1, 1) - (0.5 if values.shape[-1] > 1 else 0.0)
