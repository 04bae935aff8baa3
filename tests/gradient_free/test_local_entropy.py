"""Consensus hopping with infinitely many draws, against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from steepest.gradient_free import (
    ConsensusHopping,
    gaussian_grid,
    hopping_limit,
    local_entropy,
    posterior_mean,
    proximal_point,
)

DOUBLE = torch.float64
M = torch.tensor([1.3], dtype=DOUBLE)


def waves(x: Tensor) -> Tensor:
    return (x.square() / 2 + 1.5 * (1 - torch.cos(2 * math.pi * x))).sum(-1)


def slope(x: Tensor) -> Tensor:
    return x + 3 * math.pi * torch.sin(2 * math.pi * x)


def test_a_hop_is_a_gradient_step_on_the_local_entropy() -> None:
    nodes, alpha, s = gaussian_grid(), 3.0, 0.4
    hop = hopping_limit(waves, M, alpha, s, nodes)
    gradient = posterior_mean(slope, waves, M, alpha, s, nodes)
    h = 1e-4
    values = local_entropy(waves, torch.tensor([[1.3 + h], [1.3 - h], [1.3]], dtype=DOUBLE), alpha, s, nodes)
    numerical = float(values[0] - values[1]) / (2 * h)
    assert float(hop) == pytest.approx(0.963800906, abs=6e-10)
    assert float(gradient) == pytest.approx(0.700414780, abs=6e-10)
    assert float(values[2]) == pytest.approx(1.135855089, abs=6e-10)
    assert numerical == pytest.approx(0.700414783, abs=5e-8)
    assert float(hop) == pytest.approx(1.3 - alpha * s**2 * float(gradient), abs=1e-12)


A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)


def bowl(x: Tensor) -> Tensor:
    return 0.5 * ((x @ A) * x).sum(-1)


def test_on_a_quadratic_a_hop_is_the_proximal_step() -> None:
    m, alpha, s = torch.tensor([1.0, -2.0], dtype=DOUBLE), 5.0, 0.3
    exact = torch.linalg.solve(torch.eye(2, dtype=DOUBLE) + alpha * s**2 * A, m)
    torch.testing.assert_close(exact, torch.tensor([0.7025652877, -1.4883290964], dtype=DOUBLE), rtol=0, atol=6e-11)
    z = torch.randn(4_000_000, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    sampled = hopping_limit(bowl, m, alpha, s, (z, torch.zeros(len(z), dtype=DOUBLE)))
    torch.testing.assert_close(sampled, exact, rtol=0, atol=4e-3)  # four standard errors
    generator = torch.Generator().manual_seed(1)
    hopping = ConsensusHopping(bowl, m, particles=1_000_000, alpha=alpha, width=s, generator=generator)
    hopping.step()
    torch.testing.assert_close(hopping.x, exact, rtol=0, atol=8e-3)
    grid, logs = gaussian_grid(801, 8.0)
    plane = torch.cartesian_prod(grid[:, 0], grid[:, 0]), (logs[:, None] + logs).reshape(-1)
    torch.testing.assert_close(hopping_limit(bowl, m, alpha, s, plane), exact, rtol=0, atol=1e-12)


def test_hops_approach_the_proximal_point_and_it_approaches_gradient_descent() -> None:
    tau, gaps = 0.05, []
    prox = proximal_point(waves, M, tau)
    # E' + (x - m) / tau = 0
    assert float(slope(prox) + (prox - M) / tau) == pytest.approx(0.0, abs=1e-5)
    for alpha in (1e2, 1e3, 1e4):
        hop = hopping_limit(waves, M, alpha, math.sqrt(tau / alpha), gaussian_grid(100_001, 200.0))
        gaps.append(abs(float(hop - prox)))
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.15)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.15)


def test_the_proximal_point_of_closed_forms() -> None:
    m = torch.tensor([[-3.0], [0.02], [0.3], [2.0]], dtype=DOUBLE)
    soft = torch.sign(m) * (m.abs() - 0.05).clamp_min(0)
    torch.testing.assert_close(proximal_point(lambda x: x.abs().sum(-1), m, 0.05), soft, rtol=0, atol=1e-7)
    jump = proximal_point(lambda x: (x[..., 0] > 0).to(x), m, 0.05, radius=4.0)  # worth a move of up to sqrt(2 tau)
    torch.testing.assert_close(jump, torch.tensor([[-3.0], [0.0], [0.0], [2.0]], dtype=DOUBLE), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="tau and radius positive"):
        proximal_point(waves, M, 0.0)


def test_small_alpha_is_evolution_strategies() -> None:
    nodes, s = gaussian_grid(), 0.4
    z, weights = nodes[0][:, 0], nodes[1].exp()
    values = waves((1.3 + s * z)[:, None])
    covariance = (weights * s * z * (values - (weights * values).sum())).sum()
    hop = hopping_limit(waves, M, 1e-6, s, nodes)
    assert float(M - hop) / 1e-6 == pytest.approx(float(covariance), rel=1e-5)
    mean = local_entropy(waves, M, 0.0, s, nodes)
    assert float(mean) == pytest.approx(float((weights * values).sum()), rel=1e-14)
    assert float(local_entropy(waves, M, 1e-7, s, nodes)) == pytest.approx(float(mean), rel=1e-5)


def test_the_grid_integrates_moments() -> None:
    z, logs = gaussian_grid(2001)
    moments = [float((logs.exp() * z[:, 0] ** k).sum()) for k in (0, 1, 2, 4)]
    assert moments == pytest.approx([1, 0, 1, 3], abs=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="nodes"):
        local_entropy(bowl, torch.zeros(2, dtype=DOUBLE), 1.0, 0.1, gaussian_grid(11))
    with pytest.raises(ValueError, match="width positive"):
        local_entropy(waves, M, 1.0, 0.0, gaussian_grid(11))
    with pytest.raises(ValueError, match="points"):
        gaussian_grid(1)
