import pytest
import torch

from steepest.studies import variational_eos as study


def test_the_digits_are_split_once() -> None:
    (x, y), (test_x, test_y) = study.images(400)
    assert x.shape == (400, 64)
    assert len(x) + len(test_x) == 1797 == len(y) + len(test_y)
    assert float(x.min()) == pytest.approx(-0.3)
    assert float(test_x.max()) == pytest.approx(0.7)
    assert torch.equal(study.images(300)[0][0], x[:300])


def test_the_loss_is_half_the_squared_error_per_example() -> None:
    assert float(study.loss_fn(torch.full((4, 10), 2.0), torch.zeros(4, 10))) == pytest.approx(20.0)


def test_the_root_solves_the_cubic() -> None:
    s = torch.logspace(-12, 12, 25, dtype=torch.float64)
    y = study.cubic_root(s)
    assert float(((y**3 + s / 4 * (y - 1)) / (3 * y**2 + s / 4) / y).abs().max()) < 1e-15


def test_verdicts_follow_the_criteria() -> None:
    claims = {claim.id: claim for claim in study.CLAIMS}
    good = [{"relative sharpness": s, "factor": f} for s, f in ((0.64, 0.66), (0.4, 0.3), (0.2, 0.15), (0.1, 0.12))]
    assert claims["C3"].verdict({"lr 0.1": [good]}) == "holds"
    far = [{**good[0], "factor": 0.75}, *good[1:]]
    assert claims["C3"].verdict({"lr 0.1": [far]}) == "partly"
    assert claims["C5"].verdict({"student_t": [[4.0], [5.8], [7.0], [7.7]]}) == "holds"
    assert claims["C5"].verdict({"student_t": [[4.0], [3.8], [7.0], [7.7]]}) == "does not hold here"
    assert claims["C6"].verdict({"adam": [1.03], "ivon": [[0.1], [0.4], [0.9]]}) == "holds"
    assert claims["C6"].verdict({"adam": [1.03], "ivon": [[0.1], [0.4], [1.1]]}) == "partly"
    accuracy = {"0": [0.9, 0.91, 0.92], "0.01": [0.92, 0.93, 0.94], "0.02": [0.9, 0.9, 0.92]}
    assert claims["C7"].verdict({"accuracy": accuracy}) == "partly"
