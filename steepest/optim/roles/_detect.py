"""`roles(model)`: each parameter on its own first, then the ends of the model, then the user's overrides."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from steepest.optim.roles._dense import says_head
from steepest.optim.roles._finding import Finding
from steepest.optim.roles._graph import Site, container, in_repeated_block, sites, squash
from steepest.optim.roles._rules import find
from steepest.optim.roles._trace import Trace, trace
from steepest.optim.roles._types import ParameterRole, Role, Roles, some

_INNER = ("pooler", "proj", "projection", "projector", "transform", "adapter", "connector", "dense", "encoder")


def roles(
    model: nn.Module,
    overrides: Mapping[str, Role | str | Mapping[str, Any]] | None = None,
    example_input: Any = None,
) -> Roles:
    """Find what each parameter of `model` does, and say why.

    Evidence, strongest first: the override of the user; one forward pass (only with `example_input`); the type of the
    module, tied storage, and what stands around and beside it; conventional names; the place in the order of
    registration (for the first and the last dense layer). Shapes check the rest: a fused QKV must come apart into the
    heads that the module or its config declares, a gate is a router only beside as many experts as it has rows.
    A matrix that none of this explains is `Role.AMBIGUOUS`. Wrappers (torch.compile, DDP, LoRA base layers,
    parametrizations) are looked through.

    Args:
        model: any module. Its parameters are read, never changed.
        overrides: glob pattern on parameter names -> role (a `Role`, its name, or a mapping with "role" and any of
            "layout", "split", "transposed"). The first pattern that matches a name wins. Wrapper parts of a name may
            be left out.
        example_input: an input (tensor, tuple of arguments, or mapping of keyword arguments) to run once, without
            gradients and in eval mode. It tells which layer reads the input and which one makes the output, where the
            order of registration may differ from the order of use.

    Returns:
        A mapping from parameter name to `ParameterRole`, in the order of `model.named_parameters()`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a lazy parameter has no shape yet; a pattern matches nothing; a role is unknown; an override's
            split does not add up; the model does not run on the example.

    Examples:
        >>> from torch import nn
        >>> found = roles(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
        >>> [str(found[name].role) for name in ("0.weight", "2.weight", "4.weight", "4.bias")]
        ['input', 'linear', 'head', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"model: {some(lazy)} have no shape yet; run one forward pass first (lazy modules)")
    places = sites(model)
    rules = _check_overrides(overrides, places)
    seen = None if example_input is None else trace(model, example_input)
    findings = {site.name: find(site) for site in places}
    _heads(model, places, findings, seen)
    _inputs(places, findings, seen)
    return Roles(_override(_row(site, findings[site.name]), site, rules) for site in places)


def _row(site: Site, finding: Finding) -> ParameterRole:
    split = finding.split
    reason = finding.reason
    if site.shared_storage:
        reason += f"; shares memory with {', '.join(site.shared_storage)} as a second parameter: tie them instead"
    return ParameterRole(
        name=site.name,
        shape=site.shape,
        role=finding.role,
        reason=reason,
        layout=finding.layout,
        split=split.sizes if split else None,
        blocks=split.blocks if split else (),
        transposed=finding.transposed,
        interleaved=finding.interleaved or bool(split and split.interleaved),
        head_dim=finding.head_dim,
        frozen=not site.parameter.requires_grad,
        shared_with=site.shared_with,
    )


def _is_dense(site: Site) -> bool:
    return site.leaf == "weight" and len(site.shape) == 2 and isinstance(site.module, nn.Linear)


def _heads(model: nn.Module, places: list[Site], findings: dict[str, Finding], seen: Trace | None) -> None:
    """Turn LINEAR (or a convolution with a head's name) into HEAD where the model's end says so."""
    plain = [site for site in places if findings[site.name].role is Role.LINEAR and _is_dense(site)]
    declared = _declared_head(model)
    for site in plain:
        if declared is not None and site.module is declared:
            _become(findings, site, Role.HEAD, "the model's get_output_embeddings()")
        elif seen is not None and id(site.module) in seen.makes_output:
            _become(findings, site, Role.HEAD, "its result is the model's output on the example")
    by_container: dict[str, list[Site]] = {}
    convs = [s for s in places if findings[s.name].role is Role.CONV]
    for site in [*plain, *convs]:
        named = says_head(site)
        if named is not None and (_is_dense(site) or squash(site.own) == squash(named)):
            prefix = ".".join(site.path[: site.path.index(named) + 1])
            by_container.setdefault(prefix, []).append(site)
    tables = [s for s in places if findings[s.name].role is Role.EMBEDDING and len(s.shape) == 2]
    tied = [alias for table in tables for alias in table.shared_with]
    known = [findings[s.name].role is Role.HEAD or bool(s.shared_with) for s in [*plain, *tables]]
    widths = {s.shape[1] for s, head in zip([*plain, *tables], known, strict=True) if head}
    for prefix, group in by_container.items():
        if any(alias.startswith(f"{prefix}.") for alias in tied):
            continue  # the head is the tied table itself
        last = group[-1]  # a head with several layers: only its last one makes the output
        if len(last.shape) == 2 and last.shape[0] in widths and last.shape[0] == last.shape[1]:
            continue  # it prepares what another head reads
        if findings[last.name].role in (Role.LINEAR, Role.CONV):
            why = f"named {prefix}" if len(group) == 1 else f"the last of {len(group)} layers in {prefix}"
            _become(findings, last, Role.HEAD, f"{why}, outside every block")
    for site in plain:
        same = next((table for table in tables if table.shape == site.shape and site.shape[0] != site.shape[1]), None)
        if findings[site.name].role is Role.LINEAR and same is not None and not in_repeated_block(site):
            _become(findings, site, Role.HEAD, f"it has the shape of the token table {same.name}, outside every block")
    if any(f.role is Role.HEAD for f in findings.values()) or any(len(table.shared_with) for table in tables):
        return
    matrices = [s for s in places if findings[s.name].layout != "vector" and findings[s.name].role is not Role.POSITION]
    last = matrices[-1] if matrices else None
    if last is not None and last in plain and _outside(last) and not squash(last.own).endswith(_INNER):
        _become(findings, last, Role.HEAD, f"the last dense layer {_order(last)}, outside every block")


def _inputs(places: list[Site], findings: dict[str, Finding], seen: Trace | None) -> None:
    """Turn LINEAR into INPUT where a dense layer reads the model's input."""
    plain = [site for site in places if findings[site.name].role is Role.LINEAR and _is_dense(site)]
    if seen is not None:
        for site in plain:
            if id(site.module) in seen.reads_input:
                _become(findings, site, Role.INPUT, "it reads the model's input on the example")
        return
    matrices = [s for s in places if findings[s.name].layout != "vector"]
    if matrices and matrices[0] in plain and _outside(matrices[0]) and says_head(matrices[0]) is None:
        _become(findings, matrices[0], Role.INPUT, f"the first dense layer {_order(matrices[0])}")


def _outside(site: Site) -> bool:
    return not in_repeated_block(site) and container(site)[0] == "" and "lora" not in site.clean.lower()


def _order(site: Site) -> str:
    ordered = isinstance(site.parent, nn.Sequential)
    return "in the order of the Sequential" if ordered else "in order of registration (weak evidence)"


def _become(findings: dict[str, Finding], site: Site, role: Role, why: str) -> None:
    kind = f"nn.{type(site.module).__name__}" if type(site.module).__module__.startswith("torch") else "dense layer"
    findings[site.name] = replace(findings[site.name], role=role, reason=f"{kind}: {why}")


def _declared_head(model: nn.Module) -> nn.Module | None:
    """The head that a Hugging Face model declares itself."""
    for module in model.modules():
        ask = getattr(type(module), "get_output_embeddings", None)
        if ask is not None:
            try:
                return ask(module)
            except (AttributeError, NotImplementedError):
                return None
    return None


Rule = tuple[str, dict[str, Any]]


def _check_overrides(overrides: Mapping[str, Role | str | Mapping[str, Any]] | None, places: list[Site]) -> list[Rule]:
    if overrides is None:
        return []
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides: expected a mapping from name pattern to role, got {type(overrides).__name__}")
    rules: list[Rule] = []
    for pattern, wanted in overrides.items():
        if not isinstance(pattern, str):
            raise TypeError(f"overrides: a pattern must be a string, got {pattern!r}")
        if not any(_matches(pattern, site) for site in places):
            raise ValueError(f"overrides: pattern {pattern!r} matches no parameter; the model has "
                             f"{some(site.name for site in places)}")  # fmt: skip
        change = dict(wanted) if isinstance(wanted, Mapping) else {"role": wanted}
        unknown = set(change) - {"role", "layout", "split", "transposed"}
        if unknown or "role" not in change:
            raise ValueError(f"overrides[{pattern!r}]: a mapping needs 'role' and may have 'layout', 'split' and "
                             f"'transposed'; got {sorted(map(str, change))}")  # fmt: skip
        try:
            change["role"] = Role(str(change["role"]).lower())
        except ValueError:
            known = ", ".join(role.value for role in Role)
            raise ValueError(f"overrides[{pattern!r}]: no role {change['role']!r}; the roles are {known}") from None
        if change.get("layout", "matrix") not in ("matrix", "conv", "batch", "vector"):
            raise ValueError(f"overrides[{pattern!r}]: layout must be matrix, conv, batch or vector, "
                             f"got {change['layout']!r}")  # fmt: skip
        rules.append((pattern, change))
    return rules


def _matches(pattern: str, site: Site) -> bool:
    names = (site.name, site.clean, *site.shared_with)
    return any(fnmatchcase(name, pattern) for name in names)


def _override(row: ParameterRole, site: Site, rules: list[Rule]) -> ParameterRole:
    for pattern, change in rules:
        if not _matches(pattern, site):
            continue
        layout = change.get("layout", row.layout if row.layout != "vector" else _default_layout(row, change["role"]))
        transposed = bool(change.get("transposed", row.transposed))
        changed = replace(
            row, role=change["role"], layout=layout, transposed=transposed, reason=f"override {pattern!r} of the user"
        )
        if "split" in change:
            changed = replace(changed, split=_checked_split(change["split"], changed, pattern), blocks=())
        elif change["role"] is not row.role and change["role"] not in (Role.QKV, Role.GATE_UP, Role.KEY_VALUE):
            changed = replace(changed, split=None, blocks=(), interleaved=False)
        return changed
    return row


def _default_layout(row: ParameterRole, role: Role) -> str:
    if not (role.hidden or role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER, Role.POSITION)):
        return "vector"
    return {2: "matrix", 3: "batch"}.get(len(row.shape), "conv") if len(row.shape) > 1 else "vector"


def _checked_split(split: Any, row: ParameterRole, pattern: str) -> tuple[int, ...] | None:
    if split is None:
        return None
    sizes = tuple(split)
    if row.layout == "conv":
        rows = row.shape[1 if row.transposed else 0]
    else:
        rows = row.shape[-1 if row.transposed else -2] if len(row.shape) > 1 else 0
    if not all(isinstance(size, int) and size > 0 for size in sizes) or sum(sizes) != rows:
        raise ValueError(
            f"overrides[{pattern!r}]: split {sizes} must be positive sizes that add up to the {rows} outputs of "
            f"{row.name} {row.shape}"
        )
    return sizes
