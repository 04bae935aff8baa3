r"""Margins of linear classifiers in any norm, and certificates for the largest possible one.

$\mathrm{raw}(W) = \min_{i, c \ne y_i} (e_{y_i} - e_c)^\top W h_i$, a difference of logits, without a factor 1/2. The
largest margin in a norm $N$ is $\gamma_N = \max_{N(W) \le 1} \mathrm{raw}(W)$, positive if and only if the data are
separable. A constant feature, where wanted, is the user's to append; it changes $\gamma_N$.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest.dynamics.log_domain import LogDomainLoss, Loss, check_data, label_mask
from steepest.geometry import Norm, Schatten, Spectral, get_norm, rms_to_rms


class NotSeparableError(ValueError):
    """No linear classifier is right on all samples, so there is no largest margin to converge to."""


def exact_norm(norm: str | Norm) -> Norm:
    """As `steepest.geometry.get_norm`, but names of spectral norms mean the exact polar factor, by SVD.

    An iterative polar factor has singular values near one rather than one, and its limit is another classifier.
    """
    exact = {"spectral": Spectral, "rms_to_rms": rms_to_rms}
    found = exact[norm]() if isinstance(norm, str) and norm in exact else get_norm(norm)
    if not isinstance(found, Norm):
        raise TypeError(f"norm must be a norm, which margins are measured in; got {found!r}, a direction only")
    if isinstance(found, Schatten) and found.p < 1:
        raise ValueError(f"norm must be a norm, got {found!r}: below p = 1 the triangle inequality fails")
    return found


def margin(
    weight: Float[Tensor, "*batch k d"], features: Float[Tensor, "*batch n d"], labels: Int[Tensor, "*#batch n"]
) -> Float[Tensor, "*batch"]:
    r"""$\min_{i, c \ne y_i} (e_{y_i} - e_c)^\top W h_i$, in units of logits.

    Args:
        weight: W, one row per class; leading dimensions are independent problems.
        features: the rows are h_i.
        labels: y_i, integers 0 .. k - 1.

    Raises:
        TypeError, ValueError: see `log_domain.check_data`; a weight of another shape, or not finite.
    """
    check_weight(weight, features, check_data(features, labels, weight.shape[-2] if weight.ndim > 1 else None))
    return _raw(weight, features, label_mask(labels.to(torch.int64), weight.shape[-2]))


def normalized_margin(
    weight: Float[Tensor, "*batch k d"],
    features: Float[Tensor, "*batch n d"],
    labels: Int[Tensor, "*#batch n"],
    norm: str | Norm,
) -> Float[Tensor, "*batch"]:
    r"""$\mathrm{raw}(W) / N(W)$, at most $\gamma_N$ on separable data; zero for $W = 0$.

    Args:
        weight: see `margin`.
        features: see `margin`.
        labels: see `margin`.
        norm: N, a `Norm` or one of the names of `steepest.geometry.NORMS`.
    """
    return _over(margin(weight, features, labels), exact_norm(norm).norm(weight))


def _raw(weight: Tensor, features: Tensor, own: Tensor) -> Tensor:
    logits = features @ weight.mT
    gaps = logits.masked_fill(~own, 0.0).sum(-1, keepdim=True) - logits
    return gaps.masked_fill(own, math.inf).amin((-2, -1))


def _over(raw: Tensor, length: Tensor) -> Tensor:
    return torch.where(length > 0, raw / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)


def check_weight(weight: Tensor, features: Tensor, classes: int) -> None:
    """Raise unless `weight` has the shape (*batch, k, d) of these features, their dtype, and is finite."""
    wanted = (*features.shape[:-2], classes, features.shape[-1])
    if not isinstance(weight, Tensor) or weight.dtype != features.dtype:
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"weight must be a tensor of the dtype of the features, {features.dtype}, got {kind}")
    if tuple(weight.shape) != wanted:
        raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite, got nan or infinity")


@dataclass(frozen=True)
class MarginBounds:
    r"""A bracket $\text{lower} \le \gamma_N \le \text{upper}$ around the largest margin, valid up to rounding.

    Attributes:
        lower: (*batch,), attained by a classifier.
        upper: (*batch,), by duality.
    """

    lower: Float[Tensor, "*batch"]
    upper: Float[Tensor, "*batch"]

    @property
    def gap(self) -> Float[Tensor, "*batch"]:
        """`upper / lower - 1`; infinite while no classifier with a positive margin is known."""
        return torch.where(self.lower > 0, self.upper / self.lower - 1, math.inf)


# The upper bound depends on the length of the classifier; one of these scales is near the best.
_SCALES = tuple(2.0**power for power in range(-10, 11))


def margin_certificate(
    weight: Float[Tensor, "*batch k d"],
    features: Float[Tensor, "*batch n d"],
    labels: Int[Tensor, "*#batch n"],
    norm: str | Norm,
    *,
    loss: Loss = "cross_entropy",
    scales: Sequence[float] = _SCALES,
) -> MarginBounds:
    r"""How far any classifier can be from the largest margin, without a conic solver.

    For every $W$, $\mathrm{raw}(W)/N(W) \le \gamma_N \le \|G(W)\|_* / \mathcal{G}(W)$: the gradient of the
    loss over its proxy is a convex combination of the constraints, and any such combination bounds the margin by
    duality.

    Args:
        weight: see `margin`; it comes from anywhere.
        features: see `margin`.
        labels: see `margin`.
        norm: N.
        loss: whose gradient gives the upper bound.
        scales: the upper bound is the least over `scale * weight`.

    Returns:
        The bounds. If the upper one is near zero, the data are not separable.

    Source:
        Fan, Schmidt and Thrampoulidis 2025, arXiv 2502.04664, Lemma 1 (as a bound of the margin: ours).

    Examples:
        >>> features, labels = torch.eye(3, dtype=torch.float64), torch.arange(3)
        >>> bounds = margin_certificate(torch.eye(3, dtype=torch.float64) - 1 / 3, features, labels, "euclidean")
        >>> round(float(bounds.lower), 6), round(float(bounds.upper), 6)
        (0.707107, 0.707107)
    """
    problem = LogDomainLoss(features, labels, weight.shape[-2] if weight.ndim > 1 else None, loss)
    check_weight(weight, features, problem.classes)
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive numbers, at least one, got {scales!r}")
    norm = exact_norm(norm)
    uppers = []
    for scale in scales:
        found = problem.evaluate(scale * weight)
        uppers.append(dual_over_proxy(norm, found.gradient.mantissa, found.gradient.log_scale, found.log_proxy))
    raw = _raw(weight, features, problem.own)
    return MarginBounds(_over(raw, norm.norm(weight)).clamp_min(0), torch.stack(uppers).amin(0))


def dual_over_proxy(norm: Norm, mantissa: Tensor, log_scale: Tensor, log_proxy: Tensor) -> Tensor:
    """The ratio of the gradient's dual norm to the proxy, their common factor cancelled."""
    return norm.dual(mantissa) * (log_scale - log_proxy).exp()
