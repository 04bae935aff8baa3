"""One IVON step beside `ivon-opt`: drawing the sample, restoring the mean, and the update; no model is evaluated."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import interleaved_medians
from steepest.optim import IVON

TITLE = "IVON: one step beside ivon-opt"
DESCRIPTION = (
    "Sampling, restoring the mean and the update, with given gradients. The floor: the noise drawn in one call, and "
    "the bytes that must move, copied (32 a parameter to sample and restore, 32 to update). Memory: growth of the peak "
    "of a fresh process over three steps, parameters and gradients not counted."
)
SIZES = {"1 M parameters": 577, "10 M parameters": 1825}
STATUS = Path("/proc/self/status")
OURS, PEER, FLOOR = "IVON", "ivon-opt", "noise and copies alone"


def parameters(width: int, device: torch.device) -> list[torch.nn.Parameter]:
    """Three dense layers with biases, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in [(width, width), (width,)] * 3:
        parameter = torch.nn.Parameter((torch.randn(shape, generator=generator) / width**0.5).to(device))
        parameter.grad = (torch.randn(shape, generator=generator) / width).to(device)
        found.append(parameter)
    return found


def stepper(name: str, params: list[torch.nn.Parameter], samples: int) -> Callable[[], None]:
    """A function that samples and steps once."""
    shared: dict[str, Any] = {"lr": 0.1, "ess": 5e4}
    if name == OURS:
        optimizer: Any = IVON(params, **shared, samples=samples)
    else:
        import ivon  # pyright: ignore[reportMissingImports]

        optimizer = ivon.IVON(params, **shared, mc_samples=samples)
    gradients = [parameter.grad for parameter in params]

    def step() -> None:
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                for parameter, gradient in zip(params, gradients, strict=True):
                    parameter.grad = gradient
        optimizer.step()

    return step


def floor(size: int, samples: int, device: torch.device) -> Callable[[], None]:
    """The noise of a step and its memory traffic: a copy reads and writes 8 bytes an element."""
    noise, source, target = (torch.ones(size, device=device) for _ in range(3))

    def step() -> None:
        for _ in range(samples):
            noise.normal_()
        for _ in range(4 * samples + 4):
            target.copy_(source)

    return step


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per size, number of samples and optimizer."""
    names = [OURS, PEER] if find_spec("ivon") else [OURS]
    for title, width in SIZES.items():
        for samples in (1, 4):
            if samples > 1 and width > 1000:
                continue
            calls: dict[str, Callable[[], Any]] = {
                name: stepper(name, parameters(width, device), samples) for name in names
            }
            calls[FLOOR] = floor(3 * width * (width + 1), samples, device)
            seconds = interleaved_medians(calls, repeats)
            for name in calls:
                yield {
                    "matrices": title,
                    "samples": samples,
                    "optimizer": name,
                    "ms a step": round(1e3 * seconds[name], 3),
                    "ratio to ivon-opt": round(seconds[name] / seconds[PEER], 3) if PEER in seconds else None,
                    "memory, 4 bytes a parameter": None if name == FLOOR else memory(name, width, samples, device),
                }


def memory(name: str, width: int, samples: int, device: torch.device) -> float | None:
    """Growth of the peak memory over three steps, in a fresh process on a CPU, in copies of the parameters."""
    if device.type == "cuda":
        return _on_device(name, width, samples, device)
    code = f"import benchmarks.ivon as b; print(b._growth({name!r}, {width}, {samples}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = found.stdout.split()[-1]
    return None if last == "None" else float(last)


def _growth(name: str, width: int, samples: int) -> float | None:
    """Peak resident memory of this process beyond that before the optimizer, in copies of the parameters."""
    if not STATUS.exists():
        return None
    params = parameters(width, torch.device("cpu"))
    small = stepper(name, parameters(8, torch.device("cpu")), samples)
    small()  # what is loaded at the first use does not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    step = stepper(name, params, samples)
    for _ in range(3):
        step()
    return round((_peak() - before) * 1024 / (4 * 3 * width * (width + 1)), 2)


def _peak() -> int:
    """Peak resident memory in KiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def _on_device(name: str, width: int, samples: int, device: torch.device) -> float:
    params = parameters(width, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step = stepper(name, params, samples)
    for _ in range(3):
        step()
    return round((torch.cuda.max_memory_allocated(device) - before) / (4 * 3 * width * (width + 1)), 2)
