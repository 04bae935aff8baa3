"""The settings of the engine: their types, and what is refused before anything is changed."""

import math
import re
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steepest.geometry import Direction
from steepest.optim.step_rules import StepRule

MomentumForm = Literal["ema", "heavy_ball", "lion"]
NonFinite = Literal["raise", "skip", "ignore"]
AdjustLr = Literal["none", "original", "match_rms_adamw", "spectral"]


def first_nonfinite(gradients: list[Tensor]) -> int | None:
    """Position of the first tensor with NaN or infinity. A sum shows it in one fast pass, unless it overflowed."""
    filled = [(index, gradient) for index, gradient in enumerate(gradients) if gradient.numel()]
    if not filled:
        return None
    sums = [gradient.sum(dtype=torch.float32 if gradient.itemsize < 4 else None) for _, gradient in filled]
    if len({(value.device, value.dtype) for value in sums}) > 1:
        sums = [value.to(sums[0].device, torch.float64) for value in sums]
    finite = torch.stack(sums).isfinite()
    if bool(finite.all()):
        return None
    for suspect in (~finite).nonzero().flatten().tolist():
        index, gradient = filled[suspect]
        if not bool(gradient.isfinite().all()):
            return index
    return None


def check_parameter(parameter: Tensor) -> None:
    """Raise unless the parameter is a dense tensor of real floating-point numbers."""
    if parameter.is_complex() or not parameter.is_floating_point():
        raise TypeError(f"parameters must be real floating-point tensors, got {parameter.dtype}")
    if parameter.layout != torch.strided:
        raise TypeError(f"parameters must be dense, got layout {parameter.layout}")


def check_group(group: dict[str, Any], index: int, rule: StepRule) -> None:
    """Raise unless every setting of parameter group number `index` is of its type and in its range."""
    where = f"of parameter group {index} " if index else ""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr {where}must hold one number, got a tensor of shape {tuple(lr.shape)}")
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and not torch.compiler.is_compiling():
        lr = lr.item()  # elsewhere, reading it would wait for the device
    if not isinstance(lr, Tensor):
        check_number(lr, "lr", where)
        if group["constrained"] and lr > 1:
            raise ValueError(f"lr {where}must be at most 1 when constrained=True, got {lr!r}")
    check_number(group["weight_decay"], "weight_decay", where)
    check_number(group["momentum"], "momentum", where, 1.0)
    check_number(group["interpolation"], "interpolation", where, 1.0)
    for name in ("nesterov", "constrained", "transposed", "maximize"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} {where}must be True or False, got {group[name]!r}")
    if group["constrained"] and group["weight_decay"]:
        raise ValueError(f"weight_decay {where}must be 0 when constrained=True, got {group['weight_decay']!r}")
    rule.check(group, where)
    for name, choices in (
        ("momentum_form", MomentumForm),
        ("nonfinite", NonFinite),
        ("adjust_lr_fn", AdjustLr),
    ):
        if group[name] not in get_args(choices):
            raise ValueError(f"{name} {where}must be one of {', '.join(get_args(choices))}; got {group[name]!r}")


def check_number(value: Any, name: str, where: str = "", below: float = math.inf) -> None:
    """Raise unless `value` is a finite number, at least 0 and below `below`."""
    bound = "" if below == math.inf else f" and below {below:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} {where}must be a number, got {value!r} of type {type(value).__name__}")
    if not 0 <= float(value) < below:
        raise ValueError(f"{name} {where}must be a finite number, at least 0{bound}; got {value!r}")


def shape_factor(name: AdjustLr, shape: tuple[int, ...]) -> float:
    """The factor of `adjust_lr_fn` for a block (out, in, *kernel)."""
    rows, columns = shape[0], math.prod(shape[1:])
    if name == "none" or len(shape) < 2 or 0 in shape:
        return 1.0
    if name == "original":
        return math.sqrt(max(1.0, rows / columns))
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns)


def norm_text(norm: str | Direction) -> str:
    """The norm as text that is the same in every process: without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(norm))
