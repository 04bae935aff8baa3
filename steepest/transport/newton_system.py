"""The Newton system of the dual with the whole plan, for many problems at once."""

import torch
from jaxtyping import Float
from torch import Tensor


def newton_direction(
    plan: Float[Tensor, "b n m"],
    gx: Float[Tensor, "b n"],
    gy: Float[Tensor, "b m"],
    eta: float,
    shift: Float[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]:
    r"""The solution d of $\eta \begin{pmatrix} D_a + s & P \\ P^\top & D_b + s \end{pmatrix} d = g$.

    The longer side is eliminated. What is left is a weighted graph's Laplacian (plus what s adds), whose diagonal is
    taken as the sum of the weights, so that no digits cancel. With s = 0 the last coordinate of the shorter side is
    zero, as (1, -1) is a null vector. Not finite where the matrix is singular beyond that, to rounding.

    Args:
        plan: P; $D_a$ and $D_b$ hold its row and column sums.
        gx: where s = 0, of equal sum with gy.
        gy: the other part.
        eta: inverse temperature.
        shift: s of each problem; zeros if None.
    """
    if plan.shape[-1] > plan.shape[-2]:
        dy, dx = newton_direction(plan.mT, gy, gx, eta, shift)
        return dx, dy
    s = gx.new_zeros(len(plan), 1) if shift is None else shift[:, None]
    a = plan.sum(-1) + s
    scaled = plan / a[..., None]
    weights = plan.mT @ scaled
    weights.diagonal(dim1=-2, dim2=-1).zero_()
    diagonal = weights.sum(-1) + s + (plan * (s / a)[..., None]).sum(-2)
    diagonal[:, -1] += torch.where(s[:, 0] == 0, plan[..., -1].sum(-1), 0.0)
    matrix = weights.neg_()
    matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    dy = _solve(matrix, gy - (scaled.mT @ gx[..., None])[..., 0])
    dx = gx / a - (scaled @ dy[..., None])[..., 0]
    return dx / eta, dy / eta


def augmented_direction(
    plan: Float[Tensor, "b n m"],
    gx: Float[Tensor, "b n"],
    gy: Float[Tensor, "b m"],
    eta: float,
    shift: Float[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]:
    """The solution with w w^T, w = (1, -1), added to the matrix; see `newton_direction`.

    Args:
        plan: P.
        gx: part of the right-hand side.
        gy: the other part.
        eta: inverse temperature.
        shift: s of each problem; zeros if None.
    """
    n = plan.shape[-2]
    diagonal = torch.cat([plan.sum(-1), plan.sum(-2)], -1)
    matrix = torch.diag_embed(diagonal if shift is None else diagonal + shift[:, None])
    matrix[..., :n, n:] = plan
    matrix[..., n:, :n] = plan.mT
    w = torch.ones_like(diagonal)
    w[..., n:] = -1
    d = _solve(eta * matrix + w[..., None] * w[..., None, :], torch.cat([gx, gy], -1))
    return d[..., :n], d[..., n:]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right[..., None], factor)[..., 0]
    return torch.where((info == 0)[..., None], solution, torch.nan)
