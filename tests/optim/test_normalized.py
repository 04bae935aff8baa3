"""Normalised descent: steps of length lr per parameter, per row or column, or over all parameters at once."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from steepest.optim import NormalizedDescent

SHAPES = [(4, 3), (4, 3), (5,), (3, 2, 2, 2)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(shapes: list[tuple[int, ...]]) -> list[Parameter]:
    parameters = [Parameter(randn(*shape, seed=index)) for index, shape in enumerate(shapes)]
    for index, parameter in enumerate(parameters):
        parameter.grad = randn(*parameter.shape, seed=index + 30) * 10**index
    return parameters


@pytest.mark.parametrize("foreach", [None, False])
def test_each_parameter_moves_by_the_learning_rate(foreach: bool | None) -> None:
    parameters = fresh(SHAPES)
    NormalizedDescent(parameters, 0.3, foreach=foreach).step()
    for index, parameter in enumerate(parameters):
        assert parameter.grad is not None
        want = randn(*parameter.shape, seed=index) - 0.3 * parameter.grad / parameter.grad.norm()
        torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreach", [None, False])
def test_all_parameters_move_together_by_the_learning_rate(foreach: bool | None) -> None:
    """Cutkosky and Mehta: m = b m + (1 - b) g, x -= lr m / |m| on the concatenation of all parameters."""
    parameters = fresh(SHAPES)
    optimizer = NormalizedDescent(parameters, 0.3, scope="all", momentum=0.8, foreach=foreach)
    x = torch.cat([parameter.detach().flatten() for parameter in parameters])
    m = torch.zeros_like(x)
    for step in range(5):
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(*parameter.shape, seed=step + 10 * index) * 10**index
        m = 0.8 * m + 0.2 * torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        x = x - 0.3 * m / m.norm()
        optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in parameters]), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("norm", "dim"), [("row", 1), ("column", 0)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_rows_and_columns_move_by_the_learning_rate(norm: str, dim: int, weight_decay: float) -> None:
    parameters = fresh([(4, 3), (2, 6)])
    parameters[0].grad[1] = 0.0  # type: ignore[index]
    NormalizedDescent(parameters, 0.3, norm=norm, momentum=0.0, weight_decay=weight_decay).step()
    for index, parameter in enumerate(parameters):
        gradient = parameter.grad
        assert gradient is not None
        unit = gradient / gradient.norm(dim=dim, keepdim=True).clamp_min(1e-300)
        want = (1 - 0.3 * weight_decay) * randn(*parameter.shape, seed=index) - 0.3 * unit
        torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["parameter", "all"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_size_of_gradients_does_not_matter(scope: str, size: float) -> None:
    moved = []
    for scale in (1.0, size):
        parameters = fresh([(4, 3), (5,)])
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.grad = parameter.grad.mul(scale).float()  # type: ignore[union-attr]
        NormalizedDescent(parameters, 0.3, scope=scope).step()  # type: ignore[arg-type]
        moved.append([parameter.detach() for parameter in parameters])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["parameter", "all"])
def test_zero_gradients_move_nothing(scope: str) -> None:
    parameter = Parameter(randn(3, 2))
    parameter.grad = torch.zeros(3, 2, dtype=torch.float64)
    NormalizedDescent([parameter], 0.3, scope=scope).step()  # type: ignore[arg-type]
    assert torch.equal(parameter.detach(), randn(3, 2))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"scope .*'global'"):
        NormalizedDescent([Parameter(torch.zeros(2))], scope="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"norm .*'rows'"):
        NormalizedDescent([Parameter(torch.zeros(2, 2))], norm="rows")
    with pytest.raises(ValueError, match=r"matrices.*\(2,\)"):
        NormalizedDescent([Parameter(torch.zeros(2))], norm="row")
