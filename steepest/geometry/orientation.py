"""Which slices of a weight matrix are the rows of a rule: outputs, inputs, or pairs of a gate and an up neuron."""

from typing import Literal, get_args

import torch
from jaxtyping import Shaped
from torch import Tensor

Orientation = Literal["rows", "columns", "pair_interleaved", "pair_concatenated"]
"""``"rows"``: outputs are rows, as stored. ``"columns"``: inputs are (neurons of a down projection).
``"pair_interleaved"`` and ``"pair_concatenated"``: neuron i of a fused gate and up projection is the row
(gate_i, up_i), where the outputs go gate, up, gate, up, ... or first all gates, then all ups."""


def check_orientation(orientation: str, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless this is an `Orientation`, and fits a parameter of `shape` (out, in, *kernel) if that is given."""
    if orientation not in get_args(Orientation):
        raise ValueError(f"orientation must be one of {', '.join(get_args(Orientation))}, got {orientation!r}")
    if shape and orientation.startswith("pair") and (len(shape) < 2 or shape[0] % 2):
        raise ValueError(f"orientation {orientation!r} needs an even number of outputs, got a matrix of shape {shape}")


def orient(x: Shaped[Tensor, "*batch m n"], orientation: Orientation) -> Shaped[Tensor, "*batch r c"]:
    """Seen so that the rows of the rule are rows.

    The row of a pair, (m/2, 2n), interleaves: gate_i1, up_i1, gate_i2, up_i2, ...

    Raises:
        ValueError: a pair orientation of an odd number of rows.
    """
    check_orientation(orientation, tuple(x.shape[-2:]))
    if orientation == "columns":
        return x.mT
    if orientation == "rows":
        return x
    if orientation == "pair_interleaved":
        return x.unflatten(-2, (-1, 2)).transpose(-2, -1).flatten(-2)
    return torch.stack(x.chunk(2, dim=-2), dim=-1).flatten(-2)


def restore(x: Shaped[Tensor, "*batch r c"], orientation: Orientation) -> Shaped[Tensor, "*batch m n"]:
    """The inverse of `orient`."""
    check_orientation(orientation)
    if orientation == "columns":
        return x.mT
    if orientation == "rows":
        return x
    pairs = x.unflatten(-1, (-1, 2))
    if orientation == "pair_interleaved":
        return pairs.transpose(-2, -1).flatten(-3, -2)
    return torch.cat(pairs.unbind(-1), dim=-2)
