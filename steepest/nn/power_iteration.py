"""The spectral norm of a layer, kept up to date by power iteration."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input
from torch.nn.utils import parametrize

from steepest.curvature.lanczos import top_eigenpairs
from steepest.curvature.operator import FunctionOperator
from steepest.nn.balancing import recomputing

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_TO_INPUT = (conv1d_input, conv2d_input, conv3d_input)


@dataclass(frozen=True)
class LinearMap:
    """What a layer does to its input, without the bias: a matrix (`dims` 0), or a convolution in `dims` dimensions."""

    dims: int
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()
    uneven: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> "LinearMap":
        """The map of a layer.

        Raises:
            TypeError: not a linear or convolution layer.
            ValueError: a convolution that pads with something else than zeros.
        """
        if isinstance(layer, nn.Linear):
            return cls(0)
        if not isinstance(layer, nn.modules.conv._ConvNd):
            raise TypeError(
                f"layers: {name!r} is a {type(layer).__name__}; only linear and convolution layers have one"
            )
        if layer.padding_mode != "zeros":
            raise ValueError(f"layers: {name!r} has padding_mode={layer.padding_mode!r}; only 'zeros' is known")
        padding, uneven = layer.padding, ()
        if padding == "valid":
            padding = (0,) * len(layer.kernel_size)
        elif padding == "same":
            totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            padding, uneven = tuple(t // 2 for t in totals), tuple(t % 2 for t in totals)
        assert isinstance(padding, tuple)
        return cls(
            len(layer.kernel_size),
            layer.transposed,
            tuple(layer.stride),
            padding,
            tuple(layer.dilation),
            layer.groups,
            tuple(layer.output_padding),
            uneven if any(uneven) else (),
        )

    def input_shape(self, given: Sequence[int], weight: Tensor) -> tuple[int, ...]:
        """The shape of one input, from that of a batch."""
        if not self.dims:
            return (weight.shape[1],)
        channels = weight.shape[0] if self.transposed else weight.shape[1] * self.groups
        return (1, channels, *given[-self.dims :])

    def _padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:2], *(size + more for size, more in zip(shape[2:], self.uneven, strict=True)))

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """The layer's output for the input `x`."""
        if not self.dims:
            return weight @ x
        rest = (self.stride, self.padding, self.dilation, self.groups)
        if self.transposed:
            stride, padding, dilation, groups = rest
            function: Any = _TRANSPOSED[self.dims - 1]
            return function(x, weight, None, stride, padding, self.output_padding, groups, dilation)
        if self.uneven:
            x = F.pad(x, [side for more in reversed(self.uneven) for side in (0, more)])
        convolve: Any = _CONVOLUTIONS[self.dims - 1]
        return convolve(x, weight, None, *rest)

    def adjoint(self, weight: Tensor, y: Tensor, shape: Sequence[int]) -> Tensor:
        """The transposed map of `y`, to inputs of the shape `shape`."""
        if not self.dims:
            return weight.mT @ y
        rest = (self.stride, self.padding, self.dilation, self.groups)
        if self.transposed:
            convolve: Any = _CONVOLUTIONS[self.dims - 1]
            return convolve(y, weight, None, *rest)
        function: Any = _TO_INPUT[self.dims - 1]
        if not self.uneven:
            return function(tuple(shape), weight, y, *rest)
        found = function(self._padded(shape), weight, y, *rest)
        return found[(..., *(slice(0, size) for size in shape[2:]))]


