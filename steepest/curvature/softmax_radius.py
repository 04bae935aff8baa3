r"""How far a step may go before the Taylor series of the cross-entropy stops to converge.

Along a step the logits of a sample are, linearised, $z + a t$. The cross-entropy is a logarithm of
$F(t) = \sum_k e^{z_k + a_k t}$, and the complex zeros of F bound the radius of convergence $\rho^*$ of its series,
however flat the loss looks at real t. Shifts of z or of a by a constant change nothing, and neither does the sign of a.

Sources: Sao 2026, arXiv 2603.13552 (the radius, the bound, the binary form and the top-2 estimate); the tight bound is
this library's.
"""

import math
from typing import Literal

import torch
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor

Reduce = Literal["max", "none"] | float


def spread(slopes: Float[Tensor, "*samples classes"]) -> Float[Tensor, "*samples"]:
    r"""$\Delta_a = \max_k a_k - \min_k a_k$ of every sample.

    Raises:
        ValueError: fewer than two classes.
    """
    check_classes("slopes", slopes)
    return slopes.amax(-1) - slopes.amin(-1)


def radius(
    slopes: Float[Tensor, "*samples classes"], *, temperature: float = 1.0, reduce: Reduce = "max"
) -> Float[Tensor, "*reduced"]:
    r"""The bound $\rho_a = \pi T / \max_x \Delta_a(x) \le \rho^*$ on the radius of a set of samples.

    All terms of F lie in an open half-plane while $|\mathrm{Im}\, t| < \pi / \Delta_a$, so no zero is nearer.
    At $\tau = \rho_a$ no gap between two logits of a sample has changed by more than $\pi T$ (linearised); that of
    the bottleneck has changed by just that. Leading dimensions are samples: of a sequence model, every position is one.

    Args:
        slopes: a, derivatives of the logits along a unit direction, see `logit_slopes`.
        temperature: T, where the loss is on z / T.
        reduce: "max" over samples, which is the bound for all of them; a number q in (0, 1) takes that quantile of the
            spreads instead (a few mislabelled samples cannot own it, but it guarantees nothing for them); "none" gives
            the radius of each sample.

    Returns:
        The radius in units of the direction; infinite where no logit moves against another.

    Raises:
        ValueError: no sample, fewer than two classes, non-finite slopes, or an option out of its range.
    """
    check_positive("temperature", temperature)
    spreads = spread(slopes)
    if not spreads.numel():
        raise ValueError(f"slopes must hold at least one sample, got shape {tuple(slopes.shape)}")
    if not bool(spreads.isfinite().all()):
        raise ValueError("slopes must be finite, got NaN or infinity")
    return math.pi * temperature / reduce_spreads(spreads, reduce)


def reduce_spreads(spreads: Float[Tensor, "*samples"], reduce: Reduce) -> Float[Tensor, "*reduced"]:
    """The spread that stands for all samples, see `radius`."""
    check_reduce(reduce)
    if reduce == "none":
        return spreads
    if reduce == "max":
        return spreads.amax()
    flat, _ = spreads.flatten().sort()  # torch.quantile refuses large inputs
    return flat[min(len(flat) - 1, math.ceil(float(reduce) * len(flat)) - 1)]


def check_reduce(reduce: Reduce) -> None:
    """Raise unless `reduce` is "max", "none" or a number in (0, 1)."""
    if isinstance(reduce, str):
        if reduce in ("max", "none"):
            return
    elif not isinstance(reduce, bool) and isinstance(reduce, float) and 0 < reduce < 1:
        return
    raise ValueError(f"reduce must be 'max', 'none' or a quantile between 0 and 1, got {reduce!r}")


def binary_radius(
    gap: Real[Tensor, "*samples"] | float, spread: Real[Tensor, "*samples"] | float, *, temperature: float = 1.0
) -> Float[Tensor, "*samples"]:
    r"""The exact radius of two classes, $\rho^* = \sqrt{\delta^2 + (\pi T)^2} / \Delta_a$.

    Args:
        gap: $\delta = z_1 - z_2$.
        spread: $\Delta_a = |a_1 - a_2|$.
        temperature: T.

    Raises:
        ValueError: a negative spread, or a number that is not finite.
    """
    check_positive("temperature", temperature)
    gap, spread = (torch.as_tensor(x, dtype=_wide(x)) for x in (gap, spread))
    if bool((spread < 0).any()):
        raise ValueError(f"spread must not be negative, got {float(spread.min())}")
    if not bool(gap.isfinite().all() and spread.isfinite().all()):
        raise ValueError("gap and spread must be finite, got NaN or infinity")
    return torch.hypot(gap, torch.full_like(gap, math.pi * temperature)) / spread


