"""One-sided transport: softmax at one end, Sinkhorn at the other."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.gradient_free import Greedy, PolyStepSearch, SemiRelaxed, Softmax, Tempered, TopK, one_sided_ot
from steepest.gradient_free.one_sided_ot import make_solver

LAMBDAS = (0.0, 0.01, 0.1, 1.0, math.inf)


def costs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def violation(plan: torch.Tensor) -> float:
    return float((plan.sum(-2) - 1 / plan.shape[-1]).abs().max())


def test_from_softmax_to_sinkhorn() -> None:
    c = costs(5, 4)
    plans = [one_sided_ot(c, 0.2, lam) for lam in LAMBDAS]
    torch.testing.assert_close(plans[0], torch.softmax(-c / 0.2, -1) / 5, atol=1e-15, rtol=0)
    violations = [violation(plan) for plan in plans]
    assert violations == sorted(violations, reverse=True) and violations[-1] < 1e-10
    for plan in plans:
        torch.testing.assert_close(plan.sum(-1), torch.full((5,), 0.2, dtype=torch.float64), atol=1e-16, rtol=0)


def numpy_objective(plan: np.ndarray, c: np.ndarray, eps: float, lam: float, b: np.ndarray) -> float:
    q = plan.sum(0)
    return float((plan * c).sum() + eps * (plan * (np.log(plan) - 1)).sum() + lam * (q * np.log(q / b) - q + b).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 5), st.floats(0.05, 3), st.floats(0.01, 5), st.integers(0, 1000))
def test_it_minimises_its_objective(n: int, m: int, eps: float, lam: float, seed: int) -> None:
    c, b = costs(n, m, seed=seed), costs(m, seed=seed + 1) + 0.1
    plan = one_sided_ot(c, eps, lam, b=b / b.sum())
    best = numpy_objective(plan.numpy(), c.numpy(), eps, lam, (b / b.sum()).numpy())
    rng = np.random.default_rng(seed)
    for _ in range(10):  # moves that keep the rows
        step = rng.standard_normal((n, m)) * plan.numpy()
        step -= step.sum(1, keepdims=True) * plan.numpy() * n
        other = np.maximum(plan.numpy() + 1e-3 * step, 1e-300)
        other *= (1 / n) / other.sum(1, keepdims=True)
        assert numpy_objective(other, c.numpy(), eps, lam, (b / b.sum()).numpy()) >= best - 1e-12


def test_over_relaxation_ends_at_the_same_plan() -> None:
    c = 4 * costs(6, 3, seed=2)
    for lam in (1.0, math.inf):
        plain, relaxed = one_sided_ot(c, 0.5, lam), one_sided_ot(c, 0.5, lam, relaxation=1.4)
        torch.testing.assert_close(relaxed, plain, atol=1e-9, rtol=0)


def test_batches_marginals_and_forbidden_pairs() -> None:
    c = costs(3, 5, 4)
    a = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1], dtype=torch.float64)
    c[..., 0, 0] = math.inf
    plan = one_sided_ot(c, 0.3, 0.5, a=a)
    torch.testing.assert_close(plan[1], one_sided_ot(c[1], 0.3, 0.5, a=a), atol=1e-11, rtol=0)
    torch.testing.assert_close(plan.sum(-1), a.expand(3, 5), atol=1e-15, rtol=0)
    assert not plan[:, 0, 0].any()
    huge = one_sided_ot(1e30 * costs(4, 3).float(), 1e-3)
    assert bool(huge.isfinite().all()) and float(huge.max()) == 0.25


@pytest.mark.parametrize(("change", "error"), [
    ({"epsilon": 0.0}, "epsilon must be positive"), ({"epsilon": math.nan}, "epsilon must be positive"),
    ({"lam": -1.0}, "lam must be at least 0"), ({"lam": math.nan}, "lam must be at least 0"),
    ({"cost": torch.tensor([[math.nan, 0.0]])}, "no NaN"), ({"cost": torch.tensor([[-math.inf, 0.0]])}, "no NaN"),
    ({"cost": torch.tensor([[math.inf, math.inf]])}, "all infinite"), ({"cost": torch.zeros(3)}, "shape"),
    ({"cost": torch.zeros(0, 3)}, "shape"), ({"relaxation": 2.0}, "relaxation"),
    ({"b": torch.tensor([0.5, 0.0])}, "b must be 2 positive numbers"), ({"a": torch.ones(2)}, "a must be 1 positive"),
    ({"b": torch.tensor([0.9, 0.9]), "lam": math.inf}, "same sum"),
])  # fmt: skip
def test_bad_input(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        one_sided_ot(**{"cost": torch.zeros(1, 2), "epsilon": 1.0, **change})


def test_too_few_iterations_warn() -> None:
    with pytest.warns(UserWarning, match="stopped after 1 iterations"):
        one_sided_ot(costs(4, 4), 0.01, math.inf, max_iterations=1)


def test_solvers() -> None:
    c = torch.tensor([[0.0, 1.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [5.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
    assert Greedy().weights(c, 1.0).tolist() == [[0.5, 0, 0, 0.5], [0.25] * 4, [0, 1, 0, 0]]
    assert TopK(2).weights(c, 1.0).tolist() == [[0.5, 0, 0, 0.5], [0.25] * 4, [0, 0.5, 0, 0.5]]
    assert TopK(9).weights(c, 1.0).tolist() == [[0.25] * 4] * 3
    torch.testing.assert_close(Tempered(0.5).weights(c, 7.0), Softmax().weights(c, 0.5))
    torch.testing.assert_close(Softmax().weights(c, 2.0), torch.softmax(-c / 2, -1))
    for solver in (SemiRelaxed(0.3), SemiRelaxed(math.inf)):
        first = solver.weights(c, 0.5)
        torch.testing.assert_close(first, 3 * one_sided_ot(c, 0.5, solver.lam), atol=1e-7, rtol=0)
        torch.testing.assert_close(solver.weights(c, 0.5), first, atol=1e-7, rtol=0)  # from the potentials kept
        assert solver.weights(c[:, :3], 0.5).shape == (3, 3)  # another problem starts cold


@pytest.mark.parametrize("make", [
    lambda: TopK(0), lambda: Tempered(0.0), lambda: SemiRelaxed(0.0), lambda: SemiRelaxed(-1.0),
    lambda: SemiRelaxed(1.0, relaxation=0.5), lambda: make_solver("best"), lambda: make_solver(Softmax),  # pyright: ignore
    lambda: make_solver(3),  # pyright: ignore
])  # fmt: skip
def test_bad_solvers(make: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_sinkhorn_needs_several_particles() -> None:
    with pytest.raises(ValueError, match="one particle"):
        SemiRelaxed(math.inf).weights(costs(1, 4), 1.0)
    with pytest.raises(ValueError, match="one particle"):
        PolyStepSearch(None, torch.zeros(3), solver="sinkhorn")
    PolyStepSearch(None, torch.zeros(3), particle_dim=2, solver="sinkhorn")
