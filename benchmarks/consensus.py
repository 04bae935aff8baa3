"""Consensus-based optimization beside `cbx`: 500 steps of 20 runs, and one step with given noise."""

import math
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved_medians
from steepest.gradient_free import ConsensusBased, consensus_point, consensus_step, grand_canyon3_noisy, rastrigin
from steepest.gradient_free.swarm_step import Noise

TITLE = "Consensus-based optimization beside cbx"
DESCRIPTION = (
    "Seconds for 20 runs at once of 100 particles, 500 steps. `cbx` works in float64 on NumPy arrays; once it gets the "
    "objective that we time (PyTorch on the same memory), once the same objective in NumPy. Solved: share of the runs "
    "that end with all coordinates within 0.25 of the minimum, over all calls, each with another seed, and its "
    "standard error. The difference is the largest entry of one float64 step's result with the same noise, on "
    "Rastrigin's function with alpha 2."
)
RUNS, PARTICLES, STEPS = 20, 100, 500
PEER = "cbx"
# title: objective, its NumPy form, d, noise, alpha, sigma, the start's middle and half width
Problem = tuple[Callable[[Tensor], Tensor], str, int, Noise, float, float, float, float]
PROBLEMS: dict[str, Problem] = {
    "Rastrigin, d = 20": (rastrigin, "rastrigin", 20, "anisotropic", 1e4, 5.1, 0.0, 3.0),
    "Rastrigin, d = 10": (rastrigin, "rastrigin", 10, "anisotropic", 1e4, 5.1, 0.0, 3.0),
    "canyon, d = 2": (grand_canyon3_noisy, "canyon", 2, "isotropic", 100.0, 1.6, 8.0, 1.0),
}


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per problem and program."""
    peer = find_spec("cbx") is not None and device.type == "cpu"
    for title, problem in PROBLEMS.items():
        calls: dict[str, Call] = {
            "steepest, float64": Ours(problem, torch.float64, device),
            "steepest, float32": Ours(problem, torch.float32, device),
        }
        if peer:
            calls[f"{PEER}, our objective"] = Peer(problem, through_torch=True)
            calls[f"{PEER}, NumPy objective"] = Peer(problem, through_torch=False)
        seconds = interleaved_medians(calls, repeats)
        for name, call in calls.items():
            solved = torch.cat(call.solved).double()
            yield {
                "matrices": title,
                "program": name,
                "seconds": round(seconds[name], 4),
                "ratio to cbx": round(seconds[name] / seconds[f"{PEER}, our objective"], 3) if peer else None,
                "solved": round(float(solved.mean()), 3),
                "standard error": round(float(solved.std() / math.sqrt(len(solved))), 3),
                "difference": _difference(problem) if peer and name == "steepest, float64" else None,
            }


class Call:
    """500 steps of 20 runs; each call has another seed."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.seed = problem, 0
        self.solved: list[Tensor] = []

    def __call__(self) -> None:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        d, middle, width = self.problem[2], self.problem[6], self.problem[7]
        x0 = middle + width * (2 * torch.rand(RUNS, PARTICLES, d, generator=generator, dtype=torch.float64) - 1)
        self.solved.append((self.consensus(x0, generator).abs().amax(-1) < 0.25).cpu())

    def consensus(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


class Ours(Call):
    """This library."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(problem)
        self.dtype, self.device = dtype, device

    def consensus(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        objective, _, _, noise, alpha, sigma, _, _ = self.problem
        own = generator if self.device.type == "cpu" else torch.Generator(self.device).manual_seed(self.seed)
        x0 = x0.to(self.device, self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the noise is above the mean-square bound, on purpose
            swarm = ConsensusBased(objective, x0, alpha=alpha, sigma=sigma, dt=0.01, noise=noise, generator=own)
        for _ in range(STEPS):
            swarm.step()
        assert swarm.consensus is not None
        return swarm.consensus


class Peer(Call):
    """The package `cbx`, with nothing recorded."""

    def __init__(self, problem: Problem, through_torch: bool) -> None:
        super().__init__(problem)
        self.objective = _through_torch(problem[0]) if through_torch else _numpy(problem[1])

    def consensus(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        dynamic = _peer(self.problem, self.objective, x0, seed=self.seed)
        dynamic.optimize(sched=None)
        return torch.from_numpy(dynamic.consensus[:, 0])


def _peer(problem: Problem, objective: Callable[[Any], Any], x0: Tensor, **options: Any) -> Any:
    from cbx.dynamics import CBO  # pyright: ignore[reportMissingImports]

    _, _, _, noise, alpha, sigma, _, _ = problem
    given = {"noise": noise, "f_dim": "3D", "max_it": STEPS, "verbosity": 0, "track_args": {"names": []}, **options}
    return CBO(objective, x=x0.numpy().copy(), alpha=alpha, sigma=sigma, dt=0.01, check_f_dims=False, **given)


def _difference(problem: Problem) -> float:
    """The largest difference of one step of both programs with the same noise, on Rastrigin's function."""
    _, _, d, noise, _, _, _, _ = problem
    generator = torch.Generator().manual_seed(0)
    x, xi = (torch.randn(RUNS, PARTICLES, d, generator=generator, dtype=torch.float64) for _ in range(2))
    small = (rastrigin, "rastrigin", d, noise, 2.0, 0.8, 0.0, 1.0)
    dynamic = _peer(small, _through_torch(rastrigin), x, sampler=lambda size: xi.numpy().reshape(size))
    dynamic.step()
    consensus = consensus_point(x, rastrigin(x), 2.0)[:, None]
    ours = consensus_step(x, consensus, xi, lam=1.0, dt=0.01, sigma=0.8, noise=noise)
    return float((ours - torch.from_numpy(dynamic.x)).abs().max())


def _through_torch(objective: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda x: objective(torch.from_numpy(x)).numpy()


def _numpy(name: str) -> Callable[[Any], Any]:
    import numpy as np

    def waves(x: Any) -> Any:
        return (x * x + 2.5 * (1 - np.cos(2 * np.pi * x))).sum(-1)

    def canyon(x: Any) -> Any:
        a, b = x[..., 0], x[..., 1]
        valley, block = b - ((a - 1) * (a - 4) ** 2 / 8 + 2), -a - 1.6 * b
        walls = 25 * (1 - np.exp(-1.4 * valley**2 * np.exp(-0.002 * a**4)))
        ripples = 1.1625 * (2 - np.cos(0.75 * np.pi * a) - np.cos(0.75 * np.pi * b))
        barrier = np.maximum((1 - np.exp(-9 * block**2)) * np.sign(block), 0)
        return walls + 0.4 * a**2 + 0.2 * b**2 + ripples + 4 * np.exp(1 - 2 * valley**4) * barrier

    return {"rastrigin": waves, "canyon": canyon}[name]
