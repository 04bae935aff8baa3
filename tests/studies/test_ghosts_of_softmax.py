"""The parts of the study that its smoke run leaves out, and its guards."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from steepest.curvature.step_radius import step_radius
from steepest.studies import ghosts_of_softmax as study
from steepest.studies._base import Run
from steepest.studies._ghosts_training import LengthClip, accuracy, data, downhill, moved


@pytest.mark.parametrize("claim", ["C6", "C7"])
def test_claims_measured_on_the_desktop_run(claim: str) -> None:
    found = study.measure(claim, Run("smoke"))
    assert all(math.isfinite(value) for row in found.values() for value in (row if isinstance(row, list) else [row]))


def test_a_move_downhill_is_as_long_as_it_says() -> None:
    x, y, *_ = data(50)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    v, rho = downhill(model, x, y)
    start = [p.detach().clone() for p in model.parameters()]
    before = float(cross_entropy(model(x), y))
    moved(model, start, v, 0.1 * rho)
    assert float(cross_entropy(model(x), y)) < before
    moved(model, start, v, 0.0)
    assert step_radius(model, x, [2 * rho * one for one in v]).ratio == pytest.approx(2, rel=1e-5)


def test_a_clipped_step_has_its_length() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    LengthClip(torch.optim.SGD([parameter], lr=1.0), 0.5).step()
    assert float(parameter.norm()) == pytest.approx(0.5)
    model = nn.Linear(64, 10)
    nn.init.constant_(model.weight, math.nan)
    assert accuracy(model, torch.zeros(3, 64), torch.zeros(3, dtype=torch.int64)) == 0


def test_unknown_claims_are_refused() -> None:
    with pytest.raises(ValueError, match="no claim"):
        study.measure("C99", Run("smoke"))
