"""The engine of every norm-based optimizer: momentum, a direction by a norm's oracle, a step; equal shapes at once."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from steepest.geometry import Direction, Norm, get_norm
from steepest.geometry.scaled import Scaled
from steepest.optim.layout import Layout, LayoutName, memory_order
from steepest.optim.step_rules import StepRule, Unit

MomentumForm = Literal["ema", "heavy_ball", "lion"]
NonFinite = Literal["raise", "skip", "ignore"]
AdjustLr = Literal["none", "original", "match_rms_adamw", "spectral"]

# Elements handled at once. Cheap norms work in pieces that stay in a core's cache; matrix functions take as many
# matrices as one workspace holds.
_CHEAP_CHUNK = 1 << 18
_MATRIX_CHUNK = 1 << 26


class SteepestDescent(Optimizer):
    r"""Descent along the steepest direction of a norm, $x \leftarrow (1 - lr\,\lambda) x + lr\,s\eta\,\mathrm{lmo}(m)$.

    m is the momentum of the gradient, lmo the norm's minimiser of $\langle m, \cdot \rangle$ over its unit ball, s
    the shape factor of `adjust_lr_fn`, and $\eta$ the length of the step rule (one, unless said otherwise). `Muon`,
    `Scion`, `SignDescent` and `NormalizedDescent` are this class with their papers' settings.

    Matrices of equal shape are updated in one batched computation. Momenta have the dtype of their parameters; one
    buffer per parameter is all the state, none without momentum.

    Args:
        params: parameters, named parameters, or groups of them. Every keyword below but `step_rule`, `maximize` and
            `foreach` can be set per group.
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
        step_rule: a `steepest.optim.StepRule`; default `Unit()`.
        maximize: ascend instead.
        foreach: False treats one matrix at a time; None and True batch those of equal shape. Results agree to rounding.

    Raises:
        ValueError: a hyperparameter out of its range, or a parameter that does not fit its norm or layout.
        TypeError: complex or sparse parameters or gradients, or an integer parameter.
        FloatingPointError: a non-finite gradient under ``nonfinite="raise"``.

    Example:
        >>> import torch
        >>> from steepest.optim import SteepestDescent
        >>> layer = torch.nn.Linear(8, 4, bias=False)
        >>> optimizer = SteepestDescent(layer.parameters(), lr=0.1, norm="max_row", momentum=0.9)
        >>> layer(torch.randn(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    # The settings that decide how a parameter becomes matrices and which norm each has.
    _shape_settings: ClassVar[tuple[str, ...]] = ("norm", "layout", "split", "transposed", "adjust_lr_fn")

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
        step_rule: StepRule | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **extra_defaults: Any,
    ) -> None:
        self.step_rule = Unit() if step_rule is None else step_rule
        if not isinstance(self.step_rule, StepRule):
            raise TypeError(f"step_rule must be a StepRule, got {type(step_rule).__name__}")
        if foreach is not None and not isinstance(foreach, bool):
            raise TypeError(f"foreach must be True, False or None, got {foreach!r}")
        self.foreach = foreach
        self._plans: dict[int, Any] = {}
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
        _check_group(group, index, self.step_rule)
        for parameter in group["params"]:
            _check_parameter(parameter)
            for _ in self._block_norms(parameter, group):
                pass

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has left out."""
        return self.param_groups[0]["skipped_steps"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "step_rule": self.step_rule, "foreach": self.foreach, "_plans": {}}

    def _resolve_norm(self, norm: str | Direction) -> str | Direction:
        """What the group keeps as its norm."""
        return get_norm(norm)

    def _norm_for(self, shape: tuple[int, ...], group: dict[str, Any]) -> Direction:
        """The norm of a block (out, in, *kernel)."""
        return group["norm"].at(shape)

    def _block_norms(self, parameter: Tensor, group: dict[str, Any]) -> Iterator[tuple[Direction, float]]:
        """Norm and shape factor of each block of a parameter; raises if they do not fit."""
        layout = Layout(group["layout"], group["split"], group["transposed"]).resolve(parameter.shape)
        for block in range(1 if layout.split is None else len(layout.split)):
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
            yield norm, _shape_factor(group["adjust_lr_fn"], shape)

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
        copies: list[tuple[Tensor, Tensor]] = []
        work = [
            (bucket, group)
            for index, group in enumerate(self.param_groups)
            for bucket in self._buckets(index, group, copies)
        ]
        waiting = []
        for bucket, group in work:
            for chunk in _chunks(bucket, self.foreach):
                if self.step_rule.needs_duals:
                    waiting.append((chunk, *_measured(chunk, _momentum(chunk, group), group, self.step_rule), group))
                else:
                    _apply(chunk, bucket.norm.direction(_momentum(chunk, group)), group)
        if waiting:
            duals = [measured[2] for measured in waiting]
            lengths = self._lengths(_joined(duals), _joined([measured[3] for measured in waiting]))
            pieces = lengths.split([dual.numel() for dual in duals])
            for (chunk, direction, dual, _, group), length in zip(waiting, pieces, strict=True):
                shape = (*dual.shape, *(1 for _ in range(direction.ndim - dual.ndim)))
                _apply(chunk, direction, group, length.to(direction.device).reshape(shape))
        for parameter, copy in copies:
            parameter.copy_(copy)
        return loss

    def _lengths(self, duals: Tensor, sizes: Tensor) -> Tensor:
        """The lengths of this step, one per matrix, all groups together."""
        return self.step_rule.lengths(duals, sizes) if self.step_rule.needs_sizes else self.step_rule.lengths(duals)

    def _gradients_are_usable(self) -> bool:
        """Refuse what cannot be stepped on, before anything is changed."""
        checked = []
        for index, group in enumerate(self.param_groups):
            _check_group(group, index, self.step_rule)
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
        bad = _first_nonfinite([gradient for _, _, gradient in checked])
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

    def _buckets(self, index: int, group: dict[str, Any], copies: list[tuple[Tensor, Tensor]]) -> "list[_Bucket]":
        """Blocks of equal shape, dtype, device and norm, in the order of the parameters.

        A parameter whose memory does not let its matrices be seen is copied; `copies` gets it and its copy.
        """
        buckets: dict[Any, _Bucket] = {}
        stateful = group["momentum"] > 0
        for stored, layout, norms in self._plan(index, group):
            gradient = stored.grad
            if gradient is None or stored.numel() == 0:
                continue
            momentum = self._momentum_buffer(stored) if stateful else gradient
            coupled = norms[0][0].spans_batch
            if layout.is_plain and stored.ndim == 2 and not coupled:
                triples = [(stored, gradient, momentum)]
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
            for blocks, (norm, factor) in zip(triples, norms, strict=True):
                block = blocks[0]
                shape = block.shape if coupled else block.shape[-2:]
                key = (shape, block.ndim, block.dtype, block.device, norm, factor)
                if key not in buckets:
                    buckets[key] = _Bucket(norm, factor, [], [], [])
                buckets[key].append(*blocks)
        return list(buckets.values())

    def _plan(self, index: int, group: dict[str, Any]) -> "list[tuple[Tensor, Layout, list[tuple[Direction, float]]]]":
        """Per parameter its layout and the norm and factor of each of its blocks; made anew when a setting changes."""
        settings = [group[key] for key in self._shape_settings], [id(parameter) for parameter in group["params"]]
        known = self._plans.get(index)
        if known is None or known[0] != settings:
            layout = Layout(group["layout"], group["split"], group["transposed"])
            plan = [
                (parameter, layout.resolve(parameter.shape), list(self._block_norms(parameter, group)))
                for parameter in group["params"]
            ]
            known = self._plans[index] = (settings, plan)
        return known[1]

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
            group["norm"] = _text(group["norm"])
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" not in state:  # from load_state_dict, after its hooks, before anything is changed
            for index, (group, own) in enumerate(zip(state["param_groups"], self.param_groups, strict=True)):
                if str(group.get("norm")) != _text(own["norm"]):
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


@dataclass
class _Bucket:
    """Blocks that one batched computation updates: all (m, n), or all (batch, m, n)."""

    norm: Direction
    factor: float
    parameters: list[Tensor]
    gradients: list[Tensor]
    momenta: list[Tensor]

    def append(self, parameter: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        self.parameters.append(parameter)
        self.gradients.append(gradient)
        self.momenta.append(momentum)

    def slice(self, start: int, end: int) -> "_Bucket":
        return _Bucket(
            self.norm, self.factor, self.parameters[start:end], self.gradients[start:end], self.momenta[start:end]
        )


def _chunks(bucket: _Bucket, foreach: bool | None) -> Iterator[_Bucket]:
    """Pieces of a bucket: single blocks without `foreach`, else as many as the norm's workspace holds."""
    limit = _MATRIX_CHUNK if bucket.norm.costly else _CHEAP_CHUNK
    if foreach is False:
        limit = 0
    start = size = 0
    for end, block in enumerate(bucket.parameters):
        if size and size + block.numel() > limit:
            yield bucket.slice(start, end)
            start, size = end, 0
        size += block.numel()
    yield bucket.slice(start, len(bucket.parameters))


def _momentum(chunk: _Bucket, group: dict[str, Any]) -> Tensor:
    """Move the momenta of a chunk; return the read-only matrices whose direction is taken, stacked."""
    weight, gradients, momenta = group["momentum"], chunk.gradients, chunk.momenta
    if weight == 0:
        return _stack(gradients, chunk.norm.spans_batch)
    if gradients[0].dtype != momenta[0].dtype:
        gradients = [gradient.to(momenta[0].dtype) for gradient in gradients]
    if group["momentum_form"] == "lion":
        ahead = torch._foreach_lerp(gradients, momenta, group["interpolation"])
        torch._foreach_lerp_(momenta, gradients, 1 - weight)
        return _stack(ahead, chunk.norm.spans_batch)
    if group["momentum_form"] == "ema":
        torch._foreach_lerp_(momenta, gradients, 1 - weight)
        ahead = torch._foreach_lerp(gradients, momenta, weight) if group["nesterov"] else momenta
    else:
        torch._foreach_mul_(momenta, weight)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=weight) if group["nesterov"] else momenta
    return _stack(ahead, chunk.norm.spans_batch)


