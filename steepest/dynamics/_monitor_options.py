"""Checks of what a monitor is given."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest._checks import check_int


def check(options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, naming the option that is wrong."""
    check_int("every", options["every"])
    check_int("max_products", options["max_products"])
    check_int("outputs", options["outputs"])
    check_int("probes", options["probes"], least=0)
    if options["probes"] == 1:
        raise ValueError("probes must be 0, or at least 2 for a standard error, got 1")
    for name in ("batch_size", "samples"):
        if options[name] is not None:
            check_int(name, options[name])
    batch, samples = options["batch_size"], options["samples"]
    if batch is not None and samples is not None and batch > samples:
        raise ValueError(f"batch_size must be at most samples={samples}, got {batch}")
    share = options["max_overhead"]
    if share is not None and not (isinstance(share, int | float) and math.isfinite(share) and share > 0):
        raise ValueError(f"max_overhead must be positive or None, got {share!r}")
    if not (math.isfinite(options["tol"]) and options["tol"] > 0):
        raise ValueError(f"tol must be positive, got {options['tol']}")
    if options["radius"] not in (True, False, "auto"):
        raise ValueError(f"radius must be True, False or 'auto', got {options['radius']!r}")


def reusable(data: Any) -> Any:
    """`data`, kept if it can be walked through only once."""
    if data is None or isinstance(data, str):
        raise TypeError("data must be a batch, an iterable of batches, or a function that gives them")
    return list(data) if iter(data) is data else data


def is_pair(batch: Any) -> bool:
    """Whether a batch is (inputs, targets)."""
    return isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[0], tuple)


def moved_to(value: Any, device: torch.device) -> Any:
    """A tensor on a device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def open_writer(writer: Any) -> Any:
    """A writer of scalars, as it is or made for a folder."""
    if writer is None or hasattr(writer, "add_scalar"):
        return writer
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("writer is a folder, which needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(writer))
