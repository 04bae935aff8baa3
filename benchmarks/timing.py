"""Time several calls in turn, so that a change of the machine's speed meets all of them alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def interleaved_medians(calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each call over `repeats` rounds; every round makes each call once."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(_seconds(call))
    return {name: median(values) for name, values in seconds.items()}


def _seconds(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
