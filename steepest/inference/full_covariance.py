"""The baseline with full covariances: Wasserstein gradient descent on mixtures of Gaussians."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.bures import bures_step
from steepest.inference.estimators import Estimator
from steepest.inference.gaussian_mixture import GaussianMixture
from steepest.inference.mixture import IsotropicMixture
from steepest.inference.target import LogProb, Score
from steepest.inference.variances import check_variance
from steepest.inference.variational import Evaluation, MixtureStepper, NonFinite


class FullCovarianceVI(MixtureStepper):
    r"""Fit $q = \frac1N \sum_i \mathcal N(m_i, \Sigma_i)$ by Wasserstein gradient descent of KL(q | π).

    With $g = \nabla\log q - \nabla\log\pi$ and $H_i = E[g(x)(x - m_i)^\top] \Sigma_i^{-1}$, symmetrised:
    $m_i \leftarrow m_i - \gamma E[g]$ and $\Sigma_i \leftarrow (I - \gamma H_i) \Sigma_i (I - \gamma H_i)$. On
    multiples of the identity it is ``variance="bures"`` of `MixtureVI`. A step costs O(N² B d² + N d³).

    Args:
        log_prob: As of `MixtureVI`, as all arguments that are not named here.
        mixture: Where to start: a `GaussianMixture` with equal weights, or an `IsotropicMixture`.
        score: The gradient of `log_prob`.
        lr: $\gamma$, or a schedule.
        estimator: How expectations are computed.
        samples: Draws for each component.
        max_step: Largest absolute eigenvalue of $\gamma H$; infinity for none. None: 0.5.
        nonfinite: What to do where the target is not finite.
        check_score: Compare `score` with finite differences of `log_prob`.
        generator: The randomness.

    Attributes:
        means: m, (N, d).
        covariances: $\Sigma$, (N, d, d).
        steps: How many steps were made.
        skipped: How often a component was skipped.

    Raises:
        TypeError, ValueError: An argument is not as described.

    Source:
        Lambert, Chewi, Bach, Bonnabel and Rigollet 2022, arXiv 2205.15902, algorithm 1 and section 5. The cap is ours.
    """

    _state: ClassVar[tuple[str, ...]] = ("means", "covariances", "nodes", "steps", "skipped")

    def __init__(
        self,
        log_prob: LogProb | None,
        mixture: GaussianMixture | IsotropicMixture,
        *,
        score: Score | None = None,
        lr: float | Callable[[int], float] = 1e-2,
        estimator: Estimator | Tensor = "fresh",
        samples: int = 10,
        max_step: float | None = None,
        nonfinite: NonFinite = "raise",
        check_score: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(mixture, IsotropicMixture):
            mixture = GaussianMixture(mixture.means, mixture.variances)
        if not isinstance(mixture, GaussianMixture):
            raise TypeError(f"mixture must be a GaussianMixture or an IsotropicMixture, got {type(mixture).__name__}")
        if not torch.allclose(mixture.weights, mixture.weights.mean()):
            raise ValueError("mixture must have equal weights: this method moves means and covariances alone")
        self.max_step = check_variance("bures", max_step)
        self.means, self.covariances = mixture.means.clone(), mixture.covariances.clone()
        self._factored = (self.covariances, mixture.roots)
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
        return GaussianMixture(self.means, self.covariances)

    @property
    def _roots(self) -> Tensor:
        if self._factored[0] is not self.covariances:
            self._factored = (self.covariances, torch.linalg.cholesky(self.covariances))
        return self._factored[1]

    def _pair_width(self) -> int:
        return self.nodes.shape[1] * self.nodes.shape[2]

    def _displace(self, noise: Float[Tensor, "k b d"]) -> Float[Tensor, "n b d"]:
        return noise @ self._roots.mT

    def _whiteners(self) -> Tensor:
        eye = torch.eye(self.means.shape[1], dtype=self.means.dtype, device=self.means.device)
        return torch.linalg.solve_triangular(self._roots, eye.expand_as(self._roots), upper=False)

    def _mixture_score(
        self, displacement: Float[Tensor, "k b d"], rows: slice
    ) -> tuple[Float[Tensor, "k b"], Float[Tensor, "k b d"]]:
        (n, d), (k, b, _) = self.means.shape, displacement.shape
        inverse = self._whiteners()
        between = (self.means[rows, None] - self.means).transpose(0, 1) @ inverse.mT  # (N, k, d)
        y = (displacement.reshape(-1, d) @ inverse.reshape(n * d, d).mT).view(k, b, n, d)
        y = y + between.transpose(0, 1)[:, None]
        level = self._roots.diagonal(dim1=1, dim2=2).log().sum(-1)
        joint = -y.square().sum(-1) / 2 - level
        shares = joint.softmax(-1)
        score = -(shares[..., None] * y).view(k, b, n * d) @ inverse.reshape(n * d, d)
        return joint.logsumexp(-1) - (d / 2 * math.log(2 * math.pi) + math.log(n)), score

    def _moved(self, found: Evaluation, lr: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        noise = found.noise.expand_as(found.gap)
        if self.nodes.weights is None:
            product = found.gap.mT @ noise / noise.shape[1]
        else:
            product = (found.gap * self.nodes.weights[:, None]).mT @ noise
        h = product @ self._whiteners()
        h = (h + h.mT) / 2
        length = found.means.square().sum(-1) + (h @ self._roots).square().sum((-2, -1))
        velocity, capped = self._capped(lr * h)
        moved = {"means": self.means - lr * found.means, "covariances": bures_step(self.covariances, velocity)}
        return moved, {"grad_norm": length.mean().sqrt(), "capped": capped}

    def _capped(self, velocity: Tensor) -> tuple[Tensor, float]:
        sizes = torch.linalg.matrix_norm(velocity)
        if self.max_step == math.inf or bool((sizes <= self.max_step).all()):
            return velocity, 0.0  # the spectral norm is no larger
        values, vectors = torch.linalg.eigh(velocity)
        held = values.clamp(-self.max_step, self.max_step)
        return (vectors * held.unsqueeze(-2)) @ vectors.mT, float((held != values).sum()) / values.numel()

    def _check_moved(self, moved: Mapping[str, Tensor]) -> None:
        roots, bad = torch.linalg.cholesky_ex(moved["covariances"])
        if not bool(bad.any()) and bool(roots.isfinite().all()) and bool(moved["means"].isfinite().all()):
            self._factored = (moved["covariances"], roots)
            return
        raise RuntimeError(
            f"step {self.steps} would make a covariance singular, or a mean infinite; nothing was changed. Use a "
            "smaller lr, or a smaller max_step"
        )