def ghosts(
    logits: Float[Tensor, "*samples classes"],
    slopes: Float[Tensor, "*samples classes"],
    labels: Int[Tensor, "*samples"] | None = None,
    *,
    temperature: float = 1.0,
) -> Complex[Tensor, "*samples"]:
    r"""The paper's estimate of the nearest zero, from the label y and the best other class c: for plots.

    $t = \delta / |a_y - a_c| + i \pi T / |a_y - a_c|$ with $\delta = z_y - z_c$.

    Args:
        logits: z.
        slopes: a.
        labels: y; None: the largest logit.
        temperature: T.
    """
    _check_pair(logits, slopes, temperature)
    y = logits.argmax(-1) if labels is None else labels
    if y.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have the shape {tuple(logits.shape[:-1])} of the samples, got {tuple(y.shape)}")
    rest = logits.scatter(-1, y[..., None], -math.inf)
    c = rest.argmax(-1)
    gap, slope = (_at(x, y) - _at(x, c) for x in (logits, slopes))
    return torch.complex(gap / slope.abs(), math.pi * temperature / slope.abs())


def top2_radius(
    logits: Float[Tensor, "*samples classes"],
    slopes: Float[Tensor, "*samples classes"],
    labels: Int[Tensor, "*samples"] | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*samples"]:
    """The distance of `ghosts`. Exact for two classes; with more it is no bound: it is often above the exact radius."""
    found = ghosts(logits, slopes, labels, temperature=temperature)
    return torch.hypot(found.real, found.imag)


def tight_radius(
    logits: Float[Tensor, "*samples classes"],
    slopes: Float[Tensor, "*samples classes"],
    *,
    temperature: float = 1.0,
    steps: int = 80,
) -> Float[Tensor, "*samples"]:
    r"""The larger of two lower bounds of the exact radius: $\max(\pi T / \Delta_a, r_{dom}) \le \rho^*$.

    For $|t| < r_{dom}$ the largest term of F outweighs all others together: with y the largest logit,
    $\delta_k = z_y - z_k$ and $d_k = |a_k - a_y|$, $r_{dom}$ solves $\sum_{k \ne y} e^{(-\delta_k + d_k r) / T} = 1$
    (it is 0 if the sum is at least 1 at r = 0). It is far above $\pi / \Delta_a$ for confident samples.

    Args:
        logits: z.
        slopes: a.
        temperature: T.
        steps: of the bisection.
    """
    _check_pair(logits, slopes, temperature)
    dominated = dominance_radius(logits, slopes, temperature=temperature, steps=steps)
    return torch.maximum(math.pi * temperature / spread(slopes), dominated)


def dominance_radius(
    logits: Float[Tensor, "*samples classes"],
    slopes: Float[Tensor, "*samples classes"],
    *,
    temperature: float = 1.0,
    steps: int = 80,
) -> Float[Tensor, "*samples"]:
    """$r_{dom}$ of `tight_radius` alone, by bisection, rounded down."""
    _check_pair(logits, slopes, temperature)
    y = logits.argmax(-1)
    gaps = (_at(logits, y)[..., None] - logits) / temperature
    rates = (slopes - _at(slopes, y)[..., None]).abs() / temperature
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, y[..., None], True)
    gaps = gaps.masked_fill(own, math.inf)
    # One term alone reaches 1 at gap / rate, so the root lies before the least of these.
    moving = (rates > 0) & ~own
    high = torch.where(moving, gaps / rates, math.inf).amin(-1)
    low = torch.zeros_like(high)
    still = ~high.isfinite()
    high = torch.where(still, torch.zeros_like(high), high)
    for _ in range(steps):
        middle = (low + high) / 2
        inside = torch.logsumexp(rates * middle[..., None] - gaps, -1) < 0
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    dominated = torch.logsumexp(-gaps, -1) < 0
    return torch.where(dominated, torch.where(still, torch.full_like(low, math.inf), low), torch.zeros_like(low))


