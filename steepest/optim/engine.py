"""The engine of every norm-based optimizer: momentum, a direction by a norm's oracle, a step; equal shapes at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from steepest.geometry import Direction, Norm, get_norm
from steepest.geometry.scaled import Scaled
from steepest.optim import buckets
from steepest.optim.buckets import Bucket, adjoining, chunks, joined
from steepest.optim.checks import (
    AdjustLr,
    MomentumForm,
    NonFinite,
    check_group,
    check_parameter,
    first_nonfinite,
    norm_text,
    shape_factor,
)
from steepest.optim.distributed import Distribution
from steepest.optim.layout import Layout, LayoutName, memory_order
from steepest.optim.placement import is_sharded, local
from steepest.optim.step_rules import StepRule, Unit


class SteepestDescent(Optimizer):
    r"""Descent along the steepest direction of a norm, $x \leftarrow (1 - lr\,\lambda) x + lr\,s\eta\,\mathrm{lmo}(m)$.

    m is the momentum of the gradient, lmo the norm's minimiser of $\langle m, \cdot \rangle$ over its unit ball, s
    the shape factor of `adjust_lr_fn`, and $\eta$ the length of the step rule (one, unless said otherwise). `Muon`,
    `Scion`, `SignDescent` and `NormalizedDescent` are this class with their papers' settings.

    Matrices of equal shape are updated in one batched computation. Momenta have the dtype of their parameters; one
    buffer per parameter is all the state, none without momentum.

    Args:
        params: parameters, named parameters, or groups of them. Every keyword below but `step_rule`, `maximize`,
            `foreach` and `compile` can be set per group.
        lr: learning rate, a number or a tensor of one element.
        norm: a `steepest.geometry.Norm` or the name of one (`steepest.geometry.NORMS`); or any other `Direction`, whose
            $-T(m)$ then takes the place of lmo.
        momentum: weight of the past, in [0, 1).
        momentum_form: ``"ema"`` $b \leftarrow \mu b + (1-\mu) g$; ``"heavy_ball"`` $b \leftarrow \mu b + g$;
            ``"lion"``: m is $\beta b + (1-\beta) g$ with $\beta$ = `interpolation`, then b moves as an EMA.
        nesterov: m looks one step ahead: $\mu b + (1-\mu) g$ (ema), $g + \mu b$ (heavy ball). Else m = b.
        interpolation: see `momentum_form`.
        weight_decay: $\lambda$, decoupled from the gradient.
        constrained: x stays in the norm's ball: $x \leftarrow x - lr\,\eta\,v$ with $v = x - \mathrm{lmo}(m)$, the
            Frank-Wolfe step; $lr\,\eta$ at most 1, and no other weight decay. A step rule that reads dual norms gets
            $\langle m, v \rangle$ instead, the Wolfe gap, and a matrix with m = 0 stays where it is.
        adjust_lr_fn: factor s of a matrix (out, in): ``"none"`` 1; ``"original"`` $\sqrt{\max(1, out/in)}$;
            ``"match_rms_adamw"`` $0.2\sqrt{\max(out, in)}$, so that learning rates of AdamW carry over; ``"spectral"``
            $\sqrt{out/in}$, the operator norm between RMS norms.
        nonfinite: what a gradient with NaN or infinity does, before anything is changed: ``"raise"`` an error,
            ``"skip"`` the step (counted in `skipped_steps`), or ``"ignore"``: no check (and none of its cost).
        layout: how a parameter is seen as matrices, see `steepest.optim.layout.Layout`.
        split: sizes of blocks along the outputs that are matrices of their own (a fused QKV projection), or None.
        transposed: parameters are stored (in, out).
        input_split: sizes of blocks along the inputs that are matrices of their own (the heads that an attention output
            projection reads), or None.
        interleaved: how many matrices alternate along the outputs (2: gate and up, neuron by neuron).
        step_rule: a `steepest.optim.StepRule`; default `Unit()`.
        maximize: ascend instead.
        foreach: False treats one matrix at a time; None and True batch those of equal shape. Results agree to rounding.
        compile: the work of each bucket is compiled by `torch.compile` at the first step (tens of seconds; on a
            processor it needs a C++ compiler). Over several processes the work is not compiled.

    Raises:
        ValueError: a hyperparameter out of its range, or a parameter that does not fit its norm or layout.
        TypeError: complex or sparse parameters or gradients, or an integer parameter.
        FloatingPointError: a non-finite gradient under ``nonfinite="raise"``.

    Examples:
        >>> import torch
        >>> from steepest.optim import SteepestDescent
        >>> layer = torch.nn.Linear(8, 4, bias=False)
        >>> optimizer = SteepestDescent(layer.parameters(), lr=0.1, norm="max_row", momentum=0.9)
        >>> layer(torch.randn(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    # The settings that decide how a parameter becomes matrices and which norm each has.
    _shape_settings: ClassVar[tuple[str, ...]] = (
        *("norm", "layout", "split", "transposed", "input_split", "interleaved", "adjust_lr_fn"),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        norm: str | Direction = "euclidean",
        momentum: float = 0.0,
        momentum_form: MomentumForm = "ema",
        nesterov: bool = False,
        interpolation: float = 0.9,
        weight_decay: float = 0.0,
        constrained: bool = False,
        adjust_lr_fn: AdjustLr = "none",
        nonfinite: NonFinite = "raise",
        layout: LayoutName = "auto",
        split: Sequence[int] | None = None,
        transposed: bool = False,
        input_split: Sequence[int] | None = None,
        interleaved: int = 1,
        step_rule: StepRule | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
        **extra_defaults: Any,
    ) -> None:
        self.step_rule = Unit() if step_rule is None else step_rule
        if not isinstance(self.step_rule, StepRule):
            raise TypeError(f"step_rule must be a StepRule, got {type(step_rule).__name__}")
        if foreach is not None and not isinstance(foreach, bool):
            raise TypeError(f"foreach must be True, False or None, got {foreach!r}")
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, got {compile!r}")
        self.foreach = foreach
        self.compile = compile
        self._compiled: Any = None
        self._plans: dict[int, Any] = {}
        self.distribution: Distribution | None = None
        defaults = {
            "lr": lr,
            "norm": norm,
            "momentum": momentum,
            "momentum_form": momentum_form,
            "nesterov": nesterov,
            "interpolation": interpolation,
            "weight_decay": weight_decay,
            "constrained": constrained,
            "adjust_lr_fn": adjust_lr_fn,
            "nonfinite": nonfinite,
            "layout": layout,
            "split": split,
            "transposed": transposed,
            "input_split": input_split,
            "interleaved": interleaved,
            "maximize": maximize,
            "skipped_steps": 0,
            **extra_defaults,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; all or nothing: a group that is refused leaves the optimizer as it was."""
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            group["norm"] = self._resolve_norm(group["norm"])
            self._check(group, len(self.param_groups) - 1)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _check(self, group: dict[str, Any], index: int) -> None:
        """Raise unless the settings of a group are right and fit its parameters."""
        check_group(group, index, self.step_rule)
        for parameter in group["params"]:
            check_parameter(parameter)
            if is_sharded(parameter):
                self.distribution = self.distribution or Distribution()
                self.distribution.placement(parameter)
            for _ in self._block_norms(parameter, group):
                pass

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has left out."""
        return self.param_groups[0]["skipped_steps"]

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("step_rule", "foreach", "compile", "distribution")}
        return {**super().__getstate__(), **kept, "_plans": {}, "_compiled": None}

    def _resolve_norm(self, norm: str | Direction) -> str | Direction:
        """What the group keeps as its norm."""
        return get_norm(norm)

    def _norm_for(self, shape: tuple[int, ...], group: dict[str, Any]) -> Direction:
        """The norm of a block (out, in, *kernel)."""
        return group["norm"].at(shape)

    def _block_norms(self, parameter: Tensor, group: dict[str, Any]) -> Iterator[tuple[Direction, float]]:
        """Norm and shape factor of each block of a parameter; raises if they do not fit."""
        layout = Layout.of(group).resolve(parameter.shape)
        for block in range(layout.count):
            shape = layout.shape_of(parameter.shape, block)
            norm = self._norm_for(shape, group)
            if len(shape) < 2 and not norm.takes_vectors:
                raise ValueError(
                    f"norm {_base(norm)} is a norm of matrices, which {self._name(group, parameter)} is not; "
                    "give vectors and scalars an entrywise norm or another optimizer (steepest.optim.build does)"
                )
            if group["constrained"] and not isinstance(norm, Norm):
                raise ValueError(f"constrained=True needs a norm, whose ball it keeps to; {norm} is another direction")
            if getattr(_base(norm), "event_ndim", 2) > 2:
                raise ValueError(f"norm {_base(norm)} spans several matrices; event_ndim must be 1 or 2 here")
            yield norm, shape_factor(group["adjust_lr_fn"], shape)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again, calls backward, and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradients_are_usable():
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return loss
        if self.distribution is not None:
            self.distribution.step(self)
            return loss
        copies: list[tuple[Tensor, Tensor]] = []
        work = [
            (bucket, group)
            for index, group in enumerate(self.param_groups)
            for bucket in self._buckets(index, group, copies)
        ]
        batched, rule = self._batched(), self.step_rule
        waiting = []
        for bucket, group in work:
            for chunk in chunks(bucket, self.foreach, by_rows=not rule.needs_duals):
                if rule.needs_duals:
                    waiting.append((chunk, *batched.prepare(chunk, group, rule), group))
                else:
                    batched.advance(chunk, group)
        if waiting:
            duals = [measured[2] for measured in waiting]
            lengths = self._lengths(joined(duals), joined([measured[3] for measured in waiting]))
            pieces = lengths.split([dual.numel() for dual in duals])
            for (chunk, direction, dual, _, group), length in zip(waiting, pieces, strict=True):
                shape = (*dual.shape, *(1 for _ in range(direction.ndim - dual.ndim)))
                batched.apply(chunk, direction, group, length.to(direction.device).reshape(shape))
        for parameter, copy in copies:
            parameter.copy_(copy)
        return loss

    def _batched(self) -> Any:
        """The functions that do the work of a chunk: those of `buckets`, or compiled ones."""
        if not self.compile or torch.compiler.is_compiling():
            return buckets
        if self._compiled is None:
            from steepest.optim.compiled import Compiled

            self._compiled = Compiled()
        return self._compiled

    def _lengths(self, duals: Tensor, sizes: Tensor) -> Tensor:
        """The lengths of this step, one per matrix, all groups together."""
        return self.step_rule.lengths(duals, sizes) if self.step_rule.needs_sizes else self.step_rule.lengths(duals)

    def _gradients_are_usable(self) -> bool:
        """Refuse what cannot be stepped on, before anything is changed."""
        checked = []
        for index, group in enumerate(self.param_groups):
            check_group(group, index, self.step_rule)
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    raise TypeError(
                        f"gradients must be dense, got layout {gradient.layout} for a parameter of shape "
                        f"{tuple(parameter.shape)}; an embedding with sparse=True needs torch.optim.SparseAdam"
                    )
                if group["nonfinite"] != "ignore":
                    checked.append((group, parameter, gradient))
        gradients = [gradient for _, _, gradient in checked]
        if self.distribution is None:
            bad = first_nonfinite(gradients)
        else:
            looked_at = [p for group in self.param_groups if group["nonfinite"] != "ignore" for p in group["params"]]
            bad = self.distribution.agree(looked_at, first_nonfinite([local(gradient) for gradient in gradients]))
        if bad is None:
            return True
        group, parameter, _ = checked[bad]
        if group["nonfinite"] == "skip":
            return False
        raise FloatingPointError(
            f"the gradient of {self._name(group, parameter)} holds NaN or infinity; nothing was changed. Lower lr, "
            "look for the cause, or pass nonfinite='skip' to leave such steps out"
        )

    @staticmethod
    def _name(group: dict[str, Any], parameter: Tensor) -> str:
        position = next(index for index, other in enumerate(group["params"]) if other is parameter)
        name = group["param_names"][position] if "param_names" in group else f"number {position} of its group"
        return f"parameter {name} (shape {tuple(parameter.shape)})"

    def _buckets(self, index: int, group: dict[str, Any], copies: list[tuple[Tensor, Tensor]]) -> "list[Bucket]":
        """Blocks of equal shape, dtype, device and norm, in the order of the parameters.

        A parameter whose memory does not let its matrices be seen is copied; `copies` gets it and its copy.
        """
        found: dict[int, Bucket] = {}
        stateful = group["momentum"] > 0
        plan = self._plan(index, group)
        if stateful:
            self._start_momenta(plan)
        for stored, layout, norms, slots in plan:
            gradient = stored.grad
            if gradient is None or stored.numel() == 0:
                continue
            momentum = self._momentum_buffer(stored) if stateful else gradient
            if layout.is_plain and stored.ndim == 2 and not norms[0][0].spans_batch:
                triples = ((stored, gradient, momentum),)
            else:
                parameter = stored
                if not layout.is_view(stored, memory_order(stored)):
                    parameter = stored.contiguous()
                    copies.append((stored, parameter))
                order = memory_order(parameter)
                if stateful and not layout.is_view(momentum, order):
                    momentum = self.state[stored]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
                views = (layout.blocks(tensor, order) for tensor in (parameter, gradient, momentum))
                triples = list(zip(*views, strict=True))
            for blocks, (norm, factor), slot in zip(triples, norms, slots, strict=True):
                bucket = found.get(slot)
                if bucket is None:
                    bucket = found[slot] = Bucket(norm, factor, [], [], [])
                bucket.append(*blocks)
        return list(found.values())

    def _plan(
        self, index: int, group: dict[str, Any]
    ) -> "list[tuple[Tensor, Layout, list[tuple[Direction, float]], list[int]]]":
        """Per parameter its layout, and of each of its blocks the norm, the factor, and the number of its bucket.

        Blocks of equal shape, dtype, device, norm and factor share a bucket. Made anew when a setting or a parameter
        changes.
        """
        settings = [group[key] for key in self._shape_settings]
        settings += [(id(parameter), parameter.dtype, parameter.device) for parameter in group["params"]]
        known = self._plans.get(index)
        if known is not None and known[0] == settings:
            return known[1]
        layout, numbers, plan = Layout.of(group), {}, []
        for parameter in group["params"]:
            resolved, norms, slots = layout.resolve(parameter.shape), list(self._block_norms(parameter, group)), []
            for block, (norm, factor) in enumerate(norms):
                stacked = parameter.shape if norm.spans_batch else resolved.is_plain and parameter.ndim == 2
                shape = resolved.shape_of(parameter.shape, block)
                key = (shape, stacked, parameter.dtype, parameter.device, norm, factor)
                slots.append(numbers.setdefault(key, len(numbers)))
            plan.append((parameter, resolved, norms, slots))
        self._plans[index] = (settings, plan)
        return plan

    def _start_momenta(self, plan: "list[tuple[Tensor, Layout, list[tuple[Direction, float]], list[int]]]") -> None:
        """Zeros for the parameters that have a gradient for the first time, those of a bucket side by side."""
        fresh: dict[int, list[Tensor]] = {}
        for parameter, _, _, slots in plan:
            if parameter.grad is not None and parameter not in self.state and len(slots) == 1:
                fresh.setdefault(slots[0], []).append(parameter)
        for parameters in fresh.values():
            for parameter, zeros in zip(parameters, adjoining(parameters), strict=True):
                self.state[parameter]["momentum_buffer"] = zeros

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif buffer.dtype != parameter.dtype or buffer.device != parameter.device:  # the model has moved since
            buffer = state["momentum_buffer"] = buffer.to(parameter.device, parameter.dtype)
        return buffer

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors only (norms as text), so that `torch.load(..., weights_only=True)` reads it."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["norm"] = norm_text(group["norm"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it comes from other groups, shapes or norms; the optimizer is then unchanged.
        """
        missing = {"state", "param_groups"} - set(state_dict)
        if missing and not self._optimizer_load_state_dict_pre_hooks:
            raise ValueError(
                f"state_dict must hold 'state' and 'param_groups', got {', '.join(map(str, state_dict)) or 'nothing'}"
            )
        super().load_state_dict(state_dict)

    def _translated(self, group: dict[str, Any]) -> dict[str, Any]:
        """What to change in a saved group that comes from another optimizer, which this one goes on from."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" not in state:  # from load_state_dict, after its hooks, before anything is changed
            for index, (group, own) in enumerate(zip(state["param_groups"], self.param_groups, strict=True)):
                group.update(self._translated(group))
                if str(group.get("norm")) != norm_text(own["norm"]):
                    raise ValueError(
                        f"state_dict was made with norm {group.get('norm')} in group {index}, here it is {own['norm']}"
                    )
                group.update({**own, **group, "norm": own["norm"]})
                self._check(group, index)
                for parameter in group["params"]:
                    buffer = state["state"].get(parameter, {}).get("momentum_buffer")
                    if buffer is not None and buffer.shape != parameter.shape:
                        raise ValueError(
                            f"state_dict has a momentum of shape {tuple(buffer.shape)} for a parameter of shape "
                            f"{tuple(parameter.shape)} in group {index}"
                        )
        super().__setstate__(state)


def _base(norm: Direction) -> Direction:
    while isinstance(norm, Scaled):
        norm = norm.base
    return norm
