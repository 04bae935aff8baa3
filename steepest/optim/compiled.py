"""The batched work of a step as functions that `torch.compile` has compiled, one for each kind of chunk."""

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from steepest.optim.buckets import Bucket, advance, apply, prepare
from steepest.optim.step_rules import StepRule

# What of a group the batched work reads; numbers among them become constants of the compiled code, except lr.
_SETTINGS = ("momentum", "momentum_form", "nesterov", "interpolation", "weight_decay", "constrained", "maximize")


class Compiled:
    """`advance`, `prepare` and `apply` for chunks, compiled when a kind of chunk is first seen.

    The learning rate reaches compiled code as a tensor, so that a schedule compiles nothing anew.
    """

    def __init__(self) -> None:
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def advance(self, chunk: Bucket, group: dict[str, Any]) -> None:
        """Move the momenta and the parameters of a chunk by a step of unit length."""
        self._call(_advance, chunk, group)

    def prepare(self, chunk: Bucket, group: dict[str, Any], rule: StepRule) -> tuple[Tensor, Tensor, Tensor]:
        """Move the momenta; return what a step rule is told (see `buckets.measured`)."""
        return self._call(_prepare, chunk, group, rule)

    def apply(self, chunk: Bucket, direction: Tensor, group: dict[str, Any], lengths: Tensor) -> None:
        """Decay and move the parameters of a chunk."""
        self._call(_apply, chunk, group, direction, lengths)

    def _call(self, function: Callable[..., Any], chunk: Bucket, group: dict[str, Any], *rest: Any) -> Any:
        first = chunk.parameters[0]
        key = (function, len(chunk.parameters), first.shape, first.dtype, first.device, chunk.norm, chunk.factor)
        if key not in self._functions:
            # torch.compile keeps its versions with the code, and not many of them: each kind gets code of its own.
            own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self._functions[key] = torch.compile(own, dynamic=False)
        settings = {name: group[name] for name in _SETTINGS}
        lr = group["lr"]
        settings["lr"] = lr if isinstance(lr, Tensor) else torch.tensor(float(lr), dtype=torch.float64)
        parts = (chunk.parameters, chunk.gradients, chunk.momenta)
        return self._functions[key](chunk.norm, chunk.factor, *parts, settings, *rest)


def _advance(norm: Any, factor: float, parameters: Any, gradients: Any, momenta: Any, settings: Any) -> None:
    advance(Bucket(norm, factor, parameters, gradients, momenta), settings)


def _prepare(
    norm: Any, factor: float, parameters: Any, gradients: Any, momenta: Any, settings: Any, rule: StepRule
) -> tuple[Tensor, Tensor, Tensor]:
    return prepare(Bucket(norm, factor, parameters, gradients, momenta), settings, rule)


def _apply(
    norm: Any,
    factor: float,
    parameters: Any,
    gradients: Any,
    momenta: Any,
    settings: Any,
    direction: Tensor,
    lengths: Tensor,
) -> None:
    apply(Bucket(norm, factor, parameters, gradients, momenta), direction, settings, lengths)
