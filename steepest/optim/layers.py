"""The layers of a model in the order of use: what layer sampling moves together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from steepest.optim.roles._trace import trace
from steepest.optim.roles._types import some

_STACKS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

LayerSpec = nn.Module | Tensor | str | Sequence["nn.Module | Tensor | str"]
"""A module, a parameter, a pattern of parameter names ("blocks.0.*"), or several of these."""


@dataclass(frozen=True, eq=False)
class ModelLayer:
    """Parameters that are moved together.

    Attributes:
        name: for messages; the name of its first module.
        parameters: name -> parameter; a parameter with several names has the first.
    """

    name: str
    parameters: dict[str, nn.Parameter]


def find_layers(
    model: nn.Module, layers: Sequence[LayerSpec] | nn.Module | None = None, example_input: Any = None
) -> list[ModelLayer]:
    """The layers of `model` from input to output, with their trainable parameters.

    By itself it finds: each block of a stack (`ModuleList`, `Sequential`), whatever it holds; each module beside a
    stack; token and position tables together. A module of vectors alone (a normalisation) and a module's own
    parameters join a neighbour. The order is that of registration, or, with `example_input`, that of use.

    A tensor with several names (tied weights) belongs to the first of its layers.

    Args:
        model: the model; wrappers are looked through.
        layers: the user's own list (or a `Sequential` or `ModuleList`), from input to output; None finds them.
        example_input: see `steepest.optim.roles`.

    Raises:
        ValueError: nothing is trainable; a given list leaves out or repeats a parameter, or names nothing.
        TypeError: an entry of the list is no module, parameter or pattern.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(*((layer.name, len(layer.parameters)) for layer in find_layers(model)))
        ('0', 4) ('3', 2)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: it has no trainable parameter (requires_grad is False for all, or there is none)")
    if layers is not None:
        return _given(model, layers)
    units = [(name, names) for name, names in _units(model, "") if names]
    if example_input is not None:
        order = trace(model, example_input).order
        places = {module: place for place, module in reversed(list(enumerate(order)))}
        units.sort(key=lambda unit: _first_use(model, unit[1], places))  # what never runs goes first: never alone
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = [ModelLayer(name, members) for name, members in _distinct(units, parameters)]
    return _joined(model, found)


def _units(module: nn.Module, prefix: str, block: bool = False) -> Iterator[tuple[str, list[str]]]:
    """(name, parameter names) of the pieces of a module in the order of registration."""
    dotted = f"{prefix}." if prefix else ""
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    own = [f"{dotted}{name}" for name, _ in module.named_parameters(recurse=False)]
    opens = isinstance(module, _STACKS) or not prefix or (len(children) == 1 and not own and not block)
    if not opens and not (not block and any(isinstance(inner, _STACKS) for inner in module.modules())):
        yield prefix, [f"{dotted}{name}" for name, _ in module.named_parameters(remove_duplicate=False)]
        return
    if own:
        yield prefix, own
    for name, child in children:
        yield from _units(child, f"{dotted}{name}", isinstance(module, _STACKS) and not isinstance(child, _STACKS))


def _first_use(model: nn.Module, names: list[str], places: dict[int, int]) -> int:
    owners = {name.rpartition(".")[0] for name in names}
    return min((places[id(o)] for o in map(model.get_submodule, owners) if id(o) in places), default=-1)


def _distinct(
    units: list[tuple[str, list[str]]], parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Units with their trainable parameters, each tensor once; without those that have none left."""
    seen: set[int] = set()
    for unit, names in units:
        members = {}
        for name in names:
            parameter = parameters[name]
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                members[name] = parameter
        if members:
            yield unit, members


def _joined(model: nn.Module, found: list[ModelLayer]) -> list[ModelLayer]:
    """Layers without a matrix join the one before (the first ones: the one after); tables at the start are one."""
    full = [any(_counts(model, *pair) for pair in layer.parameters.items()) for layer in found]
    if not any(full):
        return found
    joined: list[ModelLayer] = []
    waiting: list[ModelLayer] = []
    tables = True
    for layer, has_matrix in zip(found, full, strict=True):
        tables = tables and all(_in_table(model, name) for name in layer.parameters)
        if not has_matrix and not joined:
            waiting.append(layer)
        elif joined and (not has_matrix or tables):
            joined[-1] = ModelLayer(joined[-1].name, joined[-1].parameters | layer.parameters)
        else:
            parameters = {n: p for part in (*waiting, layer) for n, p in part.parameters.items()}
            joined.append(ModelLayer(layer.name, parameters))
            waiting = []
    return joined


def _counts(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter makes a layer: a matrix or kernel, and not beside modules, as a class token is."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return parameter.ndim > 1 and not any(True for _ in owner.children())


def _in_table(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _given(model: nn.Module, layers: Any) -> list[ModelLayer]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(layers, str) or not isinstance(layers, Sequence | nn.ModuleList | nn.Sequential):
        raise TypeError(f"layers must be a sequence of modules, parameters or patterns, got {type(layers).__name__}")
    units: list[tuple[str, list[str]]] = []
    owner: dict[str, int] = {}
    for index, spec in enumerate(layers):
        parts = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
        names = [name for part in parts for name in _names(model, part, parameters, index)]
        for name in names:
            if owner.setdefault(name, index) != index:
                raise ValueError(f"layers: parameter {name} is in layer {owner[name]} and again in layer {index}")
        label = next((n for part in parts for n, m in model.named_modules() if m is part), None)
        units.append((label or (parts[0] if parts and isinstance(parts[0], str) else f"layer {index}"), names))
    found = [ModelLayer(name, members) for name, members in _distinct(units, parameters)]
    covered = {id(parameter) for layer in found for parameter in layer.parameters.values()}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if missing:
        raise ValueError(f"layers: they leave out {some(missing)}; every trainable parameter needs a layer")
    return found


def _names(model: nn.Module, spec: Any, parameters: dict[str, nn.Parameter], index: int) -> list[str]:
    if isinstance(spec, str):
        names = [name for name in parameters if fnmatchcase(name, spec) or name.startswith(f"{spec}.")]
        what = f"pattern {spec!r} matches no parameter; the model has {some(parameters)}"
    elif isinstance(spec, nn.Module):
        inside = {id(module) for module in spec.modules()}
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in parameters}
        names = [name for name, module in owners.items() if id(module) in inside]
        what = f"{type(spec).__name__} has no parameter of the model"
    elif isinstance(spec, Tensor):
        names = [name for name, parameter in parameters.items() if parameter is spec]
        what = f"a tensor of shape {tuple(spec.shape)} is no parameter of the model"
    else:
        raise TypeError(
            f"layers[{index}] must be a module, a parameter, a pattern, or a sequence of them; got "
            f"{type(spec).__name__}"
        )
    without = isinstance(spec, nn.Module) and not any(True for _ in spec.parameters())
    if not names and not without:
        raise ValueError(f"layers[{index}]: {what}")
    return list(dict.fromkeys(names))
