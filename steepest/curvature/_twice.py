"""Common operations whose derivative is differentiated by hand, for several vectors at once.

A Hessian product is a backward pass through a backward pass. PyTorch's own is general: it computes anew what depends on
the point alone, and with several vectors it copies matrices to bring their dimensions in order. Here each operation
keeps what the point determines, and multiplies stacks of matrices where they lie. `Twice` puts these in the place of
PyTorch's while a graph is built. They can be differentiated twice, not three times.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from steepest.curvature._attention import attention


class Twice(TorchFunctionMode):
    """Within this context linear layers, GELU, SiLU, RMSNorm and attention take part as written here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled() and not torch.is_autocast_enabled(_device(args, kwargs)):
            with torch._C.DisableTorchFunction():
                result = replacement(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _device(args: Any, kwargs: Any) -> str:
    first = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return first.device.type


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.ndim != 2 or input.ndim < 2 or not weight.is_floating_point() or not _needed(input, weight, bias):
        return None
    return _Linear.apply(input, weight, bias)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
    if approximate != "none" or not _needed(input):
        return None
    bell = torch.exp(-0.5 * input.detach().square()) * (2 * torch.pi) ** -0.5
    area = 0.5 * (1 + torch.erf(input.detach() * 0.5**0.5))
    return _Unary.apply(input, F.gelu, area + input.detach() * bell, bell * (2 - input.detach().square()))


def _silu(input: Tensor, inplace: bool = False) -> Tensor | None:
    if inplace or not _needed(input):
        return None
    x, s = input.detach(), torch.sigmoid(input.detach())
    return _Unary.apply(input, F.silu, s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s)))


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    if len(normalized_shape) != 1 or not _needed(input, weight) or (weight is not None and weight.dtype != input.dtype):
        return None
    return _RMSNorm.apply(input, weight, torch.finfo(input.dtype).eps if eps is None else eps)


