"""The schedule family as data: tables of known values, reductions between schedules, and wrong input."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.optim.schedules import (
    Schedule,
    branch_points,
    cyclic_cosine,
    decay_factor,
    lr_at,
    mean_decay_factor,
    open_ended,
    oracle_cosine,
    wsd,
    wsds,
)
from steepest.optim.schedules.shapes import SHAPES


def table(schedule: Schedule, updates: int) -> list[float]:
    return [schedule.lr(t) for t in range(updates)]


def test_the_known_table_by_cycle() -> None:
    lrs = table(wsds((10, 20), decay=0.2), 20)
    assert lrs[8:10] == pytest.approx([0.18181818, 0.1], abs=5e-9)
    assert lrs[:8] == [1.0] * 8 and lrs[10:18] == [1.0] * 8
    assert lrs[18:] == pytest.approx([0.18181818, 0.1], abs=5e-9)
    assert sum(lrs) == pytest.approx(16.5636364, abs=5e-8)


def test_the_sheets_table_by_total() -> None:
    lrs = table(wsds((10, 20), decay=0.2, reference="total"), 20)
    assert lrs[16:] == pytest.approx([0.30769231, 0.18181818, 0.12903226, 0.1], abs=5e-9)
    assert sum(lrs) == pytest.approx(15.0003609, abs=5e-8)


def test_the_exclusive_end_point() -> None:
    schedule = wsd(110, decay=(10,), peak=1e-3, floor_ratio=0.1, endpoint="exclusive")
    found = [schedule.lr(100 + i) for i in (0, 1, 5, 9)]
    assert found == pytest.approx([1e-3, 5.263158e-4, 1.818182e-4, 1.098901e-4], rel=5e-7)
    assert schedule.lr(110) == pytest.approx(1e-4, rel=1e-15)


def test_the_facts_of_levanters_tests() -> None:
    schedule = wsds((300, 700, 1000), endpoint="exclusive", shape="linear")
    assert all(schedule.lr(t) == 1 for t in (0, 269, 300, 659, 701, 969))
    assert all(schedule.lr(t) < 1 for t in (271, 661, 971))


@pytest.mark.parametrize(("ratio", "mean"), [(0.1, 0.2558428), (0.01, 0.0465169), (0.001, 0.0069147)])
def test_the_mean_of_a_harmonic_decay(ratio: float, mean: float) -> None:
    assert mean_decay_factor(ratio) == pytest.approx(mean, abs=5e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.01])
def test_means_are_integrals(shape: Any, ratio: float) -> None:
    mean = np.mean([decay_factor((i + 0.5) / 20_000, ratio, shape) for i in range(20_000)])
    assert mean_decay_factor(ratio, shape) == pytest.approx(mean, rel=1e-6)


def test_one_checkpoint_is_wsd() -> None:
    for shape in SHAPES:
        options: dict[str, Any] = {"decay": 0.3, "warmup": 7, "shape": shape, "peak": 0.02}
        assert wsds((100,), **options) == wsd(100, **options)


def test_a_floor_at_the_peak_is_constant_after_the_warmup() -> None:
    lrs = table(wsds((30, 60), floor_ratio=1.0, warmup=5), 80)
    assert lrs == [0.2, 0.4, 0.6, 0.8, *[1.0] * 76]


def test_decay_all_the_way_by_cosine_is_the_cyclic_cosine() -> None:
    assert table(wsds((10, 25), decay=1.0, shape="cosine"), 30) == table(cyclic_cosine((10, 25)), 30)
    assert table(oracle_cosine(40), 40) == table(cyclic_cosine((40,)), 40)


def test_a_cosine_cycle() -> None:
    assert table(cyclic_cosine((4, 8)), 8) == pytest.approx([0.86819805, 0.55, 0.23180195, 0.1] * 2, abs=5e-9)


def test_the_cyclic_cosine_warms_up_in_its_first_cycle() -> None:
    lrs = table(cyclic_cosine((10, 20), warmup=4, floor_ratio=0.0), 20)
    assert lrs[:4] == [0.25, 0.5, 0.75, 1.0] and lrs[9] == 0 == lrs[19]
    assert lrs[4] == pytest.approx((1 + math.cos(math.pi / 6)) / 2)


def test_the_rewarmup_starts_from_the_floor() -> None:
    lrs = table(wsds((10, 20), decay=0.2, rewarmup=3, warmup=2), 20)
    assert lrs[:3] == [0.5, 1.0, 1.0]
    assert lrs[10:14] == pytest.approx([0.1, 0.4, 0.7, 1.0], rel=1e-14)
    assert wsds((10, 20), decay=0.2, rewarmup=3).phase(11) == "warmup"
    assert table(wsds((10, 20), floor_ratio=0.0, shape="linear", rewarmup=2), 12)[10:] == [0.0, 0.5]


def test_rounding_does_not_shorten_a_decay() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert [wsd(100, decay=0.29).phase(t) for t in (70, 71)] == ["stable", "decay"]
    assert [wsd(7, decay=0.3).phase(t) for t in (4, 5)] == ["stable", "decay"]


def test_phases_and_checkpoints() -> None:
    schedule = wsds((10, 20), decay=0.2, warmup=2)
    assert [schedule.phase(t) for t in (0, 1, 2, 7, 8, 9, 10, 17, 18, 20, 99)] == (
        ["warmup"] * 2 + ["stable"] * 2 + ["decay"] * 2 + ["stable"] * 2 + ["decay"] * 3
    )
    assert [t for t in range(40) if schedule.is_checkpoint(t)] == [10, 20]
    assert [schedule.next_checkpoint(t) for t in (0, 9, 10, 20)] == [10, 10, 20, None]
    assert schedule.lr(20) == schedule.lr(10**9) == 0.1
    assert not open_ended().is_checkpoint(5) and open_ended(warmup=2).lr(10**9) == 1


def test_cycles_for_ever() -> None:
    endless, finite = (
        wsds(cycle_length=10, decay=0.3, warmup=2, rewarmup=1),
        wsds(tuple(range(10, 101, 10)), decay=0.3, warmup=2, rewarmup=1),
    )
    assert table(endless, 100) == table(finite, 100)
    assert [endless.phase(t) for t in range(100)] == [finite.phase(t) for t in range(100)]
    assert [t for t in range(101) if endless.is_checkpoint(t)] == list(range(10, 101, 10))
    assert [endless.next_checkpoint(t) for t in (0, 10, 19, 20, 999)] == [10, 20, 20, 30, 1000]
    assert endless.lr(10**12 + 5) == 1.0
    for cut in (0, 3, 10, 20, 25, 30, 47):
        until = endless.until(cut)
        assert [until.lr(t) for t in range(cut)] == table(endless, cut)
        assert list(until.checkpoints) == list(range(10, cut + 1, 10))


def test_branches_at_equal_compute() -> None:
    points = branch_points((1250, 2500, 5000), decay=0.1)
    assert [tuple(p) for p in points] == [(1250, 1125, 125), (2500, 2125, 250), (5000, 4125, 500)]
    for k, point in enumerate(points):  # the trunk to the branch, and all branches so far
        assert point.start + sum(p.decay for p in points[: k + 1]) == point.budget
    assert [p.start for p in branch_points((1250, 2500), decay=0.1, compute="excluded")] == [1125, 2250]
    path = points[1].schedule(floor_ratio=0.02)
    assert path.lr(2124) == 1 and path.phase(2125) == "decay" and path.lr(2374) == 0.02
    with pytest.raises(ValueError, match=r"branch to 110 would start after 68"):
        branch_points((100, 110), decay=0.2)


@settings(deadline=None, max_examples=60)
@given(
    cycles=st.lists(st.integers(5, 400), min_size=1, max_size=5),
    decay=st.floats(0, 0.7),
    ratio=st.floats(0.001, 1),
    shape=st.sampled_from(SHAPES),
    endpoint=st.sampled_from(["inclusive", "exclusive"]),
    warm=st.integers(0, 1),
    peak=st.floats(1e-6, 30),
)
def test_one_at_a_time_and_all_at_once_agree(
    cycles: list[int], decay: float, ratio: float, shape: Any, endpoint: Any, warm: int, peak: float
) -> None:
    marks = np.cumsum(cycles)
    schedule = wsds(
        marks.tolist(),
        decay=decay,
        floor_ratio=ratio,
        shape=shape,
        endpoint=endpoint,
        warmup=warm,
        rewarmup=warm,
        peak=peak,
    )
    steps = torch.arange(int(marks[-1]) + 5)
    one = [lr_at(t, schedule) for t in steps.tolist()]
    np.testing.assert_allclose(schedule.lrs(steps).numpy(), one, rtol=1e-13)
    assert schedule.lrs(steps.flip(0)).tolist() == schedule.lrs(steps).flip(0).tolist()
    assert all(ratio * peak * (1 - 1e-12) <= lr <= peak * (1 + 1e-12) for lr in one)
    for start, end in zip([0, *marks[:-1]], marks, strict=True):
        lengths = sum(schedule.phase(t) == "decay" for t in range(start, end))
        assert lengths == math.floor(decay * (end - start) + 1e-9)
        if lengths and endpoint == "inclusive":
            assert schedule.factor(int(end) - 1) == ratio
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


WRONG: dict[str, tuple[str, Any]] = {
    "harmonic to zero": ("floor_ratio must be above 0", lambda: wsds((10,), floor_ratio=0)),
    "exponential to zero": ("floor_ratio must be above 0", lambda: wsd(10, floor_ratio=0.0, shape="exponential")),
    "negative floor": ("floor_ratio", lambda: wsds((10,), floor_ratio=-0.1, shape="linear")),
    "floor above the peak": ("floor_ratio", lambda: wsds((10,), floor_ratio=1.1)),
    "nan floor": ("floor_ratio", lambda: wsds((10,), floor_ratio=math.nan)),
    "fraction above one": ("decay", lambda: wsds((10,), decay=1.5)),
    "negative fraction": ("decay", lambda: wsds((10,), decay=-0.1)),
    "lengths that do not count": ("decay", lambda: wsds((10, 20), decay=(1,))),
    "equal checkpoints": ("increase strictly, got 10 after 10", lambda: wsds((10, 10))),
    "falling checkpoints": ("increase strictly", lambda: wsds((20, 10))),
    "half an update": ("checkpoints must be whole numbers", lambda: wsds((10.5, 20))),  # type: ignore[arg-type]
    "a float": ("checkpoints must be whole numbers", lambda: wsds((10.0,))),  # type: ignore[arg-type]
    "zero": ("checkpoints must be at least 1", lambda: wsds((0, 10))),
    "no checkpoints": ("checkpoints must name", lambda: wsds(())),
    "a number": ("checkpoints must be a sequence", lambda: wsds(100)),  # type: ignore[arg-type]
    "warm-up and decay too long": (
        r"cycle 1, updates 0 to 10.*warmup 5 \+ decay 6",
        lambda: wsds((10,), warmup=5, decay=0.6),
    ),
    "re-warmup and decay too long": (
        r"cycle 2, updates 100 to 110.*rewarmup 10 \+ decay 1",
        lambda: wsds((100, 110), rewarmup=10),
    ),
    "overlapping decays": (
        r"cycle 2, updates 100 to 105.*decay 10 .*before the checkpoint",
        lambda: wsds((100, 105), reference="total"),
    ),
    "two ways to say it": ("cycle_length=5", lambda: wsds((10,), cycle_length=5)),
    "ever longer decays for ever": ("reference='total'", lambda: wsds(cycle_length=5, reference="total")),
    "unknown shape": ("shape must be one of inverse", lambda: wsds((10,), shape="harmonic")),  # type: ignore[arg-type]
    "unknown reference": ("reference", lambda: wsds((10,), reference="run")),  # type: ignore[arg-type]
    "unknown end point": ("endpoint", lambda: wsds((10,), endpoint="open")),  # type: ignore[arg-type]
    "negative warm-up": ("warmup", lambda: wsds((10,), warmup=-1)),
    "warm-up of 1.5": ("warmup", lambda: wsds((10,), warmup=1.5)),
    "negative peak": ("peak", lambda: wsds((10,), peak=-1.0)),
    "infinite peak": ("peak", lambda: wsds((10,), peak=math.inf)),
    "negative update": ("step", lambda: wsds((10,)).lr(-1)),
    "fractions of updates": ("steps must be integers", lambda: wsds((10,)).lrs(torch.arange(3.0))),
    "no schedule": ("saved schedule", lambda: Schedule.from_dict({"segments": 3})),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str) -> None:
    message, make = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()
