"""How a parameter is seen as a stack of matrices (out, in): flattened, as a batch, split into blocks, or transposed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from jaxtyping import Shaped
from torch import Tensor

LayoutName = Literal["auto", "matrix", "conv", "batch"]


@dataclass(frozen=True)
class Layout:
    """How to see a parameter as matrices with outputs as rows and inputs as columns.

    Attributes:
        kind: ``"matrix"`` two dimensions as they are; ``"conv"`` a kernel (out, in, *k) as a matrix (out, in * prod k);
            ``"batch"`` leading dimensions count matrices (experts); ``"auto"``: matrix in 2-D, batch in 3-D, conv above
            (and so a 1-d convolution needs "conv" said). Scalars and vectors are single rows.
        split: sizes of blocks along the output dimension that are matrices of their own (fused query, key, value; or
            attention heads).
        transposed: the parameter is stored (in, out).
        input_split: sizes of blocks along the input dimension that are matrices of their own (the heads that an
            attention output projection reads). At most one of `split`, `input_split` and `interleaved` is set.
        interleaved: how many matrices alternate along the output dimension: 2 for gate and up neuron by neuron.
    """

    kind: LayoutName = "auto"
    split: tuple[int, ...] | None = None
    transposed: bool = False
    input_split: tuple[int, ...] | None = None
    interleaved: int = 1

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Layout":
        """The layout that the keys of a param group describe, unresolved."""
        return cls(
            group["layout"],
            group["split"],
            group["transposed"],
            group.get("input_split"),
            group.get("interleaved", 1),
        )

    @property
    def is_plain(self) -> bool:
        """Whether a matrix is seen just as it is stored."""
        return self.kind == "matrix" and not self.transposed and self.count == 1 and self.split is None

    @property
    def count(self) -> int:
        """How many blocks there are."""
        if self.input_split is not None:
            return len(self.input_split)
        return self.interleaved if self.split is None else len(self.split)

    def resolve(self, shape: Sequence[int]) -> "Layout":
        """This layout for parameters of `shape`, with "auto" decided.

        Raises:
            ValueError: the shape does not fit the layout.
        """
        kind, ndim = self.kind, len(shape)
        if kind not in get_args(LayoutName):
            raise ValueError(f"layout must be one of {', '.join(get_args(LayoutName))}, got {kind!r}")
        if kind == "auto":
            kind = "matrix" if ndim <= 2 else "batch" if ndim == 3 else "conv"
        if kind == "matrix" and ndim > 2:
            raise ValueError(f"layout 'matrix' needs at most 2 dimensions, got a parameter of shape {tuple(shape)}")
        if kind in ("conv", "batch") and ndim < 3:
            raise ValueError(f"layout {kind!r} needs 3 dimensions or more, got a parameter of shape {tuple(shape)}")
        if self.transposed and (kind == "conv" or ndim < 2):
            raise ValueError(
                f"transposed=True needs a matrix or a batch of them, got a parameter of shape {tuple(shape)}"
            )
        taken = [self.split is not None, self.input_split is not None, self.interleaved != 1]
        if not any(taken):
            return Layout(kind, None, self.transposed)
        if sum(taken) > 1:
            raise ValueError("give at most one of split, input_split and interleaved")
        name = ("split", "input_split", "interleaved")[taken.index(True)]
        if ndim < 2:
            raise ValueError(f"{name} needs a matrix, got a parameter of shape {tuple(shape)}")
        if kind == "conv" and name != "split":
            raise ValueError(f"{name} is not for convolutions, got a parameter of shape {tuple(shape)}")
        rows = shape[0] if kind == "conv" else shape[-1] if self.transposed else shape[-2]
        if name == "interleaved":
            if isinstance(self.interleaved, bool) or not isinstance(self.interleaved, int) or self.interleaved < 1:
                raise ValueError(f"interleaved must be an integer, at least 1; got {self.interleaved!r}")
            if rows % self.interleaved:
                raise ValueError(
                    f"interleaved={self.interleaved} must divide the {rows} outputs of a parameter of shape "
                    f"{tuple(shape)}"
                )
            return Layout(kind, None, self.transposed, interleaved=self.interleaved)
        columns = shape[-2] if self.transposed else shape[-1]
        if name == "split":
            return Layout(kind, _sizes(name, self.split, (rows, "outputs"), shape), self.transposed)
        return Layout(kind, None, self.transposed, _sizes(name, self.input_split, (columns, "inputs"), shape))

    def blocks(self, tensor: Shaped[Tensor, "..."], order: Sequence[int] | None = None) -> list[Tensor]:
        """Matrices (batch, rows, columns) of `tensor`, one entry per block: views if `is_view` says so, else copies.

        Args:
            tensor: a parameter, or its gradient or momentum.
            order: for convolutions, the order of the input dimensions in memory (`memory_order` of the parameter), so
                that a channels-last kernel is seen without a copy.
        """
        if tensor.ndim < 2:
            return [tensor.view(1, 1, -1)]
        if self.kind == "conv":
            ordered = tensor if order is None else tensor.permute(0, *order)
            matrices = ordered.reshape(1, tensor.shape[0], -1)
        else:
            matrices = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.flatten(0, -3)
        if self.transposed:
            matrices = matrices.mT
        if self.input_split is not None:
            return list(matrices.split(self.input_split, dim=2))
        if self.interleaved > 1:
            return [matrices[:, start :: self.interleaved] for start in range(self.interleaved)]
        return [matrices] if self.split is None else list(matrices.split(self.split, dim=1))

    def is_view(self, tensor: Shaped[Tensor, "..."], order: Sequence[int]) -> bool:
        """Whether `blocks(tensor, order)` share the memory of `tensor`; a resolved layout is needed."""
        merged = order if self.kind == "conv" else range(tensor.ndim - 2) if tensor.ndim > 3 else ()
        sized = [dim for dim in merged if tensor.shape[dim] != 1]
        return all(tensor.stride(a) == tensor.stride(b) * tensor.shape[b] for a, b in pairwise(sized))

    def shape_of(self, shape: Sequence[int], block: int) -> tuple[int, ...]:
        """(out, in, *kernel) of one block: what shape-dependent radii are functions of."""
        if len(shape) < 2:
            return (math.prod(shape),)
        if self.kind == "conv":
            rest = tuple(shape[1:])
            rows = shape[0]
        else:
            columns = shape[-2] if self.transposed else shape[-1]
            rest = (columns if self.input_split is None else self.input_split[block],)
            rows = shape[-1] if self.transposed else shape[-2]
        return (rows // self.interleaved if self.split is None else self.split[block], *rest)


def _sizes(name: str, sizes: Any, side: tuple[int, str], shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes as a tuple, if they are positive and sum to that side of the matrix."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name} must be a sequence of sizes or None, got {sizes!r}")
    found = tuple(sizes)
    if not all(isinstance(size, int) and size > 0 for size in found) or sum(found) != side[0]:
        raise ValueError(
            f"{name} must hold positive sizes that sum to the {side[0]} {side[1]} of a parameter of shape "
            f"{tuple(shape)}, got {found!r}"
        )
    return found


def memory_order(parameter: Tensor) -> tuple[int, ...]:
    """Dimensions 1.. of `parameter` from the slowest to the fastest in memory."""
    return tuple(sorted(range(1, parameter.ndim), key=parameter.stride, reverse=True))
