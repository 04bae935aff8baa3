"""One loss for every candidate: the cross-entropy directly, other losses through vmap or one by one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

LossFn = Callable[[Any, Any], Tensor]


class Losses:
    """Applies a loss function to the outputs of all candidates, and remembers which ones vmap cannot take."""

    def __init__(self) -> None:
        self._looped: set[Any] = set()  # by code or type: a function made anew for each batch counts once

    def __call__(self, loss_fn: LossFn, outputs: Any, targets: Any) -> Float[Tensor, " b"]:
        """The losses.

        Raises:
            ValueError: `loss_fn` does not give one real number.
        """
        ignored = _ignored(loss_fn)
        if ignored is not None and _are_logits(outputs, targets):
            return cross_entropy(outputs, targets, ignored)
        kind = getattr(loss_fn, "__code__", type(loss_fn))
        if kind not in self._looped:
            try:
                return _numbers(vmap(lambda each: loss_fn(each, targets), randomness="same")(outputs), 1)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the loop raises what is the loss function's own fault
                pass
        found = []
        for i in range(len(tree_leaves(outputs)[0])):
            own = tree_map(lambda each: each[i], outputs)  # noqa: B023
            found.append(_numbers(torch.as_tensor(loss_fn(own, targets)), 0))
        self._looped.add(kind)
        return torch.stack(found)


def _numbers(values: Tensor, leading: int) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != leading or values.is_complex():
        shape = tuple(values.shape[leading:]) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss_fn must give one real number for one candidate's output, got {shape}")
    return values


def _ignored(loss_fn: Any) -> int | None:
    """The class that does not count, if this is torch's cross-entropy in its plain form."""
    if loss_fn is F.cross_entropy:
        return -100
    plain = type(loss_fn) is nn.CrossEntropyLoss and not loss_fn._forward_hooks and not loss_fn._forward_pre_hooks
    if plain and loss_fn.weight is None and loss_fn.reduction == "mean" and not loss_fn.label_smoothing:
        return loss_fn.ignore_index
    return None


def _are_logits(outputs: Any, targets: Any) -> bool:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim != 3:
        return False
    return targets.shape == outputs.shape[1:2] and targets.dtype == torch.int64 and outputs.dtype.itemsize >= 4


def cross_entropy(
    logits: Float[Tensor, "b n classes"], targets: Int[Tensor, " n"], ignored: int = -100
) -> Float[Tensor, " b"]:
    """The mean cross-entropy of every candidate.

    torch's own form is slow where classes are few, since it vectorises over them alone.

    Raises:
        IndexError: a target is not a class.
    """
    counted = targets != ignored
    if not bool(counted.all()):
        logits, targets = logits[:, counted], targets[counted]
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[2]:
        wrong = targets[(targets < 0) | (targets >= logits.shape[2])][0]
        raise IndexError(f"Target {int(wrong)} is out of bounds.")
    chosen = logits.gather(2, targets.view(1, -1, 1).expand(len(logits), -1, 1)).squeeze(2)
    largest = logits.amax(2, keepdim=True)
    total = (logits - largest).exp_().sum(2).log_()
    return (total.add_(largest.squeeze(2)).sub_(chosen)).mean(1)
