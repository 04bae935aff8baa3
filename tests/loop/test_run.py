import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from loop_steppers import NoisyDescent, Scripted, Training
from torch import nn

from steepest.loop import Diverged, Record, Seconds, Steps, Tolerance, run


def quiet(*args, **options):
    return run(*args, progress=False, **options)


def test_history_holds_one_float_per_step():
    stepper = NoisyDescent()
    result = quiet(stepper, 7)
    assert result.steps == 7 and stepper.calls == 7
    assert result.stopped_by == "steps: 7 done"
    assert result.recorded_steps == list(range(1, 8))
    assert set(result.history) == {"loss", "mean"}
    assert all(type(v) is float for values in result.history.values() for v in values)
    assert result.last["loss"] == float(stepper.x.square().sum())
    assert result.recorded_seconds == sorted(result.recorded_seconds)
    assert result.resumed_from == 0 and result.checkpoint is None


@pytest.mark.parametrize(("steps", "expected"), [(10, [3, 6, 9, 10]), (9, [3, 6, 9]), (2, [2])])
def test_record_every_keeps_the_last_step_too(steps, expected):
    result = quiet(Scripted(*map(float, range(1, 11))), steps, record_every=3)
    assert result.recorded_steps == expected
    assert result.history["loss"] == [float(s) for s in expected]


def test_tensors_are_read_at_recorded_steps_only(monkeypatch):
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or item(self))
    quiet(NoisyDescent(), 100, record_every=50, stop=[Tolerance("loss", -1.0), Diverged(), Seconds(1e9)])
    # NoisyDescent reads its own mean once a step.
    assert len(reads) <= 100 + 2 * 2


def test_metrics_that_come_and_go_are_nan_in_between():
    result = quiet(Scripted({"a": 1}, {"a": 2, "b": 5}, {"b": math.inf}), 3)
    assert result.history["a"][:2] == [1.0, 2.0] and math.isnan(result.history["a"][2])
    assert math.isnan(result.history["b"][0]) and result.history["b"][1] == 5.0
    assert math.isnan(result.history["b"][2])


def test_callbacks_see_each_step_and_can_add_metrics_and_stop():
    seen = []

    def watch(step, metrics):
        seen.append((step, metrics["loss"], dict(metrics)))

    def add(step, metrics):
        return {"double": 2 * metrics["loss"]}

    def end(step, metrics):
        return step == 3 and f"double is {metrics['double']:.0f}"

    result = quiet(Scripted(1.0, torch.tensor(2.0), 3.0, 4.0), 4, callbacks=[watch, add, end], record_every=2)
    assert [s[:2] for s in seen] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert seen[0][2] == {"loss": 1.0}
    assert result.stopped_by == "double is 6" and result.steps == 3
    assert result.history == {"loss": [2.0, 3.0], "double": [4.0, 6.0]}


def test_all_callbacks_run_and_the_first_reason_counts():
    seen = []
    hooks = [lambda s, m: "first", lambda s, m: "second", lambda s, m: seen.append(s)]
    assert quiet(NoisyDescent(), 5, callbacks=hooks).stopped_by == "first" and seen == [1]


@pytest.mark.parametrize("keyword", ["callbacks", "stop"])
def test_an_answer_that_is_no_reason_is_refused(keyword):
    answer = (lambda s, m: True) if keyword == "callbacks" else (lambda r: 3)
    with pytest.raises(TypeError, match="reason to stop as a str; got"):
        quiet(NoisyDescent(), 5, **{keyword: answer})


def test_own_rules_see_records():
    records = []

    def rule(record):
        records.append(record)
        assert isinstance(record, Record)
        return record.step == 4 and "four"

    result = quiet(NoisyDescent(), stop=rule, record_every=2)
    assert result.stopped_by == "four"
    assert [r.step for r in records] == [1, 2, 3, 4]
    assert [r.recorded for r in records] == [False, True, False, True]
    assert records[-1].history["loss"] == result.history["loss"]


def test_the_first_rule_that_fires_names_the_reason():
    assert quiet(NoisyDescent(), stop=[Steps(3), lambda r: "mine" if r.step == 3 else None]).stopped_by.startswith(
        "steps"
    )
    assert quiet(NoisyDescent(), 10, stop=Seconds(1e-9)).steps == 1


