"""Parameters that are left out of differentiation while their model runs."""

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from steepest.optim.layers import ModelLayer


class LayerSwitch:
    """Switches `requires_grad` off for chosen layers, from the moment the model starts to run until it has run.

    Autograd then builds no graph for what comes before the first active layer, stores no activations there, and
    computes no gradient of a switched-off parameter. Outside the model's forward pass every parameter is as the user
    left it. It sits in hooks of the modules, so it also holds when activation checkpointing runs a module again. It
    acts in train mode with gradients on, and never inside code that `torch.compile` traces: compile the model before
    the optimizer is made, or use `frozen`.

    Args:
        model: the model.
        layers: its layers from input to output; a warning is given once if they run in another order.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ModelLayer]) -> None:
        self.model, self.layers = model, list(layers)
        self.used = False
        self._off: list[nn.Parameter] = []
        self._reset()

    def set_active(self, active: Sequence[int]) -> None:
        """The layers that are differentiated from the next forward pass on."""
        chosen = set(active)
        self._off = [
            parameter
            for index, layer in enumerate(self.layers)
            if index not in chosen
            for parameter in layer.parameters.values()
        ]

    @property
    def inactive(self) -> list[nn.Parameter]:
        """The parameters that are switched off."""
        return self._off

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The same for any code in a `with` block."""
        token = object()
        self.enter(token, True)
        try:
            yield
        finally:
            self.leave(token)

    def enter(self, owner: object, training: bool) -> None:
        """A module begins to run."""
        self._running.append(id(owner))
        if not (training and torch.is_grad_enabled()):
            return
        self.used = True
        if self._depth is None:
            self._depth = len(self._running)
            self._switched = [parameter for parameter in self._off if parameter.requires_grad]
            for parameter in self._switched:
                parameter.requires_grad_(False)
        if self._order is not None and id(owner) in self._layer_of:
            self._order.append(self._layer_of[id(owner)])

    def leave(self, owner: object) -> None:
        """A module has run, or failed."""
        if id(owner) not in self._running:
            return
        while self._running.pop() != id(owner):
            pass
        if self._depth is not None and len(self._running) < self._depth:
            for parameter in self._switched:
                parameter.requires_grad_(True)
            self._depth, self._switched = None, []
            if self._order:
                self._check_order() if owner is self.model else self._order.clear()

    def _check_order(self) -> None:
        first = list(dict.fromkeys(self._order or ()))
        self._order = None
        for before, after in pairwise(first):
            if before > after:
                warnings.warn(
                    f"layers: {self.layers[after].name} is listed before {self.layers[before].name} but runs after it; "
                    "steps stay right, but dropping layers saves less. List them in the order of use, or pass "
                    "example_input",
                    UserWarning,
                    stacklevel=4,
                )
                return

    def _reset(self) -> None:
        self._running: list[int] = []
        self._depth: int | None = None
        self._switched: list[nn.Parameter] = []
        self._order: list[int] | None = []
        self._layer_of = {
            id(self.model.get_submodule(name.rpartition(".")[0])): index
            for index, layer in reversed(list(enumerate(self.layers)))
            for name in layer.parameters
        }
        handles = []
        for module in self.model.modules():
            if any(True for _ in module.parameters()):
                handles.append(module.register_forward_pre_hook(_Hook(self, True)))
                handles.append(module.register_forward_hook(_Hook(self, False), always_call=True))
        weakref.finalize(self, _remove, handles)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "layers": self.layers, "used": self.used, "_off": self._off}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


class _Hook:
    """A module's hook. It does not keep the optimizer alive, and in a copy of the module it does nothing."""

    def __init__(self, switch: LayerSwitch | None = None, before: bool = True) -> None:
        self.switch = None if switch is None else weakref.ref(switch)
        self.before = before

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        switch = None if self.switch is None else self.switch()
        if switch is not None:
            if self.before:
                switch.enter(module, module.training)
            else:
                switch.leave(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