def exact_radius(
    logits: Float[Tensor, "*samples classes"],
    slopes: Float[Tensor, "*samples classes"],
    *,
    temperature: float = 1.0,
    points: int = 20_000,
) -> Float[Tensor, "*samples"]:
    """The exact radius, by counting the zeros of F inside growing circles (winding number) and bisection.

    It takes many evaluations for each sample: use it to check the bounds, not in training. It computes in float64, and
    a Newton iteration from the place found makes the result exact to rounding.

    Args:
        logits: z.
        slopes: a.
        temperature: T.
        points: on a circle; more are taken where F turns fast.
    """
    _check_pair(logits, slopes, temperature)
    z, a = ((x.detach().double() / temperature).reshape(-1, x.shape[-1]) for x in (logits, slopes))
    found = [_nearest_zero(one, other, points) for one, other in zip(z, a, strict=True)]
    return torch.tensor(found, dtype=torch.float64, device=logits.device).reshape(logits.shape[:-1])


def _nearest_zero(z: Float[Tensor, "classes"], a: Float[Tensor, "classes"], points: int) -> float:
    if float(spread(a)) == 0:
        return math.inf
    z, a = z - z.max(), a - (a.max() + a.min()) / 2
    low = math.pi / float(spread(a))
    high = low
    while not _zeros_inside(z, a, high, points):
        low, high = high, 1.3 * high
    if high == low:  # on the circle, as for two equal classes
        low = 0.9 * low
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        if _zeros_inside(z, a, middle, points):
            high = middle
        else:
            low = middle
    values, t = _on_circle(z, a, high, points)
    return _polish(z, a, t[int(values.abs().argmin())], high)


def _on_circle(
    z: Float[Tensor, "classes"], a: Float[Tensor, "classes"], r: float, points: int
) -> tuple[Complex[Tensor, "points"], Complex[Tensor, "points"]]:
    """F on the upper half circle, each value scaled by a positive number; the lower half is its mirror image."""
    count = max(points // 2, int(8 * r * float(a.abs().max()))) + 1
    angle = torch.linspace(0, math.pi, count, dtype=torch.float64, device=z.device)
    t = torch.polar(torch.full_like(angle, r), angle)
    exponent = z + a * t[:, None]
    return (exponent - exponent.real.amax(-1, keepdim=True)).exp().sum(-1), t


def _zeros_inside(z: Float[Tensor, "classes"], a: Float[Tensor, "classes"], r: float, points: int) -> int:
    values, _ = _on_circle(z, a, r, points)
    turned = float((values[1:] * values[:-1].conj()).angle().sum())
    return round(turned / math.pi)


def _polish(z: Float[Tensor, "classes"], a: Float[Tensor, "classes"], start: Tensor, r: float) -> float:
    t = start
    for _ in range(50):
        terms = (z + a * t - (z + a * t.real).max()).exp()
        move = terms.sum() / (a * terms).sum()
        t = t - move
        if float(move.abs()) < 1e-15 * r:
            break
    found = float(t.abs())
    return found if abs(found / r - 1) < 1e-4 else r


def check_classes(name: str, values: Tensor) -> None:
    """Raise unless the last dimension holds at least two classes."""
    if values.ndim < 1 or values.shape[-1] < 2:
        raise ValueError(
            f"{name} must have at least two classes in their last dimension, got shape {tuple(values.shape)}; the "
            "single logit z of a binary classifier stands for the two logits (z, 0)"
        )


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def _check_pair(logits: Tensor, slopes: Tensor, temperature: float) -> None:
    check_positive("temperature", temperature)
    check_classes("logits", logits)
    if logits.shape != slopes.shape:
        raise ValueError(f"slopes must have the shape {tuple(logits.shape)} of logits, got {tuple(slopes.shape)}")
    for name, values in (("logits", logits), ("slopes", slopes)):
        if not values.is_floating_point():
            raise TypeError(f"{name} must be real floating-point numbers, got {values.dtype}")
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[..., None]).squeeze(-1)


def _wide(value: Tensor | float) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float64
