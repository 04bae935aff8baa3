"""Train a network: norm-based optimizers on one engine, parameter roles, and the right mix for any model."""

from steepest.optim.engine import SteepestDescent
from steepest.optim.layout import Layout
from steepest.optim.muon import Muon
from steepest.optim.normalized import NormalizedDescent
from steepest.optim.scion import Scion
from steepest.optim.sign import SignDescent
from steepest.optim.step_rules import Joint, Sharp, StepRule, Unit

__all__ = [
    "Joint",
    "Layout",
    "Muon",
    "NormalizedDescent",
    "Scion",
    "Sharp",
    "SignDescent",
    "SteepestDescent",
    "StepRule",
    "Unit",
]
