r"""The cross-entropy along a step: its Taylor series, and the divergence between the softmax before and after.

With logits $z + a\tau$ everything follows from $K(\tau) = \log \sum_k e^{z_k + a_k \tau}$, whose series has the
radius of convergence that `exact_radius` finds.

Source: Sao 2026, arXiv 2603.13552.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.curvature.softmax_radius import spread

FORWARD_CONSTANT = 1 / (18 * math.sqrt(3))
REVERSE_CONSTANT = 1 / (36 * math.sqrt(3))


@dataclass(frozen=True)
class KLRemainder:
    r"""How far two divergences are from the quadratic model, and how far they can be.

    Attributes:
        forward: $KL(p_\tau \| p_0)$.
        reverse: $KL(p_0 \| p_\tau) = K(\tau) - K(0) - \tau K'(0)$, the Bregman form.
        quadratic: $\tau^2 \mathrm{Var}_0(a) / 2$, the model of both.
        forward_bound: $|\tau|^3 \Delta_a^3 / (18 \sqrt 3)$, never less than |forward - quadratic|.
        reverse_bound: $|\tau|^3 \Delta_a^3 / (36 \sqrt 3)$, never less than |reverse - quadratic|.
    """

    forward: Float[Tensor, "*samples"]
    reverse: Float[Tensor, "*samples"]
    quadratic: Float[Tensor, "*samples"]
    forward_bound: Float[Tensor, "*samples"]
    reverse_bound: Float[Tensor, "*samples"]


def kl_remainder(
    logits: Float[Tensor, "*samples classes"],
    slopes: Float[Tensor, "*samples classes"],
    step: Float[Tensor, "*samples"] | float,
) -> KLRemainder:
    r"""The divergences between $p_0 = \mathrm{softmax}(z)$ and $p_\tau = \mathrm{softmax}(z + \tau a)$.

    Exact to rounding for steps of any size: small ones do not cancel.

    Args:
        logits: z.
        slopes: a.
        step: $\tau$, one for all or one per sample.

    Raises:
        ValueError: fewer than two classes, or shapes that differ.
    """
    width = spread(slopes)
    if logits.shape != slopes.shape:
        raise ValueError(f"slopes must have the shape {tuple(logits.shape)} of logits, got {tuple(slopes.shape)}")
    step = torch.as_tensor(step, dtype=logits.dtype, device=logits.device)
    moved = slopes * step[..., None]
    cube = (step.abs() * width) ** 3
    return KLRemainder(
        forward=_divergence(logits + moved, -moved),
        reverse=_divergence(logits, moved),
        quadratic=0.5 * _centred(logits, moved)[1],
        forward_bound=FORWARD_CONSTANT * cube,
        reverse_bound=REVERSE_CONSTANT * cube,
    )


def _centred(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    p = z.softmax(-1)
    x = x - (p * x).sum(-1, keepdim=True)
    return x, (p * x.square()).sum(-1)


def _divergence(z: Tensor, x: Tensor) -> Tensor:
    """KL(softmax(z) || softmax(z + x)) = log sum p exp(x - mean of x)."""
    x, _ = _centred(z, x)
    small = x.abs().amax(-1) < 0.1
    inner = torch.where(small[..., None], x, torch.zeros_like(x))
    terms = torch.ones_like(x)
    for n in range(14, 2, -1):  # exp(x) - 1 - x by its series
        terms = 1 + inner / n * terms
    rest = 0.5 * inner.square() * terms
    near = torch.log1p((z.softmax(-1) * rest).sum(-1))
    far = torch.logsumexp(z.log_softmax(-1) + x, -1)
    return torch.where(small, near, far)


def log_partition_series(
    logits: Float[Tensor, "*samples classes"], slopes: Float[Tensor, "*samples classes"], order: int
) -> Float[Tensor, "*samples terms"]:
    r"""The coefficients $c_0 .. c_{order}$ of $K(\tau) = \sum_n c_n \tau^n$; $|c_n|^{-1/n}$ tends to the exact radius.

    They are those of a logarithm of a power series, $n c_n = n f_n - \sum_{k<n} k c_k f_{n-k}$ with
    $f_n = E_0[a^n] / n!$. Computed in float64; orders beyond about 60 lose their digits.

    Args:
        logits: z.
        slopes: a.
        order: the last power, at least 0.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise ValueError(f"order must be an integer of at least 0, got {order!r}")
    z, a = logits.double(), slopes.double()
    p = z.softmax(-1)
    mean = (p * a).sum(-1, keepdim=True)
    a = a - mean
    power, f = p, []
    for n in range(1, order + 1):
        power = power * a / n
        f.append(power.sum(-1))
    c: list[Tensor] = []
    for n in range(1, order + 1):
        total = n * f[n - 1]
        for k in range(1, n):
            total = total - k * c[k - 1] * f[n - k - 1]
        c.append(total / n)
    series = [torch.logsumexp(z, -1), *c]
    if order:
        series[1] = series[1] + mean.squeeze(-1)
    return torch.stack(series, -1)
