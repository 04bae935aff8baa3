import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.geometry.bures import (
    bures_distance,
    bures_step,
    isotropic_bures_step,
    wasserstein_gaussian,
    wasserstein_isotropic,
)

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def covariances(*shape: int, seed: int = 0) -> torch.Tensor:
    a = randn(*shape, shape[-1] + 2, seed=seed)
    return a @ a.mT


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(values.clamp_min(0).sqrt()) @ vectors.mT


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(1, 5))
def test_the_distance_is_the_formula(seed: int, d: int) -> None:
    a, b = covariances(3, d, seed=seed), covariances(3, d, seed=seed + 1)
    middle = root(root(a) @ b @ root(a))
    squared = (a + b - 2 * middle).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(bures_distance(a, b).square(), squared, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(bures_distance(b, a), bures_distance(a, b))


def test_the_distance_of_close_matrices_keeps_its_digits() -> None:
    a = torch.diag(torch.tensor([1.0, 4.0], dtype=F64))
    b = torch.diag(torch.tensor([1.0 + 1e-10, 4.0], dtype=F64))
    assert float(bures_distance(a, b)) == pytest.approx(0.5e-10, rel=1e-4)
    assert float(bures_distance(a, a)) < 1e-15


def test_singular_matrices_have_a_distance() -> None:
    a, b = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    assert float(bures_distance(a, b)) == pytest.approx(2**0.5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(1, 5))
def test_isotropic_distances_are_those_of_gaussians(seed: int, d: int) -> None:
    m, n = randn(2, d, seed=seed), randn(2, d, seed=seed + 1)
    s, t = randn(2, seed=seed).exp(), randn(2, seed=seed + 2).exp()
    eye = torch.eye(d, dtype=F64)
    full = wasserstein_gaussian(m, s[:, None, None] * eye, n, t[:, None, None] * eye)
    torch.testing.assert_close(wasserstein_isotropic(m, s, n, t), full)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(1, 4))
def test_a_step_travels_a_geodesic(seed: int, d: int) -> None:
    sigma, h = covariances(d, seed=seed), randn(d, d, seed=seed + 1)
    h = 0.4 * (h + h.mT) / torch.linalg.matrix_norm(h + h.mT, 2)
    length = (h @ sigma @ h).trace().sqrt()
    for share in (0.5, 1.0):
        assert float(bures_distance(sigma, bures_step(sigma, share * h))) == pytest.approx(float(share * length))


def test_the_implicit_step_minimises_its_objective() -> None:
    sigma, gradient, lr = covariances(3, seed=1), covariances(3, seed=2) / 10, 0.1

    def objective(s: torch.Tensor) -> float:
        return float((gradient * s).sum() + bures_distance(s, sigma).square() / (2 * lr))

    best = bures_step(sigma, 2 * lr * gradient, implicit=True)
    for seed in range(20):
        change = randn(3, 3, seed=seed)
        assert objective(best) < objective(best + 1e-3 * (change + change.mT))


def test_both_steps_agree_to_first_order_and_with_the_isotropic_ones() -> None:
    eps, u, eye = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([-0.1, 0.3], dtype=F64), torch.eye(3, dtype=F64)
    for implicit in (False, True):
        full = bures_step(eps[:, None, None] * eye, u[:, None, None] * eye, implicit=implicit)
        torch.testing.assert_close(full, isotropic_bures_step(eps, u, implicit=implicit)[:, None, None] * eye)
    small = 1e-6 * u
    difference = isotropic_bures_step(eps, small) - isotropic_bures_step(eps, small, implicit=True)
    assert float(difference.abs().max()) < 1e-11


def test_the_result_is_symmetric() -> None:
    moved = bures_step(covariances(4, 5), 0.1 * randn(4, 5, 5, seed=3))
    assert torch.equal(moved, moved.mT)


def test_bad_input() -> None:
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="positive semidefinite"):
        bures_distance(eye, -eye)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        bures_distance(eye, torch.ones(2, 3))
    with pytest.raises(ValueError, match="of one size"):
        bures_step(eye, torch.eye(3))
    with pytest.raises(ValueError, match="at least 0"):
        wasserstein_isotropic(torch.zeros(2), torch.tensor(-1.0), torch.zeros(2), torch.tensor(1.0))
