# ruff: noqa: NPY002 - the global generators are what is tested
import io
import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from steepest.lab.batches import Feed, count_examples, to_device
from steepest.lab.methods import METHODS, Method, get_methods
from steepest.lab.plan import TUNE, TrialKey
from steepest.lab.settings import RaceError
from steepest.lab.streams import RandomStream
from steepest.lab.tasks import load_task
from steepest.lab.trial import TrainingTrial, evaluate, schedule
from steepest.loop import run

CPU = torch.device("cpu")


class Noisy:
    """A task that draws from every global generator: dropout, a shuffling loader, NumPy and Python."""

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def loss(self, model, batch):
        (x,) = batch
        return (model(x) - np.random.randn() - random.random()).square().mean()

    def batches(self, split, seed):
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(20, 3, generator=generator))
        return torch.utils.data.DataLoader(data, batch_size=6, shuffle=split == "train")


def adam(lr=0.01):
    return Method("adam", "Adam", "", (1e-3, 1.0), function=lambda model, lr: torch.optim.Adam(model.parameters(), lr))


def sgd():
    return Method("sgd", "SGD", "", (1e-3, 1.0), function=lambda model, lr: torch.optim.SGD(model.parameters(), lr))


def trial(task=None, method=None, steps=20, lr=0.01, seed=0, **options):
    key = TrialKey("m", lr, seed, TUNE)
    return TrainingTrial(task or Noisy(), method or adam(), key, steps=steps, device=CPU, **options)


def go(one, count):
    for _ in range(count):
        one.step()
    return one


def plain(result):
    """A result without its timings."""
    drop = ("seconds", "seconds_per_step", "optimizer_seconds_per_step", "peak_memory_bytes")
    kept = {name: value for name, value in result.items() if name not in drop}
    for curve in ("curve", "val"):
        kept[curve] = {name: value for name, value in kept[curve].items() if name != "seconds"}
    return kept


@pytest.mark.parametrize("at", [1, 4, 9, 19])
def test_a_resumed_trial_ends_with_the_same_bits(at):
    whole = go(trial(), 20)
    file = io.BytesIO()
    torch.save(go(trial(), at).state_dict(), file)
    file.seek(0)
    resumed = trial()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    go(resumed, 20 - at)
    assert plain(resumed.result()) == plain(whole.result())
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def ivon(samples):
    from steepest.optim import IVON

    make = lambda model, lr: IVON(model.parameters(), lr, ess=20, samples=samples)  # noqa: E731
    return Method("ivon", "IVON", "", (1e-3, 1.0), function=make)


@pytest.mark.parametrize("samples", [1, 3])
def test_an_optimizer_that_samples_its_parameters_races_and_resumes(samples):
    whole = go(trial(method=ivon(samples)), 6)
    half = go(trial(method=ivon(samples)), 3)
    resumed = trial(method=ivon(samples))
    resumed.load_state_dict(half.state_dict())
    assert plain(go(resumed, 3).result()) == plain(whole.result())
    assert all(bool(p.isfinite().all()) for p in whole.model.parameters())


def test_ivon_learns_the_size_of_the_data_from_the_task():
    task = load_task("digits", batch=32)
    (method,) = get_methods(("ivon",), {}, task)
    assert task.examples == len(task.data.train_y) == 1437
    assert "ess=1437.0" in method.snippet("0.3") and "ess" not in get_methods(("ivon",), {}, Noisy())[0].options
    one = go(trial(task, method, lr=0.3), 20)
    assert one.optimizer.param_groups[0]["ess"] == 1437
    assert one.result()["value"] < one.result()["val"]["loss"][0] - 0.2
    text = load_task("text")
    assert text.examples == len(text.corpus.train)


class Smooth(Noisy):
    def loss(self, model, batch):
        return (model(batch[0]) - batch[0].sum(1, keepdim=True).sin()).square().mean()


def test_dal_races_with_a_closure_and_resumes():
    method = METHODS["dal"]
    whole = go(trial(Smooth(), method, lr=0.2, watched=2), 20)
    half = go(trial(Smooth(), method, lr=0.2, watched=2), 7)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = trial(Smooth(), method, lr=0.2, watched=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    found = whole.result()
    assert plain(go(resumed, 13).result()) == plain(found)
    assert found["state"] == "complete" and found["value"] < found["val"]["loss"][0]
    assert min(found["curve"]["grad_norm"]) > 0 and found["stability"]["edge"][0] > 0
    assert found["stability"]["lr"][0] != found["curve"]["lr"][9]  # the rate that it chose
    with pytest.raises(RaceError, match="clip does not apply to dal"):
        trial(Smooth(), method, clip=1.0)

    class Bad(Smooth):
        def loss(self, model, batch):
            return super().loss(model, batch) * math.nan

    worst = trial(Bad(), method)
    worst.val["step"].append(0)
    go(worst, 1)
    assert worst.result()["state"] == "diverged" and "not finite at step 1" in worst.result()["reason"]


def test_the_loop_resumes_it_from_its_file(tmp_path):
    def play(stop_at=None):
        one = trial()
        rules = [lambda record: "enough" if record.step == stop_at else None]
        run(one, steps=20, stop=rules, checkpoint=tmp_path / "t.ckpt", progress=False)
        return one

    whole = go(trial(), 20)
    assert play(stop_at=7).step_count == 7
    assert plain(play().result()) == plain(whole.result())


def test_all_methods_see_the_same_weights_and_batches():
    seen = {}

    class Spy(Noisy):
        def loss(self, model, batch):
            if model.training:
                seen.setdefault(self.who, []).append(batch[0])
            return super().loss(model, batch)

    starts = []
    for method in (adam(), sgd()):
        task = Spy()
        task.who = method.name
        one = trial(task, method)
        starts.append([p.detach().clone() for p in one.model.parameters()])
        go(one, 12)
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen["adam"], seen["sgd"], strict=True))


