import math

import pytest
import torch

from steepest.studies import _clipped_scion_training as training
from steepest.studies import clipped_scion


def judged(claim: str, measured: dict) -> str:
    return next(c for c in clipped_scion.CLAIMS if c.id == claim).verdict(measured)


def test_the_smallest_smoothed_loss() -> None:
    assert pytest.approx(0.5002882, abs=1e-6) == training.SMALLEST_LOSS
    logits = torch.zeros(1, 10, dtype=torch.float64)
    logits[0, 3] = math.log(0.91 / 0.01)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([3]), label_smoothing=0.1)
    assert float(loss) == pytest.approx(training.SMALLEST_LOSS, abs=1e-12)


def test_the_bound_of_the_deterministic_claim() -> None:
    found = clipped_scion._smooth_descent(4000)
    assert found["bound"] == pytest.approx(11.03, abs=0.01)
    assert found["smallest dual norm"]["ucg"] == pytest.approx(6.37, abs=0.01)
    assert judged("C1", found) == "holds"


def test_the_text_is_a_chain_of_order_two() -> None:
    text = training.markov_text(5, 3000, torch.Generator().manual_seed(0), followers=2)
    assert torch.equal(text, training.markov_text(5, 3000, torch.Generator().manual_seed(0), followers=2))
    after: dict[tuple[int, int], set[int]] = {}
    for a, b, c in zip(text.tolist(), text[1:].tolist(), text[2:].tolist(), strict=False):
        after.setdefault((a, b), set()).add(c)
    assert max(map(len, after.values())) <= 2


@pytest.mark.parametrize(
    ("clipped", "large", "verdict"),
    [(0.4, 0.2, "holds"), (0.4, 0.4, "partly"), (0.6, 0.4, "does not hold here"), (None, None, "does not hold here")],
)
def test_the_claim_about_constant_rates(clipped: float | None, large: float | None, verdict: str) -> None:
    measured = {
        "best": {"scion": {"loss": 1.0}, "clipped": {"loss": clipped}},
        "at 2^-3": {"scion": {"loss": 1.0}, "clipped": {"loss": large}},
    }
    assert judged("C5", measured) == verdict


@pytest.mark.parametrize(
    ("ratios", "reached", "verdict"),
    [
        ([0.9, 0.93, 0.5], [True, True, True], "holds"),
        ([0.5, 0.5, 0.94], [True, True, True], "does not hold here"),
        ([0.5, 0.5, 0.9], [True, True, False], "does not hold here"),
    ],
)
def test_every_seed_must_reach_the_loss_in_fewer_steps(ratios: list[float], reached: list[bool], verdict: str) -> None:
    assert judged("C9", {"ratio of steps": ratios, "reached": reached}) == verdict


@pytest.mark.parametrize(
    ("peak", "end", "verdict"),
    [(1e9, 1.8, "holds"), (1e9, None, "holds"), (1e9, 1.79, "partly"), (2.0, 1.9, "partly")],
)
def test_steepest_descent_must_blow_up_and_stay_there(peak: float, end: float | None, verdict: str) -> None:
    measured = {"best middle": 0.1, "tiny": [0.3], "tiny against scion": 0.0, "start": 1.8}
    measured |= {"peak of steepest descent": [peak], "steepest descent": [end]}
    assert judged("C7", measured) == verdict
