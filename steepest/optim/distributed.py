"""One optimizer over several processes: each matrix on one rank, momenta where the shards are, all ranks as one."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from steepest.optim.buckets import moved_momenta
from steepest.optim.exchange import Round, bring, deal, send_back
from steepest.optim.lengths import summed_directions
from steepest.optim.placement import Placement, alone, copied, is_sharded, local, on_mesh
from steepest.optim.shares import Entry, Job, Share, apply, multiply, rate, solve

if TYPE_CHECKING:
    from steepest.optim.engine import SteepestDescent

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)

# Entries of a parameter that are handled at once: on each rank in one exchange, and of those that need none.
_ROUND = 1 << 24
_CHUNK = 1 << 20
_NONE_BAD = 1 << 40


def distribute(optimizer: AnyOptimizer, group: Any = "auto") -> AnyOptimizer:
    """Share the work of an optimizer whose parameters every process holds whole, as under DistributedDataParallel.

    Matrices of equal shape are dealt out over the ranks, each polar factor is computed on exactly one, and the
    directions are gathered. Momenta stay on every rank. All ranks must have the same parameters and gradients, and must
    step together. Parameters that are DTensors (`fully_shard`, tensor parallelism) need no call: they are shared over
    the ranks of their mesh.

    Args:
        optimizer: an optimizer of this library, or a `Mixed` of which each such part is shared.
        group: a process group; "auto": all processes, or nothing if there is one; None: share no longer.

    Returns:
        The optimizer itself.

    Raises:
        TypeError: it is no optimizer of this library, or `group` is not a process group.
        ValueError: this process is not in the group.

    Examples:
        >>> import torch
        >>> from steepest.optim import Muon, distribute
        >>> layer = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = distribute(Muon(layer.parameters()))  # one process: nothing to share
    """
    parts = list(getattr(optimizer, "parts", {"": optimizer}).values())
    engines = [part for part in parts if hasattr(part, "distribution")]
    if not engines:
        raise TypeError(f"optimizer must be one of steepest.optim or a Mixed of such, got {type(optimizer).__name__}")
    if isinstance(group, str):
        if group != "auto":
            raise ValueError(f"group must be a process group, 'auto' or None, got {group!r}")
        ready = dist.is_available() and dist.is_initialized()
        group = dist.group.WORLD if ready and dist.get_world_size() > 1 else None
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not a member of it")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group, 'auto' or None, got {type(group).__name__}")
    for part in engines:
        part.distribution = None if group is None else Distribution(group)
    return optimizer


class Distribution:
    """How one optimizer works over several processes. The engine makes it; read its counters.

    Args:
        group: the ranks that share parameters which are not DTensors; None: those are this process's own affair.

    Attributes:
        matrices: how many matrices went through a costly norm on this rank (polar factors, say), so far.
        bytes_sent: how much this rank has sent to others, so far.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.matrices = 0
        self.bytes_sent = 0
        self._mesh_groups: dict[tuple[int, ...], Any] = {}
        self._placements: dict[int, tuple[Tensor, Placement]] = {}
        self._shares: dict[int, tuple[Any, Share]] = {}
        self._rounds: tuple[Any, list[Round]] | None = None

    def __reduce__(self) -> Any:  # a process group belongs to its process
        return Distribution, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distribution":
        return Distribution(self.group)

    def placement(self, parameter: Tensor) -> Placement:
        """Where the parts of a parameter lie."""
        known = self._placements.get(id(parameter))
        if known is None or known[0] is not parameter or known[1].device.type == "meta":
            if is_sharded(parameter):
                made = on_mesh(parameter, self._mesh_group(parameter))
            else:
                made = alone(parameter) if self.group is None else copied(parameter, self.group)
            known = self._placements[id(parameter)] = (parameter, made)
        return known[1]

    def _mesh_group(self, parameter: Any) -> Any:
        mesh = parameter.device_mesh
        if mesh.ndim == 1:
            return mesh.get_group()
        ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        if ranks not in self._mesh_groups:
            self._mesh_groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
        return self._mesh_groups[ranks]

    def agree(self, parameters: Sequence[Tensor], bad: int | None) -> int | None:
        """The first bad gradient that any rank has found, so that all raise or skip together.

        Args:
            parameters: all that are to be stepped on, the same on all ranks.
            bad: position of the first whose gradient, or shard of one, is not finite on this rank.

        Raises:
            RuntimeError: ranks differ in which shared parameters have gradients; going on would wait forever.
        """
        groups: dict[Any, tuple[list[bool], torch.device]] = {}
        for parameter in parameters:
            place = self.placement(parameter)
            if place.group is not None:
                groups.setdefault(place.group, ([], place.device))[0].append(parameter.grad is not None)
        # Small groups first: what they find, larger ones that hold them pass on.
        for group, (present, device) in sorted(groups.items(), key=lambda item: item[0].size()):
            check = zlib.crc32(bytes(present))
            found = torch.tensor([_NONE_BAD if bad is None else bad, check, -check], device=device)
            dist.all_reduce(found, dist.ReduceOp.MIN, group)
            self._count(found)
            worst, low, high = found.tolist()
            bad = None if worst == _NONE_BAD else worst
            if low != -high:
                raise RuntimeError(
                    "ranks differ in which parameters have gradients, and a step would wait forever; give all ranks "
                    "the same, or set those left out to None on every rank. Nothing was changed"
                )
        return bad

    def step(self, optimizer: "SteepestDescent") -> None:
        """Everything of a step that comes after the gradients are known to be usable."""
        rule = optimizer.step_rule
        entries = self._entries(optimizer)
        held: list[tuple[list[Job], Round | None]] = []
        pending: Callable[[], None] | None = None
        for jobs, round_ in self._solved(entries, optimizer):
            if rule.needs_duals:
                held.append((jobs, round_))
                continue
            for job in jobs:
                if job.entry.share.factor is None:
                    multiply(job, [factor for _, factor in job.entry.share.norms])
            finish = self._start_finish(entries, jobs, round_, settled=False)
            if pending is not None:
                pending()
            pending = finish
        if pending is not None:
            pending()
        if held:
            self._lengthen(entries, [job for jobs, _ in held for job in jobs], optimizer)
            for jobs, round_ in held:
                self._start_finish(entries, jobs, round_, settled=True)()

    def _entries(self, optimizer: "SteepestDescent") -> list[Entry]:
        entries, first = [], 0
        for index, settings in enumerate(optimizer.param_groups):
            for planned in optimizer._plan(index, settings):
                stored, layout, norms = planned[:3]
                if stored.grad is None or stored.numel() == 0:
                    continue
                place = self.placement(stored)
                known = self._shares.get(id(stored))
                if known is None or known[0] is not planned or known[1].placement is not place:
                    known = self._shares[id(stored)] = (planned, Share(tuple(stored.shape), layout, norms, place))
                gradient = local_gradient(stored)
                momentum = gradient
                if settings["momentum"] > 0:
                    momentum = _local_like(optimizer._momentum_buffer(stored), stored)
                entries.append(Entry(known[1], settings, local(stored), gradient, momentum, first))
                first += sum(known[1].counts)
        return entries

    def _solved(self, entries: list[Entry], optimizer: "SteepestDescent") -> Iterator[tuple[list[Job], Round | None]]:
        """Directions, part after part: of what is here, of what needs sums, and of what this rank owns."""
        rule, foreach = optimizer.step_rule, optimizer.foreach
        places: dict[str, list[int]] = {"here": [], "summed": [], "owner": []}
        for number, entry in enumerate(entries):
            whole_needed = rule.needs_duals and entry.settings["constrained"]
            places[entry.share.place_of_work(whole_needed)].append(number)
        rounds = self._deal(entries, places["owner"])
        started = self._bring(entries, rounds[0], optimizer) if rounds else None
        for chunk in _pieces([entries[number] for number in places["here"]]):
            jobs = [
                Job(entry, entry.share.placement.own, matrix, entry.parameter if _weighs(entry, optimizer) else None)
                for entry, matrix in zip(chunk, _moved(chunk), strict=True)
            ]
            self.matrices += solve(jobs, foreach, rule)
            yield jobs, None
        if places["summed"]:
            members = [entries[number] for number in places["summed"]]
            yield summed_directions(members, _moved(members), rule, self._count), None
        for index, round_ in enumerate(rounds):
            assert started is not None
            following = self._bring(entries, rounds[index + 1], optimizer) if index + 1 < len(rounds) else None
            jobs = started()
            self.matrices += solve(jobs, foreach, rule)
            yield jobs, round_
            started = following

    def _deal(self, entries: list[Entry], numbers: list[int]) -> list[Round]:
        """Rounds that each fit in a workspace, and the owner of every unit in them."""
        signature = [entries[number].share for number in numbers], numbers
        if self._rounds is not None and self._rounds[0] == signature:
            return self._rounds[1]
        kinds: dict[Any, list[int]] = {}
        for number in numbers:
            place, dtype = entries[number].share.placement, entries[number].momentum.dtype
            kinds.setdefault((id(place.group), place.copies, bool(place.cuts), dtype, place.device), []).append(number)
        rounds: list[Round] = []
        for members in kinds.values():
            loads = [0.0] * len(entries[members[0]].share.placement.regions)
            limit, size = _ROUND * len(loads), 0
            rounds.append(Round([]))
            for number in members:
                more = math.prod(entries[number].share.shape)
                if rounds[-1].entries and size + more > limit:
                    rounds.append(Round([]))
                    size = 0
                rounds[-1].entries.append(number)
                size += more
            for round_ in rounds:
                if not round_.deals:
                    units = [(number, unit) for number in round_.entries for unit in entries[number].share.units()]
                    round_.deals = deal(units, loads)
        self._rounds = (signature, rounds)
        return rounds

    def _bring(self, entries: list[Entry], round_: Round, optimizer: "SteepestDescent") -> Callable[[], list[Job]]:
        members = [entries[number] for number in round_.entries]
        weighs = any(_weighs(entry, optimizer) for entry in members)
        matrices = _moved(members)
        tensors = [
            (matrix, entry.parameter) if weighs else (matrix,) for entry, matrix in zip(members, matrices, strict=True)
        ]
        transfer, collect = bring(entries, round_, tensors)
        self.bytes_sent += 0 if transfer is None else transfer.bytes_sent
        return collect

    def _start_finish(
        self, entries: list[Entry], jobs: list[Job], round_: Round | None, settled: bool
    ) -> Callable[[], None]:
        """Send directions where they belong; the function that is returned waits for them and moves the parameters."""
        if round_ is None:
            moves = [(job.entry, job.entry.parameter, job.update) for job in jobs if job.update is not None]
            return lambda: apply(moves, settled)
        transfer, collect = send_back(entries, round_, jobs)
        self.bytes_sent += transfer.bytes_sent
        return lambda: apply(collect(), settled)

    def _lengthen(self, entries: list[Entry], jobs: list[Job], optimizer: "SteepestDescent") -> None:
        """Give every direction its length by the step rule, which is told the dual norms of all matrices."""
        count = entries[-1].first + sum(entries[-1].share.counts)
        wide = any(entry.momentum.dtype == torch.float64 for entry in entries)
        device = entries[0].parameter.device
        known: dict[Any, Tensor] = {}
        for entry in entries:
            place = entry.share.placement
            if place.group not in known:
                known[place.group] = torch.zeros(2, count, dtype=torch.float64, device=place.device)
        for job in jobs:
            place = job.entry.share.placement
            owned = job.entry.share.place_of_work(optimizer.step_rule.needs_duals and job.entry.settings["constrained"])
            if place.counts or owned == "owner":
                for first, dual, size in job.values:
                    known[place.group][0, first : first + len(dual)] += dual.to(place.device)
                    known[place.group][1, first : first + len(size)] += size.to(place.device)
        for group, values in known.items():
            if group is not None:
                dist.all_reduce(values, dist.ReduceOp.SUM, group)
                self._count(values)
        duals, sizes = sum(values.to(device) for values in known.values()).unbind()  # pyright: ignore[reportAttributeAccessIssue]
        for entry in entries:
            if not entry.settings["constrained"]:  # parts of one matrix have each said 1
                sizes[entry.first : entry.first + sum(entry.share.counts)] = 1
        dtype = torch.float64 if wide else torch.float32
        lengths = optimizer._lengths(duals.to(dtype), sizes.to(dtype))
        for job in jobs:
            if job.update is None or not job.update.numel():
                continue
            settings, share = job.entry.settings, job.entry.share
            lr = rate(settings, lengths.device)
            factors = []
            for (first, number), (_, factor) in zip(share.elements(job.region), share.norms, strict=True):
                start = job.entry.first + first
                scale = lr * (factor if settings["maximize"] else -factor)
                factors.append(scale * lengths[start : start + number])
            multiply(job, factors)

    def _count(self, sent: Tensor) -> None:
        self.bytes_sent += sent.numel() * sent.element_size()


