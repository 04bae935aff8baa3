"""One step of isotropic-mixture inference beside what one would write with torch.distributions, and the baselines."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import interleaved_medians
from steepest.inference import DiagonalVI, FullCovarianceVI, IsotropicMixture, MixtureVI, random_gaussian_mixture

TITLE = "Isotropic mixtures: one step beside torch.distributions"
DESCRIPTION = (
    "A step of the reverse KL divergence at N components with 10 draws each, the target's score given where the method "
    "takes one. The peer has a gradient of the same expectation, by reparametrised draws of `MixtureSameFamily` and "
    "autograd, with plain SGD on means and log-variances. Memory: growth of the peak of a fresh process over three "
    "steps, beside the bytes of one tensor of all differences (10 N, N, d)."
)
SIZES = {"d = 2, N = 20": (2, 20), "d = 100, N = 10": (100, 10), "d = 100, N = 50": (100, 50)}
DRAWS = 10
STATUS = Path("/proc/self/status")
PEER = "torch.distributions"


def problem(d: int, n: int, device: torch.device) -> tuple[Any, IsotropicMixture, torch.Generator]:
    """A target of five diagonal Gaussians, a wide start, and the noise to use."""
    generator = torch.Generator().manual_seed(0)
    target = random_gaussian_mixture(5, d, 8.0, 5.0, kind="diagonal", generator=generator, dtype=torch.float64)
    target = type(target)(target.means.to(device), target.covariances.to(device), target.weights.to(device))
    start = IsotropicMixture.from_box(n, d, 15.0, 2.0, generator=generator, dtype=torch.float64).to(device)
    return target, start, torch.Generator(device).manual_seed(1)


def stepper(name: str, d: int, n: int, device: torch.device) -> Callable[[], Any]:
    """A function that makes one step."""
    target, start, generator = problem(d, n, device)
    lr = 0.1 / d
    if name == PEER:
        return _by_hand(target, start, lr)
    methods: dict[str, Callable[[], Any]] = {
        "MixtureVI, score": lambda: MixtureVI(None, start, score=target.score, lr=lr, generator=generator),
        "MixtureVI, log_prob": lambda: MixtureVI(target.log_prob, start, lr=lr, generator=generator),
        "DiagonalVI": lambda: DiagonalVI(None, start, score=target.score, lr=lr, generator=generator),
        "FullCovarianceVI": lambda: FullCovarianceVI(None, start, score=target.score, lr=lr, generator=generator),
    }
    return methods[name]().step


def _by_hand(target: Any, start: IsotropicMixture, lr: float) -> Callable[[], None]:
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    n, d = start.means.shape
    means = start.means.clone().requires_grad_()
    logs = start.variances.log().requires_grad_()
    weights = torch.ones(n, dtype=means.dtype, device=means.device)

    def step() -> None:
        scale = (logs / 2).exp()[:, None].expand(n, d)
        q = MixtureSameFamily(Categorical(weights), Independent(Normal(means, scale), 1))
        x = means[:, None] + scale[:, None] * torch.randn(n, DRAWS, d, dtype=means.dtype, device=means.device)
        x = x.flatten(0, 1)
        loss = (q.log_prob(x) - target.log_prob(x)).mean()
        gradients = torch.autograd.grad(loss, (means, logs))
        with torch.no_grad():
            means.sub_(gradients[0], alpha=lr * n)
            logs.sub_(gradients[1], alpha=lr * n)

    return step


NAMES = ("MixtureVI, score", "MixtureVI, log_prob", PEER, "DiagonalVI", "FullCovarianceVI")


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per workload and method."""
    for title, (d, n) in SIZES.items():
        seconds = interleaved_medians({name: stepper(name, d, n, device) for name in NAMES}, 20 * repeats)
        for name in NAMES:
            yield {
                "matrices": title,
                "method": name,
                "ms a step": round(1e3 * seconds[name], 3),
                "ratio to torch.distributions": round(seconds[name] / seconds[PEER], 3),
                "peak memory, MB": memory(name, d, n, device),
                "all differences, MB": round(8e-6 * DRAWS * n * n * d, 3),
            }


def memory(name: str, d: int, n: int, device: torch.device) -> float | None:
    """Growth of the peak memory over three steps, in MB; on a CPU in a fresh process."""
    if device.type == "cuda":
        step = stepper(name, d, n, device)
        step()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            step()
        return round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 2)
    code = f"import benchmarks.mixture_vi as b; print(b._growth({name!r}, {d}, {n}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = found.stdout.split()[-1]
    return None if last == "None" else float(last)


def _growth(name: str, d: int, n: int) -> float | None:
    """Peak resident memory of this process beyond that before the steps, in MB."""
    if not STATUS.exists():
        return None
    torch.set_num_threads(1)
    stepper(name, 2, 2, torch.device("cpu"))()  # what is loaded at the first use does not count
    step = stepper(name, d, n, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    for _ in range(3):
        step()
    return round((_peak() - before) * 1024 / 1e6, 2)


def _peak() -> int:
    """Peak resident memory in KiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])
