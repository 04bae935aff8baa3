"""Muon: as torch.optim.Muon under its settings, as an exact float64 loop under ours, and the known traps of peers."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from steepest.geometry import polar, polar_error
from steepest.optim import Muon, Sharp

TORCH: dict[str, Any] = {
    "ns_coefficients": "jordan",
    "normalize": "frobenius",
    "method": "newton_schulz",
    "dtype": torch.bfloat16,
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(12, 32, bias=False), nn.Tanh(), nn.Linear(32, 32, bias=False), nn.Tanh())
    net.append(nn.Linear(32, 6, bias=False))
    for index, parameter in enumerate(net.parameters()):
        parameter.data = randn(*parameter.shape, seed=index, dtype=dtype) / parameter.shape[1] ** 0.5
    return net


def gradients(net: nn.Module, step: int) -> Tensor:
    dtype = next(net.parameters()).dtype
    net.zero_grad()
    loss = (net(randn(64, 12, seed=step, dtype=dtype)) - randn(64, 6, seed=step + 500, dtype=dtype)).square().mean()
    loss.backward()
    return loss.detach()


def jordan(m: Tensor) -> Tensor:
    """torch's iteration in the arithmetic of `m`."""
    x = m / m.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def torch_factor(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    return 0.2 * max(rows, columns) ** 0.5 if adjust_lr_fn == "match_rms_adamw" else max(1.0, rows / columns) ** 0.5


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_follows_torch_on_a_small_net(nesterov: bool, weight_decay: float, adjust_lr_fn: Any) -> None:
    """Both round to bfloat16; the distance between them is measured in torch's own distance from exact arithmetic."""
    ours, theirs, exact = small_net(), small_net(), small_net(torch.float64)
    options = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    a = Muon(ours.parameters(), adjust_lr_fn=adjust_lr_fn, **options, **TORCH)
    b = torch.optim.Muon(theirs.parameters(), adjust_lr_fn=adjust_lr_fn, **options)
    buffers = [torch.zeros_like(parameter) for parameter in exact.parameters()]
    for step in range(25):
        losses = [gradients(net, step) for net in (ours, theirs, exact)]
        torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(losses[0], losses[2].float(), rtol=2e-3, atol=1e-5)
        a.step()
        b.step()
        with torch.no_grad():
            for parameter, buffer in zip(exact.parameters(), buffers, strict=True):
                buffer.lerp_(parameter.grad, 0.1)
                m = parameter.grad.lerp(buffer, 0.9) if nesterov else buffer
                parameter.mul_(1 - 0.01 * weight_decay)
                parameter.sub_(0.01 * torch_factor(adjust_lr_fn, *parameter.shape) * jordan(m))
        with torch.no_grad():
            for mine, their, true in zip(ours.parameters(), theirs.parameters(), exact.parameters(), strict=True):
                rounding = float((their - true).norm())
                assert float((mine - true).norm()) < 2.5 * rounding
                assert float((mine - their).norm()) < 3.5 * rounding


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_momenta_are_torchs_bit_for_bit(nesterov: bool, shape: tuple[int, int]) -> None:
    mine, theirs = Parameter(randn(*shape, dtype=torch.float32)), Parameter(randn(*shape, dtype=torch.float32))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.1, "nesterov": nesterov}
    a, b = Muon([mine], **options, **TORCH), torch.optim.Muon([theirs], **options)
    for step in range(20):
        mine.grad, theirs.grad = (randn(*shape, seed=step + 1, dtype=torch.float32) for _ in range(2))
        a.step()
        b.step()
        assert torch.equal(a.state[mine]["momentum_buffer"], b.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize(
    ("momentum_form", "nesterov", "weight_decay", "adjust_lr_fn"),
    [*itertools.product(["ema", "heavy_ball"], [True, False], [0.0, 0.1], ["original", "match_rms_adamw", "spectral"])],
)
def test_exact_path_is_the_float64_loop(
    momentum_form: Any, nesterov: bool, weight_decay: float, adjust_lr_fn: Any
) -> None:
    net, other = small_net(torch.float64), small_net(torch.float64)
    lr, mu = 0.02, 0.9
    optimizer = Muon(
        net.parameters(),
        lr,
        weight_decay,
        mu,
        nesterov,
        adjust_lr_fn=adjust_lr_fn,
        method="svd",
        momentum_form=momentum_form,
    )
    buffers = [torch.zeros_like(parameter) for parameter in other.parameters()]
    weight = 1 - mu if momentum_form == "ema" else 1.0
    for step in range(50):
        gradients(net, step)
        optimizer.step()
        gradients(other, step)
        with torch.no_grad():
            for parameter, b in zip(other.parameters(), buffers, strict=True):
                g, (rows, columns) = parameter.grad, parameter.shape
                b.mul_(mu).add_(weight * g)
                m = mu * b + weight * g if nesterov else b
                u, _, vh = torch.linalg.svd(m, full_matrices=False)
                factor = {
                    "original": max(1, rows / columns) ** 0.5,
                    "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
                    "spectral": (rows / columns) ** 0.5,
                }[adjust_lr_fn]
                parameter.copy_(parameter - lr * weight_decay * parameter - lr * factor * u @ vh)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["eigh", "newton_schulz", "gram", "auto"])
