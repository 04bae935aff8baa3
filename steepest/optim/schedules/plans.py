r"""The schedules of the WSD family as data: where the decays are, and how long.

Updates are counted from 0. The cycle of a checkpoint T_k is the half-open interval $[T_{k-1}, T_k)$ with T_0 = 0: its
last update has the number T_k - 1, the checkpoint is taken when T_k updates are done, and update T_k is the first of
the next cycle. A decay takes the last D_k updates, $i = 0 \dots D_k - 1$, at the fraction $s = (i + 1) / D_k$
(``endpoint="inclusive"``: the first one is below the peak already, the last one exactly at the floor) or $s = i / D_k$
(``"exclusive"``, as in Levanter: the first one is still at the peak, the floor would come one update later).
"""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from steepest.optim.schedules.segments import Schedule, Segment, hold
from steepest.optim.schedules.shapes import Shape, check_ratio

Reference = Literal["cycle", "total"]
Endpoint = Literal["inclusive", "exclusive"]
Compute = Literal["equal", "excluded"]
Decay = float | Sequence[int]


def wsds(
    checkpoints: Sequence[int] | None = None,
    *,
    cycle_length: int | None = None,
    peak: float = 1.0,
    floor_ratio: float = 0.1,
    decay: Decay = 0.1,
    warmup: int | float = 0,
    rewarmup: int = 0,
    shape: Shape = "inverse",
    reference: Reference = "cycle",
    endpoint: Endpoint = "inclusive",
) -> Schedule:
    r"""WSD-S: stable, decay, checkpoint, and on from the decayed weights at the peak; a checkpoint at each T_k.

    Args:
        checkpoints: T_1 < T_2 < ..., numbers of updates. After the last one the floor is held.
        cycle_length: instead of `checkpoints`: one every so many updates, for ever. With neither, there is no decay
            until one is asked for at run time.
        peak: the largest learning rate.
        floor_ratio: r, the smallest learning rate over the peak.
        decay: f, the part of a cycle that decays, $D_k = \lfloor f (T_k - T_{k-1}) \rfloor$; or the D_k themselves,
            one integer for each checkpoint.
        warmup: W updates of $\text{peak}\,(t + 1) / W$ before the first cycle's stable part; a float below 1 is a part
            of the first cycle.
        rewarmup: R updates at the start of every later cycle, linearly from the floor, $s = i / R$. Not needed in
            practice, even with Adam.
        shape: of the decay; see `decay_factor`.
        reference: "cycle", or "total": $D_k = \lfloor f T_k \rfloor$. The sources are ambiguous.
        endpoint: see above.

    Raises:
        ValueError: a wrong argument, or parts that do not fit into their cycle; the message names the cycle.

    Source:
        Wen et al. 2024, arXiv 2410.05192; the rules for D_k and the end points from the authors' code in Levanter.
    """
    check_ratio(floor_ratio, shape)
    check_choice("reference", reference, Reference)
    check_choice("endpoint", endpoint, Endpoint)
    peak = check_peak(peak)
    rewarmup = whole("rewarmup", rewarmup)
    if checkpoints is not None and cycle_length is not None:
        raise ValueError(
            f"checkpoints={checkpoints!r} and cycle_length={cycle_length!r} are two ways to say the same: give one"
        )
    if checkpoints is None and cycle_length is None:
        _fraction_or_lengths(decay, None)
        return open_ended(peak=peak, warmup=warmup)
    if cycle_length is not None:
        length = whole("cycle_length", cycle_length, 1)
        if reference == "total":
            raise ValueError("reference='total' makes every decay longer than the one before, and cycle_length does "
                             "not: use reference='cycle', or give checkpoints")  # fmt: skip
        if not isinstance(decay, int | float):
            raise ValueError(f"decay must be a fraction where cycle_length is given, got {decay!r}")
        marks = (length, 2 * length)
    else:
        marks = check_checkpoints(checkpoints)
    warm = _warmup(warmup, marks[0])
    lengths = decay_lengths(marks, decay, reference)
    segments: list[Segment] = []
    for k, (mark, down) in enumerate(zip(marks, lengths, strict=True)):
        start, up = (marks[k - 1], rewarmup) if k else (0, warm)
        _check_fit(k, start, mark, up, down, "rewarmup" if k else "warmup")
        if up and k:
            segments.append(Segment(start, "warmup", up, floor_ratio, 1.0))
        elif up:
            segments.append(Segment(0, "warmup", up, 0.0, 1.0, offset=1))
        if start + up < mark - down:
            segments.append(hold(start + up, "stable", 1.0))
        if down:
            segments.append(_decay(mark - down, down, floor_ratio, shape, endpoint))
    if cycle_length is not None:
        return Schedule(tuple(segments), marks[:1], marks[0], marks[0], peak)
    segments.append(hold(marks[-1], "decay" if lengths[-1] else "stable", floor_ratio if lengths[-1] else 1.0))
    return Schedule(tuple(segments), marks, peak=peak)


