"""The baselines: the load-balance losses of a micro-batch and of the whole batch, and the loss-free bias."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from steepest.nn.balancing import Balancer, StatefulBalancer, check_real, needed, recomputing, zero


class SwitchBalancer(Balancer):
    """The load-balance loss of the Switch Transformer, `coefficient * E * sum_e f_e P_e`.

    f_e is the share of choices that expert e got (no gradient), P_e its mean probability, both of this call's tokens
    on this rank. The value at balance is the coefficient. Source: Fedus et al. 2021, arXiv 2101.03961, equations 4-6.

    Args:
        coefficient: The factor, at least 0.
    """

    def __init__(self, coefficient: float = 0.01) -> None:
        super().__init__()
        self.coefficient = check_real("coefficient", coefficient)

    @property
    def active(self) -> bool:
        """Whether the coefficient is above 0."""
        return self.coefficient > 0

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"coefficient={self.coefficient:g}"

    def forward(
        self,
        probabilities: Float[Tensor, "*tokens experts"],
        load: Float[Tensor, "experts"] | None = None,
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss above."""
        total, count = self._flat(probabilities, mask)
        share = needed(load, probabilities)
        if not self.coefficient:
            return zero(probabilities)
        mean = total / count.clamp_min(1)
        return self.coefficient * probabilities.shape[-1] * (share.to(mean.dtype) * mean).sum()


class _CountingBalancer(StatefulBalancer):
    """Counts choices over the forward passes of one optimizer step, and over ranks."""

    counts: Tensor
    tokens: Tensor
    position: Tensor

    def __init__(self, experts: int, **options: Any) -> None:
        super().__init__(experts, **options)
        self._state("counts", experts)
        self._state("tokens")
        self._state("position", dtype=torch.int64)

    def _count(self, load: Float[Tensor, "experts"], count: Float[Tensor, ""]) -> None:
        (counts, tokens), ranks = self._pooled(*(x.to(self.counts.dtype) for x in (load * count, count)))
        self._per_token = ranks / tokens.clamp_min(1)
        first = self.position == 0
        self.counts.copy_(torch.where(first, counts, self.counts + counts))
        self.tokens.copy_(torch.where(first, tokens, self.tokens + tokens))
        self.position.copy_((self.position + 1) % self.accumulation)

    def _load(self) -> Float[Tensor, "experts"]:
        return self.counts / self.tokens.clamp_min(1)


class GlobalSwitchBalancer(_CountingBalancer):
    """The Switch loss with the load f of the whole batch: all micro-batches of the step so far, on all ranks.

    A micro-batch may then specialise, as long as the batch is balanced. P is still of this call's tokens, since the
    gradient goes through it. Source: Qiu et al. 2025, arXiv 2501.11873.

    Args:
        experts: Number of experts E, at least 2.
        coefficient: The factor, at least 0.
        accumulation: Micro-batches for each optimizer step.
        sync: Whether f is pooled over ranks.
        process_group: The ranks; the default group if None.

    Attributes:
        counts: (experts,) choices in the present step so far.
    """

    def __init__(
        self,
        experts: int,
        coefficient: float = 0.01,
        *,
        accumulation: int = 1,
        sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(experts, accumulation=accumulation, sync=sync, process_group=process_group)
        self.coefficient = check_real("coefficient", coefficient)

    @property
    def active(self) -> bool:
        """Whether the coefficient is above 0."""
        return self.coefficient > 0

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"experts={self.experts}, coefficient={self.coefficient:g}"

    def forward(
        self,
        probabilities: Float[Tensor, "*tokens experts"],
        load: Float[Tensor, "experts"] | None = None,
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss above; in evaluation mode that of this call alone."""
        total, count = self._flat(probabilities, mask, self.experts)
        share = needed(load, probabilities)
        if self.training:
            if not recomputing():
                self._count(share, count)
            share = self._load()
        if not self.coefficient:
            return zero(probabilities)
        mean = self._mean(total, count)
        return self.coefficient * self.experts * (share.to(mean.dtype) * mean).sum()


class LossFreeBalancer(_CountingBalancer):
    """No loss, but a bias on the scores: after each optimizer step `bias_e += step * sign(1/E - f_e)`.

    f is the load of that step alone, over all its micro-batches and ranks. The bias takes part in the choice of experts
    only. Source: Wang et al. 2024, arXiv 2408.15664.

    Args:
        experts: Number of experts E, at least 2.
        step: How far a bias moves, at least 0.
        accumulation: Micro-batches for each optimizer step.
        sync: Whether f is pooled over ranks.
        process_group: The ranks; the default group if None.

    Attributes:
        bias: (experts,) the bias.
    """

    bias: Tensor

    def __init__(
        self,
        experts: int,
        step: float = 1e-3,
        *,
        accumulation: int = 1,
        sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(experts, accumulation=accumulation, sync=sync, process_group=process_group)
        self.step = check_real("step", step)
        self._state("bias", experts)

    @property
    def active(self) -> bool:
        """Whether the step is above 0."""
        return self.step > 0

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"experts={self.experts}, step={self.step:g}"

    def selection_bias(self) -> Float[Tensor, "experts"] | None:
        """The bias."""
        return self.bias.clone()

    def forward(
        self,
        probabilities: Float[Tensor, "*tokens experts"],
        load: Float[Tensor, "experts"] | None = None,
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """Count the choices; the last micro-batch of a step moves the bias. The loss is 0."""
        _, count = self._flat(probabilities, mask, self.experts)
        share = needed(load, probabilities)
        if self.training and not recomputing():
            self._count(share, count)
            due = (self.position == 0) & (self.tokens > 0)
            self.bias.add_(self.step * due * (1 / self.experts - self._load()).sign())
        return zero(probabilities)
