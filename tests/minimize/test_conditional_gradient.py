"""GGNC, uCG, steepest descent and S3CG: worked numbers, guarantees, special cases, batches, resume."""

import copy
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import steepest
from steepest.geometry import Euclidean, Max, MaxRow, Product, Spectral
from steepest.minimize import ConditionalGradient, ggnc, s3cg, steepest_descent, ucg

A = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 6)))
BETA, F_STAR = 1.5, 0.3515092247
OPTIONS: dict[str, Any] = {"radius": BETA, "step_size": 0.25, "clip": 4.0}


def distance(x: Tensor) -> Tensor:
    return 0.5 * (x - A).square().sum((-2, -1))


def cosh(x: Tensor) -> Tensor:
    return (2 * x.cosh()).sum(-1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("clip", "step"), [(2, (-0.12, -0.16)), (10, (-0.3, -0.4))])
def test_clipped_gradient_descent(clip: float, step: tuple[float, float]) -> None:
    d = torch.tensor([3.0, 4.0], dtype=torch.float64)
    stepper = ggnc(lambda x: (d * x).sum(), torch.zeros(2, dtype=torch.float64), Euclidean(), step_size=0.1, clip=clip)
    stepper.step()
    assert isinstance(stepper.x, Tensor) and stepper.x.tolist() == pytest.approx(list(step), abs=1e-12)


@pytest.mark.parametrize("norm", [Spectral(), Max(), MaxRow(), Euclidean()])
def test_each_step_is_its_formula(norm: Any) -> None:
    x, g = 0.1 * randn(4, 6), 0.1 * randn(4, 6) - A
    dual, lmo = norm.dual(g), norm.lmo(g)
    for clip in (0.5, 1e3):
        stepper = ggnc(distance, x, norm, step_size=0.1, clip=clip)
        metrics = stepper.step()
        eta = min(clip, float(dual))
        torch.testing.assert_close(stepper.x, x + 0.1 * eta * lmo)
        assert float(metrics["length"]) == pytest.approx(eta) and float(metrics["dual_norm"]) == pytest.approx(dual)
        assert float(metrics["loss"]) == pytest.approx(float(distance(x)))
        # the minimiser of the linear model plus ||.||^2 / (2 gamma) over the ball of radius gamma rho
        if clip == 0.5:
            model = lambda s: float((g * s).sum() + norm.norm(s) ** 2 / 0.2)  # noqa: E731
            best = model(stepper.x - x)
            for seed in range(50):
                other = norm.direction(randn(4, 6, seed=seed))
                assert all(model(t * 0.05 * other) >= best - 1e-12 for t in (0.1, 0.5, 1.0))
    fixed = ucg(distance, x, norm, step_size=0.1)
    fixed.step()
    torch.testing.assert_close(fixed.x, x + 0.1 * lmo)
    sharp = steepest_descent(distance, x, norm, step_size=0.1)
    sharp.step()
    torch.testing.assert_close(sharp.x, x - 0.1 * norm.sharp(g))


def test_numbers_of_the_short_step() -> None:
    u, s, vh = np.linalg.svd(A.numpy(), full_matrices=False)
    assert s == pytest.approx([2.3159, 1.6933, 0.9464, 0.5731], abs=1e-4)
    best = torch.from_numpy((u * np.minimum(s, BETA)) @ vh)
    assert float(distance(best)) == pytest.approx(F_STAR, abs=1e-10)
    for short_step, eta in (("norm", 3.68578), ("ball", 0.92145)):
        stepper = s3cg(distance, torch.zeros_like(A), Spectral(), short_step=short_step, **OPTIONS)  # pyright: ignore[reportArgumentType]
        metrics = stepper.step()
        assert float(metrics["gap"]) == pytest.approx(8.293006584, abs=1e-9)
        assert float(metrics["length"]) == pytest.approx(eta, abs=1e-5)


