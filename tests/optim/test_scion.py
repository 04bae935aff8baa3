"""Scion: each norm's direction, dual and radius by formula, both forms, and steps that do not depend on width."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from steepest.geometry import Spectral
from steepest.geometry.scaled import one_to_max, rms_to_rms
from steepest.optim import Scion, Sharp, SignDescent

EXACT = rms_to_rms(base=Spectral())
INPUT = rms_to_rms(at_least_one=True, base=Spectral())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def move(gradient: Tensor, **options: Any) -> Tensor:
    """Minus the first step from zero at lr 1, without momentum: the direction."""
    parameter = Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    Scion([parameter], 1.0, momentum=0.0, **options).step()
    return -parameter.detach()


def polar(g: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 3), (5, 1)])
@pytest.mark.parametrize("radius", [1.0, 50.0])
def test_directions_of_the_table(shape: tuple[int, int], radius: float) -> None:
    g, (out, into) = randn(*shape), shape
    ratio = (out / into) ** 0.5
    want = {
        EXACT: ratio * polar(g),
        INPUT: max(1.0, ratio) * polar(g),
        "sign": g.sign() / into,
        "column": out**0.5 * g / g.norm(dim=0),
        "row": g / g.norm(dim=1, keepdim=True) / into**0.5,
    }
    for norm, direction in want.items():
        torch.testing.assert_close(move(g, norm=norm, radius=radius), radius * direction, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["spectral", "spectral_input", "auto"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (8, 3, 2, 2)])
def test_named_spectral_norms_are_near_the_exact_ones(norm: str, shape: tuple[int, ...]) -> None:
    g = randn(*shape)
    scale = (shape[0] / shape[1]) ** 0.5
    scale = max(1.0, scale) if norm == "spectral_input" else scale
    if len(shape) == 4:
        scale /= shape[2] * shape[3]
    values = torch.linalg.svdvals(move(g, norm=norm).flatten(1)) / scale
    assert 0.8 < float(values.min()) <= float(values.max()) < 1.2


def test_the_worked_example() -> None:
    d = torch.tensor([[3.0, 0.0, 4.0], [0.0, 5.0, 12.0]], dtype=torch.float64)
    want = torch.tensor([[0.70873162, -0.26640389, 0.30560617], [-0.15984233, 0.38200771, 0.70369539]]).double()
    torch.testing.assert_close(move(d, norm=EXACT), want, rtol=0, atol=1e-7)
    want = torch.tensor([[0.86801542, -0.32627679, 0.37428959], [-0.19576608, 0.46786198, 0.86184732]]).double()
    torch.testing.assert_close(move(d, norm=INPUT), want, rtol=0, atol=1e-7)
    want = torch.tensor([[0.34641016, 0.0, 0.46188022], [0.0, 0.2220578, 0.53293871]]).double()
    torch.testing.assert_close(move(d, norm="row"), want, rtol=0, atol=1e-7)
    want = torch.tensor([[1.41421356, 0.0, 0.4472136], [0.0, 1.41421356, 1.34164079]]).double()
    torch.testing.assert_close(move(d, norm="column"), want, rtol=0, atol=1e-7)
    want = torch.tensor([0.84852814, -1.13137085]).double()
    torch.testing.assert_close(move(torch.tensor([3.0, -4.0]).double()), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("norm", "dual"),
    [(EXACT, 13.703002785), (INPUT, 16.782682384), ("sign", 8.0), ("row", 10.392304845), ("column", 29.202252319)],
)
def test_dual_norms_of_the_worked_example(norm: Any, dual: float) -> None:
    d = torch.tensor([[3.0, 0.0, 4.0], [0.0, 5.0, 12.0]], dtype=torch.float64)
    for radius in (1.0, 7.0):
        assert float((d * move(d, norm=norm, radius=radius)).sum()) == pytest.approx(radius * dual, rel=1e-9)
        sharp = move(d, norm=norm, radius=radius, step_rule=Sharp())
        assert float((d * sharp).sum()) == pytest.approx((radius * dual) ** 2, rel=1e-9)


def test_vectors_get_the_rms_norm_under_any_step_rule() -> None:
    b = randn(7)
    unit = 7**0.5 * b / b.norm()
    torch.testing.assert_close(move(b, radius=2.0), 2 * unit)
    torch.testing.assert_close(move(b, norm="vector", step_rule=Sharp()), 7**0.5 * b.norm() * unit)
    scalar = randn()
    torch.testing.assert_close(move(scalar, radius=2.0), 2 * scalar.sign())


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 5)])
def test_convolutions_divide_by_the_kernel(shape: tuple[int, ...]) -> None:
    g = randn(*shape)
    kernel = torch.Size(shape[2:]).numel()
    want = (6 / 4) ** 0.5 / kernel * polar(g.flatten(1)).reshape(shape)
    torch.testing.assert_close(move(g, norm=EXACT, layout="conv"), want, rtol=0, atol=1e-9)


def test_radii_follow_blocks_and_orientation() -> None:
    g = randn(9, 4)
    want = torch.cat([(len(part) / 4) ** 0.5 * polar(part) for part in g.split((5, 2, 2))])
    torch.testing.assert_close(move(g, norm=EXACT, split=(5, 2, 2)), want, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        move(g.mT.contiguous(), norm=EXACT, transposed=True), 1.5 * polar(g).mT, rtol=0, atol=1e-9
    )
    experts = randn(3, 9, 4)
    torch.testing.assert_close(move(experts, norm=EXACT), 1.5 * polar(experts), rtol=0, atol=1e-9)


def steps(optimizer: torch.optim.Optimizer, parameters: list[Parameter], count: int = 6) -> list[Tensor]:
    for step in range(count):
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(*parameter.shape, seed=10 * step + index)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def fresh() -> list[Parameter]:
    return [Parameter(randn(4, 6, seed=1)), Parameter(randn(5, seed=2)), Parameter(randn(3, 2, 2, 2, seed=3))]


@pytest.mark.parametrize("norm", ["auto", "sign"])
def test_the_constrained_form_is_decoupled_decay_of_one(norm: str) -> None:
    constrained = steps(Scion(p := fresh(), 0.1, norm=norm, radius=2.0, constrained=True), p)
    decayed = Scion(q := fresh(), 0.1, norm=norm, radius=2.0)
    for group in decayed.param_groups:
        group["weight_decay"] = 1.0
    for a, b in zip(constrained, steps(decayed, q), strict=True):
        assert torch.equal(a, b)


def test_the_constrained_form_keeps_its_ball() -> None:
    g, norm = randn(4, 6), EXACT.at((4, 6))
    parameter = Parameter(3.0 * g / norm.norm(g))
    optimizer = Scion([parameter], 0.2, norm=EXACT, radius=3.0, constrained=True)
    for step in range(40):
        parameter.grad = randn(4, 6, seed=step)
        optimizer.step()
        assert float(norm.norm(parameter.detach())) <= 3.0 + 1e-9


def test_signs_are_sign_descent_at_a_scaled_rate() -> None:
    a = steps(Scion(p := [Parameter(randn(4, 8))], 0.16, norm="sign", momentum=0.9, radius=0.5), p)
    b = steps(SignDescent(q := [Parameter(randn(4, 8))], 0.01, momentum=0.9, interpolation=None), q)
    torch.testing.assert_close(a, b)
    c = steps(Scion(p := [Parameter(randn(4, 8))], 0.16, norm=one_to_max(), radius=0.5), p)
    torch.testing.assert_close(a, c)


@pytest.mark.parametrize("width", [8, 32, 128])
@pytest.mark.parametrize("norm", [EXACT, "sign", "row"])
def test_a_step_changes_outputs_by_at_most_lr_at_any_width(norm: Any, width: int) -> None:
    """Inputs of RMS one move by at most lr in RMS (spectral) or in the largest entry (sign, row).

    The bound is met by an aligned input, and that is why one learning rate serves every width.
    """
    update = 0.1 * move(randn(2 * width, width), norm=norm)
    size = (lambda y: y.square().mean().sqrt()) if norm is EXACT else (lambda y: y.abs().max())
    for seed in range(5):
        x = randn(width, seed=seed)
        x = x / (x.abs().max() if norm == "sign" else x.square().mean().sqrt())
        assert float(size(update @ x)) <= 0.1 * (1 + 1e-9)
    aligned = update[0] if norm == "row" else update[0].sign() if norm == "sign" else torch.linalg.svd(update)[2][0]
    aligned = aligned / aligned.square().mean().sqrt()
    assert float(size(update @ aligned)) == pytest.approx(0.1, rel=1e-6)


def test_groups_have_norms_and_radii_of_their_own() -> None:
    a, b = Parameter(torch.zeros(4, 6).double()), Parameter(torch.zeros(4, 6).double())
    a.grad, b.grad = randn(4, 6), randn(4, 6, seed=1)
    optimizer = Scion(
        [{"params": [a], "norm": EXACT, "radius": 50.0}, {"params": [b], "norm": "sign", "radius": 3000.0}],
        2**-12,
        momentum=0.0,
    )
    optimizer.step()
    torch.testing.assert_close(a.detach(), -(2**-12) * 50 * (4 / 6) ** 0.5 * polar(a.grad), rtol=0, atol=1e-9)
    torch.testing.assert_close(b.detach(), -(2**-12) * 3000 / 6 * b.grad.sign(), rtol=0, atol=1e-9)
    optimizer.param_groups[1]["radius"] = 6.0
    before = b.detach().clone()
    optimizer.step()
    torch.testing.assert_close(b.detach(), before - 2**-12 * b.grad.sign(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["auto", "sign", "column", "row", "spectral_input"])
def test_zero_gradients_move_nothing(norm: str) -> None:
    for shape in ((4, 6), (2, 4, 6), (4, 3, 2, 2)):
        assert not move(torch.zeros(shape), norm=norm).any()


@pytest.mark.parametrize(
    ("shape", "options", "error", "words"),
    [
        ((4, 3), {"norm": "biasrms"}, ValueError, "norm .*spectral_input.*'biasrms'"),
        ((4, 3), {"norm": None}, TypeError, "norm .*NoneType"),
        ((4, 3), {"radius": 0.0}, ValueError, "radius .*positive.*0"),
        ((4, 3), {"radius": -1.0}, ValueError, "radius .*-1"),
        ((4, 3), {"radius": float("nan")}, ValueError, "radius .*nan"),
        ((4, 3), {"radius": "50"}, TypeError, "radius .*'50'"),
        ((4, 3), {"radius": True}, TypeError, "radius .*True"),
        ((4, 3), {"constrained": True, "lr": 2.0}, ValueError, "lr .*at most 1"),
        ((4, 3), {"norm": "vector"}, ValueError, r"'vector' .*\(4, 3\)"),
        ((4,), {"norm": "spectral"}, ValueError, r"matrices.*\(4,\)"),
        ((4,), {"norm": "row"}, ValueError, r"matrices.*\(4,\)"),
    ],
)
def test_wrong_settings_are_named(shape: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Scion([Parameter(torch.zeros(shape))], **options)
