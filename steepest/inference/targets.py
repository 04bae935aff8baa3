"""Densities to try a method on: Neal's funnel, Bayesian logistic regression, random mixtures of Gaussians."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.inference.gaussian_mixture import GaussianMixture


@dataclass(frozen=True)
class Funnel:
    r"""$x_1 \sim \mathcal N(0, v)$ and, given it, $x_2, \dots, x_d \sim \mathcal N(0, e^{x_1})$.

    Args:
        variance: v.

    Source:
        Neal 2003, Slice sampling, section 8.
    """

    variance: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise ValueError(f"variance must be positive and finite, got {self.variance!r}")

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The normalised log-density.

        Args:
            x: Points.
        """
        mouth, rest = x[..., 0], x[..., 1:]
        constant = x.shape[-1] * math.log(2 * math.pi) + math.log(self.variance)
        squares = mouth.square() / self.variance + (-mouth).exp() * rest.square().sum(-1)
        return -(squares + rest.shape[-1] * mouth + constant) / 2

    def score(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The gradient of `log_prob`.

        Args:
            x: Points.
        """
        mouth, rest = x[..., :1], x[..., 1:]
        width = (-mouth).exp()
        first = (width * rest.square().sum(-1, keepdim=True) - rest.shape[-1]) / 2 - mouth / self.variance
        return torch.cat([first, -width * rest], dim=-1)


class LogisticRegression:
    r"""The posterior of $P(y = 1 | x) = \sigma(x^\top w)$ with the prior $w \sim \mathcal N(0, v I)$.

    `log_prob` is not normalised.

    Args:
        inputs: x, (n, d); a column of ones, if there is to be an intercept.
        labels: y, (n,), zeros and ones.
        prior_variance: v.

    Raises:
        ValueError: The shapes do not match, a label is neither 0 nor 1, or the variance is not positive.
    """

    def __init__(self, inputs: Float[Tensor, "n d"], labels: Tensor, prior_variance: float = 100.0) -> None:
        if inputs.ndim != 2 or labels.shape != inputs.shape[:1]:
            raise ValueError(
                f"inputs (n, d) and labels (n,) do not match: {tuple(inputs.shape)} and {tuple(labels.shape)}"
            )
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError("labels must be 0 or 1")
        if not (math.isfinite(prior_variance) and prior_variance > 0):
            raise ValueError(f"prior_variance must be positive and finite, got {prior_variance!r}")
        self.inputs, self.labels, self.prior_variance = inputs, labels.to(inputs), float(prior_variance)

    def log_prob(self, w: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The log-posterior up to a constant.

        Args:
            w: Weights.
        """
        logits = w @ self.inputs.mT
        likelihood = (self.labels * logits - torch.nn.functional.softplus(logits)).sum(-1)
        return likelihood - w.square().sum(-1) / (2 * self.prior_variance)

    def score(self, w: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The gradient of `log_prob`.

        Args:
            w: Weights.
        """
        return (self.labels - (w @ self.inputs.mT).sigmoid()) @ self.inputs - w / self.prior_variance


def random_gaussian_mixture(
    n: int,
    d: int,
    half_width: float,
    scale: float,
    *,
    kind: Literal["full", "diagonal"] = "full",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> GaussianMixture:
    r"""A random target: means uniform in $[-s, s]^d$, weights proportional to integers from 1 to 2 n - 1.

    Covariances of kind "full" are Wishart with d degrees of freedom, those of kind "diagonal" uniform in [1, 10], both
    scaled to the largest entry `scale`.

    Args:
        n: Number of components.
        d: Dimension.
        half_width: s.
        scale: Largest entry of each covariance.
        kind: Of the covariances.
        generator: The randomness.
        dtype: float32 or float64; torch's default if None.

    Raises:
        TypeError, ValueError: An argument is not as described.

    Source:
        The experiments of Petit-Talamon, Lambert and Korba 2025, arXiv 2506.13613.
    """
    check_int("n", n)
    check_int("d", d)
    if kind not in ("full", "diagonal"):
        raise ValueError(f"kind must be full or diagonal, got {kind!r}")
    device = None if generator is None else generator.device
    means = half_width * (2 * torch.rand(n, d, generator=generator, dtype=dtype, device=device) - 1)
    if kind == "full":
        a = torch.randn(n, d, d, generator=generator, dtype=dtype, device=device)
        covariances = a @ a.mT
        covariances = scale * covariances / covariances.abs().amax((1, 2), keepdim=True)
        covariances = covariances + 1e-6 * torch.eye(d, dtype=dtype, device=device)
    else:
        wide = 1 + 9 * torch.rand(n, d, generator=generator, dtype=dtype, device=device)
        covariances = scale * wide / wide.amax(1, keepdim=True)
    weights = torch.randint(1, max(2, 2 * n), (n,), generator=generator, device=device).to(means)
    return GaussianMixture(means, covariances, weights)
