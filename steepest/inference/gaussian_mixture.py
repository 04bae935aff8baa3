"""The mixture of Gaussians with full covariances: a richer approximation, and a target to test on."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.inference.mixture import BLOCK, Estimate, check_means, expectation, log_sum_exp


class GaussianMixture:
    r"""$q(x) = \sum_i w_i \mathcal N(x; m_i, \Sigma_i)$.

    `log_prob` and `score` can be the target of `MixtureVI`.

    Args:
        means: m, of shape (N, d). It is copied.
        covariances: $\Sigma$, of shape (N, d, d), symmetric positive definite; (N, d) are diagonals, (N,) multiples of
            the identity.
        weights: w, of shape (N,), positive; divided by their sum. None: equal.

    Raises:
        TypeError: Something is not a real floating tensor.
        ValueError: The shapes do not match, or a covariance or weight is not positive.

    Examples:
        >>> bar = GaussianMixture(torch.zeros(1, 2), torch.tensor([[4.0, 1.0]]))
        >>> bar.score(torch.ones(1, 2))
        tensor([[-0.2500, -1.0000]])
    """

    def __init__(
        self,
        means: Float[Tensor, "n d"],
        covariances: Float[Tensor, "n d d"] | Float[Tensor, "n d"] | Float[Tensor, " n"],
        weights: Float[Tensor, " n"] | None = None,
    ) -> None:
        check_means(means)
        n, d = means.shape
        if not isinstance(covariances, Tensor) or not covariances.is_floating_point():
            raise TypeError("covariances must be a real floating tensor")
        if covariances.shape not in ((n, d, d), (n, d), (n,)):
            raise ValueError(
                f"covariances must be of shape {(n, d, d)}, {(n, d)} or {(n,)} beside means of shape {(n, d)}, got "
                f"{tuple(covariances.shape)}"
            )
        spread = covariances.detach().to(means)
        self._deviations = None if spread.ndim == 3 else _deviations(spread.view(n, -1).expand(n, d))
        self._full = _factored(spread) if spread.ndim == 3 else None
        if weights is None:
            weights = torch.full((n,), 1 / n, dtype=means.dtype, device=means.device)
        if weights.shape != (n,) or not bool(((weights > 0) & weights.isfinite()).all()):
            raise ValueError(f"weights must be {n} positive numbers, got {weights}")
        self.means = means.detach().clone(memory_format=torch.contiguous_format)
        self.weights = (weights / weights.sum()).detach().to(means)
        if self._full is not None:
            roots = self._full[1]
            volumes = roots.diagonal(dim1=1, dim2=2).log().sum(-1)
            eye = torch.eye(d, dtype=means.dtype, device=means.device).expand(n, d, d)
            whiten = torch.linalg.solve_triangular(roots, eye, upper=False)
            self._centre = self.means.mean(0)
            # One product whitens a point for all components: rows (i, a) of the stacked inverse roots.
            self._whiten = whiten.reshape(n * d, d)
            self._unwhiten = -self._whiten
            self._offset = (whiten @ (self.means - self._centre)[..., None]).reshape(n * d)
        else:
            assert self._deviations is not None
            volumes = self._deviations.log().sum(-1)
        self._level = self.weights.log() - volumes - d / 2 * math.log(2 * math.pi)

    @property
    def covariances(self) -> Float[Tensor, "n d d"]:
        """The covariances as matrices."""
        if self._deviations is not None:
            return torch.diag_embed(self._deviations.square())
        assert self._full is not None
        return self._full[0]

    @property
    def roots(self) -> Float[Tensor, "n d d"]:
        r"""Lower triangular matrices L with $L L^\top$ the covariances."""
        if self._deviations is not None:
            return torch.diag_embed(self._deviations)
        assert self._full is not None
        return self._full[1]

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
        return self.weights @ self.means

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The covariance of the mixture."""
        centred = self.means - self.mean
        if self._deviations is not None:
            within = torch.diag(self.weights @ self._deviations.square())
        else:
            within = torch.einsum("n,nij->ij", self.weights, self.covariances)
        return (self.weights[:, None] * centred).mT @ centred + within

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The log-density, differentiable in x.

        Args:
            x: Points.
        """
        flat = self._flat(x)
        return _join([log_sum_exp(self._whitened(rows)[1]) for rows in self._blocks(flat)]).reshape(x.shape[:-1])

    def score(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""$\nabla \log q(x) = -\sum_i R_i(x) \Sigma_i^{-1} (x - m_i)$.

        Args:
            x: Points.
        """
        flat = self._flat(x)
        return _join([self._score(rows) for rows in self._blocks(flat)]).reshape(x.shape)

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, stratified: bool = False
    ) -> Float[Tensor, "n d"]:
        """Draw points.

        Args:
            n: How many.
            generator: The randomness.
            stratified: Take n / N from each component, in their order; for equal weights and n a multiple of N.

        Raises:
            TypeError, ValueError: n is not a positive integer, or it cannot be stratified.
        """
        check_int("n", n)
        device = self.means.device
        if stratified:
            if n % self.components or not torch.allclose(self.weights, self.weights.mean()):
                raise ValueError(f"stratified draws need equal weights, and n a multiple of {self.components}, got {n}")
            index = torch.arange(self.components, device=device).repeat_interleave(n // self.components)
        else:
            index = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dimension, generator=generator, dtype=self.means.dtype, device=device)
        if self._deviations is not None:
            return self.means[index] + self._deviations[index] * noise
        points, roots = torch.empty_like(noise), self.roots
        for i in range(self.components):  # no (n, d, d) of gathered roots
            mine = index == i
            points[mine] = self.means[i] + noise[mine] @ roots[i].mT
        return points

    def entropy(self, samples: int = 1000, *, generator: torch.Generator | None = None) -> Estimate:
        """A Monte Carlo estimate of the entropy of a mixture with equal weights.

        Args:
            samples: Draws in all, rounded up to a multiple of 2 N.
            generator: The randomness.
        """
        return expectation(self, lambda x: -self.log_prob(x), samples, generator)

    def __repr__(self) -> str:
        return f"GaussianMixture({self.components} components, d={self.dimension})"

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.dimension:
            raise ValueError(f"x must be of shape (..., {self.dimension}), got {tuple(x.shape)}")
        return x.reshape(-1, self.dimension)

    def _blocks(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split(max(1, BLOCK // (self.components * self.dimension)))

    def _whitened(self, x: Float[Tensor, "m d"]) -> tuple[Tensor, Tensor]:
        """$L_i^{-1} (x - m_i)$, of shape (m, N, d), and log of weight times density."""
        if self._deviations is not None:
            y = (x[:, None] - self.means) / self._deviations
        else:
            y = torch.addmm(-self._offset, x - self._centre, self._whiten.mT)
            y = y.unflatten(1, (self.components, self.dimension))
        return y, torch.sub(self._level, y.square().sum(-1), alpha=0.5)

    def _score(self, x: Float[Tensor, "m d"]) -> Tensor:
        y, joint = self._whitened(x)
        weighted = joint.softmax(-1)[..., None] * y
        if self._deviations is not None:
            return -(weighted / self._deviations).sum(1)
        return weighted.flatten(1) @ self._unwhiten


def _deviations(variances: Tensor) -> Tensor:
    if not bool(((variances > 0) & variances.isfinite()).all()):
        raise ValueError(f"covariances must be positive definite and finite, got a variance of {variances.min():.3g}")
    return variances.sqrt()


def _factored(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Covariances, made symmetric, and their Cholesky factors."""
    if float((matrices - matrices.mT).abs().max()) > 1e-4 * float(matrices.abs().max()):
        raise ValueError("covariances must be symmetric")
    matrices = (matrices + matrices.mT) / 2
    roots, bad = torch.linalg.cholesky_ex(matrices)
    if bool(bad.any()) or not bool(roots.isfinite().all()):
        index = int(torch.nonzero(bad)[0]) if bool(bad.any()) else 0
        raise ValueError(f"covariances must be positive definite and finite; that of component {index} is not")
    return matrices.contiguous(), roots


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
