"""The consensus point, one step with given noise, and what both keep."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steepest.gradient_free import (
    EffectiveSampleSize,
    consensus_point,
    consensus_step,
    effective_sample_size,
    mean_square_factor,
    polarised_consensus,
)
from steepest.gradient_free.swarm_step import apply_root, covariance_factor, standard_normal

X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
E = X.square().sum(-1)
XI = torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.6]], dtype=torch.float64)


def close(found: Tensor, expected: object, tolerance: float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64).to(found), rtol=0, atol=tolerance)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, (0.0, 1.0)),
        (1.0, (0.4458880524, 0.3297345143)),
        (2.0, (0.7599350068, 0.1233002786)),
        (10.0, (0.9999092043, 0.0000453979)),
        (1e6, (1.0, 0.0)),
        (math.inf, (1.0, 0.0)),
    ],
)
def test_the_consensus_point_of_three_points(alpha: float, expected: tuple[float, float]) -> None:
    close(consensus_point(X, E, alpha), expected, 5e-11)


def test_alpha_zero_is_the_mean_and_infinity_the_mean_of_the_best() -> None:
    x, energy = normal(4, 7, 3), torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0, 1.0, 5.0], dtype=torch.float64).expand(4, 7)
    close(consensus_point(x, energy, 0.0), x.mean(-2), 1e-15)
    close(consensus_point(x, energy, math.inf), x[:, [1, 3, 5]].mean(-2), 1e-15)


def test_each_run_has_its_own_alpha() -> None:
    alpha = torch.tensor([0.0, 1.0, 1e6])
    found = consensus_point(X.expand(3, 3, 2), E.expand(3, 3), alpha)
    close(found, torch.stack([consensus_point(X, E, float(each)) for each in alpha]), 1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("alpha", [0.0, 2.0, math.inf])
def test_values_that_are_not_finite_have_no_weight(bad: float, alpha: float) -> None:
    x = torch.cat([X, torch.tensor([[math.inf, math.nan]], dtype=torch.float64)])
    energy = torch.cat([E, torch.tensor([bad], dtype=torch.float64)])
    close(consensus_point(x, energy, alpha), consensus_point(X, E, alpha), 1e-15)


def test_no_finite_value_is_an_error() -> None:
    energy = torch.stack([E, torch.full_like(E, math.nan)])
    with pytest.raises(RuntimeError, match="no finite objective value"):
        consensus_point(X.expand(2, 3, 2), energy, 1.0)


@pytest.mark.parametrize("alpha", [-1.0, math.nan, torch.tensor([1.0, -1.0])])
def test_a_negative_alpha_is_refused(alpha: float | Tensor) -> None:
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        consensus_point(X.expand(2, 3, 2), E.expand(2, 3), alpha)


def test_a_wrong_number_of_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one value for each point: \(3,\).*got \(2,\)"):
        consensus_point(X, E[:2], 1.0)


@given(st.floats(-1e8, 1e8), st.floats(0, 100), st.integers(0, 1000))
def test_a_constant_does_not_matter(shift: float, alpha: float, seed: int) -> None:
    x, energy = normal(6, 2, seed=seed), (1024 * normal(6, seed=seed + 1)).round() / 1024
    shift = round(shift * 1024) / 1024  # so that the sum is exact
    close(consensus_point(x, energy + shift, alpha), consensus_point(x, energy, alpha), 1e-14)


def test_scaling_the_objective_is_dividing_alpha() -> None:
    x, energy = normal(6, 2), normal(6)
    for scale in (1e-200, 1e-3, 7.0, 1e200):
        close(consensus_point(x, scale * energy, 3.0 / scale), consensus_point(x, energy, 3.0), 1e-14)


def test_a_range_beyond_the_largest_number_is_no_problem() -> None:
    energy = torch.tensor([-1.7e308, 1.7e308, 0.0], dtype=torch.float64)
    close(consensus_point(X, energy, 1.0), X[0], 0.0)
    close(consensus_point(X.float(), torch.tensor([3e38, -3e38, 0.0]), 1.0), X[1], 0.0)


def step(x: Tensor, xi: Tensor, alpha: float = 2.0, **options: object) -> Tensor:
    consensus = consensus_point(x, x.square().sum(-1), alpha)[..., None, :]
    given = {"lam": 1.0, "dt": 0.1, "sigma": 0.8, **options}
    return consensus_step(x, consensus, xi, **given)  # type: ignore[arg-type]


def test_one_isotropic_step() -> None:
    expected = [[0.996475804, -0.001324841], [0.127215390, 2.017217590], [-1.072714320, 1.210779410]]
    close(step(X, XI, noise="isotropic"), expected, 6e-9)


def test_one_anisotropic_step() -> None:
    expected = [[0.994213150, 0.018568580], [0.056768500, 2.002238690], [-0.601390370, 1.045403690]]
    close(step(X, XI, noise="anisotropic"), expected, 6e-9)


@pytest.mark.parametrize("noise", ["isotropic", "anisotropic"])
@pytest.mark.parametrize("after", [False, True])
def test_a_step_is_the_published_formula(noise: str, after: bool) -> None:
    x, xi = normal(5, 9, 4), normal(5, 9, 4, seed=1)
    found = step(x, xi, noise=noise, noise_after_drift=after, lam=1.3, dt=0.05, sigma=2.1)
    for run in range(5):
        weights = [math.exp(-2.0 * float(p @ p)) for p in x[run]]
        centre = sum(w * p for w, p in zip(weights, x[run], strict=True)) / sum(weights)
        for i in range(9):
            offset = x[run, i] - centre
            scaled = offset * (1 - 1.3 * 0.05) if after else offset
            size = scaled.square().sum().sqrt() if noise == "isotropic" else scaled
            expected = x[run, i] - 1.3 * 0.05 * offset + 2.1 * math.sqrt(0.05) * size * xi[run, i]
            close(found[run, i], expected, 4e-15)


@pytest.mark.parametrize("noise", ["isotropic", "anisotropic"])
def test_translation_and_permutation_go_through_a_step(noise: str) -> None:
    x, xi, shift = normal(8, 3), normal(8, 3, seed=1), torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    energy, order = x.square().sum(-1), torch.randperm(8, generator=torch.Generator().manual_seed(2))

    def move(points: Tensor, values: Tensor, noise_: Tensor) -> Tensor:
        c = consensus_point(points, values, 2.0)[None]
        return consensus_step(points, c, noise_, lam=1.0, dt=0.1, sigma=0.8, noise=noise)  # type: ignore[arg-type]

    moved = move(x, energy, xi)
    close(move(x + shift, energy, xi), moved + shift, 5e-15)
    close(move(x[order], energy[order], xi[order]), moved[order], 2e-15)


def test_isotropic_noise_turns_with_the_space_and_anisotropic_noise_does_not() -> None:
    x, xi = normal(8, 3), normal(8, 3, seed=1)
    rotation, _ = torch.linalg.qr(normal(3, 3, seed=2))
    for noise, turns in (("isotropic", True), ("anisotropic", False)):
        difference = step(x @ rotation, xi @ rotation, noise=noise) - step(x, xi, noise=noise) @ rotation
        assert (float(difference.abs().max()) < 1e-14) == turns


def test_without_noise_and_weights_the_mean_stays_and_distances_shrink() -> None:
    x = normal(6, 3)
    moved = step(x, torch.zeros_like(x), alpha=0.0, sigma=0.0, dt=0.3)
    close(moved.mean(0), x.mean(0), 1e-15)
    close(torch.pdist(moved), 0.7 * torch.pdist(x), 1e-14)
    collapsed = step(x, torch.zeros_like(x), alpha=3.0, sigma=0.0, dt=1.0)
    close(collapsed, consensus_point(x, x.square().sum(-1), 3.0).expand(6, 3), 1e-15)


@pytest.mark.parametrize("noise", ["isotropic", "anisotropic", "covariance"])
def test_a_collapsed_swarm_stays(noise: str) -> None:
    x = normal(1, 3).expand(5, 3)
    weights = torch.full((1, 5), 0.2, dtype=torch.float64)
    c = consensus_point(x, torch.zeros(5, dtype=torch.float64), 2.0)[None]
    factor = covariance_factor(x, weights, c)
    moved = consensus_step(
        x, c, normal(5, 3, seed=1), lam=1.0, dt=0.1, sigma=0.8, noise=noise, factor=factor  # type: ignore[arg-type]
    )  # fmt: skip
    close(moved, x, 2e-15)


@pytest.mark.parametrize(("noise", "expected"), [("isotropic", 1.06), ("anisotropic", 0.835)])
@pytest.mark.parametrize("after", [False, True])
def test_the_mean_square_factor(noise: str, expected: float, after: bool) -> None:
    factor = mean_square_factor(1.0, 0.1, 0.5, 10, noise, after)  # type: ignore[arg-type]
    assert factor == pytest.approx(0.81 + (expected - 0.81) * (0.81 if after else 1.0), abs=1e-15)
    x = normal(1, 10).expand(200_000, 10)
    xi = normal(200_000, 10, seed=1)
    moved = consensus_step(
        x, torch.zeros(1, 10, dtype=torch.float64), xi, lam=1.0, dt=0.1, sigma=0.5, noise=noise, noise_after_drift=after  # type: ignore[arg-type]
    )  # fmt: skip
    assert float(moved.square().sum(-1).mean() / x[0].square().sum()) == pytest.approx(factor, rel=5e-3)
    with pytest.raises(ValueError, match="isotropic"):
        mean_square_factor(1.0, 0.1, 0.5, 10, "constant")


@pytest.mark.parametrize("n", [3, 12])
def test_the_root_of_the_covariance(n: int) -> None:
    y, weights = normal(2, n, 5), normal(2, 1, n, seed=1).softmax(-1)
    centre = weights @ y
    covariance = torch.einsum("rn,rnd,rne->rde", weights[:, 0], y - centre, y - centre)
    factor = covariance_factor(y, weights, centre)
    close(factor[:, 0].mT @ factor[:, 0], covariance, 1e-14)
    root = apply_root(factor, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    close(root, root.mT, 1e-14)
    close(root @ root, covariance, 1e-13)


def test_far_particles_do_not_see_each_other() -> None:
    y = torch.tensor([[0.0], [0.1], [10.0], [10.1], [50.0]], dtype=torch.float64)
    energy = torch.tensor([1.0, 0.0, 5.0, 6.0, 0.0], dtype=torch.float64)
    for kernel in ("gaussian", "ball"):
        c, weights = polarised_consensus(y, y, energy, 50.0, 0.2, kernel)  # type: ignore[arg-type]
        close(c[:, 0], [0.1, 0.1, 10.0, 10.0, 50.0], 1e-6)
        close(weights.sum(-1), torch.ones(5), 1e-12)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "ball", "inverse_quadratic"])
def test_an_infinite_kernel_is_plain_consensus(kernel: str) -> None:
    x, energy = normal(3, 6, 2), normal(3, 6, seed=1)
    c, _ = polarised_consensus(x, x, energy, 2.0, math.inf, kernel)  # type: ignore[arg-type]
    close(c, consensus_point(x, energy, 2.0)[:, None].expand(3, 6, 2), 1e-14)


def test_a_polarised_consensus_is_the_published_formula() -> None:
    x, y, energy = normal(4, 2), normal(6, 2, seed=1), normal(6, seed=2)
    energy[2], y[2] = math.nan, math.inf
    kernels = {
        "gaussian": lambda r: math.exp(-0.5 * r * r),
        "laplace": lambda r: math.exp(-r),
        "ball": lambda r: float(r <= 1),
        "inverse_quadratic": lambda r: 1 / (1 + r * r),
    }
    for name, k in kernels.items():
        c, _ = polarised_consensus(x, y, energy, 1.5, 0.9, name)  # type: ignore[arg-type]
        for i in range(4):
            w = [0.0 if j == 2 else k(math.dist(x[i], y[j]) / 0.9) * math.exp(-1.5 * energy[j]) for j in range(6)]
            mean = sum(w[j] * y[j] for j in range(6) if j != 2)
            close(c[i], mean / sum(w) if sum(w) else x[i], 1e-14)
    with pytest.raises(ValueError, match="kernel must be"):
        polarised_consensus(x, y, energy, 1.5, 0.9, "cosine")  # type: ignore[arg-type]


@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.floats(-30, 30))
def test_the_effective_sample_size_is_reached(seed: int, share: float, log_scale: float) -> None:
    energy = math.exp(log_scale) * normal(3, 40, seed=seed)
    alpha = EffectiveSampleSize(share, max_alpha=1e30)(energy)
    close(effective_sample_size(energy, alpha), [40 * share] * 3, 1e-6)


def test_ties_take_the_largest_alpha_and_infinite_values_do_not_count() -> None:
    energy = torch.tensor([[1.0] * 4, [0.0, 0.0, 0.0, 5.0], [0.0, 1.0, math.nan, math.inf]], dtype=torch.float64)
    alpha = EffectiveSampleSize(0.7, max_alpha=1e4)(energy)
    close(alpha[:2], [1e4, 1e4], 1e-6)
    assert float(effective_sample_size(energy, alpha)[2]) == pytest.approx(1.4, abs=1e-6)
    alpha = EffectiveSampleSize(0.1, max_alpha=1e4)(energy[2:])  # below one point: the best has all
    assert float(effective_sample_size(energy[2:], alpha)) == pytest.approx(1.0, abs=1e-6)
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="share"):
            EffectiveSampleSize(share)
    with pytest.raises(ValueError, match="max_alpha"):
        EffectiveSampleSize(0.5, math.inf)


def test_both_precisions_follow_the_same_noise() -> None:
    shape = torch.empty(50, 40)
    single = standard_normal(shape, torch.Generator().manual_seed(0))
    double = standard_normal(shape.double(), torch.Generator().manual_seed(0))
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    close(double, single.double(), 0.0)
    assert abs(float(double.mean())) < 0.05
    assert abs(float(double.var()) - 1) < 0.1
