"""Batches of any shape: moving them, counting them, and a feed that can go on where it was."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steepest.lab.streams import RandomStream

EPOCH_STRIDE = 1_000_003


class NoBatchError(Exception):
    """The training batches of a task are empty."""


class Feed:
    """The training batches of a task at a seed: endless, the same for every method, and resumable.

    A finite iterable is begun again when it ends: a re-usable one (a list, a DataLoader) by `iter`, a one-shot one (a
    generator) by calling `task.batches("train", another seed)`, so that a generator seeded by its argument gives a
    new order in each epoch. An iterator with `state_dict` and `load_state_dict` is saved with them; any other is
    fed forward on resume.
    """

    def __init__(self, task: Any, seed: int):
        self.task, self.seed = task, seed
        self._start()

    def next(self) -> Any:
        """The next batch."""
        with self.stream:
            for _ in range(2):
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    self._begin(self.epoch + 1)
                    continue
                self.count += 1
                return batch
        raise NoBatchError(f"batches('train', {self.seed}) gives no batch")

    def state_dict(self) -> dict[str, Any]:
        """Where the feed is."""
        own = self._iterator.state_dict() if _saves(self._iterator) else None  # type: ignore[attr-defined]
        return {"count": self.count, "epoch": self.epoch, "own": own, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved feed was."""
        self._start()
        if state["own"] is not None and _saves(self._iterator):
            with self.stream:
                while self.epoch < state["epoch"]:
                    self._begin(self.epoch + 1)
            self._iterator.load_state_dict(state["own"])  # type: ignore[attr-defined]
            self.count = state["count"]
        else:
            while self.count < state["count"]:
                self.next()
        self.stream.load_state_dict(state["stream"])

    def _start(self) -> None:
        self.stream = RandomStream(self.seed)
        self.count = 0
        with self.stream:
            self._source = self.task.batches("train", self.seed)
            self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        if epoch > 0 and iter(self._source) is self._source:
            self._source = self.task.batches("train", self.seed + EPOCH_STRIDE * epoch)
        self._iterator: Iterator[Any] = iter(self._source)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on a device; containers keep their type."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else _rebuilt(batch, moved, device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: to_device(getattr(batch, f.name), device) for f in fields(batch) if f.init})
    move = getattr(batch, "to", None)
    return move(device) if callable(move) else batch


def count_examples(batch: Any) -> int | None:
    """Size of the leading dimension of the first tensor found; None where there is none."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    elif is_dataclass(batch) and not isinstance(batch, type):
        batch = [getattr(batch, f.name) for f in fields(batch)]
    if isinstance(batch, list | tuple):
        for item in batch:
            found = count_examples(item)
            if found is not None:
                return found
    return None


def _rebuilt(batch: Any, moved: dict[Any, Any], device: torch.device) -> Any:
    move = getattr(batch, "to", None)
    return move(device) if callable(move) else moved


def _saves(iterator: Any) -> bool:
    return callable(getattr(iterator, "state_dict", None)) and callable(getattr(iterator, "load_state_dict", None))
