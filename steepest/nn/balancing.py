"""What keeps the experts of a mixture evenly used: the common interface."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steepest._checks import check_int


class Balancer(nn.Module):
    """A load balancer of one layer; this one does nothing. Subclass it to change either answer.

    A router asks it twice for a batch: `scores(p)` before the top-k choice, then `balancer(p, load, mask)` for a term
    of the training loss. State belongs in buffers, so that checkpoints keep it. It changes only while `self.training`,
    and not when activation checkpointing runs the forward pass a second time.

    Attributes:
        validate: Whether calls check the probabilities. On a GPU only the first call does, since to look at values
            there means to wait. A `Router`, which makes the probabilities itself, switches it off.
    """

    validate: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._applied: Tensor | None = None
        self._checked = False

    @property
    def active(self) -> bool:
        """Whether it influences training at all."""
        return type(self) is not Balancer

    def selection_bias(self) -> Float[Tensor, "experts"] | None:
        """What is added to the probabilities for the choice of experts; None for nothing."""
        return None

    def scores(self, probabilities: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
        """The scores that choose the top-k experts. The mixing weights are always the probabilities themselves."""
        if recomputing() and self._applied is not None:
            bias = self._applied  # the state has moved on since the first pass, whose choices must come again
        else:
            bias = self.selection_bias()
            self._applied = bias if self.training else None
        return probabilities if bias is None else probabilities + bias.to(probabilities.dtype)

    def forward(
        self,
        probabilities: Float[Tensor, "*tokens experts"],
        load: Float[Tensor, "experts"] | None = None,
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """Take note of a batch, and give the term that joins the training loss.

        Args:
            probabilities: The softmax over all experts, before top-k.
            load: The fraction of (token, choice) pairs that went to each expert.
            mask: True for the tokens that count; all if None. Rows of other tokens may hold anything.

        Returns:
            The term, 0 if there is none.

        Raises:
            ValueError: the probabilities are not a softmax over this balancer's experts, or `load` is needed.
            TypeError: `mask` is not of type bool.
        """
        return zero(probabilities)

    def reset(self) -> None:
        """Forget what was seen: all state as when it was made."""
        for buffer in self.buffers():
            buffer.zero_()

    def _flat(
        self, probabilities: Tensor, mask: Tensor | None, experts: int | None = None
    ) -> tuple[Float[Tensor, "experts"], Float[Tensor, ""]]:
        """Sum of the probabilities over the tokens that count, in float32 or better, and their number."""
        if experts is not None and (probabilities.ndim < 1 or probabilities.shape[-1] != experts):
            raise ValueError(
                f"probabilities must have experts = {experts} as the last dimension, "
                f"got shape {tuple(probabilities.shape)}"
            )
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be of type bool, True for tokens that count, got {mask.dtype}")
            if mask.shape != probabilities.shape[:-1]:
                raise ValueError(
                    f"mask must have shape {tuple(probabilities.shape[:-1])}, one entry for each token, "
                    f"got {tuple(mask.shape)}"
                )
        if self.validate and not torch.compiler.is_compiling():
            if probabilities.device.type == "cpu" or not self._checked:
                check_probabilities(probabilities, mask)
            self._checked = True
        wide = torch.promote_types(probabilities.dtype, torch.float32)
        if mask is None:
            rows = probabilities.reshape(-1, probabilities.shape[-1])
            return rows.sum(0, dtype=wide), torch.full((), rows.shape[0], dtype=wide, device=rows.device)
        kept = torch.where(mask.unsqueeze(-1), probabilities, 0).reshape(-1, probabilities.shape[-1])
        return kept.sum(0, dtype=wide), mask.sum().to(wide)


class StatefulBalancer(Balancer):
    """What balancers with state for each expert share: pooling over ranks, precision, checks when loaded.

    Args:
        experts: Number of experts E, at least 2.
        accumulation: Forward passes (micro-batches) for each optimizer step.
        sync: Whether sums are pooled over the data-parallel ranks, where `torch.distributed` runs. Every rank must then
            call the balancer equally often.
        process_group: The ranks; the default group if None.
    """

    def __init__(
        self, experts: int, *, accumulation: int = 1, sync: bool = True, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        check_int("experts", experts)
        if experts < 2:
            raise ValueError(f"experts must be at least 2 to be balanced, got {experts}")
        check_int("accumulation", accumulation)
        self.experts = experts
        self.accumulation = accumulation
        self.sync = sync
        self.process_group = process_group
        self._per_token: Tensor | None = None

    def _state(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def _pooled(self, *sums: Tensor) -> tuple[list[Tensor], int]:
        """The sums over all ranks, in one message, and the number of ranks."""
        ranks = 1
        if self.sync and dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size(self.process_group)
        if ranks == 1:
            return list(sums), 1
        packed = torch.cat([each.detach().reshape(-1) for each in sums])
        dist.all_reduce(packed, group=self.process_group)
        parts = packed.split([each.numel() for each in sums])
        return [part.view(each.shape) for part, each in zip(parts, sums, strict=True)], ranks

    def _mean(self, total: Float[Tensor, "experts"], count: Float[Tensor, ""]) -> Float[Tensor, "experts"]:
        """This rank's part of the mean probability: its average over ranks is the mean over all their tokens."""
        if self.training and self._per_token is not None:
            return total * self._per_token.to(total.dtype)
        return total / count.clamp_min(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """State stays in float32 or better when the model is cast down."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.is_floating_point() and new.dtype.itemsize < old.dtype.itemsize:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if buffer is not None and isinstance(found, Tensor) and found.shape != buffer.shape:
                raise ValueError(
                    f"experts is {self.experts}, but {prefix + name} of the state to load has shape "
                    f"{tuple(found.shape)}: it is of another number of experts"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class CombinedBalancer(Balancer):
    """Several balancers on one router: their biases add up, and so do their losses.

    Warns if a `PhiBalancer` stands beside another one that is active: two controllers of the same load fight.

    Args:
        balancers: At least one.
    """

    def __init__(self, balancers: Sequence[Balancer]) -> None:
        super().__init__()
        if not balancers:
            raise ValueError("balancers must hold at least one balancer, got none")
        self.parts = nn.ModuleList(balancers)
        working = [part for part in self._parts() if part.active]
        if len(working) > 1 and any(type(part).__name__ == "PhiBalancer" for part in working):
            names = " and ".join(type(part).__name__ for part in working)
            warnings.warn(f"{names} control the load of the same router and may fight; one is enough", stacklevel=2)

    def _parts(self) -> list[Balancer]:
        return [part for part in self.parts if isinstance(part, Balancer)]

    def scores(self, probabilities: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
        """The probabilities with all biases."""
        for part in self._parts():
            probabilities = part.scores(probabilities)
        return probabilities

    def forward(
        self,
        probabilities: Float[Tensor, "*tokens experts"],
        load: Float[Tensor, "experts"] | None = None,
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """The sum of the losses."""
        return torch.stack([part(probabilities, load, mask) for part in self._parts()]).sum()


def check_probabilities(probabilities: Float[Tensor, "*tokens experts"], mask: Tensor | None = None) -> None:
    """Raise ValueError unless every row that counts is finite, not negative, and sums to 1."""
    with torch.no_grad():
        low = probabilities.dtype.itemsize < 4
        bad = ~((probabilities >= 0).all(-1) & ((probabilities.float().sum(-1) - 1).abs() <= (2e-2 if low else 1e-3)))
        if mask is not None:
            bad &= mask
        if bool(bad.any()):
            raise ValueError(
                "probabilities must be a softmax over experts (finite, not negative, each row with the sum 1, not "
                f"logits), got a row {[round(float(x), 4) for x in probabilities[bad][0][:8]]}"
            )


def check_real(name: str, value: Any, least: float = 0.0, below: float = math.inf) -> float:
    """`value`, if it is a finite number in [least, below)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and least <= value < below):
        limit = f"at least {least:g}" + ("" if below == math.inf else f" and below {below:g}")
        raise ValueError(f"{name} must be {limit}, got {value!r}")
    return float(value)


def recomputing() -> bool:
    """Whether this runs inside a backward pass, where activation checkpointing repeats a forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def needed(load: Tensor | None, probabilities: Tensor) -> Tensor:
    """`load` without its gradient; raises ValueError if it is missing or of the wrong shape."""
    if load is None:
        raise ValueError("load must be given: the fraction of choices that went to each expert; got None")
    if load.shape != probabilities.shape[-1:]:
        raise ValueError(f"load must have shape {tuple(probabilities.shape[-1:])}, got {tuple(load.shape)}")
    return load.detach()


def zero(probabilities: Tensor) -> Float[Tensor, ""]:
    """The loss of a balancer that has none."""
    return torch.zeros((), dtype=torch.promote_types(probabilities.dtype, torch.float32), device=probabilities.device)
