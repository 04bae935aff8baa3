"""The training runs of the study of Drop-Muon: digits to 99 % training accuracy, costs in floating-point operations."""

import time
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.optim import DropMuon, EpochShift, Full, Starts, SuffixSampler, Uniform
from steepest.studies._base import Run

RATE = "0.1"
SAMPLERS: Mapping[str, Callable[[], SuffixSampler]] = {
    "full": Full,
    "uniform": Uniform,
    "4 3 2 1": lambda: Starts([0.4, 0.3, 0.2, 0.1]),
    "1 2 3 4": lambda: Starts([0.1, 0.2, 0.3, 0.4]),
    "epoch shift": lambda: EpochShift(15, steps_per_epoch=2),
}
# (positions, kernel^2 * inputs, outputs)
LAYERS = ((64, 9, 32), (64, 9 * 32, 64), (16, 9 * 64, 128), (1, 128, 10))


def step_gigaflops(start: int, batch: int) -> float:
    """The cost of a step that begins at layer `start` (from 0), a multiplication with its addition counted as two."""
    forward = [2 * positions * inputs * outputs for positions, inputs, outputs in LAYERS]
    sides = [sorted((inputs, outputs)) for _, inputs, outputs in LAYERS[start:]]
    polar = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)
    return (batch * (sum(forward) + sum(forward[start:]) + sum(forward[start + 1 :])) + polar) / 1e9


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


def _digits(train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8)[order] / 16
    y = torch.from_numpy(labels).long()[order]
    return x[:train], y[:train], x[1400:], y[1400:]


def _train(run: Run, seed: int, name: str, rate: float) -> dict[str, Any]:
    """Train until 99 % of the training images are right; steps, cost, and the test accuracy on the way."""
    size, most, patience = run.pick(smoke=(100, 2, 2), desktop=(1400, 200, 10))
    train_x, train_y, test_x, test_y = _digits(size)
    batch, generator = size // 2, run.generator(seed)
    model = _network(seed)
    optimizer = DropMuon(
        model, rate, sampler=SAMPLERS[name](), momentum=0.9, generator=torch.Generator().manual_seed(1000 + seed)
    )
    cost, seconds, accuracy = 0.0, 0.0, 0.0
    tests: list[tuple[float, float]] = []
    order = torch.arange(size)
    for iteration in range(most):
        if iteration % 2 == 0:
            order = torch.randperm(size, generator=generator)
        chosen = order[iteration % 2 * batch :][:batch]
        cost += step_gigaflops(optimizer.active[0], batch)
        begin = time.perf_counter()
        cross_entropy(model(train_x[chosen]), train_y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - begin
        with torch.no_grad():
            tests.append((cost, float((model(test_x).argmax(1) == test_y).float().mean())))
            if iteration + 1 >= patience:
                accuracy = float((model(train_x).argmax(1) == train_y).float().mean())
        if accuracy >= 0.99:
            break
    return {
        "iterations": len(tests),
        "reached": accuracy >= 0.99,
        "gigaflops": cost,
        "seconds": seconds,
        "tests": tests,
    }


def train_all(run: Run) -> dict[str, Any]:
    rates = run.pick(smoke=(RATE,), desktop=("0.05", "0.07", RATE, "0.14", "0.2"))
    found: dict[str, Any] = {}
    for name in SAMPLERS:
        found[name] = {}
        for rate in rates if name in ("full", "uniform") else (RATE,):
            found[name][rate] = [
                _train(run, seed, name, float(rate)) for seed in run.seeds(run.pick(smoke=1, desktop=6))
            ]
            mean = fmean(each["gigaflops"] for each in found[name][rate])
            run.say(f"{name}, learning rate {rate}: {mean:.1f} GF to 99 %")
    return found


def selected(claim: str, runs: dict[str, Any]) -> dict[str, Any]:
    names = ("full", "uniform") if claim != "C6" else tuple(SAMPLERS)
    short = {
        name: {
            rate: [{key: value for key, value in each.items() if key != "tests"} for each in runs[name][rate]]
            for rate in (runs[name] if claim != "C6" else (RATE,))
        }
        for name in names
    }
    found: dict[str, Any] = {"runs": short}
    if claim == "C6":
        uniform = cost_to_target(found, "uniform")
        found["relative to uniform"] = {name: cost_to_target(found, name) / uniform for name in names}
        return found
    best = {name: best_rate(found, name) for name in names}
    found["best rate"] = best
    if claim == "C3":
        found["FLOPs ratio"] = flops_ratio(found)
        totals = {name: fmean(each["seconds"] for each in short[name][best[name]]) for name in names}
        found["seconds ratio"] = totals["full"] / totals["uniform"]
    elif claim == "C4":
        found["steps"] = {name: mean_steps(found, name) for name in names}
    elif claim == "C5":
        found["ratio"] = {
            rate: cost_to_target(found, "full", rate) / cost_to_target(found, "uniform", rate) for rate in short["full"]
        }
    else:
        budget = min(cost_to_target(found, name, best[name]) for name in names)
        found["gigaflops"] = budget
        found["test accuracy"] = {
            name: [_accuracy_at(each["tests"], budget) for each in runs[name][best[name]]] for name in names
        }
        found["mean test accuracy"] = {name: fmean(values) for name, values in found["test accuracy"].items()}
        del found["runs"]
    return found


def _accuracy_at(tests: list[tuple[float, float]], budget: float) -> float:
    """The test accuracy after the last step within the budget; the run's last one if it ended before."""
    return [accuracy for cost, accuracy in tests if cost <= budget][-1]


def cost_to_target(measured: Mapping[str, Any], name: str, rate: str = RATE) -> float:
    return fmean(run["gigaflops"] for run in measured["runs"][name][rate])


def best_rate(measured: Mapping[str, Any], name: str) -> str:
    return min(measured["runs"][name], key=lambda rate: cost_to_target(measured, name, rate))


def flops_ratio(measured: Mapping[str, Any], rate: str | None = None) -> float:
    """FLOPs of full updates over those of uniform suffixes, at one rate or at the best of each."""
    full, uniform = (cost_to_target(measured, name, rate or best_rate(measured, name)) for name in ("full", "uniform"))
    return full / uniform


def mean_steps(measured: Mapping[str, Any], name: str) -> float:
    return fmean(run["iterations"] for run in measured["runs"][name][best_rate(measured, name)])


def fewest_seeds(measured: Mapping[str, Any]) -> int:
    return min(len(runs) for rates in measured["runs"].values() for runs in rates.values())
