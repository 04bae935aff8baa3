import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.dynamics import (
    descent_modes,
    descent_probability,
    expected_descent,
    variational_factor,
    vgd_threshold,
)

Q = torch.diag(torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64))
M = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("z", "lr", "factor", "threshold"),
    [
        (1e4, 0.05, 0.8879736440, 35.5189457588),
        (100.0, 0.1, 0.5, 10.0),
        (1.0, 0.1, 0.1295852062, 2.5917041242),
        (1.0, 1.0, 0.5, 1.0),
        (1e-3, 0.02, 0.0046344074, 0.4634407390),
        (1e6, 0.1, 0.9996004792, None),
    ],
)
def test_values(z: float, lr: float, factor: float, threshold: float | None) -> None:
    assert variational_factor(z, lr) == pytest.approx(factor, abs=5e-11)
    if threshold is not None:
        assert vgd_threshold(lr, z, 1.0) == pytest.approx(threshold, abs=5e-11)
        assert vgd_threshold(lr, z / 6, 0.5, 3) == pytest.approx(threshold, abs=5e-11)


def test_limits() -> None:
    assert variational_factor(1e-9, 0.1) == pytest.approx(1.357147407727725e-4, rel=1e-14)
    assert variational_factor(1e-12, 0.1) == pytest.approx((1e-12 * 0.01 / 4) ** (1 / 3), rel=1e-5)
    assert 1 - variational_factor(1e6, 0.1) == pytest.approx(4e-4, rel=2e-3)
    assert variational_factor(0.0, 0.1) == 0.0
    assert variational_factor(math.inf, 0.1) == 1.0
    assert vgd_threshold(0.1, 0.0, 0.0) == 20.0
    assert vgd_threshold(0.1, 3.0, 0.0) == 20.0
    assert vgd_threshold(0.1, 0.0, 1.0) == 0.0
    assert vgd_threshold(0.1, 1.0, math.inf) == 0.0
    assert variational_factor(-0.0, 0.1) == 0.0


@given(log_z=st.floats(-300, 300), log_lr=st.floats(-6, 3))
@settings(max_examples=300, deadline=None)
def test_it_is_the_root_of_the_cubic_everywhere(log_z: float, log_lr: float) -> None:
    z, lr = 10.0**log_z, 10.0**log_lr
    with mpmath.workdps(60):
        p, rho = mpmath.mpf(z), mpmath.mpf(lr)
        wanted = rho * mpmath.sqrt(p / 3) * mpmath.sinh(mpmath.asinh(3 / rho * mpmath.sqrt(3 / p)) / 3)
        root = 2 * wanted / rho
        assert abs(root**3 + p * root - 2 * p / rho) <= mpmath.mpf(10) ** -45 * 2 * p / rho
        found = variational_factor(z, lr)
        assert abs(found / wanted - 1) < 1e-12
    assert 0 < found <= 1


def test_it_is_exact_on_the_grid_of_the_claim() -> None:
    grid = torch.logspace(-12, 12, 2001, dtype=torch.float64)
    found = variational_factor(grid / 0.03**2, 0.03)
    assert bool((found.diff() > 0).all())
    # y = VF solves y^3 + s y / 4 - s / 4 = 0 with s = z rho^2
    residual = found**3 + grid / 4 * (found - 1)
    slope = 3 * found**2 + grid / 4
    assert float((residual / slope / found).abs().max()) < 1e-12


def test_tensors_broadcast_and_keep_their_type() -> None:
    z = torch.tensor([[0.0], [1.0], [math.inf]])
    lr = torch.tensor([0.1, 1.0])
    found = variational_factor(z, lr)
    assert found.shape == (3, 2)
    assert found.dtype == torch.float32
    assert found[1, 1].item() == pytest.approx(0.5)
    assert variational_factor(torch.tensor(1), 1.0).item() == pytest.approx(0.5)
    assert isinstance(variational_factor(1, 1), float)


@pytest.mark.parametrize("z", [-1.0, math.nan, torch.tensor([1.0, -2.0])])
def test_wrong_z_is_named(z: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"z must be at least 0, got (-1|nan|-2)"):
        variational_factor(z, 0.1)


