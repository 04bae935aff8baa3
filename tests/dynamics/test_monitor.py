"""The monitor on four constructed runs, its numbers against explicit ones, its cost, and that it changes nothing."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.curvature import Hessian, top_eigenpairs
from steepest.dynamics import Monitor, judge
from steepest.loop import run
from steepest.models import MLP


def data(n: int = 64, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    clean = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3]
    return x, clean + noise * torch.randn(n, 1, generator=g, dtype=torch.float64)


def network(sizes: tuple[int, ...] = (4, 16, 1)) -> nn.Module:
    return MLP(sizes, "tanh", generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train(
    monitor: Monitor, x: Tensor, y: Tensor, steps: int, batch: int | None = None, spike_at: int | None = None
) -> None:
    g = torch.Generator().manual_seed(2)
    with monitor:
        for step in range(steps):
            rows = torch.arange(len(x)) if batch is None else torch.randint(len(x), (batch,), generator=g)
            if step == spike_at:
                for group in monitor.optimizer.param_groups:
                    group["lr"] *= 1000
            monitor.optimizer.zero_grad()
            monitor.loss_fn(monitor.model(x[rows]), y[rows]).backward()
            monitor.optimizer.step()


def watched(lr: float, every: int = 10, noise: float = 0.0, n: int = 64, **options: Any) -> tuple[Monitor, Any]:
    model, batch = network(), data(n, noise)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return Monitor(model, F.mse_loss, optimizer, batch, every=every, max_overhead=None, **options), batch


def test_a_stable_run() -> None:
    monitor, (x, y) = watched(0.02)
    train(monitor, x, y, 200)
    assert monitor.verdict().state == "stable", monitor
    assert monitor.history["relative_sharpness"][-1] < 0.5


def test_the_edge_of_stability() -> None:
    monitor, (x, y) = watched(0.3, every=20)
    train(monitor, x, y, 1500)
    assert monitor.verdict().state == "at the edge of stability", monitor
    late = monitor.history["relative_sharpness"][-20:]
    assert 0.9 < sorted(late)[10] < 1.15
    assert f"{2 / 0.3:.3g}" in str(monitor)


def test_a_spike() -> None:
    monitor, (x, y) = watched(0.02)
    train(monitor, x, y, 220, spike_at=205)
    assert monitor.verdict().state == "diverging by a spike", monitor
    assert "times its threshold" in monitor.verdict().sentence


def test_a_noise_limited_run() -> None:
    monitor, (x, y) = watched(0.03, every=50, noise=1.0, n=512)
    train(monitor, x, y, 3000, batch=2)
    assert monitor.verdict().state == "noise-limited", monitor


def test_the_numbers_are_those_of_the_step() -> None:
    model, (x, y) = network((4, 3, 2)), data()
    labels = (y[:, 0] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    monitor = Monitor(
        model, F.cross_entropy, optimizer, (x, labels), every=3, max_overhead=None, batch_size=4, samples=64,
        max_products=40, tol=1e-8, probes=64,
    )  # fmt: skip
    with monitor:
        for _ in range(3):
            H = Hessian(model, F.cross_entropy, (x, labels)).dense()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            g = torch.cat([p.grad.flatten() for p in model.parameters()])
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            optimizer.step()
    p = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    row = {name: values[-1] for name, values in monitor.history.items()}
    assert row["step"] == 3 and row["lr"] == 0.3
    expected = {
        "loss": float(loss.detach()),
        "grad_norm": float(g.norm()),
        "update_norm": float(p.norm()),
        "alignment": 1.0,
        "sharpness": float(torch.linalg.eigvalsh(H)[-1]),
        "edge": 2 * 1.5 / 0.3,
        "threshold": 2 * 1.5 / 0.3,
        "overshoot": float(p @ H @ p / (2 * abs(g @ p))),
        "drift": float(0.6**2 / 2 * (H @ g).norm()),
        "trace_threshold": 2 * 4 / 0.6,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6), name
    assert abs(row["trace"] - float(H.trace())) < 4 * row["trace_error"]
    assert row["relative_sharpness"] == pytest.approx(row["sharpness"] / row["threshold"])
    assert 0 < row["radius_ratio"] < 10 and math.isnan(row["preconditioned_sharpness"])
    assert monitor.roles and all(curve["step"] == [3] for curve in monitor.roles.values())


def test_adam_is_seen_through_its_preconditioner() -> None:
    model, (x, y) = network(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.99))
    monitor = Monitor(model, F.mse_loss, optimizer, (x, y), every=5, max_overhead=None, max_products=80, tol=1e-8)
    with monitor:
        for _ in range(5):
            H = Hessian(model, F.mse_loss, (x, y)).dense()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    state = [optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]
    root = (torch.cat(state) / (1 - 0.99**5)).sqrt().add(1e-8).rsqrt()
    found = monitor.history["preconditioned_sharpness"][-1]
    assert found == pytest.approx(float(torch.linalg.eigvalsh(root[:, None] * H * root)[-1]), rel=1e-6)
    assert monitor.history["edge"][-1] == pytest.approx(2000)
    assert monitor.history["relative_sharpness"][-1] == pytest.approx(found / 2000)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_the_cost_stays_within_its_budget(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr("steepest.dynamics.monitor.time", clock)
    monitor, _ = watched(0.1, every=1)
    monitor.max_overhead = 0.1

    def record(*_: Any) -> None:
        clock.now += 3.0
        monitor.history["step"].append(monitor.steps)

    monkeypatch.setattr(monitor, "_record", record)
    monitor.attach()
    for _ in range(1000):
        clock.now += 1.0
        monitor.before_step()
        monitor.after_step()
    assert 0.05 < monitor.overhead <= 0.1 and 25 <= len(monitor.history["step"]) <= 34
    assert monitor.history["step"][0] == 1 and "% of the training time" in str(monitor)


def test_training_is_not_touched() -> None:
    def go(watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)).double()
        x, y = data()
        labels = (y[:, 0] > 0).long()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        monitor = Monitor(model, F.cross_entropy, optimizer, (x, labels), every=2, max_overhead=None)
        if watch:
            monitor.attach()
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        assert len(monitor.history["step"]) == 5 * watch
        return [value.clone() for value in model.state_dict().values()]

    for a, b in zip(go(True), go(False), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_monitor_goes_on_with_the_same_numbers(tmp_path) -> None:
    whole, (x, y) = watched(0.1, every=4)
    train(whole, x, y, 20)
    first, _ = watched(0.1, every=4)
    train(first, x, y, 10)
    torch.save({"monitor": first.state_dict(), "model": first.model.state_dict()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    second, _ = watched(0.1, every=4)
    second.model.load_state_dict(state["model"])
    second.load_state_dict(state["monitor"])
    train(second, x, y, 10)
    for name in set(whole.history) - {"seconds"}:
        torch.testing.assert_close(second.history[name], whole.history[name], rtol=0, atol=0, equal_nan=True)
    assert second.roles == whole.roles


def test_as_a_callback_of_the_loop() -> None:
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, F.mse_loss, optimizer, lambda: (x, y), every=5, max_overhead=None)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    run(optimizer, 20, closure=closure, callbacks=monitor, progress=False)
    assert monitor.history["step"] == [5, 10, 15, 20]


def test_losses_of_any_form_and_unknown_optimizers() -> None:
    from steepest.optim import Muon

    model, (x, y) = network(), data()
    optimizer = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)
    monitor = Monitor.of_loss(model, lambda m, b: F.mse_loss(m(b["x"]), b["y"]), optimizer, [{"x": x, "y": y}], every=1)
    with monitor:
        monitor.loss_fn(model, {"x": x, "y": y}).backward()
        optimizer.step()
    row = {name: values[-1] for name, values in monitor.history.items()}
    assert row["sharpness"] > 0 and math.isnan(row["edge"]) and math.isnan(row["radius_ratio"])
    assert monitor.verdict().state == "stable" and "second-order" in monitor.verdict().sentence


def test_the_writer_gets_every_number() -> None:
    seen = {}

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen[name, step] = value

    monitor, (x, y) = watched(0.1, every=5, writer=Writer())
    train(monitor, x, y, 5)
    assert seen["stability/sharpness", 5] == monitor.history["sharpness"][0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every"),
        ({"max_overhead": 0.0}, ValueError, "max_overhead"),
        ({"probes": 1}, ValueError, "probes"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 9, "samples": 8}, ValueError, "batch_size must be at most samples=8"),
        ({"radius": "no"}, ValueError, "radius"),
        ({"data": None}, TypeError, "data"),
        ({"optimizer": None}, TypeError, "optimizer"),
        ({"model": None}, TypeError, "model"),
        ({"loss_fn": 1}, TypeError, "loss_fn"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:
    model = network()
    given = {"model": model, "loss_fn": F.mse_loss, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    given |= {"data": data(), **options}
    with pytest.raises(error, match=message):
        Monitor(**given)
    with pytest.raises(TypeError, match="no option 'often'"):
        Monitor.of_loss(model, lambda m, b: None, torch.optim.SGD(model.parameters(), 0.1), [], often=3)


def test_a_learning_rate_far_too_large_is_not_stable() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).double()
    x, y = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
    monitor = Monitor(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 1e6), (x, y), every=1)
    train(monitor, x, y, 8)
    assert monitor.verdict().state in ("beyond the edge of stability", "diverging by a spike"), monitor


def test_a_model_with_batch_norm_is_measured_as_it_trains() -> None:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(16)
    norm.running_var = torch.full((16,), 1e-4)  # of evaluation alone
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), norm, torch.nn.Linear(16, 1)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    y = x[:, :1]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    monitor = Monitor(model, F.mse_loss, optimizer, (x, y), every=1, max_overhead=None)
    expected = Hessian(model, F.mse_loss, (x, y), train=True)
    sharpness = float(top_eigenpairs(expected, 1, tol=1e-6).values[0])
    train(monitor, x, y, 1)
    assert monitor.history["sharpness"][0] == pytest.approx(sharpness, rel=1e-2)


def test_verdicts_of_histories() -> None:
    assert judge({}).state == "unknown"
    steps = list(range(8))
    assert judge({"step": steps, "loss": [1.0] * 7 + [math.nan]}).state == "diverging by a spike"
    assert (
        judge({"step": steps, "loss": [8.0 - s for s in steps], "relative_sharpness": [math.nan] * 8}).state == "stable"
    )
    still = {"step": steps, "loss": [1.0] * 8}
    for name in ("radius_ratio", "relative_sharpness"):
        found = judge({**still, name: [50.0] * 8})
        assert found.state == "beyond the edge of stability" and "50 times" in found.sentence
    assert judge({**still, "overshoot": [50.0] * 8}).state == "stable"  # the slope vanishes at a minimum
    sawtooth = list(itertools.islice(itertools.cycle([1.0, 1.02]), 8))
    assert judge({"step": steps, "loss": sawtooth, "alignment": [0.1] * 8}).state == "noise-limited"
    assert judge({"step": steps, "loss": sawtooth, "alignment": [0.9] * 8}).state == "stable"
