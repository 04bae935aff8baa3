"""What a rule hands back: a role, its evidence, and how the tensor comes apart."""

from dataclasses import dataclass

from steepest.optim.roles._types import Role

ADVICE = "name its role with overrides={pattern: role}"


@dataclass(frozen=True)
class Split:
    """Row blocks of a fused matrix (None: they are not known), and the sentence that says where they come from."""

    sizes: tuple[int, ...] | None
    blocks: tuple[str, ...]
    why: str
    interleaved: bool = False


@dataclass(frozen=True)
class Finding:
    """A role with its evidence."""

    role: Role
    reason: str
    layout: str = "vector"
    split: Split | None = None
    transposed: bool = False
    interleaved: bool = False
    head_dim: int | None = None
