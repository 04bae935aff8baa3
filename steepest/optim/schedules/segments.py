"""A schedule as data: pieces of constant or changing learning rate, one after the other, each in closed form."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest.optim.schedules.shapes import SHAPES, Shape, decay_factor, decay_factors

Phase = Literal["warmup", "stable", "decay"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Segment:
    r"""From update `start` on, the factor goes from `begin` to `finish` over `length` updates.

    At the i-th update of the segment, from 0, the fraction is $s = (i + o) / \text{length}$ with o = `offset`; from
    s = 1 on the factor stays at `finish`. A segment ends where the next one starts, finished or not.
    """

    start: int
    phase: Phase
    length: int = 1
    begin: float = 1.0
    finish: float = 1.0
    shape: Shape = "linear"
    offset: int = 0

    def factor(self, step: int) -> float:
        """The factor of update `step`."""
        if self.begin == self.finish:
            return self.finish
        s = (step - self.start + self.offset) / self.length
        if self.begin == 0:  # warm-up; no other segment starts at zero
            return self.finish * min(s, 1.0)
        return self.begin * decay_factor(s, self.finish / self.begin, self.shape)


def hold(start: int, phase: Phase, factor: float) -> Segment:
    """A constant factor."""
    return Segment(start, phase, 1, factor, factor)


@dataclass(frozen=True)
class Schedule:
    r"""The learning rate of every update, $\eta_t = \text{peak} \cdot \text{factor}(t)$, t = 0, 1, ...

    Plain data, made by `wsd`, `wsds`, `cyclic_cosine`, `oracle_cosine` or `open_ended`; nothing is computed from the
    learning rate before, so that any step can be asked for, in any order.

    Attributes:
        segments: the pieces, the first one from update 0.
        checkpoints: numbers of updates after which a decayed checkpoint is due, T_1 < T_2 < ...
        period: None, or the length L of the cycle that is repeated for ever after the last segment's cycle: update t
            with $t \ge$ `repeat_from` + L is as t - L.
        repeat_from: where the repeated cycle begins.
        peak: the largest learning rate.

    Examples:
        >>> from steepest.optim.schedules import wsds
        >>> schedule = wsds((10, 20), decay=0.2)
        >>> [round(schedule.lr(t), 4) for t in (0, 7, 8, 9, 10, 19, 20)]
        [1.0, 1.0, 0.1818, 0.1, 1.0, 0.1, 0.1]
        >>> schedule.phase(8), schedule.is_checkpoint(10)
        ('decay', True)
    """

    segments: tuple[Segment, ...]
    checkpoints: tuple[int, ...] = ()
    period: int | None = None
    repeat_from: int = 0
    peak: float = 1.0

    def factor(self, step: int) -> float:
        """The learning rate of update `step` (from 0), as a fraction of the peak."""
        step = self._fold(step)
        return self.segments[self._index(step)].factor(step)

    def lr(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        return self.peak * self.factor(step)

    def factors(self, steps: Int[Tensor, " n"] | Sequence[int]) -> Float[Tensor, " n"]:
        """`factor` of many updates at once, float64."""
        steps = torch.as_tensor(steps)
        if steps.ndim != 1 or steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
            raise ValueError(f"steps must be integers, one dimension; got {steps.dtype} of shape {tuple(steps.shape)}")
        if steps.numel() and int(steps.min()) < 0:
            raise ValueError(f"steps must not be negative, got {int(steps.min())}")
        if self.period is not None:
            folded = self.repeat_from + (steps - self.repeat_from) % self.period
            steps = torch.where(steps < self.repeat_from, steps, folded)
        index = torch.bucketize(steps, torch.tensor(self._starts, device=steps.device), right=True) - 1

        def column(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float64, device=steps.device)[index]

        parts = self.segments
        begin, finish = column(p.begin for p in parts), column(p.finish for p in parts)
        s = (steps - column(p.start for p in parts) + column(p.offset for p in parts)) / column(p.length for p in parts)
        result = torch.where(begin == 0, finish * s.clamp(max=1), finish)
        kind = torch.tensor([SHAPES.index(p.shape) for p in parts], device=steps.device)[index]
        for number in {SHAPES.index(p.shape) for p in parts}:
            mine = (kind == number) & (begin != 0) & (begin != finish)
            result[mine] = begin[mine] * decay_factors(s[mine], finish[mine] / begin[mine], SHAPES[number])
        return result

    def lrs(self, steps: Int[Tensor, " n"] | Sequence[int]) -> Float[Tensor, " n"]:
        """`lr` of many updates at once, float64."""
        return self.peak * self.factors(steps)

    def phase(self, step: int) -> Phase:
        """What update `step` belongs to. After the last checkpoint, where the floor is held, it is "decay"."""
        return self.segments[self._index(self._fold(step))].phase

    def is_checkpoint(self, step: int) -> bool:
        """Whether a decay is complete when `step` updates are done, so that the weights are worth keeping."""
        if self.period is not None and step > self.repeat_from:
            return (step - self.repeat_from) % self.period == 0 or step in self._marks
        return step in self._marks

    def next_checkpoint(self, step: int) -> int | None:
        """The first checkpoint after `step` updates; None if no decay is planned."""
        later = next((mark for mark in self.checkpoints if mark > step), None)
        if self.period is None or later is not None:
            return later
        return self.repeat_from + ((max(step, self.repeat_from) - self.repeat_from) // self.period + 1) * self.period

    def until(self, step: int) -> Self:
        """The same up to update `step`, nothing from there on: what is replaced at run time."""
        whole = self._unrolled(step)
        kept = tuple(segment for segment in whole.segments if segment.start < step)
        marks = tuple(mark for mark in whole.checkpoints if mark <= step)
        return replace(whole, segments=kept, checkpoints=marks)

    def then(self, *segments: Segment, checkpoints: Iterable[int] = ()) -> Self:
        """With these segments at its end."""
        return replace(self, segments=self.segments + segments, checkpoints=(*self.checkpoints, *checkpoints))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text and lists only: JSON, and any checkpoint, can hold it."""
        rows = [[s.start, s.phase, s.length, s.begin, s.finish, s.shape, s.offset] for s in self.segments]
        return {
            "segments": rows,
            "checkpoints": list(self.checkpoints),
            "period": self.period,
            "repeat_from": self.repeat_from,
            "peak": self.peak,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            segments = tuple(Segment(*row) for row in saved["segments"])
            marks = tuple(int(mark) for mark in saved["checkpoints"])
            schedule = cls(segments, marks, saved["period"], int(saved["repeat_from"]), float(saved["peak"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no saved schedule: {error!r}") from error
        if not segments or segments[0].start != 0 or any(s.shape not in SHAPES for s in segments):
            raise ValueError(f"this is no saved schedule: its segments are {saved['segments']!r}")
        return schedule

    def _unrolled(self, step: int) -> Self:
        """Without a period, equal up to `step`."""
        if self.period is None:
            return self
        cycle = [segment for segment in self.segments if segment.start >= self.repeat_from]
        segments, marks = list(self.segments), list(self.checkpoints)
        first = self.repeat_from + self.period
        for start in range(first, max(step, first), self.period):
            shift = start - self.repeat_from
            segments += [replace(segment, start=segment.start + shift) for segment in cycle]
            marks.append(start)
        if step >= first and (step - first) % self.period == 0:
            marks.append(step)
        return replace(self, segments=tuple(segments), checkpoints=tuple(sorted(set(marks))), period=None)

    def _fold(self, step: int) -> int:
        if self.period is None or step < self.repeat_from + self.period:
            return step
        return self.repeat_from + (step - self.repeat_from) % self.period

    def _index(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return bisect_right(self._starts, step) - 1

    @cached_property
    def _starts(self) -> list[int]:
        return [segment.start for segment in self.segments]

    @cached_property
    def _marks(self) -> frozenset[int]:
        return frozenset(self.checkpoints)


def lr_at(step: int, spec: Schedule) -> float:
    """The learning rate of update `step` (from 0) under a schedule: a pure function of both."""
    return spec.lr(step)
