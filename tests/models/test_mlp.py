import pytest
import torch

from steepest.models import MLP
from steepest.models.mlp import ACTIVATIONS


def make(*args, seed=0, **options):
    return MLP(*args, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_formula(name, bias):
    model = make([3, 5, 4, 2], name, bias, dtype=torch.float64)
    x = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = x
    for index, layer in enumerate(model.layers):
        h = h @ layer.weight.T + (layer.bias if bias else 0)
        h = ACTIVATIONS[name][0](h) if index < 2 else h
    torch.testing.assert_close(model(x), h)


def test_linear_network_is_a_product():
    model = make([3, 5, 2], "identity", bias=False, dtype=torch.float64)
    torch.testing.assert_close(model(torch.eye(3).double()).T, model.layers[1].weight @ model.layers[0].weight)


def test_callable_activation_and_gradients():
    model = make([2, 3, 1], torch.square, dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradgradcheck(model, x)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_signal_keeps_its_size(name):
    model = make([256] * 6, name)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    assert 0.3 < model(x).std().item() < 1.5


def test_seed():
    before = torch.get_rng_state()
    first, same, other = make([3, 4, 2]), make([3, 4, 2]), make([3, 4, 2], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([3],), ValueError, "^sizes must"),
        (([3, 0],), ValueError, "sizes must"),
        (([3, 2.0],), TypeError, "sizes must"),
        (([3, 2], "rleu"), ValueError, "^activation must be one of relu"),
        (([3, 2], 1), TypeError, "^activation must"),
    ],
)
def test_wrong_use(arguments, error, match):
    with pytest.raises(error, match=match):
        MLP(*arguments)
