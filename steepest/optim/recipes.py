"""How each method treats each kind of parameter: one `Recipe` per method, in `RECIPES`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from steepest.optim.drop_muon import drop_muon
from steepest.optim.mixed import Mixed
from steepest.optim.roles import ParameterRole, Role
from steepest.optim.symmetry import symmetry_stack
from steepest.optim.symmetry_rules import block_layout

if TYPE_CHECKING:
    from steepest.optim.checks import AdjustLr, MomentumForm, NonFinite
    from steepest.optim.scion_presets import Preset, Radii
    from steepest.optim.step_rules import ShortStep

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


@dataclass(frozen=True)
class Recipe:
    """A method of `build`.

    Attributes:
        name: what the user types.
        title: what a report prints.
        description: one sentence.
        lr: the default learning rate.
        lr_range: lowest and highest learning rate worth a search.
        make: `make(members, lr, **options)`; its keyword-only arguments are the options that `build` takes.
        with_model: `make` takes the model before these.
    """

    name: str
    title: str
    description: str
    lr: float
    lr_range: tuple[float, float]
    make: Callable[..., Optimizer]
    with_model: bool = False


def groups(members: Iterable[Member], key: Callable[[Member], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Param groups of named parameters: members whose `key` is equal go together, in order of first appearance."""
    found: dict[Any, dict[str, Any]] = {}
    for member in members:
        settings = key(member)
        group = found.setdefault(repr(settings), {"params": [], **settings})
        group["params"].append((member.row.name, member.parameter))
    return list(found.values())


def _decay(member: Member, weight_decay: float) -> dict[str, Any]:
    return {"weight_decay": weight_decay if member.decayed else 0.0}


def layout_of(member: Member) -> dict[str, Any]:
    """The layout keys of the engine's param groups."""
    row = member.row
    if row.layout == "vector":
        return {"layout": "auto", "split": None, "transposed": False}
    return block_layout(row, per_head=False)


def _fused(members: Iterable[Member]) -> bool | None:
    """True where torch has one kernel for the step (it refuses other devices and dtypes), else its own choice."""
    fits = all(m.parameter.device.type in ("cpu", "cuda", "xpu") and m.parameter.is_floating_point() for m in members)
    return True if fits else None


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
        groups(members, lambda member: _decay(member, weight_decay)),
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
        groups(members, lambda member: _decay(member, weight_decay)),
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
        groups(members, lambda member: _decay(member, weight_decay)),
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
        return {"norm": "euclidean" if vector else norm, **layout_of(member), **_decay(member, weight_decay)}

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


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                "adamw",
                "AdamW",
                "Scales each coordinate's step by the root of its gradient's running second moment.",
                1e-3,
                (1e-4, 3e-2),
                adamw,
            ),
            Recipe(
                "sgd",
                "SGD with momentum",
                "Follows the running average of the gradient; steepest descent in the Euclidean norm.",
                0.1,
                (1e-3, 1.0),
                sgd,
            ),
            Recipe(
                "sign",
                "Sign descent (Lion)",
                "Moves every coordinate by the same amount; steepest descent in the max norm.",
                1e-4,
                (1e-5, 1e-2),
                sign,
            ),
            Recipe(
                "muon",
                "Muon",
                "Orthogonalises the momentum of each hidden matrix (spectral norm); AdamW for the rest.",
                2e-3,
                (2e-4, 3e-2),
                muon,
            ),
            Recipe(
                "drop_muon",
                "Drop-Muon",
                "Muon that moves a random suffix of the layers at each step; backpropagation ends at its first layer.",
                2e-3,
                (2e-4, 3e-2),
                drop_muon,
                with_model=True,
            ),
            Recipe(
                "freon",
                "Freon",
                "Raises the singular values of each hidden matrix's momentum to a power; beyond Muon by default.",
                2e-3,
                (2e-4, 3e-2),
                freon,
            ),
            Recipe(
                "kaon",
                "Kaon",
                "Sends the singular values of each hidden matrix's momentum through a chaotic map: a control of Muon.",
                2e-3,
                (2e-4, 3e-2),
                kaon,
            ),
            Recipe(
                "scion",
                "Scion",
                "A norm per layer: spectral inside, sign at the ends, RMS for vectors; steps of fixed length.",
                0.01,
                (1e-3, 0.3),
                scion,
            ),
            Recipe(
                "clipped_scion",
                "Clipped Scion",
                "Scion whose step shrinks with the dual norm of the gradient once that is below a threshold.",
                0.02,
                (1e-3, 1.0),
                clipped_scion,
            ),
            Recipe(
                "symmetry_stack",
                "Symmetry stack",
                "Each block by a rule with its symmetry: unit rows for tokens, centred for heads, Muon for matrices.",
                0.02,
                (1e-3, 0.1),
                symmetry_stack,
            ),
            Recipe(
                "normalized",
                "Normalised descent",
                "Follows the direction of the momentum of each parameter with a step of fixed length.",
                0.01,
                (1e-3, 0.3),
                normalized,
            ),
        )
    }
)
