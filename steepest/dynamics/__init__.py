"""See what training does, measured and predicted: margins and implicit bias, alignment."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest.dynamics.bigram import BigramToy, Excess
    from steepest.dynamics.complexity import geometric_complexity
    from steepest.dynamics.conic import MaxMargin, is_separable, max_margin
    from steepest.dynamics.diagonal_linear import DiagonalLinearNet
    from steepest.dynamics.drift import StepDrift, local_error, step_drift
    from steepest.dynamics.flat_loss import FlatLoss
    from steepest.dynamics.flows import (
        IGR,
        NGF,
        Flow,
        PrincipalFlow,
        StabilityCoefficients,
        ThirdOrder,
        principal_coefficient,
        stability_coefficients,
    )
    from steepest.dynamics.game_flow import GameFlow, game_order
    from steepest.dynamics.games import GameDrift, GameTerms, TwoPlayer, game_drift
    from steepest.dynamics.implicit_bias import LinearAdam, LinearSteepestDescent
    from steepest.dynamics.integration import integrate
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
    from steepest.dynamics.modified_losses import ImplicitlyRegularizedLoss, MultiStepLoss, RandomOrderLoss
    from steepest.dynamics.monitor import Monitor
    from steepest.dynamics.monitor_verdict import Verdict, judge
    from steepest.dynamics.network import NetworkSteepestDescent, spectral_margins, two_layer
    from steepest.dynamics.network_radii import NetworkRadius, activation_radius, network_radius
    from steepest.dynamics.random_features import RandomFeatureQuadratic
    from steepest.dynamics.regression_paths import RegressionSGD
    from steepest.dynamics.river import WindingValley, river_residual
    from steepest.dynamics.river_valley import Moments, RiverValley
    from steepest.dynamics.role_norms import RoleNorms
    from steepest.dynamics.sharpness import (
        EdgeMeasurement,
        SharpnessMonitor,
        edge_threshold,
        measure_edge,
        preconditioned,
        preconditioner,
    )
    from steepest.dynamics.softmax_radius import (
        StepRadius,
        binary_radius,
        dominance_radius,
        exact_radius,
        ghosts,
        logit_slopes,
        radius,
        step_radius,
        tight_radius,
        top2_radius,
    )
    from steepest.dynamics.softmax_series import KLRemainder, kl_remainder, log_partition_series
    from steepest.dynamics.stability import StabilityReport, TraceStability, stability_report, trace_stability
    from steepest.dynamics.step_size import step_lr, unwrapped
    from steepest.dynamics.two_layer_relu import TwoLayerReLU
    from steepest.dynamics.variational_edge import (
        Modes,
        Probability,
        descent_modes,
        descent_probability,
        expected_descent,
        variational_factor,
        vgd_threshold,
    )

__all__ = [
    "IGR",
    "NGF",
    "BigramToy",
    "DiagonalLinearNet",
    "EdgeMeasurement",
    "Excess",
    "FlatLoss",
    "Flow",
    "GameDrift",
    "GameFlow",
    "GameTerms",
    "ImplicitlyRegularizedLoss",
    "KLRemainder",
    "LinearAdam",
    "LinearStability",
    "LinearSteepestDescent",
    "LinearisedSGD",
    "LogDomainLoss",
    "MarginBounds",
    "MaxMargin",
    "Modes",
    "Moments",
    "Monitor",
    "MultiStepLoss",
    "NetworkRadius",
    "NetworkSteepestDescent",
    "NotSeparableError",
    "PrincipalFlow",
    "Probability",
    "RandomFeatureQuadratic",
    "RandomOrderLoss",
    "RegressionSGD",
    "RiverValley",
    "RoleNorms",
    "ScaledTensor",
    "SecondMoment",
    "SharpnessMonitor",
    "StabilityCoefficients",
    "StabilityReport",
    "StepDrift",
    "StepRadius",
    "ThirdOrder",
    "TraceStability",
    "TwoLayerReLU",
    "TwoPlayer",
    "Verdict",
    "WindingValley",
    "activation_radius",
    "binary_radius",
    "descent_modes",
    "descent_probability",
    "dominance_radius",
    "edge_threshold",
    "exact_radius",
    "expected_descent",
    "frobenius_threshold",
    "game_drift",
    "game_order",
    "geometric_complexity",
    "ghosts",
    "integrate",
    "is_separable",
    "judge",
    "kl_remainder",
    "local_error",
    "log_partition_series",
    "logit_slopes",
    "logit_terms",
    "margin",
    "margin_certificate",
    "max_margin",
    "mean_square_threshold",
    "measure_edge",
    "network_radius",
    "noise_factor",
    "normalized_margin",
    "preconditioned",
    "preconditioner",
    "principal_coefficient",
    "radius",
    "river_residual",
    "spectral_margins",
    "stability_coefficients",
    "stability_report",
    "step_drift",
    "step_lr",
    "step_radius",
    "tight_radius",
    "top2_radius",
    "trace_stability",
    "trace_threshold",
    "two_layer",
    "unwrapped",
    "variational_factor",
    "vgd_threshold",
]

# Where each public name lives; a module is loaded when one of its names is first asked for.
_HOMES = {
    "bigram": ("BigramToy", "Excess"),
    "river": ("WindingValley", "river_residual"),
    "river_valley": ("Moments", "RiverValley"),
    "drift": (
        "StepDrift",
        "local_error",
        "step_drift",
    ),
    "flat_loss": ("FlatLoss",),
    "flows": (
        "IGR",
        "NGF",
        "Flow",
        "PrincipalFlow",
        "StabilityCoefficients",
        "ThirdOrder",
        "principal_coefficient",
        "stability_coefficients",
    ),
    "integration": ("integrate",),
    "modified_losses": (
        "ImplicitlyRegularizedLoss",
        "MultiStepLoss",
        "RandomOrderLoss",
    ),
    "conic": ("MaxMargin", "is_separable", "max_margin"),
    "diagonal_linear": ("DiagonalLinearNet",),
    "game_flow": ("GameFlow", "game_order"),
    "games": ("GameDrift", "GameTerms", "TwoPlayer", "game_drift"),
    "complexity": ("geometric_complexity",),
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
    "monitor": ("Monitor",),
    "monitor_verdict": ("Verdict", "judge"),
    "network": ("NetworkSteepestDescent", "spectral_margins", "two_layer"),
    "random_features": ("RandomFeatureQuadratic",),
    "regression_paths": ("RegressionSGD",),
    "stability": ("StabilityReport", "TraceStability", "stability_report", "trace_stability"),
    "two_layer_relu": ("TwoLayerReLU",),
    "role_norms": ("RoleNorms",),
    "sharpness": (
        "EdgeMeasurement",
        "SharpnessMonitor",
        "edge_threshold",
        "preconditioned",
        "preconditioner",
        "measure_edge",
    ),
    "step_size": ("step_lr", "unwrapped"),
    "variational_edge": (
        "Modes",
        "Probability",
        "descent_modes",
        "descent_probability",
        "expected_descent",
        "variational_factor",
        "vgd_threshold",
    ),
    "network_radii": (
        "NetworkRadius",
        "activation_radius",
        "network_radius",
    ),
    "softmax_radius": (
        "StepRadius",
        "binary_radius",
        "dominance_radius",
        "exact_radius",
        "ghosts",
        "logit_slopes",
        "radius",
        "step_radius",
        "tight_radius",
        "top2_radius",
    ),
    "softmax_series": (
        "KLRemainder",
        "kl_remainder",
        "log_partition_series",
    ),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"steepest.dynamics.{home}"), name)
    raise AttributeError(f"module 'steepest.dynamics' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
