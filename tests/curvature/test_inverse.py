"""Inverse products against dense solves."""

import pytest
import torch
from curvature_models import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.curvature import solve


def positive(n: int, seed: int = 0, power: float = 1.0) -> Tensor:
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(seed))).Q
    A = Q @ torch.diag(torch.arange(1, n + 1, dtype=torch.float64) ** power) @ Q.T
    return (A + A.T) / 2


@given(
    st.integers(1, 30), st.sampled_from([None, 1, 3]), st.sampled_from([0.0, 0.5]), st.sampled_from(["cg", "neumann"])
)
@settings(max_examples=25, deadline=None)
def test_the_dense_solution(n: int, k: int | None, damping: float, method) -> None:
    A = positive(n)
    b = torch.randn((n,) if k is None else (n, k), dtype=torch.float64, generator=generator(1))
    found = solve(A, b, damping=damping, method=method, tol=1e-10, max_products=3000)
    expected = torch.linalg.solve(A + damping * torch.eye(n, dtype=torch.float64), b)
    torch.testing.assert_close(found.x, expected, rtol=1e-7, atol=1e-8)
    assert found.converged and found.residual <= 1e-10


def test_cg_ends_after_as_many_products_as_there_are_eigenvalues() -> None:
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0, 9.0]).double())
    found = solve(A, torch.ones(5, dtype=torch.float64), tol=1e-12)
    assert found.products == 3 and found.converged
    assert solve(A, torch.zeros(5)).x.tolist() == [0.0] * 5
    assert solve(A, torch.zeros(5, 0)).x.shape == (5, 0)


@pytest.mark.parametrize("method", ["cg", "neumann"])
def test_a_preconditioner_and_a_start_save_products(method) -> None:
    A = positive(40, power=1.5)
    b = torch.ones(40, dtype=torch.float64)
    options = {"method": method, "tol": 1e-8, "max_products": 20_000}
    plain = solve(A, b, **options)
    near = torch.linalg.inv(A + 0.01 * torch.eye(40, dtype=torch.float64))
    near = (near + near.T) / 2
    for preconditioner in (near, lambda v: near @ v):
        better = solve(A, b, preconditioner=preconditioner, **options)
        assert better.converged and better.products < plain.products / 3
        torch.testing.assert_close(better.x, plain.x, rtol=1e-5, atol=1e-6)
    again = solve(A, b, start=plain.x, **options)
    assert again.products <= (1 if method == "cg" else 21)


def test_a_short_neumann_series_is_the_sum() -> None:
    A = positive(6) / 6
    b = torch.ones(6, dtype=torch.float64)
    found = solve(A, b, method="neumann", scale=1.0, max_products=4)
    step = torch.eye(6, dtype=torch.float64) - A
    torch.testing.assert_close(found.x, sum(torch.linalg.matrix_power(step, j) @ b for j in range(4)))
    assert not found.converged and found.products == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A, b: solve(A - 2 * torch.eye(3), b), ValueError, "positive definite"),
        (lambda A, b: solve(A, b, damping=-1.0), ValueError, "damping"),
        (lambda A, b: solve(A, b, tol=0), ValueError, "tol"),
        (lambda A, b: solve(A, b, method="lu"), ValueError, "method"),
        (lambda A, b: solve(A, b[:2]), ValueError, "b must be"),
        (lambda A, b: solve(A, b / 0), ValueError, "finite"),
        (lambda A, b: solve(A, b.cfloat()), ValueError, "real"),
        (lambda A, b: solve(A, b, scale=1.0), ValueError, "scale"),
        (lambda A, b: solve(A, b, start=b[:, None]), ValueError, "start"),
        (lambda A, b: solve(A, b, preconditioner=torch.eye(2)), ValueError, "preconditioner"),
        (lambda A, b: solve(A, b, preconditioner=3), TypeError, "preconditioner"),
        (lambda A, b: solve(A + torch.ones(3, 3).triu(), b), ValueError, "symmetric"),
        (lambda A, b: solve(A * float("inf"), b), FloatingPointError, "not finite"),
        (lambda A, b: solve(A, b, method="neumann", scale=9.0), FloatingPointError, "diverges"),
        (lambda A, b: solve(A, b, max_products=0), ValueError, "max_products"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.ones(3))
