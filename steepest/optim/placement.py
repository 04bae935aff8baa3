"""Where the parts of a parameter lie: which rank of a process group holds which region, and in which copy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.geometry import Direction, Scaled
from steepest.geometry.matrix_norms import MaxColumn, MaxRow
from steepest.geometry.norms import Lp
from steepest.optim.layout import Layout

Region = tuple[tuple[int, int], ...]
"""Start and end along each dimension."""


@dataclass(frozen=True, eq=False)
class Placement:
    """How one parameter lies over the ranks of a process group.

    Attributes:
        group: the ranks that hold parts or copies of it; None: this process alone.
        rank: this process among them.
        regions: what each rank holds.
        copies: which of the equal copies each rank belongs to; one copy, 0, unless the mesh replicates.
        cuts: the dimensions that are cut, each with the group of ranks that hold the other parts of this one's region.
        device: where tensors must be to be sent.
    """

    group: Any
    rank: int
    regions: tuple[Region, ...]
    copies: tuple[int, ...]
    cuts: tuple[tuple[int, Any], ...]
    device: torch.device

    @property
    def own(self) -> Region:
        """The region of this rank."""
        return self.regions[self.rank]

    @property
    def cut(self) -> frozenset[int]:
        """The dimensions that are cut."""
        return frozenset(dim for dim, _ in self.cuts)

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for its region: it is in the first copy."""
        return self.copies[self.rank] == 0

    @property
    def replicated(self) -> bool:
        """Whether there are several copies."""
        return max(self.copies) > 0


def alone(parameter: Tensor) -> Placement:
    """A parameter that this process holds whole, whoever else may hold it."""
    return Placement(None, 0, (whole(parameter.shape),), (0,), (), parameter.device)


def copied(parameter: Tensor, group: Any) -> Placement:
    """A parameter that every rank of a process group holds whole."""
    size = group.size()
    return Placement(group, group.rank(), (whole(parameter.shape),) * size, tuple(range(size)), (), parameter.device)


def on_mesh(parameter: Any, group: Any) -> Placement:
    """A DTensor; `group` holds all ranks of its mesh.

    Raises:
        ValueError: its placements are not shards and copies, or its local tensor is not what they say.
    """
    from torch.distributed import get_process_group_ranks
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, placements = parameter.device_mesh, parameter.placements
    known = (Replicate, Shard, _StridedShard)
    if not all(isinstance(placement, known) for placement in placements):
        raise ValueError(
            f"parameters must be sharded or replicated, got the placements {placements} for a parameter of shape "
            f"{tuple(parameter.shape)}"
        )
    sizes = tuple(mesh.mesh.shape)
    # A strided shard is a part of the part that a later mesh dimension has cut.
    strided = [dim for dim, placement in enumerate(placements) if isinstance(placement, _StridedShard)]
    order = [dim for dim in range(len(sizes)) if dim not in strided] + strided[::-1]
    at = {int(rank): tuple(place) for place, rank in _coordinates(mesh.mesh)}
    members = get_process_group_ranks(group)
    regions, copies = [], []
    for member in members:
        region, copy = list(whole(parameter.shape)), 0
        for dim in order:
            placement, place = placements[dim], at[member][dim]
            if isinstance(placement, Replicate):
                copy = copy * sizes[dim] + place
            else:
                region[placement.dim] = _part(region[placement.dim], sizes[dim], place)
        regions.append(tuple(region))
        copies.append(copy)
    cuts = tuple(
        (placements[dim].dim, mesh.get_group(dim))
        for dim in range(len(sizes))
        if sizes[dim] > 1 and not isinstance(placements[dim], Replicate)
    )
    kind = mesh.device_type
    device = torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device(kind)
    made = Placement(group, group.rank(), tuple(regions), tuple(copies), cuts, device)
    local = tuple(parameter.to_local().shape)
    if local != shape_of(made.own):
        raise ValueError(
            f"parameter of shape {tuple(parameter.shape)} with placements {placements}: this rank should hold "
            f"{shape_of(made.own)}, but has {local}; only even chunks (as torch.chunk makes them) are known"
        )
    return made


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked without loading what defines it."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def gathered(parameter: Tensor) -> Tensor:
    """All of a parameter, on every rank; a tensor that is no DTensor as it is."""
    whole_of = parameter.detach()
    return whole_of.full_tensor() if is_sharded(whole_of) else whole_of  # pyright: ignore[reportAttributeAccessIssue]


