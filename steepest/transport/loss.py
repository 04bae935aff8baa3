"""The entropic transport cost as a differentiable function of the costs and the marginals."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.couplings import coupling
from steepest.transport.entropic import entropic_ot
from steepest.transport.newton_system import newton_direction


def ot_loss(
    C: Float[Tensor, "*#batch n m"],
    r: Float[Tensor, "*#batch n"] | None,
    c: Float[Tensor, "*#batch m"] | None,
    eta: float,
    **options: Any,
) -> Float[Tensor, "*batch"]:
    r"""The optimum of entropic transport, differentiable twice in C, r and c.

    By the envelope theorem its derivatives are the plan, $\partial / \partial C = P$, and the potentials,
    $\partial / \partial r = x$ and $\partial / \partial c = y$. Potentials are known up to (x + t, y - t), because r
    and c can only change together: the derivative by r is centred (its mean is zero), and t is in that by c. Second
    derivatives differentiate the conditions $P 1 = r$, $P^\top 1 = c$; they cost one dense factorisation.

    Args:
        C: costs.
        r: row sums; None: uniform.
        c: column sums; None: uniform. They have the total of r, and the loss is defined on that set alone: keep it by
            construction, for example by a softmax.
        eta: inverse temperature.
        options: those of `entropic_ot`.

    Returns:
        $\langle C, P \rangle + \frac{1}{\eta} \sum P \log P$ of the best plan, one number per problem.

    Raises:
        TypeError, ValueError: see `entropic_ot`.

    Examples:
        >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        >>> half = torch.full((2,), 0.5, dtype=torch.float64)
        >>> ot_loss(C, half, half, 50.0).backward()
        >>> C.grad.round(decimals=6).abs()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    result = entropic_ot(C, r, c, eta, **options)
    p = result.problem
    # The broadcasting is part of the graph, so that its gradients are summed.
    C = C.expand(p.C.shape)
    r = p.r if r is None else r.to(C).expand(p.r.shape)
    c = p.c if c is None else c.to(C).expand(p.c.shape)
    x, y = result.potentials
    shift = x.mean(-1, keepdim=True)
    return _Value.apply(C, r, c, x - shift, y + shift, p.eta)  # type: ignore[no-any-return]


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, C: Tensor, r: Tensor, c: Tensor, x: Tensor, y: Tensor, eta: float) -> Tensor:
        ctx.save_for_backward(C, r, c, x, y)
        ctx.eta = eta
        return (r * x).sum(-1) + (c * y).sum(-1) - coupling(C, x, y, eta).sum((-2, -1)) / eta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        C, r, c, x, y = ctx.saved_tensors
        g = grads[0]
        x, y = _Potentials.apply(C, r, c, x, y, ctx.eta)  # type: ignore[misc]
        plan = coupling(C, x, y, ctx.eta)
        return g[..., None, None] * plan, g[..., None] * x, g[..., None] * y, None, None, None


class _Potentials(torch.autograd.Function):
    """The potentials as a function of the problem: known numbers, with the derivative of what they solve."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, r: Tensor, c: Tensor, x: Tensor, y: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(C, x, y)
        ctx.eta = eta
        return x.clone(), y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        C, x, y = ctx.saved_tensors
        eta = ctx.eta
        u, v = _adjoint(coupling(C, x, y, eta), grads[0], grads[1], eta)
        plan = coupling(C, x, y, eta)
        return eta * plan * (u.unsqueeze(-1) + v.unsqueeze(-2)), u, v, None, None, None


def _adjoint(plan: Tensor, gx: Tensor, gy: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    r"""$(u, v) = \Pi H^+ g$ for the gauge of x with mean zero."""
    # The potentials are (I - w 1^T / n) H^+ (change of the marginals), with w = (1, -1) and 1^T over x.
    mean = (gx.sum(-1, keepdim=True) - gy.sum(-1, keepdim=True)) / gx.shape[-1]
    return _pseudo_solve(plan, gx - mean, gy, eta)


def _pseudo_solve(plan: Tensor, gx: Tensor, gy: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    shape, n, m = gx.shape[:-1], gx.shape[-1], gy.shape[-1]
    u, v = newton_direction(plan.reshape(-1, n, m), gx.reshape(-1, n), gy.reshape(-1, m), eta)
    shift = u.mean(-1, keepdim=True)
    return (u - shift).reshape(*shape, n), (v + shift).reshape(*shape, m)
