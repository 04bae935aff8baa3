"""While the tests run, every call that succeeds is held to the shapes in its signature."""

import functools
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping
import torch
from torch import Tensor

CHECKED = (
    "steepest.averages",
    "steepest.geometry",
    "steepest.inference",
    "steepest.curvature",
    "steepest.optim",
    "steepest.models",
    "steepest.nn",
    "steepest.data",
    "steepest.minimize",
    "steepest.dynamics",
    "steepest.transport",
    "steepest.gradient_free",
)


def pytest_configure() -> None:
    for name in CHECKED:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    check_loaded_modules()


def check_loaded_modules() -> None:
    """Put the check around every function and method of the checked packages whose signature names shapes."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "steepest"]
    wrapped: dict[int, Any] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if not getattr(value, "__module__", "").startswith(CHECKED):
                continue
            if isinstance(value, type) and id(value) not in wrapped:
                wrapped[id(value)] = value
                for attribute, method in list(vars(value).items()):
                    if isinstance(method, FunctionType) and shapes_in(method):
                        setattr(value, attribute, checked(method))
            elif isinstance(value, FunctionType) and shapes_in(value):
                wrapped.setdefault(id(value), checked(value))
                setattr(module, name, wrapped[id(value)])


def shapes_in(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that name shapes; "return" is the result's."""
    return {name: hint for name, hint in function.__annotations__.items() if any(map(is_shape, parts(hint)))}


def checked(function: FunctionType) -> Callable[..., Any]:
    """`function`, failing when it accepts or returns a tensor that its signature excludes.

    The check comes after the call, so that wrong input still meets the function's own error.
    """
    hints, signature = shapes_in(function), inspect.signature(function)

    @jaxtyping.jaxtyped(typechecker=None)
    def call(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        result = function(*arguments, **keywords)
        values = {**signature.bind(*arguments, **keywords).arguments, "return": result}
        for name, hint in hints.items():
            if not fits(values.get(name), hint):
                shape = tuple(getattr(values[name], "shape", ()))
                raise AssertionError(f"{function.__qualname__}: {name} of shape {shape} is not {hint}")
        return result

    @functools.wraps(function)
    def outer(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments, **keywords)
        return call(arguments, keywords)

    return outer


def fits(value: Any, hint: Any) -> bool:
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple:
        return all(map(fits, value, typing.get_args(hint)))
    shapes = [part for part in parts(hint) if is_shape(part)]
    return not isinstance(value, Tensor) or not shapes or any(isinstance(value, shape) for shape in shapes)


def parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_args(hint) else (hint,)


def is_shape(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
