"""The smoothed ReLU and its gate."""

import math

import pytest
import torch

from steepest.nn import RIA, GaussGLU, ria


@pytest.mark.parametrize("beta", [0.5, 1.0, 7.0])
def test_ria_is_the_relu_smoothed_by_a_gaussian(beta: float) -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    s = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * s.square()) / math.sqrt(2 * math.pi)
    smoothed = torch.stack([torch.trapezoid((v + s / beta).relu() * density, s) for v in x])
    torch.testing.assert_close(ria(x, beta), smoothed, rtol=0, atol=1e-8)
    torch.testing.assert_close(RIA(beta)(x), ria(x, beta))


def test_ria_has_the_gate_as_its_derivative() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ria(x, 2.0).sum(), x)
    torch.testing.assert_close(slope, torch.special.ndtr(2 * x))
    assert torch.autograd.gradcheck(lambda y: ria(y, 2.0), x)


def test_gauss_glu() -> None:
    block = GaussGLU(4, 6, beta=2.0, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    gate = 0.5 * (1 + torch.erf(2 * (x @ block.gate_proj.weight.T) / math.sqrt(2)))
    torch.testing.assert_close(block(x), (gate * (x @ block.up_proj.weight.T)) @ block.down_proj.weight.T)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        RIA(beta)
    with pytest.raises(ValueError, match="beta"):
        GaussGLU(2, 2, beta)
