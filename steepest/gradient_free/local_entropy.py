"""What consensus hopping does with infinitely many draws: the local entropy, its gradient, and the proximal point."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.gradient_free.consensus import weighted_mean
from steepest.gradient_free.search import Objective, evaluate

Nodes = tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]


def gaussian_grid(
    points: int = 20_001, span: float = 12.0, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "k 1"], Float[Tensor, " k"]]:
    r"""Nodes on a line and the logarithms of their weights: $\mathbb{E} f(\xi) \approx \sum_k w_k f(z_k)$.

    The trapezoidal rule, which converges faster than any power for smooth f.

    Args:
        points: how many nodes, at least 2.
        span: the nodes lie in [-span, span]. At large $\alpha$ the weight moves to about
            $-\sqrt{\alpha \tau}\,E'$, which must lie inside.
        dtype: of both results.
    """
    if points < 2 or not span > 0:
        raise ValueError(f"points must be at least 2 and span positive, got {points} and {span}")
    z = torch.linspace(-span, span, points, dtype=dtype)
    return z[:, None], (-0.5 * z.square()).log_softmax(0)


def local_entropy(
    objective: Objective, m: Float[Tensor, "*batch d"], alpha: float, width: float, nodes: Nodes
) -> Float[Tensor, "*batch"]:
    r"""$F(m) = -\frac1\alpha \log \mathbb{E}_\xi\,e^{-\alpha E(m + s \xi)}$.

    $F$ is smooth even where E is not. Infinitely many draws of `ConsensusHopping` move by $-\alpha s^2 \nabla F(m)$.

    Args:
        objective: E, points (..., k, d) to values (..., k).
        m: where, (*batch, d).
        alpha: $\alpha \ge 0$; 0: the mean of E.
        width: s.
        nodes: points z (k, d) and logarithms of their weights (k,), as of `gaussian_grid`; or of a Monte Carlo sample,
            ``(torch.randn(k, d), torch.full((k,), -math.log(k)))``.

    Source:
        Riedl, Klock, Geldhauser and Fornasier 2023, arXiv 2306.09778; the name is of Chaudhari et al. 2017.
    """
    values, _, logs = _posterior(objective, m, alpha, width, nodes)
    return (logs.exp() * values).sum(-1) if alpha == 0 else -torch.logsumexp(logs - alpha * values, -1) / alpha


def posterior_mean(
    function: Callable[[Tensor], Tensor],
    objective: Objective,
    m: Float[Tensor, "*batch d"],
    alpha: float,
    width: float,
    nodes: Nodes,
) -> Float[Tensor, "*batch d"]:
    r"""$\mathbb{E}_\pi f(x)$ with $\pi \propto e^{-\alpha E}\,N(m, s^2 I)$.

    With $f(x) = x$ the step of consensus hopping, see `hopping_limit`; with $f = \nabla E$ the gradient of
    `local_entropy` at m.

    Args:
        function: f, points (..., k, d) to vectors (..., k, d).
        objective: E.
        m: (*batch, d).
        alpha: $\alpha$.
        width: s.
        nodes: see `local_entropy`.
    """
    values, points, logs = _posterior(objective, m, alpha, width, nodes)
    return weighted_mean(function(points), (logs - alpha * (values - values.amin(-1, keepdim=True))).softmax(-1))


def hopping_limit(
    objective: Objective, m: Float[Tensor, "*batch d"], alpha: float, width: float, nodes: Nodes
) -> Float[Tensor, "*batch d"]:
    r"""Where consensus hopping goes from m with infinitely many draws: $m - \alpha s^2 \nabla F(m)$.

    Args:
        objective: E.
        m: (*batch, d).
        alpha: $\alpha$.
        width: s.
        nodes: see `local_entropy`.
    """
    return posterior_mean(lambda x: x, objective, m, alpha, width, nodes)


def proximal_point(
    objective: Objective, m: Float[Tensor, "*batch 1"], tau: float, radius: float = 1.0
) -> Float[Tensor, "*batch 1"]:
    r"""$\arg\min_x E(x) + |x - m|^2 / (2 \tau)$ on a line, the global one within a radius, by finer and finer grids.

    E may have kinks, jumps and several minima, as far as a grid of 4001 points sees them. In double precision smooth
    minimisers are found to about 1e-8.

    Args:
        objective: E, points (..., k, 1) to values (..., k).
        m: the starting points, (*batch, 1).
        tau: $\tau$, positive.
        radius: the search begins in [m - radius, m + radius].

    Raises:
        ValueError: the points are not of dimension 1, or `tau` or `radius` is not positive.
    """
    if m.shape[-1] != 1 or not tau > 0 or not radius > 0:
        raise ValueError(f"m must be (*batch, 1), tau and radius positive; got {tuple(m.shape)}, {tau} and {radius}")
    grid = torch.linspace(-1, 1, 4001, dtype=m.dtype, device=m.device)
    best = m
    while radius > torch.finfo(m.dtype).eps * max(1.0, float(m.abs().max())):
        points = best + radius * grid
        cost = evaluate(objective, points[..., None]) + (points - m).square() / (2 * tau)
        best = points.gather(-1, cost.argmin(-1, keepdim=True))
        radius /= 200
    return best


def _posterior(
    objective: Objective, m: Tensor, alpha: float, width: float, nodes: Nodes
) -> tuple[Tensor, Tensor, Tensor]:
    z, logs = nodes
    if z.shape != (logs.shape[0], m.shape[-1]):
        raise ValueError(f"nodes must be ({logs.shape[0]}, {m.shape[-1]}) and ({logs.shape[0]},), got {tuple(z.shape)}")
    if not (0 <= alpha < math.inf and 0 < width < math.inf):
        raise ValueError(f"alpha must be at least 0 and width positive, both finite; got {alpha} and {width}")
    points = m[..., None, :] + width * z.to(m)
    values = evaluate(objective, points)
    return values, points, logs.to(m)
