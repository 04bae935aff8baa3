"""What the study of Freon and Kaon trains: a small network on digits (C5, C6, C8) and random features (C7)."""

import math
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from steepest.dynamics.alignment import exact_step
from steepest.dynamics.random_features import RandomFeatureQuadratic
from steepest.geometry import ChaoticSpectrum, polar
from steepest.models import MLP
from steepest.optim import Freon, Kaon, Muon, SpectralControl, init_on_ball_
from steepest.studies._base import Run
from steepest.studies._clipped_scion_training import SMALLEST_LOSS, _digits

EXPONENTS = {"0": 0.0, "1/4": 0.25, "1/2": 0.5, "2/3": 2 / 3, "3/4": 0.75, "1": 1.0}
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda g: g,
    "spectral": lambda g: polar(g, "svd"),
    "kaon": ChaoticSpectrum().direction,
}


def _optimizer(name: str, params: list[nn.Parameter], lr: float, generator: torch.Generator) -> torch.optim.Optimizer:
    if name == "muon":
        return Muon(params, lr, weight_decay=0.0)
    if name == "kaon":
        return Kaon(params, lr, nesterov=True)
    if name in ("random", "reversed", "truncated"):
        return SpectralControl(params, lr, name, generator=generator, nesterov=True)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "c = 1 follows")
        return Freon(params, lr, EXPONENTS[name], nesterov=True)


def _train(run: Run, name: str, seed: int, lr: float) -> dict[str, float | None]:
    generator, epochs = run.generator(seed), run.pick(smoke=1, desktop=8)
    train_x, train_y, test_x, test_y = _digits()
    if run.scale == "smoke":
        train_x, train_y = train_x[:256], train_y[:256]
    model = MLP([64, 128, 128, 10], lambda x: relu(x) * math.sqrt(2), bias=False, generator=generator)
    weights = list(model.parameters())
    names = ("spectral_input", "spectral", "sign")
    init_on_ball_([{"params": [p], "norm": n, "radius": 1.0} for p, n in zip(weights, names, strict=True)], generator)
    nn.init.zeros_(weights[-1])
    optimizer = _optimizer(name, weights, lr, generator)
    steps, step = epochs * math.ceil(len(train_x) / 128), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x), generator=generator).split(128):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            step += 1
            optimizer.zero_grad()
            loss = cross_entropy(model(train_x[batch]), train_y[batch], label_smoothing=0.1)
            if not math.isfinite(loss.item()):
                return {"loss": None, "accuracy": 0.0}
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        excess = float(cross_entropy(model(train_x), train_y, label_smoothing=0.1)) - SMALLEST_LOSS
        accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
    return {"loss": excess if math.isfinite(excess) else None, "accuracy": accuracy}


def digits(run: Run) -> dict[str, Any]:
    """Every method at each learning rate of one grid, over the same seeds; the best setting of each."""
    seeds = list(run.seeds(run.pick(smoke=1, desktop=3)))
    rates = run.pick(smoke=[0.06], desktop=[0.005 * 1.5**power for power in range(12)])
    found: dict[str, Any] = {}
    for name in ("muon", "kaon", "random", "reversed", "truncated", *EXPONENTS):
        rows = []
        for rate in rates:
            ends = [_train(run, name, seed, rate) for seed in seeds]
            losses = [end["loss"] for end in ends]
            mean = None if None in losses else fmean(value for value in losses if value is not None)
            rows.append({"lr": rate, "loss": mean, "losses": losses, "accuracies": [end["accuracy"] for end in ends]})
        best = min(rows, key=lambda row: math.inf if row["loss"] is None else row["loss"])
        run.say(f"digits, {name}: excess loss {best['loss']} at learning rate {best['lr']:.3g}")
        found[name] = {
            **best,
            "accuracy": fmean(best["accuracies"]),
            "at the edge of the grid": len(rates) > 1 and best["lr"] in (rates[0], rates[-1]),
            "by rate": [row["loss"] for row in rows],
        }
    return {"rates": rates, "best": found}


def line_searches(run: Run) -> dict[str, Any]:
    """Loss over its start after 30 exact line searches along mini-batch steps, and how the lengths jitter."""
    outputs, features, batch, steps = run.pick(smoke=(8, 16, 16, 10), desktop=(32, 64, 64, 30))
    found: dict[str, Any] = {}
    for kind in ("gaussian", "relu", "centered_relu"):
        rows: dict[str, Mapping[str, list[float]]] = {name: {"loss": [], "jitter": []} for name in RULES}
        for seed in run.seeds(run.pick(smoke=1, desktop=5)):
            problem = RandomFeatureQuadratic.draw(outputs, features, kind=kind, generator=run.generator(seed))
            for name, rule in RULES.items():
                generator, weight, lengths = run.generator(1000 + seed), torch.zeros_like(problem.target), []
                start = float(problem.loss(weight))
                for _ in range(steps):
                    direction = rule(problem.gradient(weight, problem.draw_batch(batch, generator)))
                    length = exact_step(problem.gradient(weight), direction, problem.hvp)
                    lengths.append(float(length.log()))
                    weight = weight - length * direction
                rows[name]["loss"].append(float(problem.loss(weight)) / start)
                rows[name]["jitter"].append(stdev(b - a for a, b in pairwise(lengths)))
        found[kind] = rows
    return found
