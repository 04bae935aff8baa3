"""The equal-weight mixture of isotropic Gaussians: density, score, samples, moments."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

BLOCK = 1 << 21  # numbers in the largest temporary


class Estimate(NamedTuple):
    """A Monte Carlo estimate.

    Attributes:
        value: The estimate.
        error: Its standard error.
    """

    value: float
    error: float


class IsotropicMixture:
    r"""$q(x) = \frac1N \sum_i \mathcal N(x; m_i, \varepsilon_i I_d)$.

    N (d + 1) numbers: cheaper than full covariances, and several modes, which mean fields lack. All densities are
    computed in log space.

    Args:
        means: m, of shape (N, d), float32 or float64. It is copied.
        variances: $\varepsilon$, of shape (N,), or a number for all; positive. They are variances, not standard
            deviations.

    Raises:
        TypeError: Something is not a real floating tensor.
        ValueError: The shapes do not match, a mean is not finite, or a variance is not positive and finite.

    Source:
        Petit-Talamon, Lambert and Korba 2025, arXiv 2506.13613.

    Examples:
        >>> q = IsotropicMixture(torch.tensor([[-2.0], [2.0]]), 1.0)
        >>> q.log_prob(torch.zeros(1, 1)), q.score(torch.zeros(1, 1)), q.covariance
        (tensor([-2.9189]), tensor([[0.]]), tensor([[5.]]))
    """

    def __init__(self, means: Float[Tensor, "n d"], variances: Float[Tensor, " n"] | float) -> None:
        check_means(means)
        if not isinstance(variances, Tensor):
            variances = torch.full((len(means),), float(variances), dtype=means.dtype, device=means.device)
        if variances.shape != means.shape[:1]:
            raise ValueError(
                f"variances must be of shape (N,) beside means of shape (N, d); got {tuple(variances.shape)} beside "
                f"{tuple(means.shape)}"
            )
        check_variances(variances)
        self.means = means.detach().clone(memory_format=torch.contiguous_format)
        self.variances = variances.detach().to(means).clone(memory_format=torch.contiguous_format)

    @classmethod
    def from_box(
        cls,
        n: int,
        d: int,
        half_width: float,
        variance: float,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> "IsotropicMixture":
        """Means uniform in $[-s, s]^d$, all variances equal. A start should be wide: modes far from it are not found.

        Args:
            n: Number of components.
            d: Dimension.
            half_width: s, at least 0.
            variance: The variance of all components.
            generator: The randomness; it also sets the device.
            dtype: float32 or float64; torch's default if None.

        Raises:
            TypeError, ValueError: An argument is not as described.
        """
        check_int("n", n)
        check_int("d", d)
        if not (math.isfinite(half_width) and half_width >= 0):
            raise ValueError(f"half_width must be at least 0, got {half_width!r}")
        device = None if generator is None else generator.device
        unit = torch.rand(n, d, generator=generator, dtype=dtype, device=device)
        return cls(half_width * (2 * unit - 1), variance)

    @property
    def components(self) -> int:
        """The number of components N."""
        return self.means.shape[0]

    @property
    def dimension(self) -> int:
        """The dimension d."""
        return self.means.shape[1]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean of the mixture."""
        return self.means.mean(0)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        r"""$\bar\varepsilon I + \frac1N \sum_i (m_i - \bar m)(m_i - \bar m)^\top$."""
        centred = self.means - self.mean
        eye = torch.eye(self.dimension, dtype=centred.dtype, device=centred.device)
        return centred.mT @ centred / self.components + self.variances.mean() * eye

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The log-density, differentiable in x.

        Args:
            x: Points.

        Raises:
            ValueError: Their last dimension is not d.
        """
        flat = self._flat(x)
        return torch.cat([log_sum_exp(self._joint(rows)) for rows in self._blocks(flat)]).reshape(x.shape[:-1])

    def responsibilities(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n"]:
        """How likely each component is to have made x; they sum to one.

        Args:
            x: Points.
        """
        flat = self._flat(x)
        shares = torch.cat([self._joint(rows).softmax(-1) for rows in self._blocks(flat)])
        return shares.reshape(*x.shape[:-1], self.components)

    def score(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""$\nabla \log q(x) = -\sum_i R_i(x) (x - m_i) / \varepsilon_i$ with the responsibilities R.

        Args:
            x: Points.
        """
        a = self.responsibilities(x) / self.variances
        centre = self.mean  # less cancellation than with points far from zero
        return a @ (self.means - centre) - a.sum(-1, keepdim=True) * (x - centre)

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, stratified: bool = False
    ) -> Float[Tensor, "n d"]:
        """Draw points.

        Args:
            n: How many.
            generator: The randomness.
            stratified: Take equal numbers from each component (as near as n allows), in their order; averages over
                such a sample vary less.

        Raises:
            TypeError, ValueError: n is not a positive integer.
        """
        check_int("n", n)
        device = self.means.device
        if stratified:
            index = torch.arange(n, device=device) * self.components // n
            if n % self.components:  # which component has one more is random, so that averages have no bias
                index = torch.randperm(self.components, generator=generator, device=device)[index]
        else:
            index = torch.randint(self.components, (n,), generator=generator, device=device)
        noise = torch.randn(n, self.dimension, generator=generator, dtype=self.means.dtype, device=device)
        return self.means[index] + self.variances[index].sqrt()[:, None] * noise

    def entropy(self, samples: int = 1000, *, generator: torch.Generator | None = None) -> Estimate:
        r"""A Monte Carlo estimate of the entropy, $-E_q \log q$, with equal draws from each component.

        Args:
            samples: Draws in all, rounded up to a multiple of 2 N.
            generator: The randomness.
        """
        return expectation(self, lambda x: -self.log_prob(x), samples, generator)

    def to(self, *arguments: torch.device | torch.dtype | str) -> "IsotropicMixture":
        """The same mixture on another device or with another dtype.

        Args:
            arguments: As of `torch.Tensor.to`.
        """
        return IsotropicMixture(self.means.to(*arguments), self.variances.to(*arguments))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        low, high = float(self.variances.min()), float(self.variances.max())
        return f"IsotropicMixture({self.components} components, d={self.dimension}, variances {low:.3g} to {high:.3g})"

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.dimension:
            raise ValueError(f"x must be of shape (..., {self.dimension}), got {tuple(x.shape)}")
        return x.reshape(-1, self.dimension)

    def _blocks(self, flat: Tensor) -> tuple[Tensor, ...]:
        width = self.dimension if flat.requires_grad else 1
        return flat.split(max(1, BLOCK // (self.components * width)))

    def _joint(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        """The log of weight times density of each component."""
        if x.requires_grad:
            squared = (x[:, None] - self.means).square().sum(-1)  # cdist has no second derivative
        else:
            # Not the form |x|^2 - 2 x m + |m|^2: it cancels where a component is narrow and far from zero.
            squared = torch.cdist(x, self.means, compute_mode="donot_use_mm_for_euclid_dist").square()
        return -squared / (2 * self.variances) - self.dimension / 2 * self._log_widths() - math.log(self.components)

    def _log_widths(self) -> Tensor:
        return (2 * math.pi * self.variances).log()


def expectation(mixture, function, samples: int, generator: torch.Generator | None) -> Estimate:
    """The mean of a function under a mixture with equal weights, by equal draws from each component."""
    check_int("samples", samples)
    n = mixture.components
    each = max(2, -(-samples // n))
    with torch.no_grad():
        x = mixture.sample(each * n, generator=generator, stratified=True)
        values = function(x).reshape(n, each).double()
    error = (values.var(1).mean() / (n * each)).sqrt()
    return Estimate(float(values.mean()), float(error))


def log_sum_exp(joint: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """As `torch.logsumexp` over the last dimension of finite numbers, in less time for few of them."""
    top = joint.detach().amax(-1, keepdim=True)
    return (joint - top).exp().sum(-1).log() + top.squeeze(-1)


def check_means(means: Tensor) -> None:
    """Raise unless means are a finite real (N, d)."""
    if not isinstance(means, Tensor) or means.dtype not in (torch.float32, torch.float64):
        found = getattr(means, "dtype", type(means).__name__)
        raise TypeError(f"means must be a tensor in float32 or float64, got {found}")
    if means.ndim != 2 or 0 in means.shape:
        raise ValueError(f"means must be of shape (N, d) with N and d at least 1, got {tuple(means.shape)}")
    if not bool(means.isfinite().all()):
        raise ValueError("means must be finite")


def check_variances(variances: Tensor) -> None:
    """Raise unless variances are positive and finite."""
    if not variances.is_floating_point():
        raise TypeError(f"variances must be real and floating, got {variances.dtype}")
    if not bool(((variances > 0) & variances.isfinite()).all()):
        raise ValueError(f"variances must be positive and finite, got {variances.min():.3g} to {variances.max():.3g}")
