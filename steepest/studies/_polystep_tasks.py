"""The problems of the PolyStep study that are no digits: a gradient norm, a tree, MAX-SAT and CartPole."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from steepest.gradient_free import (
    SPSA,
    EvolutionStrategy,
    GreedyFlips,
    MaxSat,
    PolyStepSearch,
    Search,
    WalkSAT,
    random_3sat,
)
from steepest.loop.schedules import Cosine, Linear
from steepest.nn import HardTree, Population
from steepest.studies._cartpole import Rollouts, Weights, policy, returns, starts


def gradient_norms(steps: int, generator: torch.Generator, dim: int = 16) -> Float[Tensor, " steps"]:
    """|grad f(x_t)|^2 for f = sum log(1 + x_i^2) from x = 2, one particle, r = h = t^(-1/4), epsilon 1."""
    search = PolyStepSearch(
        lambda x: x.square().log1p().sum(-1), torch.full((dim,), 2.0, dtype=torch.float64), epsilon=1.0,
        step_radius=lambda t: (t + 1) ** -0.25, cost_scale=None, generator=generator,
    )  # fmt: skip
    found = []
    for _ in range(steps):
        found.append((2 * search.x / (1 + search.x.square())).square().sum())
        search.step()
    return torch.stack(found)


class Tree:
    """A hard tree of depth 4 whose leaves say what most of their training points are.

    The splits are searched; a call returns the share of misclassified training points.
    """

    def __init__(self, x: Float[Tensor, "n 2"], y: Int[Tensor, " n"]) -> None:
        self.x, self.y = x, y
        self.tree = HardTree(2, 16, 4)
        with torch.no_grad():
            self.tree.leaves.copy_(torch.eye(16))
        self.population = Population(self.tree, parameters=["weight", "bias"])

    def votes(self, splits: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 16 2"]:
        """How many training points of each class every leaf has."""
        leaf = self.population.outputs(splits, self.x)
        return leaf.mT @ one_hot(self.y, 2).to(leaf)

    def __call__(self, splits: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Share of misclassified training points."""
        return 1 - self.votes(splits).amax(-1).sum(-1) / len(self.y)

    def accuracy(self, splits: Float[Tensor, " d"], x: Float[Tensor, "m 2"], y: Int[Tensor, " m"]) -> float:
        """On other points."""
        leaf = self.population.outputs(splits, x).argmax(-1)
        return float((self.votes(splits).argmax(-1)[leaf] == y).float().mean())

    def by_adam(self, steps: int, generator: torch.Generator, lr: float = 0.05) -> Float[Tensor, " d"]:
        """The splits of a soft tree of ever sharper splits, trained with the cross-entropy."""
        soft = HardTree(2, 2, 4, surrogate="smooth", generator=generator)
        with torch.no_grad():
            for p in (soft.weight, soft.bias):
                p.copy_(torch.randn(p.shape, generator=generator))
        optimizer = torch.optim.Adam(soft.parameters(), lr=lr)
        for step in range(steps):
            soft.sharpness = 1 + 9 * step / steps
            optimizer.zero_grad()
            cross_entropy(soft(self.x), self.y).backward()
            optimizer.step()
        return torch.cat([soft.weight.detach().flatten(), soft.bias.detach()])


def finish(search: Search, evaluations: int) -> Search:
    """Run a search until it has made so many evaluations."""
    while search.evaluations < evaluations:
        search.step()
    return search


def tree_searches(
    objective: Callable[[Tensor], Tensor], x: Tensor, evaluations: int, generator: torch.Generator
) -> dict[str, Search]:
    """PolyStep and its competitors from the same splits."""
    steps = evaluations // 50
    return {
        "PolyStep": PolyStepSearch(objective, x, epsilon=0.02, step_radius=1.5, generator=generator),
        "evolution": EvolutionStrategy(
            objective, x, population=50, sigma=0.3, lr=Linear(0.15, 0.0, steps), generator=generator
        ),
        "SPSA": SPSA(objective, x, offset=0.1 * evaluations / 10, directions=5, generator=generator),
    }


def maxsat(
    variables: int, steps: int, generator: torch.Generator, tuned: dict[str, float], small: int
) -> dict[str, dict[str, float]]:
    """Share of satisfied clauses: PolyStep; evolution at `small`, at equal evaluations and time; local search."""
    problem = MaxSat(random_3sat(variables, generator=generator), variables)
    start = 0.1 * torch.randn(variables, generator=generator)

    def timed(search: Any, stop: Callable[[Any], bool]) -> dict[str, float]:
        begin = time.perf_counter()
        while not stop(search):
            search.step()
        seconds = time.perf_counter() - begin
        return {
            "satisfied": 1 - float(problem(search.x)) / len(problem.clauses),
            "best": 1 - float(search.best_value) / len(problem.clauses),
            "evaluations": search.evaluations,
            "seconds": seconds,
        }

    ours = PolyStepSearch(
        problem, start, particle_dim=2, epsilon=Cosine(5.0, 0.5, steps), step_radius=Cosine(1.0, 0.2, steps),
        probe_radius=Cosine(4.0, 1.0, steps), momentum=Linear(0.5, 0.95, steps), cost_scale=None, generator=generator,
    )  # fmt: skip
    found = {"PolyStep": timed(ours, lambda search: search.steps == steps)}
    seconds = found["PolyStep"]["seconds"]

    def evolution(evaluations: int, sigma: float, lr: float) -> dict[str, float]:
        count = max(1, evaluations // 50)
        decay = Linear(lr, 0.1 * lr, count)
        search = EvolutionStrategy(problem, start, population=50, sigma=sigma, lr=decay, generator=generator)
        return timed(search, lambda search: search.steps == count)

    found["evolution of the paper, few evaluations"] = evolution(small, 0.02, 0.01)
    found["evolution, few evaluations"] = few = evolution(small, tuned["sigma"], tuned["lr"])
    found["evolution, equal evaluations"] = evolution(ours.evaluations, tuned["sigma"], tuned["lr"])
    equal = int(seconds / few["seconds"] * few["evaluations"])
    found["evolution, equal time"] = evolution(equal, tuned["sigma"], tuned["lr"])
    flips = max(1, variables // 10)
    local = {
        "WalkSAT": WalkSAT(problem.clauses, start, flips_per_step=flips, generator=generator),
        "greedy": GreedyFlips(problem.clauses, start, flips_per_step=flips),
    }
    for name, search in local.items():
        begin = time.perf_counter()
        found[name] = timed(search, lambda search, begin=begin: time.perf_counter() - begin > seconds)
    return found


def cartpole(
    weights: Weights, evaluations: int, episodes: int, tests: int, generator: torch.Generator, length: int
) -> dict[str, float | None]:
    """PolyStep on a policy: mean return of the last policy and of the best one, on new starting states."""
    population = Population(policy(weights, generator))
    objective = Rollouts(population, episodes, generator, length)
    search = PolyStepSearch(
        objective, population.vector(), particle_dim=2, epsilon=20.0, step_radius=0.3, probe_radius=1.2,
        cost_scale=None, generator=generator,
    )  # fmt: skip
    mean, best, kept = -math.inf, search.x, 0
    while search.evaluations < evaluations:
        before = search.x
        loss = float(search.step()["loss"])
        if -loss > mean:  # the mean over the candidates around a point says how good it is
            mean, best, kept = -loss, before, search.steps - 1
    new = starts(tests, generator)
    last, chosen = (float(returns(population, x.unsqueeze(0), new, length).mean()) for x in (search.x, best))
    return {"last": last, "best": chosen, "best after steps": kept, "evaluations": search.evaluations}