def wsd(
    total: int,
    *,
    peak: float = 1.0,
    floor_ratio: float = 0.1,
    decay: Decay = 0.1,
    warmup: int | float = 0,
    shape: Shape = "inverse",
    endpoint: Endpoint = "inclusive",
) -> Schedule:
    """WSD: warm-up, stable, and one decay over the last part of `total` updates. See `wsds`."""
    total = whole("total", total, 1)
    return wsds(
        (total,), peak=peak, floor_ratio=floor_ratio, decay=decay, warmup=warmup, shape=shape, endpoint=endpoint
    )


def cyclic_cosine(
    checkpoints: Sequence[int],
    *,
    peak: float = 1.0,
    floor_ratio: float = 0.1,
    warmup: int | float = 0,
    endpoint: Endpoint = "inclusive",
) -> Schedule:
    """A half cosine from the peak to the floor over each cycle, then a restart. The warm-up is in the first cycle."""
    marks = check_checkpoints(checkpoints)
    warm = _warmup(warmup, marks[0])
    lengths = [mark - before for before, mark in zip((0, *marks), marks, strict=False)]
    lengths[0] = max(lengths[0] - warm, 0)
    return wsds(
        marks, peak=peak, floor_ratio=floor_ratio, decay=lengths, warmup=warm, shape="cosine", endpoint=endpoint
    )


def oracle_cosine(total: int, **options: Any) -> Schedule:
    """A half cosine over a budget known in advance, one run for each budget: `cyclic_cosine` with one checkpoint."""
    return cyclic_cosine((whole("total", total, 1),), **options)


def open_ended(*, peak: float = 1.0, warmup: int | float = 0) -> Schedule:
    """Warm-up, then the peak until someone asks for a decay."""
    peak = check_peak(peak)
    if isinstance(warmup, float):
        raise ValueError(f"warmup must be a number of updates where no checkpoint is planned, got {warmup!r}")
    warm = whole("warmup", warmup)
    first = (Segment(0, "warmup", warm, 0.0, 1.0, offset=1),) if warm else ()
    return Schedule((*first, hold(warm, "stable", 1.0)), peak=peak)


class BranchPoint(NamedTuple):
    """One branch of a WSD run: a copy of the run after `start` updates of its trunk, decayed for `decay` updates.

    Attributes:
        budget: T_k, what the checkpoint at the end of the branch counts as.
        start: updates of the trunk, at constant learning rate, before the copy.
        decay: D_k, updates of the copy.
    """

    budget: int
    start: int
    decay: int

    def schedule(self, **options: Any) -> Schedule:
        """The schedule of the whole path to this checkpoint, trunk and branch; `options` as for `wsd`."""
        return wsd(self.start + self.decay, decay=(self.decay,), **options)


def branch_points(
    checkpoints: Sequence[int], *, decay: float = 0.1, warmup: int = 0, compute: Compute = "equal"
) -> list[BranchPoint]:
    r"""Where to branch for several budgets: D_k = floor(f T_k) updates each, from one trunk.

    The branches are thrown away, so they cost $\sum_{j<k} D_j$ beside the path to checkpoint k. With
    ``compute="equal"`` that counts: branch k starts after $T_k - D_k - \sum_{j<k} D_j$ updates. ``"excluded"`` ignores
    it: $T_k - D_k$.

    Raises:
        ValueError: wrong checkpoints, or a branch that would start before the one before it, or inside the warm-up.

    Examples:
        >>> [tuple(point) for point in branch_points((100, 200), decay=0.1)]
        [(100, 90, 10), (200, 170, 20)]
    """
    check_choice("compute", compute, Compute)
    marks, warm = check_checkpoints(checkpoints), whole("warmup", warmup)
    points, spent, earliest = [], 0, warm
    for mark, down in zip(marks, decay_lengths(marks, decay, "total"), strict=True):
        start = mark - down - (spent if compute == "equal" else 0)
        if start < earliest:
            raise ValueError(
                f"checkpoints: the branch to {mark} would start after {start} updates, before {earliest} "
                f"(decay {down}, earlier branches {spent}): space the checkpoints wider, or decay less"
            )
        points.append(BranchPoint(mark, start, down))
        spent, earliest = spent + down, start
    return points


