"""Norms of steps in one pass over the memory, or from an even part of it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 17


def distance(now: Tensor, old: Tensor) -> Tensor:
    """Norm of the difference, in float32 at least."""
    return torch.linalg.vector_norm(now - old, dtype=torch.float32 if now.itemsize < 4 else None)


def joined(norms: Sequence[Tensor]) -> float:
    """The norm of parts from their norms."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for norm in norms:
        groups.setdefault((norm.device, norm.dtype), []).append(norm)
    return math.sqrt(sum(float(torch.stack(group).double().square().sum()) for group in groups.values()))


def blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces that fit into a cache."""
    first = tensors[0]
    if first.numel() <= _BLOCK or first.is_cuda or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return list(zip(*(tensor.view(-1).split(_BLOCK) for tensor in tensors), strict=True))


def part(tensor: Tensor) -> tuple[Tensor, float]:
    """Evenly spaced blocks of a large tensor, and the factor from their norm to the whole one's."""
    if tensor.numel() <= 1 << 15 or not tensor.is_contiguous():
        return tensor, 1.0
    count = tensor.numel() >> 10
    piece = tensor.view(-1)[: count << 10].view(count, -1)[::32]
    return piece, math.sqrt(tensor.numel() / piece.numel())
