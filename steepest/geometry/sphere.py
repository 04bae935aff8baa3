r"""The unit sphere $S^{d-1}$ in $R^d$: tangent vectors, ways to step along them, uniform points."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

Step = Literal["retraction", "geodesic"]


def tangent(x: Float[Tensor, "*batch d"], v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    r"""The tangent part of a vector, $P_x v = v - \langle v, x \rangle x$.

    Args:
        x: unit vectors.
        v: any vectors.
    """
    return v - (v * x).sum(-1, keepdim=True) * x


def normalise(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """The unit vector x / |x|, also where the squares of x overflow or underflow.

    Args:
        x: vectors.

    Raises:
        ValueError: a vector is zero or not finite.
    """
    largest = x.abs().amax(-1, keepdim=True)
    if not bool(((largest > 0) & largest.isfinite()).all()):
        raise ValueError("x must be finite and not zero to be normalised")
    x = x / largest
    return x / x.norm(dim=-1, keepdim=True)


def retract(x: Float[Tensor, "*batch d"], t: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """(x + t) / |x + t|: the cheap step along a tangent vector.

    Args:
        x: unit vectors.
        t: tangent vectors, so that the sum is never zero.
    """
    moved = x + t
    return moved / moved.norm(dim=-1, keepdim=True)


def exponential(x: Float[Tensor, "*batch d"], t: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    r"""The geodesic step $\cos|t|\,x + \sin|t|\,t / |t|$, made a unit vector again.

    Args:
        x: unit vectors.
        t: tangent vectors; the arc has the length |t|.
    """
    length = t.norm(dim=-1, keepdim=True)
    moved = length.cos() * x + torch.sinc(length / torch.pi) * t
    return moved / moved.norm(dim=-1, keepdim=True)


def logarithm(x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """The tangent vector at x whose geodesic step is y; zero where y = x, or y = -x, where there are many.

    Args:
        x: unit vectors.
        y: unit vectors.
    """
    direction = tangent(x, y)
    length = direction.norm(dim=-1, keepdim=True)
    return distance(x, y).unsqueeze(-1) * direction / length.clamp_min(torch.finfo(x.dtype).tiny)


def distance(x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """The angle between unit vectors, exact also for tiny angles and those near pi.

    Args:
        x: unit vectors.
        y: unit vectors.
    """
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))


def uniform(
    *shape: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*batch d"]:
    """Independent uniform points on the sphere.

    Args:
        shape: (*batch, d).
        generator: source of randomness; its device is that of the draw.
        dtype: of the points; None: torch's default.
        device: of the points; None: that of the generator.
    """
    for each in shape:
        check_int("shape", each, 0)
    if not shape or shape[-1] < 1:
        raise ValueError(f"shape must end with a dimension of at least 1, got {shape}")
    where = generator.device if generator is not None else device
    x = torch.randn(shape, generator=generator, dtype=dtype, device=where)
    return (x / x.norm(dim=-1, keepdim=True)).to(device or x.device)


def stepper(kind: Step) -> Callable[[Tensor, Tensor], Tensor]:
    """`retract` or `exponential`, by name.

    Args:
        kind: "retraction" or "geodesic".

    Raises:
        ValueError: another name.
    """
    if kind not in get_args(Step):
        raise ValueError(f"kind must be one of {', '.join(get_args(Step))}; got {kind!r}")
    return retract if kind == "retraction" else exponential


def coordinate_rule(d: int, nodes: int = 64) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
    r"""Nodes and weights for the mean over one coordinate of a uniform point of $S^{d-1}$, in float64.

    $E f(\theta_1) = \sum_j w_j f(u_j)$, exact for polynomials of degree at most 2 nodes - 1. With it every mean that
    depends on one direction is a sum: for example the von Mises-Fisher law has
    $E \theta_1 = \sum w_j u_j e^{\kappa u_j} / \sum w_j e^{\kappa u_j}$.

    Args:
        d: dimension of the space, at least 2.
        nodes: how many nodes.

    Source:
        Golub and Welsch 1969, Math. Comp. 23(106), 221-230, for the weight $(1 - u^2)^{(d-3)/2}$.

    Examples:
        >>> u, w = coordinate_rule(5, 8)
        >>> round(float(w @ u**2), 12)
        0.2
    """
    check_int("d", d, 2)
    check_int("nodes", nodes)
    n, alpha = torch.arange(1, nodes, dtype=torch.float64), (d - 2) / 2
    squares = n * (n + 2 * alpha - 1) / (4 * (n + alpha) * (n + alpha - 1))
    if nodes > 1:
        squares[0] = 1 / d
    return golub_welsch(squares.sqrt())


def golub_welsch(off_diagonal: Float[Tensor, "m"]) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
    """Gauss nodes and weights of a symmetric weight, from the recurrence of its orthonormal polynomials.

    Args:
        off_diagonal: the recurrence's coefficients, one less than there are nodes.
    """
    jacobi = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    values, vectors = torch.linalg.eigh(jacobi)
    values, weights = (values - values.flip(0)) / 2, vectors[0].square()
    weights = (weights + weights.flip(0)) / 2
    return values, weights / weights.sum()
