"""What layers without a useful gradient share: one formula for one set of weights and for many; surrogate twins."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

Surrogate = Literal["smooth", "straight-through"]
_Weights = dict[str, Tensor]


class HardLayer(nn.Module):
    """A layer that computes with steps: no useful gradient passes them. A surrogate stands in for training by gradient.

    A subclass implements `population_forward`, where everything leads with the candidates, and gets the ordinary
    forward pass from it. Its surrogate has the same parameters, so `load_state_dict` works between the two.

    Args:
        surrogate: None: the layer itself, without gradient. "smooth": the smooth function that the layer is a step
            version of. "straight-through": forward as the layer itself, backward as the smooth function.

    Raises:
        ValueError: `surrogate` is something else.
    """

    choices: ClassVar[tuple[str, ...]] = get_args(Surrogate)

    def __init__(self, surrogate: Surrogate | None = None) -> None:
        super().__init__()
        self._surrogate: Surrogate | None = None
        self.surrogate = surrogate

    @property
    def surrogate(self) -> Surrogate | None:
        """Which function stands in for the layer; None: the layer itself."""
        return self._surrogate

    @surrogate.setter
    def surrogate(self, value: Surrogate | None) -> None:
        if value is not None and value not in self.choices:
            raise ValueError(f"surrogate must be None, {' or '.join(map(repr, self.choices))}, got {value!r}")
        self._surrogate = value

    def population_forward(self, weights: _Weights, x: Tensor) -> Tensor:
        """The layer for many candidates.

        Args:
            weights: Every parameter by name, with a leading dimension: the candidates, or 1 where they agree.
            x: The input with such a leading dimension.

        Returns:
            The output with such a leading dimension: 1 only where weights and input agree.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The layer for its own weights."""
        weights = {name: p.unsqueeze(0) for name, p in self.named_parameters()}
        return self.population_forward(weights, x.unsqueeze(0)).squeeze(0)

    def _pick(self, hard: Callable[[], Tensor], smooth: Callable[[], Tensor]) -> Tensor:
        if self.surrogate is None:
            return hard()
        soft = smooth()
        if self.surrogate == "smooth":
            return soft
        return soft + (hard() - soft).detach()


def surrogate_twin(model: nn.Module, surrogate: Surrogate | None = "smooth") -> Any:
    """A copy of a model in which every hard layer is replaced by its surrogate: what Adam can train.

    Args:
        model: With at least one layer of this module's kind.
        surrogate: See `HardLayer`; None gives the hard twin of a surrogate.

    Returns:
        The copy; its state dict fits the model, and the other way round.

    Raises:
        ValueError: the model has no hard layer, or `surrogate` is unknown.

    Examples:
        >>> import torch
        >>> from steepest.nn import Staircase, surrogate_twin
        >>> hard = torch.nn.Sequential(torch.nn.Linear(2, 3), Staircase())
        >>> twin = surrogate_twin(hard)
        >>> hard.load_state_dict(twin.state_dict())
        <All keys matched successfully>
    """
    twin = copy.deepcopy(model)
    layers = [module for module in twin.modules() if isinstance(module, HardLayer)]
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no hard layer of steepest.nn to replace")
    for layer in layers:
        layer.surrogate = surrogate
    return twin


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None, like: Any) -> nn.Parameter:
    """A parameter U(-1/sqrt(fan_in), 1/sqrt(fan_in)), drawn on the generator's device."""
    dtype, device = like
    source = device if generator is None else generator.device
    sample = torch.empty(shape, dtype=torch.float32, device=source).uniform_(-1, 1, generator=generator)
    return nn.Parameter((sample / fan_in**0.5).to(dtype=dtype or torch.get_default_dtype(), device=device))
