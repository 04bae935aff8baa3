"""Several vectors at once, as one tensor (k, ...), within a `torch.vmap` that hides the k."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 15  # numbers of a block: its temporaries stay in a core's cache
_vmap: Any = getattr(torch._C, "_functorch")  # noqa: B009


def together(rule: Callable[..., tuple[Tensor | None, ...]], *values: Tensor | None) -> Any:
    """The results of `rule`, which takes and gives stacks (k, ...), for what may be hidden stacks or single tensors.

    A rule of a `torch.autograd.Function` would say the same to vmap, but a call of it takes longer than these products.
    """
    levels = [_vmap.maybe_get_level(v) for v in values if v is not None and _vmap.is_batchedtensor(v)]
    if not levels:
        found = rule(*(None if v is None else v[None] for v in values))
        return tuple(None if part is None else part[0] for part in found)
    level, k = max(levels), 1
    plain: list[tuple[Tensor | None, bool]] = []
    for value in values:
        if value is not None and _vmap.is_batchedtensor(value) and _vmap.maybe_get_level(value) == level:
            stack = _vmap.get_unwrapped(value).movedim(_vmap.maybe_get_bdim(value), 0)
            k = len(stack)
            plain.append((stack, True))
        else:
            plain.append((value, False))
    stacks = [v if v is None or stacked else v.expand(k, *v.shape) for v, stacked in plain]
    return tuple(None if part is None else _vmap._add_batch_dim(part, 0, level) for part in rule(*stacks))


def blocks(stack: Tensor) -> Iterator[slice]:
    """Pieces of the first dimension; all of it where there are no such caches."""
    k = len(stack)
    size = k if stack.is_cuda else max(1, _BLOCK * k // max(1, stack.numel()))
    return (slice(i, min(i + size, k)) for i in range(0, k, max(1, size)))


def times(a: Tensor, b: Tensor, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Products of a stack (k, n, ., .) with (n, ., .) in either order, one by one so that nothing is copied."""
    count = a.shape[0] if a.ndim == 4 else b.shape[0]
    if plus is None and out is None:
        out = a.new_empty(count, a.shape[-3], a.shape[-2], b.shape[-1])
    for i in range(count):
        left, right = (a[i] if a.ndim == 4 else a), (b[i] if b.ndim == 4 else b)
        if plus is None:
            assert out is not None
            torch.bmm(left, right, out=out[i])
        else:
            plus[i].baddbmm_(left, right)
    return out if plus is None else plus  # type: ignore[return-value]