@pytest.mark.parametrize(("short_step", "excess"), [("norm", 0.005), ("ball", 0.02)])
def test_the_short_step_descends_in_its_ball(short_step: Any, excess: float) -> None:
    stepper = s3cg(distance, torch.zeros_like(A), Spectral(), short_step=short_step, **OPTIONS)
    losses, gaps = [], []
    delta = float(distance(torch.zeros_like(A))) - F_STAR
    for step in range(3000):
        metrics = stepper.step()
        losses.append(float(metrics["loss"]))
        gaps.append(float(metrics["gap"]))
        assert isinstance(stepper.x, Tensor)
        if step % 100 == 0:
            assert float(torch.linalg.matrix_norm(stepper.x, 2)) <= BETA + 1e-9
            n = step + 1
            assert min(gaps) <= 2 * BETA * math.sqrt(delta / (0.25 * n)) + 2 * delta / (0.25 * 4 * n)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses))
    assert min(gaps) >= -1e-12 and losses[-1] - F_STAR <= excess
    assert all(gap >= loss - F_STAR - 1e-9 for gap, loss in zip(gaps, losses, strict=True))  # a certificate


def test_variant_two_is_shorter_for_feasible_points() -> None:
    for seed in range(30):
        x = BETA * Spectral().direction(randn(4, 6, seed=seed)) * (seed / 29)
        lengths = []
        for short_step in ("norm", "ball"):
            stepper = s3cg(
                distance,
                x,
                Spectral(),
                radius=BETA,
                step_size=1e-9,
                clip=1e9,
                short_step=short_step,  # pyright: ignore[reportArgumentType]
            )
            lengths.append(float(stepper.step()["length"]))
        assert lengths[1] <= lengths[0] * (1 + 1e-12)


def test_generalised_smoothness() -> None:
    x0 = torch.linspace(-6, 6, 20, dtype=torch.float64)
    l1, l0 = 1.5, 40 * 1.0757376915
    rho, gamma = l0 / l1, 1 / (2 * l0)
    stepper = ggnc(cosh, x0, Max(), step_size=gamma, clip=rho)
    result = steepest.run(stepper, steps=1500, progress=False)
    losses, duals = result.history["loss"], result.history["dual_norm"]
    assert all(later <= earlier for earlier, later in pairwise(losses))
    delta = losses[0] - 40
    assert min(duals) <= math.sqrt(2 * delta / (gamma * 1500)) + 2 * delta / (gamma * rho * 1500)
    fixed = steepest.run(ucg(cosh, x0, Max(), step_size=gamma * rho), steps=1500, progress=False)
    assert min(fixed.history["dual_norm"]) > 1
    sharp = steepest_descent(cosh, x0, Max(), step_size=gamma)
    with pytest.raises(FloatingPointError, match="NaN or infinity; nothing was changed"):
        for _ in range(50):
            sharp.step()


def test_a_product_has_one_length() -> None:
    norm = Product((Spectral(), Max()), (2.0, 0.5))
    goal, start = (randn(3, 4), randn(2, 2, seed=1)), (randn(3, 4, seed=2), randn(2, 2, seed=3))

    def f(x: tuple[Tensor, ...]) -> Tensor:
        return sum(((a - b).square().sum() for a, b in zip(x, goal, strict=True)), torch.zeros(()))

    g = tuple(2 * (a - b) for a, b in zip(start, goal, strict=True))
    stepper = ggnc(f, start, norm, step_size=0.01, clip=3.0)
    stepper.step()
    for new, old, direction in zip(stepper.x, start, norm.direction(g), strict=True):
        torch.testing.assert_close(new, old - 0.01 * min(3.0, float(norm.dual(g))) * direction)
    inside = s3cg(f, tuple(0.1 * x for x in start), norm, radius=1.0, step_size=0.05, clip=20.0)
    gaps = [float(inside.step()["gap"]) for _ in range(300)]
    assert float(norm.norm(inside.x)) <= 1 + 1e-9 and gaps[-1] < 0.05 * gaps[0]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [ggnc, ucg, steepest_descent, s3cg])
