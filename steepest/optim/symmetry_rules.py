"""The rules of the symmetry-compatible stack by name, and how a block is seen by them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from steepest.geometry import Direction, Hybrid, OneSided, RowNorm, Spectral
from steepest.geometry.orientation import Orientation
from steepest.optim.roles import ParameterRole, Role


@dataclass(frozen=True)
class Tuning:
    """What all rules of a stack share, see `symmetry_groups`."""

    alpha: float = 1.0
    polar: Literal["auto", "svd", "eigh", "newton_schulz", "polar_express"] = "auto"
    steps: int | None = None
    per_expert_scale: bool = False
    min_row_norm: float = 0.0


Maker = Callable[[Tuning, Orientation, bool], Direction]


def _row(center: bool = False) -> Maker:
    return lambda tuning, orientation, stack: RowNorm(center, orientation, min_row_norm=tuning.min_row_norm)


def _spectral(rule: type[OneSided] | type[Hybrid], **fixed: Any) -> Maker:
    def make(tuning: Tuning, orientation: Orientation, stack: bool) -> Direction:
        return rule(
            orientation=orientation,
            alpha=tuning.alpha,
            method=tuning.polar,
            steps=tuning.steps,
            per_matrix_scale=tuning.per_expert_scale or not stack,
            **fixed,
        )

    return make


def _muon(tuning: Tuning, orientation: Orientation, stack: bool) -> Direction:
    if tuning.polar in ("svd", "eigh"):
        return Spectral(method=tuning.polar)  # pyright: ignore[reportArgumentType]
    return Spectral(method="auto", steps=tuning.steps)


RULES: Mapping[str, Maker | None] = MappingProxyType(
    {
        "row": _row(),
        "centered_row": _row(center=True),
        "one_sided": _spectral(OneSided),
        "left": _spectral(OneSided, side="left"),
        "right": _spectral(OneSided, side="right"),
        "centered_one_sided": _spectral(OneSided, center=True),
        "centered_left": _spectral(OneSided, side="left", center=True),
        "centered_right": _spectral(OneSided, side="right", center=True),
        "hybrid": _spectral(Hybrid),
        "centered_hybrid": _spectral(Hybrid, center=True),
        "polar_then_row": _spectral(Hybrid, order="polar_then_row"),
        "column": _row(),
        "column_hybrid": _spectral(Hybrid),
        "pair": _row(),
        "pair_hybrid": _spectral(Hybrid),
        "muon": _muon,
        "adamw": None,
    }
)
"""Rule names. "column..." take inputs, "pair..." the (gate, up) of a neuron as rows; "muon" is the polar factor of the
momentum a step ahead, times sqrt(max(1, rows / columns))."""


def rule_settings(rule: str | Direction, tuning: Tuning, row: ParameterRole | None = None) -> dict[str, Any]:
    """The keys of the engine's param group that a rule sets: norm, nesterov, adjust_lr_fn."""
    if isinstance(rule, Direction):
        return {"norm": rule, "nesterov": False, "adjust_lr_fn": "none"}
    maker = RULES.get(rule)
    if maker is None:
        raise ValueError(f"rule must be a Direction or one of {', '.join(RULES)}; got {rule!r}")
    stack = row is not None and row.layout == "batch"
    norm = maker(tuning, _orientation(rule, row), stack)
    if rule == "muon":
        return {"norm": norm, "nesterov": True, "adjust_lr_fn": "original"}
    return {"norm": norm, "nesterov": False, "adjust_lr_fn": "none"}


def _orientation(rule: str, row: ParameterRole | None) -> Orientation:
    if rule.startswith("column"):
        return "columns"
    if not rule.startswith("pair"):
        return "rows"
    if row is None or row.role not in (Role.GATE_UP, Role.EXPERT_GATE_UP):
        name = "a parameter" if row is None else f"{row.name} ({row.role.value}, shape {row.shape})"
        raise ValueError(f"rule {rule!r} needs gate and up in one parameter, and {name} is not that; use 'row'")
    return "pair_interleaved" if row.interleaved else "pair_concatenated"


def block_layout(row: ParameterRole, per_head: bool = True, whole: str = "") -> dict[str, Any]:
    """The layout keys of a parameter: its role's blocks, attention cut into heads.

    Args:
        row: the parameter.
        per_head: whether queries, keys, values and attention outputs are matrices per head.
        whole: not empty: gate and up stay one matrix, for the rules that pair them.
    """
    keys: dict[str, Any] = {
        "layout": row.layout,
        "split": None if whole else row.split,
        "transposed": row.transposed,
        "input_split": None,
        "interleaved": 2 if not whole and alternates(row) else 1,
    }
    if not (per_head and row.head_dim and row.layout == "matrix"):
        return keys
    rows, columns = row.shape[::-1] if row.transposed else row.shape
    if row.role is Role.ATTENTION_OUT:
        return {**keys, "split": None, "input_split": _equal(columns, row.head_dim)}
    if all(size % row.head_dim == 0 for size in row.split or (rows,)):
        return {**keys, "split": _equal(rows, row.head_dim)}
    return keys


def alternates(row: ParameterRole) -> bool:
    """Whether gate and up alternate neuron by neuron."""
    return row.interleaved and row.split is None and row.role in (Role.GATE_UP, Role.EXPERT_GATE_UP)


def _equal(side: int, size: int) -> tuple[int, ...] | None:
    return (size,) * (side // size) if side % size == 0 and side > size else None
