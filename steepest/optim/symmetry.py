"""One optimizer for a whole language model, with a rule per weight block that keeps the block's symmetry."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from steepest.geometry import Direction
from steepest.optim.mixed import Mixed
from steepest.optim.roles import Role, Roles
from steepest.optim.symmetry_rules import RULES, Tuning, block_layout, rule_settings

if TYPE_CHECKING:
    from steepest.optim.checks import NonFinite
    from steepest.optim.recipes import Member

_KINDS: Mapping[Role, str] = MappingProxyType(
    {
        Role.EMBEDDING: "embedding",
        Role.HEAD: "head",
        Role.ROUTER: "router",
        **dict.fromkeys((Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.KEY_VALUE, Role.ATTENTION_OUT), "attention"),
        **dict.fromkeys((Role.GATE, Role.UP, Role.GATE_UP), "gate_up"),
        Role.DOWN: "down",
        **dict.fromkeys((Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_GATE_UP, Role.EXPERT_DOWN), "experts"),
    }
)


@dataclass(frozen=True)
class Preset:
    """Rule and learning rate (as a multiple of that of the hidden matrices) of each kind of parameter."""

    lr: float
    rules: Mapping[str, str]
    rates: Mapping[str, float]


_RULES = {"embedding": "row", "tied": "row", "head": "centered_row", "router": "centered_left", "other": "adamw"}
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # Ratios of the authors' runs: Qwen3-0.6B (its router is ours) and OLMoE.
        "decoder": Preset(
            0.02, _RULES, {"embedding": 25.0, "tied": 0.25, "head": 0.25, "router": 0.0375, "other": 2.5}
        ),
        "moe": Preset(0.005, _RULES, {"embedding": 100.0, "tied": 1.0, "head": 1.0, "router": 0.15, "other": 2.0}),
    }
)
_UNDECAYED = ("embedding", "tied", "head", "router")


class SymmetryStack(Mixed):
    r"""One optimizer of parts that each keep the symmetry of their weights; made from `symmetry_groups`.

    Every rule but AdamW's has one momentum, $m \leftarrow \mu m + (1 - \mu) g$, and steps
    $x \leftarrow (1 - lr\,\lambda) x - lr\,u(m)$. With the presets, u is:

    | block | symmetry | rule |
    |---|---|---|
    | token embedding | permutations of tokens, rotations of the residual stream | rows of length one (`RowNorm`) |
    | head | the same, and one vector added to all rows | centred rows of length one |
    | router | permutations of experts, the same shift, rotations | centred one-sided spectral (`OneSided`), no decay |
    | attention | rotations per head | polar factor per head |
    | other matrices, experts | rotations | polar factor, Nesterov (Muon) |
    | norms, biases, scalars, positions | | AdamW |

    An embedding tied to the head is treated as a head without centring. A head or router of one row has nothing but the
    shift, and is not centred either.

    Args:
        groups: what `symmetry_groups` returned, or groups like those: named parameters with "rule" (a key of `RULES`),
            "lr", and the keys of the engine.
        momentum: $\mu$ of the rules.
        betas: of AdamW.
        eps: of AdamW.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity, before anything is changed.
        maximize: ascend instead.
        foreach: False treats one matrix at a time.
        compile: of the matrices' part, see `SteepestDescent`.

    Raises:
        ValueError: no group, a parameter in two groups, or one that does not fit its rule.

    Source:
        Lau and Su 2026, arXiv 2605.18106 (rules, routing, rates and their repository's training scripts).

    Examples:
        >>> import torch
        >>> from steepest.models import GPT, GPTConfig
        >>> from steepest.optim import SymmetryStack, symmetry_groups
        >>> model = GPT(GPTConfig(vocab_size=64, context=8, layers=1, heads=2, width=16))
        >>> optimizer = SymmetryStack(symmetry_groups(model, "decoder"))
        >>> tokens = torch.randint(64, (2, 9))
        >>> model(tokens[:, :-1], tokens[:, 1:]).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        nonfinite: "NonFinite" = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        from steepest.optim.engine import SteepestDescent

        groups = [dict(group) for group in groups]
        _check_groups(groups)
        adamw = [group for group in groups if group["rule"] == "adamw"]
        engine = [
            group if "norm" in group else {**group, **rule_settings(group["rule"], Tuning())}
            for group in groups
            if group["rule"] != "adamw"
        ]
        parts: dict[str, Optimizer] = {}
        if engine:
            parts["symmetry"] = SteepestDescent(
                engine, momentum=momentum, nonfinite="ignore", maximize=maximize, foreach=foreach, compile=compile
            )
        if adamw:
            parts["adamw"] = torch.optim.AdamW(
                adamw, lr=1e-3, betas=betas, eps=eps, weight_decay=0.0, maximize=maximize, foreach=foreach
            )
        super().__init__(parts, nonfinite=nonfinite)


def symmetry_groups(
    model: nn.Module,
    preset: Literal["auto", "decoder", "moe"] = "auto",
    rules: Mapping[str, str | Direction] | None = None,
    *,
    lr: float | None = None,
    lrs: Mapping[str, float] | None = None,
    weight_decay: float = 1e-3,
    per_head: bool = True,
    alpha: float = 1.0,
    polar: Literal["auto", "svd", "eigh", "newton_schulz", "polar_express"] = "auto",
    steps: int | None = None,
    per_expert_scale: bool = False,
    min_row_norm: float = 0.0,
    roles: Roles | None = None,
    overrides: Mapping[str, Role | str | Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a language model for `SymmetryStack`, each with its kind and rule.

    Args:
        model: the model, on its device and in its dtype.
        preset: ``"decoder"`` or ``"moe"``: rules and the ratios of the learning rates; ``"auto"``: "moe" if there is a
            router.
        rules: role or kind -> a key of `RULES` or a `Direction`, instead of the preset's. Roles are those of
            `steepest.optim.roles`, such as "expert_down"; kinds are "embedding", "tied" (embedding and head in one),
            "head", "router", "attention", "gate_up", "down", "experts", "matrix" (any of the last five and other hidden
            matrices) and "other". A role goes before a kind, a kind before "matrix".
        lr: of hidden matrices; the others have theirs in the preset's ratio. None: 0.02 ("decoder"), 0.005 ("moe").
        lrs: role or kind -> learning rate, instead of the preset's. Rules differ in the length of their steps by orders
            of magnitude (a row rule moves sqrt(rows), a hybrid by its nuclear norm), so a new rule needs a new rate.
        weight_decay: of hidden matrices and of what AdamW takes, norms and biases excepted.
        per_head: queries, keys, values and attention outputs are matrices per head.
        alpha: power of the nuclear norm in the rules that have one.
        polar: how polar factors are computed, see `steepest.geometry.OneSided`.
        steps: of an iteration; None: its own default.
        per_expert_scale: each expert has its own nuclear norm; the authors' rules have one per tensor.
        min_row_norm: see `steepest.geometry.RowNorm`.
        roles: what `steepest.optim.roles(model)` returned.
        overrides: see `steepest.optim.roles`.

    Returns:
        Groups of named parameters, as for any optimizer. Frozen parameters are left out.

    Raises:
        ValueError: unknown preset, rule, role or kind; one that no parameter has; a rule that does not fit.

    """
    from steepest.optim.build import _roles
    from steepest.optim.recipes import Member

    found = _roles(model, roles, overrides, None)
    members = [Member(p, found[name]) for name, p in model.named_parameters() if p.requires_grad]
    tuning = Tuning(alpha, polar, steps, per_expert_scale, min_row_norm)
    return _groups(members, preset, rules, lr, lrs, weight_decay, per_head, tuning)


def _groups(
    members: "Sequence[Member]",
    preset: str,
    rules: Mapping[str, str | Direction] | None,
    lr: float | None,
    lrs: Mapping[str, float] | None,
    weight_decay: float,
    per_head: bool,
    tuning: Tuning,
) -> list[dict[str, Any]]:
    from steepest.optim.recipes import groups

    kinds = {member.row.name: _kind(member) for member in members}
    if preset == "auto":
        preset = "moe" if "router" in kinds.values() else "decoder"
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of auto, {', '.join(PRESETS)}; got {preset!r}")
    chosen = PRESETS[preset]
    if preset == "moe" and "router" not in kinds.values():
        raise ValueError("preset 'moe' needs a router, and no parameter has that role; see steepest.optim.roles(model)")
    rules, lrs = dict(rules or {}), dict(lrs or {})
    _check_keys("rules", rules, members, kinds)
    _check_keys("lrs", lrs, members, kinds)
    base = chosen.lr if lr is None else lr

    def key(member: "Member") -> dict[str, Any]:
        kind = kinds[member.row.name]
        rule = _pick(rules, member, kind, chosen.rules.get(kind, "muon"))
        if isinstance(rule, str) and rule.startswith("centered"):
            rule = _uncentered(rule, member, kind)
        rate = _pick(lrs, member, kind, base * chosen.rates.get(kind, 1.0))
        decay = weight_decay if member.decayed and kind not in _UNDECAYED else 0.0
        name = rule if isinstance(rule, str) else str(rule)
        settings = {"kind": kind, "rule": name, "lr": rate, "weight_decay": decay}
        if name == "adamw":
            return settings
        layout = block_layout(member.row, per_head, "pair" if "pair" in name else "")
        return {**settings, **rule_settings(rule, tuning, member.row), **layout}

    return groups(members, key)


def _kind(member: "Member") -> str:
    row = member.row
    kind = _KINDS.get(row.role, "matrix" if row.role.hidden else "other")
    if kind != "other" and not (row.layout != "vector" and len(row.shape) > 1):
        return "other"
    return "tied" if kind == "embedding" and row.shared_with else kind


def _pick(given: Mapping[str, Any], member: "Member", kind: str, default: Any) -> Any:
    """The entry for the role, else for the kind, else for all hidden matrices."""
    for name in (member.row.role.value, kind, "matrix" if member.row.role.hidden else kind):
        if name in given:
            return given[name]
    return default


def _uncentered(rule: str, member: "Member", kind: str) -> str:
    """The rule, without its centring where the block is a single row, and all of it is the shift."""
    row = member.row
    if kind in ("embedding", "tied"):
        warnings.warn(
            f"rules: {rule!r} centres {row.name}, an embedding; a shift of all its rows is a symmetry only of a head "
            "under softmax, so this takes a direction away that the model may need",
            UserWarning,
            stacklevel=5,
        )
    outputs = row.shape[-1] if row.transposed else row.shape[-2] if row.layout != "conv" else row.shape[0]
    return rule.removeprefix("centered_") if outputs == 1 else rule


def _check_keys(name: str, given: Mapping[str, Any], members: "Sequence[Member]", kinds: Mapping[str, str]) -> None:
    known = {role.value for role in Role} | {*_KINDS.values(), "tied", "matrix", "other"}
    present = {member.row.role.value for member in members} | {*kinds.values()}
    present |= {"matrix"} & {"matrix" if member.row.role.hidden else "" for member in members}
    for key in given:
        if key not in known:
            raise ValueError(f"{name}: no role or kind {key!r}; they are {', '.join(sorted(known))}")
        if key not in present:
            here = ", ".join(sorted(present))
            raise ValueError(f"{name}: no trainable parameter is of {key!r}; this model has {here}")


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    if not groups:
        raise ValueError("groups: there is none; symmetry_groups(model) makes them")
    for index, group in enumerate(groups):
        missing = {"params", "rule"} - set(group)
        if missing:
            raise ValueError(f"groups[{index}]: it has no {', '.join(sorted(missing))}")
        if "norm" not in group and group["rule"] not in RULES:
            raise ValueError(f"groups[{index}]: rule must be one of {', '.join(RULES)}; got {group['rule']!r}")
    entries = [entry for group in groups for entry in group["params"]]
    names = {id(entry[-1] if isinstance(entry, tuple) else entry): entry for entry in entries}
    counts = Counter(id(entry[-1] if isinstance(entry, tuple) else entry) for entry in entries)
    twice = [names[key] for key, count in counts.items() if count > 1]
    if twice:
        shown = [e[0] if isinstance(e, tuple) else f"a parameter of shape {tuple(e.shape)}" for e in twice]
        raise ValueError(f"groups: {', '.join(shown)} stand in more than one group")


def symmetry_stack(
    members: "list[Member]",
    lr: float,
    *,
    preset: Literal["auto", "decoder", "moe"] = "auto",
    rules: Mapping[str, str | Direction] | None = None,
    lrs: Mapping[str, float] | None = None,
    momentum: float = 0.95,
    weight_decay: float = 1e-3,
    per_head: bool = True,
    alpha: float = 1.0,
    polar: Any = "auto",
    steps: int | None = None,
    per_expert_scale: bool = False,
    min_row_norm: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
    other_lr: float | None = None,
) -> Optimizer:
    """`SymmetryStack` on `symmetry_groups`; parameters of unknown role go to AdamW."""
    tuning = Tuning(alpha, polar, steps, per_expert_scale, min_row_norm)
    groups = _groups(members, preset, rules, lr, lrs, weight_decay, per_head, tuning)
    if other_lr is not None:
        groups = [{**group, "lr": other_lr} if group["rule"] == "adamw" else group for group in groups]
    return SymmetryStack(
        groups, momentum=momentum, betas=betas, eps=eps, nonfinite=nonfinite, maximize=maximize, foreach=foreach
    )
