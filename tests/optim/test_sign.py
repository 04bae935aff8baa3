"""Sign descent against Lion, Signum and signSGD as their papers write them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from steepest.optim import SignDescent

SHAPES = [(4, 3), (5,), (), (2, 3, 4), (3, 2, 2, 2), (2, 2, 2, 2, 2)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(steps: int = 6, **options: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
    parameters = [Parameter(randn(*shape, seed=index)) for index, shape in enumerate(SHAPES)]
    optimizer = SignDescent(parameters, **options)
    gradients = []
    for step in range(steps):
        gradients.append([randn(*shape, seed=100 * step + index + 50) for index, shape in enumerate(SHAPES)])
        for parameter, gradient in zip(parameters, gradients[-1], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters], gradients


@settings(deadline=None, max_examples=20, derandomize=True)
@given(beta1=st.floats(0.0, 0.98), beta2=st.floats(0.01, 0.99), decay=st.sampled_from([0.0, 0.1, 1.0]))
def test_lion(beta1: float, beta2: float, decay: float) -> None:
    """Algorithm 2 of the paper: c = b1 m + (1 - b1) g; w -= lr (sign(c) + decay w); m = b2 m + (1 - b2) g."""
    got, gradients = run(lr=0.01, momentum=beta2, interpolation=beta1, weight_decay=decay)
    for index, (shape, result) in enumerate(zip(SHAPES, got, strict=True)):
        w, m = randn(*shape, seed=index), torch.zeros(shape, dtype=torch.float64)
        for step in gradients:
            c = beta1 * m + (1 - beta1) * step[index]
            w = w - 0.01 * (c.sign() + decay * w)
            m = beta2 * m + (1 - beta2) * step[index]
        torch.testing.assert_close(result, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
def test_signum(beta: float, maximize: bool) -> None:
    got, gradients = run(lr=0.01, momentum=beta, interpolation=None, maximize=maximize)
    for index, (shape, result) in enumerate(zip(SHAPES, got, strict=True)):
        w, m = randn(*shape, seed=index), torch.zeros(shape, dtype=torch.float64)
        for step in gradients:
            m = beta * m + (1 - beta) * step[index]
            w = w + (0.01 if maximize else -0.01) * m.sign()
        torch.testing.assert_close(result, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("interpolation", [None, 0.9])
def test_sign_sgd(interpolation: float | None) -> None:
    got, gradients = run(lr=0.01, momentum=0.0, interpolation=interpolation)
    for index, (shape, result) in enumerate(zip(SHAPES, got, strict=True)):
        w = randn(*shape, seed=index) - 0.01 * sum(step[index].sign() for step in gradients)
        torch.testing.assert_close(result, w, rtol=0, atol=1e-12)


def test_lion_with_equal_betas_is_signum() -> None:
    lion, _ = run(lr=0.01, momentum=0.9, interpolation=0.9)
    signum, _ = run(lr=0.01, momentum=0.9, interpolation=None)
    for a, b in zip(lion, signum, strict=True):
        assert torch.equal(a, b)


def test_zero_entries_stay() -> None:
    parameter = Parameter(torch.ones(3))
    parameter.grad = torch.tensor([0.0, 2.0, -1e-30])
    SignDescent([parameter], 0.5).step()
    assert parameter.tolist() == [1.0, 0.5, 1.5]


def test_each_coordinate_moves_by_the_learning_rate() -> None:
    one, _ = run(steps=1, lr=0.25)
    for index, (shape, result) in enumerate(zip(SHAPES, one, strict=True)):
        moved = (result - randn(*shape, seed=index)).abs()
        assert torch.allclose(moved, torch.full_like(moved, 0.25))
