"""A fully connected network."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest._init import bare, normal

# Each activation with the gain that keeps the second moment of a unit-variance signal (1 where none is usual).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, 2**0.5),
    "leaky_relu": (F.leaky_relu, 2**0.5),
    "gelu": (F.gelu, 2**0.5),
    "silu": (F.silu, 2**0.5),
    "softplus": (F.softplus, 1.0),
    "tanh": (torch.tanh, 5 / 3),
    "sigmoid": (torch.sigmoid, 1.0),
    "sin": (torch.sin, 1.0),
    "identity": (lambda x: x, 1.0),
}


class MLP(nn.Module):
    """`W_L a(... a(W_1 x + b_1) ...) + b_L`: linear layers with an activation between them, none after the last.

    Initial values: hidden weights N(0, gain^2/fan_in), the last layer N(0, 1/fan_in), biases 0 (He et al. 2015, arXiv
    1502.01852).

    Args:
        sizes: Sizes of the layers, input first, output last; at least two.
        activation: One of `ACTIVATIONS`, or an elementwise callable (gain 1).
        bias: Whether the layers have biases.
        generator: Source of the initial values; torch's global one if None.
        dtype: Type of the parameters; torch's default if None.
        device: Where they live; torch's default device if None.

    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.

    Examples:
        >>> MLP([64, 32, 10], activation="gelu")(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Callable[[Tensor], Tensor] = "relu",
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least an input and an output size, got {sizes}")
        for size in sizes:
            check_int("each of sizes", size)
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(
                    f"activation must be one of {', '.join(ACTIVATIONS)} or a callable, got {activation!r}"
                )
            self.activation, self.gain = ACTIVATIONS[activation]
        elif callable(activation):
            self.activation, self.gain = activation, 1.0
        else:
            raise TypeError(f"activation must be a name or a callable, got {type(activation).__name__}")
        self.layers = nn.ModuleList(
            bare(nn.Linear, fan_in, fan_out, bias=bias, dtype=dtype, device=device)
            for fan_in, fan_out in pairwise(sizes)
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial values anew."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            gain = self.gain if index + 1 < len(self.layers) else 1.0
            normal(layer.weight, gain * layer.in_features**-0.5, generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """The network's output."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
