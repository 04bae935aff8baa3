"""Common operations whose derivative is differentiated by hand, for several vectors at once.

A Hessian product is a backward pass through a backward pass. PyTorch's own is general: it computes anew what depends on
the point alone, and with several vectors it copies matrices to bring their dimensions in order. Here each operation
keeps what the point determines, and multiplies stacks of matrices where they lie. `Twice` puts these in the place of
PyTorch's while a graph is built. They can be differentiated twice, not three times.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from steepest.curvature._attention import attention
from steepest.curvature._stacks import blocks, together


class Twice(TorchFunctionMode):
    """Within this context linear layers, GELU, SiLU, sigmoid, tanh, RMSNorm and attention take part as written here."""

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


def _sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor | None:
    if out is not None or not _needed(input) or not input.is_floating_point():
        return None
    s = torch.sigmoid(input.detach())
    return _Unary.apply(input, torch.sigmoid, s * (1 - s), s * (1 - s) * (1 - 2 * s))


def _tanh(input: Tensor, *, out: Tensor | None = None) -> Tensor | None:
    if out is not None or not _needed(input) or not input.is_floating_point():
        return None
    t = torch.tanh(input.detach())
    slope = 1 - t * t
    return _Unary.apply(input, torch.tanh, slope, -2 * t * slope)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    if len(normalized_shape) != 1 or input.ndim < 2 or not _needed(input, weight):
        return None
    if weight is not None and weight.dtype != input.dtype:
        return None
    return _RMSNorm.apply(input, weight, torch.finfo(input.dtype).eps if eps is None else eps)


def _needed(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


_REPLACEMENTS = {
    F.linear: _linear,
    F.gelu: _gelu,
    F.silu: _silu,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
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
        return together(partial(_linear_first, x.detach(), weight.detach(), ctx.needs_input_grad), gy)


class _LinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, weight: Tensor, *needed: bool) -> Any:
        ctx.values = gy.detach(), x.detach(), weight.detach()
        ctx.needed = needed
        ctx.set_materialize_grads(False)
        return together(partial(_linear_first, x, weight, needed), gy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ux: Tensor | None, uw: Tensor | None, ub: Tensor | None) -> Any:  # type: ignore[override]
        along, to_x, to_weight = together(partial(_linear_second, *ctx.values, ctx.needed), ux, uw)
        if ub is not None:
            along = ub.expand(ctx.values[0].shape) if along is None else along + ub
        return along, to_x, to_weight, None, None, None


def _linear_first(x: Tensor, weight: Tensor, needed: tuple[bool, ...], gy: Tensor) -> tuple[Tensor | None, ...]:
    """G W, G^T X and the sum of G, for a stack of G."""
    k, n = len(gy), x.shape[:-1].numel()
    gy = gy.reshape(k, n, gy.shape[-1])
    return (
        (gy.view(k * n, gy.shape[-1]) @ weight).view(k, *x.shape) if needed[0] else None,
        torch.bmm(gy.mT, x.reshape(n, x.shape[-1]).expand(k, -1, -1)) if needed[1] else None,
        gy.sum(1) if needed[2] else None,
    )


def _linear_second(
    gy: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, ...], ux: Tensor | None, uw: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The cotangents of G, X and W in (G W, G^T X), for stacks of those of the two results."""
    n = x.shape[:-1].numel()
    rows, flat = gy.reshape(n, gy.shape[-1]), x.reshape(n, x.shape[-1])
    along = to_x = to_weight = None
    if ux is not None:
        k = len(ux)
        ux = ux.reshape(k, n, ux.shape[-1])
        along = (ux.view(k * n, ux.shape[-1]) @ weight.T).view(k, *gy.shape)
        to_weight = torch.bmm(rows.T.expand(k, -1, -1), ux) if needed[1] else None
    if uw is not None:
        k = len(uw)
        flat = flat.expand(k, -1, -1)
        if along is None:
            along = torch.bmm(flat, uw.mT).view(k, *gy.shape)
        else:
            along.view(k, n, gy.shape[-1]).baddbmm_(flat, uw.mT)
        to_x = torch.bmm(rows.expand(k, -1, -1), uw).view(k, *x.shape) if needed[0] else None
    return along, to_x, to_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight)
        ctx.r, ctx.n = r, x * r
        return ctx.n if weight is None else ctx.n * weight

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_RMSNormBackward.apply(gy, x, weight, ctx.n, ctx.r), None
        return *together(partial(_rms_first, ctx.n, ctx.r, _plain(weight)), gy), None