def _needed(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


_REPLACEMENTS = {
    F.linear: _linear,
    F.gelu: _gelu,
    F.silu: _silu,
    F.rms_norm: _rms_norm,
    F.scaled_dot_product_attention: attention,
}


class _Unary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.first, ctx.second = first, second
        return function(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _UnaryBackward.apply(gy, *ctx.saved_tensors, ctx.first, ctx.second), None, None, None
        return gy * ctx.first, None, None, None


class _UnaryBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.first, ctx.second = first, gy * second
        return gy * first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        return u * ctx.first, u * ctx.second, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _LinearBackward.apply(gy, x, weight, *ctx.needs_input_grad)
        return _Last.apply(gy, x.detach(), weight.detach(), *ctx.needs_input_grad)


class _LinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool) -> Any:
        ctx.values = gy.detach(), x.detach(), weight.detach()
        ctx.of_x, ctx.of_weight = of_x, of_weight
        ctx.set_materialize_grads(False)
        return _Last.forward(gy, x, weight, of_x, of_weight, of_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ux: Tensor | None, uw: Tensor | None, ub: Tensor | None) -> Any:  # type: ignore[override]
        gy, x, weight = ctx.values
        along, to_x, to_weight = _Second.apply(ux, uw, gy, x, weight, ctx.of_x, ctx.of_weight)
        if ub is not None:
            along = ub.expand(gy.shape) if along is None else along + ub
        return along, to_x, to_weight, None, None, None


class _Second(torch.autograd.Function):
    """The cotangents of G, X and W in (G W, G^T X), for those of the two results; one pair or a stack of them."""

    @staticmethod
    def forward(ux: Any, uw: Any, gy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> Any:
        rows, flat = gy.flatten(0, -2), x.flatten(0, -2)
        ux = None if ux is None else ux.reshape(-1, ux.shape[-1])
        along = None if ux is None else ux @ weight.T
        if uw is not None:
            along = flat @ uw.T if along is None else torch.addmm(along, flat, uw.T)
        to_x = (rows @ uw).view(x.shape) if uw is not None and of_x else None
        to_weight = rows.T @ ux if ux is not None and of_weight else None
        return None if along is None else along.view(gy.shape), to_x, to_weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, ux: Any, uw: Any, gy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> Any:
        k, n = info.batch_size, x.shape[:-1].numel()
        rows, flat = gy.reshape(n, -1).expand(k, -1, -1), x.reshape(n, -1).expand(k, -1, -1)
        along = to_x = to_weight = None
        if ux is not None:
            ux = _stack(ux, in_dims[0], k).reshape(k, n, -1)
            along = (ux.view(k * n, -1) @ weight.T).view(k, n, -1)
            to_weight = torch.bmm(rows.mT, ux) if of_weight else None
        if uw is not None:
            uw = _stack(uw, in_dims[1], k)
            along = torch.bmm(flat, uw.mT) if along is None else along.baddbmm_(flat, uw.mT)
            to_x = torch.bmm(rows, uw).view(k, *x.shape) if of_x else None
        found = None if along is None else along.view(k, *gy.shape), to_x, to_weight
        return found, tuple(None if part is None else 0 for part in found)


class _Last(torch.autograd.Function):
    """G W, G^T X and the sum of G, for a stack of G."""

    @staticmethod
    def forward(gy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool) -> Any:
        flat = gy.flatten(0, -2)
        return (
            gy @ weight if of_x else None,
            flat.T @ x.flatten(0, -2) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, gy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
    ) -> Any:
        k, n = info.batch_size, x.shape[:-1].numel()
        gy = _stack(gy, in_dims[0], k).reshape(k, n, -1)
        found = (
            (gy.view(k * n, -1) @ weight).view(k, *x.shape) if of_x else None,
            torch.bmm(gy.mT, x.reshape(n, -1).expand(k, -1, -1)) if of_weight else None,
            gy.sum(1) if of_bias else None,
        )
        return found, tuple(None if part is None else 0 for part in found)


def _stack(value: Tensor, dim: int | None, k: int) -> Tensor:
    return value.expand(k, *value.shape) if dim is None else value.movedim(dim, 0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight)
        ctx.r = r
        return x * r if weight is None else x * r * weight

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            gx, gw = _RMSNormBackward.apply(gy, x, weight, ctx.r)
        else:
            gx, gw = _rms_backward(gy, x.detach(), weight, ctx.r)
        return gx, gw, None


def _rms_backward(gy: Tensor, x: Tensor, weight: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor | None]:
    h = gy if weight is None else gy * weight.detach()
    n = x * r
    gx = torch.addcmul(h * r, n, (h * n).sum(-1, keepdim=True) * (-r / x.shape[-1]))
    return gx, None if weight is None else (gy * n).flatten(0, -2).sum(0)


class _RMSNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, weight: Tensor | None, r: Tensor) -> Any:
        ctx.values = gy.detach(), x.detach(), None if weight is None else weight.detach(), r
        ctx.set_materialize_grads(False)
        return _rms_backward(gy, x, weight, r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ux: Tensor | None, uw: Tensor | None) -> Any:  # type: ignore[override]
        gy, x, weight, r = ctx.values
        d = x.shape[-1]
        n, h = x * r, gy if weight is None else gy * weight
        to_gy = to_x = to_weight = None
        if ux is not None:
            # n = x r moves by p = r (u - n (n.u) / d); the second derivative of <h, n> along u, x by x
            nu = (ux * n).sum(-1, keepdim=True) / d
            p = torch.addcmul(ux * r, n, nu * -r)
            to_gy = p if weight is None else p * weight
            to_weight = None if weight is None else (gy * p).flatten(0, -2).sum(0)
            nh = (n * h).sum(-1, keepdim=True) / d
            hu = (ux * h).sum(-1, keepdim=True) / d
            to_x = torch.addcmul(n * (r * r * (3 * nh * nu - hu)), h, nu * -(r * r))
            to_x = torch.addcmul(to_x, ux, -(nh * r * r))
        if uw is not None:
            extra = n * uw
            to_gy = extra if to_gy is None else to_gy + extra
            hw = gy * uw
            more = torch.addcmul(hw * r, n, (hw * n).sum(-1, keepdim=True) * (-r / d))
            to_x = more if to_x is None else to_x + more
        return to_gy, to_x, to_weight, None
