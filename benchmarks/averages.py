"""Averages beside torch.optim.swa_utils, and chains on the sphere together beside one at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.timing import interleaved_medians
from steepest.inference import SingleIndex, SphericalAscent, SphericalLangevin, SphericalSGD, TensorPCA
from steepest.optim import WeightAverage

TITLE = "Averages: weights of a model, and chains on the sphere"
DESCRIPTION = (
    "Weights: one update of the average of 8.4 million float32 parameters; torch's AveragedModel keeps float32, ours "
    "float64 sums. Chains: 100 steps, divided by the number of chains. Estimators of the tensor: the partial trace, 20 "
    "power iterations of 64 starts, and 100 Langevin steps of 64 chains, of which an estimate needs thousands."
)
STEPS = 100


def weights(device: torch.device) -> dict[str, Callable[[], Any]]:
    """One update each."""
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)]).to(device)
    calls: dict[str, Callable[[], Any]] = {}
    theirs_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for kind, theirs in (("mean", AveragedModel(model)), ("ema", theirs_ema)):
        calls[f"torch, {kind}"] = lambda theirs=theirs: theirs.update_parameters(model)
    for kind in ("mean", "ema"):
        decay = 0.99 if kind == "ema" else None
        calls[f"steepest, {kind}"] = WeightAverage(model, kind, decay=decay).update
    calls["steepest, ema, not checked"] = WeightAverage(model, "ema", decay=0.99, nonfinite="ignore").update
    return calls


def chains(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Minibatch SGD and Langevin dynamics with 1 and with 64 chains."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(50, generator=generator).to(device)
    problem = SingleIndex(50, 3, 25_000, theta_star=direction)
    tensor = TensorPCA(40, 3, 8000, theta_star=direction[:40])
    calls: dict[str, Callable[[], Any]] = {}
    for count in (1, 64):
        sgd = SphericalSGD(problem, chains=count, order="first")
        walk = SphericalLangevin(tensor, chains=count, order="first")
        calls[f"SphericalSGD, d = 50, {count}"] = lambda sgd=sgd: [sgd.step() for _ in range(STEPS)]
        calls[f"SphericalLangevin, d = 40, k = 3, {count}"] = lambda walk=walk: [walk.step() for _ in range(STEPS)]
    return calls


def estimators(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Work on one tensor, d = 40, k = 3."""
    direction = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(device)
    tensor = TensorPCA(40, 3, 8000, theta_star=direction)
    power = SphericalAscent(tensor, starts=64)
    walk = SphericalLangevin(tensor, chains=64, order="first")
    return {
        "partial trace": tensor.partial_trace,
        "20 power iterations, 64 starts": lambda: [power.step() for _ in range(20)],
        "100 Langevin steps, 64 chains": lambda: [walk.step() for _ in range(100)],
    }


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each call; the ratio is to torch's average of the same kind, or to one chain."""
    seconds = interleaved_medians(weights(device), repeats)
    for name, value in seconds.items():
        kind = "ema" if "ema" in name else "mean"
        yield _row("weights, 8.4 M", name, value, value / seconds[f"torch, {kind}"])
    seconds = interleaved_medians(chains(device), repeats)
    for name, value in seconds.items():
        method, _, count = name.rpartition(", ")
        each = value / int(count)
        yield _row("chains", f"{method}, {count} at once", each / STEPS, each / seconds[f"{method}, 1"])
    seconds = interleaved_medians(estimators(device), repeats)
    for name, value in seconds.items():
        yield _row("tensor, d = 40", name, value, None)


def _row(what: str, call: str, seconds: float, ratio: float | None) -> dict[str, Any]:
    return {
        "matrices": what,
        "call": call,
        "ms": float(f"{1e3 * seconds:.3g}"),
        "ratio": None if ratio is None else round(ratio, 3),
    }
