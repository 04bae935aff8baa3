"""The baseline with diagonal covariances: one variance for each component and coordinate."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.inference.estimators import Estimator
from steepest.inference.gaussian_mixture import GaussianMixture
from steepest.inference.mixture import IsotropicMixture, check_means, check_variances
from steepest.inference.target import LogProb, Score
from steepest.inference.variances import Variance, cap, check_variance, move
from steepest.inference.variational import Evaluation, MixtureStepper, NonFinite


class DiagonalVI(MixtureStepper):
    r"""Fit $q = \frac1N \sum_i \mathcal N(m_i, \mathrm{diag}(\varepsilon_i))$ by descending KL(q | π).

    As `MixtureVI`, with a variance for each coordinate: $u_{ij} = \gamma E[(x - m_i)_j g_j] / \varepsilon_{ij}$.

    Args:
        log_prob: As of `MixtureVI`, as all arguments that are not named here.
        means: m, (N, d); or an `IsotropicMixture` to start from.
        variances: $\varepsilon$, (N, d); None with an `IsotropicMixture`.
        score: The gradient of `log_prob`.
        lr: $\gamma$, or a schedule.
        variance: How variances move.
        estimator: How expectations are computed.
        samples: Draws for each component.
        max_step: Largest |u|.
        nonfinite: What to do where the target is not finite.
        check_score: Compare `score` with finite differences of `log_prob`.
        generator: The randomness.

    Attributes:
        means: m, (N, d).
        variances: $\varepsilon$, (N, d).
        steps: How many steps were made.
        skipped: How often a component was skipped.

    Raises:
        TypeError, ValueError: An argument is not as described.

    Source:
        Ours, after Petit-Talamon, Lambert and Korba 2025, arXiv 2506.13613.
    """

    def __init__(
        self,
        log_prob: LogProb | None,
        means: Float[Tensor, "n d"] | IsotropicMixture,
        variances: Float[Tensor, "n d"] | None = None,
        *,
        score: Score | None = None,
        lr: float | Callable[[int], float] = 1e-2,
        variance: Variance = "bures",
        estimator: Estimator | Tensor = "fresh",
        samples: int = 10,
        max_step: float | None = None,
        nonfinite: NonFinite = "raise",
        check_score: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(means, IsotropicMixture):
            if variances is not None:
                raise ValueError("variances must be None where an IsotropicMixture is given")
            means, variances = means.means, means.variances[:, None].expand_as(means.means)
        check_means(means)
        if not isinstance(variances, Tensor) or variances.shape != means.shape:
            found = tuple(variances.shape) if isinstance(variances, Tensor) else variances
            raise ValueError(f"variances must be of the shape of means, {tuple(means.shape)}, got {found}")
        check_variances(variances)
        self.max_step = check_variance(variance, max_step)
        self.variance: Variance = variance
        self.means = means.detach().clone()
        self.variances = variances.detach().to(means).clone()
        super().__init__(
            log_prob,
            score=score,
            lr=lr,
            estimator=estimator,
            samples=samples,
            nonfinite=nonfinite,
            check_score=check_score,
            generator=generator,
        )

    @property
    def mixture(self) -> GaussianMixture:
        """A copy of the present mixture."""
        return GaussianMixture(self.means, self.variances)

    def _displace(self, noise: Float[Tensor, "k b d"]) -> Float[Tensor, "n b d"]:
        return self.variances.sqrt()[:, None] * noise

    def _mixture_score(
        self, displacement: Float[Tensor, "k b d"], rows: slice
    ) -> tuple[Float[Tensor, "k b"], Float[Tensor, "k b d"]]:
        n, d = self.means.shape
        precisions = self.variances.reciprocal()
        between = self.means[rows, None] - self.means  # (k, N, d)
        pulls = between * precisions
        squared = torch.baddbmm((between * pulls).sum(-1)[:, None], displacement, pulls.mT, alpha=2)
        squared = squared + displacement.square() @ precisions.mT
        joint = (precisions.log().sum(-1) - squared) / 2
        shares = joint.softmax(-1)
        score = -(shares @ precisions * displacement + shares @ pulls)
        return joint.logsumexp(-1) - (d / 2 * math.log(2 * math.pi) + math.log(n)), score

    def _moved(self, found: Evaluation, lr: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        metrics: dict[str, Any] = {}
        length, variances = found.means.square(), self.variances
        if self.variance != "fixed":
            slope = self.nodes.average(found.displacement * found.gap) / self.variances
            length = length + self.variances * slope.square()
            u = lr * slope
            capped = cap(u, self.variances, self.variance, self.max_step)
            variances = move(self.variances, capped, self.variance)
            metrics["capped"] = (capped != u).sum() / u.numel()
        forward = found.means if self.variance != "natural" else variances * found.means
        metrics["grad_norm"] = length.sum(-1).mean().sqrt()
        return {"means": self.means - lr * forward, "variances": variances}, metrics
