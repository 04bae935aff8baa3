"""Variational inference with mixtures of isotropic Gaussians."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.inference.estimators import Estimator
from steepest.inference.mixture import IsotropicMixture
from steepest.inference.target import LogProb, Score
from steepest.inference.variances import Variance, cap, check_variance, move
from steepest.inference.variational import Evaluation, MixtureStepper, NonFinite


class MixtureVI(MixtureStepper):
    r"""Fit $q = \frac1N \sum_i \mathcal N(m_i, \varepsilon_i I_d)$ to $\pi \propto e^{-V}$ by descending KL(q | π).

    With $g = \nabla\log q - \nabla\log\pi$ and expectations over $x \sim \mathcal N(m_i, \varepsilon_i I)$, all
    components at once: $m_i \leftarrow m_i - \gamma E[g]$, and $u_i = \frac{\gamma}{d\,\varepsilon_i}
    E\langle x - m_i, g \rangle$ moves the variance:

    | variance | moves to |
    | --- | --- |
    | ``"bures"`` | $(1 - u)^2 \varepsilon$: Wasserstein gradient descent in the family (IBW) |
    | ``"bures_implicit"`` | $\varepsilon / (1 + u)^2$: the exact minimiser that IBW approximates, safe for large u |
    | ``"mirror"`` | $\varepsilon e^{-u}$: mirror descent with an entropy (MD); half the speed of IBW at equal lr |
    | ``"natural"`` | $1 / (1 / \varepsilon + u)$, and means by $\gamma \varepsilon^+$: natural gradient (NGD) |
    | ``"fixed"`` | $\varepsilon$: the means alone |

    The gradient needs one call of the target for N B points, and O(N² B d) flops; no (N B, N, d) tensor is built.
    Minimising this divergence seeks modes: one that is many widths from all components may be missed, so start wide.

    Args:
        log_prob: log π up to a constant, points (M, d) to (M,); or None if there is a score. Plain function, such as
            the `log_prob` of a torch distribution.
        mixture: Where to start. It is not changed. Its dtype and device are used.
        score: $\nabla\log\pi$, points (M, d) to (M, d), in place of differentiating `log_prob`.
        lr: $\gamma$, or a schedule: step to $\gamma$, such as `RootDecay`. It scales with the curvature of V: about a
            tenth of one over the largest eigenvalue of its Hessian.
        variance: How variances move.
        shared: One variance for all components; they must start equal.
        estimator: How expectations are computed; see `Nodes`.
        samples: B, draws for each component.
        max_step: Largest |u| of a step. None: 0.5, 1 for ``"mirror"``, none for ``"natural"``. Without a cap a narrow
            component can overflow, or fall to zero, where it would stay. See `cap`.
        nonfinite: What to do where the target is NaN or infinite: ``"raise"``, or ``"skip"`` the components that met
            it for this step and count them.
        check_score: Compare `score` with finite differences of `log_prob` at first.
        generator: The randomness.

    Attributes:
        means: m, (N, d).
        variances: $\varepsilon$, (N,).
        steps: How many steps were made.
        skipped: How often a component was skipped.

    Raises:
        TypeError, ValueError: An argument is not as described.

    Source:
        Petit-Talamon, Lambert and Korba 2025, arXiv 2506.13613 (IBW and MD); Huix, Korba, Durmus and Moulines 2024
        (fixed variances); Lin, Khan and Schmidt 2019, arXiv 1906.02914 (NGD). The caps and the implicit form are ours.

    Examples:
        >>> q = IsotropicMixture(torch.zeros(1, 2, dtype=torch.float64), 0.5)
        >>> precision = torch.tensor([1.0, 0.25], dtype=torch.float64)
        >>> vi = MixtureVI(None, q, score=lambda x: -x * precision, lr=0.1, estimator="cubature")
        >>> result = vi.run(200, progress=False)
        >>> vi.variances
        tensor([1.6000], dtype=torch.float64)
    """

    def __init__(
        self,
        log_prob: LogProb | None,
        mixture: IsotropicMixture,
        *,
        score: Score | None = None,
        lr: float | Callable[[int], float] = 1e-2,
        variance: Variance = "bures",
        shared: bool = False,
        estimator: Estimator | Tensor = "fresh",
        samples: int = 10,
        max_step: float | None = None,
        nonfinite: NonFinite = "raise",
        check_score: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(mixture, IsotropicMixture):
            raise TypeError(f"mixture must be an IsotropicMixture, got {type(mixture).__name__}")
        self.max_step = check_variance(variance, max_step)
        self.variance: Variance = variance
        self.shared = bool(shared)
        if shared and not bool((mixture.variances == mixture.variances[0]).all()):
            raise ValueError("shared=True needs a mixture whose variances are equal")
        self.means, self.variances = mixture.means.clone(), mixture.variances.clone()
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
    def mixture(self) -> IsotropicMixture:
        """A copy of the present mixture."""
        return IsotropicMixture(self.means, self.variances)

    def _displace(self, noise: Float[Tensor, "k b d"]) -> Float[Tensor, "n b d"]:
        return self.variances.sqrt()[:, None, None] * noise

    def _mixture_score(
        self, displacement: Float[Tensor, "k b d"], rows: slice
    ) -> tuple[Float[Tensor, "k b"], Float[Tensor, "k b d"]]:
        # Relative to the component that made the point: nothing cancels, wherever the mixture lies.
        n, d = self.means.shape
        between = self.means[rows, None] - self.means  # (k, N, d), smaller by B than all differences
        squared = torch.baddbmm(between.square().sum(-1)[:, None], displacement, between.mT, alpha=2)
        squared += displacement.square().sum(-1, keepdim=True)
        precisions = self.variances.reciprocal()
        joint = torch.addcmul((d / 2) * precisions.log(), squared, precisions, value=-0.5)
        top = joint.amax(-1, keepdim=True)
        a = (joint - top).exp_()
        total = a.sum(-1, keepdim=True)
        a = a.mul_(precisions).div_(total)
        score = torch.baddbmm(displacement * a.sum(-1, keepdim=True), a, between, beta=-1, alpha=-1)
        return (total.log_() + top).squeeze(-1) - (d / 2 * math.log(2 * math.pi) + math.log(n)), score

    def _moved(self, found: Evaluation, lr: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        d = self.means.shape[1]
        metrics: dict[str, Any] = {}
        length = found.means.square().sum(-1)
        variances = self.variances
        if self.variance != "fixed":
            inner = self.nodes.average((found.displacement * found.gap).sum(-1))
            slope = inner / (d * self.variances)  # 2 / d times N dF/deps
            length = length + d * self.variances * slope.square()
            u = lr * (slope.mean().expand_as(slope) if self.shared else slope)
            capped = cap(u, self.variances, self.variance, self.max_step)
            variances = move(self.variances, capped, self.variance)
            metrics["capped"] = (capped != u).sum() / u.numel()
        forward = found.means if self.variance != "natural" else variances[:, None] * found.means
        metrics["grad_norm"] = length.mean().sqrt()
        return {"means": self.means - lr * forward, "variances": variances}, metrics
