"""A million scheduler steps beside torch's and transformers' schedulers, and all learning rates at once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from benchmarks.timing import interleaved_medians
from steepest.optim.schedules import WSD, WSDS

TITLE = "Schedules: a million scheduler steps"
DESCRIPTION = (
    "Warm-up of 1 %, a decay of the last 10 %, linear or 1-sqrt, to a tenth; one parameter group; only "
    "scheduler.step() is called. WSDS has ten cycles."
)
BASE = "torch SequentialLR"
STEPS = 1_000_000


def _optimizer() -> Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def _sequential() -> Any:
    optimizer, warmup, decay = _optimizer(), STEPS // 100, STEPS // 10
    parts = [
        lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1),
        lr_scheduler.ConstantLR(optimizer, 1.0, 1),
        lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=decay),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [warmup, STEPS - decay])


def _transformers() -> Any:
    from transformers import get_wsd_schedule

    warmup, decay = STEPS // 100, STEPS // 10
    options: Any = {"num_training_steps": STEPS, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}
    return get_wsd_schedule(_optimizer(), warmup, decay, **options)


def _wsd() -> Any:
    return WSD(_optimizer(), STEPS, warmup=STEPS // 100, shape="linear", endpoint="exclusive")


def _wsds() -> Any:
    return WSDS(_optimizer(), range(STEPS // 10, STEPS + 1, STEPS // 10), warmup=STEPS // 100)


MAKERS: dict[str, Callable[[], Any]] = {
    BASE: _sequential,
    "transformers get_wsd_schedule": _transformers,
    "steepest WSD": _wsd,
    "steepest WSDS": _wsds,
}


def _all_steps(make: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        scheduler = make()
        scheduler.optimizer.step()  # torch warns of schedulers that go first
        for _ in range(STEPS):
            scheduler.step()

    return call


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per scheduler; a run is long, so a fifth of the repeats will do."""
    steps = torch.arange(STEPS)
    calls = {name: _all_steps(make) for name, make in MAKERS.items()}
    calls["steepest WSDS.lrs(steps), all at once"] = lambda: _wsds().lrs(steps)
    seconds = interleaved_medians(calls, max(1, repeats // 5), warmup=0)
    for name in calls:
        yield {
            "matrices": f"{STEPS:,} steps",
            "scheduler": name,
            "us a step": round(1e6 * seconds[name] / STEPS, 3),
            "ratio to SequentialLR": round(seconds[name] / seconds[BASE], 3),
        }
