"""What must be true to the last digits."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.curvature import solve
from steepest.geometry.couplings import coupling
from steepest.transport import (
    DenseNewton,
    ReducedHessian,
    Sinkhorn,
    SinkhornNewton,
    SparseHessian,
    dual_gradient,
    dual_value,
    entropic_ot,
    largest_entries,
    sinkhorn_rate,
    sinkhorn_sweep,
    smallest_support,
)
from steepest.transport.newton_system import augmented_direction, newton_direction

DOUBLE = torch.float64
C3 = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]], dtype=DOUBLE)
R3, M3 = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE), torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
METHODS = ("sns", "newton", "sinkhorn")


def random_problem(seed: int, n: int = 12, m: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    C = torch.rand(n, m, generator=g, dtype=DOUBLE)
    r, c = (torch.rand(k, generator=g, dtype=DOUBLE) + 0.1 for k in (n, m))
    return C, r / r.sum(), c / c.sum()


def total_error(P: Tensor, r: Tensor, c: Tensor) -> float:
    return float((P.sum(-1) - r).abs().sum() + (P.sum(-2) - c).abs().sum())


def test_one_sweep_of_the_small_problem() -> None:
    x, y = sinkhorn_sweep(torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), C3, R3, M3, 3.0)
    assert x.tolist() == pytest.approx([0.0860865384, -0.0996319202, -0.2193437056], abs=5e-11)
    assert y.tolist() == pytest.approx([-0.2986068783, -0.0066344432, 0.2986657042], abs=5e-11)
    assert float(dual_value(x, y, C3, R3, M3, 3.0)) == pytest.approx(-0.2764272379, abs=5e-11)
    assert total_error(coupling(C3, x, y, 3.0), R3, M3) == pytest.approx(0.5645871956, abs=5e-11)


@pytest.mark.parametrize("method", METHODS)
def test_the_optimum_of_the_small_problem(method: Any) -> None:
    ot = pytest.importorskip("ot")
    result = entropic_ot(C3, R3, M3, 3.0, method, tol=1e-14)
    plan = [
        [0.1999753637, 0.2857722178, 0.0142524186],
        [0.0000246362, 0.0142031460, 0.2857722178],
        [1.3e-10, 0.0000246362, 0.1999753637],
    ]
    assert torch.allclose(result.plan(), torch.tensor(plan, dtype=DOUBLE), rtol=0, atol=5e-11)
    assert float(result.cost) == pytest.approx(0.6286033827, abs=1e-10)
    assert float(result.value) == pytest.approx(0.1348798077, abs=5e-11)
    peer = ot.sinkhorn(R3.numpy(), M3.numpy(), C3.numpy(), 1 / 3, method="sinkhorn_log", stopThr=1e-15, numItermax=9999)
    assert np.abs(result.plan().numpy() - peer).max() < 1e-14
    primal = result.cost + torch.xlogy(result.plan(), result.plan()).sum() / 3
    assert float(primal) == pytest.approx(float(result.value), abs=1e-13)


def test_a_full_newton_step_without_line_search_overshoots() -> None:
    x, y = sinkhorn_sweep(torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), C3, R3, M3, 3.0)
    P = coupling(C3, x, y, 3.0)
    dx, dy = newton_direction(P[None], (R3 - P.sum(1))[None], (M3 - P.sum(0))[None], 3.0)
    assert total_error(coupling(C3, x + dx[0], y + dy[0], 3.0), R3, M3) == pytest.approx(1054, abs=0.5)
    for stepper in (
        SinkhornNewton(C3, R3, M3, 3.0, n_sinkhorn=1, continuation=False),
        DenseNewton(C3, R3, M3, 3.0, n_sinkhorn=1, continuation=False),
    ):
        stepper.step()
        before = float(stepper.value)
        assert before == pytest.approx(-0.2764272379, abs=5e-11)
        metrics = stepper.step()
        assert metrics["stage"] == 1 and 0 < float(metrics["length"]) < 1
        assert float(stepper.value) > before


def full_hessian(C: Tensor, x: Tensor, y: Tensor, eta: float) -> Tensor:
    P = coupling(C, x, y, eta)
    return eta * torch.cat([torch.cat([P.sum(1).diag(), P], 1), torch.cat([P.T, P.sum(0).diag()], 1)])


def test_the_hessian_is_the_derivative_of_the_gradient() -> None:
    C, r, c = random_problem(0)
    x, y = sinkhorn_sweep(torch.zeros_like(r), torch.zeros_like(c), C, r, c, 7.0)
    z, eps = torch.cat([x, y]), 1e-5
    columns = []
    for e in torch.eye(len(z), dtype=DOUBLE):
        ends = [torch.cat(dual_gradient(*(z + s * eps * e).split([12, 9]), C, r, c, 7.0)) for s in (1, -1)]
        columns.append((ends[1] - ends[0]) / (2 * eps))
    operator = SparseHessian.of_plan(coupling(C, x, y, 7.0), torch.arange(108), 7.0)
    assert (operator.dense() - torch.stack(columns, 1)).abs().max() < 1e-8
    assert torch.allclose(operator.dense(), full_hessian(C, x, y, 7.0), rtol=1e-13)
    w = torch.cat([torch.ones(12, dtype=DOUBLE), -torch.ones(9, dtype=DOUBLE)])
    assert (operator @ w).abs().max() < 1e-15
    assert (operator.T @ w - operator @ w).abs().max() == 0
    z = z.requires_grad_()
    value = dual_value(z[:12], z[12:], C, r, c, 7.0)
    (slope,) = torch.autograd.grad(value, z)
    assert torch.allclose(slope, torch.cat(dual_gradient(x, y, C, r, c, 7.0)), rtol=0, atol=1e-14)


@given(st.integers(0, 10_000), st.integers(0, 108), st.sampled_from([1.0, 30.0, 1000.0]))
@settings(max_examples=40, deadline=None)
def test_kept_entries_leave_the_hessian_positive_semidefinite(seed: int, count: int, eta: float) -> None:
    C, r, c = random_problem(seed)
    P = coupling(C, *sinkhorn_sweep(torch.zeros_like(r), torch.zeros_like(c), C, r, c, eta), eta)
    kept = torch.randperm(108, generator=torch.Generator().manual_seed(seed))[:count]
    operator = SparseHessian.of_plan(P, kept, 1.0)
    assert torch.linalg.eigvalsh(operator.dense()).min() >= -1e-14
    inner = ReducedHessian(operator)
    a, b, kept_plan = P.sum(1), P.sum(0), torch.zeros(108, dtype=DOUBLE)
    kept_plan[kept] = P.reshape(-1)[kept]
    dense = b.diag() - kept_plan.view(12, 9).T @ (kept_plan.view(12, 9) / a[:, None])
    assert torch.allclose(inner.dense(), dense, rtol=1e-12, atol=1e-16)
    assert torch.allclose(inner.diagonal(), dense.diagonal(), rtol=1e-9, atol=1e-16)


def test_all_entries_give_one_zero_eigenvalue_and_the_augmented_potential_none() -> None:
    C, r, c = random_problem(1)
    P = coupling(C, *sinkhorn_sweep(torch.zeros_like(r), torch.zeros_like(c), C, r, c, 5.0), 5.0)
    whole = SparseHessian.of_plan(P, torch.arange(108), 5.0)
    values = torch.linalg.eigvalsh(whole.dense())
    assert abs(values[0]) < 1e-15 and values[1] > 1e-3
    more = SparseHessian(whole.a, whole.b, whole.rows, whole.columns, whole.values, 5.0, augmented=True)
    w = torch.cat([torch.ones(12, dtype=DOUBLE), -torch.ones(9, dtype=DOUBLE)])
    assert torch.allclose(more.dense(), whole.dense() + w[:, None] * w, rtol=1e-13)
    assert torch.allclose(more.diagonal(), more.dense().diagonal())
    assert torch.linalg.eigvalsh(more.dense())[0] > 1e-3
    with pytest.raises(ValueError, match="augmented"):
        ReducedHessian(more)


@given(st.integers(0, 10_000), st.sampled_from([(5, 5), (7, 3), (2, 6), (1, 4)]), st.sampled_from([0.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_newton_directions_solve_their_systems(seed: int, shape: tuple[int, int], shift: float) -> None:
    C, r, c = random_problem(seed, *shape)
    x, y = sinkhorn_sweep(torch.zeros_like(r), torch.zeros_like(c), C, r, c, 5.0)
    P, H = coupling(C, x, y, 5.0), full_hessian(C, x, y, 5.0)
    g = torch.cat([r - P.sum(1), c - P.sum(0)])
    gx, gy = g[None, : shape[0]], g[None, shape[0] :]
    H = H + 5.0 * shift * torch.eye(len(H), dtype=DOUBLE)
    d = torch.cat(newton_direction(P[None], gx, gy, 5.0, torch.tensor([shift], dtype=DOUBLE)), -1)[0]
    assert (H @ d - g).abs().max() < 1e-13
    w = torch.cat([torch.ones(shape[0], dtype=DOUBLE), -torch.ones(shape[1], dtype=DOUBLE)])
    d = torch.cat(augmented_direction(P[None], gx, gy, 5.0, torch.tensor([shift], dtype=DOUBLE)), -1)[0]
    assert ((H + w[:, None] * w) @ d - g).abs().max() < 1e-12


def test_columns_are_exact_and_f_never_falls() -> None:
    C, r, c = random_problem(2, 40, 30)
    for stepper in (
        Sinkhorn(C, r, c, 300.0),
        SinkhornNewton(C, r, c, 300.0, n_sinkhorn=5, continuation=False),
        DenseNewton(C, r, c, 300.0, n_sinkhorn=5, continuation=False),
    ):
        value = -math.inf
        for _ in range(25):
            metrics = stepper.step()
            if metrics["stage"] == 0:
                plan = coupling(C, stepper.x, stepper.y, 300.0)
                assert (plan.sum(0) - c).abs().max() < 1e-15
            assert float(stepper.value) >= value - 1e-15
            value = float(stepper.value)
            assert value == pytest.approx(float(dual_value(stepper.x, stepper.y, C, r, c, 300.0)), abs=1e-14)


def test_a_constant_between_the_potentials_changes_nothing() -> None:
    C, r, c = random_problem(3)
    x, y = sinkhorn_sweep(torch.zeros_like(r), torch.zeros_like(c), C, r, c, 5.0)
    assert torch.allclose(coupling(C, x + 0.25, y - 0.25, 5.0), coupling(C, x, y, 5.0), rtol=1e-13)
    one, other = dual_value(x, y, C, r, c, 5.0), dual_value(x + 0.25, y - 0.25, C, r, c, 5.0)
    assert float(one) == pytest.approx(float(other), abs=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_shifts_and_scales_of_the_costs(method: Any) -> None:
    C, r, c = random_problem(4)
    base = entropic_ot(C, r, c, 20.0, method, tol=1e-13)
    u, v = torch.randn(12, 1, dtype=DOUBLE), torch.randn(9, dtype=DOUBLE)
    moved = entropic_ot(C + u + v, r, c, 20.0, method, tol=1e-13)
    assert torch.allclose(moved.plan(), base.plan(), rtol=0, atol=1e-13)
    shift = moved.potentials[0] - u[:, 0] - base.potentials[0]
    assert torch.allclose(shift, shift[0].expand(12), atol=1e-11)
    assert torch.allclose(moved.potentials[1] - v - base.potentials[1], -shift[0].expand(9), atol=1e-11)
    scaled = entropic_ot(1000 * C, r, c, 0.02, method, tol=1e-13)
    assert torch.allclose(scaled.plan(), base.plan(), rtol=0, atol=1e-13)
    assert torch.allclose(scaled.cost, 1000 * base.cost, rtol=1e-11)
    heavy = entropic_ot(C, 7 * r, 7 * c, 20.0, method, tol=1e-13)
    assert torch.allclose(heavy.plan(), 7 * base.plan(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
def test_one_row_or_one_column(method: Any, shape: tuple[int, int]) -> None:
    C, r, c = random_problem(5, *shape)
    result = entropic_ot(C, r, c, 500.0, method)
    assert result.converged and result.steps <= 8
    assert torch.allclose(result.plan(), r[:, None] * c, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_strong_entropy_gives_the_product_of_the_marginals(method: Any) -> None:
    C, r, c = random_problem(6)
    for eta in (1e-3, 1e-6):
        result = entropic_ot(C, r, c, eta, method)
        assert result.converged
        assert (result.plan() - r[:, None] * c).abs().max() < eta


@pytest.mark.parametrize("method", METHODS)
def test_costs_whose_exponentials_underflow(method: Any) -> None:
    C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE) + 5
    assert float((-1200 * C).exp().max()) == 0
    result = entropic_ot(C, None, None, 1200.0, method)
    assert result.converged
    assert torch.allclose(result.plan(), torch.eye(2, dtype=DOUBLE) / 2, atol=1e-15)
    assert float(result.cost) == pytest.approx(5, abs=1e-11)


def test_keeping_everything_is_dense_newton_and_errors_square() -> None:
    C, r, c = random_problem(7, 20, 15)
    sparse = SinkhornNewton(C, r, c, 60.0, n_sinkhorn=10, keep=20, continuation=False, tol=1e-13)
    dense = DenseNewton(C, r, c, 60.0, n_sinkhorn=10, continuation=False, tol=1e-13)
    dense._wants_sweep = lambda: dense.rung_steps < 10  # type: ignore[method-assign]
    errors = []
    while not dense.converged:
        dense.step()
        errors.append(float(dense.error))
    while not sparse.converged:
        sparse.step()
    assert torch.allclose(
        coupling(C, sparse.x, sparse.y, 60.0), coupling(C, dense.x, dense.y, 60.0), rtol=0, atol=1e-12
    )
    late = [(e, f) for e, f in itertools.pairwise(errors[10:]) if 1e-7 < e < 1e-2]
    assert late and all(f < 300 * e**2 for e, f in late)
    # One step from the same place, the inner system solved exactly.
    x, y = sinkhorn_sweep(torch.zeros_like(r), torch.zeros_like(c), C, r, c, 60.0)
    P = coupling(C, x, y, 60.0)
    gx, gy = r - P.sum(1), c - P.sum(0)
    inner = ReducedHessian(SparseHessian.of_plan(P, largest_entries(P, 300), 60.0))
    found = solve(inner, inner.right_side(gx, gy), tol=1e-14)
    dx, dy = newton_direction(P[None], gx[None], gy[None], 60.0)
    mine = inner.back(gx, found.x) / 60, found.x / 60
    shift = (mine[0] - dx[0]).mean()
    assert torch.allclose(mine[0] - shift, dx[0], rtol=0, atol=1e-10)
    assert torch.allclose(mine[1] + shift, dy[0], rtol=0, atol=1e-10)


@given(st.integers(0, 10_000), st.integers(1, 700), st.sampled_from([(5, 4), (30, 25), (300, 260)]))
@settings(max_examples=30, deadline=None)
def test_largest_entries_are_the_largest(seed: int, count: int, shape: tuple[int, int]) -> None:
    P = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) ** 20
    found = largest_entries(P, count)
    expected = P.flatten().sort(descending=True).values[:count]
    assert torch.equal(P.flatten()[found], expected)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-6, 1e-2, 0.5, 2.0]), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_smallest_support(seed: int, dropped: float, least: int) -> None:
    P = torch.rand(12, 10, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) ** 8
    P /= P.sum()
    found = smallest_support(P, dropped, 50, least)
    flat = P.flatten().sort(descending=True).values
    assert torch.equal(P.flatten()[found], flat[: len(found)])
    needed = next(k for k in range(1, 121) if float(flat[k:].sum()) <= dropped + 1e-15)
    assert len(found) == min(max(needed, least), 50)


def test_the_rate_of_sinkhorn() -> None:
    result = entropic_ot(C3, R3, M3, 3.0, tol=1e-13)
    P = result.plan()
    sigma = torch.linalg.svdvals(P / (P.sum(1).sqrt()[:, None] * P.sum(0).sqrt()))
    found = sinkhorn_rate(P)
    assert sigma[0] == pytest.approx(1, abs=1e-14)
    assert found.rate == pytest.approx(float(sigma[1]) ** 2, abs=1e-12)
    stepper, errors = Sinkhorn(C3, R3, M3, 3.0), []
    for _ in range(120):
        stepper.step()
        errors.append(float(stepper.error))
    assert errors[-1] / errors[-2] == pytest.approx(found.rate, rel=1e-4)
    assert found.rate == pytest.approx(0.89134, abs=1e-5)
    wide = sinkhorn_rate(P[:2])
    assert wide.rate == pytest.approx(sinkhorn_rate(P[:2].T.contiguous()).rate, abs=1e-12)
    assert sinkhorn_rate(P[:1]).sweeps(1e-9) == 1.0
    assert sinkhorn_rate(torch.eye(2, dtype=DOUBLE)).sweeps(0.5) == math.inf
    assert found.sweeps(found.rate) == pytest.approx(1)
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="reduction"):
            found.sweeps(wrong)
    with pytest.raises(ValueError, match="mass"):
        sinkhorn_rate(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="plan"):
        sinkhorn_rate(torch.zeros(2, 2, dtype=torch.int64))
