"""The river valley: the paper's exact numbers, closed forms, SGD itself, and the river of a curved surface."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from steepest.curvature import Hessian
from steepest.dynamics import RiverValley, WindingValley, river_residual
from steepest.optim.schedules import Schedule, branch_points, cyclic_cosine, oracle_cosine, wsd, wsds

CHECKPOINTS = (1250, 2500, 5000)
VALLEY = RiverValley([1.0, 0.5, 0.2, 1e-3, 3e-4], [0.01, 0.01, 0.01, 1e-6, 1e-6])
START = [1.0, 1.0, 1.0, 3.0, 3.0]
HILL = RiverValley([1.0], [0.5])


def losses(schedule: Schedule, *marks: int) -> list[float]:
    run = VALLEY.run(schedule.lrs(range(max(marks))), mean=START)
    return [float(run.loss[mark]) for mark in marks]


def six_digits(values: list[float]) -> list[float]:
    """Six digits."""
    return [float(f"{value:.6g}") for value in values]


SCHEDULES: dict[str, tuple[Any, tuple[float, ...]]] = {
    "WSD-S, total": (wsds(CHECKPOINTS, floor_ratio=0.02, reference="total"), (0.00153675, 0.000647091, 0.000285493)),
    "WSD-S, cycle": (wsds(CHECKPOINTS, floor_ratio=0.02), (0.00153675, 0.000782571, 0.000305183)),
    "cyclic cosine": (cyclic_cosine(CHECKPOINTS, floor_ratio=0.02), (0.00238607, 0.00118717, 0.000492394)),
    "constant, high": (wsds(CHECKPOINTS, decay=0.0), (0.0121180, 0.0114430, 0.0111790)),
    "constant, low": (wsds(CHECKPOINTS, decay=0.0, peak=0.02), (0.00576574, 0.00553272, 0.00510652)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_sheets_exact_values(name: str) -> None:
    schedule, expected = SCHEDULES[name]
    assert six_digits(losses(schedule, *CHECKPOINTS)) == list(expected)


def test_the_sheets_exact_values_of_runs_for_one_budget() -> None:
    oracle = [losses(oracle_cosine(total, floor_ratio=0.02), total)[0] for total in CHECKPOINTS]
    assert six_digits(oracle) == [0.00238607, 0.00115205, 0.000477903]
    ends: dict[str, list[float]] = {}
    for compute in ("equal", "excluded"):
        points = branch_points(CHECKPOINTS, decay=0.1, compute=compute)  # type: ignore[arg-type]
        ends[compute] = [losses(p.schedule(floor_ratio=0.02), p.start + p.decay)[0] for p in points]
    assert six_digits(ends["equal"]) == [0.00153675, 0.000650378, 0.000287469]
    assert six_digits(ends["excluded"])[-1] == 0.000264550


def test_all_at_once_is_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    lrs = torch.rand(3, 2, 37, generator=generator, dtype=torch.float64) * 1.5  # one rate is 1 / h, exactly
    lrs[0, 0, 5] = 1.0
    mean, variance = torch.randn(5, generator=generator).double(), torch.rand(3, 2, 5, generator=generator).double()
    found = VALLEY.run(lrs, mean=mean, variance=variance)
    m, v = mean.expand(3, 2, 5), variance
    for t in range(37):
        assert torch.allclose(found.mean[..., t, :], m, rtol=1e-13, atol=0)
        assert torch.allclose(found.variance[..., t, :], v, rtol=1e-13, atol=0)
        assert torch.allclose(found.loss[..., t], VALLEY.loss(m, v), rtol=1e-13, atol=0)
        m, v = VALLEY.step(m, v, lrs[..., t])
    assert torch.allclose(found.variance[..., -1, :], v, rtol=1e-13, atol=0)


def test_the_moments_are_those_of_sgd() -> None:
    valley = RiverValley([1.0, 0.2], [0.5, 0.1])
    lrs = wsd(40, decay=0.5, peak=0.8).lrs(range(40))
    paths = valley.sample(lrs, 40_000, generator=torch.Generator().manual_seed(0), mean=[1.0, -2.0])
    run = valley.run(lrs, mean=[1.0, -2.0])
    error = run.variance.sqrt() / 200
    assert bool(((paths.mean(0) - run.mean).abs() <= 5 * error + 1e-12).all())
    assert torch.allclose(paths.var(0)[1:], run.variance[1:], rtol=0.05)


def test_the_stationary_state() -> None:
    assert float(RiverValley([1.0], [0.01]).stationary_variance(0.5)) == pytest.approx(0.0033333333, abs=5e-11)
    run = VALLEY.run([0.7] * 20_000)
    assert torch.allclose(run.variance[-1, :3], VALLEY.stationary_variance(0.7)[:3], rtol=1e-12)
    assert torch.allclose(VALLEY.plateau(0.7), VALLEY.h * VALLEY.stationary_variance(0.7) / 2, rtol=1e-12)
    edge = RiverValley([1.0, 0.0, 3.0, 4.0], [0.1, 0.1, 0.0, 0.0])
    assert edge.stationary_variance(2.0).tolist() == [math.inf, math.inf, math.inf, math.inf]
    assert edge.stationary_variance(0.5).tolist()[1:] == [math.inf, 0.0, 0.0]


def test_the_river_moves_by_the_sum_of_the_rates() -> None:
    river = RiverValley([1e-4], [0.0])
    ends = [
        float(river.run(s.lrs(range(1000)), mean=[1.0]).mean[-1]) for s in (wsd(1000, decay=0.3), wsds((500, 1000)))
    ]
    sums = [float(s.lrs(range(1000)).sum()) for s in (wsd(1000, decay=0.3), wsds((500, 1000)))]
    for end, total in zip(ends, sums, strict=True):
        assert end == pytest.approx(math.exp(-1e-4 * total), rel=1e-5)


def test_optimal_rates_on_a_hill_are_the_greedy_ones() -> None:
    variance = HILL.stationary_variance(0.4)
    greedy, optimal = (f(20, variance=variance) for f in (HILL.greedy_lrs, HILL.optimal_lrs))
    np.testing.assert_allclose(optimal, greedy, rtol=1e-6)
    noiseless = RiverValley([2.0], 0.0).optimal_lrs(3, mean=[1.0])
    assert float(RiverValley([2.0], 0.0).run(noiseless, mean=[1.0]).loss[-1]) < 1e-20
    assert float(greedy[0]) == pytest.approx(0.2, rel=1e-14)
    np.testing.assert_allclose((1 / greedy).diff(), 1.0, rtol=1e-12)
    end = HILL.run(optimal, variance=variance).variance[-1]
    assert float(end) == pytest.approx(0.0208333, abs=5e-8)
    assert float(end) == pytest.approx(1 / (1 / float(variance[0]) + 20 / 0.5), rel=1e-12)


def test_optimal_rates_of_several_coordinates_beat_the_greedy_ones() -> None:
    valley = RiverValley([1.0, 0.05], [0.1, 0.001])
    greedy, optimal = (f(30, mean=[0.0, 2.0], variance=[0.1, 0.0]) for f in (valley.greedy_lrs, valley.optimal_lrs))
    ends = [float(valley.run(lrs, mean=[0.0, 2.0], variance=[0.1, 0.0]).loss[-1]) for lrs in (greedy, optimal)]
    assert ends[1] < 0.9 * ends[0]
    for other in (optimal * 1.01, optimal * 0.99, optimal.flip(0)):
        assert float(valley.run(other, mean=[0.0, 2.0], variance=[0.1, 0.0]).loss[-1]) > ends[1]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (200, {"inverse": 0.02034, "exponential": 0.03113, "1-sqrt": 0.05866, "cosine": 0.06197, "linear": 0.08056}),
        (50, {"inverse": 0.25106, "exponential": 0.10214, "cosine": 0.16065}),
    ],
)
def test_how_well_a_decay_takes_the_noise_away(steps: int, expected: dict[str, float]) -> None:
    start = HILL.stationary_variance(0.4)
    for shape, ratio in expected.items():
        lrs = wsd(steps, decay=1.0, floor_ratio=0.01, peak=0.4, shape=shape).lrs(range(steps))  # type: ignore[arg-type]
        end = HILL.run(lrs, variance=start).variance[-1]
        assert float(end / start) == pytest.approx(ratio, abs=5.1e-6)


def test_the_residual_is_zero_on_the_river_alone() -> None:
    surface = WindingValley(1.0, 0.01)
    y = torch.linspace(0.3, 9, 12, dtype=torch.float64)
    points = surface.river(y)
    for point in points:
        assert river_residual(Hessian.of(surface, point)) < 1e-9
        floor = torch.stack([point[1].sin(), point[1]])
        assert river_residual(Hessian.of(surface, floor)) > 0.05
        hillside = point + torch.tensor([0.5, 0.0], dtype=torch.float64)
        assert river_residual(Hessian.of(surface, hillside)) > 0.5
    x = points.clone().requires_grad_()
    surface(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, surface.gradient(points), rtol=1e-12, atol=1e-15)
    assert river_residual(Hessian.of(surface, torch.zeros(2, dtype=torch.float64))) == 0.0


def test_a_large_rate_follows_the_winding_river() -> None:
    """SGD bounces on the hills; its decayed weights are on the river, at the place of the mean rate."""
    surface, generator = WindingValley(1.0, 1e-3), torch.Generator().manual_seed(0)
    w = torch.tensor([0.5, 3.0], dtype=torch.float64).repeat(200, 1)
    for lr in wsd(2000, decay=0.2, peak=0.3, floor_ratio=0.05).lrs(range(2000)):
        w = w - lr * (surface.gradient(w) + 0.1 * torch.randn(w.shape, generator=generator, dtype=torch.float64))
        if not torch.isfinite(w).all():
            pytest.fail("diverged")
    off = (w[:, 0] - w[:, 1].sin()).std()
    assert 0 < float(off) < 0.1 * 0.3


def test_the_residual_of_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).double().train()
    data = (torch.randn(16, 3).double(), torch.randn(16, 1).double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = river_residual(Hessian(model, nn.functional.mse_loss, data))
    assert 0 <= found <= 1 and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("do not fit", lambda: RiverValley([1.0, 2.0], [0.1, 0.1, 0.1])),
        ("h must be finite and not negative", lambda: RiverValley([-1.0], [0.1])),
        ("sigma2 must be finite", lambda: RiverValley([1.0], [math.nan])),
        ("do not fit", lambda: RiverValley([], 0.1)),
        ("real numbers", lambda: RiverValley(torch.ones(2, dtype=torch.complex64), 0.1)),
        ("h must be numbers", lambda: RiverValley("steep", 0.1)),
        ("lrs must hold", lambda: HILL.run([])),
        ("lrs must be finite", lambda: HILL.run([0.1, -0.1])),
        ("mean must have 1 entries", lambda: HILL.run([0.1], mean=[1.0, 2.0])),
        ("variance must have 1 entries", lambda: HILL.run([0.1], variance=[-1.0])),
        ("h must not be zero", lambda: RiverValley([0.0], [0.1]).optimal_lrs(3)),
        ("cannot fall", lambda: HILL.optimal_lrs(3)),
        ("start", lambda: HILL.optimal_lrs(3, variance=[1.0], start=0.0)),
        ("steps", lambda: HILL.greedy_lrs(0)),
        ("0 < kappa < gamma", lambda: WindingValley(1.0, 2.0)),
    ],
)
def test_wrong_input_is_named(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("point", [[0.0, 0.0, 1.0, 2.0, -1.0], [0.1, 0.0, 1.0, 2.0, -1.0], [1.0, 2.0, 0.0, 0.0, 0.0]])
def test_a_river_of_several_equal_directions(point: list[float], dtype: torch.dtype) -> None:
    h, w = torch.tensor([1.0, 0.5, 0.01, 0.01, 0.01], dtype=dtype), torch.tensor(point, dtype=dtype)
    across = float((h * w)[:2].norm() / (h * w).norm())
    assert river_residual(Hessian.of(lambda x: (h * x * x).sum() / 2, w)) == pytest.approx(across, abs=1e-5)
