"""Causal self-attention with rotary positions, grouped key-value heads and normalised queries and keys."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steepest._init import bare, normal
from steepest.models.norm import RMSNorm


def rotary_table(
    context: int,
    head_width: int,
    base: float = 10000.0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "context half"], Float[Tensor, "context half"]]:
    """Cosines and sines of the angles `t * base**(-2 i / head_width)` for position t and pair i < head_width / 2.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64, device=device) / head_width)
    angle = torch.outer(torch.arange(context, dtype=torch.float64, device=device), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(
    x: Float[Tensor, "*batch time width"], cos: Float[Tensor, "time half"], sin: Float[Tensor, "time half"]
) -> Float[Tensor, "*batch time width"]:
    """Turn each pair `x[i], x[i + width/2]` by the angle of its position.

    The inner product of a vector turned at s and one turned at t depends on s - t alone.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """`o_proj(softmax(q k' / sqrt(head_width)) v)` over the past, with rotary positions on q and k.

    Uses `scaled_dot_product_attention`. Its fast kernels have no second derivative: wrap Hessian-vector products in
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        width: Size of the input and the output.
        heads: Number of query heads; `width / heads` must be an even whole number.
        kv_heads: Number of key and value heads, a divisor of `heads`; query heads share them in consecutive groups.
        qk_norm: Whether queries and keys pass an RMSNorm over each head (Henry et al. 2020, arXiv 2010.04245).
        norm_eps: Epsilon of that norm.
        dtype: Type of the parameters.
        device: Where they live.
        generator: Source of the initial values.
        residual_scale: Factor on the initial standard deviation of `o_proj`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.grouped = kv_heads != heads
        options = {"bias": False, "dtype": dtype, "device": device}
        self.q_proj: nn.Linear = bare(nn.Linear, width, heads * self.head_width, **options)
        self.k_proj: nn.Linear = bare(nn.Linear, width, kv_heads * self.head_width, **options)
        self.v_proj: nn.Linear = bare(nn.Linear, width, kv_heads * self.head_width, **options)
        self.o_proj: nn.Linear = bare(nn.Linear, heads * self.head_width, width, **options)
        self.q_norm = RMSNorm(self.head_width, norm_eps, dtype=dtype, device=device) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_width, norm_eps, dtype=dtype, device=device) if qk_norm else nn.Identity()
        self.residual_scale = residual_scale
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw N(0, 1/fan_in) for every matrix; `o_proj` is scaled by `residual_scale`."""
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            normal(linear.weight, linear.in_features**-0.5, generator)
        normal(self.o_proj.weight, self.residual_scale * self.o_proj.in_features**-0.5, generator)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        cos: Float[Tensor, "time half"],
        sin: Float[Tensor, "time half"],
    ) -> Float[Tensor, "batch time width"]:
        """The block's output; position t sees positions 0 to t."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (batch, heads, time, head_width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))
