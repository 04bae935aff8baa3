"""Geometric complexity: exact, estimated, as a regulariser."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.dynamics.complexity import geometric_complexity


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def reference(function: Any, inputs: Tensor) -> Tensor:
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x: function(x[None])[0]))(inputs)
    return jacobians.square().sum() / len(inputs)


def test_a_linear_map() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert float(geometric_complexity(lambda x: x @ weight.T, torch.randn(7, 3))) == 55.0
    layer = nn.Linear(3, 2)
    layer.weight.data = weight
    assert float(geometric_complexity(layer, torch.randn(7, 3))) == 55.0


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_against_jacobians(chunk: int | None) -> None:
    net, x = model(), randn(9, 4)
    torch.testing.assert_close(geometric_complexity(net, x, chunk=chunk), reference(net, x), rtol=1e-12, atol=0)
    with torch.no_grad():
        found = geometric_complexity(net, x, chunk=chunk)
    assert not found.requires_grad
    torch.testing.assert_close(found, reference(net, x).detach(), rtol=1e-12, atol=0)


def test_images_and_many_outputs() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 5, 2)).double()
    x = randn(3, 1, 7, 7)
    torch.testing.assert_close(geometric_complexity(net, x), reference(net, x), rtol=1e-12, atol=0)
    scalar = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    x = randn(5, 4)
    torch.testing.assert_close(geometric_complexity(scalar, x), reference(lambda a: scalar(a)[:, None], x))


def test_it_regularises() -> None:
    net, x = model(), randn(9, 4)
    geometric_complexity(net, x, train=True).backward()
    expected = torch.autograd.grad(reference(net, x), list(net.parameters()), allow_unused=True)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    values = []
    for _ in range(20):
        loss = geometric_complexity(net, x, train=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.5 * values[0]


def test_the_estimate_is_unbiased_and_seeded() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 40)).double()
    x = randn(9, 4)
    exact = float(geometric_complexity(net, x).detach())

    def estimate(probes: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return float(geometric_complexity(net, x, probes=probes, generator=generator).detach())

    assert estimate(3, 0) == estimate(3, 0) != estimate(3, 1)
    assert estimate(2000, 0) == pytest.approx(exact, rel=0.03)
    geometric_complexity(net, x, probes=2, generator=torch.Generator().manual_seed(0)).backward()


def test_modules_keep_their_mode_and_buffers() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    net[2].eval()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    modes = [module.training for module in net.modules()]
    x = randn(9, 4)
    first = geometric_complexity(net, x)
    torch.testing.assert_close(geometric_complexity(net, x, chunk=2), first)
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(buffers[name], buffer) for name, buffer in net.named_buffers())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_constant_and_detached_functions_are_flat() -> None:
    x = randn(5, 4)
    assert float(geometric_complexity(lambda a: torch.ones(len(a), 2), x)) == 0.0
    net = model()
    assert float(geometric_complexity(lambda a: net(a.detach()), x)) == 0.0


@pytest.mark.parametrize(
    ("inputs", "options", "error", "words"),
    [
        (torch.ones(3, 4, dtype=torch.int64), {}, TypeError, "inputs must be .* floating-point"),
        (torch.ones(3, 4, dtype=torch.complex128), {}, TypeError, "inputs must be"),
        (torch.ones(0, 4, dtype=torch.float64), {}, ValueError, "at least one sample"),
        (torch.ones((), dtype=torch.float64), {}, ValueError, "at least one sample"),
        (randn(3, 4), {"chunk": 0}, ValueError, "chunk must be at least 1"),
        (randn(3, 4), {"probes": 1.5}, TypeError, "probes must be an integer"),
        (randn(3, 4), {"probes": 2}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_wrong_settings_are_named(inputs: Tensor, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        geometric_complexity(model(), inputs, **options)


def test_wrong_functions_are_named() -> None:
    with pytest.raises(ValueError, match="one row for each of 3 samples"):
        geometric_complexity(lambda a: a.sum(), randn(3, 4))
    with pytest.raises(TypeError, match="real tensor"):
        geometric_complexity(lambda a: a + 0j, randn(3, 4))