class _RMSNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, weight: Tensor | None, n: Tensor, r: Tensor) -> Any:
        h = gy if weight is None else gy * weight
        # along n the second derivative of <h, n> is -3 <n, h> r^2 / d, across it the same without the 3
        ctx.values = gy.detach(), h.detach(), n, r, (n * h).mean(-1, keepdim=True).detach(), _plain(weight)
        ctx.set_materialize_grads(False)
        return together(partial(_rms_first, n, r, weight), gy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ux: Tensor | None, uw: Tensor | None) -> Any:  # type: ignore[override]
        return *together(partial(_rms_second, *ctx.values), ux, uw), None, None


def _plain(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()


def _rms_first(n: Tensor, r: Tensor, weight: Tensor | None, gy: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of X and W for a stack of G; n is X / rms, r is 1 / rms."""
    nw = n if weight is None else n * weight
    to_x = torch.empty_like(gy, memory_format=torch.contiguous_format)
    to_weight = None if weight is None else gy.new_empty(len(gy), n.shape[-1])
    for b in blocks(gy):
        g = gy[b]
        mean = (g * nw).sum(-1, keepdim=True).div_(-n.shape[-1])
        h = g if weight is None else g * weight
        torch.mul(torch.addcmul(h, n, mean), r, out=to_x[b])
        if to_weight is not None:
            torch.sum((g * n).flatten(1, -2), 1, out=to_weight[b])
    return to_x, to_weight


def _rms_second(
    gy: Tensor,
    h: Tensor,
    n: Tensor,
    r: Tensor,
    nh: Tensor,
    weight: Tensor | None,
    ux: Tensor | None,
    uw: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The cotangents of G, X, W in `_rms_first` for stacks of those of its results; h is G W, nh its mean with n."""
    if ux is None and uw is None:
        return None, None, None
    k, d = next(len(u) for u in (ux, uw) if u is not None), n.shape[-1]
    to_gy, to_x = n.new_empty(k, *n.shape), n.new_empty(k, *n.shape)
    to_weight = n.new_empty(k, d) if ux is not None and weight is not None else None
    r2 = r * r
    for b in blocks(to_x):
        along_n = None
        if ux is not None:
            u = ux[b]
            nu, hu = ((u * part).sum(-1, keepdim=True).div_(d) for part in (n, h))
            p = torch.addcmul(u, n, nu, value=-1).mul_(r)  # how n moves
            if weight is None:
                to_gy[b] = p
            else:
                torch.mul(p, weight, out=to_gy[b])
            if to_weight is not None:
                torch.sum(p.mul_(gy).flatten(1, -2), 1, out=to_weight[b])
            torch.mul(u, -(nh * r2), out=to_x[b]).addcmul_(h, nu * r2, value=-1)
            along_n = (3 * nh * nu).sub_(hu).mul_(r2)
        if uw is not None:
            w = uw[b].reshape(-1, *[1] * (n.ndim - 1), d)
            hw = gy * w
            along_w = (hw * n).sum(-1, keepdim=True).mul_(r).div_(-d)
            if along_n is None:
                torch.mul(n, w, out=to_gy[b])
                torch.mul(hw, r, out=to_x[b])
                along_n = along_w
            else:
                to_gy[b].addcmul_(n, w)
                to_x[b].addcmul_(hw, r)
                along_n.add_(along_w)
        to_x[b].addcmul_(n, along_n)  # type: ignore[arg-type]
    return to_gy, to_x, to_weight
