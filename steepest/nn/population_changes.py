"""Changes of one parameter for many candidates at once, in the forms that make a forward pass cheap."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """Candidate b changes few entries of a parameter: `flat[index[b, j]] += delta[b, j]`.

    Behind a linear layer whose input all candidates share, only the outputs that change are computed, and stay few
    through elementwise layers until the next product.

    Args:
        index: Places in the flattened parameter, shape (b, w). A place may come twice; the changes add up.
        delta: What is added there, shape (b, w).
    """

    index: Int[Tensor, "b w"]
    delta: Float[Tensor, "b w"]

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.shape != self.delta.shape:
            raise ValueError(
                f"index and delta must have one shape (b, w), got {tuple(self.index.shape)} and "
                f"{tuple(self.delta.shape)}"
            )
        if self.index.is_floating_point() or not self.delta.is_floating_point():
            raise TypeError(f"index must be integers and delta real, got {self.index.dtype} and {self.delta.dtype}")

    def __len__(self) -> int:
        return len(self.index)

    group = 1

    def check(self, shape: torch.Size) -> bool:
        """Whether the places are those of a parameter of this shape."""
        return not self.index.numel() or 0 <= int(self.index.min()) <= int(self.index.max()) < shape.numel()

    def rows(self, start: int, stop: int) -> "Entries":
        """Some of the candidates."""
        return Entries(self.index[start:stop], self.delta[start:stop])

    def to(self, like: Tensor) -> "Entries":
        """In the dtype and on the device of a parameter."""
        return Entries(self.index.to(like.device).long(), self.delta.to(like))

    def dense(self, base: Float[Tensor, "*shape"]) -> Float[Tensor, "b *shape"]:
        """All values of the parameter."""
        flat = base.reshape(-1).repeat(len(self), 1)
        return flat.scatter_add_(1, self.index, self.delta).view(len(self), *base.shape)


@dataclass(frozen=True)
class Span:
    """Candidates in groups; those of a group change a parameter within the span of few directions.

    Candidate (g, i), number g m + i, adds `sum_j coefficients[g, i, j] directions[g, j]`. Behind a linear layer whose
    input all candidates share, a group costs one product for each direction instead of one for each candidate.

    Args:
        directions: Shape (groups, w, *shape of the parameter).
        coefficients: Shape (groups, m, w).
    """

    directions: Float[Tensor, "groups w *shape"]
    coefficients: Float[Tensor, "groups m w"]

    def __post_init__(self) -> None:
        d, c = self.directions.shape, self.coefficients.shape
        if len(c) != 3 or len(d) < 2 or (d[0], d[1]) != (c[0], c[2]):
            raise ValueError(
                f"directions must have shape (groups, w, ...) and coefficients (groups, m, w), got {tuple(d)} and "
                f"{tuple(c)}"
            )

    def __len__(self) -> int:
        return self.coefficients.shape[0] * self.coefficients.shape[1]

    @property
    def group(self) -> int:
        """m, the candidates of a group."""
        return self.coefficients.shape[1]

    def check(self, shape: torch.Size) -> bool:
        """Whether the directions are those of a parameter of this shape."""
        return self.directions.shape[2:] == shape

    def rows(self, start: int, stop: int) -> "Span":
        """Some of the candidates, in whole groups."""
        start, stop = start // max(self.group, 1), -(-stop // max(self.group, 1))
        return Span(self.directions[start:stop], self.coefficients[start:stop])

    def to(self, like: Tensor) -> "Span":
        """In the dtype and on the device of a parameter."""
        return Span(self.directions.to(like), self.coefficients.to(like))

    def combine(self, found: Float[Tensor, "groups w *n"]) -> Float[Tensor, "b *n"]:
        """What is linear in the directions, for every candidate."""
        flat = found.reshape(*found.shape[:2], math.prod(found.shape[2:]))
        return (self.coefficients @ flat).view(len(self), *found.shape[2:])

    def dense(self, base: Float[Tensor, "*shape"]) -> Float[Tensor, "b *shape"]:
        """All values of the parameter."""
        return self.combine(self.directions).add_(base)


@dataclass(frozen=True)
class Columns:
    """Activations that differ from those of the base in few features.

    Attributes:
        base: Shape (1, *n, features).
        index: The features that may differ, shape (b, k); those where `used` is False do not count.
        used: Shape (b, k).
        values: Their values, shape (b, *n, k).
    """

    base: Float[Tensor, "one *n features"]
    index: Int[Tensor, "b k"]
    used: Tensor
    values: Float[Tensor, "b *n k"]

    def __len__(self) -> int:
        return len(self.index)

    def dense(self) -> Float[Tensor, "b *n features"]:
        """All activations."""
        n, k = self.base.flatten(1, -2).shape[1], self.index.shape[1]
        out = self.base.flatten(1, -2).repeat(len(self), 1, 1)
        out.scatter_add_(2, self.index.unsqueeze(1).expand(-1, n, -1), self._difference().reshape(len(self), n, k))
        return out.view(len(self), *self.base.shape[1:])

    def _picked(self) -> Float[Tensor, "b *n k"]:
        """The base at the features of every candidate."""
        flat = self.base.flatten(0, -2)
        found = flat[:, self.index].transpose(0, 1)
        return found.reshape(self.values.shape)

    def _difference(self) -> Float[Tensor, "b *n k"]:
        mask = self.used.view(len(self), *[1] * (self.values.ndim - 2), -1)
        return torch.where(mask, self.values - self._picked(), 0.0)

    def linear(self, weight: Float[Tensor, "out features"], bias: Tensor | None) -> Float[Tensor, "b *n out"]:
        """A linear layer that the candidates share: the base's output, and the share of the changed features."""
        out = F.linear(self.base, weight, bias)
        n, k = out.flatten(1, -2).shape[1], self.index.shape[1]
        change = torch.bmm(self._difference().reshape(len(self), n, k), weight.T[self.index])
        return change.view(len(self), *out.shape[1:]).add_(out)


def linear_entries(
    x: Float[Tensor, "one *n features"],
    out: Float[Tensor, "one *n outputs"],
    weight: Entries | None,
    bias: Entries | None,
) -> Columns:
    """The output of a linear layer with changed entries, given its input, which all share, and the base's output."""
    features, rows, parts = x.shape[-1], [], []
    flat = x.flatten(0, -2)
    if weight is not None:
        rows.append(torch.div(weight.index, features, rounding_mode="floor"))
        parts.append(flat.T[weight.index % features] * weight.delta.unsqueeze(-1))
    if bias is not None:
        rows.append(bias.index)
        parts.append(bias.delta.unsqueeze(-1).expand(-1, -1, len(flat)))
    index, added = torch.cat(rows, 1), torch.cat(parts, 1)  # (b, w) and (b, w, n)
    # Entries of one row move one output: sum them in its first place, and keep first places only.
    same = index.unsqueeze(2) == index.unsqueeze(1)
    first = ~same.tril(-1).any(2)
    keep = int(first.sum(1).max())
    order = first.long().argsort(dim=1, descending=True, stable=True)[:, :keep]
    total = torch.bmm(same.gather(1, order.unsqueeze(2).expand(-1, -1, same.shape[2])).to(added), added)
    index, used = index.gather(1, order), first.gather(1, order)
    values = (out.flatten(0, -2).T[index] + total).transpose(1, 2)
    return Columns(out, index, used, values.reshape(len(index), *out.shape[1:-1], keep))
