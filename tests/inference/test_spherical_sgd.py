"""SGD on the sphere, with averages and with explicit smoothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.geometry import sphere
from steepest.inference import SingleIndex, SmoothedSGD, SphericalSGD, overlap, steps_needed, two_stages

DTYPE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def advanced(stepper: Any, steps: int) -> Any:
    for _ in range(steps):
        stepper.step()
    return stepper


def test_one_step_is_the_formula() -> None:
    problem = SingleIndex(5, 3, 30, 0.1, seeded(), dtype=DTYPE)
    start = sphere.uniform(4, 5, generator=seeded(1), dtype=DTYPE)
    for clip in (None, 0.7):
        stepper = SphericalSGD(problem, lr=0.2, start=start, sampling="one_pass", clip=clip)
        metrics = stepper.step()
        u = start @ problem.x[0]
        factor = problem.y[0] * problem.slope(u)
        large = factor.abs() > 0.7
        factor = factor if clip is None else factor.clamp(-clip, clip)
        g = factor.unsqueeze(-1) * sphere.tangent(start, problem.x[0].expand_as(start))
        expected = start + 0.2 * g
        assert torch.allclose(stepper.theta, expected / expected.norm(dim=-1, keepdim=True), atol=1e-14)
        assert float(metrics["clipped"]) == (0 if clip is None else float(large.double().mean()))
        assert float(stepper.time) == pytest.approx(float((0.2 * g).square().sum(-1).mean()) / 4)


def test_a_batch_of_samples_is_averaged() -> None:
    problem = SingleIndex(5, 3, 6, generator=seeded(), dtype=DTYPE)
    start = sphere.uniform(2, 3, 5, generator=seeded(1), dtype=DTYPE)
    stepper = SphericalSGD(problem, lr=0.1, start=start, sampling="one_pass", batch_size=6)
    stepper.step()
    expected = sphere.retract(start, 0.1 * sphere.tangent(start, problem.neg_grad(start)))
    assert torch.allclose(stepper.theta, expected, atol=1e-13)
    with pytest.raises(RuntimeError, match="is over"):
        stepper.step()


def test_samples_are_drawn_evenly() -> None:
    problem = SingleIndex(3, 1, 10, generator=seeded())
    stepper = SphericalSGD(problem, chains=1000, lr=0.01)
    counts = torch.bincount(stepper._index().flatten(), minlength=10)
    assert int(counts.sum()) == 1000 and int(counts.min()) > 60 and int(counts.max()) < 150


def test_the_average_recovers_an_odd_link() -> None:
    problem = SingleIndex(20, 3, 10 * 400, generator=seeded())
    stepper = SphericalSGD(problem, lr=0.1, chains=32, generator=seeded(1))
    found = advanced(stepper, 1500).estimate()
    assert found.order == "first" and found.confident
    assert float(overlap(found.direction, problem.theta_star)) > 0.9
    assert float(overlap(stepper.theta, problem.theta_star).abs().mean()) < 0.4


def test_two_stages_finish_the_job() -> None:
    problem = SingleIndex(16, 3, 2000, generator=seeded(2))
    found = two_stages(problem, problem.fresh(2500, seeded(3)), steps=1000, second_lr=0.003)
    first, last = (float(overlap(each, problem.theta_star)) for each in (found.first.direction, found.theta))
    assert first > 0.5 and last > max(first, 0.95)


class _Wild:
    """Multipliers as they are given."""

    d, n, x = 3, 2, torch.eye(3)[:2]

    def __init__(self, value: Any) -> None:
        self.value = value

    def multiplier(self, theta: Tensor, index: Tensor) -> Tensor:
        return self.value(index)


def test_wrong_multipliers_change_nothing() -> None:
    for value, message in (
        (lambda index: index * math.nan, "NaN"),
        (lambda index: torch.ones(1), "shape"),
        (lambda index: 1.0, "float"),
    ):
        stepper = SphericalSGD(_Wild(value))
        before = stepper.state_dict()
        with pytest.raises(RuntimeError, match=message):
            stepper.step()
        assert torch.equal(stepper.theta, before["theta"])
        assert torch.equal(stepper.generator.get_state(), before["generator"])
    huge = SphericalSGD(_Wild(lambda index: torch.full(index.shape, 1e30)))
    assert bool(advanced(huge, 3).theta.isfinite().all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"clip": -1.0}, ValueError, "clip"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"sampling": "shuffle"}, ValueError, "sampling"),
        ({"chains": 0}, ValueError, "chains"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SphericalSGD(SingleIndex(4, 3, 10), **options)


def test_a_problem_without_samples() -> None:
    with pytest.raises(TypeError, match="multiplier"):
        SphericalSGD(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SingleIndex"):
        SmoothedSGD(torch.nn.Identity())  # type: ignore[arg-type]


def test_steps_needed() -> None:
    assert steps_needed(10, 3, 2.0, 0.01, 50) == 500
    assert steps_needed(10, 3, 2.0, 0.01, 50, factor=0.5) == 250


# Explicit smoothing.


@pytest.mark.parametrize("lam", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_smoothed_multiplier_is_the_derivative_of_the_smoothed_link(k: int, lam: float) -> None:
    d = 6
    problem = SingleIndex(d, k, 4, generator=seeded(), dtype=DTYPE)
    x = problem.x[0]
    u, w = sphere.coordinate_rule(d - 1, 40)

    def smoothed(a: Tensor) -> Tensor:
        rest = (x.square().sum() - a.square()).sqrt()
        return (problem.link((a.unsqueeze(-1) + lam * u * rest.unsqueeze(-1)) / math.sqrt(1 + lam**2)) @ w).sum()

    theta = sphere.uniform(5, d, generator=seeded(1), dtype=DTYPE)
    a = (theta @ x).requires_grad_()
    (slope,) = torch.autograd.grad(smoothed(a), a)
    exact = SmoothedSGD(problem, samples=None)
    assert torch.allclose(exact.multiplier(theta, x, lam), slope, atol=1e-11)
    drawn = SmoothedSGD(problem, samples=40_000)
    assert torch.allclose(drawn.multiplier(theta, x, lam), slope, atol=0.05 * (1 + float(slope.abs().max())))


def test_infinite_smoothing_is_a_partial_trace() -> None:
    problem = SingleIndex(8, 3, 20_000, generator=seeded(), dtype=DTYPE)
    # On the equator of a point the gradient is again along the trace, up to what is tangent.
    smoother = SmoothedSGD(problem, samples=None)
    theta = sphere.uniform(1, 8, generator=seeded(1), dtype=DTYPE)
    total = sum(
        float(y) * smoother.multiplier(theta, x, 1e4)[0] * x for x, y in zip(problem.x[:4000], problem.y, strict=False)
    )
    trace = problem.partial_trace()
    found = overlap(sphere.tangent(theta[0], total), sphere.tangent(theta[0], trace))  # type: ignore[arg-type]
    assert abs(float(found)) > 0.9


def test_smoothing_recovers_the_direction_in_one_pass() -> None:
    problem = SingleIndex(6, 3, 4000, generator=seeded(1))
    smoothing, lr = (lambda step: 6**0.25 if step < 2000 else 0.0), (lambda step: 0.02 if step < 2000 else 0.004)
    stepper = SmoothedSGD(problem, smoothing=smoothing, samples=None, lr=lr, chains=8, clip=20.0, generator=seeded(2))
    advanced(stepper, 4000)
    assert float(overlap(stepper.theta, problem.theta_star).median()) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": 3}, "even"), ({"smoothing": -1.0}, "smoothing"), ({"lr": 0.0}, "lr"), ({"clip": 0.0}, "clip")],
)
def test_wrong_smoothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothedSGD(SingleIndex(4, 3, 10), **options)


def test_smoothing_ends_with_its_samples_and_knows_two_dimensions() -> None:
    stepper = SmoothedSGD(SingleIndex(2, 3, 2), samples=None)
    advanced(stepper, 2)
    with pytest.raises(RuntimeError, match="is over"):
        stepper.step()