def test_a_metric_that_is_never_recorded_is_reported():
    with pytest.warns(UserWarning, match="Tolerance watched 'los', which was never recorded; the metrics are: loss"):
        quiet(Scripted(1.0), 1, stop=Tolerance("los", 0.1))


@pytest.mark.parametrize(
    ("metrics", "error", "text"),
    [
        ({"loss": torch.ones(3)}, ValueError, r"metric 'loss' must be .*shape \(3,\)"),
        ({"loss": torch.tensor(1j)}, ValueError, "complex"),
        ({"loss": "low"}, TypeError, "metric 'loss' must be .*got str"),
        ({"loss": None}, TypeError, "metric 'loss' must be .*got NoneType"),
        ({3: 1.0}, TypeError, "name must be a str, got 3"),
        (None, TypeError, r"Scripted.step\(\) must return a mapping of metrics, got NoneType"),
    ],
)
def test_metrics_that_are_no_numbers(metrics, error, text):
    with pytest.raises(error, match=text):
        quiet(Scripted(metrics or (lambda: None)), 1)


def test_anything_like_a_number_is_a_metric():
    metrics = {"a": torch.tensor(1.5), "b": torch.tensor([[2]]), "c": True, "d": torch.tensor(0.5, requires_grad=True)}
    assert quiet(Scripted(metrics), 1).last == {"a": 1.5, "b": 2.0, "c": 1.0, "d": 0.5}


def test_optimizer_with_closure_matches_a_plain_loop():
    ours, plain = Training(), Training()
    result = ours.run(12)
    torch.manual_seed(0)
    plain = Training()
    losses = []
    for _ in range(12):
        loss, _ = plain.closure()
        plain.optimizer.step()
        plain.scheduler.step()
        losses.append(loss.item())
    assert result.history["loss"] == losses
    assert result.history["served"] == [float(s) for s in range(1, 13)]
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), plain.tensors(), strict=True))


def test_a_closure_called_often_is_recorded_at_the_start_of_the_step():
    x = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([x], max_iter=8)

    def closure():
        optimizer.zero_grad()
        loss = (x - 1).square().sum()
        loss.backward()
        return loss

    result = quiet(optimizer, 5, closure=closure, stop=Tolerance("loss", 1e-10))
    assert result.history["loss"][0] == 13.0
    assert result.stopped_by.startswith("tolerance: loss")


def test_the_callback_sees_the_rate_that_made_the_step():
    training = Training()
    rates = training.run(3, callbacks=lambda s, m: {"lr": training.scheduler.get_last_lr()[0]}).history["lr"]
    assert rates[0] == 0.05 and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("returned", [None, (1.0, 2.0), {"loss": 1.0}])
def test_a_closure_that_returns_no_loss(returned):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match="closure must return the loss"):
        quiet(optimizer, 1, closure=lambda: returned)


def test_exceptions_pass_unchanged():
    error = RuntimeError("the step broke")
    with pytest.raises(RuntimeError) as caught:
        quiet(Scripted(1.0, error), 5)
    assert caught.value is error


def test_nothing_global_changes():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(NoisyDescent(), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_rich_is_not_imported_without_a_bar():
    code = (
        "import sys, steepest.loop\n"
        "class S:\n"
        "    def step(self): return {'loss': 1.0}\n"
        "    def state_dict(self): return {}\n"
        "    def load_state_dict(self, state): pass\n"
        "steepest.loop.run(S(), 2)\n"
        "assert 'rich' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "S: 2 steps" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_metrics_on_a_gpu_cross_over_once_per_record(monkeypatch):
    crossings = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: crossings.append(1) or tolist(self))
    metrics = {"a": torch.tensor(1.5, device="cuda"), "b": torch.tensor([[2]], device="cuda"), "c": 3}
    result = quiet(Scripted(*[metrics] * 10), 10, record_every=5)
    assert result.history == {"a": [1.5] * 2, "b": [2.0] * 2, "c": [3.0] * 2} and len(crossings) == 2