def test_other_wrong_arguments_are_named() -> None:
    for lr in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lr must be positive"):
            variational_factor(1.0, lr)
    with pytest.raises(ValueError, match=r"variance must be at least 0, got -0\.5"):
        vgd_threshold(0.1, 1.0, -0.5)
    with pytest.raises(ValueError, match=r"projection must be at least 0, got -1"):
        vgd_threshold(0.1, -1.0, 0.5)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        vgd_threshold(0.1, 1.0, 0.5, 0)
    with pytest.raises(TypeError, match="z must be"):
        variational_factor("1", 0.1)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="complex"):
        variational_factor(torch.tensor(1j), 0.1)
    with pytest.raises(ValueError, match="hessian must be symmetric"):
        expected_descent(torch.triu(torch.ones(2, 2)), torch.ones(2), 0.1, 1.0)
    with pytest.raises(ValueError, match=r"hessian must be .*\(3, 3\) and \(2,\)"):
        expected_descent(torch.eye(3), torch.ones(2), 0.1, 1.0)
    with pytest.raises(ValueError, match=r"covariance .*\(5,\)"):
        expected_descent(torch.eye(3), torch.ones(3), 0.1, torch.ones(5))
    with pytest.raises(ValueError, match="covariance must not be negative, got -1"):
        expected_descent(torch.eye(3), torch.ones(3), 0.1, -1.0)
    with pytest.raises(ValueError, match="draws"):
        descent_probability(torch.eye(3), torch.ones(3), 0.1, 1.0, draws=0)


def test_the_worked_quadratic() -> None:
    assert float(expected_descent(Q, M, 0.4, 0.05, 2)) == pytest.approx(-2.667824, abs=5e-10)
    modes = descent_modes(Q, M, 0.4, 0.05, 2)
    assert modes.eigenvalues.tolist() == pytest.approx([3.0, 1.0, 0.2])
    assert modes.changes.tolist() == pytest.approx([-1.386, -1.278, -0.003824], abs=5e-10)
    assert modes.thresholds.tolist() == pytest.approx([4.7097958, 4.4494479, 1.1543639], abs=5e-8)
    assert bool((modes.thresholds > modes.eigenvalues).all())


def test_modes_sum_up_for_any_covariance_and_their_signs_are_those_of_the_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        a, b = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
        hessian, covariance = a @ a.T + 0.01 * torch.eye(5), b @ b.T / 5
        mean = torch.randn(5, generator=generator, dtype=torch.float64)
        lr, samples = 0.05 + 0.05 * seed, 1 + seed % 3
        modes = descent_modes(hessian, mean, lr, covariance, samples)
        total = expected_descent(hessian, mean, lr, covariance, samples)
        torch.testing.assert_close(modes.changes.sum(), total)
        assert torch.equal(modes.changes < 0, modes.eigenvalues < modes.thresholds)
    diagonal = torch.rand(5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        expected_descent(hessian, mean, 0.1, diagonal), expected_descent(hessian, mean, 0.1, torch.diag(diagonal))
    )
    stacked = torch.stack([hessian, 2 * hessian]), torch.stack([mean, -mean])
    both = expected_descent(*stacked, 0.1, 0.3)
    torch.testing.assert_close(both[1], expected_descent(2 * hessian, -mean, 0.1, 0.3))
    assert descent_modes(*stacked, 0.1, 0.3).changes.shape == (2, 5)


def test_the_identity_is_what_steps_do() -> None:
    """Monte Carlo of one step, within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 2, 3, generator=generator, dtype=torch.float64) * 0.05**0.5
    after = M - 0.4 * ((M + noise) @ Q).mean(1)
    change = 0.5 * ((after @ Q) * after).sum(-1) - 0.5 * M @ Q @ M
    error = float(change.std()) / len(change) ** 0.5
    assert float(change.mean()) == pytest.approx(-2.667824, abs=4 * error)


def test_more_samples_make_descent_more_certain() -> None:
    lr, m = 0.62, torch.tensor([0.6, 0.1, 0.1], dtype=torch.float64)
    found = [descent_probability(Q, m, lr, 0.05, samples, draws=20_000) for samples in (1, 4, 16)]
    assert float(expected_descent(Q, m, lr, 0.05, 4)) < 0
    assert found[0].value < found[1].value < found[2].value
    assert all(0 < p.standard_error < 0.005 for p in found)
    assert descent_probability(Q, m, 0.1, 0.0).value == 1.0
    assert descent_probability(Q, m, 0.7, 0.0).value == 0.0
    # one coordinate, curvature 1, lr 1/2, noise of deviation 1/2: the loss falls for -1 < noise < 3
    one, at = torch.eye(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    exact = 0.5 * (math.erf(3 / 0.5 / 2**0.5) - math.erf(-1 / 0.5 / 2**0.5))
    found_one = descent_probability(one, at, 0.5, 0.25, draws=100_000)
    assert found_one.value == pytest.approx(exact, abs=5 * found_one.standard_error)
