"""What one process does with its part: directions of the matrices it has, moves of the parameters it holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from steepest.geometry import Direction
from steepest.optim.buckets import Bucket, chunks, measured, stacked
from steepest.optim.layout import Layout
from steepest.optim.placement import Placement, Region, common, cut_lengths, numel, shape_of, whole
from steepest.optim.step_rules import StepRule


@dataclass(frozen=True)
class Unit:
    """Matrices that have one owner: a parameter, or some of its batch.

    Attributes:
        region: the part of the parameter.
        cost: of its directions, up to a factor.
        held: how much of it each rank has.
    """

    region: Region
    cost: float
    held: tuple[int, ...]


class Share:
    """What does not change from step to step about one parameter: its blocks, where it lies, what it needs.

    Attributes:
        sums: the cut dimensions over which lengths are summed; None if directions need whole matrices.
        counts: how many elements of the norm's space each block is.
        factor: the factor of all blocks, None if they differ.
    """

    def __init__(
        self, shape: tuple[int, ...], layout: Layout, norms: list[tuple[Direction, float]], placement: Placement
    ) -> None:
        self.shape, self.layout, self.norms, self.placement = shape, layout, norms, placement
        self.coupled = norms[0][0].spans_batch
        self.costly = any(norm.costly for norm, _ in norms)
        # A random rule draws for all matrices of a parameter at once, and not the same for some of them.
        drawn = any(hasattr(norm, "stream") for norm, _ in norms)
        self.batched = layout.kind == "batch" and not self.coupled and not drawn
        sizes = block_shapes(layout, shape)
        self.counts = [1 if self.coupled else size[0] for size in sizes]
        self.cost = float(sum(size[0] * min(size[1:]) ** 2 * max(size[1:]) for size in sizes))
        self.sums = None if self.costly else cut_lengths(norms[0][0], layout, len(shape), placement.cut)
        factors = {factor for _, factor in norms}
        self.factor = factors.pop() if len(factors) == 1 else None

    def place_of_work(self, whole_needed: bool) -> str:
        """Where directions are computed: "here" on what is here, "summed" with lengths over all parts, or "owner".

        Args:
            whole_needed: sums over parts of a matrix are not enough, whatever the norm.
        """
        cut = self.placement.cut
        if not cut:
            return "owner" if self.costly and self.placement.replicated else "here"
        if self.sums is not None and not whole_needed:
            return "summed" if self.sums else "here"
        if self.batched and cut == {0} and not (self.costly and self.placement.replicated):
            return "here"
        return "owner"

    def units(self) -> list[Unit]:
        """The pieces that owners are found for; a batch of matrices is dealt out."""
        if not hasattr(self, "_units"):
            everything, pieces = whole(self.shape), 1
            if self.batched:
                pieces = min(self.shape[0], len(self.placement.regions))
            self._units = []
            for index in range(pieces):
                region = everything
                if pieces > 1:
                    ends = [self.shape[0] * i // pieces for i in (index, index + 1)]
                    region = ((ends[0], ends[1]), *everything[1:])
                held = tuple(numel(common(region, other)) for other in self.placement.regions)
                self._units.append(Unit(region, self.cost * numel(region) / numel(everything), held))
        return self._units

    def elements(self, region: Region) -> Iterator[tuple[int, int]]:
        """First position and number, among the parameter's elements, of those in a region, block by block."""
        first = 0
        for count in self.counts:
            start, end = region[0] if self.batched else (0, 1)
            size = self.shape[0] if self.batched else 1
            yield first + count * start // size, count * (end - start) // size
            first += count


@dataclass(eq=False)
class Entry:
    """One parameter in one step: its local tensors, and the number of its first element among those of all."""

    share: Share
    settings: dict[str, Any]
    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    first: int


@dataclass(eq=False)
class Job:
    """A tensor of whole matrices (or of all that a cheap norm needs) and, once solved, its direction.

    Attributes:
        region: the part of the parameter that `matrix` is.
        weights: the parameter's values there, if they are needed.
        update: the direction, shaped like `matrix`.
        values: (number of the first element, dual norms, sizes), block by block.
    """

    entry: Entry
    region: Region
    matrix: Tensor
    weights: Tensor | None = None
    update: Tensor | None = None
    values: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)


