r"""Low-rank sketches of a sum $A = \sum_i w_i x_i x_i^\top$ that is never formed."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

SketchName = Literal["oja", "frequent_directions"]


class Oja:
    r"""The top eigenvectors by Oja's rule for several of them.

    $Q, R = \mathrm{qr}(w\,Q\,\mathrm{diag}(\lambda) + g\,X^\top X Q)$, $\lambda = |\mathrm{diag}\,R|$: the step is
    measured in the eigenvalues found so far, so there is no learning rate to tune. Exact in the limit of many rows if
    the eigenvalues of ranks r and r + 1 differ; the eigenvalues are estimates.

    Args:
        rank: r, how many eigenvectors, at most the dimension.
        generator: source of the first directions; None: one with seed 0.

    Source:
        Oja 1982, J. Math. Biology 15, 267-273; Yang, Hsieh and Wang 2018, arXiv 1802.05447 (history PCA).
    """

    def __init__(self, rank: int, generator: torch.Generator | None = None) -> None:
        check_int("rank", rank)
        self.rank, self.generator = rank, generator
        self.vectors: Tensor | None = None
        self.values: Tensor | None = None

    def add(self, rows: Float[Tensor, "*batch m d"], keep: float = 1.0, gain: float = 1.0) -> None:
        r"""$A \leftarrow \mathrm{keep}\,A + \mathrm{gain}\,X^\top X$.

        Args:
            rows: X.
            keep: factor of what was added before.
            gain: factor of the new rows.
        """
        if self.vectors is None or self.values is None:
            _check_rank(self.rank, rows)
            self.vectors, self.values = self._start(rows), rows.new_zeros(*rows.shape[:-2], self.rank)
        self.vectors, self.values = self.vectors.to(rows), self.values.to(rows)
        new = gain * (rows.mT @ (rows @ self.vectors))
        moved = keep * self.values.unsqueeze(-2) * self.vectors + new
        # A column that no row has touched keeps its direction.
        floor = torch.finfo(rows.dtype).eps * moved.flatten(-2).norm(dim=-1)[..., None, None]
        q, r = torch.linalg.qr(moved + floor * self.vectors)
        self.vectors, self.values = q, r.diagonal(dim1=-2, dim2=-1).abs()

    def eigenpairs(self) -> tuple[Float[Tensor, "*batch r"], Float[Tensor, "*batch d r"]]:
        """Estimates of the largest eigenvalues, falling, and their vectors in columns."""
        assert self.values is not None and self.vectors is not None
        values, order = self.values.sort(dim=-1, descending=True)
        return values, self.vectors.gather(-1, order.unsqueeze(-2).expand_as(self.vectors))

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state."""
        return {"vectors": _copy(self.vectors), "values": _copy(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        _check_entries(state, {"vectors", "values"})
        vectors, values = _copy(state["vectors"]), _copy(state["values"])
        if vectors is not None and vectors.shape[-1] != self.rank:
            raise ValueError(f"state is a sketch of rank {vectors.shape[-1]}, this one has rank {self.rank}")
        self.vectors, self.values = vectors, values

    def _start(self, rows: Tensor) -> Tensor:
        generator = self.generator or torch.Generator(rows.device).manual_seed(0)
        shape = (*rows.shape[:-2], rows.shape[-1], self.rank)
        noise = torch.randn(shape, dtype=rows.dtype, device=generator.device, generator=generator)
        return torch.linalg.qr(noise.to(rows.device)).Q


class FrequentDirections:
    r"""A deterministic sketch B with $B^\top B \preceq A$ and an error that is known.

    Rows are stored until there are 2 r of them; then all squared singular values shrink by the (r + 1)-th, so that r
    rows stay. The sum of what was taken off, `shrinkage`, bounds the error: $0 \preceq A - B^\top B \preceq$
    `shrinkage` I, and it is at most $\|A - A_k\|_* / (r + 1 - k)$ for any k at most r.

    Args:
        rank: r, how many rows stay.

    Source:
        Ghashami, Liberty, Phillips and Woodruff 2016, arXiv 1501.01711.
    """

    def __init__(self, rank: int) -> None:
        check_int("rank", rank)
        self.rank = rank
        self.rows: Tensor | None = None
        self.shrinkage: Tensor | None = None

    def add(self, rows: Float[Tensor, "*batch m d"], keep: float = 1.0, gain: float = 1.0) -> None:
        r"""$A \leftarrow \mathrm{keep}\,A + \mathrm{gain}\,X^\top X$; see `Oja.add`."""
        rows = rows * gain**0.5
        if self.rows is None or self.shrinkage is None:
            _check_rank(self.rank, rows)
            self.rows = rows.new_zeros(*rows.shape[:-2], 0, rows.shape[-1])
            self.shrinkage = rows.new_zeros(rows.shape[:-2])
        kept, shrinkage = self.rows.to(rows) * keep**0.5, self.shrinkage.to(rows) * keep
        for part in rows.split(self.rank, dim=-2):
            kept = torch.cat([kept, part], dim=-2)
            if kept.shape[-2] >= 2 * self.rank:
                kept, cut = self._shrink(kept)
                shrinkage = shrinkage + cut
        self.rows, self.shrinkage = kept, shrinkage

    def _shrink(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The r rows that stay, and what the squared singular values lost."""
        values, left = torch.linalg.eigh(rows @ rows.mT)
        cut = values[..., -self.rank - 1].clamp_min(0)
        values, left = values[..., -self.rank :], left[..., -self.rank :]
        tiny = torch.finfo(values.dtype).tiny
        share = ((values - cut.unsqueeze(-1)).clamp_min(0) / values.clamp_min(tiny)).sqrt()
        return share.unsqueeze(-1) * (left.mT @ rows), cut

    def eigenpairs(self) -> tuple[Float[Tensor, "*batch r"], Float[Tensor, "*batch d r"]]:
        r"""The largest eigenvalues of $B^\top B$, falling, and their vectors in columns."""
        assert self.rows is not None
        _, singular, right = torch.linalg.svd(self.rows, full_matrices=False)
        missing = max(0, min(self.rank, right.shape[-1]) - singular.shape[-1])
        values = torch.nn.functional.pad(singular.square(), (0, missing))
        vectors = torch.nn.functional.pad(right.mT, (0, missing))
        return values[..., : self.rank], vectors[..., : self.rank]

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state."""
        return {"rows": _copy(self.rows), "shrinkage": _copy(self.shrinkage)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        _check_entries(state, {"rows", "shrinkage"})
        rows = _copy(state["rows"])
        if rows is not None and rows.shape[-2] >= 2 * self.rank:
            raise ValueError(f"state is a sketch with {rows.shape[-2]} rows, this one holds less than {2 * self.rank}")
        self.rows, self.shrinkage = rows, _copy(state["shrinkage"])


def _check_rank(rank: int, rows: Tensor) -> None:
    if rank > rows.shape[-1]:
        raise ValueError(f"rank must be at most the dimension, {rows.shape[-1]}, got {rank}")


def _check_entries(state: Mapping[str, Any], wanted: set[str]) -> None:
    if not isinstance(state, Mapping) or set(state) != wanted:
        raise ValueError(f"state of a sketch must have the entries {sorted(wanted)}, got {state!r:.60}")


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
