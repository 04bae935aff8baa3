"""Trying a task out before a race begins, so that a mistake in it is one clear message."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from steepest.lab.batches import Feed, NoBatchError, to_device
from steepest.lab.settings import RaceError
from steepest.lab.streams import RandomStream
from steepest.lab.trial import evaluate

MOST_VAL_BATCHES = 10_000


def check_task(task: Any, spec: str, device: torch.device) -> None:
    """One forward and backward pass on one training batch, and one validation batch.

    Raises:
        RaceError: what is wrong with the task, naming the method of it.
    """
    with RandomStream(0, device):
        model = _call(lambda: task.model(0), spec, "model(0)")
        if not isinstance(model, nn.Module):
            raise RaceError(
                f"model(0) of the task {spec} returned {type(model).__name__}; it must be a torch.nn.Module"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise RaceError(f"model(0) of the task {spec} has no trainable parameter")
        model = model.to(device).train()
    feed = _call(lambda: Feed(task, 0), spec, "batches('train', 0)")
    batch = to_device(_call(feed.next, spec, "batches('train', 0)"), device)
    with RandomStream(0, device):
        loss = _call(lambda: task.loss(model, batch), spec, "loss(model, batch)")
        _check_loss(loss, spec)
        _call(loss.backward, spec, "the backward pass of loss(model, batch)")
    if all(p.grad is None for p in model.parameters()):
        raise RaceError(f"loss(model, batch) of the task {spec} does not depend on the model's parameters")
    _check_validation(task, spec, model, device)


def _check_loss(loss: Any, spec: str) -> None:
    what = f"loss(model, batch) of the task {spec}"
    if not isinstance(loss, Tensor):
        raise RaceError(f"{what} returned {type(loss).__name__}; it must be a scalar torch.Tensor")
    if loss.ndim != 0 or loss.is_complex():
        raise RaceError(
            f"{what} has shape {tuple(loss.shape)} and dtype {loss.dtype}; it must be a real scalar (mean it)"
        )
    if not loss.requires_grad:
        raise RaceError(f"{what} is not differentiable (it has no gradient); do not detach it or call .item()")
    if not math.isfinite(loss.item()):
        raise RaceError(f"{what} is {loss.item()} at the start; check the data and the model")


def _check_validation(task: Any, spec: str, model: nn.Module, device: torch.device) -> None:
    what = f"batches('val', 0) of the task {spec}"
    firsts = []
    for _ in range(2):
        with RandomStream(0, device):
            first, count = None, 0
            for item in _call(lambda: iter(task.batches("val", 0)), spec, "batches('val', 0)"):
                first = item if count == 0 else first
                count += 1
                if count > MOST_VAL_BATCHES:
                    raise RaceError(f"{what} gives more than {MOST_VAL_BATCHES} batches; it must end")
                if firsts:
                    break
        if count == 0:
            raise RaceError(f"{what} gives no batch; it must give at least one")
        firsts.append(first)
    if not _equal(*firsts):
        raise RaceError(f"{what} gives other batches at each call; methods can only be compared on the same ones")
    with RandomStream(0, device):
        single = _Single(task, firsts[0])
        loss, _ = _call(lambda: evaluate(single, model, device), spec, "loss or metrics on a validation batch")
    if not math.isfinite(loss):
        raise RaceError(f"the loss on the first validation batch of the task {spec} is {loss} at the start")


class _Single:
    """The task, with one validation batch."""

    def __init__(self, task: Any, batch: Any):
        self._task, self._batch = task, batch
        self.loss = task.loss
        self.metrics = getattr(task, "metrics", None)

    def batches(self, split: str, seed: int) -> list[Any]:
        return [self._batch]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b)


def _call(action: Any, spec: str, what: str) -> Any:
    try:
        return action()
    except RaceError:
        raise
    except NoBatchError as error:
        raise RaceError(f"{what} of the task {spec} gives no batch; it must give at least one") from error
    except Exception as error:
        raise RaceError(f"{what} of the task {spec} raised {type(error).__name__}: {error}") from error
