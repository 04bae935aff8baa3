import pytest
import torch

from steepest.nn import make_balancer
from steepest.studies import phi_balancing as study


def claim(name: str) -> study.Claim:
    return next(claim for claim in study.CLAIMS if claim.id == name)


def cell(method: str, strength: float, loss: float, violation: float, std: float = 0.1) -> dict:
    return {"method": method, "strength": strength, "loss": loss, "violation": violation, "violation std": std}


def test_every_method_is_tuned_equally() -> None:
    assert len({len(strengths) for strengths in study.STRENGTHS.values()}) == 1
    assert len({len(trials) for trials in study.TEXT_TRIALS.values()}) == 1


def test_pairs_are_matched_in_balance() -> None:
    cells = [
        cell("phi", 0.1, 0.90, 0.55),
        cell("phi", 0.3, 1.00, 0.30),
        cell("switch", 0.03, 1.00, 0.50),
        cell("switch", 0.1, 1.00, 0.31),
        cell("switch", 0.3, 1.00, 0.10),
    ]
    pairs = study._matched(cells)
    assert [(pair["phi"], pair["matched"]) for pair in pairs] == [(0.1, True), (0.3, True), (0.3, False)]
    measured = {"matched with switch": {"batch 8": pairs}}
    assert claim("C3").verdict(measured) == "partly"
    assert claim("C3").verdict({"matched with switch": {"batch 8": pairs[2:]}}) == "does not hold here"
    assert claim("C3").verdict({"matched with switch": {"batch 8": pairs[:1]}}) == "holds"


def test_the_most_even_strengths_are_compared() -> None:
    cells = [
        cell("phi", 0.1, 1, 0.5),
        cell("phi", 1, 1, 0.3, 0.2),
        cell("loss_free", 1e-3, 1, 0.4),
        cell("switch", 1, 1, 0.4),
    ]
    assert claim("C4").verdict({"most even": {"batch 8": study._most_even(cells)}}) == "partly"


@pytest.mark.parametrize(("loss", "verdict"), [(1.0, "holds"), (1.95, "partly")])
def test_a_lower_loss_must_stand_out_of_the_spread(loss: float, verdict: str) -> None:
    other = {"loss": [1.9, 2.0, 2.1], "violation": [0.2] * 3}
    phi = {"loss": [loss] * 3, "violation": [0.22] * 3}
    assert claim("C6").verdict({"final": {"phi": phi, "switch": other, "loss_free": other}}) == verdict


def test_the_mixture_sends_each_point_to_one_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    model = study.Mixture(make_balancer("none", 8), generator)
    x, y = study.Clusters(generator).sample(50)
    outputs, _ = model(x)
    assert outputs.shape == y.shape
    p = (x @ model.router.weight.T).softmax(-1)
    for row, point in enumerate(x):
        e = int(p[row].argmax())
        hidden = (point @ model.first[e] + model.first_bias[e, 0]).relu()
        expected = p[row, e] * (hidden @ model.second[e] + model.second_bias[e, 0])
        torch.testing.assert_close(outputs[row], expected, rtol=1e-4, atol=1e-5)
