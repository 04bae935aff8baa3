import math

import pytest
import torch

from steepest.dynamics import DiagonalLinearNet, LinearStability
from steepest.studies import dynamical_stability as study


def claim(name: str):
    return next(each for each in study.CLAIMS if each.id == name)


def test_the_data_have_the_moments_of_the_set_up() -> None:
    x, beta, _ = study.diagonal_data(0)
    assert x.shape == (300, 1000)
    assert float(x.abs().max()) <= 1
    assert float(x.square().mean()) == pytest.approx(study.SECOND_MOMENT, rel=0.01)
    assert beta.nonzero().flatten().tolist() == [0, 1, 2]
    x, y, test_x, test_y, _ = study.relu_data(0)
    assert torch.allclose(x.norm(dim=1), torch.full((300,), 10.0, dtype=x.dtype))
    # A unit teacher sees a standard normal number in the limit of high dimension.
    assert float(test_y.mean()) == pytest.approx(10 / math.sqrt(2 * math.pi), rel=0.02)
    assert len(y) == 300 and test_x.shape == (10_000, 100)


def test_the_test_error_is_that_of_fresh_data() -> None:
    x, beta, generator = study.diagonal_data(0, 20_000, 6)
    net = DiagonalLinearNet(6, generator=generator, dtype=x.dtype)
    measured = float((net(x) - x @ beta).square().mean().detach())
    assert study._test_error(net, beta) == pytest.approx(measured, rel=0.03)


def test_traces_of_the_sparse_target_are_near_its_l1_norm() -> None:
    x, beta, _ = study.diagonal_data(1)
    trace = LinearStability(DiagonalLinearNet.balanced(beta).jacobian(x)).trace
    assert trace == pytest.approx(2 * study.SECOND_MOMENT * 3, rel=0.1)


def test_one_bad_seed_fails_a_claim() -> None:
    rates = {name: [100.0] * 3 for name in study.GD_CLAIMED}
    good = {"SGD": {"0.06": [0.1] * 3, "0.01": [10.0] * 3}, "GD": rates}
    assert claim("C4").verdict(good) == "holds"
    bad = {"SGD": {"0.06": [0.1, 0.1, 0.11], "0.01": [10.0] * 3}, "GD": rates}
    assert claim("C4").verdict(bad) == "partly"
    assert claim("C4").verdict({**bad, "GD": {**rates, "0.2": [100.0, 100.0, 111.0]}}) == "does not hold here"
    balance = {"SGD": {"0.06": [1.1, 1.2, 1.3]}, "GD": {name: [2.0] * 3 for name in study.GD_CLAIMED}}
    assert claim("C5").verdict({**balance, "start": [2.0, 2.03, 1.99]}) == "holds"
    assert claim("C5").verdict({**balance, "start": [2.0, 2.03, 1.5]}) == "partly"


def test_a_network_that_diverged_fails_and_does_not_stop_the_study() -> None:
    net = DiagonalLinearNet.of([math.inf, 1.0], [1.0, 1.0])
    found = study._sharpness(net, torch.ones(3, 2), torch.zeros(3), True)
    assert found["trace"] == found["threshold"] == math.inf
