"""`PolyStepTrainer` is `PolyStep` on its batches, and passes the checks of a stepper."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.data import Epochs
from steepest.gradient_free.network_loss import NetworkLoss
from steepest.gradient_free.polystep import PolyStep
from steepest.gradient_free.polystep_trainer import PolyStepTrainer
from steepest.loop import stepper_checks

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()


def pairs(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.to(dtype).split(8), Y.split(8), strict=True))


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():  # torch draws initial values
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    return model


def make(dtype: torch.dtype, generator: torch.Generator, **options: Any) -> PolyStepTrainer:
    return PolyStepTrainer(
        network(dtype), cross_entropy, pairs(dtype), step_radius=0.3, momentum=0.5, absorb_every=4,
        generator=generator, **options,
    )  # fmt: skip


CHECKS = dict(stepper_checks(make))


@pytest.mark.parametrize("name", CHECKS)
def test_stepper(name: str) -> None:
    CHECKS[name]()


def test_it_is_the_optimizer_on_its_batches() -> None:
    trainer = make(torch.float64, torch.Generator().manual_seed(1))
    model = network()
    optimizer = PolyStep(
        model, step_radius=0.3, momentum=0.5, absorb_every=4, generator=torch.Generator().manual_seed(1)
    )
    loss = NetworkLoss(model, cross_entropy)
    for step in range(7):
        metrics = trainer.step()
        assert torch.equal(metrics["loss"], optimizer.step(loss.on(*pairs()[step % 3])))
    assert metrics["evaluations"] == optimizer.evaluations
    assert all(torch.equal(trainer.weights[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["loader", "epochs"])
def test_other_batches(kind: str) -> None:
    def batches() -> Any:
        if kind == "epochs":
            return Epochs(X, Y, 8, torch.Generator().manual_seed(3))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)

    first = PolyStepTrainer(network(), cross_entropy, batches(), step_radius=0.3)
    first.run(6, progress=False)
    again = PolyStepTrainer(network(), cross_entropy, batches(), step_radius=0.3)
    again.load_state_dict(first.state_dict())
    for trainer in (first, again):
        trainer.run(3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.weights.values(), again.weights.values(), strict=True))


def test_bad_batches() -> None:
    for batches, error in ((3, TypeError), ([], ValueError)):
        with pytest.raises(error, match="batches must"):
            PolyStepTrainer(network(), cross_entropy, batches)  # pyright: ignore[reportArgumentType]
    ended = PolyStepTrainer(network(), cross_entropy, iter(pairs()), step_radius=0.1)
    ended.run(3, progress=False)
    with pytest.raises(ValueError, match="has ended"):
        ended.step()
