r"""How far noise on the weights lowers the curvature at which gradient descent is stable.

Variational gradient descent steps along the mean of S gradients at weights with noise of covariance $\Sigma$. On a
quadratic with Hessian Q the loss of the mean changes in expectation by

$$-\rho|g|^2 + \tfrac12\rho^2 g^T Q g + \frac{\rho^2}{2S}\mathrm{tr}(Q^3\Sigma)
= \sum_i \Big(-\rho + \tfrac12\rho^2\lambda_i\Big) c_i + \frac{\rho^2}{2S}\lambda_i^3\sigma_i^2$$

with $\rho$ the learning rate, $c_i = (v_i^T g)^2$ and $\sigma_i^2 = v_i^T\Sigma v_i$ for the eigenpairs of Q. The part
of mode i is negative exactly below the threshold $(2/\rho)\,\mathrm{VF}(S c_i/\sigma_i^2)$.

Source: Ghosh et al. 2025, arXiv 2506.12903 (theorem 3.1; the identity and its form for any covariance are derived).
"""

import math
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

Number = TypeVar("Number", float, Tensor)


def variational_factor(z: Number, lr: float | Tensor) -> Number:
    r"""The factor VF by which noise lowers the threshold 2/lr.

    $$\mathrm{VF}(z) = \rho\sqrt{z/3}\,\sinh\!\Big(\tfrac13\,\mathrm{arsinh}\big(\tfrac3\rho\sqrt{3/z}\big)\Big)$$

    the real root of $\lambda^3 + z\lambda - 2z/\rho$, in units of $2/\rho$. It depends on $z\rho^2$ alone, grows with
    it, and is 1/2 at $z\rho^2 = 1$; VF -> 1 as $1 - 4/(z\rho^2)$, and VF -> 0 as $(z\rho^2/4)^{1/3}$. It is right for
    all z from the smallest to the largest double; VF(0) = 0 and VF(inf) = 1.

    Args:
        z: S c / variance, at least 0: samples times squared projection of the gradient, over the variance of the noise.
            Float or tensor of any shape.
        lr: the learning rate $\rho$, above 0; a number, or a tensor that broadcasts with z.

    Returns:
        VF, computed in float64; a float, or a tensor of the dtype of z.

    Raises:
        TypeError: z or lr is not a number or a real tensor.
        ValueError: z is negative or NaN, or lr is not positive and finite.
    """
    value, rate = _real(z, "z"), _positive(lr, "lr")
    bad = ~(value >= 0)
    if bool(bad.any()):
        raise ValueError(f"z must be at least 0, got {float(value[bad].flatten()[0])}")
    # With a = (3 / rho) sqrt(3 / z), VF = 3 sinh(arsinh(a) / 3) / a.
    log_a = 1.5 * math.log(3) - rate.log() - 0.5 * value.log()
    third = (log_a.clamp(-700, None) + math.log(2)) / 3  # of arsinh(a), where a is large
    large = (math.log(1.5) + third + torch.log1p(-torch.exp(-2 * third.clamp_min(0.1))) - log_a).exp()
    a = (3 * math.sqrt(3) / rate / value.sqrt()).clamp_max(1e12)
    middle = 3 * torch.sinh(torch.asinh(a) / 3) / a
    small = 1 - (4 / 27) * a.square()
    found = torch.where(a < 1e-4, small, torch.where(log_a > 20, large, middle))
    found = torch.where(value == 0, 0.0, found)
    return _like(found, z)


def vgd_threshold(lr: float | Tensor, projection: Number, variance: float | Tensor, samples: int = 1) -> Number:
    r"""The curvature $(2/\rho)\,\mathrm{VF}(S c/\sigma^2)$ below which variational gradient descent is stable.

    Args:
        lr: the learning rate $\rho$.
        projection: $c = (v^T g)^2$: squared projection of the gradient at the mean on the eigenvector, at least 0.
        variance: $\sigma^2$ of the noise along the eigenvector, at least 0; with 0 the threshold is 2/lr.
        samples: S, gradients averaged in a step.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range; the message has the value.
    """
    check_int("samples", samples)
    c, var, rate = _real(projection, "projection"), _real(variance, "variance"), _positive(lr, "lr")
    for name, value in (("projection", c), ("variance", var)):
        if not bool((value >= 0).all()):
            raise ValueError(f"{name} must be at least 0, got {float(value[~(value >= 0)].flatten()[0])}")
    z = torch.where(var == 0, math.inf, samples * c / var)
    z = torch.where(var.isinf(), 0.0, z)
    return _like(2 / rate * variational_factor(z, rate), projection)


class Modes(NamedTuple):
    """The expected change of a quadratic loss, mode by mode.

    Attributes:
        eigenvalues: of the Hessian, the largest first.
        changes: expected change of the loss by each mode; they sum to `expected_descent`.
        thresholds: the eigenvalue below which the change of the mode is negative.
    """

    eigenvalues: Float[Tensor, "*batch n"]
    changes: Float[Tensor, "*batch n"]
    thresholds: Float[Tensor, "*batch n"]


def expected_descent(
    hessian: Float[Tensor, "*batch n n"],
    mean: Float[Tensor, "*batch n"],
    lr: float,
    covariance: float | Tensor,
    samples: int = 1,
) -> Float[Tensor, "*batch"]:
    r"""Expected change of $\ell(m) = \frac12 m^T Q m$ in one step of variational gradient descent, exactly.

    Args:
        hessian: Q, symmetric.
        mean: m, relative to the minimum.
        lr: the learning rate $\rho$.
        covariance: of the noise: $\sigma^2$, the diagonal (n,), or the matrix (n, n). Any distribution with it.
        samples: S, gradients averaged in a step.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit, or an argument out of its range.
    """
    sigma = _covariance(hessian, mean, lr, covariance, samples)
    g = (hessian @ mean[..., None])[..., 0]
    curvature = (g * (hessian @ g[..., None])[..., 0]).sum(-1)
    noise = (hessian @ hessian @ hessian @ sigma).diagonal(dim1=-2, dim2=-1).sum(-1)
    return -lr * g.square().sum(-1) + 0.5 * lr**2 * curvature + lr**2 / (2 * samples) * noise


