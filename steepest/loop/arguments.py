"""The arguments of `run`, judged before anything happens."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from steepest.loop.checkpoint import Part
from steepest.loop.record import Metrics
from steepest.loop.rules import positive_int, positive_seconds

CHECKPOINT_SECONDS = 60.0
_STEPPER_METHODS = ("step", "state_dict", "load_state_dict")


def make_advance(stepper: Any, closure: Any, scheduler: Any) -> Callable[[], Metrics]:
    """The function that makes one step and returns its metrics.

    Raises:
        TypeError: `stepper` is neither a stepper nor an optimizer, or `closure` or `scheduler` do not go with it.
    """
    if isinstance(stepper, type):
        raise TypeError(f"stepper must be an object, got the class {stepper.__name__}: make an instance of it")
    name = type(stepper).__name__
    if isinstance(stepper, Optimizer):
        if not callable(closure):
            raise TypeError(
                f"a torch optimizer ({name}) needs closure=, a function that zeroes the gradients, computes the loss, "
                f"calls backward and returns the loss; got {closure!r}"
            )
        _check_scheduler(scheduler)
        return lambda: _optimizer_step(stepper, closure)
    if isinstance(stepper, nn.Module):
        raise TypeError(f"stepper must be a stepper or a torch optimizer, got the module {name}: pass its optimizer")
    missing = [f"{method}()" for method in _STEPPER_METHODS if not callable(getattr(stepper, method, None))]
    if missing:
        raise TypeError(f"stepper must have step(), state_dict() and load_state_dict(); {name} has no {missing[0]}")
    for argument, value in (("closure", closure), ("scheduler", scheduler)):
        if value is not None:
            raise TypeError(f"{argument}= goes with a torch optimizer only, and stepper is a {name}")

    def step() -> Metrics:
        metrics = stepper.step()
        if not isinstance(metrics, Mapping):
            raise TypeError(f"{name}.step() must return a mapping of metrics, got {type(metrics).__name__}")
        return Metrics(metrics)

    return step


def make_parts(stepper: Any, scheduler: Any, state: Mapping[str, Any] | None) -> dict[str, Part]:
    """What a checkpoint of this run holds, by name.

    Raises:
        TypeError, ValueError: `state` is not a mapping of names to objects with a state.
    """
    state = {} if state is None else state
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to objects, as in {{'model': model}}; got {state!r}")
    parts = {"stepper": Part(stepper.state_dict, stepper.load_state_dict)}
    if scheduler is not None:
        parts["scheduler"] = Part(scheduler.state_dict, scheduler.load_state_dict)
    if isinstance(stepper, Optimizer):
        saved = {id(p) for owner in state.values() if isinstance(owner, nn.Module) for p in owner.parameters()}
        bare: list[Tensor] = [p for group in stepper.param_groups for p in group["params"] if id(p) not in saved]
        if bare:
            parts["parameters"] = Part.parameters(bare)
    for name, owner in state.items():
        if not isinstance(name, str) or name in parts:
            raise ValueError(f"state: {name!r} cannot be used as a name here; the run itself uses {sorted(parts)}")
        parts[name] = Part.of(name, owner)
    return parts


def make_cadence(checkpoint: Any, every: Any, seconds: Any) -> tuple[int | None, float]:
    """How often to save: every so many steps (None: never), and after so many seconds (infinity: never)."""
    if checkpoint is None:
        for name, value in (("checkpoint_every", every), ("checkpoint_seconds", seconds)):
            if value is not None:
                raise ValueError(f"{name}={value!r} needs checkpoint=, the path of the file to write")
    elif not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint must be a path, got {checkpoint!r}")
    if every is None and seconds is None:
        return None, CHECKPOINT_SECONDS
    return (
        None if every is None else positive_int("checkpoint_every", every),
        float("inf") if seconds is None else positive_seconds("checkpoint_seconds", seconds),
    )


def callables(argument: str, given: Any) -> list[Callable[..., Any]]:
    """One function or several, as a list.

    Raises:
        TypeError: something in it is not a function, or is a class where an instance is meant.
    """
    several = [given] if callable(given) or not isinstance(given, Iterable) else list(given)
    for one in several:
        if isinstance(one, type):
            raise TypeError(f"{argument}: {one.__name__} is a class; make an instance of it: {one.__name__}(...)")
        if not callable(one):
            raise TypeError(f"{argument} must be a function or a list of functions, got {one!r}")
    return several


def _check_scheduler(scheduler: Any) -> None:
    if scheduler is None:
        return
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "scheduler: ReduceLROnPlateau needs a metric; step it in a callback, and give it in state= to checkpoint it"
        )
    if isinstance(scheduler, type) or not all(callable(getattr(scheduler, m, None)) for m in _STEPPER_METHODS):
        raise TypeError(f"scheduler must be a learning-rate scheduler of torch, got {scheduler!r}")


def _optimizer_step(optimizer: Optimizer, closure: Callable[[], Any]) -> Metrics:
    first: dict[str, Any] = {}
    names: tuple[str, ...] = getattr(optimizer, "loss_names", ("loss",))  # those of a game have several

    def evaluate() -> Any:
        loss, metrics = _split(closure(), len(names))
        if not first:
            losses = (loss,) if len(names) == 1 else loss
            first.update({n: x.detach() if isinstance(x, Tensor) else x for n, x in zip(names, losses, strict=True)})
            first.update(metrics)
        return loss

    optimizer.step(evaluate)
    if not first:
        raise TypeError(f"{type(optimizer).__name__}.step did not call the closure, so there is no loss to report")
    return Metrics(first)


def _split(returned: Any, count: int) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        loss, metrics = returned
    else:
        loss, metrics = returned, {}
    if count > 1:
        if not isinstance(loss, tuple | list) or len(loss) != count:
            raise TypeError(
                f"closure must return {count} losses, or (losses, mapping of metrics), got {type(returned).__name__}"
            )
    elif loss is None or isinstance(loss, tuple | list | dict):
        raise TypeError(f"closure must return the loss, or (loss, mapping of metrics), got {type(returned).__name__}")
    return loss, metrics
