"""How much of a stochastic step counts: its alignment with the full gradient, and the descent that it can give."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def alignment(
    full: Float[Tensor, "*batch m n"], gradient: Float[Tensor, "*batch m n"], update: Float[Tensor, "*batch m n"]
) -> Float[Tensor, "*batch"]:
    r"""$\gamma = \langle G, D \rangle / \langle g, D \rangle$: what the full gradient sees of a step made for a batch.

    Args:
        full: G, the full gradient.
        gradient: g, the gradient of the mini-batch that the step was made from.
        update: D, the direction that the step goes against.

    Returns:
        One number per matrix; 1 where g = G, zero where $\langle g, D \rangle = 0$.

    Raises:
        ValueError: shapes differ, or have fewer than two dimensions.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181, section 3.1.

    """
    _check(full, gradient, update)
    return _ratio(_inner(full, update), _inner(gradient, update))


def descent_potential(
    gradient: Float[Tensor, "*batch m n"],
    update: Float[Tensor, "*batch m n"],
    hvp: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*batch"]:
    r"""$\phi = \langle g, D \rangle^2 / \langle D, H D \rangle$: twice the decrease of exact line search on the batch.

    With $\eta = t\,\langle g, D \rangle / \langle D, H D \rangle$ a quadratic decreases by
    $\phi\,(t \gamma - t^2 / 2)$ (`decrease`), at best by $\phi \gamma^2 / 2$, for $t = \gamma$.

    Args:
        gradient: g.
        update: D.
        hvp: the map D to H D, of the full loss.

    Returns:
        One number per matrix; zero where D is zero, negative where the curvature along D is.

    Raises:
        ValueError: shapes differ, or have fewer than two dimensions.

    Source:
        Shumaylov et al. 2026, arXiv 2605.11181, section 3.1.

    """
    _check(gradient, update)
    product = hvp(update)
    _check(update, product)
    return _ratio(_inner(gradient, update).square(), _inner(update, product))


def decrease(potential: Float[Tensor, "*batch"], gamma: Float[Tensor, "*batch"], t: float | Tensor = 1.0) -> Tensor:
    r"""$\phi\,(t \gamma - t^2 / 2)$: what a quadratic loses by a step of t times the batch's own best length."""
    return potential * (t * gamma - t * t / 2)


def exact_step(
    full: Float[Tensor, "*batch m n"], update: Float[Tensor, "*batch m n"], hvp: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch"]:
    r"""$\eta^* = \langle G, D \rangle / \langle D, H D \rangle$: the best length of a step against D on a quadratic."""
    _check(full, update)
    return _ratio(_inner(full, update), _inner(update, hvp(update)))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum((-2, -1))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def _check(*tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) < 2:
        raise ValueError(f"the matrices must have one shape (..., m, n), got {', '.join(map(str, shapes))}")
