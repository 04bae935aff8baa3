"""The stability of trials: bounded, resumed to the bit, harmless where it cannot be measured, and in the report."""

import math

import torch
from torch import nn

from steepest.lab.methods import Method
from steepest.lab.plan import FINAL, TUNE, Entrant, PlanSettings, TrialKey, total_trials
from steepest.lab.report import write_report
from steepest.lab.trial import TrainingTrial
from steepest.lab.watch import COST, SHARE, few, measurements
from tests.lab.race_documents import race_document

CPU = torch.device("cpu")


class Classes:
    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def batches(self, split, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            x = torch.randn(6, 3, generator=generator)
            yield x, (x[:, 0] > 0).long()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class NotTwice(Classes):
    def loss(self, model, batch):
        x, y = batch
        return nn.functional.cross_entropy(Once.apply(model(x)), y)


def trial(task=None, watched=4):
    sgd = Method("sgd", "SGD", "", (1e-3, 1.0), function=lambda m, lr: torch.optim.SGD(m.parameters(), lr))
    key = TrialKey("sgd", 0.1, 0, FINAL)
    return TrainingTrial(task or Classes(), sgd, key, steps=20, device=CPU, watched=watched)


def go(one, count):
    for _ in range(count):
        one.step()
    return one


def test_measurements_at_equal_intervals_change_nothing():
    watched, plain = go(trial(), 20), go(trial(watched=0), 20)
    curves = watched.result()["stability"]
    assert curves["step"] == [5, 10, 15, 20] and all(value > 0 for value in curves["threshold"])
    assert all(math.isfinite(value) for value in curves["radius_ratio"])
    assert watched.result()["stability_verdict"] and plain.result()["stability"] == {}
    for a, b in zip(watched.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert watched.result()["val"]["loss"] == plain.result()["val"]["loss"]


def test_a_resumed_trial_has_the_same_measurements(tmp_path):
    whole, first = go(trial(), 20), go(trial(), 12)
    torch.save(first.state_dict(), tmp_path / "state")
    second = trial()
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert go(second, 8).result()["stability"] == whole.result()["stability"]


def test_a_loss_that_cannot_be_measured_does_no_harm():
    result = go(trial(NotTwice()), 20).result()
    assert result["steps"] == 20 and result["stability"] == {} and result["stability_verdict"] is None


def test_all_measurements_stay_within_their_share():
    entrants = tuple(Entrant(name, 0.1, 1.0) for name in "abcde")
    for seeds in (1, 2, 5):
        plan = PlanSettings(entrants, 8, seeds, 3, "a")
        total = total_trials(plan)
        for steps in (30, 150, 1000):
            tune = measurements(TrialKey("a", 0.1, 0, TUNE), plan, steps)
            final = measurements(TrialKey("a", 0.1, 1, FINAL), plan, steps)
            assert (tune == 0) == (seeds > 1 or steps < 200) and (final == 0) == (
                seeds == 1 or (steps, seeds) == (30, 5)
            )
            cost = COST * (40 * tune + (total - 40) * final)
            assert cost <= SHARE * total * steps


def test_a_few_examples():
    x, y = torch.ones(5, 2), torch.arange(5)
    assert [len(part) for part in few((x, y))] == [2, 2]
    assert few({"x": x, "z": torch.ones(3)})["x"] is x
    assert few("text") == "text"


def test_the_report_shows_it(tmp_path):
    document = race_document(methods=3, steps=100)
    for entry in document["trials"]:
        entry["stability"] = {
            "step": [50, 100], "relative_sharpness": [0.5, None], "sharpness": [10.0, 12.0], "threshold": [20.0, 20.0]
        }  # fmt: skip
        entry["stability_verdict"] = "Stable: <b>0.5</b>."
    page = write_report(document, tmp_path / "report.html").read_text()
    assert "chart-stability" in page and "Stable: &lt;b&gt;0.5&lt;/b&gt;." in page
    assert '"stabilityQuantities":["relative_sharpness","sharpness"]' in page and '"ty":[20,20]' in page
    bare = write_report(race_document(methods=2, steps=100), tmp_path / "bare.html").read_text()
    assert 'id="chart-stability"' not in bare
