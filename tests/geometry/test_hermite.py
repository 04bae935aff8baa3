"""Hermite polynomials against their formulas, and orthonormality."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.geometry.hermite import (
    HermiteSeries,
    hermite,
    hermite_basis,
    hermite_coefficients,
    information_exponent,
    normal_rule,
)

U = torch.linspace(-4, 4, 41, dtype=torch.float64)
FORMULAS = {
    0: torch.ones_like,
    1: lambda u: u,
    2: lambda u: u**2 - 1,
    3: lambda u: u**3 - 3 * u,
    4: lambda u: u**4 - 6 * u**2 + 3,
    5: lambda u: u**5 - 10 * u**3 + 15 * u,
}


@pytest.mark.parametrize("k", FORMULAS)
def test_formulas(k: int) -> None:
    expected = FORMULAS[k](U) / math.sqrt(math.factorial(k))
    assert torch.allclose(hermite(k)(U), expected, atol=1e-12)
    assert torch.allclose(hermite_basis(U, 5)[:, k], expected, atol=1e-12)


def test_orthonormal() -> None:
    z, w = normal_rule(20)
    basis = hermite_basis(z, 6)
    assert torch.allclose(basis.mT @ (w[:, None] * basis), torch.eye(7).double(), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_series_value_derivative_and_coefficients(coefficients: list[float]) -> None:
    series = HermiteSeries(tuple(coefficients))
    basis = hermite_basis(U, len(coefficients) - 1)
    assert torch.allclose(series(U), basis @ torch.tensor(coefficients, dtype=torch.float64), atol=1e-9)
    u = U.clone().requires_grad_()
    (slope,) = torch.autograd.grad(series(u).sum() + 0 * u.sum(), u)
    assert torch.allclose(series.derivative()(U), slope, atol=1e-8)
    assert hermite_coefficients(series, len(coefficients) - 1) == pytest.approx(series.coefficients, abs=1e-8)


def test_information_exponents() -> None:
    assert hermite(4).exponent == 4
    assert HermiteSeries((1.0, 0.0, 0.5)).exponent == 2
    assert hermite(0).exponent is None
    assert information_exponent(torch.relu) == 1
    assert information_exponent(torch.abs) == 2
    assert information_exponent(torch.ones_like) is None


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="k must"):
        hermite(-1)
    with pytest.raises(TypeError, match="k must"):
        hermite(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coefficients"):
        HermiteSeries(())
    with pytest.raises(ValueError, match="coefficients"):
        HermiteSeries((math.nan,))
    with pytest.raises(ValueError, match="finite"):
        hermite_coefficients(lambda u: u / 0, 3)
    with pytest.raises(ValueError, match="nodes"):
        hermite_coefficients(torch.relu, 5, nodes=3)