def test_seeds_differ():
    a, b = go(trial(seed=0), 3), go(trial(seed=1), 3)
    assert a.result()["curve"]["train_loss"] != b.result()["curve"]["train_loss"]


def test_a_trial_leaves_the_global_generators_alone():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    go(trial(), 3)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_what_is_recorded():
    one = go(trial(steps=200), 200)
    result = one.result()
    assert result["state"] == "complete"
    assert result["val"]["step"] == [0, 25, 50, 75, 100, 125, 150, 175, 200]
    assert result["value"] == pytest.approx(result["val"]["loss"][-1], rel=1e-5)
    assert result["curve"]["step"] == list(range(2, 201, 2))
    assert all(len(values) == 100 for values in result["curve"].values())
    for curve in result["roles"].values():
        assert len(curve["step"]) == 40
        ratios = [u / w for u, w in zip(curve["update_norm"], curve["weight_norm"], strict=True)]
        assert ratios == pytest.approx(curve["update_to_weight"], rel=1e-4)
    assert result["optimizer_state_bytes"] >= 2 * 4 * result["parameters"]
    assert result["examples_per_step"] in (2, 6)


def test_the_update_norms_are_those_of_the_parameters():
    """SGD without momentum: update = lr * gradient, role by role."""
    one = go(trial(method=sgd(), steps=20, lr=0.5), 20)
    lrs = dict(zip(one.curve["step"], one.curve["lr"], strict=True))
    for curve in one.dynamics.curves.values():
        expected = [lrs[step] * g for step, g in zip(curve["step"], curve["grad_norm"], strict=True)]
        assert curve["update_norm"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    total = [math.sqrt(sum(c["grad_norm"][i] ** 2 for c in one.dynamics.curves.values())) for i in range(20)]
    assert total == pytest.approx(one.curve["grad_norm"], rel=1e-4)


def test_the_schedule_rises_then_falls_to_almost_zero():
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(factors[5:]))
    assert factors[-1] == pytest.approx(1 / 95)
    assert schedule(0, 1) == 1.0


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_divergence_ends_a_trial(lr):
    one = trial(method=sgd(), lr=lr, steps=100)
    ended = run(one, steps=100, stop=one.stop, progress=False)
    assert ended.stopped_by.startswith("diverged")
    result = one.result()
    assert result["state"] == "diverged"
    assert result["steps"] < 100


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_diverged_when_the_gradient_is_not_finite(name):
    class Broken(Noisy):
        calls = 0

        def loss(self, model, batch):
            self.calls += model.training
            loss = super().loss(model, batch)
            return loss + 0 * (loss * 0).sqrt() if self.calls == 3 else loss  # finite, with a gradient of nan

    one = trial(Broken(), METHODS[name], lr=1e-3)
    run(one, steps=20, stop=one.stop, progress=False)
    assert one.result()["state"] == "diverged"


def test_pruning_ends_a_trial():
    one = trial(prune=lambda steps, losses: "hopeless" if steps[-1] >= 10 else None)
    run(one, steps=20, stop=one.stop, progress=False)
    assert one.result()["state"] == "pruned"
    assert one.result()["reason"] == "hopeless"
    assert one.step_count == 10


def test_validation_counts_every_example_once():
    class Mean(Noisy):
        def loss(self, model, batch):
            return batch[0].mean()

        def batches(self, split, seed):
            return [(torch.tensor([[1.0], [2.0], [3.0]]),), (torch.tensor([[10.0]]),)]

        def metrics(self, model, batch):
            return {"biggest": float(batch[0].max())}

    loss, metrics = evaluate(Mean(), nn.Linear(1, 1), CPU)
    assert loss == pytest.approx(4.0)
    assert metrics == {"biggest": pytest.approx((3 * 3 + 10) / 4)}


def test_a_loss_that_needs_gradients_can_be_validated():
    class Physics(Noisy):
        def loss(self, model, batch):
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            return slope.square().mean()

    one = go(trial(Physics()), 5)
    assert math.isfinite(one.val["loss"][0])


def test_a_generator_is_begun_again_with_another_order():
    class Finite(Noisy):
        def batches(self, split, seed):
            generator = torch.Generator().manual_seed(seed)
            for _ in range(3):
                yield torch.randn(2, generator=generator)

    feed = Feed(Finite(), 0)
    first = [feed.next() for _ in range(3)]
    second = [feed.next() for _ in range(3)]
    assert not torch.equal(first[0], second[0])
    resumed = Feed(Finite(), 0)
    partway = Feed(Finite(), 0)
    for _ in range(4):
        partway.next()
    resumed.load_state_dict(partway.state_dict())
    assert torch.equal(resumed.next(), second[1])


def test_batches_of_any_container():
    batch = {"x": torch.ones(4, 2), "rest": (torch.zeros(4), [torch.zeros(4), "text"])}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"].device.type == moved["rest"][1][0].device.type == "meta"
    assert moved["rest"][1][1] == "text"
    assert count_examples(batch) == 4
    assert count_examples(("text", 3)) is None


def test_streams_do_not_mix():
    a, b = RandomStream(1), RandomStream(2)
    with a:
        first = torch.rand(1)
    with b:
        torch.rand(100)
    with a:
        second = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(1), torch.rand(1)]))


@pytest.mark.parametrize("name", ["text", "text-moe", "digits"])
def test_the_built_in_tasks_train(name):
    one = trial(load_task(name, batch=4), METHODS["adamw"], steps=8, lr=3e-3)
    go(one, 8)
    assert one.val["loss"][-1] < one.val["loss"][0]
    assert "router" not in one.dynamics.roles or name == "text-moe"
