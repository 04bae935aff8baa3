"""One step of the norms that need no matrix function, beside torch's fused AdamW."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.matrices import SETS, parameters
from benchmarks.timing import interleaved_medians
from steepest.optim import NormalizedDescent, Scion, SignDescent

TITLE = "Element-, row- and column-wise norms: one step"
DESCRIPTION = "With momentum and weight decay, and with the check for non-finite gradients that AdamW does not make."
BASE = "torch.optim.AdamW(fused=True)"

MAKERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    BASE: lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, fused=True),
    "SignDescent (Lion)": lambda params: SignDescent(params, lr=1e-4, weight_decay=0.1),
    "SignDescent (Signum)": lambda params: SignDescent(params, lr=1e-4, interpolation=None, weight_decay=0.1),
    "Scion, sign": lambda params: Scion(params, lr=1e-4, norm="sign", constrained=True),
    "NormalizedDescent": lambda params: NormalizedDescent(params, lr=1e-4, weight_decay=0.1),
    "NormalizedDescent, rows": lambda params: NormalizedDescent(params, lr=1e-4, norm="row", weight_decay=0.1),
    "NormalizedDescent, columns": lambda params: NormalizedDescent(params, lr=1e-4, norm="column", weight_decay=0.1),
}


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per set of matrices and optimizer."""
    for title, shapes in SETS.items():
        steps = {name: make(parameters(shapes, device)).step for name, make in MAKERS.items()}
        seconds = interleaved_medians(steps, repeats)
        for name in MAKERS:
            yield {
                "matrices": title,
                "optimizer": name,
                "ms a step": round(1e3 * seconds[name], 3),
                "ratio to fused AdamW": round(seconds[name] / seconds[BASE], 2),
            }
