"""Which dimensions of an iterate are problems, samples and coordinates, and what is summed of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.averages.blocks import Precision
from steepest.averages.structure import Structure


@dataclass(frozen=True)
class Layout:
    """Tensors of the shape (*problems, *samples, *coordinates), the first two alike in all tensors.

    Attributes:
        structure: of the iterates.
        batch_dims: how many dimensions count problems.
        sample_dims: how many count samples.
        precision: of the sums.
        products: whether the products of all coordinates are summed, too.
    """

    structure: Structure
    batch_dims: int
    sample_dims: int
    precision: Precision
    products: bool

    def __post_init__(self) -> None:
        shapes, lead = self.structure.shapes, self.batch_dims + self.sample_dims
        leads = {shape[:lead] for shape in shapes}
        if any(len(shape) < lead for shape in shapes) or (lead and len(leads) > 1):
            raise ValueError(
                f"value must have {self.batch_dims} batch and {self.sample_dims} sample dimensions, the same in every "
                f"tensor; got the shapes {list(shapes)}"
            )
        if 0 in next(iter(leads))[self.batch_dims :]:
            raise ValueError("value holds no sample: a dimension of samples has size 0")

    @property
    def group(self) -> int:
        """How many samples an iterate holds."""
        return math.prod(self.structure.shapes[0][self.batch_dims : self.batch_dims + self.sample_dims])

    @property
    def coordinates(self) -> list[tuple[int, ...]]:
        """The shape of one point in each tensor."""
        return [shape[self.batch_dims + self.sample_dims :] for shape in self.structure.shapes]

    @property
    def size(self) -> int:
        """How many coordinates a point has in all tensors together."""
        return sum(math.prod(shape) for shape in self.coordinates)

    @property
    def real(self) -> bool:
        """Whether no tensor is complex."""
        return not any(dtype.is_complex for dtype in self.structure.dtypes)

    def precise(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the sums of tensors of `dtype`."""
        if self.precision == "compensated":
            return torch.promote_types(dtype, torch.float32)
        return torch.complex128 if dtype.is_complex else torch.float64

    def rows(self, tensors: Sequence[Tensor]) -> Float[Tensor, "*batch m d"]:
        """The points as vectors, a row for each sample."""
        batch, dtype = tensors[0].shape[: self.batch_dims], self.precise(self.structure.dtypes[0])
        parts = [
            each.to(dtype).reshape(*batch, self.group, math.prod(shape))
            for each, shape in zip(tensors, self.coordinates, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the samples: of the tensors, and of the products of the coordinates if they are wanted."""
        dims = tuple(range(self.batch_dims, self.batch_dims + self.sample_dims))
        sums = [each.to(self.precise(each.dtype)).sum(dims) if dims else each for each in tensors]
        if self.products:
            rows = self.rows(tensors)
            sums.append(rows.mT @ rows)
        return sums

    def like(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of the sums, on the devices of `totals`; ValueError if they differ."""
        batch = self.structure.shapes[0][: self.batch_dims]
        shapes = [
            (*shape[: self.batch_dims], *own)
            for shape, own in zip(self.structure.shapes, self.coordinates, strict=True)
        ]
        dtypes = [self.precise(dtype) for dtype in self.structure.dtypes]
        if self.products:
            shapes.append((*batch, self.size, self.size))
            dtypes.append(dtypes[0])
        if len(shapes) != len(totals):
            raise ValueError(f"state has {len(totals)} sums, expected {len(shapes)}")
        return [
            torch.empty(shape, dtype=dtype, device=total.device)
            for shape, dtype, total in zip(shapes, dtypes, totals, strict=True)
        ]

    def unflatten(self, vector: Float[Tensor, "*batch d"]) -> list[Tensor]:
        """A vector of all coordinates, cut into the tensors of a point."""
        if vector.shape[-1] != self.size:
            raise ValueError(f"vector must have {self.size} entries, got {vector.shape[-1]}")
        parts = vector.split([math.prod(shape) for shape in self.coordinates], dim=-1)
        return [part.reshape(*vector.shape[:-1], *own) for part, own in zip(parts, self.coordinates, strict=True)]
