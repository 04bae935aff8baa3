"""See what training does, measured and predicted: margins and implicit bias, alignment."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest.dynamics.conic import MaxMargin, is_separable, max_margin
    from steepest.dynamics.implicit_bias import LinearAdam, LinearSteepestDescent
    from steepest.dynamics.log_domain import LogDomainLoss, ScaledTensor, logit_terms
    from steepest.dynamics.margins import (
        MarginBounds,
        NotSeparableError,
        margin,
        margin_certificate,
        normalized_margin,
    )
    from steepest.dynamics.network import NetworkSteepestDescent, spectral_margins, two_layer
    from steepest.dynamics.random_features import RandomFeatureQuadratic

__all__ = [
    "LinearAdam",
    "LinearSteepestDescent",
    "LogDomainLoss",
    "MarginBounds",
    "MaxMargin",
    "NetworkSteepestDescent",
    "NotSeparableError",
    "RandomFeatureQuadratic",
    "ScaledTensor",
    "is_separable",
    "logit_terms",
    "margin",
    "margin_certificate",
    "max_margin",
    "normalized_margin",
    "spectral_margins",
    "two_layer",
]

# Where each public name lives; a module is loaded when one of its names is first asked for.
_HOMES = {
    "conic": ("MaxMargin", "is_separable", "max_margin"),
    "implicit_bias": ("LinearAdam", "LinearSteepestDescent"),
    "log_domain": ("LogDomainLoss", "ScaledTensor", "logit_terms"),
    "margins": ("MarginBounds", "NotSeparableError", "margin", "margin_certificate", "normalized_margin"),
    "network": ("NetworkSteepestDescent", "spectral_margins", "two_layer"),
    "random_features": ("RandomFeatureQuadratic",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"steepest.dynamics.{home}"), name)
    raise AttributeError(f"module 'steepest.dynamics' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