def test_every_method_reaches_the_exact_step(method: Any) -> None:
    weights = []
    for options in ({"method": "svd"}, {"method": method, "ns_steps": 20}):
        parameter = Parameter(randn(12, 20))
        optimizer = Muon([parameter], 0.1, **options)
        for step in range(3):
            parameter.grad = randn(12, 20, seed=step + 1)
            optimizer.step()
        weights.append(parameter.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_the_default_step_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """At default settings, directions above 1e-3 of the largest get a length in the coefficients' range."""
    parameter = Parameter(torch.zeros(shape))
    parameter.grad = randn(*shape, dtype=torch.float32)
    Muon([parameter], 1.0, weight_decay=0.0, adjust_lr_fn="none").step()
    assert polar_error(-parameter.detach(), parameter.grad) < 0.17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["auto", "svd", "newton_schulz", "gram", "eigh"])
def test_momentum_buffer_is_never_normalised_in_place(dtype: torch.dtype, method: Any) -> None:
    """Without Nesterov the direction is taken of the buffer itself; the step must leave it as the momentum."""
    for shape in ((8, 5), (5, 8), (6, 6)):
        parameter = Parameter(randn(*shape, dtype=dtype))
        optimizer = Muon([parameter], 0.02, nesterov=False, method=method)
        buffer = torch.zeros(shape, dtype=dtype)
        for step in range(3):
            parameter.grad = 7 * randn(*shape, seed=step + 1, dtype=dtype)
            optimizer.step()
            buffer.lerp_(parameter.grad, 1 - 0.95)
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)


@pytest.mark.parametrize("normalize", ["schatten4", "frobenius", "aol"])
@pytest.mark.parametrize("coefficients", ["polar_express", "jordan", "quintic", "cans", "deepseek", "cubic"])
def test_near_rank_one_gradients_are_descended(coefficients: str, normalize: Any) -> None:
    """The largest singular value is normalised to nearly one, where some tables turn negative."""
    parameter = Parameter(torch.zeros(10, 16))
    parameter.grad = 5 * torch.outer(randn(10), randn(16, seed=1)).float() + 1e-4 * randn(10, 16, dtype=torch.float32)
    Muon([parameter], 1.0, weight_decay=0.0, ns_coefficients=coefficients, normalize=normalize).step()
    u, _, vh = torch.linalg.svd(parameter.grad.double())
    assert 0.6 < -float(u[:, 0] @ parameter.detach().double() @ vh[0]) < 1.35


@pytest.mark.parametrize("spectrum", [(1.0,), (1.0, 1e-3), (1.0, 1.0), (1.0, 0.5, 0.1)])
def test_the_aol_table_never_flips_an_update(spectrum: tuple[float, ...]) -> None:
    u, v = torch.linalg.qr(randn(8, 8))[0], torch.linalg.qr(randn(12, 12, seed=1))[0]
    k = len(spectrum)
    parameter = Parameter(torch.zeros(8, 12))
    parameter.grad = (u[:, :k] @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ v[:k]).float()
    Muon([parameter], 1.0, weight_decay=0.0, ns_coefficients="aol", normalize="aol").step()
    gains = torch.linalg.eigvalsh(-(u[:, :k].T @ parameter.detach().double() @ v[:k].T))
    assert float(gains.min()) > 0


