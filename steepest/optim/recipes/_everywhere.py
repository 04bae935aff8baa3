"""Recipes that treat every parameter alike: AdamW, SGD, sign descent, normalised descent."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer

from steepest.optim.recipes._members import Member, decay_of, groups, layout_of

if TYPE_CHECKING:
    from steepest.optim.checks import NonFinite


def adamw(
    members: list[Member],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    amsgrad: bool = False,
    fused: bool | None = None,
    foreach: bool | None = None,
    maximize: bool = False,
) -> Optimizer:
    """`torch.optim.AdamW`, without weight decay on norms, biases, scalars and positions."""
    return torch.optim.AdamW(
        groups(members, lambda member: decay_of(member, weight_decay)),
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=_fused(members) if fused is None and foreach is None else fused,
        foreach=foreach,
        maximize=maximize,
    )


def sgd(
    members: list[Member],
    lr: float,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    fused: bool | None = None,
    foreach: bool | None = None,
    maximize: bool = False,
) -> Optimizer:
    """`torch.optim.SGD` with momentum."""
    return torch.optim.SGD(
        groups(members, lambda member: decay_of(member, weight_decay)),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov and momentum > 0 and dampening == 0,
        weight_decay=weight_decay,
        dampening=dampening,
        fused=_fused(members) if fused is None and foreach is None else fused,
        foreach=foreach,
        maximize=maximize,
    )


def sign(
    members: list[Member],
    lr: float,
    *,
    momentum: float = 0.99,
    interpolation: float | None = 0.9,
    weight_decay: float = 0.1,
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
) -> Optimizer:
    """`SignDescent` (Lion; `interpolation=None` is Signum) on every parameter."""
    from steepest.optim.sign import SignDescent

    return SignDescent(
        groups(members, lambda member: decay_of(member, weight_decay)),
        lr,
        momentum=momentum,
        interpolation=interpolation,
        weight_decay=weight_decay,
        nonfinite=nonfinite,
        foreach=foreach,
        maximize=maximize,
    )


def normalized(
    members: list[Member],
    lr: float,
    *,
    norm: Any = "euclidean",
    scope: Literal["parameter", "all"] = "parameter",
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
) -> Optimizer:
    """`NormalizedDescent` on every parameter; vectors and scalars always have the Euclidean norm."""
    from steepest.optim.normalized import NormalizedDescent

    def key(member: Member) -> dict[str, Any]:
        vector = len(member.row.shape) < 2
        return {"norm": "euclidean" if vector else norm, **layout_of(member), **decay_of(member, weight_decay)}

    return NormalizedDescent(
        groups(members, key),
        lr,
        norm=norm,
        scope=scope,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        nonfinite=nonfinite,
        foreach=foreach,
        maximize=maximize,
    )


def _fused(members: Iterable[Member]) -> bool | None:
    """True where torch has one kernel for the step (it refuses other devices and dtypes), else its own choice."""
    fits = all(m.parameter.device.type in ("cpu", "cuda", "xpu") and m.parameter.is_floating_point() for m in members)
    return True if fits else None
