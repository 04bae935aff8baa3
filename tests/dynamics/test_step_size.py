"""The learning rate of the step that was taken, and the monitor on optimizers that choose it themselves."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from steepest.curvature import Hessian
from steepest.dynamics import Monitor, SharpnessMonitor, step_lr, unwrapped
from steepest.models import MLP
from steepest.optim import DAL, IVON, RadiusClip, RadiusSGD, VariationalSGD


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=g, dtype=torch.float64)
    return MLP([4, 6, 3], "tanh", generator=g, dtype=torch.float64), x, torch.randint(3, (32,), generator=g)


def watch(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, **options: Any) -> Monitor:
    return Monitor(
        model, F.cross_entropy, optimizer, (x, y), every=1, max_overhead=None, max_products=60, tol=1e-9, **options
    )


def last(monitor: Monitor) -> dict[str, float]:
    return {name: values[-1] for name, values in monitor.history.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_dal_is_seen_with_the_rate_it_chose(momentum: float) -> None:
    model, x, y = problem()
    optimizer = DAL(model.parameters(), lr=0.123, p=0.5, factor=0.5, momentum=momentum)
    monitor = watch(model, optimizer, x, y, batch_size=8)
    g = dense = torch.empty(0)
    with monitor:
        for _ in range(3):
            H = Hessian(model, F.cross_entropy, (x, y))
            g, dense = H.gradient(), H.dense()
            optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.last_lr is not None
    rate = float(optimizer.last_lr)
    row = last(monitor)
    assert rate == pytest.approx(0.5 * float(g.norm() / (dense @ g).norm()) ** 0.5)
    assert row["lr"] == rate != 0.123
    assert row["edge"] == pytest.approx(2 / rate * (1 + momentum))
    assert row["drift"] == pytest.approx((rate / (1 - momentum)) ** 2 / 2 * float((dense @ g).norm()))
    assert row["relative_sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]) / row["edge"])
    assert row["alignment"] == pytest.approx(1.0)  # the gradient of the closure, not one from before
    found = SharpnessMonitor(model, F.cross_entropy, (x, y), optimizer=optimizer).measure()
    assert found.edge == pytest.approx(row["edge"])


def test_a_clipped_step_counts_with_its_scale() -> None:
    model, x, y = problem()
    optimizer = RadiusClip(SGD(model.parameters(), lr=50.0), model)
    monitor = watch(model, optimizer, x, y)
    with monitor:
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        F.cross_entropy(model(x), y).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    p = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    row = last(monitor)
    assert optimizer.last_scale < 1
    assert row["lr"] == pytest.approx(float(p.norm() / g.norm())) == pytest.approx(50 * optimizer.last_scale)
    assert row["edge"] == pytest.approx(2 / row["lr"]) and row["drift"] > 0


def test_radius_sgd_and_a_clipped_adam() -> None:
    model, x, y = problem()
    optimizer: Any = RadiusSGD(model.parameters(), model, momentum=0.0)
    monitor = watch(model, optimizer, x, y)
    with monitor:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    row = last(monitor)
    assert row["lr"] == optimizer.last_lr == pytest.approx(row["update_norm"] / row["grad_norm"])
    assert row["edge"] == pytest.approx(2 / row["lr"])
    model, x, y = problem()
    optimizer = RadiusClip(AdamW(model.parameters(), lr=0.5, weight_decay=0), model)
    monitor = watch(model, optimizer, x, y)
    with monitor:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    row = last(monitor)
    assert row["lr"] == pytest.approx(0.5 * optimizer.last_scale)
    assert row["preconditioned_sharpness"] > 0 and row["edge"] == pytest.approx(2 / row["lr"] * 1.9 / 0.1)


@pytest.mark.parametrize("make", [lambda p: VariationalSGD(p, 0.1, 0.05), lambda p: IVON(p, 0.1, 1000.0)])
def test_noisy_descent(make) -> None:
    model, x, y = problem()
    optimizer = make(model.parameters())
    monitor = watch(model, optimizer, x, y)
    with monitor:
        with optimizer.sampled_params(train=True):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    row = last(monitor)
    assert row["lr"] == 0.1
    assert row["threshold"] < row["edge"] == pytest.approx(2 / 0.1 * (1.9 / 0.1 if isinstance(optimizer, IVON) else 1))


class Wrapper(Optimizer):
    """In the manner of ScheduleFreeWrapper: another optimizer under the name `base`."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__([p for group in base.param_groups for p in group["params"]], {"lr": 7.0})


def test_rates_of_others() -> None:
    layer = nn.Linear(2, 2)
    inner = SGD(layer.parameters(), lr=0.5)
    assert unwrapped(inner) is inner and step_lr(inner) == 0.5
    assert unwrapped(Wrapper(Wrapper(inner))) is inner and step_lr(Wrapper(Wrapper(inner))) == 0.5
    inner.param_groups[0]["d"] = 0.01  # Prodigy
    assert step_lr(inner) == pytest.approx(0.005)
    inner.param_groups[0]["scheduled_lr"] = 0.2  # ScheduleFree in its warm-up
    assert step_lr(inner) == 0.2
    dal = DAL([{"params": [layer.weight]}, {"params": [layer.bias], "p": 0.0, "lr": 0.3}], factor=1.0)
    assert step_lr(dal) == 0.1 and step_lr(dal, 1) == 0.3
    dal.step(lambda: layer(torch.ones(1, 2)).square().sum())
    assert dal.last_lr is not None and step_lr(dal) == float(dal.last_lr[0]) and step_lr(dal, 1) == pytest.approx(0.3)


def test_tensorboard(monkeypatch, tmp_path) -> None:
    import sys
    from types import ModuleType

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            self.folder, self.scalars, self.flushed = folder, {}, 0

        def add_scalar(self, tag: str, value: float, global_step: int) -> None:
            assert math.isfinite(value)
            self.scalars[tag, global_step] = value

        def flush(self) -> None:
            self.flushed += 1

    fake: Any = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    model, x, y = problem()
    for given in (SummaryWriter("own"), tmp_path):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
        monitor = watch(model, SGD(model.parameters(), lr=0.1), x, y, writer=given)
        with monitor:
            F.cross_entropy(model(x), y).backward()
            monitor.optimizer.step()
        writer = monitor.writer
        assert writer.folder in ("own", str(tmp_path)) and writer.flushed == 1
        kept = {name: values[0] for name, values in monitor.history.items() if name not in ("step", "seconds")}
        expected = {(f"stability/{name}", 1): value for name, value in kept.items() if math.isfinite(value)}
        assert writer.scalars == expected and len(expected) > 9
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        watch(model, SGD(model.parameters(), lr=0.1), x, y, writer=tmp_path)
