"""A training step under RadiusClip, beside the plain step."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.timing import interleaved_medians
from steepest.models import GPT, MLP, GPTConfig
from steepest.optim import RadiusClip

TITLE = "RadiusClip: one training step"
DESCRIPTION = (
    "Forward, backward and AdamW's step (lr 1e-4), in float32. Every number is the mean of 20 steps in a row; with "
    "`every=k` one step in k is measured. By default at most 256 samples of the batch are measured, and positions of a "
    "sequence count as samples: all of the MLP's batch, a quarter of the GPT's. `times plain` is the time over that of "
    "the plain step."
)
BATCH, CONTEXT, VOCABULARY, STEPS = 128, 64, 256, 20
BASE = "plain"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "every=1": {},
    "every=1, whole batch": {"max_samples": None},
    "every=1, whole batch, jvp": {"max_samples": None, "method": "jvp"},
    "every=10": {"every": 10},
    "every=20": {"every": 20},
}


def mlp(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """1.3 million parameters."""
    generator = torch.Generator().manual_seed(0)
    model = MLP([784, 1024, 512, 10], generator=generator).to(device)
    x = torch.randn(BATCH, 784, generator=generator).to(device)
    return model, x, torch.randint(10, (BATCH,), generator=generator).to(device)


def gpt(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A small GPT."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(VOCABULARY, CONTEXT, layers=4, heads=4, width=128), generator=generator).to(device)
    tokens = torch.randint(VOCABULARY, (16, CONTEXT + 1), generator=generator).to(device)
    return model, tokens[:, :-1], tokens[:, 1:]


def training_step(
    make: Callable[[torch.device], tuple[nn.Module, Tensor, Tensor]], name: str, device: torch.device
) -> Callable[[], object]:
    """Training steps in a row, for all variants as many, so that all find their numbers in the cache alike."""
    model, x, y = make(device)
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if name != BASE:
        optimizer = RadiusClip(optimizer, model, **VARIANTS[name])

    def step() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()

    return step


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per network and way of measuring."""
    for title, make in {"MLP, 1.3 M parameters, batch 128": mlp, "GPT, 0.9 M parameters, 16 x 64 tokens": gpt}.items():
        steps = {name: training_step(make, name, device) for name in VARIANTS}
        seconds = interleaved_medians(steps, repeats, warmup=1)
        each = {name: seconds[name] / STEPS for name in VARIANTS}
        for name, mean in each.items():
            yield {
                "matrices": title,
                "step": name,
                "ms a step": round(1e3 * mean, 2),
                "times plain": round(mean / each[BASE], 3),
            }
