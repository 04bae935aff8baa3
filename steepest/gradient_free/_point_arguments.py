"""Checks of arguments that searches from one point share."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.loop.schedules import Schedule, value_at


def check_start(x0: Any) -> Float[Tensor, "*batch d"]:
    """`x0` as a new tensor; raises unless it is a finite real tensor (*batch, d) that is not empty."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if not x0.is_floating_point():
        raise ValueError(f"x0 must be of a floating dtype, got {x0.dtype}")
    if x0.ndim < 1 or x0.numel() == 0:
        raise ValueError(f"x0 must have the shape (*batch, d) with no empty dimension, got {tuple(x0.shape)}")
    if not bool(x0.isfinite().all()):
        raise ValueError("x0 must be finite, got NaN or infinity in it")
    return x0.detach().clone(memory_format=torch.contiguous_format)


def scale_at(name: str, schedule: Schedule | float, step: int, *, positive: bool = True) -> float:
    """The value of a schedule or number, which must be finite and positive, or at least 0."""
    value = value_at(schedule, step, name)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value:g}")
    return value


def gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in single precision, then in the dtype of `like`: both dtypes follow the same noise."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(like)
