"""Batches: random windows of a token sequence, all its windows in order, and shuffled epochs of examples."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from steepest._checks import check_int


class RandomWindows:
    """An endless iterator over batches of random windows: `x = tokens[s : s + context]`, `y` one position further on.

    The starts are uniform, with replacement. `state_dict` and `load_state_dict` continue it to the bit.

    Args:
        tokens: The token sequence.
        batch_size: Windows per batch.
        context: Length of a window.
        generator: Source of the starts; its state is part of this iterator's.
        device: Where the batches go.

    Raises:
        ValueError: the sequence is too short for one window.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "length"],
        batch_size: int,
        context: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_windows(tokens, batch_size, context)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        self.tokens, self.batch_size, self.context = tokens, batch_size, context
        self.generator, self.device = generator, device
        self.steps = 0
        self._offsets = torch.arange(context + 1)

    def __iter__(self) -> "RandomWindows":
        return self

    def __next__(self) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
        count = len(self.tokens) - self.context
        starts = torch.randint(count, (self.batch_size, 1), generator=self.generator, device=self.generator.device)
        self.steps += 1
        return _pair(self.tokens[starts.cpu() + self._offsets], self.device)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches drawn and the generator's state."""
        return {"steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken."""
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]


class Windows:
    """A finite iterable over the non-overlapping windows of a sequence, in order, the same each time.

    The tokens after the last full window are left out; the last batch may be smaller.

    Args:
        tokens: The token sequence.
        batch_size: Windows per batch.
        context: Length of a window.
        max_batches: Take only so many batches, of windows spread evenly over the sequence; all if None.
        device: Where the batches go.

    Raises:
        ValueError: the sequence is too short for one window.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "length"],
        batch_size: int,
        context: int,
        max_batches: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_windows(tokens, batch_size, context)
        self.tokens, self.batch_size, self.context, self.device = tokens, batch_size, context, device
        count = (len(tokens) - 1) // context
        self._starts = torch.arange(count) * context
        if max_batches is not None:
            check_int("max_batches", max_batches)
            kept = min(count, max_batches * batch_size)
            self._starts = self._starts[torch.arange(kept) * count // kept]

    def __len__(self) -> int:
        return math.ceil(len(self._starts) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]]:
        offsets = torch.arange(self.context + 1)
        for starts in self._starts.split(self.batch_size):
            yield _pair(self.tokens[starts.unsqueeze(1) + offsets], self.device)


class Epochs:
    """An endless iterator over batches of examples, in epochs of a new random order each.

    A rest smaller than a batch is left out of its epoch. `state_dict` and `load_state_dict` continue it to the bit.

    Args:
        x: The inputs, one per row.
        y: The labels.
        batch_size: Examples per batch, at most their number.
        generator: Source of the orders; its state is part of this iterator's.
        device: Where the batches go.

    Raises:
        ValueError: the batch size is below 1 or above the number of examples.
    """

    def __init__(
        self,
        x: Shaped[Tensor, "examples *shape"],
        y: Shaped[Tensor, "examples *labels"],
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        check_int("batch_size", batch_size)
        if batch_size > len(x):
            raise ValueError(f"batch_size must be at most the {len(x)} examples, got {batch_size}")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        self.x, self.y, self.batch_size, self.generator, self.device = x, y, batch_size, generator, device
        self.per_epoch = len(x) // batch_size
        self.steps = 0
        self._order = torch.empty(0, dtype=torch.long)

    def __iter__(self) -> "Epochs":
        return self

    def __next__(self) -> tuple[Shaped[Tensor, "batch *shape"], Shaped[Tensor, "batch *labels"]]:
        position = self.steps % self.per_epoch
        if position == 0:
            self._order = torch.randperm(len(self.x), generator=self.generator, device=self.generator.device).cpu()
        chosen = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        self.steps += 1
        return self.x[chosen].to(self.device), self.y[chosen].to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches drawn, the current order and the generator's state."""
        return {"steps": self.steps, "order": self._order.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken."""
        self.generator.set_state(state["generator"])
        self.steps, self._order = state["steps"], state["order"].clone()


class InOrder:
    """A finite iterable over all examples in order, the same each time; the last batch may be smaller.

    Args:
        x: The inputs, one per row.
        y: The labels.
        batch_size: Examples per batch.
        device: Where the batches go.
    """

    def __init__(
        self,
        x: Shaped[Tensor, "examples *shape"],
        y: Shaped[Tensor, "examples *labels"],
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        check_int("batch_size", batch_size)
        self.x, self.y, self.batch_size, self.device = x, y, batch_size, device

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Shaped[Tensor, "batch *shape"], Shaped[Tensor, "batch *labels"]]]:
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            yield x.to(self.device), y.to(self.device)


def _check_windows(tokens: Tensor, batch_size: int, context: int) -> None:
    check_int("batch_size", batch_size)
    check_int("context", context)
    if len(tokens) < context + 1:
        raise ValueError(
            f"context must be below the {len(tokens)} tokens of this split, got {context}; give more text or shorten it"
        )


def _pair(
    window: Int[Tensor, "batch longer"], device: torch.device | str
) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
    window = window.long().to(device)
    return window[:, :-1], window[:, 1:]
