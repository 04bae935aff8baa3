"""The losses of candidates that differ in few parameters of a network: what `PolyStep` calls."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest.nn.population import Inputs, Population


@runtime_checkable
class TakesChanges(Protocol):
    """A closure that needs only the parameters that differ between candidates.

    `changed(tables)` takes the candidates' values of some parameters, (b, *shape) by the `id` of the parameter; all
    others are at their present value. `load` is a number of elements that one candidate needs for its activations.
    """

    load: int

    def changed(self, tables: Mapping[int, Tensor]) -> Tensor: ...


class NetworkLoss:
    """A network and a loss; `on(inputs, targets)` is the closure for one step of `PolyStep`.

    Layers before the first parameter that changes are evaluated once for all candidates, and layers after it with one
    matrix product. The model is not changed. See `steepest.nn.Population` for which modules are batched.

    Args:
        model: the network.
        loss_fn: `loss_fn(output, targets)` gives one number.
        train: evaluate in training mode (one dropout mask for all candidates, batch statistics for each); otherwise in
            evaluation mode, whatever mode the model is in. Buffers stay as they are.

    Raises:
        TypeError, ValueError: as `steepest.nn.Population`.

    Examples:
        >>> from steepest.gradient_free import NetworkLoss, PolyStep
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> model = nn.Linear(4, 3)
        >>> optimizer = PolyStep(model.parameters(), epsilon=0.1, step_radius=0.5)
        >>> loss = NetworkLoss(model, nn.functional.cross_entropy)
        >>> first = optimizer.step(loss.on(x, y))
        >>> for _ in range(20):
        ...     last = optimizer.step(loss.on(x, y))
        >>> bool(last < first)
        True
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], *, train: bool = False) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of output and targets, got {loss_fn!r}")
        self.population = Population(model, train=train)
        self.names = {id(model.get_parameter(name)): name for name in self.population.names}
        self.loss_fn = loss_fn

    def on(self, inputs: Inputs, targets: Any = None) -> "BatchLoss":
        """The losses on one minibatch, the same for all candidates."""
        return BatchLoss(self, inputs, targets)


class BatchLoss:
    """`NetworkLoss` on one minibatch: a closure for `PolyStep`, or a function of named candidates.

    All calls use the same random numbers (the dropout mask); another ``on(...)`` draws others.
    """

    def __init__(self, network: NetworkLoss, inputs: Inputs, targets: Any) -> None:
        self.network, self.inputs, self.targets = network, inputs, targets
        samples = inputs.shape[0] if isinstance(inputs, Tensor) and inputs.ndim else 1
        shapes = network.population.shapes
        self._numbers: tuple[Tensor, Tensor | None] | None = None
        self.load = samples * max((shape[0] for shape in shapes if shape), default=1)

    def __call__(self, weights: Mapping[str, Float[Tensor, "b ..."]]) -> Float[Tensor, " b"]:
        """Losses of candidates given by the names of the parameters; one that is not named has its present value."""
        population = self.network.population
        known = dict(population.model.named_parameters(remove_duplicate=False))
        if unknown := [name for name in weights if name not in known]:
            raise ValueError(f"the model has no parameter {unknown[0]!r}, only {', '.join(known)}")
        return self.changed({id(known[name]): each for name, each in weights.items()})

    def changed(self, tables: Mapping[int, Tensor]) -> Float[Tensor, " b"]:
        """See `TakesChanges`."""
        network = self.network
        named = {network.names[identity]: each for identity, each in tables.items()}
        with self._same_numbers(tables):
            return network.population.losses(named, network.loss_fn, self.inputs, self.targets)

    @contextmanager
    def _same_numbers(self, tables: Mapping[int, Tensor]) -> Iterator[None]:
        """Every call sees torch's random numbers as the first did, and only the first uses them up."""
        device = next(iter(tables.values())).device
        before = _random_state(device)
        if self._numbers is None:
            self._numbers = before
            yield
            return
        _set_random_state(device, self._numbers)
        try:
            yield
        finally:
            _set_random_state(device, before)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
