"""Lengths of rows, columns and matrices that are cut: summed over the ranks that hold the parts, in one message."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.geometry.norms import euclidean, single
from steepest.optim.placement import length_dims
from steepest.optim.shares import Entry, Job, empty_block
from steepest.optim.step_rules import StepRule


def summed_directions(
    entries: Sequence[Entry], matrices: Sequence[Tensor], rule: StepRule, sent: Callable[[Tensor], None]
) -> list[Job]:
    """Directions of rows, columns or whole matrices over their l2 lengths, summed over the ranks that hold them.

    Args:
        entries: parameters whose shares say which cut dimensions lengths run over.
        matrices: what directions are taken of, entry by entry.
        rule: whether dual norms are wanted.
        sent: told of every tensor that is sent.
    """
    found: dict[Any, list[tuple[Entry, Tensor, Tensor | None, Tensor]]] = {}
    for entry, matrix in zip(entries, matrices, strict=True):
        share = entry.share
        dims, _ = length_dims(share.norms[0][0])
        if matrix.numel():
            block = single(share.layout.blocks(matrix)[0])
            lengths = euclidean(block, dims, keepdim=True)
        else:
            block, shape = None, list(empty_block(share.layout, share.placement.own))
            for dim in dims:
                shape[dim] = 1
            wide = torch.promote_types(matrix.dtype, torch.float32)
            lengths = torch.zeros(shape, dtype=wide, device=matrix.device)
        groups = tuple(group for dim, group in share.placement.cuts if dim in (share.sums or ()))
        found.setdefault((groups, lengths.dtype, share.placement.device), []).append((entry, matrix, block, lengths))
    jobs = []
    for (groups, dtype, device), members in found.items():
        counts = [lengths.numel() for *_, lengths in members]
        total = _total(torch.cat([lengths.flatten() for *_, lengths in members]).to(device), groups, dtype, sent)
        for (entry, matrix, block, lengths), own in zip(members, total.split(counts), strict=True):
            job = Job(entry, entry.share.placement.own, matrix, update=torch.empty_like(matrix).contiguous())
            jobs.append(job)
            if block is None:
                continue
            norm, factor = entry.share.norms[0]
            divisor = own.to(block.device).reshape(lengths.shape).clamp_min(torch.finfo(block.dtype).tiny)
            direction = (block / divisor).to(matrix.dtype).mul_(length_dims(norm)[1])
            assert job.update is not None
            entry.share.layout.blocks(job.update)[0].copy_(direction)
            if rule.needs_duals:
                pairing = (block * single(direction)).sum((-2, -1))
                pairing = pairing * factor if rule.scaled else pairing
                first, _ = next(entry.share.elements(job.region))
                job.values.append((entry.first + first, pairing, torch.ones_like(pairing)))
    return jobs


def _total(lengths: Tensor, groups: Sequence[Any], dtype: torch.dtype, sent: Callable[[Tensor], None]) -> Tensor:
    """Lengths of the whole from lengths of the parts, without underflow or overflow of the squares."""
    wide, scale = lengths.double(), None
    if dtype == torch.float64:
        scale = wide.clone()
        for group in groups:
            dist.all_reduce(scale, dist.ReduceOp.MAX, group)
            sent(scale)
        wide = wide / scale.clamp_min(torch.finfo(torch.float64).tiny)
    squares = wide.square()
    for group in groups:
        dist.all_reduce(squares, dist.ReduceOp.SUM, group)
        sent(squares)
    return (squares.sqrt() if scale is None else squares.sqrt() * scale).to(dtype)
