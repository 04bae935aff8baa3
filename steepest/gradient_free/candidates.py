"""The candidates of a step of `PolyStep`, some at a time: each differs from the model in few coordinates."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.gradient_free.network_loss import TakesChanges
from steepest.gradient_free.particle_moves import Probes
from steepest.gradient_free.subspaces import Block

NUMBERS = 2**20  # how many a piece may hold: what fits a cache is fastest


class Candidates:
    """Evaluates all candidates of a step in pieces.

    Args:
        parameters: the tensors that are searched; only read.
        names: of them.
        blocks: their coordinates.
        particles: P.
        particle_dim: p.
        chunk_size: largest number of candidates in a piece; None: as many as memory for a few million numbers holds.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        blocks: Sequence[Block],
        particles: int,
        particle_dim: int,
        chunk_size: int | None,
    ) -> None:
        self.parameters, self.names, self.blocks = parameters, names, blocks
        self.particles, self.particle_dim, self.chunk_size = particles, particle_dim, chunk_size
        bounds = {bound for block in blocks for bound in (block.start, block.stop)}
        cuts = sorted({0, particles, *(b // particle_dim for b in bounds), *(-(-b // particle_dim) for b in bounds)})
        self._runs = [last - first for first, last in pairwise(cuts)]  # each changes one set of parameters

    def _touched(self, first: int, last: int) -> tuple[Block, ...]:
        low, high = first * self.particle_dim, last * self.particle_dim
        return tuple(block for block in self.blocks if block.start < high and block.stop > low)

    def losses(self, closure: Any, probes: Probes) -> Float[Tensor, "P V K"]:
        """The closure's losses of all candidates.

        Raises:
            TypeError, ValueError: the closure did not return (B,) real losses.
        """
        directions, distances = probes.directions, probes.distances
        per_particle = directions.shape[1] * len(distances)
        found = []
        for first, last in self._pieces(closure, per_particle):
            steps = directions[first:last].unsqueeze(2) * distances.view(1, 1, -1, 1)
            count = (last - first) * per_particle
            tables = {
                block.parameter: self._values(block, first, steps.flatten(1, 2)) for block in self._touched(first, last)
            }
            if isinstance(closure, TakesChanges):
                values = closure.changed({id(self.parameters[i]): each for i, each in tables.items()})
            else:
                values = closure(self._stacked(tables, count))
            found.append(checked(values, count))
        return torch.cat(found).view(self.particles, directions.shape[1], len(distances))

    def _pieces(self, closure: Any, per_particle: int) -> Iterator[tuple[int, int]]:
        """Ranges of particles. A closure that takes changes sees each set of changed parameters by itself."""
        changes = isinstance(closure, TakesChanges)
        start = 0
        for run in self._runs if changes else [self.particles]:
            if self.chunk_size is not None:
                size = self.chunk_size // per_particle
            else:
                blocks = self._touched(start, start + run)
                numbers = sum(self.parameters[block.parameter].numel() for block in blocks)
                size = NUMBERS // ((numbers + (closure.load if changes else 0)) * per_particle)
            size = max(1, size)
            for first in range(start, start + run, size):
                yield first, min(first + size, start + run)
            start += run

    def _values(self, block: Block, first: int, steps: Float[Tensor, "c m p"]) -> Float[Tensor, "b *shape"]:
        parameter = self.parameters[block.parameter].detach()
        changes = block.basis.changes(first * self.particle_dim - block.start, steps).flatten(0, 1)
        return changes.add_(parameter.flatten()).view(len(changes), *parameter.shape).to(parameter.dtype)

    def _stacked(self, tables: Mapping[int, Tensor], count: int) -> dict[str, Tensor]:
        return {
            name: tables[i] if i in tables else parameter.detach().expand(count, *parameter.shape)
            for i, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True))
        }


def checked(values: Any, count: int) -> Float[Tensor, " b"]:
    """The closure's values, or an error that says what was expected."""
    if not isinstance(values, Tensor):
        raise TypeError(f"the closure must return a tensor: expected ({count},) losses, got {type(values).__name__}")
    if values.shape != (count,):
        raise ValueError(f"expected ({count},) losses, got shape {tuple(values.shape)}: one for each candidate")
    if values.is_complex():
        raise ValueError(f"expected ({count},) real losses, got {values.dtype}")
    return values.detach()
