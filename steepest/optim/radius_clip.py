"""Any optimizer, its steps kept within the convergence radius of the cross-entropy."""

import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest._checks import check_int
from steepest.curvature.logit_slopes import Logits
from steepest.curvature.radius_meter import MeterMethod, RadiusMeter
from steepest.curvature.softmax_radius import Reduce, check_positive
from steepest.curvature.step_radius import StepRadius
from steepest.optim._forecast import Forecast
from steepest.optim.checks import first_nonfinite

OnNonFinite = Literal["raise", "skip"]


class RadiusClip(Optimizer):
    r"""Lets any optimizer propose its step p, and shortens it to the convergence radius of the cross-entropy.

    $$\theta \leftarrow \theta + s\,p, \quad s = \min(1, r_{max} \rho_a / \|p\|), \quad
    \rho_a = \pi T / \max_x (\max_k a_k - \min_k a_k), \quad a = J_z(x)\,p / \|p\|.$$

    So no gap between two logits of a measured sample changes by more than $\pi T r_{max}$ (logits linearised along the
    step). Training survives a learning rate that is a thousand times too high. It bounds where the Taylor series of
    the loss converges, not descent; with kinks (ReLU) there is no formal guarantee.

    It takes the place of the optimizer: groups, state, schedulers, closures, GradScaler. Its `state_dict` is that of
    the optimizer with one key more, and either loads the other's. The optimizer's own state advances as if the whole
    step had been taken; moments are not rescaled. It keeps two copies of the parameters.

    What is guaranteed, and for which samples: those measured, which are `samples`, or by default at most `max_samples`
    of what the model was last trained on. At measured steps $r \le r_{max}$, to rounding with "jvp" and to about 1e-3
    with "fd" in float32. With `every=k` the steps between are limited to $\|p\| \le$ `safety` $r_{max} \rho_a$ with the
    last measured $\rho_a$: they are inside the radius unless the slopes per unit length have grown by more than
    1/safety since. A learning rate or gradient that jumps is caught at once. A step whose forecast (the last length,
    times the growth of learning rates and gradient) is below half of that limit is made without a copy of the
    parameters; should it go beyond the limit all the same, it stands, is counted in `late_steps`, and the next one is
    measured. Between measurements, lengths and gradients of large parameters are estimated from a 32nd of them.

    Args:
        optimizer: proposes the steps: any of torch's, `Muon`, `Mixed`, or your own.
        model: gives logits, see `steepest.curvature.logit_slopes`; under DistributedDataParallel, give the wrapped
            model, so that all ranks take the same step.
        r_max: the largest step in units of the radius. 1 is the theory's; 2 was still fine, 4 not.
        samples: where to measure: a batch (inputs, or a tuple or list that begins with the inputs), a function without
            arguments that returns the current one, or None: what the model was trained on since the last step.
        every: measure at every k-th step.
        safety: factor on the limit between measurements.
        method: "jvp" (exact, about three forward passes), "fd" (finite differences: one forward pass more where
            training has computed the logits, else two), or "auto": "jvp" for float64 and logits of 1e3, else "fd".
        temperature: T, where the loss is on z / T.
        reduce: "max" over samples, or a quantile in (0, 1), which a mislabelled sample cannot own and which guarantees
            nothing for the samples above it.
        logits: how to get logits, `logits(model, inputs)`; None: `model(inputs)`. For classes in another dimension, for
            example, `lambda model, x: model(x).movedim(1, -1)`.
        max_samples: how many samples (positions of sequences count) to take of what the model was trained on, the first
            ones; None: all. Given `samples` are all used.
        nonfinite: what a bad gradient or step does: "raise" an error, or "skip" the step (counted in `skipped_steps`).
            The parameters stay as they were; a bad gradient does not reach the optimizer's state either.

    Attributes:
        last_r: r of the step last taken, after clipping; between measurements an estimate from the last radius.
        last_proposed_r: r of the step as the optimizer proposed it.
        last_rho: $\rho_a$ as last measured, in units of the parameters.
        last_scale: s.
        clipped_steps: how many steps were shortened.
        late_steps: how many steps between measurements went beyond their limit, see above.

    Raises:
        TypeError: an argument of another kind, or complex or sharded parameters.
        ValueError: an option out of its range, an empty batch, fewer than two classes, or another model's parameters.
        FloatingPointError: at a step, gradients, logits or a step with NaN or infinity, under nonfinite="raise".
        RuntimeError: at a step, no samples are known.

    Source:
        Sao 2026, arXiv 2603.13552, the controller on the step really taken.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = RadiusClip(torch.optim.SGD(model.parameters(), lr=1e4), model)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> cross_entropy(model(x), y).backward()
        >>> optimizer.step()
        >>> round(optimizer.last_r, 2), optimizer.clipped_steps
        (1.0, 1)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        r_max: float = 1.0,
        samples: Any = None,
        every: int = 1,
        *,
        safety: float = 0.5,
        method: MeterMethod = "auto",
        temperature: float = 1.0,
        reduce: Reduce = "max",
        logits: Logits | None = None,
        max_samples: int | None = 256,
        nonfinite: OnNonFinite = "raise",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, RadiusClip):
            raise ValueError("optimizer is clipped to a radius already")
        check_positive("r_max", r_max)
        check_int("every", every)
        check_positive("safety", safety)
        if safety > 1:
            raise ValueError(f"safety must be at most 1, got {safety!r}")
        check_nonfinite(nonfinite)
        self._inner: Optimizer | None = None
        super().__init__([{"params": []}], {})  # sets up hooks; until there is an inner optimizer, groups are ignored
        self._inner = optimizer
        self.defaults = optimizer.defaults
        self.r_max, self.every, self.safety, self.nonfinite = float(r_max), every, float(safety), nonfinite
        self.meter = RadiusMeter(
            model,
            list(_parameters(optimizer)),
            samples=samples,
            method=method,
            temperature=temperature,
            reduce=reduce,
            logits=logits,
            max_samples=max_samples,
        )
        self._before: list[Tensor] = []
        self.last_r = self.last_proposed_r = 0.0
        self.last_scale = 1.0
        self.clipped_steps = self.skipped_steps = self.late_steps = 0
        self._forecast, self._length = Forecast(), 0.0
        self._since_measured: int | None = None  # steps since the last measurement; None: there is none to go by
        self._finish()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that proposes the steps."""
        assert self._inner is not None
        return self._inner

    @property
    def last_rho(self) -> float:
        """The radius as last measured."""
        return self.meter.radius

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own groups."""
        return [] if self._inner is None else self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._inner is not None:
            self._inner.param_groups = groups

    @property
    def state(self) -> "MutableMapping[Any, Any]":  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own state."""
        return {} if self._inner is None else self._inner.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._inner is not None:
            self._inner.state = state

    def add_param_group(self, param_group: dict[str, Any], **options: Any) -> None:
        """Add parameters to the optimizer; options go to its own `add_param_group`."""
        if self._inner is None:
            return
        self._inner.add_param_group(param_group, **options)
        self.meter.set_parameters(list(_parameters(self._inner)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let the optimizer step, and shorten the step if it is too long.

        Args:
            closure: given to the optimizer as it is.

        Returns:
            What the optimizer's `step` returned: the closure's loss, or None.
        """
        meter, groups = self.meter, self.param_groups
        if len(meter.parameters) != sum(len(group["params"]) for group in groups):
            meter.set_parameters(list(_parameters(self.optimizer)))
        gradient = 0.0
        if closure is None:
            gradient = meter.sampled_gradient() if self.every > 1 else 0.0
            if (self._due or not math.isfinite(gradient)) and not self._gradients_are_finite():
                self._finish()
                return None
            if self._due:
                meter.check_ready()
        limit = self.safety * self.r_max * meter.radius
        unguarded = closure is None and not self._due and self._forecast.length_now(groups, gradient) <= 0.5 * limit
        if unguarded:
            return self._step_unguarded(limit, gradient)
        self._snapshot()
        meter.watch.before_step()
        try:
            loss = self.optimizer.step() if closure is None else self.optimizer.step(self._guarded(closure))
        except _BadGradient as bad:
            self._restore()
            self._finish()
            return bad.loss
        try:
            with torch.no_grad():
                self._limit()
        except FloatingPointError as error:
            self._restore()
            if self.nonfinite == "raise":
                raise FloatingPointError(f"{error}; the parameters are as they were before the step") from None
            self.skipped_steps += 1
        except BaseException:
            self._restore()
            raise
        self._forecast.note(groups, gradient, self._length)
        self._finish()
        return loss

    def _step_unguarded(self, limit: float, gradient: float) -> None:
        """A step between measurements, surely far from the limit: no copy of the parameters is made."""
        meter = self.meter
        sample = meter.sample()
        self.optimizer.step()
        length = meter.sampled_length(sample)
        if not math.isfinite(length):
            raise FloatingPointError("the step holds NaN or infinity although the gradients did not; it was taken")
        assert self._since_measured is not None
        self._since_measured += 1
        self.last_r = self.last_proposed_r = length / meter.radius
        self.last_scale = 1.0
        if length > limit:
            self.late_steps += 1
            self._since_measured = None
        self._forecast.note(self.param_groups, gradient, length)
        self._finish()

    @property
    def _due(self) -> bool:
        return self._since_measured is None or self._since_measured + 1 >= self.every

    def _limit(self) -> None:
        meter, before = self.meter, self._before
        if self._due:
            found = meter.measure(before)
            self._since_measured = 0 if math.isfinite(meter.radius) else None
            limit = self.r_max
        else:
            limit = self.safety * self.r_max
            length = meter.length(before)
            if not math.isfinite(length):
                raise FloatingPointError("the step holds NaN or infinity")
            found = StepRadius(length / meter.radius, length)
            assert self._since_measured is not None
            self._since_measured += 1
        self._length = found.length
        self.last_proposed_r = found.ratio
        self.last_scale = 1.0 if found.ratio <= limit else limit / found.ratio
        self.last_r = found.ratio * self.last_scale
        if self.last_scale < 1:
            self.clipped_steps += 1
            for parameter, old in zip(meter.parameters, before, strict=True):
                parameter.copy_(torch.lerp(old, parameter, self.last_scale))

    def _snapshot(self) -> None:
        parameters = [parameter.detach() for parameter in self.meter.parameters]
        kept = self._before
        fits = len(kept) == len(parameters) and all(
            a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()
            for a, b in zip(kept, parameters, strict=True)
        )
        if fits:
            torch._foreach_copy_(kept, parameters)
        else:
            self._before = [parameter.clone() for parameter in parameters]

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, old in zip(self.meter.parameters, self._before, strict=True):
                parameter.copy_(old)

    def _finish(self) -> None:
        """Forget the past; what the model runs on matters only if the next step is measured."""
        self.meter.watch.forget()
        self.meter.watch.active = self._due

    def _gradients_are_finite(self) -> bool:
        found = [p for p in self.meter.parameters if p.grad is not None and p.grad.layout == torch.strided]
        bad = first_nonfinite([p.grad for p in found if p.grad is not None])
        if bad is None:
            return True
        if self.nonfinite == "skip":
            self.skipped_steps += 1
            return False
        name = next(
            (n for n, p in self.meter.function.model.named_parameters() if p is found[bad]), "outside the model"
        )
        raise FloatingPointError(
            f"the gradient of parameter {name} (shape {tuple(found[bad].shape)}) holds NaN or infinity; nothing was "
            "changed. Lower lr, look for the cause, or pass nonfinite='skip' to leave such steps out"
        )

    def _guarded(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, stopping the optimizer where gradients are bad."""

        def guarded() -> Any:
            loss = closure()
            if not self._gradients_are_finite():
                raise _BadGradient(loss)
            return loss

        return guarded

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict, and "radius_clip" in it."""
        state = dict(self.optimizer.state_dict())
        state["radius_clip"] = {
            **self.meter.state_dict(),
            "since_measured": self._since_measured,
            "last": [self.last_r, self.last_proposed_r, self.last_scale],
            "clipped_steps": self.clipped_steps,
            "skipped_steps": self.skipped_steps,
            "late_steps": self.late_steps,
            "forecast": self._forecast.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or a state dict of the optimizer alone (the next step is then measured)."""
        state = dict(state_dict)
        own = state.pop("radius_clip", None)
        if own is not None and not isinstance(own, dict):
            raise ValueError(f"state_dict: 'radius_clip' must be a mapping, got {type(own).__name__}")
        self.optimizer.load_state_dict(state)
        own = own or {}
        self.meter.load_state_dict(own)
        self._since_measured = own.get("since_measured")
        self.last_r, self.last_proposed_r, self.last_scale = own.get("last", (0.0, 0.0, 1.0))
        self.clipped_steps, self.skipped_steps = int(own.get("clipped_steps", 0)), int(own.get("skipped_steps", 0))
        self.late_steps = int(own.get("late_steps", 0))
        self._forecast = Forecast(own.get("forecast"))
        self._finish()

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """See torch; the optimizer's own hook, like the other three."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        return {**{name: self.__dict__[name] for name in _PICKLED}, "_before": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"RadiusClip(r_max={self.r_max:g}, every={self.every}, {self.meter.method})\n{self.optimizer!r}"


_PICKLED = (
    "defaults", "_inner", "r_max", "every", "safety", "nonfinite", "meter", "last_r", "last_proposed_r", "last_scale",
    "clipped_steps", "skipped_steps", "late_steps", "_forecast", "_length", "_since_measured",
)  # fmt: skip


class _BadGradient(Exception):  # noqa: N818 - a signal, not an error
    def __init__(self, loss: Any) -> None:
        self.loss = loss


def check_nonfinite(value: str) -> None:
    """Raise unless `value` is one of `OnNonFinite`."""
    if value not in get_args(OnNonFinite):
        raise ValueError(f"nonfinite must be one of {', '.join(get_args(OnNonFinite))}; got {value!r}")


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
