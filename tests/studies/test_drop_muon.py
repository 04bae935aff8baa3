import pytest
import torch

from steepest.studies import drop_muon
from steepest.studies._drop_muon_training import step_gigaflops


def test_the_cost_of_a_step() -> None:
    """Worked numbers, in units of 1e9 operations, for starts at layers 1 to 4."""
    costs = [step_gigaflops(start, 700) for start in range(4)]
    assert costs == pytest.approx([10.20, 8.52, 5.20, 3.33], abs=0.005)
    assert sum(costs) / 4 == pytest.approx(6.81, abs=0.005)


def test_full_updates_solve_a_separable_quadratic() -> None:
    model, constants = drop_muon._problem("separable", torch.Generator().manual_seed(3))
    ratio, size = drop_muon._full(model, constants)
    assert ratio == pytest.approx(1, abs=1e-14) and size < 1e-14


def runs(costs: dict[str, dict[str, float]], seeds: int = 4) -> dict:
    return {
        "runs": {
            name: {rate: [{"gigaflops": cost, "iterations": cost}] * seeds for rate, cost in rates.items()}
            for name, rates in costs.items()
        }
    }


@pytest.mark.parametrize(
    ("full", "uniform", "seeds", "verdict"),
    [
        (140, 100, 4, "holds"),
        (120, 100, 4, "partly"),
        (105, 100, 4, "does not hold here"),
        (140, 100, 3, "does not hold here"),
    ],
)
def test_the_gain_compares_the_best_rates(full: float, uniform: float, seeds: int, verdict: str) -> None:
    claim = next(claim for claim in drop_muon.CLAIMS if claim.id == "C3")
    measured = runs({"full": {"0.05": full, "0.1": 900}, "uniform": {"0.05": 800, "0.1": uniform}}, seeds)
    assert claim.verdict(measured) == verdict