def _stack(blocks: Sequence[Tensor], spans_batch: bool) -> Tensor:
    if len(blocks) == 1:
        return blocks[0]
    return torch.stack(list(blocks)) if blocks[0].ndim == 2 or spans_batch else torch.cat(list(blocks))


def _measured(chunk: _Bucket, momentum: Tensor, group: dict[str, Any], rule: StepRule) -> tuple[Tensor, Tensor, Tensor]:
    r"""What a step rule is told: the direction v of a chunk, $\langle m, v \rangle$ and $\|v\|$, one per matrix."""
    direction, dual = chunk.norm.direction_and_dual(momentum)
    pairing = dual * chunk.factor if rule.scaled else dual
    if not group["constrained"]:
        return direction, pairing, torch.ones_like(dual)
    weights = _stack(chunk.parameters, chunk.norm.spans_batch)
    if group["maximize"]:
        weights = weights.neg()
    moved = dual > 0
    wide = torch.promote_types(weights.dtype, torch.float32)
    inside = (weights.to(wide) * momentum.to(wide)).sum(tuple(range(dual.ndim, weights.ndim)))
    direction = direction.add_(weights, alpha=1 / chunk.factor)
    direction *= moved.reshape(*dual.shape, *(1 for _ in range(weights.ndim - dual.ndim)))
    pairing = torch.where(moved, dual * chunk.factor + inside, 0.0)
    return direction, pairing, _norm(chunk.norm).norm(direction) if rule.needs_sizes else pairing


