"""The schedulers by name: WSD-S, WSD, and their rivals on cosines."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from steepest.optim.schedules import plans
from steepest.optim.schedules.plans import Decay, Endpoint, Reference
from steepest.optim.schedules.scheduler import Count, Peak, ScheduledLR
from steepest.optim.schedules.shapes import Shape


class WSDS(ScheduledLR):
    r"""Warmup, stable, decay, and on from the decayed weights: checkpoints at several budgets from one run.

    In each cycle $[T_{k-1}, T_k)$ the learning rate is at its peak, then decays over the last D_k updates; a checkpoint
    is due when T_k updates are done (`is_checkpoint`), and update T_k is at the peak again. Do not reset the
    optimizer's moments there. See `wsds` for the arguments that are not listed here, `ScheduledLR` for the clock.

    Args:
        optimizer: any torch optimizer.
        checkpoints: T_1 < T_2 < ...; after the last one the floor is held, until `extend`. None, without
            `cycle_length`: open-ended, decays come from `start_decay`.
        cycle_length: a checkpoint every so many updates, for ever.
        peak: the largest learning rate; None: each group's own `lr`.
        floor_ratio: smallest learning rate over the peak.
        decay: part of each cycle that decays, or the D_k themselves.
        warmup: updates of linear warm-up, in the first cycle only.
        rewarmup: updates of linear re-warmup in the later cycles.
        shape: "inverse", "linear", "cosine", "exponential" or "1-sqrt".
        reference: what `decay` is a part of: the "cycle" or the "total" so far.
        endpoint: "inclusive" or "exclusive".
        count: what the clock counts, "updates" or "calls".
        last_epoch: as in torch.

    Raises:
        ValueError: see `wsds`.

    Source:
        Wen et al. 2024, arXiv 2410.05192.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scheduler = WSDS(optimizer, (10, 20), decay=0.2)
        >>> for _ in range(9):
        ...     weight.sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"], scheduler.phase(), scheduler.is_checkpoint(10)
        (0.1, 'decay', True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        checkpoints: Sequence[int] | None = None,
        *,
        cycle_length: int | None = None,
        peak: Peak = None,
        floor_ratio: float = 0.1,
        decay: Decay = 0.1,
        warmup: int | float = 0,
        rewarmup: int = 0,
        shape: Shape = "inverse",
        reference: Reference = "cycle",
        endpoint: Endpoint = "inclusive",
        count: Count = "updates",
        last_epoch: int = -1,
    ) -> None:
        options: dict[str, Any] = {
            "floor_ratio": floor_ratio,
            "rewarmup": rewarmup,
            "shape": shape,
            "endpoint": endpoint,
        }
        schedule = plans.wsds(
            checkpoints, cycle_length=cycle_length, decay=decay, warmup=warmup, reference=reference, **options
        )
        super().__init__(optimizer, schedule, peak=peak, count=count, last_epoch=last_epoch)
        self._floor_ratio, self._shape, self._endpoint = floor_ratio, shape, endpoint
        self._options = {**options, "decay": decay, "reference": reference}

    def extend(self, checkpoints: Sequence[int]) -> None:
        """Add checkpoints after the last one: the budget has grown. The new cycles decay as the old ones did.

        Call it before the first update after the last checkpoint; later, use `resume_stable` and `start_decay`.

        Raises:
            ValueError: they do not come after the last checkpoint, or cannot hold their decays.
            RuntimeError: there is no list of checkpoints, or the last one has passed.
        """
        old, decay = self.schedule.checkpoints, self._options["decay"]
        if not old or self.schedule.period is not None or self.schedule.segments[-1].phase != "decay":
            raise RuntimeError("there is no last checkpoint to go on from; use start_decay and resume_stable")
        if self.completed > old[-1]:
            raise RuntimeError(
                f"{self.completed} updates are done, and the last checkpoint was at {old[-1]}; use resume_stable and "
                "start_decay"
            )
        if not isinstance(decay, int | float):
            raise RuntimeError("decay was given as a list of lengths; use resume_stable and start_decay")
        marks = (old[-1], *plans.check_checkpoints(checkpoints))
        lengths = plans.decay_lengths(plans.check_checkpoints(marks), decay, self._options["reference"])
        whole = plans.wsds(marks, **{**self._options, "decay": [0, *lengths[1:]], "reference": "cycle"})
        later = (segment for segment in whole.segments if segment.start >= old[-1])
        self._replan(self.schedule.until(old[-1]).then(*later, checkpoints=marks[1:]))


class WSD(WSDS):
    """Warmup, stable, and one decay over the last part of `total` updates.

    Without `total` it is open-ended: stable until `start_decay`. For several budgets from one run, decay copies of an
    open-ended run (`branch_points`, `steepest.loop.branch`), or use `WSDS`, which throws no branch away. The arguments
    are those of `WSDS`.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = WSD(optimizer, warmup=2)
        >>> for _ in range(5):
        ...     scheduler.step()
        >>> scheduler.start_decay(4, floor_ratio=0.2)
        >>> [round(lr, 3) for lr in scheduler.lrs(range(10)).tolist()]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.333, 0.25, 0.2, 0.2]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int | None = None,
        *,
        peak: Peak = None,
        floor_ratio: float = 0.1,
        decay: Decay = 0.1,
        warmup: int | float = 0,
        shape: Shape = "inverse",
        endpoint: Endpoint = "inclusive",
        count: Count = "updates",
        last_epoch: int = -1,
    ) -> None:
        marks = None if total is None else (plans.whole("total", total, 1),)
        options: dict[str, Any] = {"floor_ratio": floor_ratio, "decay": decay, "warmup": warmup, "shape": shape}
        super().__init__(optimizer, marks, peak=peak, endpoint=endpoint, count=count, last_epoch=last_epoch, **options)


class CyclicCosine(ScheduledLR):
    """A half cosine from the peak to the floor over each cycle, then a restart: the rival of `WSDS`.

    See `cyclic_cosine` and `WSDS` for the arguments.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        checkpoints: Sequence[int],
        *,
        peak: Peak = None,
        floor_ratio: float = 0.1,
        warmup: int | float = 0,
        endpoint: Endpoint = "inclusive",
        count: Count = "updates",
        last_epoch: int = -1,
    ) -> None:
        schedule = plans.cyclic_cosine(checkpoints, floor_ratio=floor_ratio, warmup=warmup, endpoint=endpoint)
        super().__init__(optimizer, schedule, peak=peak, count=count, last_epoch=last_epoch)
        self._floor_ratio, self._shape, self._endpoint = floor_ratio, "cosine", endpoint


class OracleCosine(CyclicCosine):
    """A half cosine over a budget that is known in advance: one run for each budget."""

    def __init__(self, optimizer: Optimizer, total: int, **options: Any) -> None:
        super().__init__(optimizer, (plans.whole("total", total, 1),), **options)