def decay_lengths(checkpoints: Sequence[int], decay: Decay, reference: Reference = "cycle") -> list[int]:
    """The D_k of every cycle; a product such as 0.29 * 100 is not one too short by rounding."""
    fraction, lengths = _fraction_or_lengths(decay, len(checkpoints))
    if lengths is not None:
        return lengths
    before = (0, *checkpoints[:-1]) if reference == "cycle" else (0,) * len(checkpoints)
    return [math.floor(fraction * (mark - start) + 1e-9) for start, mark in zip(before, checkpoints, strict=True)]


def make_decay(start: int, length: int, ratio: float, shape: Shape, endpoint: Endpoint) -> tuple[Segment, Segment]:
    """A decay from the peak and the floor after it."""
    return _decay(start, length, ratio, shape, endpoint), hold(start + length, "decay", ratio)


def _decay(start: int, length: int, ratio: float, shape: Shape, endpoint: Endpoint) -> Segment:
    return Segment(start, "decay", length, 1.0, ratio, shape, 1 if endpoint == "inclusive" else 0)


def check_checkpoints(checkpoints: Any) -> tuple[int, ...]:
    """The checkpoints as a tuple of integers.

    Raises:
        ValueError: none, not integers, or not strictly increasing from 1 on.
    """
    if isinstance(checkpoints, str) or not hasattr(checkpoints, "__iter__"):
        raise ValueError(
            f"checkpoints must be a sequence of numbers of updates, such as (1000, 2000); got {checkpoints!r}"
        )
    marks = tuple(whole("checkpoints", mark, 1) for mark in checkpoints)
    if not marks:
        raise ValueError("checkpoints must name at least one number of updates, got none")
    for before, mark in itertools.pairwise(marks):
        if mark <= before:
            raise ValueError(f"checkpoints must increase strictly, got {mark} after {before}")
    return marks


def check_peak(peak: Any) -> float:
    """Raise ValueError unless `peak` is a learning rate."""
    if isinstance(peak, bool) or not hasattr(peak, "__float__") or not 0 <= float(peak) < math.inf:
        raise ValueError(f"peak must be a learning rate, a finite number of at least 0; got {peak!r}")
    return float(peak)


def whole(name: str, value: Any, least: int = 0) -> int:
    """`value` as an integer of at least `least`; counts of updates are never fractions."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be whole numbers of updates, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return number


def _warmup(warmup: Any, first: int) -> int:
    if isinstance(warmup, float):
        if not 0 <= warmup < 1:
            raise ValueError(
                f"warmup must be a number of updates, or a part of the first cycle below 1; got {warmup!r}"
            )
        return math.floor(warmup * first + 1e-9)
    return whole("warmup", warmup)


def _fraction_or_lengths(decay: Any, cycles: int | None) -> tuple[float, list[int] | None]:
    if isinstance(decay, Sequence) and not isinstance(decay, str):
        lengths = [whole("decay", length) for length in decay]
        if cycles is not None and len(lengths) != cycles:
            raise ValueError(f"decay must have a length for each of the {cycles} checkpoints, got {len(lengths)}")
        return 0.0, lengths
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(
            f"decay must be a fraction in [0, 1], or a sequence of numbers of updates, one a checkpoint; got {decay!r}"
        )
    return float(decay), None


def _check_fit(k: int, start: int, mark: int, up: int, down: int, name: str) -> None:
    if up + down > mark - start:
        overlap = " (it begins before the checkpoint that comes before)" if down > mark - start and k else ""
        raise ValueError(
            f"cycle {k + 1}, updates {start} to {mark}, has {mark - start} updates and cannot hold {name} {up} + "
            f"decay {down}{overlap}: make the cycle longer, or {name} or decay shorter"
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")
