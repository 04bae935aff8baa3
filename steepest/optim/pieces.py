"""Lists of tensors worked on piece by piece, so that all operands of a piece stay in a core's cache."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# Elements handled at once. On a CPU, random numbers are drawn in these pieces, so another size is other noise.
_PIECE = 1 << 16
_PIECE_ELSEWHERE = 1 << 24
_MASK = (1 << 64) - 1

Row = tuple[Tensor, ...]


def blocks(rows: Iterable[Row], foreach: bool | None = None) -> Iterator[tuple[list[Tensor], ...]]:
    """Rows of tensors of one shape each, as columns of pieces that are worked on together, in cache."""
    waiting: dict[tuple[Any, ...], list[Row]] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    for row in rows:
        first = row[0]
        key = (first.device, first.dtype)
        limit = _PIECE if first.device.type == "cpu" else _PIECE_ELSEWHERE
        pieces: Iterable[Row] = (row,)
        if first.numel() > limit and all(tensor.is_contiguous() for tensor in row):
            pieces = zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True)
        for piece in pieces:
            size = piece[0].numel()
            if key in waiting and (sizes[key] + size > limit or foreach is False):
                yield tuple(list(column) for column in zip(*waiting.pop(key), strict=True))
            if key not in waiting:
                waiting[key], sizes[key] = [], 0
            waiting[key].append(piece)
            sizes[key] += size
    for batch in waiting.values():
        yield tuple(list(column) for column in zip(*batch, strict=True))


def restore(done: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    """Copy the second tensors of each pair over the first ones, the last pair first, and drop the pairs."""
    while done:
        torch._foreach_copy_(*done[-1])
        done.pop()


def alike(buffer: Tensor, parameter: Tensor) -> bool:
    """Whether two tensors have the same shape, memory order, dtype and device."""
    same = buffer.shape == parameter.shape and buffer.stride() == parameter.stride()
    return same and buffer.dtype == parameter.dtype and buffer.device == parameter.device


def mixed_seed(seed: int, number: int) -> int:
    """A seed for each number, well spread (the finaliser of splitmix64)."""
    value = (seed + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
