"""Mixtures coordinate by coordinate, for very many coordinates: each has a one-dimensional mixture."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.inference.estimators import check_generator, check_lr
from steepest.inference.mixture import BLOCK, Estimate, check_means, check_variances
from steepest.inference.target import LogProb, Score, Target, TargetError
from steepest.inference.variances import Variance, cap, check_variance, move
from steepest.loop import Resumable
from steepest.loop.schedules import value_at


class MeanFieldMixture:
    r"""$q(x) = \prod_{j \le D} \frac1N \sum_i \mathcal N(x_j; m_{ij}, \varepsilon_{ij})$.

    Args:
        means: m, (N, D), or (N, 1): all coordinates have the same mixture.
        variances: $\varepsilon$, of the same shape, positive; or a number for all.
        dimension: D, where means are (N, 1). None: the number of columns.

    Raises:
        TypeError: Something is not a real floating tensor.
        ValueError: The shapes do not match, or a variance is not positive.

    Source:
        Petit-Talamon, Lambert and Korba 2025, arXiv 2506.13613, the approximation of its Bayesian neural networks.
    """

    def __init__(
        self, means: Float[Tensor, "n k"], variances: Float[Tensor, "n k"] | float, dimension: int | None = None
    ) -> None:
        check_means(means)
        if not isinstance(variances, Tensor):
            variances = torch.full_like(means, float(variances))
        if variances.shape != means.shape:
            raise ValueError(f"variances must have the shape of means, {tuple(means.shape)}, got {variances.shape}")
        check_variances(variances)
        if dimension is not None:
            check_int("dimension", dimension)
        self.dimension = means.shape[1] if dimension is None else dimension
        if means.shape[1] not in (1, self.dimension):
            raise ValueError(f"means must have one column, or as many as dimension={dimension}, got {means.shape[1]}")
        self.means, self.variances = means.detach().clone(), variances.detach().to(means).clone()

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The log-density.

        Args:
            x: Points.
        """
        return _coordinatewise(x.reshape(-1, self.dimension), self.means, self.variances)[0].sum(-1).view(x.shape[:-1])

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """Draw points; each coordinate chooses its component by itself.

        Args:
            n: How many.
            generator: The randomness.
        """
        check_int("n", n)
        shape, like = (n, self.dimension), self.means
        index = torch.randint(len(like), shape, generator=generator, device=like.device)
        noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        means, variances = (table.expand(-1, self.dimension) for table in (self.means, self.variances))
        return means.gather(0, index) + variances.gather(0, index).sqrt() * noise

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean of each coordinate."""
        return self.means.mean(0).expand(self.dimension)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """The variance of each coordinate."""
        return (self.variances.mean(0) + self.means.var(0, correction=0)).expand(self.dimension)


class MeanFieldVI(Resumable):
    r"""Fit a `MeanFieldMixture` by descending KL(q | π): `MixtureVI` with d = 1 on every coordinate.

    Memory is 2 N D numbers, or 2 N where all coordinates share one mixture: Bayesian neural networks. A step calls the
    target for N B points in which each coordinate meets each of its components B times: the components are permuted
    by themselves in every coordinate, so that the others are distributed as q.

    Args:
        log_prob: As of `MixtureVI`.
        mixture: Where to start. Its components must not be equal, or they stay equal.
        score: The gradient of `log_prob`.
        lr: $\gamma$, or a schedule. A shared mixture moves by the mean over coordinates.
        variance: How variances move.
        samples: B.
        max_step: Largest |u|.
        generator: The randomness.

    Attributes:
        means: m, as in the mixture.
        variances: $\varepsilon$.
        steps: How many steps were made.

    Raises:
        TypeError, ValueError: An argument is not as described.

    Source:
        Petit-Talamon, Lambert and Korba 2025, arXiv 2506.13613. The estimator by permutations is ours.
    """

    _state: ClassVar[tuple[str, ...]] = ("means", "variances", "steps")

    def __init__(
        self,
        log_prob: LogProb | None,
        mixture: MeanFieldMixture,
        *,
        score: Score | None = None,
        lr: float | Callable[[int], float] = 1e-2,
        variance: Variance = "bures",
        samples: int = 1,
        max_step: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(mixture, MeanFieldMixture):
            raise TypeError(f"mixture must be a MeanFieldMixture, got {type(mixture).__name__}")
        if not callable(lr):
            check_lr(value_at(lr, 0, "lr"))
        check_int("samples", samples)
        check_generator(generator, mixture.means)
        self._target = Target(log_prob, score)
        self.max_step = check_variance(variance, max_step)
        self.variance: Variance = variance
        self.lr, self.samples, self.generator = lr, samples, generator
        self.dimension = mixture.dimension
        self.means, self.variances = mixture.means.clone(), mixture.variances.clone()
        self.steps = 0

    @property
    def mixture(self) -> MeanFieldMixture:
        """A copy of the present mixture."""
        return MeanFieldMixture(self.means, self.variances, self.dimension)

    def step(self) -> Mapping[str, Any]:
        """Take one step.

        Returns:
            ``kl`` (if there is a `log_prob`), ``grad_norm`` and ``capped``, as of `MixtureVI`.

        Raises:
            TypeError: The target returned no real tensor.
            RuntimeError: It returned a wrong shape, or was not finite, or the step left the domain. Nothing was
                changed.
        """
        before = None if self.generator is None else self.generator.get_state()
        try:
            with torch.no_grad():
                means, variances, metrics = self._moved(check_lr(value_at(self.lr, self.steps, "lr")))
            if not bool((means.isfinite() & variances.isfinite() & (variances > 0)).all()):
                raise RuntimeError(f"step {self.steps} would leave the domain; nothing was changed. Use a smaller lr")
        except BaseException:
            if self.generator is not None and before is not None:
                self.generator.set_state(before)
            raise
        self.means, self.variances = means, variances
        self.steps += 1
        return metrics

    def elbo(self, samples: int = 1000, *, generator: torch.Generator | None = None) -> Estimate:
        """The evidence lower bound, as of `MixtureVI`.

        Args:
            samples: Draws.
            generator: The randomness.

        Raises:
            ValueError: There is no `log_prob`.
        """
        if self._target.log_prob is None:
            raise ValueError("elbo needs log_prob; this stepper was given the score alone")
        check_int("samples", samples, 2)
        with torch.no_grad():
            x = self.mixture.sample(samples, generator=generator)
            values = (self._target.values(x) - self.mixture.log_prob(x)).double()
        return Estimate(float(values.mean()), float(values.std() / math.sqrt(samples)))

    def _moved(self, lr: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
        (n, columns), d, b = self.means.shape, self.dimension, self.samples
        options = {"generator": self.generator, "device": self.means.device}
        noise = torch.randn(b, n, d, dtype=self.means.dtype, **options)
        order = torch.rand(b, n, d, **options).argsort(1)
        displacement = self.variances.sqrt() * noise
        x = self.means + displacement  # x[b, i, j] is of component i
        value, score = self._target(x.gather(1, order).view(-1, d))
        back = torch.empty_like(x).scatter_(1, order, score.view_as(x))
        log_q, score_q = _coordinatewise(x.view(-1, d), self.means, self.variances)
        gap = score_q.view_as(x) - back
        if not bool(gap.isfinite().all()) or not (value is None or bool(value.isfinite().all())):
            raise TargetError(f"the target is NaN or infinite at step {self.steps}; nothing was changed")
        over = (0, 2) if columns == 1 and d > 1 else (0,)
        mean_slope = gap.mean(over).view(n, columns)
        slope = (displacement * gap).mean(over).view(n, columns) / self.variances
        length = mean_slope.square() + self.variances * slope.square()
        u = lr * slope
        capped = cap(u, self.variances, self.variance, self.max_step)
        variances = move(self.variances, capped, self.variance)
        forward = mean_slope if self.variance != "natural" else variances * mean_slope
        metrics = {"grad_norm": (length.mean() * d).sqrt(), "capped": (capped != u).sum() / u.numel()}
        if value is not None:
            metrics = {"kl": log_q.sum(-1).mean() - value.mean(), **metrics}
        return self.means - lr * forward, variances, metrics


def _coordinatewise(x: Float[Tensor, "m d"], means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Of each coordinate, log q_j(x_j) and its derivative, both (m, d), in blocks of coordinates."""
    (m, d), n = x.shape, len(means)
    means, variances = means.expand(n, d), variances.expand(n, d)
    densities, scores = [], []
    for columns in torch.arange(d, device=x.device).split(max(1, BLOCK // max(1, m * n))):
        gaps = x[:, None, columns] - means[:, columns]
        pulls = gaps / variances[:, columns]
        joint = -(gaps * pulls + (2 * math.pi * variances[:, columns]).log()) / 2
        densities.append(joint.logsumexp(1) - math.log(n))
        scores.append(-(joint.softmax(1) * pulls).sum(1))
    return torch.cat(densities, 1), torch.cat(scores, 1)
