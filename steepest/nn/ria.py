"""Activations without kinks: the ReLU smoothed by a Gaussian, and the gate that goes with it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._init import bare, normal


def ria(x: Float[Tensor, "*shape"], beta: float = 1.0) -> Float[Tensor, "*shape"]:
    r"""$x \Phi(\beta x) + \varphi(\beta x) / \beta$: the ReLU convolved with a Gaussian of deviation $1/\beta$.

    Entire, so that it adds no singularity to the loss; $\Phi$ and $\varphi$ are the Gaussian distribution and density.
    It lies above the ReLU, by $1 / (\beta \sqrt{2 \pi})$ at 0.

    Args:
        x: any shape.
        beta: sharpness, positive; the ReLU for large ones.

    Source:
        Sao 2026, arXiv 2603.13552, suggested there and not tested.
    """
    _check(beta)
    density = torch.exp(-0.5 * (beta * x).square()) / math.sqrt(2 * math.pi)
    return x * torch.special.ndtr(beta * x) + density / beta


class RIA(nn.Module):
    """`ria` as a module.

    Args:
        beta: see `ria`.

    Examples:
        >>> RIA()(torch.zeros(1))
        tensor([0.3989])
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        _check(beta)
        self.beta = beta

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return ria(x, self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


class GaussGLU(nn.Module):
    r"""A feed-forward block with an entire gate: $W_d (\Phi(\beta W_g x) \odot W_u x)$.

    Args:
        width: of input and output.
        hidden: neurons.
        beta: sharpness of the gate.
        bias: whether the three layers have biases.
        generator: source of the initial values, N(0, 1/fan_in); torch's global one if None.
        dtype: type of the parameters.
        device: where they live.

    Source:
        Sao 2026, arXiv 2603.13552, suggested there and not tested.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        beta: float = 1.0,
        bias: bool = False,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check(beta)
        self.beta = beta
        options = {"bias": bias, "dtype": dtype, "device": device}
        self.gate_proj: nn.Linear = bare(nn.Linear, width, hidden, **options)
        self.up_proj: nn.Linear = bare(nn.Linear, width, hidden, **options)
        self.down_proj: nn.Linear = bare(nn.Linear, hidden, width, **options)
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            normal(layer.weight, layer.in_features**-0.5, generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.down_proj(torch.special.ndtr(self.beta * self.gate_proj(x)) * self.up_proj(x))


def _check(beta: float) -> None:
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"beta must be a number, got {beta!r}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a positive finite number, got {beta!r}")
