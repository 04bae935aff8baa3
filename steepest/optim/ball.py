"""Weights and the balls of their norms: how far out they are, a start on the sphere, and the way back inside."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from steepest.geometry import Direction, MaxColumn, MaxRow, Norm, Scaled, Spectral
from steepest.geometry.matrix_norms import Schatten
from steepest.geometry.norms import Lp
from steepest.optim.engine import SteepestDescent
from steepest.optim.layout import Layout
from steepest.optim.mixed import Mixed
from steepest.optim.placement import gathered, write_back

__all__ = ["ball_ratios", "init_on_ball_", "project_"]


@dataclass(frozen=True)
class _Weight:
    """A parameter with its matrices' norms and shape factors."""

    name: str
    parameter: Tensor
    layout: Layout
    norms: list[tuple[Direction, float]]

    def ratio(self) -> float:
        blocks = self.layout.blocks(gathered(self.parameter).contiguous())
        sizes = [_size(x, norm) / factor for x, norm, factor in self._with_norms(blocks) if x.numel()]
        return max(sizes, default=0.0)

    def write(self, made: Callable[[Tensor, Norm, float], Tensor]) -> None:
        """Replace each block x by made(x, norm, factor), in float64."""
        values = gathered(self.parameter).to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        for x, norm, factor in self._with_norms(self.layout.blocks(values)):
            x.copy_(made(x, norm, factor))
        write_back(self.parameter, values)

    def _with_norms(self, blocks: list[Tensor]) -> Iterator[tuple[Tensor, Norm, float]]:
        for x, (norm, factor) in zip(blocks, self.norms, strict=True):
            if not isinstance(norm, Norm):
                raise ValueError(f"parameter {self.name} has the direction {norm}, which is no norm and has no ball")
            yield x, norm, factor


def ball_ratios(target: Optimizer | Iterable[Any]) -> dict[str, float]:
    r"""$\|W\| / r$ of each parameter, the largest over its matrices; at most one inside the ball.

    Args:
        target: an optimizer of the engine (`Scion`, `ClippedScion`, ..., or a `Mixed` with such parts, whose others are
            left out), or the parameters or groups that `Scion` would be given.

    Returns:
        Name, or position such as "0.2" (group, parameter), to ratio.
    """
    return {weight.name: weight.ratio() for weight in _weights(target)}


@torch.no_grad()
def init_on_ball_(target: Optimizer | Iterable[Any], generator: torch.Generator | None = None) -> None:
    r"""Draw weights anew on the sphere of their norms, $W = r\,T(G)$ with G Gaussian and T the norm's direction.

    That is: semi-orthogonal matrices for the spectral norm, $\pm r / in$ for the sign norm, Gaussian rows or columns of
    equal length for the row and column norms; each with its scale and radius. Vectors become zero, but those whose
    entries are all the same nonzero number (gains) are kept, and only brought inside. Computed in float64.

    Args:
        target: see `ball_ratios`.
        generator: source of the numbers; torch's global one if None.

    Raises:
        ValueError: `target` has no parameter of the engine, or a direction that is no norm.

    Examples:
        >>> import torch
        >>> from steepest.optim import Scion, init_on_ball_
        >>> layer = torch.nn.Linear(8, 4, bias=False)
        >>> init_on_ball_(layer.parameters(), torch.Generator().manual_seed(0))
        >>> optimizer = Scion(layer.parameters(), lr=2**-8, constrained=True)
        >>> bool(torch.allclose(layer.weight @ layer.weight.T, 0.5 * torch.eye(4), atol=1e-6))
        True
    """
    for weight in _weights(target):
        parameter = weight.parameter
        if parameter.ndim > 1:
            weight.write(lambda x, norm, factor: _drawn(x, norm, generator) * factor)
        elif parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            weight.write(_projected)
        else:
            parameter.zero_()


@torch.no_grad()
def project_(target: Optimizer | Iterable[Any]) -> None:
    """Bring weights that lie outside their balls back to them, in place.

    The nearest point where it is known (spectral: singular values are cut; sign: entries; row, column and Euclidean
    norms: lengths), else the weight over its norm. Weights inside stay as they are, bit by bit.

    Args:
        target: see `ball_ratios`.

    Raises:
        ValueError: `target` has no parameter of the engine, or a direction that is no norm.
    """
    for weight in _weights(target):
        if weight.ratio() > 1:
            weight.write(_projected)


