"""DAL: the learning rate at which the discretisation drift of a step is as long as the step."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from steepest.optim.checks import check_number, check_parameter
from steepest.optim.differentiate import (
    add_scaled_,
    evaluate,
    gradients_of,
    hessian_product,
    norm,
    random_state,
    refuse_dead_ends,
    set_random_state,
)
from steepest.optim.placement import is_sharded

Product = Literal["exact", "fd"]
NonFinite = Literal["raise", "ignore"]
OFFSET = 0.01


class DAL(Optimizer):
    r"""Gradient descent with the drift adjusted learning rate: no rate to tune.

    $$\theta \leftarrow \theta - h g, \quad h = \min(c / v^p,\; max\_lr), \quad v = \|Hg\| / \|g\|$$

    One step departs from the gradient flow by about $\frac{h^2}2 \|Hg\|$. With p = 1 and c = 2 (`factor`) that is as
    long as the step itself. p = 0.5 is faster and less stable; p = 0 keeps `lr`. v is that of all parameters together.

    **The closure returns the loss and does not call backward**, since the step differentiates twice:
    ``optimizer.step(lambda: loss_fn(model(x), y))``. With ``hvp="fd"`` an ordinary closure that zeroes the gradients
    and calls backward is as good, and gradients may be accumulated in it; it is called twice, so it must use the same
    batch both times. `step` sets `grad` of each parameter to the gradient that it used.

    With momentum $\mu$: $b \leftarrow \mu b + h g$, $\theta \leftarrow \theta - b$. A large $\mu$ makes steps longer by
    up to $1 / (1 - \mu)$; lower `factor` with it. Weight decay is decoupled, $\theta \leftarrow (1 - h\lambda)\theta$.

    On a quadratic p = 1 with `factor` 2 goes to $h = 2/\lambda_{max}$, where that direction oscillates for ever; a
    factor below 2 converges. Only p = 1 is invariant to the scale of the loss.

    Args:
        params: parameters, named parameters, or groups of them, which may set everything but `hvp`, `nonfinite`,
            `maximize` and `foreach`.
        lr: the fixed rate with p = 0, before `start` and from `stop` on. A scheduler changes it, and scales the adapted
            rate by lr over its first value.
        p: power of v, at least 0.
        factor: c > 0; 1 is safe on quadratics.
        max_lr: the largest h (as the key of a group: ``lr_cap``).
        start: steps are counted from 1, and those between `start` and `stop`, both excluded, are adapted.
        stop: None: adapted to the end.
        hvp: ``"exact"`` differentiates twice; ``"fd"`` takes $Hg/\|g\|$ from the gradient at distance 0.01 along g,
            keeps no graph, and evaluates the closure twice (with the same random numbers for Dropout, but a BatchNorm
            in train mode counts the batch twice). Where an operation cannot be differentiated twice, ``"exact"`` warns
            once and goes on as ``"fd"``.
        momentum: $\mu$ in [0, 1).
        weight_decay: $\lambda$.
        nonfinite: ``"raise"`` on a v that is NaN or infinite, before anything is changed; ``"ignore"``: no check (the
            check reads one value from the device).
        maximize: ascend instead.
        foreach: False treats one tensor at a time.

    Attributes:
        last_lr: h of the last step, one number, or one for each group; a tensor.
        last_drift: $\frac{h^2}2 \|Hg\|$ of the last step, with the h of each group; a tensor. None after a fixed step.
        last_curvature: v of the last step. None after a fixed step.

    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: complex, sparse, sharded or integer parameters, or half-precision ones with ``hvp="fd"``.
        RuntimeError: (in `step`) no closure, or one that does not fit `hvp`; the parameters are unchanged.
        FloatingPointError: (in `step`) a non-finite v; the parameters are unchanged.

    Source:
        Rosca, Wu, Qin and Dherin 2023, arXiv 2302.01952.

    Examples:
        >>> import torch
        >>> from steepest.optim import DAL
        >>> model, x, y = torch.nn.Linear(8, 2), torch.randn(4, 8), torch.tensor([0, 1, 1, 0])
        >>> optimizer = DAL(model.parameters(), p=0.5)
        >>> loss = optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
    """

    closure_only = True  # what a loop that serves several optimizers may ask

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        p: float = 1.0,
        factor: float = 2.0,
        max_lr: float = 5.0,
        start: int = 0,
        stop: int | None = None,
        hvp: Product = "exact",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        for name, value, choices in (("hvp", hvp, Product), ("nonfinite", nonfinite, NonFinite)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")
        if not isinstance(maximize, bool):
            raise TypeError(f"maximize must be True or False, got {maximize!r}")
        if foreach is not None and not isinstance(foreach, bool):
            raise TypeError(f"foreach must be True, False or None, got {foreach!r}")
        self.hvp, self.nonfinite, self.maximize, self.foreach = hvp, nonfinite, maximize, foreach
        self._forget()
        defaults = {
            "lr": lr,
            "p": p,
            "factor": factor,
            "lr_cap": max_lr,  # "max_lr" is a key that OneCycleLR writes into groups
            "start": start,
            "stop": stop,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "iteration": 0,
        }
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self.last_lr: Tensor | None = None
        self.last_drift: Tensor | None = None
        self.last_curvature: Tensor | None = None
        self._twice_differentiable = True
        self._graph_seen = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; all or nothing: a group that is refused leaves the optimizer as it was."""
        before = len(self.param_groups)
        if isinstance(param_group, dict) and "max_lr" in param_group:
            param_group = {**param_group, "lr_cap": param_group["max_lr"]}
            del param_group["max_lr"]
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            group["iteration"] = self.param_groups[0]["iteration"]
            self._check(group, len(self.param_groups) - 1)
            group.setdefault("base_lr", float(group["lr"]) or 1.0)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _check(self, group: dict[str, Any], index: int) -> None:
        _check_settings(group, index)
        for parameter in group["params"]:
            check_parameter(parameter)
            if is_sharded(parameter):
                raise TypeError("parameters must not be sharded: the second derivative goes through no FSDP module")
            if self.hvp == "fd" and parameter.itemsize < 4:
                raise TypeError(
                    f"hvp='fd' needs parameters of at least 32 bits, got {parameter.dtype}: a shift of {OFFSET:g} "
                    "would be lost in rounding; use hvp='exact'"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss, without backward (with ``hvp="fd"`` also with it).

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: there is no closure, it called backward under ``hvp="exact"``, or its loss has no graph.
            FloatingPointError: v is NaN or infinite.
        """
        if not callable(closure):
            raise RuntimeError(
                "DAL.step needs a closure that computes and returns the loss, without backward: it differentiates "
                f"twice. Call optimizer.step(lambda: loss_fn(model(x), y)); got {closure!r}"
            )
        for index, group in enumerate(self.param_groups):
            _check_settings(group, index)
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        number = self.param_groups[0]["iteration"] + 1
        adapted = any(_adapts(group, number) for group in self.param_groups)
        loss, gradients, curvature = self._differentiate(closure, params, adapted)
        moved = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient
        if moved:
            self._check_finite(curvature, [g for _, g in moved], number)
            self._move(moved, curvature, number)
        for group in self.param_groups:
            group["iteration"] = number
        if isinstance(loss, Tensor) and loss.grad_fn is not None and not loss._is_view():
            loss.detach_()  # a loss that is kept for a log must not keep the graph
        return loss

    def _differentiate(
        self, closure: Callable[[], Any], params: list[Tensor], adapted: bool
    ) -> tuple[Any, list[Tensor | None], tuple[Tensor, Tensor] | None]:
        """The loss, the gradients, and (‖g‖, ‖Hg‖) if they are needed."""
        exact = self.hvp == "exact" and self._twice_differentiable
        replay = None if exact and (self._graph_seen or not adapted) else random_state(params)
        loss = evaluate(closure, params)
        if not params:
            return loss, [], None
        called_backward = any(p.grad is not None for p in params)
        if called_backward and self.hvp == "exact":
            raise RuntimeError(
                "the closure called backward(); with hvp='exact' it must only compute and return the loss, which the "
                "step differentiates twice. Leave backward() out, or use DAL(..., hvp='fd')"
            )
        gradients = gradients_of(loss, params, called_backward, graph=exact and adapted)
        detached = [None if g is None else g.detach() for g in gradients]
        pairs = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
        if not adapted or not pairs:
            return loss, detached, None
        plain = [g.detach() for _, g in pairs]
        length = norm(plain)
        if exact:
            try:
                if not self._graph_seen:
                    refuse_dead_ends([g for _, g in pairs])
                    self._graph_seen = True
                return loss, detached, (length, norm(hessian_product(pairs, plain)))
            except RuntimeError as error:
                if isinstance(error, torch.cuda.OutOfMemoryError) or any(p.itemsize < 4 for p in params):
                    raise
                warnings.warn(
                    f"DAL: the loss cannot be differentiated twice ({str(error).splitlines()[0]}); from now on as with "
                    "hvp='fd', which evaluates the closure twice",
                    UserWarning,
                    stacklevel=4,
                )
                self._twice_differentiable = False
        del gradients, pairs
        shifted = self._shifted_gradients(closure, loss, params, detached, length, replay)
        return loss, detached, (length, norm(shifted) * (length / OFFSET))

    def _shifted_gradients(
        self,
        closure: Callable[[], Any],
        loss: Any,
        params: list[Tensor],
        gradients: list[Tensor | None],
        length: Tensor,
        replay: "list[tuple[torch.device, Tensor]] | None",
    ) -> list[Tensor]:
        """The gradient at distance 0.01 along g, minus g."""
        pairs = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
        moved, g = [p for p, _ in pairs], [g for _, g in pairs]
        saved = [p.detach().clone() for p in moved]
        now = random_state(params)
        scale = torch.where(length > 0, OFFSET / torch.where(length > 0, length, 1), 0)
        try:
            add_scaled_(moved, g, scale)
            set_random_state(replay)
            again = evaluate(closure, params)
            if isinstance(loss, Tensor) and again is loss:
                raise RuntimeError(
                    "hvp='fd' calls the closure again at shifted parameters, and it returned the same loss; it must "
                    "compute the loss anew"
                )
            called_backward = any(p.grad is not None for p in params)
            found = gradients_of(again, moved, called_backward, graph=False)
        finally:
            for p, old in zip(moved, saved, strict=True):
                p.copy_(old)
            set_random_state(now)
        new = [torch.zeros_like(own) if x is None else x.detach() for x, own in zip(found, g, strict=True)]
        return list(torch._foreach_sub(new, g))

    def _check_finite(self, curvature: tuple[Tensor, Tensor] | None, gradients: Sequence[Tensor], number: int) -> None:
        if self.nonfinite == "ignore":
            return
        looked_at = norm(gradients) if curvature is None else curvature[0] + curvature[1]
        if not bool(looked_at.isfinite()):
            what = "the gradient" if curvature is None else f"v = {curvature[1].item():g} / {curvature[0].item():g}"
            raise FloatingPointError(
                f"{what} is not finite in iteration {number}; no parameter was changed. Lower factor or max_lr, or "
                "look for the cause in the loss"
            )

    def _move(self, moved: list[tuple[Tensor, Tensor]], curvature: tuple[Tensor, Tensor] | None, number: int) -> None:
        gradient_of = {id(p): g for p, g in moved}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p, _ in moved) else torch.float32
        wide = torch.empty(0, dtype=dtype, device=moved[0][1].device)
        rates = []
        for group in self.param_groups:
            rate = _rate(group, curvature, number, wide)
            rates.append(rate)
            members = [p for p in group["params"] if id(p) in gradient_of]
            for params in _alike(members, self.foreach):
                self._apply(params, [gradient_of[id(p)] for p in params], group, rate)
        self.last_lr = rates[0] if len(rates) == 1 else torch.stack(rates)
        self.last_curvature = self.last_drift = None
        if curvature is not None:
            self.last_curvature = _ratio(*curvature)
            self.last_drift = self.last_lr.square() / 2 * curvature[1]

    def _apply(self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any], rate: Tensor) -> None:
        sign = -1.0 if self.maximize else 1.0
        buffers = [self._buffer(p) for p in params] if group["momentum"] > 0 else []
        if buffers:
            torch._foreach_mul_(buffers, float(group["momentum"]))
            add_scaled_(buffers, gradients, rate, sign)
        if group["weight_decay"] > 0:
            torch._foreach_mul_(params, (1 - rate * group["weight_decay"]).to(params[0].device))
        if buffers:
            torch._foreach_sub_(params, buffers)
        else:
            add_scaled_(params, gradients, rate, -sign)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif buffer.dtype != parameter.dtype or buffer.device != parameter.device:  # the model has moved since
            buffer = state["momentum_buffer"] = buffer.to(parameter.device, parameter.dtype)
        return buffer

    def __getstate__(self) -> dict[str, Any]:
        own = ("hvp", "nonfinite", "maximize", "foreach")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" in state:  # from pickle or deepcopy
            self._forget()
        else:  # from load_state_dict, before anything is changed
            for index, (group, own) in enumerate(zip(state["param_groups"], self.param_groups, strict=True)):
                missing = [name for name in self.defaults if name not in group]
                if missing:
                    raise ValueError(f"state_dict has no {missing[0]!r} in group {index}; it is not that of a DAL")
                group.setdefault("base_lr", own["base_lr"])
                self._check(group, index)
                for parameter in group["params"]:
                    buffer = state["state"].get(parameter, {}).get("momentum_buffer")
                    if buffer is not None and buffer.shape != parameter.shape:
                        raise ValueError(
                            f"state_dict has a momentum of shape {tuple(buffer.shape)} for a parameter of shape "
                            f"{tuple(parameter.shape)} in group {index}"
                        )
        super().__setstate__(state)


def _check_settings(group: dict[str, Any], index: int) -> None:
    """Raise unless every setting of group number `index` is of its type and in its range."""
    where, lr = f"of parameter group {index} " if index else "", group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr {where}must hold one number, got a tensor of shape {tuple(lr.shape)}")
        lr = lr.item() if lr.device.type == "cpu" else 0.0  # elsewhere, reading it would wait for the device
    check_number(lr, "lr", where)
    check_number(group["p"], "p", where)
    check_number(group["weight_decay"], "weight_decay", where)
    check_number(group["momentum"], "momentum", where, 1.0)
    for key, name in (("factor", "factor"), ("lr_cap", "max_lr")):
        check_number(group[key], name, where, math.inf)
        if group[key] == 0:
            raise ValueError(f"{name} {where}must be positive, got {group[key]!r}")
    for name in ("start", "stop"):
        value = group[name]
        if value is None and name == "stop":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} {where}must be a number of steps, got {value!r}")
        if value < 0:
            raise ValueError(f"{name} {where}must be at least 0, got {value}")


def _adapts(group: dict[str, Any], number: int) -> bool:
    return group["p"] > 0 and group["start"] < number and (group["stop"] is None or number < group["stop"])


def _rate(group: dict[str, Any], curvature: tuple[Tensor, Tensor] | None, number: int, like: Tensor) -> Tensor:
    """H of a group: lr, or lr / base_lr min(c / v^p, cap); zero where the gradient is zero."""
    lr = group["lr"].to(like).reshape(()) if isinstance(group["lr"], Tensor) else like.new_tensor(float(group["lr"]))
    if curvature is None or not _adapts(group, number):
        return lr
    v = _ratio(*curvature)
    rate = (group["factor"] * v.pow(-group["p"])).clamp_max(group["lr_cap"]) * (lr / group["base_lr"])
    return torch.where(curvature[0] > 0, rate, 0)


def _ratio(length: Tensor, moved: Tensor) -> Tensor:
    return moved / torch.where(length > 0, length, 1)


def _alike(params: list[Tensor], foreach: bool | None) -> Iterator[list[Tensor]]:
    """Lists of parameters that one foreach call takes."""
    if foreach is False:
        yield from ([p] for p in params)
        return
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        kinds[p.device, p.dtype].append(p)
    yield from kinds.values()
