"""Where a network is searched: all weights, or few coordinates of a random subspace."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free.bases import Basis, Dense, Factors, Identity, Sparse

SPARSE_BYTES = 2**30


@dataclass
class Block:
    """One parameter's share of the coordinates.

    Attributes:
        parameter: its number.
        start: its first coordinate. Blocks of a global subspace share their coordinates.
        basis: coordinates to the change of the parameter.
    """

    parameter: int
    start: int
    basis: Basis

    @property
    def stop(self) -> int:
        return self.start + self.basis.columns


class Subspace(ABC):
    r"""A recipe for the map from D' search coordinates to the change of all parameters, $\theta \to \theta + Q x$.

    `blocks(shapes, generator, like)` draws it; a new draw is a new subspace. The coordinates are 0 at the present
    parameters, so that a redraw never moves them.
    """

    remembers = 0  # how many recent moves of the parameters a draw looks at

    @abstractmethod
    def blocks(
        self,
        shapes: Sequence[torch.Size],
        generator: torch.Generator,
        like: Tensor,
        moves: Tensor | None = None,
    ) -> list[Block]:
        """Draw the bases.

        Args:
            shapes: of all parameters.
            generator: source of the randomness, on a CPU.
            like: dtype and device of the bases.
            moves: recent moves of all parameters, (m, d), if `remembers` asks for them.
        """


@dataclass(frozen=True)
class Full(Subspace):
    """Every weight is a coordinate."""

    def blocks(
        self, shapes: Sequence[torch.Size], generator: torch.Generator, like: Tensor, moves: Tensor | None = None
    ) -> list[Block]:
        return _joined([Identity(shape.numel()) for shape in shapes])


@dataclass(frozen=True)
class Hybrid(Subspace):
    r"""Few random directions for each matrix, and all entries of vectors (biases, norms).

    A parameter of shape (d_out, ...), seen as a matrix (d_out, d_in), gets $k = (d_{out} + d_{in}) \min(R, d_{out},
    d_{in})$ coordinates. Its basis is the factor Q of the QR decomposition of a Gaussian matrix; where k is more than
    the size of the matrix, a Gaussian matrix over $\sqrt k$.

    Args:
        rank: R; None: $\min(d_{out}, d_{in}) / 16$, from 4 to 64.
        limit: largest number of coordinates in total; the matrices' shares shrink in proportion. None: no limit.
        sparse: use sparse columns (see `SparseProjection`) for a basis of more than this many bytes.

    Raises:
        ValueError, TypeError: a number below 1.
    """

    rank: int | None = None
    limit: int | None = None
    sparse: int = SPARSE_BYTES

    def __post_init__(self) -> None:
        for name in ("rank", "limit"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        check_int("sparse", self.sparse, 0)

    def sizes(self, shapes: Sequence[torch.Size]) -> list[int]:
        """Coordinates of each parameter."""
        found = [_low_rank_size(shape, self.rank) if shape.numel() > max(shape, default=1) else 0 for shape in shapes]
        rest = sum(shape.numel() for shape, k in zip(shapes, found, strict=True) if not k)
        if self.limit is not None and sum(found) + rest > self.limit:
            share = max(0, self.limit - rest) / sum(found) if sum(found) else 0.0
            if share * max(found, default=0) < 1:
                raise ValueError(f"limit={self.limit} leaves no coordinate for the matrices: vectors take {rest}")
            found = [max(1, int(k * share)) if k else 0 for k in found]
        return [k or shape.numel() for shape, k in zip(shapes, found, strict=True)]

    def blocks(
        self, shapes: Sequence[torch.Size], generator: torch.Generator, like: Tensor, moves: Tensor | None = None
    ) -> list[Block]:
        bases: list[Basis] = []
        for shape, k in zip(shapes, self.sizes(shapes), strict=True):
            numel = shape.numel()
            if numel == max(shape, default=1):
                bases.append(Identity(numel))
            elif k * numel * like.element_size() > self.sparse:
                bases.append(Sparse.draw(numel, k, generator, like))
            else:
                bases.append(Dense.orthonormal(numel, k, generator, like))
        return _joined(bases)


@dataclass(frozen=True)
class LowRank(Subspace):
    r"""Factors: the change of a matrix is $B A$ with B (d_out, R) from 0 and A (R, d_in) from a Gaussian over
    $\sqrt{d_{in}}$; vectors keep all entries.

    The map is not linear, and flat in A while B is near 0: `Hybrid` is better in most problems.

    Args:
        rank: R; None as in `Hybrid`.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_int("rank", self.rank)

    def blocks(
        self, shapes: Sequence[torch.Size], generator: torch.Generator, like: Tensor, moves: Tensor | None = None
    ) -> list[Block]:
        bases: list[Basis] = []
        for shape in shapes:
            if shape.numel() == max(shape, default=1):
                bases.append(Identity(shape.numel()))
            else:
                rows = shape[0]
                bases.append(Factors.draw(rows, shape.numel() // rows, _rank(shape, self.rank), generator, like))
        return _joined(bases)


@dataclass(frozen=True)
class Linear(Subspace):
    r"""k directions of the whole network: Q Gaussian over $\sqrt k$.

    Args:
        size: k, number of coordinates; capped at the number of weights.
    """

    size: int

    def __post_init__(self) -> None:
        check_int("size", self.size)

    def blocks(
        self, shapes: Sequence[torch.Size], generator: torch.Generator, like: Tensor, moves: Tensor | None = None
    ) -> list[Block]:
        total = sum(shape.numel() for shape in shapes)
        k = min(self.size, total)
        return _cut(_gaussian(total, k, generator) / math.sqrt(k), shapes, like)


@dataclass(frozen=True)
class SparseProjection(Subspace):
    """k directions of the whole network, each of a few random entries of equal size and random sign, length 1.

    Args:
        size: k.
        entries: non-zeros in a column; None: the square root of the number of weights.
    """

    size: int
    entries: int | None = None

    def __post_init__(self) -> None:
        check_int("size", self.size)
        if self.entries is not None:
            check_int("entries", self.entries)

    def blocks(
        self, shapes: Sequence[torch.Size], generator: torch.Generator, like: Tensor, moves: Tensor | None = None
    ) -> list[Block]:
        total = sum(shape.numel() for shape in shapes)
        whole = Sparse.draw(total, min(self.size, total), generator, like, self.entries)
        starts = _starts([shape.numel() for shape in shapes])
        return [Block(i, 0, whole.rows(start, shapes[i].numel())) for i, start in enumerate(starts)]


@dataclass(frozen=True)
class Adaptive(Subspace):
    """k orthonormal directions of the whole network; a redraw keeps the main directions of the recent moves.

    Args:
        size: k, at most the number of weights.
        share: part of the directions that recent moves choose (as many as there are), from 0 to 1.
        history: how many moves count; they cost that many copies of the parameters.
    """

    size: int
    share: float = 0.5
    history: int = 5

    def __post_init__(self) -> None:
        check_int("size", self.size)
        check_int("history", self.history)
        if isinstance(self.share, bool) or not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share!r}")

    @property
    def remembers(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.history

    def blocks(
        self, shapes: Sequence[torch.Size], generator: torch.Generator, like: Tensor, moves: Tensor | None = None
    ) -> list[Block]:
        total = sum(shape.numel() for shape in shapes)
        k = min(self.size, total)
        columns = _gaussian(total, k, generator)
        if moves is not None and self.share and bool(moves.isfinite().all()):
            _, lengths, directions = torch.linalg.svd(moves.double().cpu(), full_matrices=False)
            kept = directions[lengths > 1e-9 * lengths.max().clamp_min(1e-300)][: int(self.share * k)]
            columns = torch.cat([kept.mT, columns], 1)[:, :k]
        return _cut(torch.linalg.qr(columns)[0], shapes, like)


NAMES: Mapping[str, Any] = {"full": Full, "hybrid": Hybrid, "low_rank": LowRank}


def make_subspace(subspace: "str | Subspace | None") -> Subspace:
    """A subspace from its name; None is the full space.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a Subspace.
    """
    if subspace is None:
        return Full()
    if isinstance(subspace, str):
        if subspace not in NAMES:
            raise ValueError(f"subspace must be one of {', '.join(NAMES)}, or a Subspace, got {subspace!r}")
        return NAMES[subspace]()
    if not isinstance(subspace, Subspace):
        raise TypeError(f"subspace must be a name or a Subspace, got {subspace!r}")
    return subspace


def _rank(shape: torch.Size, rank: int | None) -> int:
    small = min(shape[0], shape.numel() // shape[0])
    return min(rank if rank is not None else min(max(small // 16, 4), 64), small)


def _low_rank_size(shape: torch.Size, rank: int | None) -> int:
    rows = shape[0]
    return (rows + shape.numel() // rows) * _rank(shape, rank)


def _gaussian(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _joined(bases: Sequence[Basis]) -> list[Block]:
    starts = _starts([basis.columns for basis in bases])
    return [Block(i, start, basis) for i, (start, basis) in enumerate(zip(starts, bases, strict=True))]


def _cut(q: Tensor, shapes: Sequence[torch.Size], like: Tensor) -> list[Block]:
    rows = q.to(like).split([shape.numel() for shape in shapes])
    return [Block(i, 0, Dense(each.contiguous())) for i, each in enumerate(rows)]
