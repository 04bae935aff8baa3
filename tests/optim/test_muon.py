"""Muon: as torch.optim.Muon under its settings, as an exact float64 loop under ours. Traps: test_peer_traps.py."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from steepest.geometry import polar_error
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


def test_sharp_steps_have_nuclear_length() -> None:
    parameter = Parameter(torch.zeros(4, 6, dtype=torch.float64))
    parameter.grad = randn(4, 6)
    Muon([parameter], 0.1, weight_decay=0.0, momentum=0.0, method="svd", step_rule=Sharp()).step()
    u, s, vh = torch.linalg.svd(parameter.grad, full_matrices=False)
    torch.testing.assert_close(parameter.detach(), -0.1 * s.sum() * u @ vh, rtol=0, atol=1e-12)


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
