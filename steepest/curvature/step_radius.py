"""The length of one step in units of the convergence radius of the cross-entropy."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from steepest.curvature.logit_slopes import (
    Direction,
    LogitFunction,
    Logits,
    check_nonempty,
    euclidean,
    named_direction,
)
from steepest.curvature.softmax_radius import Reduce, check_positive, check_reduce, reduce_spreads, spread


@dataclass(frozen=True)
class StepRadius:
    r"""One step, measured.

    Attributes:
        ratio: $r = \|p\| / \rho_a = \|p\| \Delta_a(v) / (\pi T)$, the step in units of the radius.
        length: $\|p\|$, over all parameters that the step moves.
    """

    ratio: float
    length: float

    @property
    def radius(self) -> float:
        r"""$\rho_a$ along the step, in units of the parameters; infinite where no logit moves against another."""
        return self.length / self.ratio if self.ratio else math.inf


def step_radius(
    model: nn.Module,
    inputs: Any,
    update: Direction,
    *,
    temperature: float = 1.0,
    reduce: Reduce = "max",
    method: Literal["jvp", "fd"] = "jvp",
    logits: Logits | None = None,
) -> StepRadius:
    r"""The normalised length $r = \|p\| \Delta_a / (\pi T)$ of a step p, taken or only proposed, at the parameters now.

    Below 1 the Taylor series of the loss of every sample in `inputs` converges along the whole step (with logits
    linearised along it); it does not say that the loss falls.

    Args:
        model: see `logit_slopes`.
        inputs: the samples, see `logit_slopes`.
        update: p with all of its factors (learning rate, momentum, weight decay), as `logit_slopes` takes a direction;
            its sign does not matter.
        temperature: T, where the loss is on z / T.
        reduce: see `radius`.
        method: see `logit_slopes`.
        logits: see `logit_slopes`.

    Source:
        Sao 2026, arXiv 2603.13552.
    """
    check_nonempty(inputs)
    function = LogitFunction(model, logits)
    moved = named_direction(function.model, update)
    length = euclidean(moved.values())
    if not math.isfinite(length):
        raise FloatingPointError("update must be finite, got NaN or infinity")
    if length == 0:
        return StepRadius(0.0, 0.0)
    parameters = {name: value.detach() for name, value in function.model.named_parameters()}
    unit = {name: value / length for name, value in moved.items()}
    slopes = (function.slopes if method == "jvp" else function.difference)(parameters, unit, inputs)
    most = float(reduce_spreads(spread(slopes), single_number(reduce)))
    return StepRadius(length * most / (math.pi * checked_temperature(temperature)), length)


def checked_temperature(value: float) -> float:
    """A positive finite number, or an error."""
    check_positive("temperature", value)
    return float(value)


def single_number(reduce: Reduce) -> Reduce:
    """A reduction that gives one number, or an error."""
    check_reduce(reduce)
    if reduce == "none":
        raise ValueError("reduce must be 'max' or a quantile between 0 and 1 here, got 'none'")
    return reduce
