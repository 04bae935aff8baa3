"""Recipes of Scion: a norm and a radius for every parameter, by its role."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from steepest.optim.mixed import Mixed
from steepest.optim.recipes._hidden import split
from steepest.optim.recipes._members import Member, groups, layout_of
from steepest.optim.roles import Role

if TYPE_CHECKING:
    from steepest.optim.checks import NonFinite
    from steepest.optim.scion_presets import Preset, Radii
    from steepest.optim.step_rules import ShortStep


def scion(
    members: list[Member],
    lr: float,
    *,
    momentum: float = 0.9,
    constrained: bool = False,
    preset: "Preset" = "auto",
    radii: "Radii | None" = None,
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
    other_lr: float | None = None,
    other: Mapping[str, Any] | None = None,
) -> Optimizer:
    """`Scion` on every parameter by the authors' recipe; only parameters of unknown role go to AdamW."""
    from steepest.optim.scion import Scion
    from steepest.optim.scion_presets import scion_settings

    settings = scion_settings(members, preset, radii, constrained)
    options = {"momentum": momentum, "constrained": constrained, "foreach": foreach, "maximize": maximize}

    def make(own: list[Member]) -> Optimizer:
        keys = groups(own, lambda member: {**settings(member), **layout_of(member)})
        return Scion(keys, lr, nonfinite="ignore", **options)

    return _all_but_ambiguous(members, "scion", make, lr, other_lr, {"maximize": maximize, **(other or {})}, nonfinite)


def clipped_scion(
    members: list[Member],
    lr: float,
    *,
    clip: float | None = None,
    momentum: float = 0.9,
    constrained: bool = False,
    short_step: "ShortStep" = "plain",
    preset: "Preset" = "auto",
    radii: "Radii | None" = None,
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
    other_lr: float | None = None,
    other: Mapping[str, Any] | None = None,
) -> Optimizer:
    """`ClippedScion` on every parameter, with the norms and radii of "scion"; `clip` None takes the preset's."""
    from steepest.optim.clipped_scion import ClippedScion
    from steepest.optim.scion_presets import default_clip, scion_settings

    settings = scion_settings(members, preset, radii, constrained)
    threshold = default_clip(members, preset, constrained) if clip is None else clip
    options = {"momentum": momentum, "constrained": constrained, "foreach": foreach, "maximize": maximize}

    def make(own: list[Member]) -> Optimizer:
        keys = groups(own, lambda member: {**settings(member), **layout_of(member)})
        return ClippedScion(keys, lr, threshold, short_step=short_step, nonfinite="ignore", **options)

    rest = {"maximize": maximize, **(other or {})}
    return _all_but_ambiguous(members, "clipped_scion", make, lr, other_lr, rest, nonfinite)


def _all_but_ambiguous(
    members: list[Member],
    name: str,
    make: Callable[[list[Member]], Optimizer],
    lr: float,
    other_lr: float | None,
    other: Mapping[str, Any],
    nonfinite: "NonFinite",
) -> Mixed:
    other_lr = other_lr if other_lr is not None else min(lr, 1e-3)
    return split(members, name, make, other_lr, other, nonfinite, lambda m: m.row.role is not Role.AMBIGUOUS)
