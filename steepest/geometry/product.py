"""The norm of several tensors together that has one ball per tensor: the geometry of layer-wise methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.norms import Norm, _expand
from steepest.geometry.scaled import _positive

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Product:
    r"""$\|x\| = \max_l \|x_l\|_l / r_l$ on tuples of tensors, $\|g\|_* = \sum_l r_l \|g_l\|_{l,*}$.

    The unit ball is the product of the balls of radii $r_l$, so that $\mathrm{lmo}(g)_l = r_l\,\mathrm{lmo}_l(g_l)$,
    and $g^\sharp = -\|g\|_*\,\mathrm{lmo}(g)$ has one length for all tensors. Values are batched over the leading
    dimensions that the norms leave, which all tensors share.

    Args:
        norms: one per tensor.
        radii: $r_l$, positive; ones if None.

    Raises:
        TypeError, ValueError: no norm, something that is none, or radii that are not positive or not as many.

    Source:
        Pethick et al. 2025, arXiv 2502.07529, section 3 (2506.01913 prints the dual norm with $1 / r_l$; it is $r_l$).

    Examples:
        >>> import torch
        >>> from steepest.geometry import Max, Product, Spectral
        >>> norm = Product((Spectral(), Max()), radii=(2.0, 0.5))
        >>> float(norm.norm((4 * torch.eye(3), torch.ones(2, 2))))
        2.0
    """

    norms: tuple[Norm, ...]
    radii: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "norms", tuple(self.norms))
        if not self.norms or not all(isinstance(norm, Norm) for norm in self.norms):
            raise TypeError(f"norms must be one or more Norms, got {self.norms!r}")
        if self.radii is not None:
            object.__setattr__(self, "radii", tuple(_positive(radius) for radius in self.radii))
            if len(self.radii) != len(self.norms):
                raise ValueError(f"radii must be as many as norms ({len(self.norms)}), got {len(self.radii)}")

    def norm(self, x: Sequence[Tensor]) -> Float[Tensor, "*batch"]:
        r"""$\max_l \|x_l\|_l / r_l$."""
        values = [norm.norm(each) / radius for each, norm, radius in self._with(x, "x")]
        return torch.stack(_alike(values)).amax(0)

    def dual(self, g: Sequence[Tensor]) -> Float[Tensor, "*batch"]:
        r"""$\sum_l r_l \|g_l\|_{l,*}$."""
        return torch.stack(_alike([norm.dual(each) * radius for each, norm, radius in self._with(g, "g")])).sum(0)

    def direction(self, g: Sequence[Tensor]) -> Tensors:
        """Minus `lmo`: a maximiser of the inner product with `g` over the unit ball."""
        return tuple(norm.direction(each).mul_(radius) for each, norm, radius in self._with(g, "g"))

    def direction_and_dual(self, g: Sequence[Tensor]) -> tuple[Tensors, Float[Tensor, "*batch"]]:
        """(`direction(g)`, `dual(g)`); where directions are approximate, the dual is what they attain."""
        directions, duals = [], []
        for each, norm, radius in self._with(g, "g"):
            direction, dual = norm.direction_and_dual(each)
            directions.append(direction.mul_(radius))
            duals.append(dual * radius)
        return tuple(directions), torch.stack(_alike(duals)).sum(0)

    def lmo(self, g: Sequence[Tensor]) -> Tensors:
        """The point of the unit ball with the least inner product with `g`; zero in a tensor where `g` is zero."""
        return tuple(direction.neg_() for direction in self.direction(g))

    def sharp(self, g: Sequence[Tensor]) -> Tensors:
        r"""$g^\sharp = \arg\max_x \langle g, x \rangle - \|x\|^2 / 2$."""
        directions, dual = self.direction_and_dual(g)
        return tuple(each.mul_(self.spread(dual, each, index)) for index, each in enumerate(directions))

    def spread(self, value: Float[Tensor, "*batch"], x: Tensor, index: int) -> Tensor:
        """One number per element of the batch, shaped to multiply the tensor `x` at position `index`."""
        return _expand(value, self.norms[index].dims(x)).to(x.dtype)

    def _with(self, x: Sequence[Tensor], name: str) -> list[tuple[Tensor, Norm, float]]:
        if isinstance(x, Tensor) or len(x) != len(self.norms):
            count = "one tensor" if isinstance(x, Tensor) else f"{len(x)}"
            raise ValueError(f"{name} must be a tuple of {len(self.norms)} tensors, got {count}")
        radii = self.radii or (1.0,) * len(self.norms)
        return list(zip(x, self.norms, radii, strict=True))


def _alike(values: list[Tensor]) -> list[Tensor]:
    """Values of one dtype; raises unless they have one batch shape."""
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"the tensors must have the same batch dimensions, got {sorted(shapes)}")
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return [value.to(dtype) for value in values]
