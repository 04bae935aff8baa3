"""Spiking neurons with a hard threshold."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest._init import bare
from steepest.nn.balancing import check_real
from steepest.nn.surrogates import HardLayer, Surrogate, uniform


class HardLIF(HardLayer):
    r"""Leaky integrate-and-fire neurons, over time steps in the first dimension.

    From $m_0 = 0$: $m_t = \lambda m_{t-1} + I_t$; a spike $s_t = 1$ where $m_t \ge \theta$, else 0; then a spike sets
    $m_t$ to 0 (or lowers it by the threshold). A neuron whose steady state $I / (1 - \lambda)$ stays below
    the threshold never fires, whatever is changed a little: no gradient, and a flat loss. The surrogate has
    $s_t = \sigma(\beta (m_t - \theta))$ in both places.

    Args:
        decay: lambda, in [0, 1]: what is left of the potential after a step.
        threshold: theta, positive.
        reset: "zero" forgets the potential at a spike, "subtract" lowers it by the threshold.
        sharpness: beta, positive: of the surrogate.
        surrogate: See `HardLayer`.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> HardLIF()(torch.full((6, 1), 0.4)).flatten()
        tensor([0., 0., 1., 0., 0., 1.])

    Source:
        Le 2026, arXiv 2605.01928, with decay 0.95, threshold 1, and sharpness 10 in the surrogate.
    """

    def __init__(
        self,
        decay: float = 0.95,
        threshold: float = 1.0,
        *,
        reset: Literal["zero", "subtract"] = "zero",
        sharpness: float = 10.0,
        surrogate: Surrogate | None = None,
    ) -> None:
        super().__init__(surrogate)
        if check_real("decay", decay) > 1:
            raise ValueError(f"decay must be in [0, 1], got {decay!r}")
        for name, value in (("threshold", threshold), ("sharpness", sharpness)):
            if check_real(name, value) == 0:
                raise ValueError(f"{name} must be positive, got 0")
        if reset not in ("zero", "subtract"):
            raise ValueError(f"reset must be 'zero' or 'subtract', got {reset!r}")
        self.decay, self.threshold, self.reset, self.sharpness = decay, threshold, reset, sharpness

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates time *n"]
    ) -> Float[Tensor, "candidates time *n"]:
        """See `HardLayer`."""
        if x.ndim < 2:
            raise ValueError("the input of HardLIF must lead with the time steps, got a single number")
        return self._hard(x.detach()) if self.surrogate is None else self._soft(x)

    def _hard(self, currents: Tensor) -> Tensor:
        spikes = torch.empty_like(currents, memory_format=torch.contiguous_format)
        potential = torch.zeros_like(currents[:, 0])
        for t in range(currents.shape[1]):
            potential = torch.add(currents[:, t], potential, alpha=self.decay)
            fired = (potential >= self.threshold).to(potential.dtype)
            spikes[:, t] = fired
            if self.reset == "zero":
                potential.addcmul_(potential, fired, value=-1)
            else:
                potential.sub_(fired, alpha=self.threshold)
        return spikes

    def _soft(self, currents: Tensor) -> Tensor:
        spikes, potential = [], torch.zeros_like(currents[:, 0])
        for current in currents.unbind(1):
            potential = self.decay * potential + current
            over = potential - self.threshold
            spike = self._pick(
                lambda over=over: (over.detach() >= 0).to(over.dtype),
                lambda over=over: torch.sigmoid(self.sharpness * over),
            )
            spikes.append(spike)
            potential = potential * (1 - spike) if self.reset == "zero" else potential - self.threshold * spike
        return torch.stack(spikes, 1)

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"decay={self.decay:g}, threshold={self.threshold:g}, reset={self.reset!r}, surrogate={self.surrogate!r}"


class RepeatInput(nn.Module):
    """The same input at every time step: (*n) to (steps, *n), without a copy.

    Args:
        steps: How many, at least 1.

    Attributes:
        expansion: The same number: how much larger the activations behind it are.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        check_int("steps", steps)
        self.steps = self.expansion = steps

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "time *n"]:
        """Repeat."""
        return x.expand(self.steps, *x.shape)

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates *n"]
    ) -> Float[Tensor, "candidates time *n"]:
        """See `HardLayer`."""
        return x.unsqueeze(1).expand(-1, self.steps, *x.shape[1:])

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"steps={self.steps}"


class SpikeCount(nn.Module):
    """The number of spikes over time, (time, *n) to (*n): the logits of a spiking classifier."""

    def forward(self, x: Float[Tensor, "time *n"]) -> Float[Tensor, "*n"]:
        """The sum over the first dimension."""
        return x.sum(0)

    def population_forward(
        self, weights: dict[str, Tensor], x: Float[Tensor, "candidates time *n"]
    ) -> Float[Tensor, "candidates *n"]:
        """See `HardLayer`."""
        return x.sum(1)


def spiking_mlp(
    sizes: Sequence[int],
    steps: int,
    *,
    gain: float = 2.0,
    output_bias: float = 0.2,
    decay: float = 0.95,
    surrogate: Surrogate | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """A fully connected spiking classifier: constant input currents, LIF neurons after every layer, counts as logits.

    Initial values: weights and hidden biases U(±gain/sqrt(fan_in)), biases of the last layer U(±1/sqrt(fan_in)) +
    `output_bias`. With less of both, no output neuron fires: then all small changes give the same loss, and nothing
    can learn.

    Args:
        sizes: Sizes of the layers, input first, output last; at least two.
        steps: Time steps.
        gain: Of the initial weights.
        output_bias: Added to the biases of the last layer.
        decay: See `HardLIF`.
        surrogate: See `HardLayer`.
        generator: Source of the initial values; torch's global one if None.
        dtype: Type of the parameters.
        device: Where they live.

    Raises:
        ValueError: there are fewer than two sizes, or an argument is out of its range.

    Examples:
        >>> spiking_mlp([64, 32, 10], steps=8)(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes must have at least two entries, input and output, got {list(sizes)}")
    layers: list[Any] = []
    for index, (fan_in, out) in enumerate(pairwise(sizes)):
        last = index == len(sizes) - 2
        layer = cast(nn.Linear, bare(nn.Linear, fan_in, out, dtype=dtype, device=device))
        layer.weight = _scaled(uniform((out, fan_in), fan_in, generator, (dtype, device)), gain, 0.0)
        bias = uniform((out,), fan_in, generator, (dtype, device))
        layer.bias = _scaled(bias, 1.0, output_bias) if last else _scaled(bias, gain, 0.0)
        layers += [layer, *([RepeatInput(steps)] if index == 0 else []), HardLIF(decay, surrogate=surrogate)]
    return nn.Sequential(*layers, SpikeCount())


def _scaled(parameter: nn.Parameter, gain: float, shift: float) -> nn.Parameter:
    return nn.Parameter(parameter.detach() * gain + shift)
