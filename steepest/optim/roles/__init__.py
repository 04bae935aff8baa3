"""Which role each parameter of a network has, and why."""

from steepest.optim.roles._detect import roles
from steepest.optim.roles._types import HIDDEN, ParameterRole, Role, Roles

__all__ = ["HIDDEN", "ParameterRole", "Role", "Roles", "roles"]
