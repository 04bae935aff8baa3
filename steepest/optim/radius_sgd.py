"""SGD without a learning rate: every step is as long as the convergence radius of the cross-entropy."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.curvature.logit_slopes import Logits
from steepest.curvature.radius_meter import MeterMethod, RadiusMeter
from steepest.curvature.softmax_radius import Reduce
from steepest.optim.checks import check_number, check_parameter, first_nonfinite
from steepest.optim.radius_clip import OnNonFinite, check_nonfinite


class RadiusSGD(Optimizer):
    r"""$\theta \leftarrow \theta - \eta b$ with $\eta = r \rho_a(b) / \|b\|$: no learning rate, only the ratio r.

    b is SGD's direction: $g \leftarrow g + \lambda\theta$, $m \leftarrow \mu m + (1 - damp) g$ (m = g at first),
    $b = m$, or $g + \mu m$ with Nesterov. $\rho_a(b)$ is the radius along it, and the norm is over all parameters, so
    every step has the same length in units of its radius, whatever the gradient's size.

    The ratio stands in the groups under "lr", so that any scheduler can lower it. With different ratios in several
    groups, b is scaled by them, and the whole step has the largest.

    Args:
        params: as for any optimizer.
        model: gives logits, see `RadiusClip`.
        r: the length of a step in units of the radius; the paper tried 0.5, 1, 2 and 4, and 1 was best.
        momentum: $\mu$.
        dampening: damp.
        weight_decay: $\lambda$, added to the gradient as `torch.optim.SGD` does.
        nesterov: look one step ahead.
        maximize: ascend instead.
        samples: see `RadiusClip`.
        method: see `RadiusClip`.
        temperature: see `RadiusClip`.
        reduce: see `RadiusClip`.
        logits: see `RadiusClip`.
        max_samples: see `RadiusClip`.
        nonfinite: see `RadiusClip`.

    Attributes:
        last_lr: $\eta$ of the last step.
        last_rho: $\rho_a$ of the last step. If no logit moves against another it is infinite, and no step is taken.

    Raises:
        TypeError: see `RadiusClip`.
        ValueError: see `RadiusClip`; also a hyperparameter out of its range.
        FloatingPointError: see `RadiusClip`.
        RuntimeError: see `RadiusClip`.

    Source:
        Sao 2026, arXiv 2603.13552, radius-set SGD.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = RadiusSGD(model.parameters(), model)
        >>> cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        >>> optimizer.step()
        >>> round(optimizer.last_r, 2)
        1.0
    """

    def __init__(
        self,
        params: Any,
        model: nn.Module,
        r: float = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        samples: Any = None,
        method: MeterMethod = "auto",
        temperature: float = 1.0,
        reduce: Reduce = "max",
        logits: Logits | None = None,
        max_samples: int | None = 256,
        nonfinite: OnNonFinite = "raise",
    ) -> None:
        check_nonfinite(nonfinite)
        defaults = {
            "lr": r,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        self.meter: RadiusMeter | None = None
        super().__init__(params, defaults)
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self.last_lr, self.last_r = 0.0, 0.0
        self.meter = RadiusMeter(
            model,
            self._parameters(),
            samples=samples,
            method=method,
            temperature=temperature,
            reduce=reduce,
            logits=logits,
            max_samples=max_samples,
        )

    @property
    def last_rho(self) -> float:
        """The radius as last measured."""
        assert self.meter is not None
        return self.meter.radius

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
            if self.meter is not None:
                self.meter.set_parameters(self._parameters())
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step.

        Args:
            closure: evaluates the model again, calls backward, and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self.meter is not None
        with torch.no_grad():
            try:
                self._step(self.meter)
            finally:
                self.meter.watch.forget()
        return loss

    def _step(self, meter: RadiusMeter) -> None:
        for group in self.param_groups:
            _check(group)
        gradients = {id(p): p.grad for p in meter.parameters if p.grad is not None}
        for gradient in gradients.values():
            if gradient.layout != torch.strided:
                raise TypeError(f"gradients must be dense, got layout {gradient.layout} (a sparse embedding, perhaps)")
        if first_nonfinite(list(gradients.values())) is not None:
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    "a gradient holds NaN or infinity; nothing was changed. Look for the cause, or pass "
                    "nonfinite='skip' to leave such steps out"
                )
            self.skipped_steps += 1
            return
        top = max((float(group["lr"]) for group in self.param_groups), default=0.0)
        if not gradients:
            return
        meter.check_ready()
        meter.watch.before_step()
        before = [parameter.detach().clone() for parameter in meter.parameters]
        moved: list[tuple[Tensor, Tensor]] = []
        buffers: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction, buffer = self._direction(group, parameter)
                    share = float(group["lr"]) / top if top else 0.0
                    moved.append((parameter, direction if share == 1 else direction * share))
                    if buffer is not None:
                        buffers.append((parameter, buffer))
        length = math.sqrt(sum(float(torch.linalg.vector_norm(d, dtype=_norm_dtype(d))) ** 2 for _, d in moved))
        if not math.isfinite(length):
            raise FloatingPointError("the direction holds NaN or infinity; nothing was changed")
        radius = math.inf
        if length:
            radius = self._radius_along(meter, before, moved, length)
        for parameter, buffer in buffers:
            self.state[parameter]["momentum_buffer"] = buffer
        self.last_lr = top * radius / length if length and math.isfinite(radius) else 0.0
        self.last_r = top if self.last_lr else 0.0
        if self.last_lr:
            for parameter, direction in moved:
                parameter.add_(direction.to(parameter.dtype), alpha=-self.last_lr)

    def _radius_along(
        self, meter: RadiusMeter, before: list[Tensor], moved: list[tuple[Tensor, Tensor]], length: float
    ) -> float:
        """The radius along the direction; the parameters are as before when this returns."""
        # a step about as long as the last radius keeps its digits in low precision
        scale = (meter.radius if 0 < meter.radius < math.inf else 1.0) / length
        try:
            for parameter, direction in moved:
                parameter.sub_(direction.to(parameter.dtype), alpha=scale)
            return meter.measure(before).radius
        finally:
            for parameter, old in zip(meter.parameters, before, strict=True):
                parameter.copy_(old)

    def _direction(self, group: dict[str, Any], parameter: Tensor) -> tuple[Tensor, Tensor | None]:
        """b, and the new momentum buffer."""
        assert parameter.grad is not None
        gradient = -parameter.grad if group["maximize"] else parameter.grad
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        momentum = float(group["momentum"])
        if not momentum:
            return gradient, None
        old = self.state[parameter].get("momentum_buffer") if parameter in self.state else None
        buffer = gradient.clone() if old is None else momentum * old + (1 - group["dampening"]) * gradient
        return (gradient + momentum * buffer if group["nesterov"] else buffer), buffer

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with "radius" in it."""
        assert self.meter is not None
        state = super().state_dict()
        state["radius"] = {**self.meter.state_dict(), "skipped_steps": self.skipped_steps}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; one of `torch.optim.SGD` gives all but its learning rate, which is no r."""
        assert self.meter is not None
        state = dict(state_dict)
        own, ratios = state.pop("radius", None), [group["lr"] for group in self.param_groups]
        super().load_state_dict(state)
        if own is None:
            for group, ratio in zip(self.param_groups, ratios, strict=True):
                group["lr"] = ratio
        own = own or {}
        self.meter.load_state_dict(own)
        self.skipped_steps = int(own.get("skipped_steps", 0))

    def __getstate__(self) -> dict[str, Any]:
        own = ("meter", "nonfinite", "skipped_steps", "last_lr", "last_r")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}


def _check(group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        check_parameter(parameter)
    for name in ("lr", "weight_decay"):
        value = group[name]
        check_number(float(value) if isinstance(value, Tensor) else value, "r" if name == "lr" else name)
    check_number(group["momentum"], "momentum", below=1.0)
    check_number(group["dampening"], "dampening")
    for name in ("nesterov", "maximize"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
    if group["nesterov"] and (not group["momentum"] or group["dampening"]):
        raise ValueError("nesterov needs a momentum and no dampening")


def _norm_dtype(tensor: Tensor) -> torch.dtype | None:
    return torch.float32 if tensor.itemsize < 4 else None