def test_a_batch_is_many_problems(make: Callable[..., ConditionalGradient]) -> None:
    options: dict[str, Any] = {"step_size": 0.002}
    options |= {"clip": 2.0} if make in (ggnc, s3cg) else {}
    options |= {"radius": 3.0} if make is s3cg else {}
    x0 = 0.3 * randn(5, 4)
    goal = randn(5, 4, seed=1)
    f = lambda x, goal=goal: (x - goal).pow(4).sum(-1)  # noqa: E731
    batch = make(f, x0, Max(event_ndim=1), **options)
    singles = [make(lambda x, i=i: f(x, goal[i]), x0[i], Max(), **options) for i in range(5)]
    for _ in range(20):
        metrics = batch.step()
        each = [single.step() for single in singles]
        assert float(metrics["loss"]) == pytest.approx(float(np.mean([float(m["loss"]) for m in each])))
    for index, single in enumerate(singles):
        torch.testing.assert_close(batch.x[index], single.x, rtol=1e-12, atol=1e-12)


def test_zero_gradients_move_nothing() -> None:
    for make in (
        lambda: ggnc(lambda x: 0 * x.sum(), A, Spectral(), step_size=0.1, clip=1.0),
        lambda: ucg(lambda x: 0 * x.sum(), A, Spectral(), step_size=0.1),
        lambda: s3cg(lambda x: 0 * x.sum(), 0.1 * A, Spectral(), radius=1.0, step_size=0.1, clip=1.0),
    ):
        stepper = make()
        before = stepper.x.clone()  # pyright: ignore[reportAttributeAccessIssue]
        stepper.step()
        assert torch.equal(stepper.x, before)  # pyright: ignore[reportArgumentType]


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return 2 * x.sinh() + 0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def stochastic(seed: int = 0) -> ConditionalGradient:
    x0 = torch.linspace(-2, 2, 5, dtype=torch.float64) + 0.3
    return ggnc(
        cosh,
        x0,
        Max(),
        step_size=0.01,
        clip=2.0,
        momentum=0.9,
        gradient=noisy,
        generator=torch.Generator().manual_seed(seed),
    )


def test_the_average_is_the_papers() -> None:
    stepper, generator = stochastic(), torch.Generator().manual_seed(0)
    x, d = torch.linspace(-2, 2, 5, dtype=torch.float64) + 0.3, torch.zeros(5, dtype=torch.float64)
    for _ in range(20):
        stepper.step()
        d = 0.1 * noisy(x, generator) + 0.9 * d
        x = x - 0.01 * min(2.0, float(d.abs().sum())) * d.sign()
    torch.testing.assert_close(stepper.x, x, rtol=0, atol=1e-12)


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = stochastic()
    steepest.run(whole, steps=40, progress=False)
    path = tmp_path / "run.pt"
    steepest.run(stochastic(), steps=25, progress=False, checkpoint=path, checkpoint_every=10)
    second = stochastic(seed=5)
    steepest.run(second, steps=40, progress=False, checkpoint=path, checkpoint_every=10)
    assert torch.equal(second.x, whole.x) and second.steps == 40  # pyright: ignore[reportArgumentType]


def test_a_state_of_another_problem_is_refused() -> None:
    stepper = stochastic()
    stepper.step()
    state = copy.deepcopy(stepper.state_dict())
    for change, match in (
        ({"points": (torch.zeros(3),)}, "points.0. must have the shape"),
        ({"average": None}, "average must have"),
        ({"generator": None}, "generator"),
    ):
        with pytest.raises(ValueError, match=match):
            stepper.load_state_dict({**state, **change})
        assert torch.equal(stepper.x, state["points"][0])  # pyright: ignore[reportArgumentType]


