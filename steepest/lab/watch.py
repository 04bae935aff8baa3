"""How near the steps of a trial are to the edge of stability: a `Monitor` at a cost that the plan bounds."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from steepest.dynamics.monitor import Monitor
from steepest.lab.batches import to_device
from steepest.lab.plan import FINAL, TUNE, PlanSettings, TrialKey, total_trials
from steepest.lab.streams import RandomStream

POINTS = 8  # measurements of a trial at most
EXAMPLES = 2  # of a validation batch, on which they are made
PRODUCTS = 4  # for each sharpness
COST = 10.0  # steps that a measurement takes, about
SHARE = 0.05  # of all steps of the race, for all measurements
COLUMNS = (
    "step", "lr", "loss", "sharpness", "preconditioned_sharpness", "edge", "threshold", "relative_sharpness", "trace",
    "radius_ratio", "drift", "overshoot", "update_norm",
)  # fmt: skip


def measurements(key: TrialKey, plan: PlanSettings, steps: int) -> int:
    """How many measurements a trial gets: those of the final share what the race may spend; tuning gets none.

    With one seed there is no final; then every tuning trial gets its share.
    """
    if key.stage != (FINAL if plan.seeds > 1 else TUNE):
        return 0
    total = total_trials(plan)
    watched = total - len(plan.entrants) * plan.lr_trials if plan.seeds > 1 else total
    return min(POINTS, int(SHARE * steps * total / max(watched, 1) / COST))


class Watch:
    """Measures some steps of a trial. What cannot be measured for a task is left out, with one line in the log.

    Args:
        task: Its loss is differentiated twice, on a few examples of its first validation batch.
        model: Of the trial.
        optimizer: Of the trial.
        steps: Length of the trial.
        count: Number of measurements, equally spaced.
        device: Of the model.
    """

    def __init__(
        self, task: Any, model: nn.Module, optimizer: Optimizer, *, steps: int, count: int, device: torch.device
    ) -> None:
        self.task, self.device, self.broken = task, device, False
        self.marks = {max(1, round(steps * (i + 1) / count)) for i in range(count)}
        self._batch: Any = None
        self.monitor = Monitor.of_loss(
            model, task.loss, optimizer, self._batches, every=1, max_overhead=None, max_products=PRODUCTS
        )

    def before(self, number: int) -> None:
        """Before the optimizer's step of this number."""
        if number in self.marks and not self.broken:
            self.monitor.steps = number - 1
            self._guarded(self.monitor.before_step)

    def after(self, number: int) -> None:
        """After it."""
        if number in self.marks and not self.broken:
            self._guarded(self.monitor.after_step)

    def columns(self) -> dict[str, list[float]]:
        """The curves, without those that do not apply."""
        history = self.monitor.history
        if not history["step"]:
            return {}
        kept = [name for name in COLUMNS if any(math.isfinite(value) for value in history[name])]
        return {name: list(history[name]) for name in kept}

    def verdict(self) -> str | None:
        """The monitor's sentence; None if nothing was measured."""
        return self.monitor.verdict().sentence if self.monitor.history["step"] else None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed trial goes on with."""
        return {"monitor": self.monitor.state_dict(), "broken": self.broken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.monitor.load_state_dict(state["monitor"])
        self.broken = bool(state["broken"])

    def _guarded(self, look: Any) -> None:
        try:
            with RandomStream(0, self.device):
                look()
            # Two examples say little about the noise of a batch.
            self.monitor.history["alignment"] = [math.nan] * len(self.monitor.history["step"])
        except Exception as error:  # a loss that is not twice differentiable must not end a trial
            self.broken = True
            logging.getLogger(__name__).warning("the stability of this task cannot be measured: %s", error)

    def _batches(self) -> list[Any]:
        if self._batch is None:
            self._batch = to_device(few(next(iter(self.task.batches("val", 0)))), self.device)
        return [self._batch]


def few(batch: Any) -> Any:
    """The first examples of a batch whose tensors all have the same first dimension; else the batch."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors or any(t.ndim == 0 for t in tensors) or len({len(t) for t in tensors}) > 1:
        return batch
    return tree_map(lambda leaf: leaf[:EXAMPLES] if isinstance(leaf, Tensor) else leaf, batch)
