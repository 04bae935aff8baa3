"""The DQN on Catch: the game, and the stacked networks against the library's own normalisation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.nn import spectral_norm
from steepest.studies._catch import ACTIONS, COLUMNS, ROWS, Adam, Catch, Networks, greedy, train


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_a_ball_is_caught_by_who_stands_below() -> None:
    columns = torch.tensor([0, 2, 4])
    game = Catch(columns)
    for step in range(ROWS - 1):
        assert game.observe().shape == (3, ROWS * COLUMNS)
        rewards, over = game.step(torch.tensor([0, 1, 0]), torch.tensor([3, 3, 3]))
        last = step == ROWS - 2
        assert over.tolist() == [last] * 3
        assert rewards.tolist() == ([1, 1, -1] if last else [0, 0, 0])
    assert game.ball.tolist() == [3, 3, 3]
    assert game.paddle.tolist() == [COLUMNS // 2] * 3


@pytest.mark.parametrize("mode", ["none", "sn", "divout", "divgrad", "muleps"])
def test_stacks_train_as_the_library_does(mode: Any) -> None:
    networks = Networks.draw(generators(2), 2, mode)
    networks.weights = [(3 * w.detach().double()).requires_grad_() for w in networks.weights]
    left, _, right = torch.linalg.svd(networks.weights[2].detach())
    networks.u, networks.v = left[..., 0], right[..., 0, :]
    rates = torch.tensor([1e-3, 1e-3, 1e-2, 1e-2], dtype=torch.float64)
    adam = Adam(networks, rates, 1e-3)
    models = []
    for run in range(4):
        layers = [nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, ACTIONS)]
        model = nn.Sequential(*layers).double()
        with torch.no_grad():
            for parameter, stack in zip(model.parameters(), networks.weights, strict=True):
                parameter.copy_(stack[run].view(parameter.shape))
        norm = None if mode == "none" else spectral_norm(model, mode, layers=[-2])
        optimizer = torch.optim.Adam(model.parameters(), float(rates[run]), eps=1e-3)
        if mode == "muleps":
            assert norm is not None
            norm.attach(optimizer)
        if norm is not None:
            norm.refresh()  # so that the first training forward iterates, as in the stack
        models.append((model, optimizer))

    def data(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        shapes = ((4, 8, 50), (4, 8, 3))
        x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return x, y

    for step in range(6):
        x, y = data(step)
        networks.iterate()
        adam.step((networks(x) - y).square().mean((1, 2)).sum())
        for run, (model, optimizer) in enumerate(models):
            optimizer.zero_grad()
            (model(x[run]) - y[run]).square().mean().backward()
            optimizer.step()
    x, _ = data(9)
    for run, (model, _) in enumerate(models):
        torch.testing.assert_close(networks(x)[run], model.eval()(x[run]), rtol=1e-6, atol=1e-8)


def test_training_learns_and_is_seeded() -> None:
    first, second = (train("none", [3e-3], generators(2), steps=600) for _ in range(2))
    assert first == second
    assert min(first["greedy"][0]) > 0.6
    untrained = greedy(Networks.draw(generators(2), 1, "none"), torch.rand(2, 200, generator=generators(1)[0]))
    assert max(untrained.tolist()) < 0.6
