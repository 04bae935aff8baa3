"""Freon, Kaon and the controls: plain loops, special cases, resume, bad input."""

import io
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from steepest.geometry import ChaoticSpectrum, RandomSpectrum, SpectralPower, matrix_power_direction
from steepest.optim import Freon, Kaon, Mixed, Muon, SpectralControl, build

SHAPES = [(6, 9), (6, 9), (9, 6), (5, 5)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_parameters() -> list[Parameter]:
    return [Parameter(randn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]


def train(optimizer, parameters, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = randn(*parameter.shape, seed=100 * step + i + 7)
        optimizer.step()


MAKERS = {
    "freon": lambda p, **k: Freon(p, 0.1, 2 / 3, **k),
    "kaon": lambda p, **k: Kaon(p, 0.1, **k),
    "random": lambda p, **k: SpectralControl(p, 0.1, generator=torch.Generator().manual_seed(5), **k),
    "reversed": lambda p, **k: SpectralControl(p, 0.1, "reversed", **k),
    "truncated": lambda p, **k: SpectralControl(p, 0.1, "truncated", **k),
}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("normalize", ["mean", "schatten", "none"])
def test_freon_is_the_loop_of_the_sheet(nesterov: bool, normalize) -> None:
    parameters, plain = make_parameters(), [p.detach().clone() for p in make_parameters()]
    optimizer = Freon(parameters, 0.1, 0.75, 0.9, nesterov, normalize=normalize, weight_decay=0.2)
    momenta = [torch.zeros_like(p) for p in plain]
    for step in range(3):
        train(optimizer, parameters, 1, step)
        for p, m, parameter in zip(plain, momenta, parameters, strict=True):
            g = parameter.grad
            assert g is not None
            m.mul_(0.9).add_(g)
            d = matrix_power_direction(g + 0.9 * m if nesterov else m, 0.75, "svd", normalize=normalize)
            p.mul_(1 - 0.1 * 0.2).sub_(0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5 * d)
    for p, parameter in zip(plain, parameters, strict=True):
        torch.testing.assert_close(parameter.detach(), p)


def test_one_half_is_muon_and_zero_is_normalised_sgd() -> None:
    ours, muons, zeros, sgds = (make_parameters() for _ in range(4))
    train(Freon(ours, 0.1, 0.5, nesterov=True), ours, 3)
    train(Muon(muons, 0.1, weight_decay=0.0, method="svd"), muons, 3)
    train(Freon(zeros, 0.1, 0.0, momentum=0.0, normalize="none", adjust_lr_fn="none"), zeros, 3)
    train(torch.optim.SGD(sgds, 0.1), sgds, 3)
    for a, b in zip(ours + zeros, muons + sgds, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_bit_exact(name: str) -> None:
    whole, parts = make_parameters(), make_parameters()
    train(MAKERS[name](whole), whole, 4)
    first = MAKERS[name](parts)
    train(first, parts, 2)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    copies = [Parameter(p.detach().clone()) for p in parts]
    second = MAKERS[name](copies)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(second, copies, 2, 2)
    for a, b in zip(whole, copies, strict=True):
        assert torch.equal(a, b)


def test_a_resumed_control_takes_the_seed_of_the_saved_one() -> None:
    whole, copies = make_parameters(), make_parameters()
    first = MAKERS["random"](whole)
    second = SpectralControl(copies, 0.1, generator=torch.Generator().manual_seed(99))
    second.load_state_dict(first.state_dict())
    train(first, whole, 2)
    train(second, copies, 2)
    for a, b in zip(whole, copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MAKERS)
def test_one_at_a_time_is_the_same(name: str) -> None:
    together, alone = make_parameters(), make_parameters()
    train(MAKERS[name](together), together, 3)
    train(MAKERS[name](alone, foreach=False), alone, 3)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_random_spectra_differ_by_matrix_and_step_and_not_by_what_else_moves() -> None:
    parameters, fewer = make_parameters(), make_parameters()
    optimizer = SpectralControl(parameters, 1.0, momentum=0.0, adjust_lr_fn="none")
    same = randn(6, 9)
    updates = []
    for _ in range(2):
        before = [p.detach().clone() for p in parameters]
        for p in parameters[:2]:
            p.grad = same
        optimizer.step()
        updates += [old - p.detach() for old, p in zip(before, parameters, strict=True)][:2]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(updates[i], updates[j], atol=1e-3)
    second = SpectralControl(fewer, 1.0, momentum=0.0, adjust_lr_fn="none")
    fewer[1].grad = same
    second.step()
    torch.testing.assert_close(make_parameters()[1] - fewer[1].detach(), updates[1])


def test_skipped_steps_draw_nothing() -> None:
    parameters = make_parameters()
    optimizer = SpectralControl(parameters, 0.1, nonfinite="skip")
    parameters[0].grad = torch.full((6, 9), math.nan, dtype=torch.float64)
    optimizer.step()
    assert optimizer.param_groups[0]["draws"] == 0
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("name", MAKERS)
def test_zero_nonfinite_vectors_and_kernels(name: str) -> None:
    weight, kernel = Parameter(randn(4, 6)), Parameter(randn(8, 3, 2, 2))
    before = weight.detach().clone()
    optimizer = MAKERS[name]([weight, kernel])
    weight.grad, kernel.grad = torch.zeros_like(weight), torch.randn_like(kernel)
    optimizer.step()
    assert torch.equal(weight, before)
    weight.grad = torch.full_like(weight, math.nan)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(weight, before)
    with pytest.raises(ValueError, match="norm of matrices"):
        MAKERS[name]([Parameter(torch.zeros(3))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("name", MAKERS)
def test_low_precision_and_scales(name: str, dtype: torch.dtype, scale: float) -> None:
    weight = Parameter(torch.zeros(6, 9, dtype=dtype))
    optimizer = MAKERS[name]([weight])
    weight.grad = (randn(6, 9) * scale).to(dtype)
    optimizer.step()
    assert bool(weight.isfinite().all())
    assert 1e-3 < float(weight.float().norm()) < 2


def test_directions_are_settings_of_groups() -> None:
    groups = [{"params": [Parameter(randn(4, 4))], "norm": SpectralPower(0.25)}, {"params": [Parameter(randn(4, 4))]}]
    optimizer = Freon(groups, 0.1, 0.75)
    assert [group["norm"].c for group in optimizer.param_groups] == [0.25, 0.75]
    assert isinstance(Kaon([Parameter(randn(2, 2))]).param_groups[0]["norm"], ChaoticSpectrum)
    assert isinstance(SpectralControl([Parameter(randn(2, 2))]).param_groups[0]["norm"], RandomSpectrum)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda p: Freon(p, 0.1, 1.1), ValueError, "c must lie"),
        (lambda p: Freon(p, 0.1, 1.0, normalize="schatten"), ValueError, "c = 1"),
        (lambda p: Freon(p, -0.1), ValueError, "lr"),
        (lambda p: Freon(p, 0.1, momentum=1.0), ValueError, "momentum"),
        (lambda p: SpectralControl(p, 0.1, cast(Any, "shuffled")), ValueError, "kind"),
        (lambda p: SpectralControl(p, 0.1, generator=cast(Any, 3)), TypeError, "generator"),
        (lambda p: Kaon(p, 0.1, steps=0), ValueError, "steps"),
    ],
)
def test_bad_settings(make, kind, message: str) -> None:
    with pytest.raises(kind, match=message):
        make([Parameter(randn(3, 3))])


def test_build_knows_them() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.Linear(32, 3)
    )
    freon, kaon = build(model, "freon", lr=0.01, c=0.75), build(model, "kaon", lr=0.01)
    model(torch.randn(4, 8)).square().mean().backward()
    for optimizer in (freon, kaon):
        optimizer.step()
        assert isinstance(optimizer, Mixed)
        assert "adamw" in optimizer.parts