def test_a_start_outside_is_warned_of_and_waits() -> None:
    with pytest.warns(UserWarning, match="10 times the radius"):
        stepper = s3cg(lambda x: -(x * x).sum(), 10 * torch.eye(3), Spectral(), radius=1.0, step_size=0.5, clip=1.0)
    metrics = stepper.step()
    assert float(metrics["length"]) == 0 and float(metrics["gap"]) < 0
    assert torch.equal(stepper.x, 10 * torch.eye(3))  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s3cg(distance, BETA * Spectral().direction(A), Spectral(), **OPTIONS)


def test_the_start_is_not_changed() -> None:
    x0 = A.clone()
    stepper = ucg(distance, x0, Max(), step_size=0.1)
    stepper.step()
    assert torch.equal(x0, A)


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ggnc(cosh, X, Max(), step_size=0.0, clip=1.0), ValueError, "step_size .*positive.*0.0"),
        (lambda: ggnc(cosh, X, Max(), step_size=math.inf, clip=1.0), ValueError, "step_size .*positive.*inf"),
        (lambda: ggnc(cosh, X, Max(), step_size="1", clip=1.0), TypeError, "step_size .*number.*'1'"),  # pyright: ignore
        (lambda: ggnc(cosh, X, Max(), step_size=0.1, clip=0.0), ValueError, "clip .*positive.*0.0"),
        (lambda: ggnc(cosh, X, Max(), step_size=0.1, clip=-1.0), ValueError, "clip .*positive.*-1.0"),
        (lambda: ggnc(cosh, X, Max(), step_size=0.1, clip=1.0, momentum=1.0), ValueError, "momentum .*1.0"),
        (lambda: s3cg(cosh, X, Max(), radius=0.0, step_size=0.1, clip=1.0), ValueError, "radius .*positive"),
        (lambda: s3cg(cosh, X, Max(), radius=1.0, step_size=0.6, clip=2.0), ValueError, "step_size times clip .*1.2"),
        (lambda: s3cg(cosh, X, Max(), radius=1.0, step_size=0.6, clip=1.0, short_step="x"), ValueError, "short_step"),  # pyright: ignore
        (lambda: ggnc(None, X, Max(), step_size=0.1, clip=1.0), ValueError, "f and gradient"),
        (lambda: ggnc(3, X, Max(), step_size=0.1, clip=1.0), TypeError, "f must be a function"),  # pyright: ignore
        (lambda: ggnc(cosh, X, "max", step_size=0.1, clip=1.0), TypeError, "norm must be a Norm"),  # pyright: ignore
        (lambda: ggnc(cosh, (X,), Max(), step_size=0.1, clip=1.0), TypeError, "x0 must be one tensor"),
        (lambda: ggnc(cosh, (X,), Product((Max(), Max())), step_size=0.1, clip=1.0), ValueError, "x0 must hold 2"),
        (lambda: ggnc(cosh, X.long(), Max(), step_size=0.1, clip=1.0), TypeError, "x0 must be of real"),
        (lambda: ggnc(cosh, X / 0, Max(), step_size=0.1, clip=1.0), ValueError, "x0 holds NaN"),
        (
            lambda: ggnc(cosh, X, Max(), step_size=0.1, clip=1.0, generator=torch.Generator()),
            TypeError,
            "generator .*gradient",
        ),
        (
            lambda: ggnc(None, X, Max(), step_size=0.1, clip=1.0, gradient=lambda x: x[:2]).step(),
            ValueError,
            "gradient must have the shape",
        ),
        (lambda: ggnc(lambda x: 1.0, X, Max(), step_size=0.1, clip=1.0).step(), TypeError, "f must return"),  # pyright: ignore
    ],
)
def test_wrong_input_is_named(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_a_gradient_alone_is_enough() -> None:
    stepper = ggnc(None, randn(4), Euclidean(), step_size=0.5, clip=10.0, gradient=lambda x: x)
    result = steepest.run(stepper, steps=40, progress=False)
    assert "loss" not in result.history and result.history["dual_norm"][-1] < 1e-9
