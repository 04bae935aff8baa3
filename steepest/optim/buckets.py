"""Blocks of parameters that are updated together: their momenta, directions, and steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.geometry import Direction, Norm
from steepest.optim.step_rules import StepRule

# Elements handled at once. On a processor all of a chunk's temporaries stay in a core's cache; matrix functions want a
# few matrices at a time even so, to share among the threads. Elsewhere they take what one workspace holds.
_CHEAP_CHUNK = 1 << 18
_MATRIX_CHUNK = 1 << 17
_FEWEST_MATRICES = 4
_DEVICE_CHUNK = 1 << 26


@dataclass
class Bucket:
    """Blocks that one batched computation updates: all (m, n), or all (batch, m, n)."""

    norm: Direction
    factor: float
    parameters: list[Tensor]
    gradients: list[Tensor]
    momenta: list[Tensor]

    def append(self, parameter: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        self.parameters.append(parameter)
        self.gradients.append(gradient)
        self.momenta.append(momentum)

    def slice(self, start: int, end: int) -> "Bucket":
        return Bucket(
            self.norm, self.factor, self.parameters[start:end], self.gradients[start:end], self.momenta[start:end]
        )


def chunks(bucket: Bucket, foreach: bool | None, by_rows: bool = False) -> Iterator[Bucket]:
    """Pieces of a bucket: single blocks without `foreach`, else as many as the norm's workspace holds.

    With `by_rows`, a matrix too large for that comes in pieces of rows where the norm treats each row alone.
    """
    limit = _limit(bucket)
    if by_rows and bucket.norm.rowwise and bucket.parameters[0].ndim == 2 and bucket.parameters[0].numel() > limit:
        yield from _row_pieces(bucket, limit)
        return
    if foreach is False:
        limit = 0
    start = size = 0
    for end, block in enumerate(bucket.parameters):
        if size and size + block.numel() > limit:
            yield bucket.slice(start, end)
            start, size = end, 0
        size += block.numel()
    yield bucket.slice(start, len(bucket.parameters))


def _limit(bucket: Bucket) -> int:
    """How many elements a chunk may have, unless it is a single block."""
    if not bucket.norm.costly:
        return _CHEAP_CHUNK
    block = bucket.parameters[0]
    if block.device.type != "cpu":
        return _DEVICE_CHUNK
    return max(_MATRIX_CHUNK, _FEWEST_MATRICES * block.shape[-2:].numel())


def _row_pieces(bucket: Bucket, limit: int) -> Iterator[Bucket]:
    height = bucket.parameters[0].shape[0]
    rows = -(-height // -(-bucket.parameters[0].numel() // limit))  # as even as they come
    for blocks in zip(bucket.parameters, bucket.gradients, bucket.momenta, strict=True):
        for parameter, gradient, momentum in zip(*(block.split(rows) for block in blocks), strict=True):
            yield Bucket(bucket.norm, bucket.factor, [parameter], [gradient], [momentum])


def advance(chunk: Bucket, group: dict[str, Any]) -> None:
    """Move the momenta and the parameters of a chunk by a step of unit length."""
    momentum = moved_momentum(chunk, group)
    alone = len(chunk.parameters) == 1 and momentum.dtype in (torch.float32, torch.float64)
    multiplier = chunk.norm.multiplier(momentum) if alone else None
    decay, scale = _decay_and_scale(chunk, group, momentum.device)
    if multiplier is None or isinstance(scale, Tensor):
        kept = momentum is chunk.momenta[0] or momentum is chunk.gradients[0]
        apply(chunk, chunk.norm.direction(momentum) if kept else chunk.norm.direction_(momentum), group)
    else:
        _add_multiple(chunk.parameters[0], momentum, multiplier, decay, scale)


def _add_multiple(parameter: Tensor, momentum: Tensor, multiplier: Tensor, decay: Any, scale: float) -> None:
    """`parameter * decay + scale * multiplier * momentum` in place, a few rows at a time, in cache."""
    rows = -(-parameter.shape[-2] // -(-parameter.numel() // _CHEAP_CHUNK))
    per_row = multiplier.shape[-2] > 1
    pieces = zip(parameter.split(rows, dim=-2), momentum.split(rows, dim=-2), strict=True)
    for index, (piece, direction) in enumerate(pieces):
        if decay != 1:
            piece.mul_(decay)
        factor = multiplier.narrow(-2, index * rows, piece.shape[-2]) if per_row else multiplier
        piece.addcmul_(direction, factor, value=scale)


def moved_momentum(chunk: Bucket, group: dict[str, Any]) -> Tensor:
    """Move the momenta of a chunk; return the read-only matrices whose direction is taken, stacked."""
    together = _adjoining(chunk.momenta) if group["momentum"] > 0 else None
    if together is not None:
        ahead = moved_momenta([torch.stack(chunk.gradients)], [together], group)[0]
        return ahead.clone() if ahead is together else ahead
    return stacked(moved_momenta(chunk.gradients, chunk.momenta, group), chunk.norm.spans_batch)


def adjoining(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Zeros like each parameter (all of one shape), one behind the other in memory where that saves time."""
    first = parameters[0]
    if first.ndim != 2 or first.numel() > _MATRIX_CHUNK or not all(p.is_contiguous() for p in parameters):
        return [torch.zeros_like(p, memory_format=torch.preserve_format) for p in parameters]
    return list(first.new_zeros(len(parameters), *first.shape).unbind())


