"""The Gibbs-weighted mean of points, its effective sample size, and the weight that reaches a given one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Literal["gaussian", "laplace", "ball", "inverse_quadratic"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
Alpha = float | Float[Tensor, "*batch"]


def consensus_point(
    x: Float[Tensor, "*batch n d"], energy: Float[Tensor, "*batch n"], alpha: Alpha
) -> Float[Tensor, "*batch d"]:
    r"""The consensus point $x_\alpha = \sum_i w_i x_i$ with $w = \mathrm{softmax}(-\alpha E)$.

    With $\alpha = 0$ it is the mean, with $\alpha = \infty$ the best point (the mean of the best, if there are ties).
    Points with a value that is not finite have no weight.

    Args:
        x: n points of dimension d, (*batch, n, d).
        energy: their values E, (*batch, n).
        alpha: $\alpha \ge 0$, the inverse temperature in units of 1/E: a number, or one for each batch entry.

    Returns:
        (*batch, d), in the dtype of x.

    Raises:
        ValueError: alpha is negative or NaN, or shapes do not match.
        RuntimeError: no value of a batch entry is finite.

    Source:
        Pinnau, Totzeck, Tse and Martin 2017, arXiv 1604.05648; Riedl, Klock, Geldhauser and Fornasier 2023, arXiv
        2306.09778.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
        >>> consensus_point(x, x.square().sum(-1), 1.0)
        tensor([0.4459, 0.3297])
    """
    if x.ndim < 2 or energy.shape != x.shape[:-1]:
        raise ValueError(
            f"energy must have one value for each point: {tuple(x.shape[:-1])} for x of shape {tuple(x.shape)}, "
            f"got {tuple(energy.shape)}"
        )
    check_alpha(alpha)
    if not bool(energy.isfinite().any(-1).all()):
        raise RuntimeError("no finite objective value")
    return weighted_mean(x, gibbs_weights(energy, alpha))


def check_alpha(alpha: Alpha) -> None:
    """Raise ValueError unless alpha is at least 0 everywhere."""
    bad = not bool((alpha >= 0).all()) if isinstance(alpha, Tensor) else not alpha >= 0
    if bad:
        raise ValueError(f"alpha must be at least 0, got {alpha}")


def gibbs_logits(energy: Float[Tensor, "*batch n"], alpha: Alpha) -> Float[Tensor, "*batch n"]:
    r"""$-\alpha (E - \min E)$, minus infinity where E is not finite."""
    info = torch.finfo(energy.dtype)
    known = energy.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    gap = known - known.amin(-1, keepdim=True)
    if isinstance(alpha, Tensor):  # the bounds keep 0 * inf away
        return gap * -alpha.to(energy).clamp(info.tiny, info.max)[..., None]
    return gap * -min(max(alpha, info.tiny), info.max)


def gibbs_weights(energy: Float[Tensor, "*batch n"], alpha: Alpha) -> Float[Tensor, "*batch n"]:
    r"""$\mathrm{softmax}(-\alpha E)$; zero where E is not finite."""
    return gibbs_logits(energy, alpha).softmax(-1)


def weighted_mean(x: Float[Tensor, "*batch n d"], weights: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch d"]:
    """The mean of the points with these weights; points without weight may be infinite."""
    mean = (weights[..., None, :] @ x).squeeze(-2)
    if not math.isfinite(mean.sum()):
        mean = (weights[..., None, :] @ torch.where(weights[..., None] > 0, x, 0.0)).squeeze(-2)
    return mean


def polarised_consensus(
    x: Float[Tensor, "*batch m d"],
    y: Float[Tensor, "*batch n d"],
    energy: Float[Tensor, "*batch n"],
    alpha: Alpha,
    width: float,
    kernel: Kernel | Callable[[Tensor], Tensor] = "gaussian",
) -> tuple[Float[Tensor, "*batch m d"], Float[Tensor, "*batch m n"]]:
    r"""A consensus point for each of the points x, from those y that are near it.

    $c(x) = \sum_j w_j(x)\,y_j$ with $w_j(x) \propto k(|x - y_j| / \kappa)\,e^{-\alpha E(y_j)}$. A swarm with it can
    settle in several minimisers.

    Args:
        x: the points that get a consensus point each, (*batch, m, d).
        y: the points whose values are known, (*batch, n, d).
        energy: their values, (*batch, n).
        alpha: the inverse temperature.
        width: $\kappa$, positive, in units of x. Infinite: one consensus point for all.
        kernel: ``"gaussian"`` $e^{-r^2/2}$, ``"laplace"`` $e^{-r}$, ``"ball"`` (1 for r up to 1),
            ``"inverse_quadratic"`` $1/(1 + r^2)$, or a function from r to $\log k(r)$.

    Returns:
        The consensus points (*batch, m, d), and the weights (*batch, m, n). A point with no y in its ball, or none with
        a finite value, is its own consensus, with weights zero.

    Source:
        Bungert, Roith and Wacker 2022, arXiv 2211.05238, equation (2.1).
    """
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / width
    logits = _log_kernel(distance, kernel) + gibbs_logits(energy, alpha)[..., None, :]
    weights = logits.softmax(-1)
    lonely = ~(logits > -torch.inf).any(-1, keepdim=True)
    weights = torch.where(lonely, 0.0, weights)
    safe = torch.where(energy.isfinite()[..., None], y, 0.0)
    return torch.where(lonely, x, weights @ safe), weights


def _log_kernel(r: Tensor, kernel: Kernel | Callable[[Tensor], Tensor]) -> Tensor:
    if callable(kernel):
        return kernel(r)
    match kernel:
        case "gaussian":
            return -0.5 * r.square()
        case "laplace":
            return -r
        case "ball":
            return torch.where(r <= 1, 0.0, -torch.inf).to(r)
        case "inverse_quadratic":
            return -r.square().log1p()
    raise ValueError(f"kernel must be a function, or one of {', '.join(KERNELS)}; got {kernel!r}")


def effective_sample_size(energy: Float[Tensor, "*batch n"], alpha: Alpha) -> Float[Tensor, "*batch"]:
    r"""$(\sum_i w_i)^2 / \sum_i w_i^2$ of $w_i = e^{-\alpha E_i}$: n for equal weights, 1 if one point has all.

    Source:
        Carrillo, Hoffmann, Stuart and Vaes 2022, arXiv 2106.02519, section 5.
    """
    return 1 / gibbs_weights(energy, alpha).square().sum(-1)


@dataclass(frozen=True, slots=True)
class EffectiveSampleSize:
    r"""Choose $\alpha$ at every step so that a share of the points has weight.

    $\alpha$ solves $(\sum w)^2 / \sum w^2 = \eta n$ with n the number of finite values, each run for itself. So it
    does not depend on the scale of the objective, and grows by itself while the swarm contracts.

    Args:
        share: $\eta$ in (0, 1).
        max_alpha: the cap; taken where ties leave more than the share of the points best, as for a constant objective.

    Raises:
        ValueError: an argument outside its range.

    Source:
        Carrillo, Hoffmann, Stuart and Vaes 2022, arXiv 2106.02519, section 5.

    Examples:
        >>> energy = torch.arange(10.0, dtype=torch.float64)
        >>> alpha = EffectiveSampleSize(0.5)(energy)
        >>> round(float(effective_sample_size(energy, alpha)), 6)
        5.0
    """

    share: float = 0.5
    max_alpha: float = 1e15

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1), got {self.share}")
        if not 0 < self.max_alpha < float("inf"):
            raise ValueError(f"max_alpha must be positive and finite, got {self.max_alpha}")

    def __call__(self, energy: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
        """The inverse temperature for these values, one for each batch entry."""
        finite = energy.isfinite()
        e = torch.where(finite, energy, torch.inf).double()
        e = e - e.amin(-1, keepdim=True)
        target = torch.log(self.share * finite.sum(-1).clamp_min(1).double()).clamp_min(0)
        scale = torch.where(finite, e, 0.0).sum(-1) / finite.sum(-1).clamp_min(1)
        scale = torch.where(scale > 0, scale, 1.0)
        e = torch.where(finite, e, torch.inf) / scale[..., None]
        # log ESS falls with log alpha. Newton steps on log alpha, kept inside a bracket that halves where they fail.
        cap = (self.max_alpha * scale).log()
        low, high = torch.full_like(cap, -40.0).minimum(cap - 1), cap
        t = torch.zeros_like(cap).clamp(low, high)
        for _ in range(100):
            gap, slope = _log_size(e, t.exp(), finite)
            gap = gap - target
            open_ = (gap.abs() > 1e-10) & (high - low > 1e-12)
            if not bool(open_.any()):
                break
            low, high = torch.where(gap > 0, t, low), torch.where(gap > 0, high, t)
            newton = t - gap / slope
            inside = (newton > low) & (newton < high)
            t = torch.where(open_, torch.where(inside, newton, 0.5 * (low + high)), t)
        return (t.exp() / scale).clamp_max(self.max_alpha).to(energy.dtype)


def _log_size(e: Tensor, alpha: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the effective sample size at alpha, and its derivative in log alpha."""
    logits = -alpha[..., None] * e
    known = torch.where(finite, e, 0.0)
    one, two = logits.softmax(-1), (2 * logits).softmax(-1)
    size = 2 * logits.logsumexp(-1) - (2 * logits).logsumexp(-1)
    slope = 2 * alpha * ((two * known).sum(-1) - (one * known).sum(-1))
    return size, slope