def write_back(parameter: Any, values: Tensor) -> None:
    """Set a parameter to values that every rank has whole; those of a DTensor are taken from the mesh's first rank.

    So random values agree, whatever the ranks' generators are.
    """
    if not is_sharded(parameter):
        parameter.copy_(values)
        return
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    for dim in range(mesh.ndim):
        dist.broadcast(values, group=mesh.get_group(dim), group_src=0)
    parameter.copy_(distribute_tensor(values.to(parameter.dtype), mesh, parameter.placements, src_data_rank=None))


def cut_lengths(norm: Direction, layout: Layout, ndim: int, cut: frozenset[int]) -> frozenset[int] | None:
    """The cut dimensions over which a cheap norm has to sum; None if its direction needs whole matrices.

    Signs need nothing from elsewhere, lengths of rows only the other parts of the rows, and so on.
    """
    while isinstance(norm, Scaled):
        norm = norm.base
    if layout != Layout(layout.kind, None, layout.transposed):
        return None
    if ndim < 2:
        rows, columns = frozenset[int](), frozenset(range(ndim))
    elif layout.kind == "conv":
        rows, columns = frozenset({0}), frozenset(range(1, ndim))
    else:
        rows, columns = frozenset({ndim - 2}), frozenset({ndim - 1})
        if layout.transposed:
            rows, columns = columns, rows
    if type(norm) is MaxRow or (isinstance(norm, Lp) and norm.p == 2 and norm.event_ndim == 1):
        return cut & columns
    if type(norm) is MaxColumn:
        return cut & rows
    if isinstance(norm, Lp) and norm.p == 2:
        return cut & (rows | columns)
    return frozenset() if isinstance(norm, Lp) and math.isinf(norm.p) else None


def length_dims(norm: Direction) -> tuple[tuple[int, ...], float]:
    """The dimensions over which the l2 lengths of `cut_lengths` run in a block, and the radius of the ball."""
    radius = 1.0
    while isinstance(norm, Scaled):
        assert not callable(norm.radius)
        norm, radius = norm.base, radius * norm.radius
    if isinstance(norm, MaxColumn):
        return (-2,), radius
    return ((-1,) if isinstance(norm, MaxRow) or getattr(norm, "event_ndim", 2) == 1 else (-2, -1)), radius


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(region: Region) -> tuple[int, ...]:
    """The sizes of a region."""
    return tuple(end - start for start, end in region)


def numel(region: Region) -> int:
    """The number of entries of a region."""
    return math.prod(shape_of(region))


def common(a: Region, b: Region) -> Region:
    """What two regions share; empty regions have equal ends."""
    pairs = ((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return tuple((start, max(start, end)) for start, end in pairs)


def within(tensor: Tensor, outer: Region, inner: Region) -> Tensor:
    """The view of region `inner` in a tensor that holds region `outer`."""
    for dim, ((start, _), (low, high)) in enumerate(zip(outer, inner, strict=True)):
        tensor = tensor.narrow(dim, low - start if high > low else 0, high - low)
    return tensor


def _part(span: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    start, end = span
    size = -(-(end - start) // parts)
    return min(start + index * size, end), min(start + (index + 1) * size, end)


def _coordinates(mesh: Tensor) -> list[tuple[tuple[int, ...], int]]:
    places = torch.cartesian_prod(*(torch.arange(size) for size in mesh.shape)).reshape(mesh.numel(), mesh.ndim)
    return [(tuple(place), int(rank)) for place, rank in zip(places.tolist(), mesh.flatten().tolist(), strict=True)]
