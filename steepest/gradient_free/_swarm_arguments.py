"""The checks of arguments that the swarm methods share, and the inverse temperature at a step."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.gradient_free.consensus import EffectiveSampleSize, check_alpha
from steepest.loop.schedules import Schedule, value_at

AlphaRule = float | Tensor | Schedule | EffectiveSampleSize


def alpha_at(alpha: AlphaRule, values: Float[Tensor, "*batch n"], step: int) -> float | Float[Tensor, "*batch"]:
    """The inverse temperature for these values at this step: a number, or one for each run.

    Raises:
        TypeError, ValueError: it is not a number, a schedule, or one number for each run, of at least 0.
    """
    if isinstance(alpha, EffectiveSampleSize):
        return alpha(values)
    if not isinstance(alpha, Tensor):
        number = value_at(alpha, step, "alpha")
        check_alpha(number)
        return number
    if alpha.is_complex() or alpha.shape not in (values.shape[:-1], ()):
        shape = tuple(values.shape[:-1])
        raise ValueError(f"alpha must be a number, or one for each run: {shape}, got {tuple(alpha.shape)}")
    check_alpha(alpha)
    return alpha.to(values).expand(values.shape[:-1])


def check_points(name: str, x: Any, least: int) -> None:
    """Raise unless x is a finite real tensor (*batch, n, d) with n at least `least`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] == 0 or (x.numel() == 0 and x.shape[-2] >= least):
        raise ValueError(f"{name} must have the shape (*batch, n, d) with no empty dimension, got {tuple(x.shape)}")
    if x.shape[-2] < least:
        raise ValueError(f"{name} must hold at least {least} particles, got {x.shape[-2]} (shape {tuple(x.shape)})")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")


def check_number(name: str, value: Any, positive: bool = False) -> float:
    """`value` as a float of at least 0, or above 0, and finite."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {number}")
    return number


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_generator(generator: Any) -> None:
    """Raise TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, or None, got {generator!r}")
