"""The router of a mixture of experts: probabilities, the top-k choice, the loads, and the terms of the loss."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steepest._checks import check_int
from steepest._init import normal
from steepest.nn.balancing import Balancer, check_real
from steepest.nn.baselines import GlobalSwitchBalancer, LossFreeBalancer, SwitchBalancer
from steepest.nn.phi import PhiBalancer


class Routing(NamedTuple):
    """Where the tokens go.

    Attributes:
        chosen: (tokens, k) the experts of each token, best first.
        weights: (tokens, k) their mixing weights, in float32 or better.
        loss: The balancer's loss plus the z-loss; 0 in evaluation mode.
    """

    chosen: Int[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]
    loss: Float[Tensor, ""]


class Router(nn.Module):
    """A linear router with top-k choice: `p = softmax(x W')`, in float32 or better.

    Each token takes the k experts of the highest `balancer.scores(p)`. The weights are p over those k, made to sum to 1
    when k > 1 (for k = 1 the weight stays p, else the router would get no gradient). Source: Shazeer et al. 2017, arXiv
    1701.06538.

    Args:
        width: Size of a token.
        experts: Number of experts E.
        top_k: Experts per token k, at most E.
        balancer: The load balancer; one that does nothing if None.
        z_loss: Factor on the mean squared logsumexp of the logits, which joins the loss whatever the balancer (Zoph et
            al. 2022, arXiv 2202.08906).
        dtype: Type of the weight.
        device: Where weight and state live.
        generator: Source of the initial values, N(0, 1/width).

    Attributes:
        load: (experts,) the fraction of (token, choice) pairs that each expert got in the last forward pass.
        soft_load: (experts,) the mean probability in the last forward pass.
    """

    load: Tensor
    soft_load: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int = 2,
        *,
        balancer: Balancer | None = None,
        z_loss: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_int("width", width)
        check_int("experts", experts)
        check_int("top_k", top_k)
        if top_k > experts:
            raise ValueError(f"top_k must be at most experts = {experts}, got {top_k}")
        own = getattr(balancer, "experts", experts)
        if own != experts:
            raise ValueError(f"balancer must be for experts = {experts}, got one for {own}")
        self.top_k = top_k
        self.z_loss = check_real("z_loss", z_loss)
        self.weight = nn.Parameter(torch.empty(experts, width, dtype=dtype, device=device))
        self.balancer = Balancer() if balancer is None else balancer
        for part in self.balancer.modules():
            if isinstance(part, Balancer):
                part.validate = False
        if device is not None:
            self.balancer.to(device)
        for name in ("load", "soft_load"):
            self.register_buffer(name, torch.zeros(experts, dtype=torch.float32, device=device), persistent=False)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight."""
        normal(self.weight, self.weight.shape[1] ** -0.5, generator)

    def forward(self, x: Float[Tensor, "tokens width"], mask: Bool[Tensor, "tokens"] | None = None) -> Routing:
        """Route tokens.

        Args:
            x: The tokens.
            mask: True for tokens that count in loads and losses, False for padding, which is routed all the same.
        """
        logits = F.linear(x, self.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = logits.softmax(-1)
        chosen = self.balancer.scores(probabilities).topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, chosen)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        self._look(chosen, probabilities, mask)
        return Routing(chosen, weights, self._loss(logits, probabilities, mask))

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"width={self.weight.shape[1]}, experts={self.weight.shape[0]}, top_k={self.top_k}"

    @torch.no_grad()
    def _look(self, chosen: Tensor, probabilities: Tensor, mask: Tensor | None) -> None:
        counted = torch.ones_like(chosen[:, 0]) if mask is None else mask
        each = counted.to(torch.float32).unsqueeze(-1).expand_as(chosen).flatten()
        counts = each.new_zeros(self.load.shape).scatter_add_(0, chosen.flatten(), each)
        self.load = counts / counts.sum().clamp_min(1)
        total = torch.where(counted.bool().unsqueeze(-1), probabilities, 0).sum(0)
        self.soft_load = total.to(torch.float32) / counted.sum().clamp_min(1)

    def _loss(self, logits: Tensor, probabilities: Tensor, mask: Tensor | None) -> Tensor:
        total = logits.new_zeros(())
        if not self.training:
            return total
        total = total + self.balancer(probabilities, self.load.to(probabilities.dtype), mask)
        if self.z_loss:
            squares = logits.logsumexp(-1).square()
            if mask is None:
                return total + self.z_loss * squares.sum() / max(squares.numel(), 1)
            total = total + self.z_loss * torch.where(mask, squares, 0).sum() / mask.sum().clamp_min(1)
        return total


def _none(experts: int, strength: float | None, accumulation: int) -> Balancer:
    if strength:
        raise ValueError(f'strength must be left out with balance "none", got {strength!r}')
    return Balancer()


def _switch(experts: int, strength: float | None, accumulation: int) -> Balancer:
    return SwitchBalancer(0.01 if strength is None else strength)


def _global_switch(experts: int, strength: float | None, accumulation: int) -> Balancer:
    return GlobalSwitchBalancer(experts, 0.01 if strength is None else strength, accumulation=accumulation)


def _loss_free(experts: int, strength: float | None, accumulation: int) -> Balancer:
    return LossFreeBalancer(experts, 1e-3 if strength is None else strength, accumulation=accumulation)


def _phi(experts: int, strength: float | None, accumulation: int) -> Balancer:
    return PhiBalancer(experts, coefficient=strength, centred=True, accumulation=accumulation)


BALANCERS: Mapping[str, Callable[[int, float | None, int], Balancer]] = MappingProxyType(
    {"none": _none, "switch": _switch, "global_switch": _global_switch, "loss_free": _loss_free, "phi": _phi}
)
"""The balancers by name."""


def make_balancer(name: str, experts: int, strength: float | None = None, *, accumulation: int = 1) -> Balancer:
    """A balancer by its name.

    Args:
        name: "none", "switch", "global_switch", "loss_free" or "phi".
        experts: Number of experts.
        strength: The number by which the method is tuned: the coefficient of the loss, or the step of the loss-free
            bias. The method's default if None: 0.01, or 0.001 for "loss_free".
        accumulation: Micro-batches for each optimizer step.

    Raises:
        ValueError: the name is not known, or `strength` is out of range.
    """
    if name not in BALANCERS:
        raise ValueError(f"balance must be one of {', '.join(BALANCERS)}, got {name!r}")
    return BALANCERS[name](experts, strength, accumulation)
