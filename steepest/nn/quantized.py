"""Linear layers whose weights live on a grid."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int
from steepest.nn._population_rules import linear
from steepest.nn.balancing import check_real
from steepest.nn.surrogates import HardLayer, Surrogate, uniform


class _WeightRule(HardLayer):
    """A linear layer with `_rule` applied to its weights."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        surrogate: Surrogate | None,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(surrogate)
        check_int("in_features", in_features)
        check_int("out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = uniform((out_features, in_features), in_features, generator, (dtype, device))
        if bias:
            self.bias = uniform((out_features,), in_features, generator, (dtype, device))
        else:
            self.register_parameter("bias", None)

    def _rule(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _bias_rule(self, bias: Tensor) -> Tensor:
        return self._rule(bias)

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates *n in"]
    ) -> Float[Tensor, "more *n out"]:
        """See `HardLayer`."""
        bias = weights.get("bias")
        return linear(x, self._rule(weights["weight"]), None if bias is None else self._bias_rule(bias))

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, surrogate={self.surrogate!r}"


class QuantizedLinear(_WeightRule):
    r"""A linear layer whose weights and biases live on a grid: $\hat w = s\,\mathrm{clamp}(\mathrm{round}(w / s))$.

    The integers run from $-2^{b-1}$ to $2^{b-1} - 1$. The parameters stay real, and are rounded in the forward
    pass (halves to the even neighbour), so a change of less than half a step has no effect.
    The surrogate clamps and does not round.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether there is one.
        step: s, the distance between two values, positive.
        bits: b, from 2 to 16.
        surrogate: See `HardLayer`.
        generator: Source of the initial values, U(±1/sqrt(in)); torch's global one if None.
        dtype: Type of the parameters.
        device: Where they live.

    Raises:
        ValueError: a size or `step` is not positive, or `bits` is out of its range.

    Source:
        Le 2026, arXiv 2605.01928, with s = 0.01 and b = 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        step: float = 0.01,
        bits: int = 8,
        surrogate: Surrogate | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_int("bits", bits, 2)
        if bits > 16:
            raise ValueError(f"bits must be at most 16, got {bits}")
        if check_real("step", step) == 0:
            raise ValueError("step must be positive, got 0")
        super().__init__(in_features, out_features, bias, surrogate, generator, dtype, device)
        self.step, self.bits = step, bits

    def _integers(self, weight: Tensor) -> Tensor:
        return self._clamp(torch.round(weight / self.step))

    def _clamp(self, weight: Tensor) -> Tensor:
        return weight.clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def _rule(self, weight: Tensor) -> Tensor:
        smooth: Any = lambda: self._clamp(weight / self.step) * self.step  # noqa: E731
        return self._pick(lambda: self._integers(weight.detach()) * self.step, smooth)

    def integers(self) -> tuple[Int[Tensor, "out in"], Int[Tensor, " out"] | None]:
        """Weights and biases as integers, int8 up to 8 bits and int16 above; times `step` they are what is used."""
        kind = torch.int8 if self.bits <= 8 else torch.int16
        weight = self._integers(self.weight.detach()).to(kind)
        return weight, None if self.bias is None else self._integers(self.bias.detach()).to(kind)

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{super().extra_repr()}, step={self.step:g}, bits={self.bits}"


class SignLinear(_WeightRule):
    r"""A linear layer with binary weights: $y = x\,\mathrm{sign}(W)^\top + b$, with sign(0) = 1.

    The bias stays real, unless `binary_bias`. The surrogate clamps the weights to [-1, 1].

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether there is one.
        binary_bias: Whether the bias is binary too.
        surrogate: See `HardLayer`.
        generator: Source of the initial values, U(±1/sqrt(in)); torch's global one if None.
        dtype: Type of the parameters.
        device: Where they live.

    Raises:
        ValueError: a size is not positive.

    Source:
        Le 2026, arXiv 2605.01928.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        binary_bias: bool = False,
        surrogate: Surrogate | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, surrogate, generator, dtype, device)
        self.binary_bias = binary_bias

    def _rule(self, weight: Tensor) -> Tensor:
        return self._pick(lambda: _signs(weight.detach()), lambda: weight.clamp(-1, 1))

    def _bias_rule(self, bias: Tensor) -> Tensor:
        return self._rule(bias) if self.binary_bias else bias


def _signs(weight: Tensor) -> Tensor:
    return (weight >= 0).to(weight.dtype).mul_(2).sub_(1)