class PowerIteration(nn.Module):
    r"""The largest singular value σ of a layer, by one more power iteration in each training forward.

    $v \leftarrow W^\top u / \|\cdot\|$, $u \leftarrow W v / \|\cdot\|$, $\sigma = u^\top W v$. Of a convolution it is
    the norm of the whole map from input to output, not of the reshaped kernel; so `v` has the shape of one input, and
    starts with the first input seen. The start is exact (by Lanczos), so that an evaluation before any training is
    right. In eval mode nothing changes.

    Attributes:
        u: the left singular vector, a buffer; empty before the start.
        v: the right one.
    """

    u: Tensor
    v: Tensor

    def __init__(self, linear_map: LinearMap, weight: Tensor, iterations: int) -> None:
        super().__init__()
        self.map, self.iterations = linear_map, iterations
        self._untrained: int | None = None  # while no training forward has run: the version of the weight at the start
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for name in ("u", "v"):
            self.register_buffer(name, torch.empty(0, dtype=dtype, device=weight.device))

    def see(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The hook before the layer's forward pass."""
        if not inputs or not isinstance(inputs[0], Tensor):
            raise TypeError("the input of a layer with a spectral norm must be a tensor given by position")
        weight = raw_weight(layer)
        shape = self.map.input_shape(inputs[0].shape, weight)
        moved = self._untrained is not None and self._untrained != _version(weight)
        if tuple(self.v.shape) != shape or moved:
            self.start(weight, shape)
        elif layer.training and not recomputing():
            self.iterate(weight, self.iterations)
        if layer.training:
            self._untrained = None

    def ready(self, weight: Tensor) -> None:
        """Start if that needs no input.

        Raises:
            RuntimeError: a convolution that has seen no input yet.
        """
        if self.v.numel():
            return
        if self.map.dims:
            raise RuntimeError(
                "the spectral norm of a convolution depends on the size of its input: run a forward pass first, or "
                "give example_input"
            )
        self.start(weight, self.map.input_shape((), weight))

    @torch.no_grad()
    def start(self, weight: Tensor, shape: Sequence[int]) -> None:
        """Begin anew, from a fixed random vector, at the exact norm."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        off = torch.autocast(weight.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), off:
            dtype = torch.promote_types(self.v.dtype, torch.float32)
            self.v = F.normalize(start.flatten(), dim=0).view(start.shape).to(weight.device, dtype)
            self.u = torch.zeros_like(self.map.apply(weight.detach().to(dtype), self.v))
            self.converge(weight)
        self._untrained = _version(weight)

    @torch.no_grad()
    def converge(self, weight: Tensor) -> None:
        """Find σ and its vectors of this weight by Lanczos, from the present `v`."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix, _, v = self._exact(weight.detach())
            shape, size = v.shape, v.numel()

            def squared(columns: Tensor) -> Tensor:
                if not self.map.dims:
                    return matrix.mT @ (matrix @ columns)
                x = columns.mT.reshape(-1, *shape[1:])
                return self.map.adjoint(matrix, self.map.apply(matrix, x), x.shape).reshape(-1, size).mT

            operator = FunctionOperator(squared, (size, size), dtype=v.dtype, device=v.device, symmetric=True)
            tol = torch.finfo(v.dtype).eps ** 0.75
            # A weight that is not finite has no norm; the loss will show it.
            with suppress(FloatingPointError):
                self.v.copy_(top_eigenpairs(operator, tol=tol, start=v.reshape(-1)).vectors.view(shape))
        self.u.copy_(_unit(self.map.apply(matrix, self.v.to(matrix.dtype)), self.u.to(matrix.dtype)))

    @torch.no_grad()
    def iterate(self, weight: Tensor, count: int) -> None:
        """`count` power iterations."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix, u, v = self._exact(weight.detach())
            for _ in range(count):
                v = _unit(self.map.adjoint(matrix, u, v.shape), v)
                u = _unit(self.map.apply(matrix, v), u)
        self.u.copy_(u)
        self.v.copy_(v)

    def sigma(self, weight: Tensor) -> Float[Tensor, ""]:
        r"""$u^\top W v$, differentiable in the weight; the vectors are copies, which may move on before a backward."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix, u, v = self._exact(weight)
            return (u.clone() * self.map.apply(matrix, v.clone())).sum()

    def _exact(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(dtype), self.u.to(dtype), self.v.to(dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **options: Any) -> None:
        if prefix + "v" in state_dict:
            self._untrained = None
        for name in ("u", "v"):
            saved = state_dict.get(prefix + name)
            own = getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != own.shape:
                setattr(self, name, torch.empty(saved.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def extra_repr(self) -> str:
        return f"input {tuple(self.v.shape)}, iterations={self.iterations}"


def _version(weight: Tensor) -> int | None:
    """How often the weight was changed in place."""
    return None if weight.is_inference() else weight._version


def _unit(vector: Tensor, previous: Tensor) -> Tensor:
    """The vector at length 1; the previous one where it is zero, so that a zero weight does not end the iteration."""
    length = vector.norm()
    return torch.where(length > 0, vector / length, previous)


def raw_weight(layer: nn.Module) -> Tensor:
    """The weight that is trained, before any parametrization."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrizations: Any = layer.parametrizations
        return parametrizations["weight"].original
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
