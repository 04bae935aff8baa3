"""Feed-forward blocks: SwiGLU, and a mixture of SwiGLU experts."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest._init import bare, normal
from steepest.nn import Balancer, Router


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


class MoE(nn.Module):
    """A mixture of SwiGLU experts: `y = sum over the top-k experts e of w_e * expert_e(x)`.

    Choice and weights are those of `steepest.nn.Router`. No token is dropped.

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
    """

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
        options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        self.experts = Experts(experts, width, hidden, residual_scale=residual_scale, **options)
        self.router = Router(width, experts, top_k, balancer=balancer, z_loss=z_loss, **options)

    def forward(
        self, x: Float[Tensor, "*batch width"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch width"], Float[Tensor, ""]]:
        """The output, and the auxiliary loss (0 in evaluation mode).

        Args:
            x: The tokens.
            mask: True for tokens that count in the balance, False for padding.
        """
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights, loss = self.router(tokens, None if mask is None else mask.reshape(-1))
        top_k = self.router.top_k
        order = chosen.flatten().argsort(stable=True)  # choices sorted by expert
        counts = torch.bincount(chosen.flatten(), minlength=self.router.weight.shape[0])
        rows = self.experts(tokens.index_select(0, order // top_k), counts.tolist())
        rows = rows.index_select(0, order.argsort()).unflatten(0, (-1, top_k))  # (tokens, k, width)
        y = (weights.unsqueeze(-1).to(rows.dtype) * rows).sum(1)
        return y.view_as(x), loss
