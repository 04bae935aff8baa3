"""The learning rate with which an optimizer stepped: that of a wrapper, and of a method that sets it by itself."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# Where wrappers keep what they wrap: ours, ScheduleFreeWrapper, Lookahead and SAM of several packages.
WRAPPED = ("optimizer", "base", "base_optimizer")


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that proposes the steps, within any number of wrappers.

    Args:
        optimizer: a wrapper holds another optimizer as its attribute `optimizer`, `base` or `base_optimizer`.
    """
    seen = {id(optimizer)}
    while (inner := _inner(optimizer)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        optimizer = inner
    return optimizer


def step_lr(optimizer: Optimizer, group: int = 0) -> float:
    r"""The learning rate of the last step; before the first one that of the parameter group.

    DAL and RadiusSGD: `last_lr`, which they chose. RadiusClip: that of its optimizer, times the `last_scale` by which
    the step was shortened. Others: the `scheduled_lr` of a group (ScheduleFree, with its warm-up), `d` times `lr`
    (Prodigy, D-Adaptation), or `lr`.

    Args:
        optimizer: the optimizer, or a wrapper.
        group: the number of a parameter group.
    """
    scale, own = 1.0, unwrapped(optimizer)
    while optimizer is not own:
        scale *= float(getattr(optimizer, "last_scale", 1.0))
        optimizer = _inner(optimizer) or own
    chosen: Any = getattr(own, "last_lr", None)
    if isinstance(chosen, Tensor | float):
        rates = [float(rate) for rate in chosen.reshape(-1)] if isinstance(chosen, Tensor) else [chosen]
        return scale * rates[group if len(rates) > 1 else 0]
    settings = own.param_groups[group]
    if "scheduled_lr" in settings:
        return scale * float(settings["scheduled_lr"])
    return scale * float(settings["lr"]) * float(settings.get("d", 1.0))


def _inner(optimizer: Any) -> Optimizer | None:
    return next((found for name in WRAPPED if isinstance(found := getattr(optimizer, name, None), Optimizer)), None)
