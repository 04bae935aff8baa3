"""The convergence radius of the cross-entropy along a step: bounds, the exact radius, and steps in its units.

The functions live in `steepest.curvature`, below the optimizers that use them, and are named here for who looks on.
"""

from steepest.curvature.logit_slopes import logit_slopes
from steepest.curvature.softmax_radius import (
    binary_radius,
    dominance_radius,
    exact_radius,
    ghosts,
    radius,
    spread,
    tight_radius,
    top2_radius,
)
from steepest.curvature.step_radius import StepRadius, step_radius

__all__ = [
    "StepRadius",
    "binary_radius",
    "dominance_radius",
    "exact_radius",
    "ghosts",
    "logit_slopes",
    "radius",
    "spread",
    "step_radius",
    "tight_radius",
    "top2_radius",
]