def outside(optimizer: SteepestDescent, first_group: int = 0) -> dict[str, float]:
    """The parameters of constrained groups that lie outside their balls by more than rounding, with their ratios."""
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        for weight in _of_group(optimizer, index) if group["constrained"] and index >= first_group else ():
            ratio = 0.0 if weight.parameter.is_meta else weight.ratio()
            if ratio > 1 + max(1e-5, 4 * torch.finfo(weight.parameter.dtype).eps):
                found[weight.name] = ratio
    return found


def _weights(target: Any) -> Iterator[_Weight]:
    optimizers = [*target.parts.values()] if isinstance(target, Mixed) else [target]
    if not isinstance(target, Optimizer):
        from steepest.optim.scion import Scion

        entries = [{**entry, "constrained": False} if isinstance(entry, dict) else entry for entry in target]
        optimizers = [Scion(entries)]
    own = [optimizer for optimizer in optimizers if isinstance(optimizer, SteepestDescent)]
    if not own:
        raise ValueError(f"target must be an optimizer of steepest.optim's engine, got {type(target).__name__}")
    for optimizer in own:
        for index in range(len(optimizer.param_groups)):
            yield from _of_group(optimizer, index)


def _of_group(optimizer: SteepestDescent, index: int) -> Iterator[_Weight]:
    group = optimizer.param_groups[index]
    names = group.get("param_names", [f"{index}.{position}" for position in range(len(group["params"]))])
    for name, (parameter, layout, norms, *_) in zip(names, optimizer._plan(index, group), strict=True):
        yield _Weight(name, parameter, layout, norms)


def _unwrapped(norm: Norm) -> tuple[Norm, float]:
    """The norm without its radii, and their product."""
    radius = 1.0
    while isinstance(norm, Scaled):
        assert not callable(norm.radius)  # resolved for the shape
        norm, radius = norm.base, radius * norm.radius
    return norm, radius


def _size(x: Float[Tensor, "batch m n"], norm: Norm) -> float:
    """The largest norm in a batch; for the spectral norm by a small Gram matrix, and only if it may be above one."""
    base, radius = _unwrapped(norm)
    if not (isinstance(base, Schatten) and math.isinf(base.p)):
        return float(norm.norm(x).max())
    frobenius = float(torch.linalg.matrix_norm(x.float()).max())
    if frobenius <= radius or not math.isfinite(frobenius):
        return frobenius / radius
    wide = x.double() if x.shape[-2] <= x.shape[-1] else x.double().mT
    return float(torch.linalg.eigvalsh(wide @ wide.mT)[..., -1].max().clamp_min(0).sqrt()) / radius


def _drawn(x: Float[Tensor, "batch m n"], norm: Norm, generator: torch.Generator | None) -> Float[Tensor, "batch m n"]:
    base, radius = _unwrapped(norm)
    if isinstance(base, Spectral):
        base = replace(base, method="svd")
    device = x.device if generator is None else generator.device
    gaussian = torch.randn(x.shape, dtype=torch.float64, device=device, generator=generator)
    return base.direction(gaussian).to(x.device) * radius


def _projected(x: Float[Tensor, "batch m n"], norm: Norm, factor: float) -> Float[Tensor, "batch m n"]:
    base, radius = _unwrapped(norm)
    radius *= factor
    if isinstance(base, Schatten) and math.isinf(base.p):
        u, values, vh = torch.linalg.svd(x, full_matrices=False)
        return (u * values.clamp_max(radius)[..., None, :]) @ vh
    if isinstance(base, Lp) and math.isinf(base.p):
        return x.clamp(-radius, radius)
    if isinstance(base, MaxRow | MaxColumn):
        lengths = torch.linalg.vector_norm(x, dim=-1 if isinstance(base, MaxRow) else -2, keepdim=True)
        return x * (radius / lengths.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)
    size = base.norm(x)
    size = size.reshape(*size.shape, *(1 for _ in range(x.ndim - size.ndim)))
    return x * (radius / size.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)
