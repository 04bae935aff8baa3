"""CartPole as in Gymnasium's classic control, batched: many policies, each in the same episodes, at once."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steepest.nn.population import Population
from steepest.nn.quantized import QuantizedLinear, SignLinear

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
LIMIT, ANGLE = 2.4, 12 * 2 * math.pi / 360
Weights = Literal["float", "int8", "binary", "binary throughout"]


def advance(state: Float[Tensor, "*n 4"], action: Int[Tensor, "*n"]) -> Float[Tensor, "*n 4"]:
    """One explicit Euler step; the state is position, velocity, angle, angular velocity; action 1 pushes right.

    Source: Barto, Sutton and Anderson 1983, with the constants and equations of Gymnasium's CartPole-v1.
    """
    x, v, angle, spin = state.unbind(-1)
    force = (2 * action - 1).to(state) * FORCE
    sine, cosine = angle.sin(), angle.cos()
    total = CART + POLE
    push = (force + POLE * HALF_LENGTH * spin.square() * sine) / total
    turn = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4 / 3 - POLE * cosine.square() / total))
    pull = push - POLE * HALF_LENGTH * turn * cosine / total
    return torch.stack((x + SECONDS * v, v + SECONDS * pull, angle + SECONDS * spin, spin + SECONDS * turn), -1)


def upright(state: Float[Tensor, "*n 4"]) -> Bool[Tensor, "*n"]:
    """Whether the episode goes on: the cart within 2.4, the pole within 12 degrees."""
    return (state[..., 0].abs() <= LIMIT) & (state[..., 2].abs() <= ANGLE)


def starts(count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Float[Tensor, "count 4"]:
    """Starting states, each entry uniform in [-0.05, 0.05]."""
    return (torch.rand(count, 4, generator=generator) * 0.1 - 0.05).to(dtype)


def policy(
    weights: Weights, generator: torch.Generator, hidden: int = 16, scale: float = 0.3, grid: float = 0.05
) -> nn.Sequential:
    """4 - hidden - 2 with tanh; the larger output is the action. All parameters start as scale N(0, 1).

    Args:
        weights: "float"; "int8": on a grid of integers times `grid`; "binary": signs, with real biases;
            "binary throughout": biases are signs too.
        generator: of the initial values.
        hidden: neurons.
        scale: of the initial values.
        grid: the distance of two int8 weights.
    """

    def layer(width: int, out: int) -> nn.Module:
        if weights == "int8":
            return QuantizedLinear(width, out, step=grid)
        if weights == "float":
            return nn.Linear(width, out)
        return SignLinear(width, out, binary_bias=weights == "binary throughout")

    model = nn.Sequential(layer(4, hidden), nn.Tanh(), layer(hidden, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
def returns(
    population: Population, weights: Float[Tensor, "b d"], first: Float[Tensor, "s 4"], steps: int = 500
) -> Float[Tensor, "b s"]:
    """The return of every candidate from every starting state: steps until the episode ends, at most `steps`."""
    total = torch.zeros(len(weights), len(first), dtype=first.dtype)
    left = torch.arange(len(weights))
    net, state = population.bind(weights), first.expand(len(weights), *first.shape)
    alive = torch.ones(len(weights), len(first), dtype=torch.bool)
    for step in range(steps):
        total[left] += alive
        state = advance(state, net(state).argmax(-1))
        alive = alive & upright(state)
        if step % 10 == 9:
            going = alive.any(1)
            if not bool(going.any()):
                break
            if int(going.sum()) < 0.8 * len(left):  # candidates whose episodes have all ended cost nothing more
                left, state, alive = left[going], state[going], alive[going]
                net = population.bind(weights[left])
    return total


class Rollouts:
    """The objective of a search: minus the mean return, over episodes that are new in each call.

    All candidates of a call see the same starting states.

    Args:
        population: the policy.
        episodes: in each call.
        generator: of the starting states.
        steps: of an episode at most.
    """

    def __init__(self, population: Population, episodes: int, generator: torch.Generator, steps: int = 500) -> None:
        self.population, self.episodes, self.generator, self.steps = population, episodes, generator, steps

    def __call__(self, weights: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Minus the mean returns."""
        first = starts(self.episodes, self.generator)
        flat = weights.reshape(-1, weights.shape[-1])
        return -returns(self.population, flat, first, self.steps).mean(1).reshape(weights.shape[:-1]).to(weights)
