"""PolyStep beside the package `polystep` on a network of stairs, and MAX-SAT by the changes alone."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved_medians
from steepest.gradient_free import Hybrid, MaxSat, NetworkLoss, PolyStep, PolyStepSearch, random_3sat
from steepest.loop import Cosine, Linear
from steepest.studies._polystep_networks import STAIRCASE, Data, staircase

TITLE = "PolyStep beside polystep"
DESCRIPTION = (
    "Steps of the network 64-32-32-10 with stairs on digits: batch 128, hybrid subspace of rank 4, orthoplexes of "
    "dimension 2, softmax weights, 1764 candidates a step for both; accuracy on test images after training by the "
    "settings of the study, least to largest over the seeds. Random 3-SAT with ratio 4.27: 150 steps, and the peak "
    "memory of a fresh process."
)
OURS, PEER = "PolyStep", "polystep"
TRAIN_STEPS, SEEDS, SAT_STEPS = 120, 3, 150
SAT_SIZES = (2000, 100_000)


class Stairs(nn.Module):
    """The activation as the peer's users write it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(torch.sigmoid(x) * 5) / 5


def stepper(name: str, model: nn.Sequential, seed: int) -> Callable[[Tensor, Tensor], Any]:
    """A function that takes one step on a minibatch."""
    if name == OURS:
        generator = torch.Generator().manual_seed(seed)
        ours = PolyStep(model, subspace=Hybrid(rank=4), generator=generator, **STAIRCASE)
        losses = NetworkLoss(model, nn.functional.cross_entropy)
        return lambda x, y: ours.step(losses.on(x, y))
    from polystep import HybridSubspace, ParamLayout, PolyStepOptimizer  # pyright: ignore[reportMissingImports]

    settings = dict(STAIRCASE)
    subspace = HybridSubspace.from_layout(ParamLayout.from_module(model), rank=4, seed=seed)
    # At epsilon 1 its radii, which epsilon multiplies, are ours.
    theirs = PolyStepOptimizer(
        model, polytope_type="orthoplex", subspace_particle_dim=settings.pop("particle_dim"), subspace=subspace,
        solver="softmax", num_probe=1, scale_cost=None, seed=seed, **settings,
    )  # fmt: skip
    loss_fn = nn.CrossEntropyLoss()
    return lambda x, y: theirs.step_batch(x, y, loss_fn=loss_fn)


def network(name: str, seed: int, device: torch.device) -> nn.Sequential:
    """The same initial values for both."""
    model = staircase(torch.Generator().manual_seed(seed))
    if name == PEER:
        model[1], model[3] = Stairs(), Stairs()
    return model.to(device)


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per optimizer on the network, and a row per size of MAX-SAT."""
    names = [OURS, PEER] if find_spec("polystep") else [OURS]
    data = Data()
    x, y = data.train_x[:128].to(device), data.train_y[:128].to(device)
    steps = {name: stepper(name, network(name, 0, device), 0) for name in names}
    seconds = interleaved_medians({name: (lambda step=steps[name]: step(x, y)) for name in names}, repeats)
    for name in names:
        found = [accuracy(name, seed, data, device) for seed in range(SEEDS)]
        yield {
            "matrices": "digits, network of stairs",
            "method": name,
            "ms a step": round(1e3 * seconds[name], 2),
            "ratio to polystep": round(seconds[name] / seconds[PEER], 3) if PEER in seconds else None,
            "result": f"test accuracy {fmean(found):.3f} ({min(found):.3f} to {max(found):.3f})",
            "peak memory, MiB": None,
        }
    for variables in SAT_SIZES if device.type == "cpu" else ():
        code = f"import benchmarks.polystep as b; print(*b.maxsat({variables}))"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        total, share, memory = map(float, found.stdout.split()[-3:])
        yield {
            "matrices": f"3-SAT, {variables} variables, {SAT_STEPS} steps",
            "method": OURS,
            "ms a step": round(1e3 * total / SAT_STEPS, 2),
            "ratio to polystep": None,
            "result": f"{share:.4f} of the clauses, {total:.2f} s in all",
            "peak memory, MiB": round(memory),
        }


def accuracy(name: str, seed: int, data: Data, device: torch.device) -> float:
    """On test images, after training; the same minibatches for both."""
    model, generator = network(name, seed, device), torch.Generator().manual_seed(seed)
    step, batches = stepper(name, model, seed), data.batches(generator)
    for _ in range(TRAIN_STEPS):
        x, y = next(batches)
        step(x.to(device), y.to(device))
    return data.accuracy(model.cpu())


def maxsat(variables: int) -> tuple[float, float, float]:
    """Seconds, share of satisfied clauses, and the peak memory of this process in MiB."""
    import resource
    import warnings

    warnings.filterwarnings("ignore", "flat landscape")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    problem = MaxSat(random_3sat(variables, generator=generator), variables)
    search = PolyStepSearch(
        problem, 0.1 * torch.randn(variables, generator=generator), particle_dim=2, cost_scale=None,
        epsilon=Cosine(5.0, 0.5, SAT_STEPS), step_radius=Cosine(1.0, 0.2, SAT_STEPS),
        probe_radius=Cosine(4.0, 1.0, SAT_STEPS), momentum=Linear(0.5, 0.95, SAT_STEPS), generator=generator,
    )  # fmt: skip
    start = time.perf_counter()
    for _ in range(SAT_STEPS):
        search.step()
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds, 1 - float(problem(search.x)) / len(problem.clauses), memory
