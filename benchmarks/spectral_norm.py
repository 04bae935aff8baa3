"""A training step of normalised networks, beside torch's own spectral normalisation; and steps of games."""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.timing import interleaved_medians
from steepest.nn import spectral_norm
from steepest.optim import SGA, Consensus, GameOptimizer, RungeKutta

TITLE = "Spectral normalisation and games: one training step"
DESCRIPTION = (
    "Forward and backward passes included. torch normalises the reshaped kernel of a convolution, and differentiates "
    "through it; steepest normalises the map from input to output."
)
NORMALISED = ("plain", "torch", "steepest sn", "steepest divout", "steepest divgrad")


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per network and method."""
    generator = torch.Generator().manual_seed(0)
    wide = [512, 700, 700, 200, 10]
    mlp = nn.Sequential(*(m for a, b in pairwise(wide) for m in (nn.Linear(a, b), nn.ReLU())))
    conv = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
    )
    networks = {
        "MLP of a million parameters, 128 examples": (mlp, torch.randn(128, 512, generator=generator)),
        "three convolutions, 32 images of 16x16": (conv, torch.randn(32, 3, 16, 16, generator=generator)),
    }
    for title, (model, x) in networks.items():
        steps = {name: training_step(name, copy.deepcopy(model).to(device), x.to(device)) for name in NORMALISED}
        yield from _table(title, "torch", interleaved_medians(steps, repeats))
    yield from _table(
        "two-player, MLP against MLP, 128 examples", "plain", interleaved_medians(_games(device), repeats)
    )


def _table(title: str, base: str, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    for name, value in seconds.items():
        yield {
            "matrices": title,
            "method": name,
            "ms a step": round(1e3 * value, 3),
            "ratio": round(value / seconds[base], 2),
            "to": base,
        }


def training_step(name: str, model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One step of Adam on a network that is normalised in this way."""
    if name == "torch":
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.utils.parametrizations.spectral_norm(layer)
    elif name != "plain":
        mode: Any = name.removeprefix("steepest ")
        spectral_norm(model, mode, leave_smaller=mode != "sn")
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _games(device: torch.device) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    first = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).to(device)
    second = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)).to(device)
    noise, real = (torch.randn(128, 64, generator=generator).to(device) for _ in range(2))

    def step(make: Callable[..., Any], **options: Any) -> Callable[[], object]:
        player, other = copy.deepcopy(first), copy.deepcopy(second)
        optimizer = make(player, other, 1e-3, **options)

        def closure(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            fake = other(player(batch[0]))
            return softplus(-fake).mean(), softplus(fake).mean() + softplus(-other(batch[1])).mean()

        return lambda: optimizer.step(closure, (noise, real))

    return {
        "plain": step(GameOptimizer, cancel="none"),
        "interaction cancelled": step(GameOptimizer),
        "all cancelled": step(GameOptimizer, cancel="all"),
        "interaction cancelled, split": step(GameOptimizer, estimator="split"),
        "interaction cancelled, alternating": step(GameOptimizer, scheme="alternating"),
        "SGA": step(SGA),
        "consensus": step(Consensus),
        "Runge-Kutta 4": step(RungeKutta),
    }
