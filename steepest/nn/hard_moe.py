"""A mixture of experts in which each sample has one expert."""

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.nn._population_rules import linear
from steepest.nn.surrogates import HardLayer, Surrogate, uniform


class HardMoE(HardLayer):
    r"""Linear experts behind a hard gate: $y = W_e x + b_e$, $e = \arg\max_j g_j^\top x + c_j$.

    The gate's size does not enter the output, so it has no gradient. Of equal gates the first wins. The surrogate is
    the mixture with the weights softmax(G x + c).

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        experts: How many, at least 1.
        surrogate: See `HardLayer`.
        generator: Source of the initial values, U(±1/sqrt(in)); torch's global one if None.
        dtype: Type of the parameters.
        device: Where they live.

    Raises:
        ValueError: a size is below 1.

    Source:
        Le 2026, arXiv 2605.01928, with 4 experts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int = 4,
        *,
        surrogate: Surrogate | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(surrogate)
        check_int("in_features", in_features)
        check_int("out_features", out_features)
        check_int("experts", experts)
        self.in_features, self.out_features, self.experts = in_features, out_features, experts
        like = (dtype, device)
        self.gate = uniform((experts, in_features), in_features, generator, like)
        self.gate_bias = uniform((experts,), in_features, generator, like)
        self.weight = uniform((experts, out_features, in_features), in_features, generator, like)
        self.bias = uniform((experts, out_features), in_features, generator, like)

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates *n in"]
    ) -> Float[Tensor, "more *n out"]:
        """See `HardLayer`."""
        scores = linear(x, weights["gate"], weights["gate_bias"])
        every = linear(x, weights["weight"].flatten(1, 2), weights["bias"].flatten(1, 2))
        every = every.unflatten(-1, (self.experts, self.out_features))
        picked = scores.detach().argmax(-1, keepdim=True)
        if self.surrogate is None:
            return torch.take_along_dim(every, picked.unsqueeze(-1), -2).squeeze(-2)
        one = torch.zeros_like(scores).scatter(-1, picked, 1)
        share = self._pick(lambda: one, lambda: scores.softmax(-1))
        return (share.unsqueeze(-1) * every).sum(-2)

    def chosen(self, x: Float[Tensor, "*n in"]) -> Tensor:
        """The expert of each sample, with the layer's own weights: shape (*n,)."""
        return torch.nn.functional.linear(x, self.gate, self.gate_bias).argmax(-1)

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.in_features}, {self.out_features}, experts={self.experts}, surrogate={self.surrogate!r}"
