r"""The shapes of a decay: a factor that falls from 1 to the floor ratio r while s goes from 0 to 1."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Shape = Literal["inverse", "linear", "cosine", "exponential", "1-sqrt"]
SHAPES: tuple[Shape, ...] = get_args(Shape)


def decay_factor(s: float, ratio: float, shape: Shape = "inverse") -> float:
    r"""The factor at the fraction s of a decay from 1 to `ratio`.

    - ``"inverse"``: $1 / (1 + s (1/r - 1))$; the inverse of the learning rate grows linearly (harmonic decay).
    - ``"linear"``: $1 - s (1 - r)$.
    - ``"cosine"``: $r + (1 - r)(1 + \cos \pi s) / 2$.
    - ``"exponential"``: $r^s$.
    - ``"1-sqrt"``: $r + (1 - r)(1 - \sqrt s)$.

    Args:
        s: in [0, 1]; exactly 1 and `ratio` at the two ends.
        ratio: r >= 0; above 0 for "inverse" and "exponential". A ratio above 1 rises.
        shape: one of the above.
    """
    if s <= 0:
        return 1.0
    if s >= 1:
        return ratio
    return _FORMULAS[shape](s, ratio, math)


def decay_factors(s: Float[Tensor, " n"], ratio: Tensor | float, shape: Shape = "inverse") -> Float[Tensor, " n"]:
    """`decay_factor` of many fractions at once."""
    ratios = torch.as_tensor(ratio, dtype=s.dtype, device=s.device).expand_as(s)
    inner = _FORMULAS[shape](s.clamp(0, 1), ratios, torch)
    return torch.where(s <= 0, torch.ones_like(s), torch.where(s >= 1, ratios, inner))


def mean_decay_factor(ratio: float, shape: Shape = "inverse") -> float:
    r"""The mean of the factor over a long decay, $\int_0^1$; for "inverse" it is $\ln(1/r) / (1/r - 1)$.

    The mean learning rate of a decay is this times the peak: how much of the way along the river the decay still makes.

    Examples:
        >>> round(mean_decay_factor(0.1), 7)
        0.2558428
    """
    check_ratio(ratio, shape)
    if ratio == 1:
        return 1.0
    match shape:
        case "inverse":
            return -math.log(ratio) / (1 / ratio - 1)
        case "exponential":
            return (1 - ratio) / -math.log(ratio)
        case "1-sqrt":
            return ratio + (1 - ratio) / 3
    return (1 + ratio) / 2


def check_ratio(ratio: Any, shape: Any) -> None:
    """Raise ValueError unless `shape` is known and `ratio` is a floor that it can reach."""
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise ValueError(f"floor_ratio must be in [0, 1], the smallest learning rate over the peak; got {ratio!r}")
    if ratio == 0 and shape in ("inverse", "exponential"):
        raise ValueError(
            f"floor_ratio must be above 0 for shape={shape!r}, which cannot reach zero; got {ratio!r}. "
            "Give a small ratio such as 0.01, or a shape that reaches zero: linear, cosine, 1-sqrt"
        )


# s, the ratio, and the module that has cos and sqrt: math or torch.
_FORMULAS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "inverse": lambda s, r, _: 1 / (1 + s * (1 / r - 1)),
    "linear": lambda s, r, _: 1 - s * (1 - r),
    "cosine": lambda s, r, m: r + (1 - r) * (1 + m.cos(math.pi * s)) / 2,
    "exponential": lambda s, r, _: r**s,
    "1-sqrt": lambda s, r, m: r + (1 - r) * (1 - m.sqrt(s)),
}