METHODS = ["auto", "svd", "eigh", "newton_schulz", "gram"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (5, 4, 3, 3)])
def test_zero_gradients_move_nothing(method: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    parameter = Parameter(randn(*shape, dtype=dtype))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    Muon([parameter], 1.0, weight_decay=0.0, method=method).step()
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-20),
        (torch.float32, 1e-36),
        (torch.float32, 1e30),
        (torch.float32, 1e37),
        (torch.float64, 1e-290),
        (torch.float64, 1e290),
        (torch.bfloat16, 1e-20),
        (torch.bfloat16, 1e-36),
        (torch.bfloat16, 1e37),
        (torch.float16, 1e-3),
        (torch.float16, 1e4),
    ],
)
def test_the_step_does_not_depend_on_the_gradients_size(method: Any, dtype: torch.dtype, size: float) -> None:
    gradient = randn(6, 9, dtype=torch.float64)
    steps = []
    for scale in (1.0, size):
        parameter = Parameter(torch.zeros(6, 9, dtype=dtype))
        parameter.grad = (gradient * scale).to(dtype)
        Muon([parameter], 1.0, weight_decay=0.0, momentum=0.0, method=method).step()
        steps.append(parameter.detach().double())
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}[dtype]
    torch.testing.assert_close(*steps, rtol=0, atol=tolerance)
    assert 0.8 < float(torch.linalg.svdvals(steps[1]).max()) < 1.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_follow_float32(dtype: torch.dtype) -> None:
    steps = []
    for kind in (torch.float32, dtype):
        parameter = Parameter(torch.zeros(16, 24, dtype=kind))
        optimizer = Muon([parameter], 0.05)
        for step in range(4):
            parameter.grad = randn(16, 24, seed=step, dtype=dtype).to(kind)
            optimizer.step()
        steps.append(parameter.detach().float())
    assert float((steps[0] - steps[1]).norm() / steps[0].norm()) < 0.03


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_with_a_zero_and_a_rank_one_matrix(method: Any) -> None:
    gradient = torch.stack([randn(4, 6), torch.zeros(4, 6), torch.outer(randn(4), randn(6))]).to(torch.float64)
    parameter = Parameter(torch.zeros(3, 4, 6, dtype=torch.float64))
    parameter.grad = gradient
    Muon([parameter], 1.0, weight_decay=0.0, ns_steps=20, method=method).step()
    torch.testing.assert_close(-parameter.detach()[0], polar(gradient[0], "svd"), rtol=0, atol=1e-8)
    assert not parameter.detach()[1].any()
    torch.testing.assert_close(
        -parameter.detach()[2], gradient[2] / torch.linalg.matrix_norm(gradient[2], 2), rtol=0, atol=1e-8
    )


def test_sharp_steps_have_nuclear_length() -> None:
    parameter = Parameter(torch.zeros(4, 6, dtype=torch.float64))
    parameter.grad = randn(4, 6)
    Muon([parameter], 0.1, weight_decay=0.0, momentum=0.0, method="svd", step_rule=Sharp()).step()
    u, s, vh = torch.linalg.svd(parameter.grad, full_matrices=False)
    torch.testing.assert_close(parameter.detach(), -0.1 * s.sum() * u @ vh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    def advance(net: nn.Module, optimizer: Muon, steps: range) -> None:
        for step in steps:
            gradients(net, step)
            optimizer.step()

    whole, first, second = small_net(dtype), small_net(dtype), small_net(dtype)
    advance(whole, Muon(whole.parameters()), range(10))
    optimizer = Muon(first.parameters())
    advance(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["net"])
    resumed = Muon(second.parameters())
    resumed.load_state_dict(saved["optimizer"])
    advance(second, resumed, range(5, 10))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ns_coefficients": "jordon"}, ValueError, "coefficients .*jordan.*'jordon'"),
        ({"ns_coefficients": (1.0, 2.0)}, ValueError, "coefficients"),
        ({"ns_coefficients": []}, ValueError, "coefficients"),
        ({"ns_coefficients": (1.0, float("nan"), 0.0)}, ValueError, "coefficients .*finite"),
        ({"ns_steps": 0}, ValueError, "steps .*0"),
        ({"ns_steps": 100}, ValueError, "steps .*100"),
        ({"ns_steps": 2.5}, ValueError, "steps .*2.5"),
        ({"method": "qr"}, ValueError, "method .*newton_schulz.*'qr'"),
        ({"normalize": "l2"}, ValueError, "normalize .*frobenius.*'l2'"),
        ({"dtype": "bfloat16"}, TypeError, "dtype .*'bfloat16'"),
        ({"dtype": torch.int32}, TypeError, "dtype .*int32"),
        ({"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn .*'rms'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Muon([Parameter(torch.zeros(3, 4))], **options)


def test_vectors_belong_to_another_optimizer() -> None:
    with pytest.raises(ValueError, match=r"matrices.*\(7,\).*another optimizer"):
        Muon(nn.Linear(3, 7).parameters())


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_continues_from_a_state_of_torch_muon(adjust_lr_fn: str | None) -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    gradients = torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(1))

    def stepped(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, pieces: torch.Tensor) -> None:
        for gradient in pieces:
            parameter.grad = gradient.clone()
            optimizer.step()

    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, adjust_lr_fn=adjust_lr_fn)
    stepped(optimizer, theirs, gradients[:3])
    ours = torch.nn.Parameter(theirs.detach().clone())
    continued = Muon(
        [ours], ns_coefficients="jordan", normalize="frobenius", method="newton_schulz", dtype=torch.bfloat16
    )
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert continued.param_groups[0]["lr"] == 0.02 and continued.param_groups[0]["momentum"] == 0.9
    assert continued.param_groups[0]["adjust_lr_fn"] == (adjust_lr_fn or "original")
    stepped(optimizer, theirs, gradients[3:])
    stepped(continued, ours, gradients[3:])
    assert torch.equal(continued.state[ours]["momentum_buffer"], optimizer.state[theirs]["momentum_buffer"])
    assert torch.allclose(ours, theirs, atol=5e-3)
