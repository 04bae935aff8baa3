"""The batched CartPole is the classic one."""

import math

import pytest
import torch
from torch import Tensor, nn

from steepest.nn import Population, QuantizedLinear, SignLinear
from steepest.studies._cartpole import Rollouts, advance, policy, returns, starts, upright

D = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(state: list[float], action: int) -> list[float]:
    """The equations of motion, solved as a linear system for the two accelerations."""
    x, v, angle, spin = state
    force = 10.0 if action else -10.0
    # (M + m) a + m l w' cos - m l w^2 sin = F and l w' 4/3 + a cos = g sin, a of the cart, w' of the pole.
    matrix = torch.tensor([[1.1, 0.05 * math.cos(angle)], [math.cos(angle), 0.5 * 4 / 3]], dtype=D)
    right = torch.tensor([force + 0.05 * spin**2 * math.sin(angle), 9.8 * math.sin(angle)], dtype=D)
    a, turn = torch.linalg.solve(matrix, right).tolist()
    return [x + 0.02 * v, v + 0.02 * a, angle + 0.02 * spin, spin + 0.02 * turn]


def test_physics() -> None:
    state = torch.randn(20, 4, dtype=D, generator=generator())
    action = torch.arange(20) % 2
    found = advance(state, action)
    for before, a, after in zip(state.tolist(), action.tolist(), found.tolist(), strict=True):
        assert after == pytest.approx(by_hand(before, a), rel=1e-12)
    edge = torch.tensor([[2.39, 0, 0, 0], [2.41, 0, 0, 0], [0, 0, 0.209, 0], [0, 0, -0.21, 0]])
    assert upright(edge).tolist() == [True, False, True, False]
    assert float(starts(1000, generator()).abs().max()) <= 0.05


@pytest.mark.parametrize("weights", ["float", "int8", "binary"])
def test_returns_are_those_of_single_episodes(weights: str) -> None:
    model = policy(weights, generator())  # type: ignore[arg-type]
    population = Population(model)
    many = population.vector() + 0.3 * torch.randn(12, population.size, generator=generator(1))
    first = starts(3, generator(2))
    found = returns(population, many, first, steps=80)

    def episode(vector: Tensor, state: Tensor) -> int:
        population.write(vector)
        for step in range(80):
            with torch.no_grad():
                state = advance(state, model(state).argmax(-1))
            if not bool(upright(state)):
                return step + 1
        return 80

    assert found.tolist() == [[episode(vector, state) for state in first] for vector in many]
    assert len(set(found.flatten().tolist())) > 3


def test_rollouts_share_their_starts() -> None:
    population = Population(policy("float", generator()))
    objective = Rollouts(population, 4, generator(3), steps=60)
    points = population.vector().expand(2, 5, -1)
    values = objective(points)
    assert values.shape == (2, 5)
    assert bool((values == values[0, 0]).all())
    assert -60 <= float(values[0, 0]) <= -8


def test_policies() -> None:
    assert isinstance(policy("int8", generator())[0], QuantizedLinear)
    assert isinstance(policy("binary", generator())[2], SignLinear)
    assert isinstance(policy("float", generator())[0], nn.Linear)
    a, b = (Population(policy("float", generator(4))).vector() for _ in range(2))
    assert torch.equal(a, b)
