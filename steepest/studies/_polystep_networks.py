"""The networks of the PolyStep study on digits: data, and one training function for each method."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.gradient_free import CMAES, SPSA, EvolutionStrategy, Hybrid, NetworkLoss, PolyStep, Search
from steepest.loop.schedules import Linear
from steepest.nn import Population, Staircase, spiking_mlp, surrogate_twin

TRAIN, BATCH = 1347, 128
Batches = Iterator[tuple[Tensor, Tensor]]


class Data:
    """The digits of scikit-learn: 1347 to train, 450 to test, each pixel centred and scaled."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images).float(), torch.from_numpy(labels).long()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, test = order[:TRAIN], order[TRAIN:]
        x = (x - x[train].mean(0)) / (x[train].std(0) + 0.01) * 0.5
        self.train_x, self.train_y, self.test_x, self.test_y = x[train], y[train], x[test], y[test]

    def batches(self, generator: torch.Generator) -> Batches:
        """Random minibatches without end."""
        while True:
            batch = torch.randint(len(self.train_y), (BATCH,), generator=generator)
            yield self.train_x[batch], self.train_y[batch]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """On the test images."""
        return float((model(self.test_x).argmax(1) == self.test_y).float().mean())


def staircase(generator: torch.Generator) -> nn.Sequential:
    """64-32-32-10 with stairs of five levels, weights and biases U(±1/sqrt(fan_in))."""
    model = nn.Sequential(nn.Linear(64, 32), Staircase(), nn.Linear(32, 32), Staircase(), nn.Linear(32, 10))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            assert isinstance(layer, nn.Linear)
            for p in layer.parameters():
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / layer.in_features**0.5)
    return model


def spiking(generator: torch.Generator, *, alive: bool = True) -> nn.Sequential:
    """64-32-10 hard LIF neurons over 8 steps; with the usual initial values no output neuron fires."""
    gain, bias = (2.0, 0.2) if alive else (1.0, 0.0)
    return spiking_mlp([64, 32, 10], 8, gain=gain, output_bias=bias, generator=generator)


STAIRCASE: dict[str, Any] = {"epsilon": 1.0, "step_radius": 8.0, "probe_radius": 4.0, "particle_dim": 2}
SPIKING: dict[str, Any] = {"epsilon": 0.5, "step_radius": 4.0, "probe_radius": 4.0, "particle_dim": 8}


def polystep(model: nn.Module, data: Data, steps: int, generator: torch.Generator, **options: Any) -> dict[str, Any]:
    """Train by PolyStep in the hybrid subspace of rank 4."""
    optimizer = PolyStep(model, subspace=Hybrid(rank=4), generator=generator, **options)
    loss, batches, spread = NetworkLoss(model, cross_entropy), data.batches(generator), []
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step(loss.on(*next(batches)))
        spread.append(float(optimizer.metrics["displacement"]))
    seconds = time.perf_counter() - start
    return {
        "test": data.accuracy(model), "evaluations": optimizer.evaluations, "seconds": seconds,
        "largest displacement": max(spread),
    }  # fmt: skip


def searched(
    model: nn.Module, data: Data, make: Callable[[Tensor, int], Search], steps: int, generator: torch.Generator
) -> dict[str, Any]:
    """Train by a search over all weights; the last point counts."""
    population, batches = Population(model), data.batches(generator)
    search = make(population.vector(), steps)
    start = time.perf_counter()
    for _ in range(steps):
        x, y = next(batches)
        search.tell(population.losses(search.ask(), cross_entropy, x, y))
    seconds = time.perf_counter() - start
    population.write(getattr(search, "x", search.best))
    return {"test": data.accuracy(model), "evaluations": search.evaluations, "seconds": seconds}


def evolution(sigma: float, lr: float, generator: torch.Generator) -> Callable[[Tensor, int], Search]:
    """The evolution strategy of the paper: ranks, antithetic pairs, 50 points, a learning rate that falls to 0."""

    def make(x: Float[Tensor, " d"], steps: int) -> Search:
        decay = Linear(lr, 0.0, steps)
        return EvolutionStrategy(None, x, population=50, sigma=sigma, lr=decay, generator=generator)

    return make


def spsa(generator: torch.Generator) -> Callable[[Tensor, int], Search]:
    """SPSA with a = c = 0.1."""
    return lambda x, steps: SPSA(None, x, offset=0.1 * steps, generator=generator)


def cma(generator: torch.Generator) -> Callable[[Tensor, int], Search]:
    """CMA-ES with 16 points and a deviation of 0.5; separable, since there are thousands of weights."""
    return lambda x, steps: CMAES(None, x, sigma=0.5, population=16, generator=generator)


def adam(model: nn.Module, data: Data, steps: int, generator: torch.Generator, lr: float = 0.01) -> dict[str, Any]:
    """Train the smooth twin by Adam, and test the hard network with its weights."""
    twin, batches = surrogate_twin(model), data.batches(generator)
    optimizer = torch.optim.Adam(twin.parameters(), lr=lr)
    start = time.perf_counter()
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        cross_entropy(twin(x), y).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    model.load_state_dict(twin.state_dict())
    return {"test": data.accuracy(model), "smooth test": data.accuracy(twin), "seconds": seconds}


def checkerboard(
    count: int, generator: torch.Generator, noise: float = 0.05, cells: int = 3
) -> tuple[Float[Tensor, "count 2"], Int[Tensor, " count"]]:
    """Points of the square [-1, 1]^2, coloured like a board of `cells` by `cells`, then moved by noise."""
    x = torch.rand(count, 2, generator=generator)
    colour = (x * cells).floor().long().sum(1) % 2
    return 2 * x - 1 + noise * torch.randn(count, 2, generator=generator), colour
