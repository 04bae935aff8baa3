"""Schedules as learning-rate schedulers of torch: a clock of optimizer updates, and the closed form at its reading."""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from steepest.optim.schedules import plans
from steepest.optim.schedules.plans import Endpoint
from steepest.optim.schedules.segments import Phase, Schedule, Segment, hold
from steepest.optim.schedules.shapes import Shape, check_ratio

Count = Literal["updates", "calls"]
Peak = float | Sequence[float] | None
_IDLE_CALLS = 10_000  # so many calls in a row without an update are no gradient accumulation


class ScheduledLR(LRScheduler):
    """Sets the learning rate of every update from a `Schedule`; the base of the named schedulers, and of your own.

    The learning rate of a group is its base (its `lr` when the scheduler was made, or `peak`) times the factor of the
    schedule at the clock, never a multiple of the rate before: nothing drifts, and a resumed run has the same bits.
    Groups with different bases keep their proportion. A learning rate that is a tensor is filled in place.

    **The clock counts optimizer updates.** `step()` advances it by one if the optimizer made an update since the last
    `step()`. So call `scheduler.step()` wherever you like, as often as you like: micro-batches of an accumulated
    gradient, steps that a GradScaler left out (fused optimizers included), and steps that an optimizer of this library
    skipped (``nonfinite="skip"``) do not count. As long as the optimizer has made no update with a gradient and there
    is none, `step()` always advances, so that a schedule can be rehearsed; so call it before `zero_grad` if a
    GradScaler may leave out the very first steps. ``count="calls"`` is torch's rule, every call counts: for optimizers
    whose updates happen elsewhere (an engine that never calls their `step`).

    `state_dict` holds plain data. Load it together with the optimizer's, in any order; the saved schedule and base
    rates replace those that the constructor was given.

    Args:
        optimizer: any torch optimizer.
        schedule: the schedule; only its factors are used, so it should have no `peak` of its own.
        peak: the largest learning rate, one number for all groups or one for each. None: each group's own `lr`.
        count: "updates" or "calls".
        last_epoch: as in torch: the clock reads `last_epoch` + 1 after construction, and groups must then have
            their "initial_lr". Better load a state dict.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: a wrong `peak`, `count` or `schedule`; nothing has been changed then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        peak: Peak = None,
        count: Count = "updates",
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, such as wsds((1000, 2000)); got {schedule!r}")
        if count not in get_args(Count):
            raise ValueError(f"count must be one of {', '.join(get_args(Count))}; got {count!r}")
        if schedule.peak != 1 and peak is None:
            raise ValueError(
                f"the schedule has a peak of its own, {schedule.peak:g}, and the groups have their lr: say which "
                f"counts, by peak={schedule.peak:g} here, or by a schedule without peak"
            )
        self._floor_ratio, self._shape, self._endpoint = 0.1, "inverse", "inclusive"
        peaks = _peaks(peak, len(optimizer.param_groups))
        if peaks is not None:
            for group, value in zip(optimizer.param_groups, peaks, strict=True):
                old = group["lr"]
                group["initial_lr"] = torch.full_like(old, value) if isinstance(old, Tensor) else value
        self.schedule = schedule
        self._given = schedule
        self.count: Count = count
        self._updated, self._ever, self._idle = False, False, 0
        self._skips = _skips(optimizer)
        self.optimizer = optimizer
        self._watch()
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Advance the clock if the optimizer made an update, and set the learning rates of the next one.

        Args:
            epoch: set the clock to this update instead.
        """
        if epoch is not None:
            epoch = plans.whole("epoch", epoch)
        elif not self._is_initial and not self._due():
            return
        self._step_count += 1
        self._update_lr(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of update `last_epoch`, by group."""
        return self._at(self.last_epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        """What torch's SequentialLR calls where this schedule begins."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._updated = False
        self._set_lrs(self.last_epoch)

    @property
    def completed(self) -> int:
        """Updates made so far, one that `step()` has not been told of included."""
        return self.last_epoch + self._updated

    def lrs(self, steps: Int[Tensor, " n"] | Sequence[int], group: int = 0) -> Float[Tensor, " n"]:
        """The learning rates of many updates (from 0), for plots; float64.

        Args:
            steps: numbers of updates.
            group: index of the parameter group.
        """
        return float(self.base_lrs[group]) * self.schedule.factors(steps)

    def phase(self, step: int | None = None) -> Phase:
        """The phase of update `step`, "warmup", "stable" or "decay"; None: of the next update."""
        return self.schedule.phase(self.last_epoch if step is None else step)

    def is_checkpoint(self, step: int | None = None) -> bool:
        """Whether a decay is complete when `step` updates are done; None: now."""
        return self.schedule.is_checkpoint(self.last_epoch if step is None else step)

    def start_decay(
        self,
        steps: int,
        *,
        floor_ratio: float | None = None,
        shape: Shape | None = None,
        endpoint: Endpoint | None = None,
    ) -> None:
        """Decay over the next `steps` updates, from now on; a checkpoint is due at the end, then the floor is held.

        What was planned from here on is dropped. `resume_stable` goes on from the decayed weights, which is WSD-S; on
        a `branch` of the run it is WSD.

        Args:
            steps: length of the decay.
            floor_ratio: as in the constructor, whose value is taken where it is None.
            shape: likewise.
            endpoint: likewise.

        Raises:
            ValueError: a wrong argument. Nothing is changed then.
            RuntimeError: the next update is not in a stable phase.
        """
        steps = plans.whole("steps", steps, 1)
        ratio = self._floor_ratio if floor_ratio is None else floor_ratio
        shape, endpoint = shape or self._shape, endpoint or self._endpoint  # type: ignore[assignment]
        check_ratio(ratio, shape)
        plans.check_choice("endpoint", endpoint, Endpoint)
        now, phase = self.completed, self.phase(self.completed)
        if phase != "stable":
            hint = "wait for its end" if phase == "warmup" else "call resume_stable() first"
            raise RuntimeError(f"a decay starts from a stable phase, and update {now} is in a {phase}: {hint}")
        segments = plans.make_decay(now, steps, ratio, shape, endpoint)  # type: ignore[arg-type]
        self._replan(self.schedule.until(now).then(*segments, checkpoints=(now + steps,)))

    def resume_stable(self, *, rewarmup: int = 0) -> None:
        """Stay at the peak from the next update on, with the weights and optimizer state as they are.

        A decay under way is given up, a warm-up is completed; what was planned after that is dropped.

        Args:
            rewarmup: after a decay, rise to the peak linearly over so many updates, from the present learning rate on.
        """
        up, now = plans.whole("rewarmup", rewarmup), self.completed
        present = self.schedule.until(now + 1).segments[-1]
        if present.phase == "warmup":
            end = present.start + present.length
            self._replan(self.schedule.until(now + 1).then(hold(end, "stable", 1.0)))
            return
        level = self.schedule.factor(now)
        rise = (Segment(now, "warmup", up, level, 1.0),) if up and present.phase == "decay" else ()
        start = now + up if rise else now
        self._replan(self.schedule.until(now).then(*rise, hold(start, "stable", 1.0)))

    def state_dict(self) -> dict[str, Any]:
        """Clock, base rates and schedule, as plain data (and tensors, where a learning rate is one)."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": [base.clone() if isinstance(base, Tensor) else base for base in self.base_lrs],
            "schedule": self.schedule.to_dict(),
            "given": self._given.to_dict(),
            "updated": self._updated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; sets the optimizer's learning rates, too.

        A warning says so if the constructor was given another schedule than the saved one, which is used.

        Raises:
            ValueError: the state is of something else, or of another number of groups. Nothing is changed then.
        """
        missing = {"last_epoch", "base_lrs", "schedule", "given"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict: not one of {type(self).__name__}, it has no {', '.join(sorted(missing))}")
        schedule, given = (Schedule.from_dict(state_dict[key]) for key in ("schedule", "given"))
        bases, groups = list(state_dict["base_lrs"]), self.optimizer.param_groups
        if len(bases) != len(groups):
            raise ValueError(f"state_dict: it is of {len(bases)} parameter groups, the optimizer has {len(groups)}")
        if given != self._given:
            warnings.warn(
                "the saved schedule differs from the one this scheduler was made with, and is used; change it with "
                "extend, start_decay or resume_stable after loading",
                stacklevel=2,
            )
        self.schedule, self._given = schedule, given
        self.last_epoch, self._step_count = int(state_dict["last_epoch"]), int(state_dict.get("step_count", 1))
        for group, base in zip(groups, bases, strict=True):
            group["initial_lr"] = base.clone() if isinstance(base, Tensor) else base
        self.base_lrs = bases
        self._updated, self._ever, self._idle = bool(state_dict.get("updated", False)), False, 0
        self._set_lrs(self.last_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()

    def _replan(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._set_lrs(self.completed)

    def _at(self, step: int) -> list[float | Tensor]:
        if len(self.base_lrs) != len(self.optimizer.param_groups):
            self._adopt_groups()
        factor = self.schedule.factor(step)
        return [base * factor for base in self.base_lrs]

    def _set_lrs(self, step: int) -> None:
        """The learning rates of update `step` into the groups."""
        self._last_lr = []
        for group, value in zip(self.optimizer.param_groups, self._at(step), strict=True):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr.copy_(value) if isinstance(value, Tensor) else lr.fill_(value)
                self._last_lr.append(lr.clone())
            else:
                group["lr"] = float(value)
                self._last_lr.append(group["lr"])

    def _adopt_groups(self) -> None:
        """Groups were added: their base is the learning rate that they came with."""
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]

    def _due(self) -> bool:
        if self.count == "calls" or self._updated:
            self._idle = 0
            return True
        if not self._ever and not _has_gradients(self.optimizer):
            return True
        self._idle += 1
        if self._idle == _IDLE_CALLS:
            warnings.warn(
                f"the optimizer made no update in the last {_IDLE_CALLS} calls of scheduler.step(), so the learning "
                "rate stands still; if its updates happen elsewhere, pass count='calls'",
                stacklevel=3,
            )
        return False

    def _watch(self) -> None:
        """Have the optimizer tell of its updates; it does not keep this scheduler alive."""
        me = weakref.ref(self)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            scheduler = me()
            if scheduler is not None and scheduler.optimizer is optimizer:
                scheduler._skips = _skips(optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            scheduler = me()
            if scheduler is not None and scheduler.optimizer is optimizer:
                scheduler._note(optimizer)

        before._torchdynamo_disable = after._torchdynamo_disable = True  # torch.compiler.disable, without its import
        self._handles = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]
        weakref.finalize(self, _remove, self._handles)

    def _note(self, optimizer: Optimizer) -> None:
        found = getattr(optimizer, "found_inf", None)  # set by GradScaler around the step of a fused optimizer
        if isinstance(found, Tensor) and bool(found):
            return
        if _skips(optimizer) == self._skips:
            self._updated = True
            self._ever = self._ever or _has_gradients(optimizer)


def _peaks(peak: Any, groups: int) -> list[float] | None:
    if peak is None:
        return None
    if isinstance(peak, list | tuple):
        if len(peak) != groups:
            raise ValueError(f"peak must be one number, or one for each of the {groups} parameter groups; got {peak!r}")
        return [plans.check_peak(each) for each in peak]
    return [plans.check_peak(peak)] * groups


def _skips(optimizer: Optimizer) -> int:
    """Steps that the optimizer itself left out, if it counts them."""
    count = getattr(optimizer, "skipped_steps", 0)
    return count if isinstance(count, int) else 0


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
