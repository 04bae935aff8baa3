import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steepest.models import ResNet


def make(*args, seed=0, **options):
    return ResNet(*args, generator=torch.Generator().manual_seed(seed), **options)


def images(seed=1, **options):
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_shapes_and_gradients(norm):
    model = make((1, 2), 8, norm=norm)
    logits = model(images())
    assert logits.shape == (6, 10)
    F.cross_entropy(logits, torch.arange(6)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_stages_double_channels_and_halve_the_image():
    model = make((1, 1, 1), 8)
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[1:])))
    model(images())
    assert sizes == [(8, 8, 8), (16, 4, 4), (32, 2, 2)]


def test_a_unit_with_zero_convolutions_is_its_shortcut():
    model = make((1,), 8, norm="none", dtype=torch.float64)
    block = model.blocks[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(x), x)


def test_without_norm_it_is_homogeneous():
    model = make((1, 1), 8, norm="none", dtype=torch.float64)
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(3 * x), 3 * model(x))


def test_group_norm_treats_images_alone():
    model = make((1, 1), 8, norm="group", dtype=torch.float64)
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x)[:2], model(x[:2]))


def test_seed():
    before = torch.get_rng_state()
    first, same, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(first.conv.weight, other.conv.weight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"blocks": ()}, "^blocks must"),
        ({"blocks": (1, 0)}, "blocks must"),
        ({"width": 0}, "^width must"),
        ({"norm": "layer"}, "^norm must"),
        ({"norm": "group", "width": 12}, "^groups must divide"),
        ({"classes": 0}, "^classes must"),
    ],
)
def test_wrong_use(options, match):
    with pytest.raises(ValueError, match=match):
        ResNet(**options)
