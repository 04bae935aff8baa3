import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_steppers import Scripted

from steepest.loop import Diverged, Record, Seconds, Steps, Tolerance, run


def stop(rule, values, **options):
    result = run(Scripted(*values), len(values), stop=rule, progress=False, **options)
    return result.steps, result.stopped_by


def test_tolerance_below_and_above():
    assert stop(Tolerance("loss", 0.5), [1.0, 0.6, 0.5, 0.1]) == (3, "tolerance: loss 0.5 <= 0.5")
    assert stop(Tolerance("loss", above=0.9), [0.1, 0.95, 1.0]) == (2, "tolerance: loss 0.95 >= 0.9")
    assert stop(Tolerance("loss", above=0), [-1.0, 0.0, 1.0])[0] == 2


def test_patience_asks_for_values_in_a_row():
    values = [0.1, 1.0, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1, 0.1]
    assert stop(Tolerance("loss", 0.5, patience=3), values) == (8, "tolerance: loss 0.1 <= 0.5 3 times in a row")


def test_patience_skips_records_without_the_metric():
    values = [{"val": 0.1}, {"loss": 1.0}, {"val": 0.2}, {"loss": 1.0}, {"val": 0.3}, {"val": 0.3}]
    assert stop(Tolerance("val", 0.5, patience=3), values)[0] == 5


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.integers(1, 4))
def test_patience_against_a_direct_count(values, patience):
    expected, row = len(values), 0
    for step, value in enumerate(values, 1):
        row = row + 1 if value <= 0 else 0
        if row == patience:
            expected = step
            break
    assert stop(Tolerance("loss", 0.0, patience=patience), values)[0] == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_diverged_on_a_value_that_is_not_finite(bad):
    steps, reason = stop(Diverged(factor=None), [1.0, bad, 1.0])
    assert steps == 2 and reason.startswith("diverged: loss is ") and reason.endswith("at step 2")


def test_diverged_by_growth_from_the_first_value():
    assert stop(Diverged(factor=10), [2.0, 19.0, 20.0, 21.0, 1.0])[0] == 4
    assert stop(Diverged(factor=10), [-2.0, 20.0, 20.5])[0] == 3
    assert stop(Diverged(factor=10), [0.0, 1e9]) == (2, "steps: 2 done")
    assert stop(Diverged(factor=None), [1.0, 1e30])[1] == "steps: 2 done"
    assert stop(Diverged("other"), [{"loss": math.nan, "other": 1.0}])[1] == "steps: 1 done"


def test_metric_rules_look_at_recorded_steps():
    assert stop(Tolerance("loss", 0.5), [0.1, 0.1, 0.1, 0.1], record_every=3)[0] == 3


def test_limits():
    def record(step, seconds):
        return Record(step, seconds, {}, True, {})

    assert Steps(3)(record(2, 0.0)) is None and Steps(3)(record(3, 0.0)) == "steps: 3 done"
    assert Seconds(2)(record(1, 1.9)) is None
    assert str(Seconds(2)(record(1, 2.5))).startswith("seconds: 2.5 s passed")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Steps(0), "Steps: n must be a positive integer, got 0"),
        (lambda: Steps(2.0), "Steps: n must be a positive integer, got 2.0"),
        (lambda: Steps(True), "Steps: n must be a positive integer, got True"),
        (lambda: Seconds(0), "Seconds: limit must be a positive number of seconds"),
        (lambda: Seconds(math.nan), "Seconds: limit must be a number, got nan"),
        (lambda: Seconds("1"), "Seconds: limit must be a number, got '1'"),
        (lambda: Tolerance("loss"), "give either below or above"),
        (lambda: Tolerance("loss", 1, above=2), "give either below or above"),
        (lambda: Tolerance(1, 2), "metric must be the name of a metric"),
        (lambda: Tolerance("loss", math.nan), "below must be a number, got nan"),
        (lambda: Tolerance("loss", 1, patience=0), "patience must be a positive integer"),
        (lambda: Diverged(""), "metric must be the name of a metric"),
        (lambda: Diverged(factor=1), "factor must be above 1 or None"),
        (lambda: Diverged(factor="big"), "factor must be a number"),
    ],
)
def test_wrong_rules(make, text):
    with pytest.raises((TypeError, ValueError), match=text):
        make()
