"""Recipes for hidden matrices, with AdamW beside them: Muon, Freon, Kaon."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer

from steepest.optim.mixed import Mixed
from steepest.optim.recipes._everywhere import adamw
from steepest.optim.recipes._members import Member, groups, layout_of

if TYPE_CHECKING:
    from steepest.optim.checks import AdjustLr, MomentumForm, NonFinite

# AdamW's learning rate per unit of Muon's: with match_rms_adamw both updates have the size of AdamW's, so it is one.
# Otherwise an update of Muon has RMS 1/sqrt(larger side), some 0.2*sqrt(larger side) times less than AdamW's.
OTHER_LR = MappingProxyType({"match_rms_adamw": 1.0, "original": 0.15, "spectral": 0.15, "none": 0.15})


def muon(
    members: list[Member],
    lr: float,
    *,
    momentum: float = 0.95,
    momentum_form: "MomentumForm" = "ema",
    nesterov: bool = True,
    weight_decay: float = 0.1,
    adjust_lr_fn: "AdjustLr" = "match_rms_adamw",
    ns_coefficients: Any = "polar_express",
    ns_steps: int | None = None,
    polar: Any = "auto",
    dtype: torch.dtype | None = None,
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
    other_lr: float | None = None,
    other: Mapping[str, Any] | None = None,
) -> Optimizer:
    """`Muon` on hidden matrices, AdamW on the rest."""
    from steepest.optim.muon import Muon

    def make(matrices: list[Member]) -> Optimizer:
        return Muon(
            groups(matrices, layout_of),
            lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            method=polar,
            dtype=dtype,
            momentum_form=momentum_form,  # pyright: ignore[reportArgumentType]
            nonfinite="ignore",
            foreach=foreach,
            maximize=maximize,
        )

    if other_lr is None:
        other_lr = lr * OTHER_LR.get(adjust_lr_fn, 1.0)
    settings = {"weight_decay": weight_decay, "maximize": maximize, **(other or {})}
    return split(members, "muon", make, other_lr, settings, nonfinite)


def freon(
    members: list[Member],
    lr: float,
    *,
    c: float = 2 / 3,
    momentum: float = 0.95,
    nesterov: bool = True,
    normalize: Literal["mean", "schatten", "none"] = "mean",
    backend: Literal["auto", "eigh", "svd", "rational"] = "auto",
    damping: float | None = None,
    weight_decay: float = 0.1,
    adjust_lr_fn: "AdjustLr" = "match_rms_adamw",
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
    other_lr: float | None = None,
    other: Mapping[str, Any] | None = None,
) -> Optimizer:
    """`Freon` on hidden matrices, AdamW on the rest."""
    from steepest.optim.freon import Freon

    def make(matrices: list[Member]) -> Optimizer:
        return Freon(
            groups(matrices, layout_of),
            lr,
            c,
            momentum,
            nesterov,
            normalize=normalize,
            backend=backend,
            damping=damping,
            weight_decay=weight_decay,
            adjust_lr_fn=adjust_lr_fn,
            nonfinite="ignore",
            foreach=foreach,
            maximize=maximize,
        )

    if other_lr is None:
        other_lr = lr * OTHER_LR.get(adjust_lr_fn, 1.0)
    settings = {"weight_decay": weight_decay, "maximize": maximize, **(other or {})}
    return split(members, "freon", make, other_lr, settings, nonfinite)


def kaon(
    members: list[Member],
    lr: float,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    weight_decay: float = 0.1,
    adjust_lr_fn: "AdjustLr" = "match_rms_adamw",
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
    other_lr: float | None = None,
    other: Mapping[str, Any] | None = None,
) -> Optimizer:
    """`Kaon` on hidden matrices, AdamW on the rest."""
    from steepest.optim.kaon import Kaon

    def make(matrices: list[Member]) -> Optimizer:
        return Kaon(
            groups(matrices, layout_of),
            lr,
            momentum,
            nesterov,
            steps=steps,
            dtype=dtype,
            weight_decay=weight_decay,
            adjust_lr_fn=adjust_lr_fn,
            nonfinite="ignore",
            foreach=foreach,
            maximize=maximize,
        )

    if other_lr is None:
        other_lr = lr * OTHER_LR.get(adjust_lr_fn, 1.0)
    settings = {"weight_decay": weight_decay, "maximize": maximize, **(other or {})}
    return split(members, "kaon", make, other_lr, settings, nonfinite)


def split(
    members: list[Member],
    name: str,
    make: Callable[[list[Member]], Optimizer],
    other_lr: float,
    other: Mapping[str, Any],
    nonfinite: "NonFinite",
    belongs: Callable[[Member], bool] = lambda member: member.matrix,
) -> Mixed:
    """A `Mixed` of `make` on the members that belong to it (the hidden matrices) and AdamW on the others."""
    mine, rest = [m for m in members if belongs(m)], [m for m in members if not belongs(m)]
    parts: dict[str, Optimizer] = {}
    if mine:
        parts[name] = make(mine)
    if rest:
        parts["adamw"] = adamw(rest, other_lr, **other)
    return Mixed(parts, nonfinite=nonfinite)
