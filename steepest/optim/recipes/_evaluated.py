"""Recipes of methods that say how the loss is evaluated: IVON at noisy weights, DAL within its step."""

from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from steepest.optim.recipes._members import Member, decay_of, groups

if TYPE_CHECKING:
    from steepest.optim.checks import NonFinite


def ivon(
    members: list[Member],
    lr: float,
    *,
    ess: float = 1e5,
    hess_init: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.99999),
    weight_decay: float = 1e-4,
    samples: int = 1,
    hessian: Literal["price", "gradsq"] = "price",
    clip: float = float("inf"),
    generator: Any = None,
    nonfinite: "NonFinite" = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
) -> Optimizer:
    """`IVON` on every parameter; gradients are taken in `with optimizer.sampled_params(train=True):` blocks.

    `ess` is the number of terms whose mean is the loss (images, tokens) in all training data. A race takes it from the
    task's attribute `examples`, if there is one.
    """
    from steepest.optim.ivon import IVON

    return IVON(
        groups(members, lambda _: {}),
        lr,
        ess,
        hess_init=hess_init,
        betas=betas,
        weight_decay=weight_decay,
        samples=samples,
        hessian=hessian,
        clip=clip,
        generator=generator,
        nonfinite=nonfinite,
        maximize=maximize,
        foreach=foreach,
    )


def dal(
    members: list[Member],
    lr: float,
    *,
    p: float = 1.0,
    max_lr: float = 5.0,
    hvp: Literal["exact", "fd"] = "fd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nonfinite: Literal["raise", "ignore"] = "raise",
    foreach: bool | None = None,
    maximize: bool = False,
) -> Optimizer:
    """`DAL` on every parameter, `step(closure)` with a closure that returns the loss; `lr` is the factor c of its rate.

    `hvp` is "fd", since the fused kernels of attention have no second derivative.
    """
    from steepest.optim.dal import DAL

    return DAL(
        groups(members, lambda member: decay_of(member, weight_decay)),
        lr,
        p=p,
        factor=lr,
        max_lr=max_lr,
        hvp=hvp,
        momentum=momentum,
        nonfinite=nonfinite,
        maximize=maximize,
        foreach=foreach,
    )
