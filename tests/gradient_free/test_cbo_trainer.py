"""Networks trained by a swarm."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.data.batches import Epochs
from steepest.gradient_free import CBOTrainer, consensus_point


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.randn(96, 3, generator=seeded(1))
Y = (X[:, 0] > X[:, 1]).long()
BATCHES = list(zip(X.split(32), Y.split(32), strict=True))


def net() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def trainer(model: nn.Module | None = None, batches: Any = BATCHES, seed: int = 0, **options: Any) -> CBOTrainer:
    given = {"particles": 20, "batch_size": 5, "generator": seeded(seed), **options}
    return CBOTrainer(model or net(), cross_entropy, batches, **given)


def test_it_learns() -> None:
    one = trainer(particles=60)
    result = one.run(8, progress=False)
    assert float((one.model(X).argmax(1) == Y).float().mean()) > 0.85
    assert result.history["evaluations"][-1] == 8 * 3 * 60
    assert one.epochs == 8


def test_after_each_epoch_alpha_doubles_and_sigma_cools() -> None:
    result = trainer().run(4, progress=False)
    assert result.history["alpha"] == [50, 100, 200, 400]
    expected = [math.sqrt(0.4)]
    for epoch in range(1, 4):
        expected.append(expected[-1] * math.log2(epoch + 1) / math.log2(epoch + 2))
    assert result.history["sigma"] == pytest.approx(expected)
    plain = trainer(sharpen=1.0, cool=False).run(2, progress=False)
    assert plain.history["alpha"] == [50, 50]
    assert plain.history["sigma"] == pytest.approx([math.sqrt(0.4)] * 2)


def test_the_model_gets_the_consensus_of_the_last_group() -> None:
    one = trainer(batch_size=None, stagnation=None)
    x = one.swarm.x.clone()
    assert x.shape == (20, 8)
    losses = torch.stack([
        cross_entropy(X[:32] @ w[:6].reshape(2, 3).T + w[6:], Y[:32]) for w in x
    ])  # fmt: skip
    metrics = one.update(X[:32], Y[:32])
    expected = consensus_point(x, losses, 50.0)
    torch.testing.assert_close(one.swarm.consensus, expected, rtol=1e-4, atol=1e-5)
    assert float(metrics["lowest"]) == pytest.approx(float(losses.min()), rel=1e-5)
    one.end_epoch()
    torch.testing.assert_close(one.population.vector(), one.swarm.consensus, rtol=0, atol=0)  # type: ignore[arg-type]


def test_particles_start_around_zero_or_the_model() -> None:
    model = net()
    around = trainer(model, centre="model", std=1e-3)
    assert float((around.swarm.x - around.population.vector()).abs().max()) < 1e-2
    assert float(trainer(particles=4000).swarm.x.mean(0).abs().max()) < 0.1


@pytest.mark.parametrize("reduce", [False, True])
def test_a_resumed_run_is_the_same(reduce: bool) -> None:
    def make(seed: int) -> CBOTrainer:
        return trainer(batches=Epochs(X, Y, 32, seeded(seed)), seed=seed, reduce=reduce, particles=40)

    whole = make(0)
    whole.run(5, progress=False)
    first = make(0)
    first.run(2, progress=False)
    second = make(3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.population.vector(), first.population.vector())
    second.run(3, progress=False)
    assert torch.equal(whole.swarm.x, second.swarm.x)
    assert torch.equal(whole.population.vector(), second.population.vector())
    assert whole.epochs == second.epochs == 5
    assert (whole.swarm.n < 40) == reduce


def test_frozen_parameters_buffers_and_the_mode_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    one = trainer(model, train=True)
    one.step()
    assert model.training
    for name, value in model.state_dict().items():
        searched = name in one.population.names
        assert searched == name.startswith(("1.weight", "1.bias", "3."))
        assert searched or torch.equal(value, before[name])
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_losses_that_are_not_finite() -> None:
    def sometimes(output: Tensor, targets: Tensor) -> Tensor:
        loss = cross_entropy(output, targets)
        return torch.where(loss > 1, math.nan, loss)

    one = CBOTrainer(net(), sometimes, BATCHES, particles=20, generator=seeded())
    one.step()
    assert bool(one.swarm.x.isfinite().all())
    broken = CBOTrainer(net(), lambda output, targets: output.sum() * math.nan, BATCHES, generator=seeded())
    with pytest.raises(RuntimeError, match="no finite objective value"):
        broken.step()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"particles": 1}, ValueError, "particles must be at least 2"),
        ({"batches": 3}, TypeError, "batches must be an iterable"),
        ({"batches": (pair for pair in BATCHES)}, TypeError, "ends after one epoch"),
        ({"centre": "mean"}, ValueError, "centre must be one of"),
        ({"std": 0.0}, ValueError, "std must be positive"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0"),
        ({"sigma": -1.0}, ValueError, "sigma must be at least 0"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"parameters": "missing"}, ValueError, "missing"),
        ({"generator": 1}, TypeError, "generator"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        trainer(**options)


def test_an_epoch_needs_batches() -> None:
    with pytest.raises(RuntimeError, match="call update"):
        trainer(batches=None).step()
    with pytest.raises(RuntimeError, match="empty"):
        trainer(batches=[]).step()
    with pytest.raises(TypeError, match="loss_fn"):
        CBOTrainer(net(), "cross entropy", BATCHES)  # type: ignore[arg-type]
