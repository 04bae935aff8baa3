"""The methods a race knows: how each is built, and where its learning rate is looked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from steepest.lab.files import load_object
from steepest.lab.settings import RaceError
from steepest.optim.build import build
from steepest.optim.recipes import RECIPES


@dataclass(frozen=True)
class Method:
    """A way to train: a name of `steepest.optim.build` with its options, or a function of the user's.

    Attributes:
        name: What the user types.
        title: What the report prints.
        description: One sentence.
        lr_range: Lowest and highest learning rate of the first grid.
        options: Passed to `steepest.optim.build`.
        function: The user's `function(model, lr)`; None: `steepest.optim.build`.
        source: Where the user's function is, as typed.
    """

    name: str
    title: str
    description: str
    lr_range: tuple[float, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    function: Callable[[nn.Module, float], Optimizer] | None = None
    source: str | None = None

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        """The optimizer of this method for a model, at a learning rate."""
        if self.function is not None:
            optimizer = self.function(model, lr)
            if not isinstance(optimizer, Optimizer):
                raise RaceError(
                    f"{self.source} returned {type(optimizer).__name__}; it must return a torch.optim.Optimizer"
                )
            return optimizer
        return build(model, self.name, lr=lr, **self.options)

    def snippet(self, lr: str) -> str:
        """Python code that builds the optimizer exactly as the race did; `lr` as it is to stand in the code."""
        if self.function is not None and self.source is not None:
            path, _, function = self.source.rpartition(":")
            return f"# {function} is the function in {path}\noptimizer = {function}(model, {lr})"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f'from steepest.optim import build\n\noptimizer = build(model, "{self.name}", lr={lr}{options})'


RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "adamw": (5e-4, 5e-2),
        "sgd": (3e-2, 3.0),
        "sign": (1e-4, 1e-2),
        "muon": (1e-3, 1e-1),
        "drop_muon": (1e-3, 1e-1),
        "freon": (1e-3, 1e-1),
        "kaon": (1e-3, 1e-1),
        "scion": (2e-3, 2e-1),
        "clipped_scion": (2e-3, 2e-1),
        "normalized": (1e-2, 1.0),
        "symmetry_stack": (1e-3, 1e-1),
        "ivon": (0.1, 10.0),
    }
)
"""Where a race begins to look: two decades for every method, so that the same number of trials means the same care."""

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        name: Method(name, recipe.title, recipe.description, RANGES.get(name, recipe.lr_range))
        for name, recipe in RECIPES.items()
    }
)
"""The methods of `steepest.optim.build`."""


def get_methods(names: tuple[str, ...], lr_ranges: Mapping[str, tuple[float, float]], task: Any = None) -> list[Method]:
    """The methods of these names, with the user's learning-rate ranges.

    A name of the form `path/to/file.py:function` is a function of the user's, `function(model, lr) -> Optimizer`; its
    range is given by the user or is the function's attribute `lr_range`. IVON learns the size of the training data from
    the attribute `examples` of the task, if there is one.

    Raises:
        RaceError: a name is unknown, or a user's function cannot be loaded or has no range.
    """
    found = [_get(name, lr_ranges.get(name)) for name in names]
    size = getattr(task, "examples", None)
    return [replace(m, options={"ess": float(size)}) if size and m.name == "ivon" else m for m in found]


def _get(name: str, bounds: tuple[float, float] | None) -> Method:
    if ".py:" in name:
        return _user_method(name, bounds)
    if name not in METHODS:
        raise RaceError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


def _user_method(source: str, bounds: tuple[float, float] | None) -> Method:
    function: Any = load_object(source, "function")
    if not callable(function):
        raise RaceError(f"{source} is not a function; it must be function(model, lr) -> torch.optim.Optimizer")
    bounds = bounds or getattr(function, "lr_range", None)
    if bounds is None:
        raise RaceError(
            f"the method {source} has no learning-rate range; give one, or set the function's attribute "
            "lr_range = (low, high)"
        )
    ok = isinstance(bounds, tuple | list) and len(bounds) == 2 and 0 < float(bounds[0]) <= float(bounds[1])
    if not ok:
        raise RaceError(f"lr_range of {source} is {bounds!r}; it must be (low, high) with 0 < low <= high")
    title = source.rpartition(":")[2]
    text = (function.__doc__ or "A method of the user's.").strip().splitlines()[0]
    limits = float(bounds[0]), float(bounds[1])
    return Method(source, title, text, limits, function=cast(Any, function), source=source)


def did_you_mean(name: str, known: Any) -> str:
    """`, did you mean 'x'?` for the nearest known name, or nothing."""
    import difflib

    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
