"""A planted direction behind a nonlinear link: the single-index model."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry import sphere
from steepest.geometry.hermite import HermiteSeries, hermite, information_exponent
from steepest.inference.planted import ELEMENTS, check_order, check_points, planted_direction

Link = int | HermiteSeries | Callable[[Tensor], Tensor]
_CACHED = 2**16  # elements of a temporary: they stay in a core's cache
_NODES = 48  # of means over the sphere: exact for links of degree up to 90


class SingleIndex:
    r"""A single-index model: $x_i \sim N(0, I_d)$, $y_i = \sigma(\langle \theta_*, x_i \rangle) + s\,z_i$.

    The loss is minus the correlation, $L(\theta) = -\frac1n \sum_i y_i\,\sigma(\langle \theta, x_i \rangle)$.

    Args:
        d: dimension, at least 2.
        link: $\sigma$: a number k for the Hermite polynomial $h_k$, a `HermiteSeries`, or any elementwise function,
            which is differentiated by autograd.
        n: number of samples, at least 1.
        noise: s, the standard deviation of the noise of the labels.
        generator: source of $\theta_*$, of the samples and of the noise; None: torch's own.
        theta_star: $\theta_*$, made a unit vector; None: uniform on the sphere.
        dtype: of the data; None: torch's default.

    Attributes:
        theta_star: the planted direction, shape (d,).
        x: inputs, shape (n, d).
        y: labels, shape (n,).
        exponent: the information exponent of the link; None if it has none.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Source:
        Wei, Damian and Lee 2026, arXiv 2603.06028.
    """

    def __init__(
        self,
        d: int,
        link: Link,
        n: int,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        theta_star: Float[Tensor, "d"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("d", d, 2)
        check_int("n", n)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a finite number of at least 0, got {noise!r}")
        self.d, self.n, self.noise = d, n, float(noise)
        self.link = _link(link)
        self.exponent = information_exponent(self.link)
        self.theta_star = planted_direction(d, theta_star, generator, dtype)
        device = self.theta_star.device if generator is None else generator.device
        own = {"generator": generator, "dtype": self.theta_star.dtype, "device": device}
        self.x = torch.randn(n, d, **own).to(self.theta_star.device)
        self.y = self.link(self.x @ self.theta_star)
        self._slope = self.link.derivative() if isinstance(self.link, HermiteSeries) else None
        if noise:
            self.y = self.y + noise * torch.randn(n, **own).to(self.y.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the data."""
        return self.theta_star.dtype

    @property
    def device(self) -> torch.device:
        """Of the data."""
        return self.theta_star.device

    def fresh(self, n: int, generator: torch.Generator | None = None) -> "SingleIndex":
        """New samples of the same model.

        Args:
            n: how many.
            generator: source of the samples; None: torch's own.
        """
        return SingleIndex(
            self.d, self.link, n, self.noise, generator, theta_star=self.theta_star, dtype=self.theta_star.dtype
        )

    def relabelled(self, y: Float[Tensor, "n"]) -> "SingleIndex":
        """The same inputs with other labels.

        Args:
            y: the labels.
        """
        if tuple(y.shape) != (self.n,):
            raise ValueError(f"y must have the shape ({self.n},), got {tuple(y.shape)}")
        other = object.__new__(SingleIndex)
        other.__dict__.update(self.__dict__, y=y.to(self.y))
        return other

    def loss(self, theta: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Minus the correlation of the labels with the link, over all samples.

        Args:
            theta: points.
        """
        return -self._over_samples(theta, lambda u, x, y: self.link(u) @ y)

    def neg_grad(self, theta: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""$b(\theta) = \frac1n \sum_i y_i\,\sigma'(\langle \theta, x_i \rangle)\,x_i$.

        Args:
            theta: points.
        """
        return self._over_samples(theta, lambda u, x, y: (self.slope(u) * y) @ x)

    def slope(self, u: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        r"""$\sigma'(u)$.

        Args:
            u: where.
        """
        return link_slope(self.link, u) if self._slope is None else self._slope(u)

    def multiplier(self, theta: Float[Tensor, "*batch d"], index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        r"""$y_i\,\sigma'(\langle \theta, x_i \rangle)$: the gradient of sample i is this times $x_i$.

        Args:
            theta: points.
            index: i, a sample for each point.
        """
        u = (self.x[index] * theta).sum(-1)
        return self.y[index] * self.slope(u)

    def partial_trace(self) -> Tensor:
        r"""What the average of a weakly driven Langevin chain tends to, up to scale: the oracle.

        For an odd exponent the vector $\sum_i y_i\,E[\sigma(\langle \theta, x_i \rangle)\,\theta]$ (for $h_3$ along
        $\sum_i y_i (|x_i|^2 / (d + 2) - 1)\,x_i$), for an even one the matrix
        $\sum_i y_i\,E[\sigma(\langle \theta, x_i \rangle)\,\theta \theta^\top]$ without its multiple of the identity
        (for $h_4$ along $\sum_i y_i (|x_i|^2 / (d + 4) - 1)\,x_i x_i^\top$), over n; $\theta$ is uniform on the sphere.

        Raises:
            ValueError: the link has no information exponent.
        """
        if self.exponent is None:
            raise ValueError("link must depend on its argument, or there is nothing to find")
        nodes, weights = (each.to(self.x) for each in sphere.coordinate_rule(self.d, _NODES))
        radius = self.x.norm(dim=-1)
        values = torch.cat([self.link(part[:, None] * nodes) for part in radius.split(ELEMENTS // _NODES)])
        if self.exponent % 2:
            means = values @ (weights * nodes) / radius
            return (self.y * means) @ self.x / self.n
        means = values @ (weights * (self.d * nodes.square() - 1)) / (self.d - 1) / radius.square()
        return self.x.mT @ ((self.y * means).unsqueeze(-1) * self.x) / self.n

    def small_eps_average(self, eps: float) -> Tensor:
        r"""The stationary average of `SphericalLangevin` to first order in eps.

        $E\,\theta$ for an odd exponent, $E\,\theta\theta^\top$ for an even one.

        Args:
            eps: the scale of the drift.
        """
        traced = self.partial_trace()
        if traced.ndim == 1:
            return 2 * eps * traced
        identity = torch.eye(self.d, dtype=traced.dtype, device=traced.device)
        return identity / self.d + 2 * eps * (traced - traced.trace() / self.d * identity)

    def _over_samples(self, theta: Tensor, value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The mean over the samples of value(theta x', x, y), which sums over a part of them."""
        check_points(theta, self.d)
        flat = theta.reshape(-1, self.d)
        total: Tensor | None = None
        for x, y in zip(self.x.split(size := self._part(len(flat))), self.y.split(size), strict=True):
            part = value(flat @ x.mT, x, y)
            total = part if total is None else total + part
        assert total is not None
        return (total / self.n).reshape((*theta.shape[:-1], *total.shape[1:]))

    def _part(self, points: int) -> int:
        return max(64, _CACHED // max(points, 1))


def link_slope(link: Callable[[Tensor], Tensor], u: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The derivative of an elementwise function.

    Args:
        link: a `HermiteSeries`, or any function that autograd can differentiate.
        u: where.
    """
    if isinstance(link, HermiteSeries):
        return link.derivative()(u)
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        (slope,) = torch.autograd.grad(link(u).sum(), u)
    return slope


def _link(link: Link) -> Callable[[Tensor], Tensor]:
    if isinstance(link, bool) or not (isinstance(link, int | float) or callable(link)):
        raise TypeError(f"link must be an integer k for h_k, a HermiteSeries or a function, got {link!r}")
    if isinstance(link, int | float):
        check_order("link", link)
        return hermite(int(link))
    return link
