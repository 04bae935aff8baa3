"""Matrices to their owners and directions back, each part sent once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.optim.placement import Placement, Region, common, numel, shape_of, within
from steepest.optim.shares import Entry, Job, Unit


@dataclass(eq=False)
class Round:
    """Parameters that are dealt out to owners together: (entry's number, its part, the rank that owns it)."""

    entries: list[int]
    deals: list[tuple[int, Unit, int]] = field(default_factory=list)


def deal(costs: Sequence[tuple[int, Unit]], loads: list[float]) -> list[tuple[int, Unit, int]]:
    """Give each unit to the rank with the least work so far, the costly ones first; `loads` is carried on.

    Among equals the rank that has most of the unit is taken. A pure function, so that all ranks agree unasked.
    """
    found: dict[int, int] = {}
    for index in sorted(range(len(costs)), key=lambda index: -costs[index][1].cost):
        unit = costs[index][1]
        owner = min(range(len(loads)), key=lambda rank: (loads[rank], -unit.held[rank], rank))
        loads[owner] += unit.cost
        found[index] = owner
    return [(number, unit, found[index]) for index, (number, unit) in enumerate(costs)]


class Transfer:
    """One all-to-all that is under way."""

    def __init__(
        self, sends: list[list[Tensor]], receives: list[int], placement: Placement, dtype: torch.dtype
    ) -> None:
        pieces = [piece.reshape(-1) for pieces in sends for piece in pieces]
        self._outgoing = torch.cat(pieces).to(placement.device) if pieces else _empty(0, dtype, placement.device)
        self._incoming = _empty(sum(receives), dtype, placement.device)
        counts = [sum(piece.numel() for piece in pieces) for pieces in sends]
        self.bytes_sent = sum(counts) * dtype.itemsize
        self._work = dist.all_to_all_single(
            self._incoming, self._outgoing, receives, counts, group=placement.group, async_op=True
        )

    def wait(self) -> Tensor:
        """What has come, rank by rank, in one vector."""
        if self._work is not None:
            self._work.wait()
        return self._incoming


def bring(
    entries: Sequence[Entry], round_: Round, tensors: Sequence[Sequence[Tensor]]
) -> tuple[Transfer | None, Callable[[], list[Job]]]:
    """Send local tensors to the owners of their matrices.

    Args:
        entries: those of the step.
        round_: what to bring.
        tensors: by entry of the round, its local momentum and, if needed, its local weights.

    Returns:
        The transfer (None if every owner has all it needs) and a function that waits for it and returns this rank's
        jobs.
    """
    place = entries[round_.entries[0]].share.placement
    local = dict(zip(round_.entries, tensors, strict=True))
    rank, copy, cut = place.rank, place.copies[place.rank], bool(place.cuts)
    sends: list[list[Tensor]] = [[] for _ in place.regions]
    receives = [0] * len(sends)
    kinds = len(tensors[0])
    parts: list[tuple[int, Unit, list[tuple[int, Region]]]] = []
    for number, unit, owner in round_.deals:
        regions = entries[number].share.placement.regions
        if owner == rank:
            others = [
                (source, common(unit.region, regions[source]))
                for source in range(len(regions))
                if source != rank and cut and place.copies[source] == copy and unit.held[source]
            ]
            for source, part in others:
                receives[source] += kinds * numel(part)
            parts.append((number, unit, others))
        elif cut and place.copies[owner] == copy and unit.held[rank]:
            own = regions[rank]
            part = common(unit.region, own)
            sends[owner] += [within(tensor, own, part) for tensor in local[number]]
    dtype = tensors[0][0].dtype
    transfer = Transfer(sends, receives, place, dtype) if cut else None

    def collect() -> list[Job]:
        incoming = None if transfer is None else list(transfer.wait().split(receives))
        used = [0] * len(sends)
        jobs = []
        for number, unit, others in parts:
            entry = entries[number]
            own = entry.share.placement.own
            mine = common(unit.region, own)
            if not others:
                found = [within(tensor, own, mine).to(place.device) for tensor in local[number]]
            else:
                found = [_empty(shape_of(unit.region), dtype, place.device) for _ in range(kinds)]
                if unit.held[rank]:
                    for tensor, target in zip(local[number], found, strict=True):
                        within(target, unit.region, mine).copy_(within(tensor, own, mine))
            assert incoming is not None or not others
            for source, part in others:
                for target in found:
                    size = numel(part)
                    piece = incoming[source][used[source] : used[source] + size]  # pyright: ignore[reportOptionalSubscript]
                    within(target, unit.region, part).copy_(piece.view(shape_of(part)))
                    used[source] += size
            jobs.append(Job(entry, unit.region, found[0], found[1] if kinds > 1 else None))
        return jobs

    return transfer, collect


def send_back(
    entries: Sequence[Entry], round_: Round, jobs: Sequence[Job]
) -> tuple[Transfer, Callable[[], list[tuple[Entry, Tensor, Tensor]]]]:
    """Send directions to all ranks that hold a part of the parameter.

    Returns:
        The transfer, and a function that waits for it and returns (entry, view of the local parameter, update).
    """
    place = entries[round_.entries[0]].share.placement
    rank = place.rank
    sends: list[list[Tensor]] = [[] for _ in place.regions]
    receives = [0] * len(sends)
    solved = iter(jobs)
    own_moves, coming = [], []
    dtype = entries[round_.entries[0]].momentum.dtype
    for number, unit, owner in round_.deals:
        entry = entries[number]
        own = entry.share.placement.own
        mine = common(unit.region, own)
        if owner == rank:
            update = next(solved).update
            assert update is not None
            for target, region in enumerate(entry.share.placement.regions):
                if target != rank and unit.held[target]:
                    sends[target].append(within(update, unit.region, common(unit.region, region)))
            own_moves.append((entry, within(entry.parameter, own, mine), within(update, unit.region, mine)))
        else:
            receives[owner] += numel(mine)
            coming.append((owner, entry, mine))
    transfer = Transfer(sends, receives, place, dtype)

    def collect() -> list[tuple[Entry, Tensor, Tensor]]:
        incoming = transfer.wait().split(receives)
        used = [0] * len(sends)
        moves = list(own_moves)
        for owner, entry, mine in coming:
            size = numel(mine)
            piece = incoming[owner][used[owner] : used[owner] + size].view(shape_of(mine))
            used[owner] += size
            moves.append((entry, within(entry.parameter, entry.share.placement.own, mine), piece))
        return moves

    return transfer, collect


def _empty(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
