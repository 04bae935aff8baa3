"""Directions that commute with the symmetry of their weights: by rows, spectral, both; centred, oriented."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.directions import Direction
from steepest.geometry.inverse_root import RootMethod, check_root, inverse_sqrt
from steepest.geometry.norms import check_tensor, euclidean, inverse_length, largest_entry, single
from steepest.geometry.orientation import Orientation, check_orientation, orient, restore
from steepest.geometry.polar import polar

Side = Literal["auto", "left", "right"]
Order = Literal["row_then_polar", "polar_then_row"]
SpectralMethod = Literal["auto", "svd", "eigh", "newton_schulz", "polar_express"]


def centered(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    r"""$(I - 11^\top / m) X$: each column less its mean; rows that only rounding leaves become zero."""
    wide = single(x)
    largest = largest_entry(wide, (-2, -1), keepdim=True)
    return _center_(wide.clone() if wide is x else wide, largest).to(x.dtype)


def _center_(x: Tensor, largest: Tensor | float) -> Tensor:
    """`centered` in place, given the largest entry: a fresh tensor of this size costs more than the arithmetic."""
    x.sub_(x.mean(-2, keepdim=True))
    # The mean of m numbers of size s is off by a few eps s: a row below that holds no information.
    floor = largest * (4 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]))
    return x.mul_(euclidean(x, (-1,), keepdim=True) > floor)


@dataclass(frozen=True)
class Equivariant(Direction):
    r"""The common shell: orient, take the largest entry out, centre, apply the rule, centre again, turn back.

    Args:
        center: remove the mean row before and after: for blocks whose outputs may all be shifted by one number (router,
            softmax head). The rule then ignores such a shift and never moves along it.
        orientation: what a row of the rule is, see `steepest.geometry.orientation`.

    """

    center: bool = False
    orientation: Orientation = "rows"

    def __post_init__(self) -> None:
        if not isinstance(self.center, bool):
            raise TypeError(f"center must be True or False, got {self.center!r}")
        check_orientation(self.orientation)

    def at(self, shape: tuple[int, ...]) -> "Equivariant":
        check_orientation(self.orientation, shape)
        return self

    @property
    def _keeps_scale(self) -> bool:
        """Whether T(t g) = t^alpha T(g) with alpha > 0: the length may then pass the range of half precision."""
        return False

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        check_tensor(g, "g", least_ndim=2)
        if g.numel() == 0:
            return torch.zeros_like(g)
        wide = single(orient(g, self.orientation))
        scale = largest_entry(wide, (-2, -1), keepdim=True)
        unit = wide / scale.clamp_min(torch.finfo(wide.dtype).tiny)
        result = self._rule(_center_(unit, 1.0) if self.center else unit, scale)
        if self.center:
            result.sub_(result.mean(-2, keepdim=True))
        result = restore(result, self.orientation)
        return result if self._keeps_scale else result.to(g.dtype)

    @abstractmethod
    def _rule(self, unit: Float[Tensor, "*batch m n"], scale: Float[Tensor, "*batch 1 1"]) -> Tensor:
        """The rule for `unit * scale`, a new tensor; the entries of `unit`, which it may overwrite, are at most one."""


@dataclass(frozen=True)
class RowNorm(Equivariant):
    r"""Each row over its length; with `center`, $C\,\mathrm{rownorm}(C X)$ with $C = I - 11^\top/m$.

    Commutes with permutations of the rows and rotations of the columns; does not depend on the scale of the gradient,
    nor, uncentred, on that of any row. Uncentred it is the direction of the norm `MaxRow`. For token embeddings; with
    `center` for heads and routers (a single row then gives zero: there is nothing but the shift).

    Args:
        center: see `Equivariant`.
        orientation: see `Equivariant`.
        eps: added to the length of every row. None adds nothing: the smallest gradient gives a full step.
        min_row_norm: rows shorter than this share of the longest one are divided by that share instead. A token that
            was seen once keeps a momentum that decays but never ends, and without this bound keeps a full step.

    Source:
        Lau and Su 2026, arXiv 2605.18106 (RowNorm, centred RowNorm, row-, column- and pair-aware).

    """

    eps: float | None = None
    min_row_norm: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be a positive number or None, got {self.eps!r}")
        if not 0 <= self.min_row_norm <= 1:
            raise ValueError(f"min_row_norm must be a number from 0 to 1, got {self.min_row_norm!r}")

    @property
    def rowwise(self) -> bool:
        return not self.center and self.orientation == "rows" and self.min_row_norm == 0

    def multiplier(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m 1"] | None:
        if not self.rowwise or self.eps is not None:
            return None
        return inverse_length(g, (-1,))

    def direction(self, g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        if self.rowwise and isinstance(g, Tensor) and g.ndim >= 2 and g.numel() and g.is_floating_point():
            check_tensor(g, "g", least_ndim=2)
            return unit_rows(g, self.eps)
        return super().direction(g)

    def _rule(self, unit: Tensor, scale: Tensor) -> Tensor:
        tiny = torch.finfo(unit.dtype).tiny
        eps = None if self.eps is None else (self.eps / scale.clamp_min(tiny)).clamp_max(1 / tiny)
        return unit.div_(_row_lengths(unit, eps, self.min_row_norm))


def unit_rows(
    x: Float[Tensor, "*batch m n"], eps: float | Tensor | None = None, least: float = 0.0
) -> Float[Tensor, "*batch m n"]:
    """Every row over its length plus `eps`, the length at least `least` times the longest; zero rows stay zero."""
    wide = single(x)
    return (wide / _row_lengths(wide, eps, least)).to(x.dtype)


def _row_lengths(x: Tensor, eps: float | Tensor | None, least: float) -> Tensor:
    lengths = euclidean(x, (-1,), keepdim=True)
    if least:
        lengths = torch.maximum(lengths, least * lengths.amax(-2, keepdim=True))
    if eps is not None:
        lengths = lengths + eps
    return lengths.clamp_min(torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class _WithPolar(Equivariant):
    """What the rules with a polar factor share."""

    alpha: float = 1.0
    side: Side = "auto"
    method: SpectralMethod = "auto"
    steps: int | None = None
    eps: float | None = None
    per_matrix_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a finite number, at least 0; got {self.alpha!r}")
        if self.side not in get_args(Side):
            raise ValueError(f"side must be one of {', '.join(get_args(Side))}, got {self.side!r}")
        if self.method not in get_args(SpectralMethod):
            raise ValueError(f"method must be one of {', '.join(get_args(SpectralMethod))}, got {self.method!r}")
        check_root("eigh", self.steps, self.eps)

    @property
    def costly(self) -> bool:
        return True

    @property
    def spans_batch(self) -> bool:
        return self.alpha > 0 and not self.per_matrix_scale

    def dims(self, x: Tensor) -> tuple[int, ...]:
        return tuple(range(-min(3 if self.spans_batch else 2, x.ndim), 0))

    def _polar(self, x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        """The polar factor, by the Gram matrix of the chosen side where the method forms one."""
        left = x.shape[-2] <= x.shape[-1] if self.side == "auto" else self.side == "left"
        if self.method == "svd":
            return polar(x, "svd")
        if self.method == "auto" and left == (x.shape[-2] <= x.shape[-1]):
            return polar(x, "auto", steps=self.steps)
        method: RootMethod = self.method if self.method != "auto" else "polar_express"  # pyright: ignore[reportAssignmentType]
        work = x.double() if method == "eigh" else x
        gram = work @ work.mT if left else work.mT @ work
        root = inverse_sqrt(gram, method, steps=self.steps, eps=self.eps)
        return (root @ work if left else work @ root).to(x.dtype)

    def _power(self, pairing: Tensor) -> Tensor:
        """Nu^alpha, from <X, polar(X)> per matrix."""
        if self.spans_batch and pairing.ndim > 2:
            pairing = pairing.sum(-3, keepdim=True)
        return pairing.clamp_min(0).pow(self.alpha).clamp_max(torch.finfo(pairing.dtype).max)


@dataclass(frozen=True)
class OneSided(_WithPolar):
    r"""$\nu^\alpha (X X^\top)^{-1/2} X = \nu^\alpha X (X^\top X)^{-1/2}$, $\nu = \|X\|_*$: PolarGrad.

    Both sides are the polar factor; `side` says which Gram matrix is formed, left (rows x rows) or right (columns x
    columns), and the smaller one is cheaper by far (never form tokens x tokens). Commutes with rotations of both sides.
    With `center`, $C\,\nu^\alpha\,\mathrm{polar}(C X)$: for routers and heads. $T(t X) = t^\alpha T(X)$; with
    $\alpha = 1$ it is steepest descent in the spectral norm, length included, and results for half precision come in
    float32, since they may pass its range.

    Args:
        center: see `Equivariant`.
        orientation: see `Equivariant`.
        alpha: power of the nuclear norm; 0 is the bare direction, which needs other learning rates.
        side: ``"left"``, ``"right"``, or ``"auto"``, the smaller.
        method: ``"svd"`` and ``"eigh"`` (in float64) are exact; ``"newton_schulz"`` and ``"polar_express"`` iterate on
            the Gram matrix, see `inverse_sqrt`; ``"auto"`` is the fastest iteration of `polar` where `side` is the
            smaller one, else ``"polar_express"``.
        steps: of an iteration; None: its own default.
        eps: relative cutoff or damping of the Gram matrix, see `inverse_sqrt`.
        per_matrix_scale: each matrix has its own $\nu$; False: one sum over the matrices of a parameter (experts).

    Source:
        Lau and Su 2026, arXiv 2605.18106 (one-sided spectral, centred one-sided spectral).

    """

    @property
    def _keeps_scale(self) -> bool:
        return self.alpha > 0

    def _rule(self, unit: Tensor, scale: Tensor) -> Tensor:
        factor = self._polar(unit)
        if self.alpha == 0:
            return factor
        pairing = (unit * factor).sum((-2, -1), keepdim=True) * scale
        return factor * self._power(pairing.clamp_max(torch.finfo(unit.dtype).max))


@dataclass(frozen=True)
class Hybrid(_WithPolar):
    r"""Rows to length one and a polar factor, in either order.

    ``"row_then_polar"`` (the default, as in the authors' training): $Z = \mathrm{rownorm}(X)$, $O = \mathrm{polar}(Z)$,
    $\langle Z, O \rangle^\alpha O$; with `center`, Z and the result are centred as well.
    ``"polar_then_row"``: $\mathrm{rownorm}(\mathrm{polar}(X))$; `alpha` has no effect. Both commute with permutations
    of the rows and rotations of the columns, and do not depend on the scale of the gradient.

    Args:
        center: see `Equivariant`.
        orientation: see `Equivariant`.
        alpha: power of $\langle Z, O \rangle$; 0 is the bare direction, which needs other learning rates.
        side: see `OneSided`.
        method: see `OneSided`.
        steps: see `OneSided`.
        eps: see `OneSided`.
        per_matrix_scale: see `OneSided`.
        order: what comes first.

    Source:
        Lau and Su 2026, arXiv 2605.18106 (row-aware and column-aware hybrids, centred hybrid, pair-aware hybrid).

    """

    order: Order = "row_then_polar"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}")

    @property
    def spans_batch(self) -> bool:
        return super().spans_batch and self.order == "row_then_polar"

    def _rule(self, unit: Tensor, scale: Tensor) -> Tensor:
        if self.order == "polar_then_row":
            rows = unit_rows(self._polar(unit))
            return torch.where(unit.any(-1, keepdim=True), rows, 0.0)  # what rounding left of a zero row is no row
        z = unit_rows(unit)
        z = _center_(z, 1.0) if self.center else z
        factor = self._polar(z)
        return factor if self.alpha == 0 else factor * self._power((z * factor).sum((-2, -1), keepdim=True))
