"""Attention whose derivative is differentiated by hand, for several vectors at once (see `_twice`).

S = c Q K^T + mask, P = softmax(S), Y = P V. For the cotangents (a, b, e) of the gradients of (Q, K, V), with G the
cotangent of Y: dS = c (a K^T + Q b^T), dP = P (dS - P.dS) and dY = dP V + P e, where P.X is the sum over a row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`scaled_dot_product_attention`; None where this form does not apply."""
    tensors = (query, key, value)
    if dropout_p or any(t.ndim != 4 for t in tensors) or not all(t.requires_grad for t in tensors):
        return None
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if query.shape[:2] != key.shape[:2] or key.shape[:2] != value.shape[:2]:
        return None
    if attn_mask is not None and (is_causal or attn_mask.requires_grad):
        return None
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    return _Attention.apply(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        s = q @ k.mT * scale
        p = (s if mask is None else s + mask).softmax(-1)
        ctx.save_for_backward(q, k, v)
        ctx.p, ctx.scale = p.flatten(0, 1), scale
        return p @ v

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_AttentionBackward.apply(gy, q, k, v, ctx.p, ctx.scale), None, None
        return *_First.apply(gy, q.detach(), k.detach(), v.detach(), ctx.p, ctx.scale), None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float) -> Any:
        ctx.values = gy.detach(), q.detach(), k.detach(), v.detach(), p, scale
        return _First.forward(gy, q, k, v, p, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, b: Tensor, e: Tensor) -> Any:  # type: ignore[override]
        return *_Second.apply(a, b, e, *ctx.values), None, None


class _Stacked(torch.autograd.Function):
    """A function that takes a single input or a stack of them, and is not differentiated itself."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _First(_Stacked):
    """The gradients of Q, K and V for a stack of G."""

    @staticmethod
    def forward(gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float) -> Any:
        return tuple(part[0] for part in _first(gy[None], q, k, v, p, scale))

    @staticmethod
    def vmap(info: Any, in_dims: Any, gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float) -> Any:
        return _first(gy.movedim(in_dims[0], 0), q, k, v, p, scale), (0, 0, 0)


class _Second(_Stacked):
    """The cotangents of G, Q, K and V in `_First`, for stacks of those of its results."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, e: Tensor, gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float
    ) -> Any:
        return tuple(part[0] for part in _second(a[None], b[None], e[None], gy, q, k, v, p, scale))

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, e: Tensor, *others: Any) -> Any:
        stacks = []
        for value, dim in zip((a, b, e), in_dims, strict=False):
            stacks.append(value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0))
        return _second(*stacks, *others), (0, 0, 0, 0)


def _first(gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float) -> tuple[Tensor, ...]:
    shape = gy.shape[:3]
    gy, (q, k, v) = gy.flatten(1, 2), (t.flatten(0, 1) for t in (q, k, v))
    gs = _softmax_slope(p, _times(gy, v.mT)).mul_(scale)
    found = _times(gs, k), _times(gs.mT, q), _times(p.mT, gy)
    return tuple(part.unflatten(1, shape[1:]) for part in found)


def _second(
    a: Tensor, b: Tensor, e: Tensor, gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, ...]:
    shape = a.shape[:3]
    a, b, e = (t.flatten(1, 2) for t in (a, b, e))
    gy, q, k, v = (t.flatten(0, 1) for t in (gy, q, k, v))
    gp = torch.bmm(gy, v.mT)
    mean = (p * gp).sum(-1, keepdim=True)
    gs = p * (gp - mean) * scale
    ds = _times(q, b.mT, _times(a, k.mT)).mul_(scale)
    centred = ds - (p * ds).sum(-1, keepdim=True)
    dp = p * centred
    to_gy = _times(p, e, _times(dp, v))
    # how the loss's derivative along (a, b, e) moves with P, and through it with S
    slope = torch.addcmul(_times(gy, e.mT), centred, gp).sub_(mean * ds)
    ts = _softmax_slope(p, slope).mul_(scale)
    to_q = _times(gs, b, _times(ts, k))
    to_k = _times(gs.mT, a, _times(ts.mT, q))
    to_v = _times(dp.mT, gy)
    return tuple(part.unflatten(1, shape[1:]) for part in (to_gy, to_q, to_k, to_v))


def _softmax_slope(p: Tensor, g: Tensor) -> Tensor:
    pg = p * g
    return torch.addcmul(pg, p, pg.sum(-1, keepdim=True), value=-1)


def _times(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """Products of a stack (k, n, ., .) with (n, ., .) in either order, one by one so that nothing is copied."""
    count = a.shape[0] if a.ndim == 4 else b.shape[0]
    shape = (count, a.shape[-3], a.shape[-2], b.shape[-1])
    out = a.new_empty(shape) if plus is None else plus
    for i in range(count):
        left, right = (a[i] if a.ndim == 4 else a), (b[i] if b.ndim == 4 else b)
        if plus is None:
            torch.bmm(left, right, out=out[i])
        else:
            out[i].baddbmm_(left, right)
    return out
