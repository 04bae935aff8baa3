"""Batched forms of the layers of torch.nn: all tensors lead with the candidates, b of them, or 1 where they agree."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b for every candidate.

    Args:
        x: Shape (b or 1, ..., in).
        weight: Shape (b or 1, out, in).
        bias: Shape (b or 1, out).
    """
    if x.shape[-1] != weight.shape[-1]:
        raise RuntimeError(f"a linear layer takes {weight.shape[-1]} features, got an input of {x.shape[-1]}")
    flat = x.reshape(len(x), -1, x.shape[-1])
    if len(weight) == 1:
        shared = bias[0] if bias is not None and len(bias) == 1 else None
        out, bias = F.linear(flat, weight[0], shared), None if shared is not None else bias
    else:
        flat = flat.expand(len(weight), -1, -1)
        if bias is None:
            out = torch.bmm(flat, weight.mT)
        else:
            out, bias = torch.baddbmm(bias.unsqueeze(1), flat, weight.mT), None
    if bias is not None:
        out = out + bias.unsqueeze(1)
    return out.reshape(len(out), *x.shape[1:-1], weight.shape[1])


def _linear(module: Any, weights: Weights, x: Tensor) -> Tensor:
    return linear(x, weights["weight"], weights.get("bias"))


def _convolution(module: Any, weights: Weights, x: Tensor) -> Any:
    """Candidates become groups of one convolution."""
    spatial = len(module.kernel_size)
    if x.ndim != spatial + 3 or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return NotImplemented
    weight, bias, groups = weights["weight"], weights.get("bias"), module.groups
    convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    shape = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    if len(weight) == 1:
        out = convolve(x.flatten(0, 1), weight[0], groups=groups, **shape).unflatten(0, x.shape[:2])
    elif len(x) == 1:
        out_channels = weight.shape[1] // groups
        kernels = weight.unflatten(1, (groups, out_channels)).transpose(0, 1).flatten(0, 2)
        out = convolve(x[0], kernels, groups=groups, **shape).unflatten(1, (groups, len(weight), out_channels))
        out = out.movedim(2, 0).flatten(2, 3)
    else:
        stacked = x.transpose(0, 1).flatten(1, 2)
        out = convolve(stacked, weight.flatten(0, 1), groups=groups * len(weight), **shape)
        out = out.unflatten(1, weight.shape[:2]).transpose(0, 1)
    return out if bias is None else out + bias.reshape(len(bias), 1, -1, *[1] * spatial)


def _batch_norm(module: Any, weights: Weights, x: Tensor) -> Any:
    if x.ndim < 3:
        return NotImplemented
    rest = [1] * (x.ndim - 3)
    if module.training or module.running_mean is None:
        over = [1, *range(3, x.ndim)]
        mean, variance = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
    else:
        mean, variance = (each.reshape(1, 1, -1, *rest) for each in (module.running_mean, module.running_var))
    out = (x - mean) * torch.rsqrt(variance + module.eps)
    return _affine(out, weights, lambda each: each.reshape(len(each), 1, -1, *rest))


def _layer_norm(module: Any, weights: Weights, x: Tensor) -> Tensor:
    out = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    middle = [1] * (x.ndim - 1 - len(module.normalized_shape))
    return _affine(out, weights, lambda each: each.reshape(len(each), *middle, *module.normalized_shape))


def _group_norm(module: Any, weights: Weights, x: Tensor) -> Any:
    if x.ndim < 3:
        return NotImplemented
    out = F.group_norm(x.flatten(0, 1), module.num_groups, eps=module.eps).unflatten(0, x.shape[:2])
    return _affine(out, weights, lambda each: each.reshape(len(each), 1, -1, *[1] * (x.ndim - 3)))


def _affine(x: Tensor, weights: Weights, place: Callable[[Tensor], Tensor]) -> Tensor:
    if "weight" in weights:
        x = x * place(weights["weight"])
    return x + place(weights["bias"]) if "bias" in weights else x


def _embedding(module: Any, weights: Weights, x: Tensor) -> Any:
    if module.max_norm is not None:
        return NotImplemented
    table = weights["weight"]
    if len(table) == 1:
        return F.embedding(x, table[0])
    if len(x) == 1:
        return table[:, x[0]]
    candidate = torch.arange(len(table), device=x.device).reshape(-1, *[1] * (x.ndim - 1))
    return table[candidate, x]


def _pointwise(module: Any, weights: Weights, x: Tensor) -> Tensor:
    return module(x.clone() if getattr(module, "inplace", False) else x)


def _dropout(module: Any, weights: Weights, x: Tensor) -> Tensor:
    """One mask for all candidates."""
    if not module.training:
        return x
    return x * F.dropout(torch.ones_like(x[0]), module.p, training=True)


def _softmax(module: Any, weights: Weights, x: Tensor) -> Any:
    if module.dim is None:
        return NotImplemented
    found = F.log_softmax if isinstance(module, nn.LogSoftmax) else F.softmax
    return found(x, module.dim + 1 if module.dim >= 0 else module.dim)


def _flatten(module: Any, weights: Weights, x: Tensor) -> Tensor:
    start, end = (dim + 1 if dim >= 0 else dim for dim in (module.start_dim, module.end_dim))
    if start < 0:
        start = max(start + x.ndim, 1)
    return x.flatten(start, end)


def _samplewise(module: Any, weights: Weights, x: Tensor) -> Any:
    """A layer that treats samples one by one sees candidates as more samples."""
    found = module(x.flatten(0, 1))
    return found.unflatten(0, x.shape[:2])


POINTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Hardtanh, nn.Hardsigmoid,
    nn.Hardswish, nn.LogSigmoid, nn.Threshold,
)  # fmt: skip

_SAMPLEWISE = {
    nn.MaxPool1d: 2, nn.MaxPool2d: 3, nn.AvgPool1d: 2, nn.AvgPool2d: 3, nn.AdaptiveAvgPool1d: 2,
    nn.AdaptiveAvgPool2d: 3, nn.AdaptiveMaxPool1d: 2, nn.AdaptiveMaxPool2d: 3,
}  # fmt: skip


def _pool(module: Any, weights: Weights, x: Tensor) -> Any:
    return _samplewise(module, weights, x) if x.ndim == _SAMPLEWISE[type(module)] + 2 else NotImplemented


# Exact types: a subclass may compute something else, and a parametrized layer has another type too.
RULES: dict[type[nn.Module], Callable[[Any, Weights, Tensor], Any]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.Dropout: _dropout,
    nn.Softmax: _softmax,
    nn.LogSoftmax: _softmax,
    nn.Flatten: _flatten,
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(_SAMPLEWISE, _pool),
}