def _adjoining(blocks: Sequence[Tensor]) -> Tensor | None:
    """The blocks as one tensor, without a copy, or None if they do not lie one behind the other."""
    first, count = blocks[0], len(blocks)
    if count == 1 or first.ndim != 2 or not first.is_contiguous() or torch.compiler.is_compiling():
        return None
    start, length, offset = first.data_ptr(), first.numel(), first.storage_offset()
    if (offset + count * length) * first.itemsize > first.untyped_storage().nbytes():
        return None
    step = length * first.itemsize
    if [block.data_ptr() for block in blocks] != list(range(start, start + count * step, step)):
        return None
    return first.as_strided((count, *first.shape), (length, *first.stride()), offset)


def moved_momenta(gradients: Sequence[Tensor], momenta: Sequence[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
    """Move the momenta in place; return the read-only tensors whose direction is taken, one for each."""
    weight = group["momentum"]
    if weight == 0:
        return gradients
    gradients, momenta = list(gradients), list(momenta)
    if gradients[0].dtype != momenta[0].dtype:
        gradients = [gradient.to(momenta[0].dtype) for gradient in gradients]
    if group["momentum_form"] == "lion":
        ahead = torch._foreach_lerp(gradients, momenta, group["interpolation"])
        torch._foreach_lerp_(momenta, gradients, 1 - weight)
        return ahead
    if group["momentum_form"] == "ema":
        torch._foreach_lerp_(momenta, gradients, 1 - weight)
        return torch._foreach_lerp(gradients, momenta, weight) if group["nesterov"] else momenta
    torch._foreach_mul_(momenta, weight)
    torch._foreach_add_(momenta, gradients)
    return torch._foreach_add(gradients, momenta, alpha=weight) if group["nesterov"] else momenta


def stacked(blocks: Sequence[Tensor], spans_batch: bool) -> Tensor:
    """All matrices of the blocks in one tensor (batch, m, n), or a single block as it is."""
    if len(blocks) == 1:
        return blocks[0]
    return torch.stack(list(blocks)) if blocks[0].ndim == 2 or spans_batch else torch.cat(list(blocks))


def prepare(chunk: Bucket, group: dict[str, Any], rule: StepRule) -> tuple[Tensor, Tensor, Tensor]:
    """Move the momenta of a chunk; return what a step rule is told, see `measured`."""
    return measured(chunk, moved_momentum(chunk, group), group, rule)


def measured(chunk: Bucket, momentum: Tensor, group: dict[str, Any], rule: StepRule) -> tuple[Tensor, Tensor, Tensor]:
    r"""What a step rule is told: the direction v of a chunk, $\langle m, v \rangle$ and $\|v\|$, one per matrix."""
    direction, dual = chunk.norm.direction_and_dual(momentum)
    pairing = dual * chunk.factor if rule.scaled else dual
    if not group["constrained"]:
        return direction, pairing, torch.ones_like(dual)
    weights = stacked(chunk.parameters, chunk.norm.spans_batch)
    if group["maximize"]:
        weights = weights.neg()
    moved = dual > 0
    wide = torch.promote_types(weights.dtype, torch.float32)
    inside = (weights.to(wide) * momentum.to(wide)).sum(tuple(range(dual.ndim, weights.ndim)))
    direction = direction.add_(weights, alpha=1 / chunk.factor)
    direction *= moved.reshape(*dual.shape, *(1 for _ in range(weights.ndim - dual.ndim)))
    pairing = torch.where(moved, dual * chunk.factor + inside, 0.0)
    return direction, pairing, _norm(chunk.norm).norm(direction) if rule.needs_sizes else pairing


def joined(values: list[Tensor]) -> Tensor:
    """One vector of the numbers that belong to all matrices, in single precision or better."""
    device = values[0].device
    wide = [value.double() if value.dtype == torch.float64 else value.float() for value in values]
    return torch.cat([value.flatten().to(device) for value in wide])


def apply(chunk: Bucket, direction: Tensor, group: dict[str, Any], lengths: Tensor | None = None) -> None:
    """Decay and move the parameters of a chunk, against its direction, which is overwritten."""
    parameters = chunk.parameters
    decay, scale = _decay_and_scale(chunk, group, direction.device, lengths)
    if isinstance(decay, Tensor) or decay != 1:
        torch._foreach_mul_(parameters, decay)
    if isinstance(scale, Tensor):
        direction, scale = direction.mul_(scale), 1.0
    if len(parameters) == 1:
        parameters[0].add_(direction, alpha=scale)
    elif direction.ndim > parameters[0].ndim:
        torch._foreach_add_(parameters, direction.unbind(), alpha=scale)
    else:
        torch._foreach_add_(parameters, direction.split([len(block) for block in parameters]), alpha=scale)


def _decay_and_scale(
    chunk: Bucket, group: dict[str, Any], device: torch.device, lengths: Tensor | None = None
) -> tuple[float | Tensor, float | Tensor]:
    """Factors of the parameters and of the direction in their next sum."""
    lr = group["lr"].to(device).reshape(()) if isinstance(group["lr"], Tensor) else float(group["lr"])
    decay = 1 - lr * group["weight_decay"]
    if group["constrained"]:  # with lengths, the direction leads to the ball's point already
        decay = 1 - lr if lengths is None else 1.0
    scale = lr * (chunk.factor if group["maximize"] else -chunk.factor)
    # The length goes into the scale first: alone it may pass the range of half precision.
    return decay, scale if lengths is None else scale * lengths


def _norm(norm: Direction) -> Norm:
    assert isinstance(norm, Norm)  # the constrained form takes no other direction
    return norm
