"""Clip in the engine against plain loops: one length for all matrices, unconstrained and in the ball."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from steepest.geometry import Euclidean, Max, Scaled, Spectral
from steepest.geometry.matrix_norms import MaxRow
from steepest.optim import Joint, Sharp, SteepestDescent, Unit
from steepest.optim.step_rules import Clip

SHAPES = [(4, 3), (4, 3), (2, 5), (3, 2, 4)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(tensors: list[Tensor]) -> list[Tensor]:
    return [matrix for tensor in tensors for matrix in (tensor if tensor.ndim == 3 else [tensor])]


def stepped(starts: list[Tensor], gradients: list[Tensor], lr: float, **options: Any) -> list[Tensor]:
    parameters = [Parameter(x.clone()) for x in starts]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    SteepestDescent(parameters, lr, **options).step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("norm", [Spectral(), Max(), MaxRow(), Scaled(Spectral(), 0.3), Euclidean()])
@pytest.mark.parametrize("threshold", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("maximize", [False, True])
def test_one_length_for_all_matrices(norm: Any, threshold: float, foreach: bool | None, maximize: bool) -> None:
    starts = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    gradients = [randn(*shape, seed=9 + i) for i, shape in enumerate(SHAPES)]
    total = sum(float(norm.dual(g)) for g in matrices(gradients))
    after = stepped(starts, gradients, 0.1, norm=norm, step_rule=Clip(threshold), foreach=foreach, maximize=maximize)
    sign = 1 if maximize else -1
    for x, g, new in zip(matrices(starts), matrices(gradients), matrices(after), strict=True):
        expected = x + sign * 0.1 * min(threshold, total) * norm.direction(g)
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral"])
def test_shape_factors_are_radii(adjust: Any) -> None:
    starts, gradients = [randn(8, 2)], [randn(8, 2, seed=3)]
    factor = {"original": 2.0, "match_rms_adamw": 0.2 * 8**0.5, "spectral": 2.0}[adjust]
    for constrained in (False, True):
        options: dict[str, Any] = {"step_rule": Clip(1e-3), "constrained": constrained}
        ours = stepped(starts, gradients, 0.1, norm=Spectral(), adjust_lr_fn=adjust, **options)
        scaled = stepped(starts, gradients, 0.1, norm=Scaled(Spectral(), factor), **options)
        torch.testing.assert_close(ours, scaled, rtol=0, atol=1e-12)
        options["step_rule"] = Clip(1.0, "norm" if constrained else "plain")
        ours = stepped(starts, gradients, 0.1, norm=Spectral(), adjust_lr_fn=adjust, **options)
        scaled = stepped(starts, gradients, 0.1, norm=Scaled(Spectral(), factor), **options)
        torch.testing.assert_close(ours, scaled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [Spectral(), Max(), MaxRow(), Scaled(Spectral(), 0.3)])
@pytest.mark.parametrize("short_step", ["plain", "ball", "norm"])
@pytest.mark.parametrize("threshold", [0.05, 1.0])
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_short_step(norm: Any, short_step: Any, threshold: float, foreach: bool | None, maximize: bool) -> None:
    starts = [0.2 * randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    gradients = [randn(*shape, seed=9 + i) for i, shape in enumerate(SHAPES)]
    gradients[1].zero_()  # stays where it is: neither moved nor shrunk
    sign = -1 if maximize else 1
    directions = [
        x - norm.lmo(sign * g) if g.any() else 0 * x for x, g in zip(matrices(starts), matrices(gradients), strict=True)
    ]
    gap = sum(float((sign * g * v).sum()) for g, v in zip(matrices(gradients), directions, strict=True))
    size = max(float(norm.norm(v)) for v in directions)
    length = min(threshold, max(0.0, gap / {"plain": 1, "ball": 4, "norm": size**2}[short_step]))
    after = stepped(
        starts,
        gradients,
        0.1,
        norm=norm,
        step_rule=Clip(threshold, short_step),
        constrained=True,
        foreach=foreach,
        maximize=maximize,
    )
    for x, v, new in zip(matrices(starts), directions, matrices(after), strict=True):
        torch.testing.assert_close(new, x - 0.1 * length * v, rtol=0, atol=1e-11)
    assert torch.equal(after[1], starts[1])


def test_joint_in_the_ball_measures_the_gap() -> None:
    x, g = 0.1 * randn(3, 4), randn(3, 4, seed=1)
    after = stepped([x], [g], 0.2, norm=Spectral(), step_rule=Joint(), constrained=True)
    torch.testing.assert_close(after[0], x - 0.2 * (x - Spectral().lmo(g)), rtol=0, atol=1e-12)


def test_a_start_outside_the_ball_is_not_stepped_backwards() -> None:
    x = 10 * torch.eye(3, dtype=torch.float64)
    after = stepped([x], [-x], 0.5, norm=Spectral(), step_rule=Clip(1.0), constrained=True)
    assert torch.equal(after[0], x)  # <d, x - lmo(d)> is negative here


def test_relative_lengths_are_shares_of_lr() -> None:
    duals = torch.tensor([1.0, 2.0, 0.0])
    for threshold in (1e-30, 0.5, 3.0, 12.0):
        share = Clip(threshold, relative=True).lengths(duals)
        assert torch.allclose(share, torch.full((3,), min(1.0, 3 / threshold)))
        assert torch.allclose(Clip(threshold).lengths(duals), torch.full((3,), min(threshold, 3.0)))
    assert not Clip(1.0, relative=True).lengths(torch.zeros(2)).any()
    assert not Clip(1.0, "norm").lengths(torch.zeros(2), torch.zeros(2)).any()


@pytest.mark.parametrize(("threshold", "step"), [(2, (-0.12, -0.16)), (10, (-0.3, -0.4))])
def test_euclidean_clipping_is_clipped_gradient_descent(threshold: float, step: tuple[float, float]) -> None:
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    after = stepped([torch.zeros(2, dtype=torch.float64)], [gradient], 0.1, step_rule=Clip(threshold))
    assert torch.allclose(after[0], torch.tensor(step, dtype=torch.float64), rtol=0, atol=1e-12)
    parameter = Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], threshold)
    torch.optim.SGD([parameter], lr=0.1).step()
    assert torch.allclose(after[0], parameter.detach(), rtol=1e-6, atol=0)  # clip_grad_norm_ adds 1e-6 to the norm


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Clip(0.0), ValueError, "threshold .*positive.*0.0"),
        (lambda: Clip(-1), ValueError, "threshold .*positive.*-1"),
        (lambda: Clip(math.nan), ValueError, "threshold .*positive.*nan"),
        (lambda: Clip("a"), TypeError, "threshold .*number.*'a'"),
        (lambda: Clip(True), TypeError, "threshold .*number.*True"),
        (lambda: Clip(math.inf, relative=True), ValueError, "threshold .*finite.*inf"),
        (lambda: Clip(1.0, "small"), ValueError, "short_step .*plain, ball, norm.*'small'"),
    ],
)
def test_wrong_thresholds_are_named(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("rule", "options", "match"),
    [
        (Clip(2.0), {"lr": 0.6, "constrained": True}, "lr times threshold .*at most 1.*1.2"),
        (Clip(math.inf), {"lr": 0.6, "constrained": True}, "lr times threshold .*at most 1.*inf"),
        (Clip(2.0, "ball"), {}, "constrained .*True.*short_step='ball'"),
        (Clip(2.0), {"momentum": 0.9, "momentum_form": "heavy_ball"}, "momentum_form .*heavy-ball"),
        (Clip(2.0), {"constrained": True, "weight_decay": 0.1, "lr": 0.1}, "weight_decay .*constrained"),
        (Sharp(), {"constrained": True}, "constrained .*False.*Sharp"),
    ],
)
def test_settings_that_do_not_go_with_a_rule(rule: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SteepestDescent([Parameter(randn(3, 3))], step_rule=rule, **options)


def test_a_schedule_cannot_leave_the_ball() -> None:
    parameter = Parameter(torch.zeros(3, 3))
    parameter.grad = torch.ones(3, 3)
    optimizer = SteepestDescent([parameter], lr=0.5, step_rule=Clip(2.0), constrained=True)
    optimizer.param_groups[0]["lr"] = 0.7
    with pytest.raises(ValueError, match="lr times threshold"):
        optimizer.step()
    assert not parameter.detach().any()


def test_heavy_ball_without_momentum_is_an_average_of_one() -> None:
    SteepestDescent([Parameter(randn(3, 3))], step_rule=Clip(1.0), momentum_form="heavy_ball")


def test_unit_stays_the_default() -> None:
    assert isinstance(SteepestDescent([Parameter(randn(3, 3))]).step_rule, Unit)
