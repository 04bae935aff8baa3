"""Scion without state is Scion: the gradients hold the average, across resume too."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from steepest.geometry import Spectral
from steepest.geometry.scaled import rms_to_rms
from steepest.optim import Scion, ScionLight, Sharp

EXACT = rms_to_rms(base=Spectral())
SHAPES = [(4, 6), (3, 4, 5), (5,)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(starts: list[Tensor]) -> list[dict[str, Any]]:
    norms = (EXACT, "sign", "vector")
    return [{"params": [Parameter(x.clone())], "norm": n, "radius": 2.0} for x, n in zip(starts, norms, strict=True)]


STARTS = [0.1 * randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]


def run(optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        optimizer.zero_grad()
        loss = sum((p * randn(*p.shape, seed=10 * step + i)).sum() for i, p in enumerate(parameters))
        torch.as_tensor(loss).backward()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_it_is_scion(constrained: bool, momentum: float) -> None:
    options: dict[str, Any] = {"lr": 0.05, "momentum": momentum, "constrained": constrained}
    light = ScionLight(groups(STARTS), **options)
    plain = run(Scion(groups(STARTS), **options), range(12))
    for a, b in zip(run(light, range(12)), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert not light.state


def test_momentum_of_a_group() -> None:
    entries = [{**group, "momentum": m} for group, m in zip(groups(STARTS), (0.9, 0.5, 0.1), strict=True)]
    copied = [{**e, "params": [Parameter(e["params"][0].detach().clone())]} for e in entries]
    for a, b in zip(run(ScionLight(entries, 0.05), range(6)), run(Scion(copied, 0.05), range(6)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_resume_is_exact() -> None:
    whole = run(ScionLight(groups(STARTS), 0.05), range(10))
    first = ScionLight(groups(STARTS), 0.05)
    middle = run(first, range(5))
    state = copy.deepcopy(first.state_dict())
    second = ScionLight(groups(middle), 0.05)
    second.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(run(second, range(5, 10)), whole, strict=True))
    assert not second.state
    other = ScionLight(groups([0.1 * randn(*shape[::-1]) for shape in SHAPES]), 0.05)
    with pytest.raises(ValueError, match="gradient of shape"):
        other.load_state_dict(state)


def test_a_parameter_without_gradient_stays() -> None:
    optimizer = ScionLight(groups(STARTS), 0.05)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 6, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(optimizer.param_groups[1]["params"][0].detach(), STARTS[1])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[1]["params"][0].grad is None


@pytest.mark.parametrize(
    ("options", "match"),
    [({"momentum": 0.0}, "momentum .*above 0"), ({"momentum": 1.0}, "momentum"), ({"nonfinite": "skip"}, "nonfinite")],
)
def test_wrong_settings_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ScionLight([Parameter(randn(3, 3))], **options)
    with pytest.raises(TypeError, match="step_rule"):
        ScionLight([Parameter(randn(3, 3))], step_rule=Sharp())  # pyright: ignore[reportCallIssue]


def test_a_bad_gradient_stops_it() -> None:
    optimizer = ScionLight(groups(STARTS), 0.05)
    optimizer.param_groups[2]["params"][0].grad = torch.full((5,), torch.nan, dtype=torch.float64)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(optimizer.param_groups[2]["params"][0].detach(), STARTS[2])
