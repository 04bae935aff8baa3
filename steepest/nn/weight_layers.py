"""The linear and convolution layers of a model, chosen by number, name or module."""

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.utils import parametrize

Layers = Sequence[int | str | nn.Module] | None


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolution layers by name, but for those whose forward pass never runs."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hidden = (
        nn.modules.linear.NonDynamicallyQuantizableLinear
    )  # its weight is read by attention, its forward never runs
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not isinstance(module, hidden)
    }


def choose_layers(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """The layers that numbers, names or modules stand for; None: all.

    Raises:
        TypeError, ValueError: there is no such layer, or twice.
    """
    known = weight_layers(model)
    if layers is None:
        if not known:
            raise ValueError(f"model {type(model).__name__} has no linear or convolution layer")
        return known
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not layers:
        raise ValueError(f"layers must be a list of numbers, names or modules, or None for all; got {layers!r}")
    names, found = list(known), {}
    everything = dict(model.named_modules())
    for entry in layers:
        if isinstance(entry, nn.Module):
            name = next((n for n, module in everything.items() if module is entry), None)
            if name is None:
                raise ValueError(f"layers: {entry!r} is not in the model")
        elif isinstance(entry, int) and not isinstance(entry, bool):
            if not -len(names) <= entry < len(names):
                raise ValueError(f"layers: there is no number {entry}; the model has {len(names)}: {', '.join(names)}")
            name = names[entry]
        elif isinstance(entry, str):
            name = entry
        else:
            raise TypeError(f"layers must hold numbers, names or modules, got {entry!r}")
        if name not in everything:
            raise ValueError(f"layers: there is no {name!r}; the model has {', '.join(names)}")
        if name in found:
            raise ValueError(f"layers: {name!r} is named twice")
        if name not in known:
            raise TypeError(f"layers: {name!r} is a {type(everything[name]).__name__}, not a linear or convolution "
                            "layer with a forward pass of its own")  # fmt: skip
        found[name] = known[name]
    return found


def check_free(model: nn.Module, name: str, layer: nn.Module, unique: bool) -> None:
    """Raise unless the layer's weight is a real parameter without parametrization; `unique`: nor shared."""
    if hasattr(layer, "spectral_norm") or parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"layers: the weight of {name!r} has a parametrization or spectral norm already")
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"layers: the weight of {name!r} is not a parameter")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"layers: {name!r} is not initialised; run the model once first")
    if not weight.is_floating_point():
        raise TypeError(f"layers: the weight of {name!r} must be real, got {weight.dtype}")
    if unique:
        homes = [
            f"{n}.{key}"
            for n, module in model.named_modules()
            for key, p in module.named_parameters(recurse=False)
            if p is weight
        ]
        if len(homes) > 1:
            raise ValueError(f"layers: the weight of {name!r} is shared ({', '.join(homes)}); normalise another layer")
