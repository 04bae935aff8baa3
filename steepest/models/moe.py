"""Feed-forward blocks: SwiGLU, and a mixture of SwiGLU experts with top-k routing and a pluggable load balancer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest.models._init import bare, normal


class SwiGLU(nn.Module):
    """The gated feed-forward block `down(silu(gate(x)) * up(x))`, without biases (Shazeer 2020, arXiv 2002.05202).

    Args:
        width: Size of the input and the output.
        hidden: Number of hidden neurons.
        dtype: Type of the parameters; torch's default if None.
        device: Where the parameters live; torch's default device if None.
        generator: Source of the initial values; torch's global one if None.
        residual_scale: Factor on the initial standard deviation of `down_proj`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        options = {"bias": False, "dtype": dtype, "device": device}
        self.gate_proj: nn.Linear = bare(nn.Linear, width, hidden, **options)
        self.up_proj: nn.Linear = bare(nn.Linear, width, hidden, **options)
        self.down_proj: nn.Linear = bare(nn.Linear, hidden, width, **options)
        self.residual_scale = residual_scale
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw N(0, 1/fan_in) for every matrix; `down_proj` is scaled by `residual_scale`."""
        normal(self.gate_proj.weight, self.gate_proj.in_features**-0.5, generator)
        normal(self.up_proj.weight, self.up_proj.in_features**-0.5, generator)
        normal(self.down_proj.weight, self.residual_scale * self.down_proj.in_features**-0.5, generator)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The block's output."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """SwiGLU blocks held as three 3-D parameters, one matrix per expert: `gate_proj`, `up_proj` of shape
    (experts, hidden, width) and `down_proj` of shape (experts, width, hidden), each matrix stored (out, in).
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width, dtype=dtype, device=device))
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden, dtype=dtype, device=device))
        self.residual_scale = residual_scale
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As `SwiGLU.reset_parameters`, for every expert."""
        normal(self.gate_proj, self.gate_proj.shape[-1] ** -0.5, generator)
        normal(self.up_proj, self.up_proj.shape[-1] ** -0.5, generator)
        normal(self.down_proj, self.residual_scale * self.down_proj.shape[-1] ** -0.5, generator)

    def forward(self, x: Float[Tensor, "rows width"], counts: list[int]) -> Float[Tensor, "rows width"]:
        """Apply expert 0 to the first `counts[0]` rows, expert 1 to the next `counts[1]`, and so on."""
        # unbind, not indexing: the backward of indexing would fill a whole (experts, ...) tensor once per expert.
        weights = zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        return torch.cat(
            [
                F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
                for rows, (gate, up, down) in zip(x.split(counts), weights, strict=True)
            ]
        )


class Balancer(nn.Module):
    """What a mixture of experts asks of a load balancer; this one does nothing. Subclass it to change either answer.

    State belongs in buffers, so that checkpoints keep it; update it only while `self.training`.
    """

    def scores(self, probabilities: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """The scores that choose the top-k experts. The mixing weights are always the probabilities themselves."""
        return probabilities

    def loss(
        self, probabilities: Float[Tensor, "tokens experts"], load: Float[Tensor, "experts"]
    ) -> Float[Tensor, ""] | None:
        """A term that joins the training loss, or None. `load` is the fraction of choices that went to each expert."""
        return None


class SwitchBalancer(Balancer):
    """The load-balance loss `c * E * sum_e f_e P_e`.

    f_e is the share of choices that expert e got (no gradient), P_e its mean probability. The value at balance is c.
    Source: Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6.

    Args:
        coefficient: The factor c, at least 0.
    """

    def __init__(self, coefficient: float = 0.01) -> None:
        super().__init__()
        if not coefficient >= 0:
            raise ValueError(f"coefficient must be at least 0, got {coefficient}")
        self.coefficient = coefficient

    def loss(
        self, probabilities: Float[Tensor, "tokens experts"], load: Float[Tensor, "experts"]
    ) -> Float[Tensor, ""] | None:
        """The loss above."""
        return self.coefficient * probabilities.shape[-1] * (load.detach() * probabilities.mean(0)).sum()


class MoE(nn.Module):
    """A mixture of SwiGLU experts: `y = sum over the top-k experts e of w_e * expert_e(x)`.

    The router is a linear map; `p = softmax(router(x))`, in float32 or better. Each token takes the k experts of the
    highest `balancer.scores(p)`; the weights are p over those k, made to sum to 1 when k > 1 (for k = 1 the weight
    stays p, else the router would get no gradient). No token is dropped. Source: Shazeer et al. 2017, arXiv 1701.06538.

    Args:
        width: Size of the input and the output.
        hidden: Hidden neurons of each expert.
        experts: Number of experts E.
        top_k: Experts per token k, at most E.
        balancer: The load balancer; one that does nothing if None.
        z_loss: Factor on the mean squared logsumexp of the router's logits, added to the auxiliary loss.
        dtype: Type of the parameters.
        device: Where they live.
        generator: Source of the initial values.
        residual_scale: As in `SwiGLU`.

    Attributes:
        load: (experts,) the fraction of (token, choice) pairs that each expert got in the last forward pass.
    """

    load: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int = 2,
        *,
        balancer: Balancer | None = None,
        z_loss: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_int("experts", experts)
        check_int("top_k", top_k)
        if top_k > experts:
            raise ValueError(f"top_k must be at most experts = {experts}, got {top_k}")
        self.top_k = top_k
        self.balancer = Balancer() if balancer is None else balancer
        self.z_loss = z_loss
        self.router: nn.Linear = bare(nn.Linear, width, experts, bias=False, dtype=dtype, device=device)
        self.experts = Experts(
            experts, width, hidden, dtype=dtype, device=device, generator=generator, residual_scale=residual_scale
        )
        self.register_buffer("load", torch.zeros(experts, device=device), persistent=False)
        normal(self.router.weight, width**-0.5, generator)

    def forward(self, x: Float[Tensor, "*batch width"]) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, ""]]:
        """The output, and the auxiliary loss (0 in evaluation mode)."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = logits.softmax(-1)
        chosen = self.balancer.scores(probabilities).topk(self.top_k, dim=-1).indices  # (tokens, k)
        weights = probabilities.gather(-1, chosen)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

        order = chosen.flatten().argsort(stable=True)  # choices sorted by expert
        counts = torch.bincount(chosen.flatten(), minlength=probabilities.shape[-1])
        self.load = (counts / max(chosen.numel(), 1)).to(torch.float32)
        rows = self.experts(tokens.index_select(0, order // self.top_k), counts.tolist())
        rows = rows.index_select(0, order.argsort()).unflatten(0, (-1, self.top_k))  # (tokens, k, width)
        y = (weights.unsqueeze(-1).to(rows.dtype) * rows).sum(1)
        return y.view_as(x), self._auxiliary_loss(logits, probabilities)

    def _auxiliary_loss(
        self, logits: Float[Tensor, "tokens experts"], probabilities: Float[Tensor, "tokens experts"]
    ) -> Float[Tensor, ""]:
        total = logits.new_zeros(())
        if not self.training:
            return total
        balance = self.balancer.loss(probabilities, self.load.to(probabilities.dtype))
        if balance is not None:
            total = total + balance
        if self.z_loss:
            total = total + self.z_loss * logits.logsumexp(-1).square().mean()
        return total


def load_metrics(load: Float[Tensor, "*layers experts"]) -> dict[str, float]:
    """How evenly experts are used, averaged over layers.

    Args:
        load: Fraction of choices per expert; each row sums to 1.

    Returns:
        `max_violation` = E * max load - 1 and `load_cv` = standard deviation / mean (both 0 at balance), `load_entropy`
        = entropy / log E (1 at balance; 1 for a single expert), `dead_experts` = share with a load below 0.1 / E.
    """
    load = load.double()
    experts = load.shape[-1]
    entropy = -torch.xlogy(load, load).sum(-1)
    entropy = entropy / torch.log(load.new_tensor(float(experts))) if experts > 1 else torch.ones_like(entropy)
    return {
        "max_violation": float((experts * load.amax(-1) - 1).mean()),
        "load_cv": float((experts * load.std(-1, correction=0)).mean()),
        "load_entropy": float(entropy.mean()),
        "dead_experts": float((load < 0.1 / experts).double().mean()),
    }