def descent_modes(
    hessian: Float[Tensor, "*batch n n"],
    mean: Float[Tensor, "*batch n"],
    lr: float,
    covariance: float | Tensor,
    samples: int = 1,
) -> Modes:
    """`expected_descent`, by the eigenvectors of the Hessian. The arguments are the same.

    For a covariance that does not commute with the Hessian, the variance along an eigenvector is what counts.
    """
    sigma = _covariance(hessian, mean, lr, covariance, samples)
    values, vectors = torch.linalg.eigh(hessian)
    values, vectors = values.flip(-1), vectors.flip(-1)
    projection = (values * (vectors.mT @ mean[..., None])[..., 0]).square()
    variance = ((sigma @ vectors) * vectors).sum(-2).clamp_min(0)
    changes = (-lr + 0.5 * lr**2 * values) * projection + lr**2 / (2 * samples) * values**3 * variance
    return Modes(values, changes, vgd_threshold(lr, projection, variance, samples))


class Probability(NamedTuple):
    """A probability from repeated draws, with its standard error."""

    value: float
    standard_error: float


def descent_probability(
    hessian: Float[Tensor, "n n"],
    mean: Float[Tensor, "n"],
    lr: float,
    covariance: float | Tensor,
    samples: int = 1,
    *,
    draws: int = 10_000,
    generator: torch.Generator | None = None,
) -> Probability:
    """How likely one step with Gaussian noise lowers the quadratic loss, by simulation.

    Args:
        hessian: as for `expected_descent`, as are the four that follow.
        mean: the present mean, relative to the minimum.
        lr: the learning rate.
        covariance: of the noise.
        samples: gradients averaged in a step.
        draws: simulated steps.
        generator: source of the noise; a new one of seed 0 if None.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes that do not fit, or an argument out of its range.
    """
    check_int("draws", draws)
    if hessian.ndim != 2:
        raise ValueError(f"hessian must be one matrix (n, n), got shape {tuple(hessian.shape)}")
    sigma = _covariance(hessian, mean, lr, covariance, samples)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    values, vectors = torch.linalg.eigh(sigma)
    root = vectors * (values.clamp_min(0) / samples).sqrt()
    noise = torch.randn(draws, len(mean), generator=source, device=source.device, dtype=torch.float64)
    noise = noise.to(root.device, root.dtype) @ root.mT  # the mean of the samples' noise
    gradient = (mean + noise) @ hessian
    # The loss of m - d less that of m, so that small changes are not lost beside the loss.
    change = -lr * gradient @ (hessian @ mean) + 0.5 * lr**2 * ((gradient @ hessian) * gradient).sum(-1)
    share = float((change < 0).double().mean())
    return Probability(share, math.sqrt(max(share * (1 - share), 1 / draws**2) / draws))


def _covariance(hessian: Tensor, mean: Tensor, lr: Any, covariance: Any, samples: Any) -> Tensor:
    """The covariance as a matrix, after all checks."""
    check_int("samples", samples)
    _positive(lr, "lr")
    for name, value in (("hessian", hessian), ("mean", mean)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(
                f"{name} must be a real floating tensor, got {getattr(value, 'dtype', type(value).__name__)}"
            )
    n = mean.shape[-1] if mean.ndim else 0
    if hessian.shape != (*mean.shape, n) or not n:
        raise ValueError(
            f"hessian must be (*batch, n, n) and mean (*batch, n), got {tuple(hessian.shape)} and {tuple(mean.shape)}"
        )
    if not torch.allclose(hessian, hessian.mT, rtol=1e-4, atol=1e-6 * float(hessian.abs().max())):
        raise ValueError("hessian must be symmetric")
    if isinstance(covariance, Tensor):
        sigma = covariance.to(mean)
        if sigma.shape not in ((), (n,), (n, n), mean.shape, hessian.shape):
            raise ValueError(f"covariance must be a number, ({n},) or ({n}, {n}), got shape {tuple(sigma.shape)}")
        matrix = sigma.ndim >= 2 and sigma.shape[-2:] == (n, n) and sigma.shape != mean.shape
        sigma = sigma if matrix else torch.diag_embed(sigma.expand(n) if sigma.ndim == 0 else sigma)
    else:
        sigma = torch.eye(n, dtype=mean.dtype, device=mean.device) * float(_real(covariance, "covariance"))
    diagonal = sigma.diagonal(dim1=-2, dim2=-1)
    if not bool((diagonal >= 0).all()):
        raise ValueError(f"covariance must not be negative, got {float(diagonal.min())} on its diagonal")
    return sigma


def _real(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be real, got {value.dtype}")
        return value.detach().double()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    return torch.tensor(float(value), dtype=torch.float64)


def _positive(value: Any, name: str) -> Tensor:
    found = _real(value, name)
    good = (found > 0) & found.isfinite()
    if not bool(good.all()):
        raise ValueError(f"{name} must be positive and finite, got {float(found[~good].flatten()[0])}")
    return found


def _like(found: Tensor, given: Any) -> Any:
    if not isinstance(given, Tensor):
        return float(found) if found.ndim == 0 else found
    return found.to(given.dtype if given.is_floating_point() else torch.get_default_dtype())
