"""One step of Freon by each of its backends, and of Kaon, beside Muon."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.matrices import Shapes, parameters
from benchmarks.timing import interleaved_medians
from steepest.optim import Freon, Kaon, Muon

TITLE = "Powers of matrices: one step"
DESCRIPTION = (
    "Freon with c = 2/3, momentum and default settings in float32; `svd` takes the singular value decomposition as "
    "other implementations do, and `auto` is the default. `times svd` is the time of the SVD form over the row's: "
    "above one, the row is faster. `over Muon` is the row's time over that of Muon with its five Newton-Schulz steps."
)
SETS: dict[str, Shapes] = {
    "wide: 24 x (128, 512)": [(24, 128, 512)],
    "square: 4 x (512, 512)": [(4, 512, 512)],
}
BASE, MUON = "Freon, svd", "Muon"
MAKERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    BASE: lambda params: Freon(params, 1e-3, 2 / 3, backend="svd"),
    "Freon, auto": lambda params: Freon(params, 1e-3, 2 / 3),
    "Freon, eigh in float64": lambda params: Freon(params, 1e-3, 2 / 3, backend="eigh", dtype=torch.float64),
    "Freon, rational": lambda params: Freon(params, 1e-3, 2 / 3, backend="rational"),
    "Kaon": lambda params: Kaon(params, 1e-3),
    MUON: lambda params: Muon(params, 1e-3, weight_decay=0.0),
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
                "ms a step": round(1e3 * seconds[name], 2),
                "times svd": round(seconds[BASE] / seconds[name], 2),
                "over Muon": round(seconds[name] / seconds[MUON], 2),
            }
