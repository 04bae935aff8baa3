"""Descent methods for training models and for studying optimisation, on PyTorch.

Submodules load on first use, so that ``import steepest`` costs next to nothing over ``import torch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest import (
        averages,
        curvature,
        data,
        dynamics,
        geometry,
        gradient_free,
        inference,
        minimize,
        models,
        nn,
        optim,
        transport,
    )
    from steepest.loop import run

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "averages",
    "curvature",
    "data",
    "dynamics",
    "geometry",
    "gradient_free",
    "inference",
    "minimize",
    "models",
    "nn",
    "optim",
    "run",
    "transport",
]

_SUBMODULES = frozenset(__all__) - {"__version__", "run"}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"steepest.{name}")
    if name == "run":
        return import_module("steepest.loop").run
    raise AttributeError(f"module 'steepest' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
