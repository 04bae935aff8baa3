"""Bases: how some coordinates change one parameter."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


class Basis(ABC):
    """A map from `columns` coordinates to the change of a flattened parameter.

    Attributes:
        columns: number of coordinates.
        linear: whether a change by s times some coordinates is s times the change by them.
    """

    columns: int
    linear = True

    @abstractmethod
    def changes(self, start: int, coefficients: Float[Tensor, "c m w"]) -> Float[Tensor, "c m n"]:
        """The changes of the parameter of size n when w coordinates change: in row i those from start + i w on.

        Args:
            start: a coordinate.
            coefficients: m changes for each of c windows of w coordinates. Coordinates outside of the basis are left
                out.
        """

    @abstractmethod
    def move(self, delta: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        """The change of the parameter when all coordinates change, which is remembered where it matters."""

    def state(self) -> dict[str, Tensor]:
        """What a draw with the same seed does not give back."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back a `state`.

        Raises:
            ValueError: it is of another basis.
        """
        own = {name: each.shape for name, each in self.state().items()}
        if {name: each.shape for name, each in state.items()} != own:
            raise ValueError(f"state: the basis must have factors of the shapes {own}")


def _window(start: int, shape: torch.Size, columns: int) -> tuple[int, int]:
    """The coordinates start .. start + c w, cut to those of the basis."""
    return max(start, 0), min(start + shape[0] * shape[-1], columns)


class Identity(Basis):
    """Every entry is a coordinate."""

    def __init__(self, size: int) -> None:
        self.columns = size

    def changes(self, start: int, coefficients: Float[Tensor, "c m w"]) -> Float[Tensor, "c m n"]:
        c, m, w = coefficients.shape
        found = torch.zeros(c, m, self.columns, dtype=coefficients.dtype, device=coefficients.device)
        place = start + torch.arange(c * w, device=found.device).view(c, 1, w)
        inside = (place >= 0) & (place < self.columns)
        index = place.clamp(0, self.columns - 1).expand(c, m, w)
        return found.scatter_add_(-1, index, torch.where(inside, coefficients, 0.0))

    def move(self, delta: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        return delta


class Dense(Basis):
    """The columns of a matrix Q.

    Args:
        q: shape (n, k).
    """

    def __init__(self, q: Float[Tensor, "n k"]) -> None:
        self.q, self.columns = q, q.shape[1]

    @classmethod
    def orthonormal(cls, rows: int, columns: int, generator: torch.Generator, like: Tensor) -> "Dense":
        """Q of the QR decomposition of a Gaussian matrix; a Gaussian over sqrt(k) where k > n."""
        exact = torch.float64 if rows * columns <= 2**22 else torch.float32
        gaussian = torch.randn(rows, columns, generator=generator, dtype=exact)
        q = torch.linalg.qr(gaussian)[0] if rows >= columns else gaussian / math.sqrt(columns)
        return cls(q.to(like))

    def changes(self, start: int, coefficients: Float[Tensor, "c m w"]) -> Float[Tensor, "c m n"]:
        c, _, w = coefficients.shape
        low, high = _window(start, coefficients.shape, self.columns)
        q = self.q[:, low:high]
        if high - low < c * w:
            q = torch.nn.functional.pad(q, (low - start, start + c * w - high))
        return torch.bmm(coefficients, q.unflatten(1, (c, w)).permute(1, 2, 0))

    def move(self, delta: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        return self.q @ delta


class Sparse(Basis):
    """A matrix with few non-zeros in a column.

    Args:
        size: n.
        index: row of each non-zero, (k, s).
        value: its value, (k, s).
    """

    def __init__(self, size: int, index: Tensor, value: Tensor) -> None:
        self.size, self.index, self.value, self.columns = size, index, value, len(index)

    @classmethod
    def draw(
        cls, rows: int, columns: int, generator: torch.Generator, like: Tensor, entries: int | None = None
    ) -> "Sparse":
        """Random places, equal sizes, random signs; columns of length 1 (unless a place was drawn twice)."""
        s = min(rows, max(1, math.isqrt(rows)) if entries is None else entries)
        index = torch.randint(rows, (columns, s), generator=generator)
        sign = torch.randint(2, (columns, s), generator=generator) * 2 - 1
        return cls(rows, index.to(like.device), (sign / math.sqrt(s)).to(like))

    def rows(self, start: int, count: int) -> "Sparse":
        """The part of the matrix for one parameter."""
        inside = (self.index >= start) & (self.index < start + count)
        return Sparse(count, (self.index - start).clamp(0, count - 1), torch.where(inside, self.value, 0.0))

    def changes(self, start: int, coefficients: Float[Tensor, "c m w"]) -> Float[Tensor, "c m n"]:
        c, m, w = coefficients.shape
        found = torch.zeros(c, m, self.size, dtype=coefficients.dtype, device=coefficients.device)
        place = start + torch.arange(c * w, device=found.device)
        inside = (place >= 0) & (place < self.columns)
        place = place.clamp(0, self.columns - 1)
        value = torch.where(inside.unsqueeze(-1), self.value[place], 0.0).view(c, 1, w, -1)
        index = self.index[place].view(c, 1, -1).expand(c, m, -1)
        return found.scatter_add_(-1, index, (coefficients.unsqueeze(-1) * value).flatten(-2))

    def move(self, delta: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        found = torch.zeros(self.size, dtype=delta.dtype, device=delta.device)
        return found.index_add_(0, self.index.flatten(), (self.value * delta.unsqueeze(-1)).flatten())


class Factors(Basis):
    """The product of two factors, B A: coordinates are the changes of B, then those of A.

    Args:
        b: shape (rows, rank).
        a: shape (rank, columns of the matrix).
    """

    linear = False

    def __init__(self, b: Tensor, a: Tensor) -> None:
        self.b, self.a, self.columns = b, a, b.numel() + a.numel()

    @classmethod
    def draw(cls, rows: int, width: int, rank: int, generator: torch.Generator, like: Tensor) -> "Factors":
        """B = 0, A Gaussian over sqrt(width)."""
        a = torch.randn(rank, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
        return cls(torch.zeros(rows, rank, dtype=like.dtype, device=like.device), a.to(like))

    def _moved(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        b, a = delta.split([self.b.numel(), self.a.numel()], -1)
        return self.b + b.unflatten(-1, self.b.shape), self.a + a.unflatten(-1, self.a.shape)

    def changes(self, start: int, coefficients: Float[Tensor, "c m w"]) -> Float[Tensor, "c m n"]:
        b, a = self._moved(Identity(self.columns).changes(start, coefficients))
        return (b @ a - self.b @ self.a).flatten(-2)

    def move(self, delta: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        b, a = self._moved(delta)
        change = (b @ a - self.b @ self.a).flatten()
        self.b, self.a = b, a
        return change

    def state(self) -> dict[str, Tensor]:
        return {"b": self.b.clone(), "a": self.a.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self.b, self.a = state["b"].to(self.b), state["a"].to(self.a)
