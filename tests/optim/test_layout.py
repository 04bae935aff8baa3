"""Heads, blocks along the inputs, and alternating gate and up: seen as views, updated as matrices of their own."""

import pytest
import torch
from torch import Tensor

from steepest.geometry import polar
from steepest.optim import Layout, SteepestDescent


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"split": (2, 2, 2)}, lambda m: m.split(2, -2)),
        ({"input_split": (3, 1)}, lambda m: m.split((3, 1), -1)),
        ({"interleaved": 2}, lambda m: [m[..., 0::2, :], m[..., 1::2, :]]),
        ({"interleaved": 3}, lambda m: [m[..., k::3, :] for k in range(3)]),
    ],
)
def test_blocks_are_views_of_the_parameter(settings, pieces, batch, transposed):
    outputs_by_inputs = matrix(*batch, 6, 4)
    stored = outputs_by_inputs.mT.contiguous() if transposed else outputs_by_inputs
    layout = Layout(transposed=transposed, **settings).resolve(stored.shape)
    blocks = layout.blocks(stored)
    assert len(blocks) == layout.count and not layout.is_plain
    for number, (block, piece) in enumerate(zip(blocks, pieces(outputs_by_inputs), strict=True)):
        assert torch.equal(block, piece.reshape(-1, *piece.shape[-2:]))
        assert block.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
        assert layout.shape_of(stored.shape, number) == tuple(piece.shape[-2:])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("settings", "join"),
    [
        ({"split": (2, 2, 2)}, lambda m: torch.cat([polar(p, "svd") for p in m.split(2, -2)], -2)),
        ({"input_split": (2, 2)}, lambda m: torch.cat([polar(p, "svd") for p in m.split(2, -1)], -1)),
        (
            {"interleaved": 2},
            lambda m: torch.stack([polar(m[..., k::2, :], "svd") for k in (0, 1)], -2).flatten(-3, -2),
        ),
    ],
)
def test_the_engine_steps_block_by_block(settings, join, momentum):
    from steepest.geometry import Spectral

    for batch in ((), (3,)):
        start, gradient = matrix(*batch, 6, 4), matrix(*batch, 6, 4) + 1
        for transposed in (False, True):
            stored = torch.nn.Parameter(start.mT.contiguous() if transposed else start.clone())
            stored.grad = gradient.mT.contiguous() if transposed else gradient.clone()
            optimizer = SteepestDescent(
                [stored], lr=0.1, norm=Spectral(), momentum=momentum, transposed=transposed, **settings
            )
            optimizer.step()
            found = stored.detach().mT if transposed else stored.detach()
            torch.testing.assert_close(found, start - 0.1 * join(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "shape", "error", "message"),
    [
        ({"split": (4, 3)}, (6, 4), ValueError, r"split must hold positive sizes that sum to the 6 outputs.*\(6, 4\)"),
        ({"input_split": (4, 3)}, (6, 4), ValueError, "input_split must hold .* the 4 inputs"),
        ({"input_split": "ab"}, (6, 4), TypeError, "input_split must be a sequence"),
        ({"interleaved": 2}, (5, 4), ValueError, r"interleaved=2 must divide the 5 outputs .*\(5, 4\)"),
        ({"interleaved": 0}, (6, 4), ValueError, "interleaved must be an integer"),
        ({"interleaved": 2.0}, (6, 4), ValueError, "interleaved must be an integer"),
        ({"interleaved": 2, "split": (3, 3)}, (6, 4), ValueError, "at most one"),
        ({"interleaved": 2}, (6, 4, 3, 3), ValueError, "not for convolutions"),
        ({"input_split": (4,)}, (4,), ValueError, "needs a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(settings, shape, error, message):
    with pytest.raises(error, match=message):
        Layout(**settings).resolve(shape)
    with pytest.raises(error, match=message):
        SteepestDescent([torch.nn.Parameter(torch.zeros(shape))], lr=0.1, **settings)


def test_a_state_from_before_the_new_keys_loads():
    weight = torch.nn.Parameter(matrix(6, 4))
    optimizer = SteepestDescent([weight], lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["input_split"], group["interleaved"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["interleaved"] == 1
