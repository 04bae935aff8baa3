"""How a scalar variance moves along a gradient: five geometries, all of them elementwise."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.bures import isotropic_bures_step

Variance = Literal["bures", "bures_implicit", "mirror", "natural", "fixed"]
VARIANCES: tuple[Variance, ...] = get_args(Variance)
MAX_STEP: dict[Variance, float] = {
    "bures": 0.5,
    "bures_implicit": 0.5,
    "mirror": 1.0,
    "natural": math.inf,
    "fixed": math.inf,
}


def check_variance(variance: Variance, max_step: float | None) -> float:
    """The cap on the relative move: `max_step`, or the default of the geometry.

    Args:
        variance: The geometry.
        max_step: The cap, or None.

    Raises:
        ValueError: The geometry is not known, or the cap is not positive.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    if max_step is None:
        return MAX_STEP[variance]
    if isinstance(max_step, bool) or not isinstance(max_step, int | float) or not max_step > 0:
        raise ValueError(f"max_step must be positive (infinity for no cap), got {max_step!r}")
    return float(max_step)


def cap(u: Float[Tensor, "*shape"], variances: Float[Tensor, "*shape"], variance: Variance, max_step: float) -> Tensor:
    r"""u, held so that no variance changes by more than the cap allows.

    Args:
        u: The move. For ``"natural"`` it is the change of $1 / \varepsilon$, else it is dimensionless.
        variances: $\varepsilon$.
        variance: The geometry.
        max_step: The cap c: $|u| \le c$; of ``"natural"`` $|u| \varepsilon \le c$; of ``"bures_implicit"``, which any
            positive u leaves positive, $u \ge -c$.
    """
    if max_step == math.inf:
        return u
    if variance == "bures_implicit":
        return u.clamp_min(-max_step)
    if variance == "natural":
        return torch.maximum(torch.minimum(u, max_step / variances), -max_step / variances)
    return u.clamp(-max_step, max_step)


def move(variances: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"], variance: Variance) -> Tensor:
    r"""The new variances.

    | variance | moves to |
    | --- | --- |
    | ``"bures"`` | $(1 - u)^2 \varepsilon$, the exponential map of the Bures-Wasserstein geometry (IBW) |
    | ``"bures_implicit"`` | $\varepsilon / (1 + u)^2$, the minimiser of which that is the first order |
    | ``"mirror"`` | $\varepsilon e^{-u}$, mirror descent with the von Neumann entropy (MD) |
    | ``"natural"`` | $1 / \varepsilon^+ = 1 / \varepsilon + u$, the natural gradient (NGD) |
    | ``"fixed"`` | $\varepsilon$ |

    Args:
        variances: $\varepsilon$.
        u: The move.
        variance: The geometry.

    Raises:
        RuntimeError: A precision of ``"natural"`` would not be positive.
    """
    if variance == "fixed":
        return variances
    if variance == "mirror":
        return variances * (-u).exp()
    if variance == "natural":
        precision = variances.reciprocal() + u
        if not bool((precision > 0).all()):
            raise RuntimeError(
                f"the natural-gradient step gives a precision of {float(precision.min()):.3g}, which is not positive; "
                'nothing was changed. Use a smaller lr, max_step=0.5, or variance="mirror"'
            )
        return precision.reciprocal()
    return isotropic_bures_step(variances, u, implicit=variance == "bures_implicit")
