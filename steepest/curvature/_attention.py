"""Attention whose derivative is differentiated by hand, for several vectors at once (see `_twice`).

S = c Q K^T + mask, P = softmax(S), Y = P V. For the cotangents (a, b, e) of the gradients of (Q, K, V), with G the
cotangent of Y: dS = c (a K^T + Q b^T), dP = P (dS - P.dS) and dY = dP V + P e, where P.X is the sum over a row.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steepest.curvature._stacks import blocks, times, together


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
        return *together(partial(_first, *_flat(q, k, v), ctx.p, ctx.scale), gy), None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float) -> Any:
        flat = _flat(q, k, v)
        ctx.values = *_flat(gy), *flat, p, scale
        return together(partial(_first, *flat, p, scale), gy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, b: Tensor, e: Tensor) -> Any:  # type: ignore[override]
        return *together(partial(_second, *ctx.values), a, b, e), None, None


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().flatten(0, 1) for t in tensors]


def _first(q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float, gy: Tensor) -> tuple[Tensor, ...]:
    """The gradients of Q, K and V for a stack of G."""
    heads, gy = gy.shape[1:3], gy.flatten(1, 2)
    found = [t.new_empty(len(gy), *t.shape) for t in (q, k, v)]
    for i in _blocks(len(gy), p):
        g = gy[i]
        gs = _softmax_slope(p, times(g, v.mT)).mul_(scale)
        for left, right, out in zip((gs, gs.mT, p.mT), (k, q, g), found, strict=True):
            times(left, right, out=out[i])
    return tuple(part.unflatten(1, heads) for part in found)


def _second(
    gy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float, a: Tensor, b: Tensor, e: Tensor
) -> tuple[Tensor, ...]:
    """The cotangents of G, Q, K and V in `_first`, for stacks of those of its results."""
    heads = a.shape[1:3]
    a, b, e = (t.flatten(1, 2) for t in (a, b, e))
    gp = torch.bmm(gy, v.mT)
    mean = (p * gp).sum(-1, keepdim=True)
    gs = p * (gp - mean) * scale
    found = [t.new_empty(len(a), *t.shape) for t in (gy, q, k, v)]
    for i in _blocks(len(a), p):
        to_gy, to_q, to_k, to_v = (t[i] for t in found)
        ds = times(q, b[i].mT, times(a[i], k.mT)).mul_(scale)
        centred = ds - (p * ds).sum(-1, keepdim=True)
        # how the loss's derivative along (a, b, e) moves with P, and through it with S
        slope = torch.addcmul(times(gy, e[i].mT), centred, gp).sub_(ds.mul_(mean))
        ts = _softmax_slope(p, slope).mul_(scale)
        dp = centred.mul_(p)
        times(p, e[i], times(dp, v, out=to_gy))
        times(gs, b[i], times(ts, k, out=to_q))
        times(gs.mT, a[i], times(ts.mT, q, out=to_k))
        times(dp.mT, gy, out=to_v)
    return tuple(part.unflatten(1, heads) for part in found)


def _blocks(k: int, p: Tensor) -> Iterator[slice]:
    return blocks(p.expand(k, *p.shape))


def _softmax_slope(p: Tensor, g: Tensor) -> Tensor:
    pg = p * g
    return torch.addcmul(pg, p, pg.sum(-1, keepdim=True), value=-1)
