"""Whether a rule commutes with a symmetry of its weights: a check for tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.directions import Direction

Group = Literal["none", "permutation", "signs", "orthogonal"]


@dataclass(frozen=True)
class Symmetry:
    r"""$X \mapsto L X R^\top$ with $L$ and $R$ from groups of matrices, and shifts $X + 1 a^\top$ of all rows.

    Attributes:
        left: of L, on the rows: ``"none"``, ``"permutation"``, ``"signs"`` (diagonal, plus and minus one) or
            ``"orthogonal"``.
        right: of R, on the columns.
        shift: whether one vector may be added to all rows. The rule must not see it: $T(X + 1 a^\top) = T(X)$, and
            $1^\top T(X) = 0$, so that no step goes along it.

    """

    left: Group = "permutation"
    right: Group = "orthogonal"
    shift: bool = False

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) not in get_args(Group):
                raise ValueError(f"{name} must be one of {', '.join(get_args(Group))}, got {getattr(self, name)!r}")


def check_equivariance(
    rule: Direction | Callable[[Tensor], Tensor],
    symmetry: Symmetry,
    shape: tuple[int, ...] = (7, 4),
    *,
    trials: int = 3,
    generator: torch.Generator | None = None,
) -> float:
    r"""How far a rule is from commuting with a symmetry, on random matrices in float64.

    Args:
        rule: a `Direction`, or any function of a matrix (or batch) of the given shape.
        symmetry: what it should commute with.
        shape: (*batch, rows, columns) of the matrices; each of a batch is turned by its own L and R.
        trials: number of random matrices.
        generator: where they come from; None: seed 0.

    Returns:
        The largest of $\|T(L X R^\top) - L\,T(X) R^\top\|_F / \|T(X)\|_F$ and, with shifts,
        $\|T(X + 1 a^\top) - T(X)\|_F / \|T(X)\|_F$ and $\max |1^\top T(X)| / \|T(X)\|_F$. About 1e-14 for an
        exact rule, of order one for a rule without the symmetry.

    Source:
        Lau and Su 2026, arXiv 2605.18106 (the symmetry-compatible principle).

    Examples:
        >>> from steepest.geometry import MaxRow, Symmetry, check_equivariance
        >>> check_equivariance(MaxRow(), Symmetry("permutation", "orthogonal")) < 1e-12
        True
        >>> check_equivariance(MaxRow(), Symmetry("orthogonal", "orthogonal")) < 0.1
        False

    """
    if len(shape) < 2 or trials < 1:
        raise ValueError(f"shape must be (*batch, rows, columns) and trials at least 1, got {shape!r} and {trials!r}")
    apply = rule.at(tuple(shape[-2:])).direction if isinstance(rule, Direction) else rule
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    worst = 0.0
    for _ in range(trials):
        x = _random(shape, generator)
        image = apply(x.clone())
        size = float(image.norm()) or 1.0
        left, right = _element(symmetry.left, shape[:-1], generator), _element(symmetry.right, _drop(shape), generator)
        errors = [(apply(left @ x @ right.mT) - left @ image @ right.mT).norm()]
        if symmetry.shift:
            moved = x + _random((*shape[:-2], 1, shape[-1]), generator)
            errors += [(apply(moved) - image).norm(), image.sum(-2).abs().max()]
        worst = max(worst, *(float(error) / size for error in errors))
    return worst


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "..."]:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _drop(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1])


def _element(group: Group, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*batch k k"]:
    """Random elements (*batch, k, k) of a group of matrices."""
    size = shape[-1]
    if group == "orthogonal":
        return torch.linalg.qr(_random((*shape, size), generator))[0]
    identity = torch.eye(size, dtype=torch.float64)
    if group == "permutation":
        return identity[_random(shape, generator).argsort(-1)]
    signs = _random(shape, generator).sign() if group == "signs" else torch.ones(shape, dtype=torch.float64)
    return torch.diag_embed(signs)
