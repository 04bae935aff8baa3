"""Half updates in the log domain against torch's own functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.geometry.couplings import (
    column_log_sums,
    column_potential,
    coupling,
    exponent_floor,
    row_log_sums,
    row_potential,
)


@given(
    st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 1200.0, 1e6]), st.sampled_from([torch.float32, torch.float64])
)
@settings(max_examples=40, deadline=None)
def test_log_sums_are_those_of_torch(seed: int, eta: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    C = torch.rand(2, 7, 5, generator=g, dtype=dtype)
    C[torch.rand(C.shape, generator=g) < 0.2] = torch.inf
    x, y = torch.randn(2, 7, generator=g, dtype=dtype), torch.randn(5, generator=g, dtype=dtype)
    rows = torch.logsumexp((y - C) * eta, -1)
    columns = torch.logsumexp((x[..., None] - C) * eta, -2)
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    assert torch.allclose(row_log_sums(C, y, eta), rows, **close)
    assert torch.allclose(column_log_sums(C, x, eta), columns, **close)


def test_a_forbidden_row_has_no_mass() -> None:
    C = torch.tensor([[math.inf, math.inf], [0.0, math.inf]])
    assert row_log_sums(C, torch.zeros(2), 3.0).tolist() == [-math.inf, 0.0]
    assert column_log_sums(C, torch.zeros(2), 3.0).tolist() == [0.0, -math.inf]


def test_potentials_give_the_wanted_sums() -> None:
    g = torch.Generator().manual_seed(0)
    C, y = torch.rand(6, 4, generator=g, dtype=torch.float64), torch.randn(4, generator=g, dtype=torch.float64)
    wanted = torch.rand(3, 6, generator=g, dtype=torch.float64) + 0.1
    x = row_potential(C, y, wanted.log(), 50.0)
    assert x.shape == (3, 6)
    assert torch.allclose(coupling(C, x, y, 50.0).sum(-1), wanted, rtol=1e-12)
    columns = wanted[:, :4]
    assert torch.allclose(
        coupling(C, x, column_potential(C, x, columns.log(), 50.0), 50.0).sum(-2), columns, rtol=1e-12
    )


def test_gradients_pass_through() -> None:
    C = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda C, y: row_log_sums(C, y, 3.0), (C, y))
    assert torch.autograd.gradcheck(lambda C, x: column_log_sums(C, x, 3.0), (C, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_is_far_below_rounding_and_its_square_is_normal(dtype: torch.dtype) -> None:
    least = torch.tensor(exponent_floor(dtype), dtype=dtype).exp()
    assert 0 < float(least) < torch.finfo(dtype).eps ** 2
    assert float(least * least) >= torch.finfo(dtype).tiny
    assert exponent_floor(torch.bfloat16) == -math.inf
