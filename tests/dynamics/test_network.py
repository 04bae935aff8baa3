"""Steepest descent of networks in the log domain against plain formulas."""

import pytest
import torch

from steepest import run
from steepest.dynamics import LinearSteepestDescent, NetworkSteepestDescent, max_margin, spectral_margins, two_layer
from steepest.geometry import Euclidean, Max, Spectral


def start(seed: int = 0, *batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((9, 5), (3, 9))
    return [torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), torch.arange(12) % 3


@pytest.mark.parametrize("norm", [Max(), Euclidean(), Spectral()])
def test_steps_are_those_of_the_chain_rule(norm) -> None:
    features, labels = data()
    hidden, output = start()
    descent = NetworkSteepestDescent(two_layer, [hidden, output], features, labels, 0.1, norm=norm)
    for t in range(20):
        active = (features @ hidden.mT).sigmoid()
        wrong = (active @ output.mT).softmax(-1) - torch.nn.functional.one_hot(labels, 3)
        to_output = wrong.mT @ active
        to_hidden = ((wrong @ output) * active * (1 - active)).mT @ features
        size = 0.1 / (t + 1) ** 0.5
        hidden, output = hidden - size * norm.direction(to_hidden), output - size * norm.direction(to_output)
        descent.step()
    for found, expected in zip(descent.weights, (hidden, output), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_without_hidden_layers_it_is_the_linear_descent(momentum: float) -> None:
    features, labels = data()
    features = features + 5 * torch.eye(3, 5, dtype=torch.float64)[labels]
    start = 2000 * max_margin(features, labels, "spectral").weight
    linear = LinearSteepestDescent(features, labels, 0.1, norm="spectral", momentum=momentum, weight=start)
    network = NetworkSteepestDescent(
        lambda weights, x: x @ weights[0].mT,
        [start],
        features,
        labels,
        0.1,
        momentum=momentum,
    )
    for _ in range(50):
        linear.step()
        found = network.step()
    assert float(found["loss"]) == 0
    assert float(network.margin) > 1000
    torch.testing.assert_close(network.weights[0].detach() - start, linear.weight - start, rtol=1e-7, atol=1e-9)


def test_a_batch_of_networks_is_each_network_alone() -> None:
    features, labels = data()
    together = NetworkSteepestDescent(two_layer, start(0, 2), features, labels, 0.2, norm=["max", "spectral"])
    alone = NetworkSteepestDescent(
        two_layer, [w[1] for w in start(0, 2)], features, labels, 0.2, norm=["max", "spectral"]
    )
    for _ in range(20):
        both = together.step()
        one = alone.step()
    assert float(both["margin[1]"]) == pytest.approx(float(one["margin"]), rel=1e-8)
    for found, expected in zip(together.weights, alone.weights, strict=True):
        torch.testing.assert_close(found[1].detach(), expected.detach(), rtol=1e-8, atol=1e-10)


def test_spectral_margins_divide_by_spectral_norms() -> None:
    weights = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 0.5]))]
    output, both = spectral_margins(torch.tensor(6.0), weights)
    assert (float(output), float(both)) == (3.0, 2.0)


def test_a_run_resumes_with_the_same_bits(tmp_path) -> None:
    features, labels = data()

    def make() -> NetworkSteepestDescent:
        return NetworkSteepestDescent(two_layer, start(), features, labels, 0.2, momentum=0.5)

    whole, other, path = make(), make(), tmp_path / "run.ckpt"
    run(whole, 20, progress=False)
    run(make(), 8, checkpoint=path, progress=False)
    run(other, 20, checkpoint=path, progress=False)
    for found, expected in zip(other.weights, whole.weights, strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="state must have the entries"):
        make().load_state_dict({"weights": [torch.zeros(2, 2)]})


def test_bad_arguments_are_named() -> None:
    features, labels = data()
    with pytest.raises(ValueError, match="weights must be matrices"):
        NetworkSteepestDescent(two_layer, [], features, labels)
    with pytest.raises(ValueError, match="one for each of the 2 weights"):
        NetworkSteepestDescent(two_layer, start(), features, labels, norm=["max"])
    with pytest.raises(ValueError, match="lr must be a positive number"):
        NetworkSteepestDescent(two_layer, start(), features, labels, lr=0.0)
    with pytest.raises(ValueError, match="momentum must lie"):
        NetworkSteepestDescent(two_layer, start(), features, labels, momentum=1.0)
    with pytest.raises(ValueError, match="loss must be one of"):
        NetworkSteepestDescent(two_layer, start(), features, labels, loss="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must lie in"):
        NetworkSteepestDescent(two_layer, start(), features, labels + 1)
    with pytest.raises(ValueError, match="features must be finite"):
        NetworkSteepestDescent(two_layer, start(), features * torch.nan, labels)


def test_a_saturated_network_says_so_before_anything_changes() -> None:
    features, labels = data()
    weights = start()
    weights[0] *= 1e6
    descent = NetworkSteepestDescent(two_layer, weights, features, labels)
    with pytest.raises(FloatingPointError, match="the gradient of weight 0 is zero"):
        descent.step()
    assert torch.equal(descent.weights[0].detach(), weights[0])
    assert torch.equal(descent.weights[1].detach(), weights[1])
