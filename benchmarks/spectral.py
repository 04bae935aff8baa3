"""One step of Muon, ours and the peers'; and how far from orthogonal each leaves its update."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.matrices import SETS, Shapes, parameters
from benchmarks.timing import interleaved_medians
from steepest.geometry import polar_error
from steepest.optim import Muon

TITLE = "Spectral optimizers: one step"
DESCRIPTION = (
    "Default settings of each; `compiled` is ours with compile=True. `ratio` is our time over the peer's: below one, "
    "ours is faster. The orthogonality error is the largest |s - 1| among the singular values s of the first update, "
    "over the directions in which the momentum has more than 1e-3 of its largest singular value; it is given where the "
    "scale of the step is documented."
)


def peers() -> dict[str, Callable[[list[Any]], torch.optim.Optimizer]]:
    """Constructors by name; those of packages that are not installed are left out."""
    found: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
        "torch.optim.Muon": lambda params: torch.optim.Muon(params, lr=1e-3, weight_decay=0.0)
    }
    try:
        import pytorch_optimizer
    except ImportError:
        return found
    found["pytorch_optimizer.Muon"] = lambda params: pytorch_optimizer.Muon(
        [{"params": params, "use_muon": True}], lr=1e-3, weight_decay=0.0
    )
    found["pytorch_optimizer.SCION"] = lambda params: pytorch_optimizer.SCION(params, lr=1e-3, weight_decay=0.0)
    return found


def rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per set of matrices and peer."""
    makers = {"steepest.optim.Muon": lambda params: Muon(params, lr=1e-3, weight_decay=0.0)}
    if device.type == "cuda":  # on processors it takes a C++ compiler, and the eager step is the one to use
        makers["compiled"] = lambda params: Muon(params, lr=1e-3, weight_decay=0.0, compile=True)
    makers |= peers()
    of_known_scale = {"steepest.optim.Muon": Muon, "torch.optim.Muon": torch.optim.Muon}
    for title, shapes in SETS.items():
        errors = {name: orthogonality_error(make, shapes, device) for name, make in of_known_scale.items()}
        steps = {name: make(parameters(shapes, device)).step for name, make in makers.items()}
        seconds = interleaved_medians(steps, repeats)
        for name in makers:
            yield {
                "matrices": title,
                "optimizer": name,
                "ms a step": round(1e3 * seconds[name], 2),
                "ratio": round(seconds["steepest.optim.Muon"] / seconds[name], 3),
                "orthogonality error": round(errors[name], 4) if name in errors else None,
            }


def orthogonality_error(make: Callable[..., torch.optim.Optimizer], shapes: Shapes, device: torch.device) -> float:
    """Of the first update of an optimizer whose step is lr * sqrt(max(1, rows / columns)) * factor."""
    params = parameters(shapes, device)
    before = [parameter.detach().clone() for parameter in params]
    make(params, lr=1.0, weight_decay=0.0).step()
    worst = 0.0
    for parameter, old in zip(params, before, strict=True):
        assert parameter.grad is not None
        factor = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
        worst = max(worst, polar_error((old - parameter.detach()) / factor, parameter.grad))
    return worst
