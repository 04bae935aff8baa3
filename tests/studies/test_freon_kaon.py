import math

import pytest
import torch

from steepest.studies import freon_kaon
from steepest.studies._base import Run
from steepest.studies._freon_kaon_training import RULES


def claim(name: str):
    return next(claim for claim in freon_kaon.CLAIMS if claim.id == name)


def losses(**values: float | None) -> dict[str, dict[str, float | None]]:
    return {name: {"loss": loss, "accuracy": 0.95} for name, loss in values.items()}


def test_theory_holds_at_every_scale() -> None:
    for name in ("C1", "C3", "C4"):
        assert claim(name).verdict(freon_kaon.measure(name, Run("smoke"))) == "holds"
    chaos = freon_kaon.measure("C2", Run("smoke"))
    assert list(claim("C2").judge(chaos)) == [True, True, False, False, True, True]
    # The sizes reported are those of the third of the six singular values.
    assert chaos["of the first to the last"][2] == pytest.approx([7e-5, 1.6e-5], rel=0.05)


@pytest.mark.parametrize(
    ("kaon", "random", "verdict"),
    [(0.014, 0.01, "holds"), (0.016, 0.01, "partly"), (None, 0.01, "partly"), (0.015, math.inf, "partly")],
)
def test_kaon_is_compared_with_muon(kaon, random, verdict: str) -> None:
    assert claim("C5").verdict(losses(muon=0.01, kaon=kaon, random=random)) == verdict


def test_divergence_loses() -> None:
    exponents = {"0": 0.03, "1/4": 0.02, "1/2": 0.01, "2/3": 0.01, "3/4": None, "1": None}
    assert claim("C6").verdict(losses(**exponents)) == "holds"
    assert claim("C6").verdict(losses(**{**exponents, "2/3": 0.011})) == "does not hold here"
    assert claim("C8").verdict(losses(**{"truncated": None, "0": None})) == "does not hold here"


def test_the_rules_of_the_line_searches_descend() -> None:
    g = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(float((g * rule(g)).sum()) > 0 for rule in RULES.values())
