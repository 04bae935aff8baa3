import math

import pytest
import torch

from steepest.dynamics._derivatives import Derivatives
from steepest.studies import discretisation_drift as study
from steepest.studies._base import Run

CLAIMS = {claim.id: claim for claim in study.CLAIMS}


def test_claims_are_those_of_the_sheet_in_order() -> None:
    ids = [claim.id for claim in study.CLAIMS]
    assert ids == sorted(ids) and {"C1", "C2", "C4", "C5"} <= set(ids)


def test_the_random_loss_is_no_quadratic_and_takes_complex_points() -> None:
    loss, start = study.random_loss(torch.Generator().manual_seed(0))
    real, continued = Derivatives(loss, start), Derivatives(loss, torch.complex(start, torch.zeros_like(start)))
    torch.testing.assert_close(continued.gradient.real, real.gradient)
    assert float(real.third_product(real.gradient).norm()) > 0.1


def test_slope() -> None:
    assert study._slope((0.1, 0.05, 0.025), [3 * h**2.5 for h in (0.1, 0.05, 0.025)]) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("quarter", "half", "verdict"),
    [
        ([0.1, 0.01], [0.02, 0.01], "holds"),
        ([0.09, 0.01], [0.02, 0.01], "does not hold here"),
        ([math.nan, 1], [1, 1], "holds"),
    ],
)
def test_an_unstable_power_may_diverge(quarter: list[float], half: list[float], verdict: str) -> None:
    assert CLAIMS["C5"].verdict({"p 0.25": quarter, "p 0.5": half}) == verdict


def test_judge_of_the_training_claim() -> None:
    names = [*(f"lr {lr:g}" for lr in study.FIXED), "p 1", "p 0.5", "p 0.25"]
    losses = {name: [0.02] for name in names} | {"lr 2": [2.302], "p 1": [0.1], "p 0.5": [0.005]}
    good = {
        "loss": losses,
        "highest over first loss": {name: [1.0] for name in names},
        "mean rate": {name: [1.6] for name in names},
    }
    assert CLAIMS["C4"].verdict(good) == "holds"
    assert CLAIMS["C4"].verdict({**good, "loss": losses | {"p 0.5": [0.011]}}) == "partly"
    assert CLAIMS["C4"].verdict({**good, "loss": losses | {"lr 2": [math.inf]}}) == "holds"


def test_training_ends_lower_with_the_adapted_rate_than_it_begins() -> None:
    ends = study._train(Run("smoke"), 0, {"p": 0.5})
    assert ends["loss"] < 2.3 and ends["highest over first loss"] == 1
