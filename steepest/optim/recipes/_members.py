"""A trainable parameter with its role, and the param groups that recipes make of several."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from steepest.optim.roles import ParameterRole, Role
from steepest.optim.symmetry_rules import block_layout

UNDECAYED = frozenset({Role.NORM, Role.BIAS, Role.SCALAR, Role.POSITION})


@dataclass(frozen=True, eq=False)
class Member:
    """A trainable parameter with its role."""

    parameter: nn.Parameter
    row: ParameterRole

    @property
    def decayed(self) -> bool:
        """Whether weight decay is for it: not for norms, biases, scalars, positions, and other vectors."""
        return self.row.role not in UNDECAYED and sum(size != 1 for size in self.row.shape) > 1

    @property
    def matrix(self) -> bool:
        """Whether a matrix method may have it: a hidden matrix that is read as one."""
        return self.row.role.hidden and self.row.layout != "vector" and len(self.row.shape) > 1


def groups(members: Iterable[Member], key: Callable[[Member], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Param groups of named parameters: members whose `key` is equal go together, in order of first appearance."""
    found: dict[Any, dict[str, Any]] = {}
    for member in members:
        settings = key(member)
        group = found.setdefault(repr(settings), {"params": [], **settings})
        group["params"].append((member.row.name, member.parameter))
    return list(found.values())


def decay_of(member: Member, weight_decay: float) -> dict[str, Any]:
    """The weight decay of a member: none for norms, biases, scalars and positions."""
    return {"weight_decay": weight_decay if member.decayed else 0.0}


def layout_of(member: Member) -> dict[str, Any]:
    """The layout keys of the engine's param groups."""
    row = member.row
    if row.layout == "vector":
        return {"layout": "auto", "split": None, "transposed": False}
    return block_layout(row, per_head=False)
