"""See what training does, measured and predicted: margins and implicit bias, alignment."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest.dynamics.conic import MaxMargin, is_separable, max_margin
    from steepest.dynamics.diagonal_linear import DiagonalLinearNet
    from steepest.dynamics.implicit_bias import LinearAdam, LinearSteepestDescent
    from steepest.dynamics.linear_stability import (
        LinearStability,
        frobenius_threshold,
        mean_square_threshold,
        noise_factor,
        trace_threshold,
    )
    from steepest.dynamics.linearised import LinearisedSGD, SecondMoment
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
    from steepest.dynamics.regression_paths import RegressionSGD
    from steepest.dynamics.stability import StabilityReport, TraceStability, stability_report, trace_stability
    from steepest.dynamics.two_layer_relu import TwoLayerReLU

__all__ = [
    "DiagonalLinearNet",
    "LinearAdam",
    "LinearStability",
    "LinearSteepestDescent",
    "LinearisedSGD",
    "LogDomainLoss",
    "MarginBounds",
    "MaxMargin",
    "NetworkSteepestDescent",
    "NotSeparableError",
    "RandomFeatureQuadratic",
    "RegressionSGD",
    "ScaledTensor",
    "SecondMoment",
    "StabilityReport",
    "TraceStability",
    "TwoLayerReLU",
    "frobenius_threshold",
    "is_separable",
    "logit_terms",
    "margin",
    "margin_certificate",
    "max_margin",
    "mean_square_threshold",
    "noise_factor",
    "normalized_margin",
    "spectral_margins",
    "stability_report",
    "trace_stability",
    "trace_threshold",
    "two_layer",
]

# Where each public name lives; a module is loaded when one of its names is first asked for.
_HOMES = {
    "conic": ("MaxMargin", "is_separable", "max_margin"),
    "diagonal_linear": ("DiagonalLinearNet",),
    "implicit_bias": ("LinearAdam", "LinearSteepestDescent"),
    "linear_stability": (
        "LinearStability",
        "frobenius_threshold",
        "mean_square_threshold",
        "noise_factor",
        "trace_threshold",
    ),
    "linearised": ("LinearisedSGD", "SecondMoment"),
    "log_domain": ("LogDomainLoss", "ScaledTensor", "logit_terms"),
    "margins": ("MarginBounds", "NotSeparableError", "margin", "margin_certificate", "normalized_margin"),
    "network": ("NetworkSteepestDescent", "spectral_margins", "two_layer"),
    "random_features": ("RandomFeatureQuadratic",),
    "regression_paths": ("RegressionSGD",),
    "stability": ("StabilityReport", "TraceStability", "stability_report", "trace_stability"),
    "two_layer_relu": ("TwoLayerReLU",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"steepest.dynamics.{home}"), name)
    raise AttributeError(f"module 'steepest.dynamics' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
