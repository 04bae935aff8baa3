"""Clipped Scion against the paper's loops, worked numbers, its limits, resume, and starts in the ball."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from steepest.geometry import Spectral
from steepest.geometry.scaled import one_to_max, one_to_rms, rms_to_max, rms_to_rms, vector_rms
from steepest.models import GPT, MLP, GPTConfig, ResNet
from steepest.optim import (
    ClippedScion,
    Muon,
    Scion,
    ball_ratios,
    build,
    init_on_ball_,
    project_,
    scion_param_groups,
)
from steepest.optim.scion_presets import CONSTRAINED_RADII, SCION_RADII

EXACT = rms_to_rms(base=Spectral())
D = torch.tensor([[3.0, 0.0, 4.0], [0.0, 5.0, 12.0]], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(starts: list[Tensor], **options: Any) -> list[dict[str, Any]]:
    """A spectral layer, a sign layer and a vector, each with its radius."""
    settings = [(EXACT, 2.0), (one_to_max(), 30.0), (vector_rms(), 1.5)]
    return [
        {"params": [Parameter(x.clone())], "norm": norm, "radius": radius, **options}
        for x, (norm, radius) in zip(starts, settings, strict=True)
    ]


STARTS = [0.1 * randn(4, 6), 0.1 * randn(3, 4, seed=1), 0.1 * randn(4, seed=2)]
NORMS = [(EXACT.at((4, 6)), 2.0), (one_to_max().at((3, 4)), 30.0), (vector_rms().at((4,)), 1.5)]


def gradients(step: int) -> list[Tensor]:
    return [randn(*x.shape, seed=100 * step + i) for i, x in enumerate(STARTS)]


def run(optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("clip", [1.0, 20.0, 200.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_unconstrained_loop(clip: float, momentum: float) -> None:
    x, d, alpha = [s.clone() for s in STARTS], [torch.zeros_like(s) for s in STARTS], 1 - momentum
    optimizer = ClippedScion(groups(STARTS), lr=0.02, clip=clip, momentum=momentum)
    for step in range(6):
        d = [alpha * g + (1 - alpha) * old for g, old in zip(gradients(step), d, strict=True)]
        v = [-r * norm.lmo(each) for each, (norm, r) in zip(d, NORMS, strict=True)]
        dual = sum(float((a * b).sum()) for a, b in zip(d, v, strict=True))
        eta, gamma = min(clip, dual), 0.02 / clip
        x = [old - gamma * eta * each for old, each in zip(x, v, strict=True)]
        found = run(optimizer, range(step, step + 1))
        assert optimizer.last_dual_norm == pytest.approx(dual, rel=1e-12)
        assert optimizer.last_clip_fraction == pytest.approx(min(1, dual / clip), rel=1e-12)
    for a, b in zip(found, x, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("short_step", ["plain", "ball", "norm"])
def test_the_constrained_loop_stays_in_its_balls(short_step: Any) -> None:
    x, d, alpha, rho, lr = [s.clone() for s in STARTS], [torch.zeros_like(s) for s in STARTS], 0.3, 30.0, 0.9
    optimizer = ClippedScion(
        groups(STARTS), lr=lr, clip=rho, momentum=1 - alpha, constrained=True, short_step=short_step
    )
    lengths = []
    for step in range(30):
        d = [alpha * g + (1 - alpha) * old for g, old in zip(gradients(step % 3), d, strict=True)]
        v = [old - r * norm.lmo(each) for old, each, (norm, r) in zip(x, d, NORMS, strict=True)]
        gap = sum(float((a * b).sum()) for a, b in zip(d, v, strict=True))
        size = max(float(norm.norm(each)) / r for each, (norm, r) in zip(v, NORMS, strict=True))
        assert gap >= -1e-9 and size <= 2 + 1e-9  # the Wolfe gap; V2's denominator dominates V1's
        eta = min(rho, gap / {"plain": 1, "ball": 4, "norm": size**2}[short_step])
        x = [old - lr / rho * eta * each for old, each in zip(x, v, strict=True)]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, gradients(step % 3), strict=True):
            parameter.grad = gradient
        optimizer.step()
        lengths.append(optimizer.last_clip_fraction)
        for parameter, expected, (norm, r) in zip(parameters, x, NORMS, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-10)
            assert float(norm.norm(parameter.detach())) <= r * (1 + 1e-9)
    assert min(lengths) < 1


@pytest.mark.parametrize("constrained", [False, True])
def test_a_tiny_threshold_is_scion(constrained: bool) -> None:
    scion = run(Scion(groups(STARTS), lr=0.05, momentum=0.9, constrained=constrained), range(8))
    clipped = run(ClippedScion(groups(STARTS), lr=0.05, clip=1e-12, momentum=0.9, constrained=constrained), range(8))
    for a, b in zip(clipped, scion, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_a_huge_threshold_is_steepest_descent_of_the_product_norm() -> None:
    gamma, rho = 1e-3, 1e9
    found = run(ClippedScion(groups(STARTS), lr=gamma * rho, clip=rho, momentum=0.0), range(1))
    sharp = [r * norm.sharp(g) / norm.dual(g) for g, (norm, r) in zip(gradients(0), NORMS, strict=True)]
    dual = sum(r * norm.dual(g) for g, (norm, r) in zip(gradients(0), NORMS, strict=True))
    for a, x, v in zip(found, STARTS, sharp, strict=True):
        torch.testing.assert_close(a, x - gamma * dual * v, rtol=1e-9, atol=1e-9)


def test_numbers_of_the_sheet() -> None:
    cases = [
        (EXACT, [[0.70873162, -0.26640389, 0.30560617], [-0.15984233, 0.38200771, 0.70369539]], 13.703002785),
        (
            rms_to_rms(at_least_one=True, base=Spectral()),
            [[0.86801542, -0.32627679, 0.37428959], [-0.19576608, 0.46786198, 0.86184732]],
            16.782682384,
        ),
        (one_to_max(), [[1 / 3, 0, 1 / 3], [0, 1 / 3, 1 / 3]], 8.0),
        (rms_to_max(), [[0.34641016, 0, 0.46188022], [0, 0.2220578, 0.53293871]], 10.392304845),
        (one_to_rms(), [[1.41421356, 0, 0.4472136], [0, 1.41421356, 1.34164079]], 29.202252319),
    ]
    for norm, direction, dual in cases:
        parameter = Parameter(torch.zeros_like(D))
        parameter.grad = D.clone()
        optimizer = ClippedScion([parameter], lr=1.0, clip=1e-9, norm=norm, momentum=0.0)
        optimizer.step()
        torch.testing.assert_close(-parameter.detach(), parameter.new_tensor(direction), rtol=0, atol=1e-8)
        assert optimizer.last_dual_norm == pytest.approx(dual, abs=1e-8)
    vector = Parameter(torch.zeros(2, dtype=torch.float64))
    vector.grad = torch.tensor([3.0, -4.0], dtype=torch.float64)
    optimizer = ClippedScion([vector], lr=1.0, clip=1e-9, momentum=0.0)
    optimizer.step()
    assert (-vector.detach()).tolist() == pytest.approx([0.84852814, -1.13137085], abs=1e-8)
    assert optimizer.last_dual_norm == pytest.approx(7.071067812, abs=1e-9)


@pytest.mark.parametrize(("clip", "step"), [(2.0, (-0.12, -0.16)), (10.0, (-0.3, -0.4))])
def test_clipped_gradient_descent(clip: float, step: tuple[float, float]) -> None:
    parameter = Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    from steepest.geometry import Euclidean

    ClippedScion([parameter], lr=0.1 * clip, clip=clip, norm=Euclidean(), momentum=0.0).step()
    assert parameter.tolist() == pytest.approx(list(step), abs=1e-12)


def test_the_dual_norm_counts_the_direction_that_is_used() -> None:
    """Five inexact iterations: the pairing differs from the nuclear norm, and is that of the update."""
    parameter = Parameter(torch.zeros(6, 9, dtype=torch.float64))
    parameter.grad = randn(6, 9)
    norm = Spectral(method="newton_schulz", coefficients="jordan", steps=5)
    optimizer = ClippedScion([parameter], lr=1.0, clip=1e-9, norm=norm, momentum=0.0)
    optimizer.step()
    nuclear = float(torch.linalg.svdvals(randn(6, 9)).sum())
    assert optimizer.last_dual_norm == pytest.approx(-float((parameter.detach() * randn(6, 9)).sum()), rel=1e-12)
    assert 0.6 * nuclear < optimizer.last_dual_norm < 1.3 * nuclear
    assert abs(optimizer.last_dual_norm - nuclear) > 1e-3


@pytest.mark.parametrize("constrained", [False, True])
def test_zero_gradients_move_nothing(constrained: bool) -> None:
    optimizer = ClippedScion(groups(STARTS), lr=0.5, clip=1.0, constrained=constrained)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(
        torch.equal(p.detach(), x)
        for p, x in zip((p for g in optimizer.param_groups for p in g["params"]), STARTS, strict=True)
    )
    assert optimizer.last_dual_norm == optimizer.last_clip_fraction == 0


def test_layers_without_gradient_are_left_out_of_the_sum() -> None:
    alone = ClippedScion(groups(STARTS)[:1], lr=0.1, clip=50.0)
    every = ClippedScion(groups(STARTS), lr=0.1, clip=50.0)
    for optimizer in (alone, every):
        optimizer.param_groups[0]["params"][0].grad = gradients(0)[0]
        optimizer.step()
    assert alone.last_dual_norm == every.last_dual_norm
    assert torch.equal(alone.param_groups[0]["params"][0], every.param_groups[0]["params"][0])
    assert torch.equal(every.param_groups[1]["params"][0].detach(), STARTS[1])


def test_a_bad_gradient_stops_or_skips_every_layer() -> None:
    for nonfinite in ("raise", "skip"):
        optimizer = ClippedScion(groups(STARTS), lr=0.1, clip=5.0, nonfinite=nonfinite)  # pyright: ignore[reportArgumentType]
        for group, gradient in zip(optimizer.param_groups, gradients(0), strict=True):
            group["params"][0].grad = gradient
        optimizer.param_groups[2]["params"][0].grad[0] = math.inf
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert all(torch.equal(g["params"][0].detach(), x) for g, x in zip(optimizer.param_groups, STARTS, strict=True))
        assert math.isnan(optimizer.last_dual_norm) and math.isnan(optimizer.last_clip_fraction)


@pytest.mark.parametrize("constrained", [False, True])
def test_resume_is_exact(constrained: bool) -> None:
    options: dict[str, Any] = {"lr": 0.05, "clip": 20.0, "constrained": constrained}
    whole = run(ClippedScion(groups(STARTS), **options), range(10))
    first = ClippedScion(groups(STARTS), **options)
    middle = run(first, range(5))
    second = ClippedScion(groups(middle), **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(run(second, range(5, 10)), whole, strict=True))
    third = copy.deepcopy(first)
    assert math.isnan(third.last_dual_norm)
    assert all(torch.equal(a, b) for a, b in zip(run(third, range(5, 10)), whole, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": 0.1, "clip": 0.0}, ValueError, "clip .*positive.*0.0"),
        ({"lr": 0.1, "clip": -1.0}, ValueError, "clip .*positive.*-1.0"),
        ({"lr": 0.1, "clip": math.inf}, ValueError, "clip .*finite.*inf"),
        ({"lr": 0.1, "clip": math.nan}, ValueError, "clip .*finite.*nan"),
        ({"lr": 0.1, "clip": "1"}, TypeError, "clip .*number.*'1'"),
        ({"lr": 0.0, "clip": 1.0}, ValueError, "lr .*positive.*0.0"),
        ({"lr": -0.1, "clip": 1.0}, ValueError, "lr .*-0.1"),
        ({"lr": 0.1, "clip": 1.0, "momentum": 1.0}, ValueError, "momentum .*1.0"),
        ({"lr": 0.1, "clip": 1.0, "momentum": -0.1}, ValueError, "momentum .*-0.1"),
        ({"lr": 0.1, "clip": 1.0, "radius": 0.0}, ValueError, "radius .*positive.*0.0"),
        ({"lr": 1.1, "clip": 1.0, "constrained": True}, ValueError, "lr .*at most 1.*1.1"),
        ({"lr": 0.1, "clip": 1.0, "short_step": "ball"}, ValueError, "constrained .*short_step='ball'"),
        ({"lr": 0.1, "clip": 1.0, "short_step": "other"}, ValueError, "short_step .*'other'"),
        ({"lr": 0.1, "clip": 1.0, "norm": "bias"}, ValueError, "norm .*'bias'"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ClippedScion([Parameter(0.01 * randn(3, 3))], **options)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ({"momentum_form": "heavy_ball"}, "momentum_form .*heavy-ball"),
        ({"weight_decay": 0.1, "constrained": True}, "weight_decay .*constrained"),
        ({"lr": 0.0}, "lr .*positive"),
    ],
)
def test_wrong_groups_are_named(group: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ClippedScion([{"params": [Parameter(0.01 * randn(3, 3))], **group}], lr=0.1, clip=1.0)


def test_a_vector_under_a_spectral_norm_is_named() -> None:
    with pytest.raises(ValueError, match=r"parameter gain \(shape \(4,\)\)"):
        ClippedScion([("gain", Parameter(randn(4)))], lr=0.1, clip=1.0, norm="spectral")


def test_sparse_gradients_are_refused() -> None:
    parameter = Parameter(torch.zeros(3, 2))
    optimizer = ClippedScion([parameter], lr=0.1, clip=1.0)
    parameter.grad = torch.eye(3)[:, :2].to_sparse()
    with pytest.raises(TypeError, match="dense"):
        optimizer.step()


def test_a_schedule_may_start_from_zero() -> None:
    optimizer = ClippedScion(groups(STARTS), lr=0.1, clip=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    assert all(torch.equal(a, b) for a, b in zip(run(optimizer, range(1)), STARTS, strict=True))
    schedule.step()
    assert not torch.equal(run(optimizer, range(1))[0], STARTS[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_half_precision(dtype: torch.dtype, constrained: bool, scale: float) -> None:
    starts = [x.to(dtype) for x in STARTS]
    optimizer = ClippedScion(groups(starts), lr=0.05, clip=20.0, constrained=constrained)
    for step in range(3):
        for group, gradient in zip(optimizer.param_groups, gradients(step), strict=True):
            group["params"][0].grad = (scale * gradient).to(dtype)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for g in optimizer.param_groups for p in g["params"])
    assert 0 <= optimizer.last_clip_fraction <= 1


# ---- the ball


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_draws_lie_on_the_ball(shape: tuple[int, int]) -> None:
    out, into = shape
    generator = torch.Generator().manual_seed(0)
    for norm, check in {
        "spectral": lambda w: torch.linalg.svdvals(w) / math.sqrt(out / into),
        "spectral_input": lambda w: torch.linalg.svdvals(w) / max(1.0, math.sqrt(out / into)),
        "sign": lambda w: w.abs() * into,
        "column": lambda w: w.norm(dim=0) / math.sqrt(out),
        "row": lambda w: w.norm(dim=1) * math.sqrt(into),
    }.items():
        weight = Parameter(torch.zeros(shape, dtype=torch.float64))
        init_on_ball_([{"params": [weight], "norm": norm, "radius": 3.0}], generator)
        values = check(weight.detach())
        torch.testing.assert_close(values, torch.full_like(values, 3.0), rtol=1e-12, atol=0)


def test_kernels_experts_and_fused_blocks_are_drawn_block_by_block() -> None:
    kernel, experts, fused = (Parameter(torch.zeros(s)) for s in ((8, 3, 2, 2), (3, 4, 6), (10, 4)))
    entries = [{"params": [kernel, experts]}, {"params": [fused], "split": (6, 4)}]
    init_on_ball_(entries, torch.Generator().manual_seed(1))
    assert "lr" not in entries[0], "the caller's groups stay as they are"
    assert torch.allclose(torch.linalg.svdvals(kernel.detach().flatten(1)), torch.tensor(math.sqrt(8 / 3) / 4))
    assert torch.allclose(torch.linalg.svdvals(experts.detach()), torch.tensor(math.sqrt(4 / 6)))
    first, second = fused.detach().split((6, 4))
    assert torch.allclose(torch.linalg.svdvals(first), torch.tensor(math.sqrt(6 / 4)))
    assert torch.allclose(torch.linalg.svdvals(second), torch.tensor(1.0))
    ratios = ball_ratios(Scion([{**entry} for entry in entries]))
    assert list(ratios) == ["0.0", "0.1", "1.0"] and all(r == pytest.approx(1, rel=1e-5) for r in ratios.values())


def test_draws_are_seeded_and_leave_gains() -> None:
    gain, bias = Parameter(torch.ones(4)), Parameter(torch.tensor([0.1, -0.2, 0.3]))
    weights = [Parameter(torch.zeros(3, 5)) for _ in range(2)]
    for weight in weights:
        init_on_ball_([weight, gain, bias], torch.Generator().manual_seed(7))
    assert torch.equal(*weights) and torch.equal(gain.detach(), torch.ones(4)) and not bias.detach().any()
    large = Parameter(torch.full((4,), 5.0))
    init_on_ball_([large])
    assert torch.allclose(large.detach(), torch.ones(4))


@pytest.mark.parametrize("norm", ["spectral", "spectral_input", "sign", "column", "row"])
def test_projection_is_the_nearest_point_of_the_ball(norm: str) -> None:
    x = 3 * randn(4, 6)
    weight = Parameter(x.clone())
    project_([{"params": [weight], "norm": norm}])
    y = weight.detach()
    ratio = next(iter(ball_ratios([{"params": [weight], "norm": norm}]).values()))
    assert ratio == pytest.approx(1, rel=1e-9)
    for seed in range(200):  # the variational inequality of a projection: <x - y, z - y> <= 0 for z in the ball
        other = Parameter(randn(4, 6, seed=seed))
        init_on_ball_([{"params": [other], "norm": norm}], torch.Generator().manual_seed(seed))
        assert float(((x - y) * (other.detach() - y)).sum()) <= 1e-9
    again = y.clone()
    project_([{"params": [weight], "norm": norm}])
    torch.testing.assert_close(weight.detach(), again, rtol=0, atol=1e-12)


def test_projection_leaves_what_is_inside() -> None:
    inside, outside = Parameter(0.01 * randn(4, 6)), Parameter(9 * randn(4, 6))
    before = inside.detach().clone()
    optimizer = ClippedScion([inside, outside], lr=0.1, clip=1.0)
    project_(optimizer)
    assert torch.equal(inside.detach(), before) and ball_ratios(optimizer)["0.1"] == pytest.approx(1)


@pytest.mark.parametrize("make", [Scion, lambda p, **o: ClippedScion(p, 0.1, 1.0, **o)])
def test_a_start_outside_is_warned_of_with_its_ratio(make: Any) -> None:
    inside, far = Parameter(0.01 * randn(4, 4)), Parameter(7 * torch.eye(4))
    with pytest.warns(UserWarning, match=r"1 parameters .*far, has 7 times.*init_on_ball_.*project_") as caught:
        make([("near", inside), ("far", far)], constrained=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make([("near", inside), ("far", far)])
        project_([far])
        optimizer = make([("near", inside), ("far", far)], constrained=True)
    with pytest.warns(UserWarning, match=r"late, has 2 times"):
        optimizer.add_param_group({"params": [("late", Parameter(2 * torch.eye(3)))]})


def test_balls_belong_to_the_engine() -> None:
    weight = Parameter(randn(3, 3))
    with pytest.raises(ValueError, match=r"target .*SGD"):
        project_(torch.optim.SGD([weight], lr=0.1))
    assert ball_ratios(Muon([weight]))["0.0"] == pytest.approx(float(torch.linalg.matrix_norm(weight.detach(), 2)))


# ---- presets


@pytest.mark.filterwarnings("ignore:.*lie outside the balls")
def test_presets_of_architectures() -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=17, context=8, width=8, heads=2, layers=1))
    for model, preset in ((gpt, "language"), (ResNet(), "images"), (MLP([8, 16, 16, 3]), "dense")):
        for constrained, table in ((False, SCION_RADII), (True, CONSTRAINED_RADII)):
            found = scion_param_groups(model, constrained=constrained)
            named = scion_param_groups(model, preset, constrained=constrained)  # pyright: ignore[reportArgumentType]
            assert {group["radius"] for group in found} <= set(table[preset])
            assert [group["radius"] for group in found] == [group["radius"] for group in named]
            built = build(model, "clipped_scion", constrained=constrained, lr=0.01).param_groups
            assert [(g["norm"], g["radius"]) for g in built] == [(g["norm"], g["radius"]) for g in found]
            scion = build(model, "scion", constrained=constrained, lr=0.01).param_groups
            assert [(g["norm"], g["radius"]) for g in built] == [(g["norm"], g["radius"]) for g in scion]
    assert {g["radius"] for g in scion_param_groups(MLP([8, 16, 16, 3]), radii=(2, 3, 4))} == {2, 3, 4}
    with pytest.raises(ValueError, match="preset: expected auto, language, images, dense; got 'x'"):
        scion_param_groups(MLP([8, 16, 3]), "x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="radii: expected three positive"):
        scion_param_groups(MLP([8, 16, 3]), radii=(1, 0, 1))


def test_groups_of_a_model_of_unknown_roles_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thing = Parameter(torch.zeros(4, 4))

    with pytest.raises(ValueError, match=r"role of 1 parameters cannot be told.*(\n.*)*thing"):
        scion_param_groups(Odd())