def first_bad(optimizers: Sequence[Optimizer], parameters: Sequence[Tensor], bad: int | None) -> int | None:
    """The first bad gradient on any rank, over several optimizers; `bad` if none of them works on several processes."""
    shared = next((d for o in optimizers if (d := getattr(o, "distribution", None)) is not None), None)
    if shared is None and not any(map(is_sharded, parameters)):
        return bad
    return (shared or Distribution()).agree(parameters, bad)


def local_gradient(parameter: Any) -> Tensor:
    """The part of the gradient that belongs to this process's part of the parameter."""
    gradient = parameter.grad
    if is_sharded(gradient) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def _local_like(momentum: Any, parameter: Any) -> Tensor:
    if is_sharded(momentum) != is_sharded(parameter) or (
        is_sharded(parameter) and momentum.placements != parameter.placements
    ):
        raise ValueError(
            f"the momentum of a parameter of shape {tuple(parameter.shape)} is not sharded as the parameter is; load "
            "states with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    return local(momentum)


def _moved(entries: Sequence[Entry]) -> list[Tensor]:
    """Move the momenta; what directions are taken of, entry by entry."""
    found: list[Any] = [None] * len(entries)
    groups: dict[Any, list[int]] = {}
    for number, entry in enumerate(entries):
        key = (id(entry.settings), entry.gradient.dtype, entry.momentum.dtype, entry.momentum.device)
        groups.setdefault(key, []).append(number)
    for numbers in groups.values():
        members = [entries[number] for number in numbers]
        ahead = moved_momenta([e.gradient for e in members], [e.momentum for e in members], members[0].settings)
        for number, tensor in zip(numbers, ahead, strict=True):
            found[number] = tensor
    return found


def _pieces(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries with something on this rank, a workspace at a time."""
    piece: list[Entry] = []
    size = 0
    for entry in entries:
        if entry.parameter.numel() == 0:
            continue
        if piece and size + entry.parameter.numel() > (_ROUND if entry.share.costly else _CHUNK):
            yield piece
            piece, size = [], 0
        piece.append(entry)
        size += entry.parameter.numel()
    if piece:
        yield piece


def _weighs(entry: Entry, optimizer: "SteepestDescent") -> bool:
    """Whether the step rule is told about the weights, too."""
    return optimizer.step_rule.needs_duals and entry.settings["constrained"]
