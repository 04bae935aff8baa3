"""A training step with DAL, which needs one product with the Hessian, beside one of plain gradient descent."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.timing import interleaved_medians
from steepest.models import MLP
from steepest.optim import DAL

TITLE = "DAL: one training step"
DESCRIPTION = (
    "Forward and backward passes included. The exact product differentiates twice; fd takes a second gradient."
)
BASE = "torch.optim.SGD"

# Sizes of the layers, and examples in the batch.
SETS: dict[str, tuple[list[int], int]] = {
    "MLP 64-100-100-10, 1000 examples": ([64, 100, 100, 10], 1000),
    "MLP of a million parameters, 128 examples": ([512, 700, 700, 200, 10], 128),
}

METHODS: dict[str, dict[str, Any]] = {
    BASE: {},
    "DAL": {"hvp": "exact"},
    "DAL, fd": {"hvp": "fd"},
    "DAL, fixed rate (p = 0)": {"p": 0.0},
}


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per model and method."""
    for title, (sizes, examples) in SETS.items():
        steps = {name: training_step(sizes, examples, device, options) for name, options in METHODS.items()}
        seconds = interleaved_medians(steps, repeats)
        for name in METHODS:
            yield {
                "matrices": title,
                "optimizer": name,
                "ms a step": round(1e3 * seconds[name], 3),
                "ratio to SGD": round(seconds[name] / seconds[BASE], 2),
            }


def training_step(
    sizes: list[int], examples: int, device: torch.device, options: dict[str, Any]
) -> Callable[[], object]:
    """One step of SGD without options, else of DAL, on random data."""
    generator = torch.Generator().manual_seed(0)
    model = MLP(sizes, generator=generator).to(device)
    x = torch.randn(examples, sizes[0], generator=generator).to(device)
    y = torch.randint(sizes[-1], (examples,), generator=generator).to(device)
    if options:
        adapted = DAL(model.parameters(), 0.01, max_lr=0.01, **options)
        return lambda: adapted.step(lambda: cross_entropy(model(x), y))
    plain = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> None:
        plain.zero_grad()
        cross_entropy(model(x), y).backward()
        plain.step()

    return step
