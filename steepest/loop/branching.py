"""Branches of a run and its decayed checkpoints: what schedules without a fixed budget ask of a training loop."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def branch(state: Mapping[str, Any]) -> dict[str, Any]:
    """An independent copy of a run: train the copy, and the run does not notice.

    All is copied together, so that the optimizer of the copy holds the parameters of the model of the copy, and its
    scheduler that optimizer. Gradients are not copied, nor hooks that were put on the optimizer. In a callback of
    `run`, where the scheduler has not been told of the last update yet, the one of the copy is.

    Args:
        state: what the run is made of, by name: the model, the optimizer, the scheduler, a `torch.Generator` that the
            batches come from, a gradient scaler, tensors, ...

    Returns:
        The copies, by the same names. Closures still refer to the run itself: make new ones for the copy.

    Raises:
        TypeError: `state` is no mapping, or something in it cannot be copied.
        ValueError: a scheduler without its optimizer, or an optimizer without the model that it trains, which the copy
            would train unseen.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> twin = branch({"model": model, "optimizer": optimizer})
        >>> twin["optimizer"].param_groups[0]["params"][0] is twin["model"].weight
        True
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to objects, as in {{'model': model}}; got {state!r}")
    _check_whole(state)
    memo: dict[int, Any] = {}
    copies = {}
    for name, owner in state.items():
        try:
            copies[name] = copy.deepcopy(owner, memo)
        except Exception as error:
            raise TypeError(
                f"state[{name!r}], a {type(owner).__name__}, cannot be copied ({error}); leave it out, and make a new "
                "one for the branch"
            ) from error
    for owner in copies.values():
        if getattr(owner, "completed", 0) > getattr(owner, "last_epoch", 0):
            owner.step()
    return copies


def on_checkpoint(scheduler: Any, act: Callable[[int, Mapping[str, float]], Any]) -> Callable[..., Any]:
    """A callback for `run`: calls `act` whenever the schedule has completed a decay.

    Args:
        scheduler: a scheduler of `steepest.optim.schedules`, the one that `run` is given.
        act: called as act(updates, metrics) with the number of optimizer updates made, while the weights are the
            decayed ones: save or evaluate them, or call `scheduler.resume_stable()`. What it returns counts as what a
            callback returns.

    Raises:
        TypeError: the scheduler has no checkpoints, or `act` is no function.
    """
    if not callable(getattr(scheduler, "is_checkpoint", None)) or not hasattr(scheduler, "completed"):
        raise TypeError(f"scheduler must be one with checkpoints, such as steepest.optim.WSDS; got {scheduler!r}")
    if isinstance(act, type) or not callable(act):
        raise TypeError(f"act must be a function of (updates, metrics), got {act!r}")

    def callback(step: int, metrics: Mapping[str, float]) -> Any:
        updates = scheduler.completed
        if updates > scheduler.last_epoch and scheduler.is_checkpoint(updates):
            return act(updates, metrics)
        return None

    return callback


def _check_whole(state: Mapping[str, Any]) -> None:
    known = {id(owner) for owner in state.values()}
    known |= {id(getattr(owner, "optimizer", None)) for owner in state.values() if isinstance(owner, Optimizer)}
    parameters = {
        id(parameter) for owner in state.values() if isinstance(owner, nn.Module) for parameter in owner.parameters()
    } | {id(owner) for owner in state.values() if isinstance(owner, torch.Tensor)}
    for name, owner in state.items():
        inner = getattr(owner, "optimizer", None)
        if isinstance(inner, Optimizer) and id(inner) not in known:
            raise ValueError(f"state[{name!r}], a {type(owner).__name__}, belongs to an optimizer that is not in state")
        if isinstance(owner, Optimizer):
            missing = sum(id(p) not in parameters for group in owner.param_groups for p in group["params"])
            if missing:
                raise ValueError(
                    f"state[{name!r}], a {type(owner).__name__}, has {missing} parameters that are in no module of "
                    "state: give the model, too (or the tensors by name)"
                )
