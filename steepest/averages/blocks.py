"""Weighted sums of tensors in float64, or in their own precision with the rounding errors kept beside."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float64", "compensated"]


class Block:
    """The sums of some iterates: one total for each tensor, and the sum of the weights.

    Attributes:
        totals: the sums.
        lost: what rounding has taken off the totals (compensated precision only).
        weight: sum of the weights.
        count: how many iterates.
    """

    def __init__(self, like: Sequence[Tensor], compensated: bool) -> None:
        self.totals = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in like]
        self.lost = [torch.zeros_like(each) for each in self.totals] if compensated else []
        self.weight = 0.0
        self.count = 0

    @torch.no_grad()
    def add(self, values: Sequence[Tensor], weight: float = 1.0) -> None:
        """Add values that are sums of `weight` samples."""
        self._accumulate(list(values))
        self.weight += weight
        self.count += 1

    @torch.no_grad()
    def decay(self, values: Sequence[Tensor], decay: float) -> None:
        r"""$s \leftarrow \beta s + (1 - \beta) x$, and the same for the weight with x = 1."""
        self._follow(values)
        change = 1 - decay
        if self.lost:
            steps = [change * ((x - s) + c) for x, s, c in zip(values, self.totals, self.lost, strict=True)]
            self._accumulate(steps)
        else:
            for total, value in zip(self.totals, values, strict=True):
                total.mul_(decay).add_(value, alpha=change)  # converts value on the way, without a copy of it
        self.weight += change * (1 - self.weight)
        self.count += 1

    @torch.no_grad()
    def merge(self, other: "Block") -> None:
        """Add another block."""
        self._accumulate(other.totals)
        if self.lost:
            self._accumulate([-each for each in other.lost])
        self.weight += other.weight
        self.count += other.count

    def _follow(self, values: Sequence[Tensor]) -> None:
        """Move the sums to where the values are: a loaded state may lie elsewhere."""
        if any(total.device != value.device for total, value in zip(self.totals, values, strict=True)):
            self.totals = [total.to(value.device) for total, value in zip(self.totals, values, strict=True)]
            self.lost = [lost.to(total.device) for lost, total in zip(self.lost, self.totals, strict=False)]

    def _accumulate(self, values: list[Tensor]) -> None:
        self._follow(values)
        if not self.lost:
            for total, value in zip(self.totals, values, strict=True):
                total.add_(value)
            return
        for index, value in enumerate(values):
            step = value - self.lost[index]
            total = self.totals[index] + step
            self.lost[index] = (total - self.totals[index]) - step
            self.totals[index] = total

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sums."""
        totals, lost = ([each.clone() for each in part] for part in (self.totals, self.lost))
        return {"totals": totals, "lost": lost, "weight": self.weight, "count": self.count}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], like: Sequence[Tensor], compensated: bool) -> "Block":
        """What `state_dict` wrote, at the place and in the dtype of `like`; raises ValueError if it does not fit."""
        block = cls(like, compensated)
        for name in ("totals", "lost"):
            own, saved = getattr(block, name), state[name]
            if [tuple(each.shape) for each in saved] != [tuple(each.shape) for each in own]:
                raise ValueError(
                    f"state has sums of the shapes {[tuple(each.shape) for each in saved]}, expected "
                    f"{[tuple(each.shape) for each in own]}"
                )
            setattr(block, name, [each.to(mine, copy=True) for mine, each in zip(own, saved, strict=True)])
        block.weight, block.count = float(state["weight"]), int(state["count"])
        return block
