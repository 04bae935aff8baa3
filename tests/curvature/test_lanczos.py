"""Eigenpairs against dense decompositions."""

import pytest
import torch
from curvature_models import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.curvature import FunctionOperator, MatrixOperator, top_eigenpairs


def symmetric(n: int, seed: int = 0) -> Tensor:
    A = torch.randn(n, n, dtype=torch.float64, generator=generator(seed))
    return (A + A.T) / 2


@given(st.integers(1, 60), st.integers(1, 6), st.sampled_from(["largest", "smallest", "magnitude"]), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_pairs_of_a_dense_matrix(n: int, k: int, which, seed: int) -> None:
    k = min(k, n)
    A = symmetric(n, seed)
    found = top_eigenpairs(A, k, which=which, tol=1e-10, basis=max(k + 3, 12), max_products=2000)
    values = torch.linalg.eigvalsh(A)
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    torch.testing.assert_close(found.values, values[key.argsort()[:k]], rtol=1e-8, atol=1e-9)
    residuals = (A @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e-9)
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.vectors.T @ found.vectors, identity, rtol=0, atol=1e-10)
    assert found.converged


@pytest.mark.parametrize("values", [[5, 5, 1, 1, 1, 1], [2, 2, 2], [0, 0, 0, 0], [3, 0, 0, 0, 0], [-1, -1, 4]])
def test_multiple_eigenvalues(values: list[float]) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64)
    found = top_eigenpairs(torch.diag(spectrum), 3)
    torch.testing.assert_close(found.values, spectrum.sort(descending=True).values[:3], rtol=1e-12, atol=1e-12)


SPECTRA = [[5] * 10 + [1, 2, 3], [0] * 10 + [1, 2, 3], [2] * 12 + [1] * 8 + [-1] * 4, [-3] * 7, [-1] * 5 + [4]]


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("values", SPECTRA)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_no_copy_of_a_multiple_eigenvalue_is_left_out(values: list[float], which, share: float) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(n))).Q
    k = max(1, int(share * n))
    found = top_eigenpairs(Q * spectrum @ Q.T, k, which=which)
    key = {"largest": -spectrum, "smallest": spectrum, "magnitude": -spectrum.abs()}[which]
    wanted = spectrum[key.argsort()[:k]]
    compared = (found.values.abs(), wanted.abs()) if which == "magnitude" else (found.values, wanted)
    torch.testing.assert_close(*compared, rtol=1e-9, atol=1e-9)
    assert found.converged


@pytest.mark.parametrize("k", [1, 4, 6, 20, 37])
def test_a_null_space_that_is_one_to_rounding_of_float32(k: int) -> None:
    M = torch.randn(3, 40, generator=generator(2))
    A = (M.T @ M).double()
    found = top_eigenpairs(A, k, which="smallest")
    assert found.converged and float(found.values.abs().max()) < 1e-4 * float(A.norm())


def test_products_are_counted_and_low_rank_is_cheap() -> None:
    count = 0
    Q = torch.linalg.qr(torch.randn(500, 3, dtype=torch.float64, generator=generator())).Q

    def product(columns: Tensor) -> Tensor:
        nonlocal count
        count += columns.shape[1]
        return Q @ (torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64) * (Q.T @ columns))

    A = FunctionOperator(product, (500, 500), dtype=torch.float64, symmetric=True)
    found = top_eigenpairs(A, 3)
    assert found.products == count <= 6
    torch.testing.assert_close(found.values, torch.tensor([3.0, 2.0, 1.0]).double())


def test_a_good_start_saves_products() -> None:
    A = symmetric(200)
    first = top_eigenpairs(A, 1)
    again = top_eigenpairs(A + 1e-4 * symmetric(200, 1), 1, start=first.vectors[:, 0])
    assert again.products < first.products / 2
    assert top_eigenpairs(A, 1).values == first.values


def test_a_budget_that_is_too_small_says_so() -> None:
    found = top_eigenpairs(symmetric(200), 2, tol=1e-12, max_products=5)
    assert not found.converged and found.products == 5
    residual = found.residuals.max()
    assert residual > 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 5}, "k must be at most"),
        ({"tol": 0.0}, "tol"),
        ({"which": "top"}, "which"),
        ({"start": torch.zeros(4)}, "not zero"),
        ({"start": torch.ones(3)}, "real vector"),
        ({"max_products": 0}, "max_products"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(torch.eye(4), **options)


def test_operators_that_have_no_eigenpairs() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        top_eigenpairs(torch.ones(2, 2).triu())
    with pytest.raises(ValueError, match="at least one row"):
        top_eigenpairs(torch.ones(0, 0))
    with pytest.raises(TypeError, match="LinearOperator"):
        top_eigenpairs([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="not finite"):
        top_eigenpairs(torch.diag(torch.tensor([1.0, float("inf")])))


def test_operator_arithmetic_and_scipy() -> None:
    A = torch.randn(4, 4, dtype=torch.float64, generator=generator())
    operator = MatrixOperator(A)
    v = torch.arange(4.0).double()
    torch.testing.assert_close((2 * operator + 3.0) @ v, 2 * A @ v + 3 * v)
    torch.testing.assert_close((-(operator - 1.0)).T @ v, -(A.T @ v) + v)
    torch.testing.assert_close((MatrixOperator(A[:2]).T * 2.0).dense(), 2 * A[:2].T)
    scipy = operator.to_scipy()
    torch.testing.assert_close(torch.from_numpy(scipy @ v.numpy()), A @ v)
    torch.testing.assert_close(torch.from_numpy(scipy.T @ A.numpy()), A.T @ A)
    assert scipy.dtype == "float64" and (operator @ v.new_zeros(4, 0)).shape == (4, 0)
    with pytest.raises(ValueError, match="square"):
        MatrixOperator(A[:2]) + 1.0
    with pytest.raises(TypeError, match="number"):
        operator + operator  # type: ignore[operator]
    with pytest.raises(TypeError, match="no transpose"):
        FunctionOperator(lambda v: v, (4, 4)).T @ v
