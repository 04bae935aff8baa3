r"""Couplings in the log domain: the half updates of Sinkhorn's iteration, batched.

Everything is written for the plan $P_{ij} = e^{\eta (x_i + y_j - C_{ij}) - 1}$. An infinite cost forbids its entry.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def row_log_sums(
    C: Float[Tensor, "*#batch n m"], y: Float[Tensor, "*#batch m"], eta: float
) -> Float[Tensor, "*batch n"]:
    r"""$\log \sum_j e^{\eta (y_j - C_{ij})}$ for each row; $-\infty$ where the whole row is forbidden.

    Args:
        C: costs; batches broadcast.
        y: potentials of the columns.
        eta: inverse temperature $\eta > 0$.
    """
    return _log_sum_exp((y.unsqueeze(-2) - C) * eta, -1)


def column_log_sums(
    C: Float[Tensor, "*#batch n m"], x: Float[Tensor, "*#batch n"], eta: float
) -> Float[Tensor, "*batch m"]:
    r"""$\log \sum_i e^{\eta (x_i - C_{ij})}$ for each column; $-\infty$ where the whole column is forbidden.

    Args:
        C: costs; batches broadcast.
        x: potentials of the rows.
        eta: inverse temperature $\eta > 0$.
    """
    return _log_sum_exp((x.unsqueeze(-1) - C) * eta, -2)


def row_potential(
    C: Float[Tensor, "*#batch n m"], y: Float[Tensor, "*#batch m"], log_r: Float[Tensor, "*#batch n"], eta: float
) -> Float[Tensor, "*batch n"]:
    r"""The x for which the plan has row sums r: $x_i = (\log r_i + 1 - \log \sum_j e^{\eta (y_j - C_{ij})}) / \eta$.

    Args:
        C: costs.
        y: potentials of the columns.
        log_r: logarithms of the wanted row sums.
        eta: inverse temperature.
    """
    return (log_r + 1 - row_log_sums(C, y, eta)) / eta


def column_potential(
    C: Float[Tensor, "*#batch n m"], x: Float[Tensor, "*#batch n"], log_c: Float[Tensor, "*#batch m"], eta: float
) -> Float[Tensor, "*batch m"]:
    r"""The y for which the plan has the column sums c; see `row_potential`.

    Args:
        C: costs.
        x: potentials of the rows.
        log_c: logarithms of the wanted column sums.
        eta: inverse temperature.
    """
    return (log_c + 1 - column_log_sums(C, x, eta)) / eta


def coupling(
    C: Float[Tensor, "*#batch n m"],
    x: Float[Tensor, "*#batch n"],
    y: Float[Tensor, "*#batch m"],
    eta: float,
) -> Float[Tensor, "*batch n m"]:
    r"""The plan $P_{ij} = e^{\eta (x_i + y_j - C_{ij}) - 1}$; overflow gives infinity.

    Args:
        C: costs.
        x: potentials of the rows.
        y: potentials of the columns.
        eta: inverse temperature.
    """
    return ((x.unsqueeze(-1) + y.unsqueeze(-2) - C) * eta - 1).exp()


def exponent_floor(dtype: torch.dtype) -> float:
    """The least exponent worth taking: its exponential is far below rounding, and its square is no denormal number.

    Processors take many times as long for an exponential, or a product, that is not a normal number.
    """
    return 0.45 * math.log(torch.finfo(dtype).tiny) if dtype in (torch.float32, torch.float64) else -math.inf


def _log_sum_exp(t: Tensor, dim: int) -> Tensor:
    if torch.is_grad_enabled() and t.requires_grad:
        return torch.logsumexp(t, dim)
    largest = t.amax(dim, keepdim=True)
    shift = torch.where(largest.isfinite(), largest, 0.0)
    total = t.sub_(shift).clamp_min_(exponent_floor(t.dtype)).exp_().sum(dim)
    return torch.where(largest.squeeze(dim).isfinite(), total.log_() + shift.squeeze(dim), largest.squeeze(dim))
