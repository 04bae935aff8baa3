"""Langevin dynamics on the sphere: single steps, stationary laws, the estimators."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.geometry import sphere
from steepest.inference import (
    DriftError,
    SphericalAscent,
    SphericalLangevin,
    TensorPCA,
    automatic_eps,
    estimate_from_trace,
    overlap,
)
from steepest.loop import Linear

DTYPE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def advanced(stepper: Any, steps: int) -> Any:
    for _ in range(steps):
        stepper.step()
    return stepper


def zero(theta: Tensor) -> Tensor:
    return torch.zeros_like(theta)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("retraction", (0.9768121902, -0.0918203459, 0.1934088137)),
        ("geodesic", (0.9760760062, -0.0932491791, 0.1964184836)),
    ],
)
def test_one_step(kind: Any, known: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    b, xi = torch.tensor([0.2, 0.3, -0.1], dtype=DTYPE), torch.tensor([[0.5, -1.0, 2.0]], dtype=DTYPE)
    start = torch.tensor([[1.0, 0.0, 0.0]], dtype=DTYPE)
    chain = SphericalLangevin(b.expand_as, eps=2.0, h=0.01, start=start, step=kind)
    monkeypatch.setattr(torch, "randn", lambda *args, **options: xi.clone())
    chain.step()
    assert chain.theta[0].tolist() == pytest.approx(known, abs=5e-11)


@pytest.mark.parametrize("kind", ["retraction", "geodesic"])
def test_points_stay_on_the_sphere(kind: Any) -> None:
    v = torch.ones(4, dtype=DTYPE)
    chain = SphericalLangevin(v.expand_as, d=4, chains=3, step=kind, order="first", burn_in=20_000, dtype=DTYPE)
    advanced(chain, 10_000 if kind == "retraction" else 2_000)
    assert float((chain.theta.norm(dim=-1) - 1).abs().max()) < 1e-12


@pytest.mark.parametrize(("d", "eps", "known"), [(20, 1.0, 0.0991058), (10, 4.0, 0.5681954)])
def test_a_constant_drift_gives_von_mises_fisher(d: int, eps: float, known: float) -> None:
    v = sphere.uniform(d, generator=seeded(3), dtype=DTYPE)
    chain = SphericalLangevin(v.expand_as, d=d, eps=eps, h=0.1 / d, chains=500, burn_in=100, order="first", dtype=DTYPE)
    found = advanced(chain, 1100).estimate()
    noise = math.sqrt(4 / ((d - 1) * found.time * 500) / d)
    assert float(found.mean @ v) == pytest.approx(known, abs=4 * noise + 0.01 * known)


@pytest.mark.parametrize(("d", "eps", "known"), [(10, 2.5, 0.2377415), (20, 5.0, 0.1626630)])
def test_a_quadratic_gives_bingham(d: int, eps: float, known: float) -> None:
    def b(theta: Tensor) -> Tensor:
        return torch.cat([2 * theta[..., :1], torch.zeros_like(theta[..., 1:])], dim=-1)

    chain = SphericalLangevin(b, d=d, eps=eps, h=0.05 / d, chains=500, burn_in=300, every=5, dtype=DTYPE)
    moment = advanced(chain, 1300).estimate().moment
    assert float(moment[0, 0]) == pytest.approx(known, rel=0.04)
    assert float(moment.trace()) == pytest.approx(1, abs=1e-9)


def test_brownian_motion_forgets_its_start() -> None:
    d, h, steps = 20, 0.002, 50
    start = sphere.uniform(4000, d, generator=seeded(1), dtype=DTYPE)
    chain = advanced(SphericalLangevin(zero, eps=0.0, h=h, start=start), steps)
    # One step multiplies by E 1 / sqrt(1 + h |P xi|^2).
    product = (1 + h * (d - 1)) ** (-steps / 2)
    found = (chain.theta * start).sum(-1)
    assert float(found.mean()) == pytest.approx(product, abs=0.015)
    assert product == pytest.approx(0.396, abs=0.003) and math.exp(-(d - 1) * h * steps / 2) == pytest.approx(
        0.387, abs=5e-4
    )


def test_without_drift_the_data_do_not_matter() -> None:
    problems = [TensorPCA(8, 3, 50, seeded(seed), dtype=DTYPE) for seed in (0, 1)]
    one, two = (advanced(SphericalLangevin(each, eps=0.0, generator=seeded(5)), 30).estimate() for each in problems)
    assert torch.equal(one.mean, two.mean) and torch.equal(one.moment, two.moment)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [3, 4])
def test_the_sign_of_the_planted_direction(k: int) -> None:
    v = sphere.uniform(6, generator=seeded(2), dtype=DTYPE)
    problems = [TensorPCA(6, k, math.inf, theta_star=s * v, dtype=DTYPE) for s in (1, -1)]
    start = sphere.uniform(16, 6, generator=seeded(4), dtype=DTYPE)
    chains = [
        SphericalLangevin(p, eps=2.0, start=s * start, generator=seeded(7))
        for p, s in zip(problems, (1, -1), strict=True)
    ]
    original = torch.randn
    found = []
    for chain, sign in zip(chains, (1, -1), strict=True):
        torch.randn = lambda *a, sign=sign, **o: sign * original(*a, **o)
        try:
            found.append(advanced(chain, 40).estimate())
        finally:
            torch.randn = original
    if k == 3:
        assert torch.allclose(found[0].first, -found[1].first, atol=1e-12)
    assert torch.allclose(found[0].moment, found[1].moment, atol=1e-12)


def test_the_average_recovers_what_the_iterate_does_not_show() -> None:
    problem = TensorPCA(25, 3, 5 * 625, seeded(1))
    chain = SphericalLangevin(problem, generator=seeded(2))
    result = chain.run(1500, progress=False)
    found = chain.estimate()
    assert result.steps == 1500 and chain.eps == 6.25 and chain.h == pytest.approx(0.1 / 25)
    assert found.order == "first" and found.confident and not found.condensed
    assert float(overlap(found.direction, problem.theta_star)) > 0.8
    assert float(overlap(chain.theta, problem.theta_star).abs().mean()) < 0.35
    assert result.history["signal"][-1] == pytest.approx(float(found.signal), rel=1e-5)
    assert found.time == pytest.approx(1500 * chain.h)
    assert 0 < found.perturbation < 1


def test_an_even_exponent_needs_the_second_moment() -> None:
    problem = TensorPCA(12, 4, 20 * 144, seeded(1))
    found = advanced(SphericalLangevin(problem, chains=128, eps=4.0, h=0.2 / 12, generator=seeded(2)), 800).estimate()
    assert found.order == "second"
    assert float(overlap(found.second, problem.theta_star).abs()) > 0.8
    sketch = SphericalLangevin(problem, chains=128, eps=4.0, h=0.2 / 12, rank=4, order="second", generator=seeded(2))
    low = advanced(sketch, 800).estimate()
    assert low.moment is None and float(overlap(low.second, found.second).abs()) > 0.95


def test_small_eps_is_the_partial_trace() -> None:
    problem = TensorPCA(5, 3, 1, seeded(1), signal=0.0, dtype=DTYPE)
    found = advanced(SphericalLangevin(problem, eps=0.5, chains=2000, burn_in=50, order="first"), 400).estimate()
    assert float(overlap(found.mean, problem.small_eps_average(0.5))) > 0.9


def test_no_signal_is_said() -> None:
    found = advanced(SphericalLangevin(zero, d=10, eps=1.0, chains=64, dtype=DTYPE), 500).estimate()
    assert not found.confident
    assert 0.4 < float(found.signal) < 1.8
    assert float(found.iterate_overlap) == pytest.approx(math.sqrt(2 / (math.pi * 10)), rel=0.4)


def test_a_batch_of_problems() -> None:
    v = sphere.uniform(3, 1, 9, generator=seeded(2), dtype=DTYPE)
    start = sphere.uniform(3, 40, 9, generator=seeded(3), dtype=DTYPE)
    chain = SphericalLangevin(v.expand_as, eps=4.0, start=start)
    found = advanced(chain, 600).estimate()
    assert found.mean.shape == (3, 9) and found.signal.shape == (3,) and found.moment.shape == (3, 9, 9)
    assert float(overlap(found.first, v[:, 0]).min()) > 0.95
    automatic = SphericalLangevin(v.expand_as, eps="auto", start=start)
    assert automatic.eps == pytest.approx(0.15 * 9, rel=0.15)


def test_the_automatic_scale() -> None:
    problem = TensorPCA(10, 3, 100, seeded(), dtype=DTYPE)
    eps = automatic_eps(problem)
    theta = sphere.uniform(5000, 10, generator=seeded(8), dtype=DTYPE)
    steep = sphere.tangent(theta, problem.neg_grad(theta)).norm(dim=-1).median()
    assert eps == pytest.approx(1.5 / float(steep), rel=0.1)
    steeper = automatic_eps(lambda theta: 50 * problem.neg_grad(theta), theta)
    assert steeper == pytest.approx(automatic_eps(problem.neg_grad, theta) / 50, rel=1e-9)
    assert isinstance(SphericalLangevin(problem, eps="auto").eps, float)
    with pytest.raises(ValueError, match="zero"):
        automatic_eps(zero, d=4)
    with pytest.raises(ValueError, match="d must be given"):
        automatic_eps(zero)


def test_eps_may_be_a_schedule() -> None:
    problem = TensorPCA(6, 3, 100, seeded(), dtype=DTYPE)
    one = advanced(SphericalLangevin(problem, eps=Linear(0.0, 0.0, 5)), 10)
    two = advanced(SphericalLangevin(problem, eps=0.0), 10)
    assert torch.equal(one.theta, two.theta)


@pytest.mark.parametrize("lr", [0.5, math.inf])
def test_ascent_finds_a_noise_free_direction(lr: float) -> None:
    problem = TensorPCA(8, 3, math.inf, seeded(), dtype=DTYPE)
    ascent = SphericalAscent(problem, lr=lr, starts=10)
    ascent.run(300, progress=False)
    assert float(overlap(ascent.best(), problem.theta_star)) == pytest.approx(1, abs=1e-6)


def test_the_top_eigenvector_of_a_matrix_problem() -> None:
    problem = TensorPCA(8, 2, 40, seeded(1), dtype=DTYPE)
    power = SphericalAscent(problem, starts=4)
    power.run(500, progress=False)
    # The power iteration finds the eigenvalue that is largest in size.
    values, vectors = torch.linalg.eigh(problem.tensor)
    top = vectors[:, values.abs().argmax()]
    assert float(overlap(power.theta, top).abs().min()) == pytest.approx(1, abs=1e-9)
    assert overlap(estimate_from_trace(problem.partial_trace()), vectors[:, -1]).abs() == pytest.approx(1)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"h": 0.0}, ValueError, "h must"),
    ({"h": -0.1}, ValueError, "h must"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"eps": math.inf}, ValueError, "eps"),
    ({"eps": "large"}, ValueError, "eps"),
    ({"chains": 0}, ValueError, "chains"),
    ({"d": 1}, ValueError, "d must"),
    ({"d": None}, ValueError, "d must be given"),
    ({"order": "third"}, ValueError, "order"),
    ({"step": "euler"}, ValueError, "kind"),
    ({"burn_in": -1}, ValueError, "burn_in"),
    ({"every": 0}, ValueError, "every"),
    ({"start": torch.ones(4)}, ValueError, "start"),
    ({"start": torch.zeros(2, 4)}, ValueError, "not zero"),
    ({"start": torch.ones(2, 5)}, ValueError, "start"),
    ({"start": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "start"),
    ({"generator": 3}, TypeError, "generator"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SphericalLangevin(zero, **{"d": 4, **options})


def test_wrong_problems() -> None:
    with pytest.raises(TypeError, match="neg_grad"):
        SphericalLangevin(3, d=4)
    with pytest.raises(TypeError, match="loss"):
        SphericalAscent(lambda theta: theta, d=4).best()
    with pytest.raises(DriftError, match="zero"):
        SphericalAscent(zero, d=4).step()
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="NaN"):
            SphericalLangevin(lambda theta: theta * math.nan, d=4).step()
        with pytest.raises(error, match="shape"):
            SphericalLangevin(lambda theta: theta[:1], d=4, chains=2).step()
    with pytest.raises(RuntimeError, match="not finite"):
        SphericalLangevin(lambda theta: theta.flip(-1) * 1e38, d=4, eps=100.0).step()


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="biased"):
        SphericalLangevin(zero, d=10, h=0.1)
    for k, order, message in ((4, "first", "sign"), (3, "second", "less signal")):
        with pytest.warns(UserWarning, match=message):
            SphericalLangevin(TensorPCA(5, k, 10, seeded()), order=order)


def test_a_mean_that_vanishes_is_an_error() -> None:
    start = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    chain = SphericalLangevin(zero, eps=0.0, start=start)
    with pytest.raises(RuntimeError, match="no iterate"):
        chain.estimate()
    chain.average.update(start)
    chain.time += 1
    with pytest.raises(RuntimeError, match="the average vanished"):
        _ = chain.estimate().first
    with pytest.raises(RuntimeError, match="not kept"):
        chain = advanced(SphericalLangevin(zero, d=3, order="first"), 1)
        _ = chain.estimate().second