def solve(jobs: Sequence[Job], foreach: bool | None, rule: StepRule) -> int:
    """Compute the directions of all jobs, equal shapes at once; returns how many matrices had a costly norm."""
    stacks: dict[Any, tuple[Any, Bucket, list[Any]]] = {}
    costly = 0
    for job in jobs:
        share, settings = job.entry.share, job.entry.settings
        blocks = share.layout.blocks(job.matrix)
        plain = share.layout.is_plain and job.matrix.ndim == 2 and not share.coupled
        if not plain:
            job.update = torch.empty(job.matrix.shape, dtype=job.matrix.dtype, device=job.matrix.device)
        targets: list[Any] = [None] if job.update is None else share.layout.blocks(job.update)
        weights = blocks if job.weights is None else share.layout.blocks(job.weights)
        places = list(share.elements(job.region))
        for block, weight, target, place, (norm, factor) in zip(
            blocks, weights, targets, places, share.norms, strict=True
        ):
            shape = block.shape if share.coupled else block.shape[-2:]
            key = (shape, block.dtype, block.device, norm, factor, id(settings) if rule.needs_duals else 0)
            if key not in stacks:
                stacks[key] = (settings, Bucket(norm, factor, [], [], []), [])
            stacks[key][1].append(weight, block, block)
            stacks[key][2].append((job, target, place))
    for settings, bucket, owners in stacks.values():
        done = 0
        for chunk in chunks(bucket, foreach):
            matrices = stacked(chunk.gradients, bucket.norm.spans_batch)
            if rule.needs_duals:
                direction, dual, size = measured(chunk, matrices, settings, rule)
            else:
                direction, dual, size = bucket.norm.direction(matrices), None, None
            counts = [1 if bucket.norm.spans_batch else len(block) for block in chunk.gradients]
            if bucket.norm.costly:
                costly += sum(len(block) for block in chunk.gradients)
            pieces = direction.unbind() if direction.ndim > 3 else direction.split([len(b) for b in chunk.gradients])
            for index, piece in enumerate(pieces):
                job, target, (first, _) = owners[done]
                if target is None:
                    job.update = piece[0]
                else:
                    target.copy_(piece)
                if dual is not None and size is not None:
                    start = sum(counts[:index])
                    span = slice(start, start + counts[index])
                    job.values.append((job.entry.first + first, dual.flatten()[span], size.flatten()[span]))
                done += 1
    return costly


def multiply(job: Job, factors: Sequence[Any]) -> None:
    """Multiply each block of a solved job by its number or numbers (one per element)."""
    assert job.update is not None
    for block, factor in zip(job.entry.share.layout.blocks(job.update), factors, strict=True):
        if isinstance(factor, Tensor):
            factor = factor.to(block.device).reshape(-1, 1, 1)  # noqa: PLW2901
        block.mul_(factor)


def apply(moves: Sequence[tuple[Entry, Tensor, Tensor]], settled: bool) -> None:
    """Decay and move parts of parameters: (entry, view of the local parameter, update).

    Args:
        moves: the parts.
        settled: updates have their whole length and sign already.
    """
    groups: dict[Any, list[tuple[Entry, Tensor, Tensor]]] = {}
    for move in moves:
        if move[1].numel():
            entry = move[0]
            groups.setdefault((id(entry.settings), entry.share.factor, move[1].dtype, move[1].device), []).append(move)
    for members in groups.values():
        settings, factor = members[0][0].settings, members[0][0].share.factor
        parameters = [view for _, view, _ in members]
        updates = [update.to(view.device) for _, view, update in members]
        lr = rate(settings, parameters[0].device)
        decay = 1 - lr * settings["weight_decay"]
        if settings["constrained"]:
            decay = 1.0 if settled else 1 - lr
        if isinstance(decay, Tensor) or decay != 1:
            torch._foreach_mul_(parameters, decay)
        scale: Any = 1.0
        if not settled:
            scale = lr * (1.0 if factor is None else factor) * (1.0 if settings["maximize"] else -1.0)
        if isinstance(scale, Tensor):
            updates, scale = torch._foreach_mul(updates, scale), 1.0
        torch._foreach_add_(parameters, updates, alpha=scale)


def rate(settings: dict[str, Any], device: torch.device) -> Any:
    """The learning rate as a number, or as a scalar tensor on `device`."""
    lr = settings["lr"]
    return lr.to(device).reshape(()) if isinstance(lr, Tensor) else float(lr)


@lru_cache(maxsize=4096)
def block_shapes(layout: Layout, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes (batch, rows, columns) of the blocks of a parameter."""
    return [tuple(block.shape) for block in layout.blocks(torch.empty(shape, device="meta"))]


def empty_block(layout: Layout, region: Region) -> tuple[int, ...]:
    """(batch, rows, columns) of the block of an empty part of a parameter that is not split."""
    sizes = shape_of(region)
    if len(sizes) < 2:
        return (1, 1, *(sizes or (1,)))
    if layout.kind == "conv":
        columns = 1
        for size in sizes[1:]:
            columns *= size
        return (1, sizes[0], columns)
    batch = 1
    for size in sizes[:-2]:
        batch *= size
    return (batch, *(sizes[:-3:-1] if layout.transposed else sizes[-2:]))
