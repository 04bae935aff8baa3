"""What is known for sure of a solution: a feasible plan, feasible duals, and the gaps between them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.couplings import coupling
from steepest.transport.problem import Transport, dual_value


@dataclass(frozen=True)
class Certificate:
    r"""Bounds that hold whatever the solver did, up to rounding.

    Attributes:
        plan: a plan with exactly the wanted marginals, (*batch, n, m).
        primal: the entropic objective of that plan: at least the optimum.
        dual: f at the potentials: at most the optimum.
        gap: primal - dual: how far either can be from the entropic optimum.
        upper: the cost $\langle C, P \rangle$ of that plan: at least the cost of an optimal plan without entropy.
        lower: $r^\top x' + c^\top y'$: at most that cost.
        duals: (x', y') with $x'_i + y'_j \le C_{ij}$: feasible potentials of the problem without entropy.

    `upper`, `primal` and `gap` are infinite where the feasible plan uses a forbidden entry.
    """

    plan: Float[Tensor, "*batch n m"]
    primal: Float[Tensor, "*batch"]
    dual: Float[Tensor, "*batch"]
    gap: Float[Tensor, "*batch"]
    upper: Float[Tensor, "*batch"]
    lower: Float[Tensor, "*batch"]
    duals: tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]]


def round_plan(
    plan: Float[Tensor, "*batch n m"], r: Float[Tensor, "*batch n"], c: Float[Tensor, "*batch m"]
) -> Float[Tensor, "*batch n m"]:
    r"""A plan with the marginals r and c, no further from `plan` than $2 (|P 1 - r|_1 + |P^\top 1 - c|_1)$ in $\ell_1$.

    Rows, then columns, that are too heavy are scaled down; what then lacks is added as an outer product.

    Args:
        plan: not negative.
        r: wanted row sums.
        c: wanted column sums, of the same total.

    Source:
        Altschuler, Weed and Rigollet 2017, arXiv 1705.09634, algorithm 2.
    """
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (r / plan.sum(-1).clamp_min(tiny)).clamp_max(1)[..., None]
    plan = plan * (c / plan.sum(-2).clamp_min(tiny)).clamp_max(1)[..., None, :]
    rows, columns = (r - plan.sum(-1)).clamp_min(0), (c - plan.sum(-2)).clamp_min(0)
    share = columns / columns.sum(-1, keepdim=True).clamp_min(tiny)
    return plan + rows[..., None] * share[..., None, :]


def certify(problem: Transport, x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch m"]) -> Certificate:
    """The certificate of any potentials.

    Args:
        problem: what they are to solve.
        x: potentials of the rows.
        y: potentials of the columns.
    """
    C, r, c, eta = problem.C, problem.r, problem.c, problem.eta
    plan = round_plan(coupling(C, x, y, eta), r, c)
    cost = torch.where(plan > 0, C, 0.0).mul(plan).sum((-2, -1))
    primal = cost + torch.xlogy(plan, plan).sum((-2, -1)) / eta
    dual = dual_value(x, y, C, r, c, eta)
    lp_y = (C - x.unsqueeze(-1)).amin(-2)
    lp_x = (C - lp_y.unsqueeze(-2)).amin(-1)
    lower = (r * lp_x).sum(-1) + (c * lp_y).sum(-1)
    return Certificate(plan, primal, dual, primal - dual, cost, lower, (lp_x, lp_y))
