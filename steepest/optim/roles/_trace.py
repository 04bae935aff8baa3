"""What one forward pass shows: which layers read the model's input and which one makes its output."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Trace:
    """Modules (by identity) in the order they ran, and those at the two ends of the model."""

    order: list[int] = field(default_factory=list)
    reads_input: set[int] = field(default_factory=set)
    makes_output: set[int] = field(default_factory=set)


def trace(model: nn.Module, example_input: Any) -> Trace:
    """Run `model` once on `example_input` without gradients, in eval mode, and watch its leaf modules.

    Training flags, buffers and the CPU random state are as before afterwards.

    Raises:
        ValueError: the model does not run on the example; the message holds the model's own error.
    """
    found = Trace()
    inputs = {_where(tensor) for tensor in _tensors(example_input)}
    produced: dict[int, list[Any]] = {}
    keep: list[Tensor] = []

    def watch(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        found.order.append(id(module))
        if any(_where(tensor) in inputs for tensor in _tensors(given)):
            found.reads_input.add(id(module))
        outputs = list(_tensors(result))
        keep.extend(outputs)
        produced[id(module)] = [_where(tensor) for tensor in outputs]

    leaves = [module for module in model.modules() if not module._modules and module._parameters]
    handles = [module.register_forward_hook(watch) for module in leaves]
    try:
        with _undisturbed(model), torch.no_grad():
            output = _call(model, example_input)
    except Exception as error:
        raise ValueError(f"example_input: the model does not run on it ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()
    ends = {_where(tensor) for tensor in _tensors(output)}
    found.makes_output = {key for key, places in produced.items() if ends & set(places)}
    return found


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    return model(example)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, flag in training:
            module.training = flag
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _where(tensor: Tensor) -> int:
    """Views of a tensor share its storage, so a reshaped input or output is still recognised."""
    return tensor.untyped_storage().data_ptr()


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        if thing.numel():
            yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, tuple | list):
        for value in thing:
            yield from _tensors(value)
