"""Functions that methods without gradients are tested on: points (..., d) to values (...)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def quadratic(x: Float[Tensor, "*batch d"], matrix: Float[Tensor, "d d"] | None = None) -> Float[Tensor, "*batch"]:
    r"""$\tfrac12 x^\top A x$; without a matrix $|x|^2$.

    Args:
        x: points, (..., d).
        matrix: A, symmetric.
    """
    return x.square().sum(-1) if matrix is None else 0.5 * ((x @ matrix) * x).sum(-1)


def rastrigin(x: Float[Tensor, "*batch d"], amplitude: float = 2.5, curvature: float = 1.0) -> Float[Tensor, "*batch"]:
    r"""$\sum_i c\,x_i^2 + a (1 - \cos 2 \pi x_i)$: a local minimum near every integer point, the least 0 at the origin.

    Args:
        x: points, (..., d).
        amplitude: a; 10 is the classical one.
        curvature: c.
    """
    waves = torch.cos(2 * math.pi * x).sum(-1)
    return curvature * x.square().sum(-1) + amplitude * (x.shape[-1] - waves)


def ackley(x: Float[Tensor, "*batch d"], amplitude: float = 20.0, decay: float = 0.2) -> Float[Tensor, "*batch"]:
    r"""$-a e^{-b |x| / \sqrt d} - e^{\frac1d \sum \cos 2 \pi x_i} + a + e$: almost flat far away, 0 at the origin.

    Args:
        x: points, (..., d).
        amplitude: a.
        decay: b.
    """
    hole = amplitude * -torch.expm1(-decay * x.square().mean(-1).sqrt())
    return hole + math.e - torch.cos(2 * math.pi * x).mean(-1).exp()


def grand_canyon3(x: Float[Tensor, "*batch 2"], ripple: float = 0.25) -> Float[Tensor, "*batch"]:
    r"""A canyon along a cubic, blocked by a wall, in two dimensions; the least value is 0, at the origin.

    With $v = y - \frac18 (x - 1)(x - 4)^2 - 2$ and $b = -x - 1.6 y$:
    $E = 25 (1 - e^{-1.4 v^2 e^{-0.002 x^4}}) + 0.4 x^2 + 0.2 y^2 + r [2 - \cos 0.75 \pi x - \cos 0.75 \pi y]
    + 4 e^{1 - 2 v^4} \max((1 - e^{-9 b^2})\,\mathrm{sign}\,b, 0)$.

    Args:
        x: points (x, y), (..., 2).
        ripple: r, the height of the ripples.

    Raises:
        ValueError: the points are not of dimension 2.

    Source:
        Riedl, Klock, Geldhauser and Fornasier 2023, arXiv 2306.09778, figure 1 and the authors' code.
    """
    if x.shape[-1] != 2:
        raise ValueError(f"the canyon is a function of two variables: x must have the shape (..., 2), got {x.shape}")
    a, b = x.unbind(-1)
    valley = b - ((a - 1) * (a - 4).square() / 8 + 2)
    block = -a - 1.6 * b
    walls = -25 * torch.expm1(-1.4 * valley.square() * torch.exp(-0.002 * a**4))
    bowl = 0.4 * a.square() + 0.2 * b.square()
    ripples = ripple * (2 - torch.cos(0.75 * math.pi * a) - torch.cos(0.75 * math.pi * b))
    barrier = (-torch.expm1(-9 * block.square()) * block.sign()).clamp_min(0)
    return walls + bowl + ripples + 4 * torch.exp(1 - 2 * valley**4) * barrier


def grand_canyon3_noisy(x: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
    """`grand_canyon3` with ripples of height 1.1625, which stop gradient descent in the canyon.

    Args:
        x: points, (..., 2).
    """
    return grand_canyon3(x, 1.1625)
