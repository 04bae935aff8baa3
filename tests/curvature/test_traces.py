"""Random estimates: unbiased, with standard errors that are true, and exact where they should be."""

import pytest
import torch
from curvature_models import generator
from torch import Tensor

from steepest.curvature import hutch_plus_plus, hutchinson, spectral_density


def decaying(n: int = 80, power: float = 2.0) -> Tensor:
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator())).Q
    return Q @ torch.diag(torch.arange(1, n + 1, dtype=torch.float64) ** -power) @ Q.T


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("estimate", [hutchinson, hutch_plus_plus])
def test_the_standard_error_is_true(estimate, distribution) -> None:
    A = decaying()
    g = generator(3)
    key = "probes" if estimate is hutchinson else "products"
    found = [estimate(A, **{key: 30}, distribution=distribution, generator=g) for _ in range(200)]
    scores = torch.tensor([(e.value - float(A.trace())) / e.standard_error for e in found])
    assert abs(float(scores.mean())) < 0.4 and 0.7 < float(scores.std()) < 1.5
    assert all(e.products == 30 for e in found)


def test_hutch_plus_plus_beats_hutchinson_on_a_decaying_spectrum() -> None:
    A, g = decaying(), generator(1)
    rough = torch.tensor([hutchinson(A, probes=30, generator=g).value for _ in range(50)]) - A.trace()
    fine = torch.tensor([hutch_plus_plus(A, products=30, generator=g).value for _ in range(50)]) - A.trace()
    assert fine.square().mean() < rough.square().mean() / 25


def test_exact_cases() -> None:
    diagonal = torch.diag(torch.arange(5.0).double())
    assert hutchinson(diagonal, probes=3) == (10.0, 0.0, 3)
    small = decaying(4)
    found = hutch_plus_plus(small, products=12)
    assert abs(found.value - float(small.trace())) < 1e-12 and found.standard_error == 0 and found.products == 4
    low_rank = torch.outer(torch.ones(50), torch.ones(50)).double()
    assert abs(hutch_plus_plus(low_rank, products=9).value - 50) < 1e-10
    assert hutchinson(decaying(), generator=generator(5)) == hutchinson(decaying(), generator=generator(5))


def test_density_integrates_and_has_the_moments() -> None:
    A = decaying(60, 0.5)
    found = spectral_density(A, steps=20, probes=60, generator=generator(2))
    assert abs(float(torch.trapezoid(found.density, found.grid)) - 1) < 1e-3
    assert abs(float(found.weights.sum()) - 1) < 1e-10 and found.products == 20 * 60
    values = torch.linalg.eigvalsh(A)
    for power in (1, 2, 3):
        moment = float((found.weights * found.nodes**power).sum())
        assert abs(moment / float((values**power).mean()) - 1) < 0.05


def test_density_of_few_eigenvalues_stops_early() -> None:
    A = torch.diag(torch.tensor([-1.0] * 10 + [2.0] * 30).double())
    found = spectral_density(A, steps=30, probes=4, width=0.01)
    assert found.products <= 4 * 3
    near = ((found.nodes + 1).abs() < 1e-8) | ((found.nodes - 2).abs() < 1e-8)
    assert float(found.weights[~near].sum()) < 1e-10
    share = float(found.weights[(found.nodes + 1).abs() < 1e-8].sum())
    assert 0.05 < share < 0.5
    assert spectral_density(torch.zeros(3, 3)).products == 8
    assert spectral_density(torch.ones(1, 1)).nodes.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: hutchinson(A, probes=1), "probes"),
        (lambda A: hutchinson(A[:2]), "square"),
        (lambda A: hutchinson(A, distribution="uniform"), "distribution"),
        (lambda A: hutchinson(A, at_once=0), "at_once"),
        (lambda A: hutch_plus_plus(A, products=5), "products"),
        (lambda A: hutch_plus_plus(A[:0, :0]), "empty"),
        (lambda A: spectral_density(A, steps=0), "steps"),
        (lambda A: spectral_density(A, width=0.0), "width"),
        (lambda A: spectral_density(A.triu()), "symmetric"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 3))


@pytest.mark.parametrize("call", [hutchinson, hutch_plus_plus, spectral_density])
def test_products_that_are_not_finite(call) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        call(torch.full((20, 20), float("inf")))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_density_scales_with_the_operator(scale: float) -> None:
    spectrum = torch.tensor([1.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    found = spectral_density(torch.diag(scale * spectrum))
    plain = spectral_density(torch.diag(spectrum))
    torch.testing.assert_close(found.grid / scale, plain.grid, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.density * scale, plain.density, rtol=1e-6, atol=1e-9)
