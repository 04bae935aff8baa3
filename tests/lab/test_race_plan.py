import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.lab.plan import (
    FINAL,
    TUNE,
    Entrant,
    PlanSettings,
    TrialKey,
    best_lr,
    finalists,
    grid,
    next_trials,
    prune_reason,
    refine,
    total_trials,
)

LRS = st.floats(1e-5, 1.0)


@st.composite
def plans(draw):
    count = draw(st.integers(1, 5))
    entrants = []
    for i in range(count):
        low = draw(LRS)
        entrants.append(
            Entrant(f"m{i}", low, low * draw(st.sampled_from([3.0, 10.0, 100.0, 1000.0])), draw(st.booleans()))
        )
    return PlanSettings(
        tuple(entrants),
        lr_trials=draw(st.integers(1, 8)),
        seeds=draw(st.integers(1, 3)),
        finalists=draw(st.sampled_from([1, 2, 3, "all"])),
        reference=draw(st.sampled_from(["m0", None])),
    )


def value_of(key, best, bad):
    """A loss with one optimum, at another learning rate for each method; too large a rate diverges."""
    distance = abs(math.log(key.lr / best[key.method]))
    return math.inf if key.lr > bad[key.method] else 1 + distance + 0.01 * key.seed


def play(plan, best, bad, order):
    """Run the whole race, taking trials in any order."""
    finished = {}
    while keys := next_trials(plan, finished):
        assert len(set(keys)) == len(keys)
        assert not set(keys) & set(finished)
        key = keys[order.draw(st.integers(0, len(keys) - 1))] if order else keys[0]
        finished[key] = value_of(key, best, bad)
    return finished


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_a_race_gives_every_method_the_same_tuning_and_does_not_depend_on_the_order(plan, data):
    best = {e.name: data.draw(LRS) for e in plan.entrants}
    bad = {e.name: best[e.name] * data.draw(st.sampled_from([2.0, 100.0, 1e9])) for e in plan.entrants}
    finished = play(plan, best, bad, data)
    assert finished == play(plan, best, bad, None)
    for entrant in plan.entrants:
        tried = [key.lr for key in finished if key.method == entrant.name and key.stage == TUNE]
        assert len(tried) == len(set(tried)) == plan.lr_trials
        if entrant.bounded:
            assert all(entrant.low * 0.99 <= lr <= entrant.high * 1.01 for lr in tried)
    assert all(key.seed == 0 for key in finished if key.stage == TUNE)
    chosen = finalists(plan, finished)
    finals = {key for key in finished if key.stage == FINAL}
    assert finals == {
        TrialKey(name, best_lr(name, finished), seed, FINAL) for name in chosen for seed in range(1, plan.seeds)
    }
    assert len(finished) <= total_trials(plan)


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_the_plan_is_a_function_of_what_has_finished(plan, data):
    """Any prefix of a race leads to the same rest: so a race can be continued after any death."""
    best = {e.name: data.draw(LRS) for e in plan.entrants}
    bad = dict.fromkeys(best, math.inf)
    whole = play(plan, best, bad, None)
    items = list(whole.items())
    prefix = dict(items[: data.draw(st.integers(0, len(items)))])
    shuffled = dict(data.draw(st.permutations(list(prefix.items()))))
    assert next_trials(plan, prefix) == next_trials(plan, shuffled)
    assert set(next_trials(plan, prefix)) <= set(whole)


def test_the_grid_is_logarithmic_and_has_both_ends():
    assert grid(Entrant("m", 1e-3, 1e-1), 3) == [1e-3, 1e-2, 1e-1]
    assert grid(Entrant("m", 1e-3, 1e-1), 1) == [1e-2]


@pytest.mark.parametrize(
    ("values", "bounded", "expected"),
    [
        ({0.01: 2.0, 0.1: 1.0, 1.0: 3.0}, False, 0.0316),  # towards the better neighbour
        ({0.01: 3.0, 0.1: 1.0, 1.0: 2.0}, False, 0.316),
        ({0.01: 3.0, 0.1: 2.0, 1.0: 1.0}, False, 3.16),  # beyond the edge
        ({0.01: 1.0, 0.1: 2.0, 1.0: 3.0}, False, 0.00316),
        ({0.01: 3.0, 0.1: 2.0, 1.0: 1.0}, True, 0.316),  # not beyond a hard bound
        ({0.01: math.inf, 0.1: math.inf, 1.0: math.inf}, False, 0.00316),  # all diverged: lower
        ({0.01: 1.0, 0.1: math.inf, 1.0: math.inf}, False, 0.00316),
    ],
)
def test_refinement(values, bounded, expected):
    assert refine(Entrant("m", 0.01, 1.0, bounded), values) == pytest.approx(expected, rel=0.01)


def test_the_reference_is_always_a_finalist_and_a_method_without_a_result_never():
    plan = PlanSettings(tuple(Entrant(n, 0.1, 1.0) for n in ("a", "b", "c", "d")), 1, 2, 1, "c")
    finished = {
        TrialKey("a", 0.316, 0, TUNE): 2.0,
        TrialKey("b", 0.316, 0, TUNE): 1.0,
        TrialKey("c", 0.316, 0, TUNE): 3.0,
        TrialKey("d", 0.316, 0, TUNE): math.inf,
    }
    assert finalists(plan, finished) == ["b", "c"]
    assert [key.method for key in next_trials(plan, finished)] == ["b", "c"]


BEST = {0: 10.0, 25: 6.0, 50: 4.0, 75: 3.0, 100: 2.0}


@pytest.mark.parametrize(
    ("steps", "losses", "pruned"),
    [
        ([0, 25, 50, 75], [10, 9.9, 9.5, 9.0], True),
        ([0, 25, 50], [10, 9.9, 9.5], False),  # only one measurement from half-way on
        ([0, 25, 50, 75], [10, 9.9, 9.5, 6.0], False),  # has come back
        ([0, 25, 50, 75, 100], [10, 9.9, 9.5, 9.0, 9.0], False),  # at the end nothing is pruned
        ([0, 50], [10, 9], False),
    ],
)
def test_pruning(steps, losses, pruned):
    assert (prune_reason(100, steps, losses, BEST) is not None) is pruned


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4))
def test_a_trial_that_is_not_far_behind_is_never_pruned(losses):
    """Whoever has made half of the best one's way at either of the last two measurements goes on."""
    trial = [10.0, *losses[1:]]
    if prune_reason(100, [0, 25, 50, 75], trial, BEST) is not None:
        assert trial[2] > 10 - 0.5 * (10 - BEST[50])
        assert trial[3] > 10 - 0.5 * (10 - BEST[75])
