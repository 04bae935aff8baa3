"""Train a network: norm-based optimizers on one engine, parameter roles, and the right mix for any model."""

from steepest.optim.build import build, methods, recipe
from steepest.optim.engine import SteepestDescent
from steepest.optim.layout import Layout
from steepest.optim.mixed import Mixed
from steepest.optim.muon import Muon
from steepest.optim.normalized import NormalizedDescent
from steepest.optim.recipes import Recipe
from steepest.optim.roles import ParameterRole, Role, Roles, roles
from steepest.optim.scion import Scion
from steepest.optim.sign import SignDescent
from steepest.optim.step_rules import Clip, Joint, Sharp, StepRule, Unit

__all__ = [
    "Clip",
    "Joint",
    "Layout",
    "Mixed",
    "Muon",
    "NormalizedDescent",
    "ParameterRole",
    "Recipe",
    "Role",
    "Roles",
    "Scion",
    "Sharp",
    "SignDescent",
    "SteepestDescent",
    "StepRule",
    "Unit",
    "build",
    "methods",
    "recipe",
    "roles",
]