def _joined(values: list[Tensor]) -> Tensor:
    """One vector of the numbers that belong to all matrices, in single precision or better."""
    device = values[0].device
    wide = [value.double() if value.dtype == torch.float64 else value.float() for value in values]
    return torch.cat([value.flatten().to(device) for value in wide])


def _apply(chunk: _Bucket, direction: Tensor, group: dict[str, Any], lengths: Tensor | None = None) -> None:
    """Decay and move the parameters of a chunk, against its direction."""
    lr, parameters = group["lr"], chunk.parameters
    lr = lr.to(direction.device).reshape(()) if isinstance(lr, Tensor) else float(lr)
    decay = 1 - lr * group["weight_decay"]
    if group["constrained"]:  # with lengths, the direction leads to the ball's point already
        decay = 1 - lr if lengths is None else 1.0
    if isinstance(decay, Tensor) or decay != 1:
        torch._foreach_mul_(parameters, decay)
    scale = lr * (chunk.factor if group["maximize"] else -chunk.factor)
    if lengths is not None:
        scale = scale * lengths  # first: a length alone may pass the range of half precision
    if isinstance(scale, Tensor):
        direction, scale = direction.mul_(scale), 1.0
    if len(parameters) == 1:
        parameters[0].add_(direction, alpha=scale)
    elif direction.ndim > parameters[0].ndim:
        torch._foreach_add_(parameters, direction.unbind(), alpha=scale)
    else:
        torch._foreach_add_(parameters, direction.split([len(block) for block in parameters]), alpha=scale)


def _text(norm: str | Direction) -> str:
    """The norm as text that is the same in every process: without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(norm))


def _norm(norm: Direction) -> Norm:
    assert isinstance(norm, Norm)  # the constrained form takes no other direction
    return norm


def _base(norm: Direction) -> Direction:
    while isinstance(norm, Scaled):
        norm = norm.base
    return norm


def _shape_factor(name: AdjustLr, shape: tuple[int, ...]) -> float:
    rows, columns = shape[0], math.prod(shape[1:])
    if name == "none" or len(shape) < 2 or 0 in shape:
        return 1.0
    if name == "original":
        return math.sqrt(max(1.0, rows / columns))
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns)


def _first_nonfinite(gradients: list[Tensor]) -> int | None:
    """Position of the first tensor with NaN or infinity. A norm shows it in one fast pass, unless it overflowed."""
    filled = [(index, gradient) for index, gradient in enumerate(gradients) if gradient.numel()]
    if not filled:
        return None
    norms = torch._foreach_norm([gradient for _, gradient in filled])
    if len({(norm.device, norm.dtype) for norm in norms}) > 1:
        norms = [norm.to(norms[0].device, torch.float64) for norm in norms]
    finite = torch.stack(list(norms)).isfinite()
    if bool(finite.all()):
        return None
    for suspect in (~finite).nonzero().flatten().tolist():
        index, gradient = filled[suspect]
        if not bool(gradient.isfinite().all()):
            return index
    return None


def _check_parameter(parameter: Tensor) -> None:
    if parameter.is_complex() or not parameter.is_floating_point():
        raise TypeError(f"parameters must be real floating-point tensors, got {parameter.dtype}")
    if parameter.layout != torch.strided:
        raise TypeError(f"parameters must be dense, got layout {parameter.layout}")


def _check_group(group: dict[str, Any], index: int, rule: StepRule) -> None:
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
