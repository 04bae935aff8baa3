"""How long a step of the parameters is, in units of the convergence radius of the cross-entropy."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from steepest.curvature._blocks import blocks, distance, joined, part
from steepest.curvature._forward_watch import ForwardWatch, Seen
from steepest.curvature.logit_slopes import (
    LARGE,
    LogitFunction,
    Logits,
    check_finite,
    check_nonempty,
    euclidean,
    map_tensors,
    tensors_in,
    wanted_change,
)
from steepest.curvature.softmax_radius import Reduce, reduce_spreads, spread
from steepest.curvature.step_radius import StepRadius, checked_temperature, single_number

MeterMethod = Literal["auto", "jvp", "fd"]
_TRUST_FOR = 64  # measurements until logits of training are compared with those of eval mode again
_NOISE = 0.002  # relative rounding error of a difference from which "auto" takes the exact derivative


class RadiusMeter:
    """Measures the steps of an optimizer again and again, as cheaply as it can.

    With method "fd" a measurement is one forward pass where the logits at the old parameters are known from training
    itself (the model ran on the measured samples in train mode, and eval mode gives the same logits, which is checked
    now and then), else two.

    Args:
        model: see `logit_slopes`; under DistributedDataParallel, give the wrapped model: then the largest spread over
            all ranks counts.
        parameters: what the optimizer moves.
        samples: where to measure: a batch (inputs, or a tuple or list whose first element is the inputs), a function
            without arguments that returns one, or None: what the model has last been trained on.
        method: "jvp" is exact to rounding and takes about three forward passes; "fd" is exact to about 1e-3 in
            float32, and less so for logits beyond 1e3; "auto" is "jvp" for float64 and where differences lose their
            digits, and "fd" for all else.
        temperature: T, where the loss is on z / T.
        reduce: "max" over samples, or a quantile in (0, 1).
        logits: see `logit_slopes`.
        max_samples: how many samples, counted as positions times sequences, to take of what the model was trained on
            (the first ones); None: all. Given samples are all used.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor],
        *,
        samples: Any = None,
        method: MeterMethod = "auto",
        temperature: float = 1.0,
        reduce: Reduce = "max",
        logits: Logits | None = None,
        max_samples: int | None = 256,
    ) -> None:
        if method not in get_args(MeterMethod):
            raise ValueError(f"method must be one of {', '.join(get_args(MeterMethod))}; got {method!r}")
        if max_samples is not None and (isinstance(max_samples, bool) or not isinstance(max_samples, int)):
            raise TypeError(f"max_samples must be an integer of at least 1, or None; got {max_samples!r}")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        self.function = LogitFunction(model, logits)
        self.temperature, self.reduce, self.method = checked_temperature(temperature), single_number(reduce), method
        self.samples = samples
        if samples is not None and not callable(samples):
            check_nonempty(_inputs(samples))
        self.group: Any = getattr(model, "process_group", None) if _is_ddp(model) else None
        self.cut = max_samples
        self.watch = ForwardWatch(self.function.model, model, max_samples if samples is None else None)
        self.radius = math.inf  # of the last measurement
        self.base_known: bool | None = None  # whether training gives the logits of eval mode; None: not yet compared
        self.since_check = 0
        self.searched = False
        self.size, self._rounding = 0.0, 0.0  # the largest logit of the last difference, and its relative error
        self._scratch: list[Tensor] = []
        self.set_parameters(parameters)

    def set_parameters(self, parameters: Iterable[Tensor]) -> None:
        """What the optimizer moves, anew."""
        names = {id(p): name for name, p in self.function.model.named_parameters(remove_duplicate=False)}
        self.parameters = list(parameters)
        self.names = [names.get(id(parameter)) for parameter in self.parameters]
        if not any(self.names):
            raise ValueError("model holds none of the optimizer's parameters, so their steps cannot be measured on it")
        for parameter in self.parameters:
            if parameter.is_complex() or not parameter.is_floating_point():
                raise TypeError(f"parameters must be real floating-point tensors, got {parameter.dtype}")
            if hasattr(parameter, "device_mesh"):
                raise TypeError("sharded parameters (DTensor) cannot be measured; use DistributedDataParallel")

    def check_ready(self) -> None:
        """Raise RuntimeError unless there are samples to measure on."""
        if self.samples is None and not self.watch.seen:
            raise RuntimeError(
                "samples: the model has not run in train mode with gradients since the last step, so there is nothing "
                "to measure on; run the very model given here (the compiled one, if you compile it), or pass samples"
            )

    def length(self, before: Sequence[Tensor]) -> float:
        """Norm of the step from `before` to the parameters now."""
        pairs = zip(self.parameters, before, strict=True)
        return joined([distance(n, o) for now, old in pairs for n, o in blocks(now.detach(), old)])

    def sample(self) -> list[Tensor]:
        """A 32nd of every large parameter, and the small ones whole: enough to estimate a length."""
        return [part(parameter.detach())[0].clone() for parameter in self.parameters]

    def sampled_length(self, sample: Sequence[Tensor]) -> float:
        """Norm of the step since `sample`, estimated from it; nearly exact unless few entries make up the step."""
        parts = [part(parameter.detach()) for parameter in self.parameters]
        return joined([scale * distance(n, o) for (n, scale), o in zip(parts, sample, strict=True)])

    def sampled_gradient(self) -> float:
        """Norm of the gradient, estimated in the same way."""
        gradients = [p.grad for p in self.parameters if p.grad is not None and p.grad.layout == torch.strided]
        parts = [part(gradient) for gradient in gradients]
        return joined([scale * torch.linalg.vector_norm(piece.float() if piece.itemsize < 4 else piece)
                        for piece, scale in parts])  # fmt: skip

    def _point(self, kept: Sequence[Tensor], before: Sequence[Tensor], alpha: float) -> tuple[list[Tensor], float]:
        """Parameters moved by alpha p, and the norm of p, in kept memory, block by block: p stays in the cache."""
        if any(a is not b for a, b in zip(kept, before, strict=True)):
            step = self._step_from(kept)
            point = [torch.add(old, p.to(old.dtype), alpha=alpha) for old, p in zip(before, step, strict=True)]
            return point, euclidean(step)
        self._make_scratch(kept)
        norms = []
        for now, old, place in zip(self.parameters, kept, self._scratch, strict=True):
            for n, o, p in blocks(now.detach(), old, place):
                torch.sub(n, o, out=p)
                norms.append(torch.linalg.vector_norm(p))
                torch.add(o, p, alpha=alpha, out=p)
        return self._scratch, joined(norms)

    def _make_scratch(self, before: Sequence[Tensor]) -> None:
        # memory that is kept: fresh pages would cost more than the arithmetic
        if [(t.shape, t.dtype, t.device) for t in self._scratch] != [(t.shape, t.dtype, t.device) for t in before]:
            self._scratch = [torch.empty_like(tensor) for tensor in before]

    def _step_from(self, before: Sequence[Tensor]) -> list[Tensor]:
        """The step."""
        self._make_scratch(before)
        for now, old, place in zip(self.parameters, before, self._scratch, strict=True):
            torch.sub(now.detach(), old, out=place)
        return list(self._scratch)

    @torch.no_grad()
    def measure(self, before: Sequence[Tensor]) -> StepRadius:
        """The step from `before` (copies of the parameters, in their order) to where they are now.

        Raises:
            FloatingPointError: the step, the logits or the slopes are not finite.
            RuntimeError: no samples are known.
        """
        wide = all(parameter.dtype == torch.float64 for parameter in self.parameters)
        exact = self.method == "jvp" or (self.method == "auto" and wide)
        sample = [part(old)[0] for old in before]
        rough = self.sampled_length(sample)
        length = rough if rough and not exact and math.isfinite(rough) else self.length(before)
        if not math.isfinite(length):
            raise FloatingPointError("the step holds NaN or infinity")
        if length == 0:
            return StepRadius(0.0, 0.0)
        batches, bad = self._batches(), None
        try:
            with self.watch.paused():
                spreads, length = (self._by_jvp if exact else self._by_difference)(before, length, batches)
                if self.method == "auto" and not exact and self._rounding > _NOISE:
                    spreads, length = self._by_jvp([_wide(old) for old in before], length, batches)
            most = reduce_spreads(spreads, self.reduce)  # pyright: ignore[reportArgumentType]
        except FloatingPointError as error:
            if self.group is None:
                raise
            bad, most = error, torch.tensor(math.inf, device=self.parameters[0].device)
        if self.group is not None:  # all ranks take the same step, or none does
            most = most.double()
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
            if not bool(most.isfinite()):
                raise bad or FloatingPointError("logits of another rank hold NaN or infinity")
        ratio = length * float(most) / (math.pi * self.temperature)
        found = StepRadius(ratio, length)
        self.radius = found.radius
        return found

    def _batches(self) -> list[Seen]:
        if self.samples is None:
            self.check_ready()
            return self._newest()
        inputs = _inputs(self.samples() if callable(self.samples) else self.samples)
        check_nonempty(inputs)
        given = list(tensors_in(inputs))
        for seen in self.watch.seen:  # if training ran on these very samples, it has computed their logits
            trained = list(tensors_in(seen.without_targets() if seen.gives_loss else seen.inputs))
            if len(given) == len(trained) == 1 and given[0] is trained[0]:
                return [Seen(inputs, seen.versions, seen.logits, seen.logits_version)]
        return [Seen(inputs)]

    def _newest(self) -> list[Seen]:
        """The last forward passes, as many as `max_samples` allows, the last of them in part."""
        found, left = [], math.inf if self.cut is None else self.cut
        for seen in reversed(self.watch.seen):
            first = next((x for x in tensors_in(seen.inputs) if x.ndim), None)
            if self.cut is None or first is None:
                found.append(seen)
                left -= 1
            else:
                taken = self._cut(seen, first.shape[0], int(left))
                found.append(taken)
                left -= min(first.shape[0] * (taken.positions or 1), left)
            if left <= 0:
                break
        return found

    def _cut(self, seen: Seen, rows: int, most: int) -> Seen:
        """The first rows of a batch, with `most` samples in them, but at least one row."""

        def first_rows(count: int) -> Any:
            return map_tensors(lambda x: x[:count] if x.ndim and x.shape[0] == rows else x, seen.inputs)

        if seen.positions is None:
            with self.watch.paused():
                one = self._evaluate({}, replace(seen, inputs=first_rows(1)))
            seen.positions = one[0, ..., 0].numel()
        keep = max(1, most // max(1, seen.positions))
        if keep >= rows:
            return seen
        logits = None if seen.logits is None else seen.logits[:keep]
        return replace(seen, inputs=first_rows(keep), logits=logits)

    def _evaluate(self, values: dict[str, Tensor], batch: Seen) -> Tensor:
        return self.function(values, self._inputs_of(batch))

    def _inputs_of(self, batch: Seen) -> Any:
        """What gives logits: of a model that computed its loss in training, the first argument alone."""
        return batch.without_targets() if batch.gives_loss and self.function.custom is None else batch.inputs

    def _by_jvp(self, before: Sequence[Tensor], length: float, batches: list[Seen]) -> tuple[Tensor, float]:
        step = self._step_from(before)
        torch._foreach_div_(step, length)
        parameters, tangents = self._named(before), self._named(step)
        slopes = [self.function.slopes(parameters, tangents, self._inputs_of(batch)) for batch in batches]
        return torch.cat([spread(each).flatten() for each in slopes]), length

    def _by_difference(self, before: Sequence[Tensor], length: float, batches: list[Seen]) -> tuple[Tensor, float]:
        kept, before = before, [_wide(tensor) for tensor in before]
        epsilon = max(torch.finfo(tensor.dtype).eps for tensor in before)
        bases = self._bases(before, batches, epsilon)
        known = all(base is not None for base in bases)
        wanted = wanted_change(epsilon, self.size, central=not known)
        limit = max(1.0, euclidean(before)) if not math.isfinite(self.radius) else 0.0
        alpha = wanted * self.radius / (math.pi * self.temperature * length) if not limit else 1e-4 * limit / length
        own, spreads, width = limit, torch.zeros(0), 1.0
        for _ in range(8):
            point, length = self._point(kept, before, alpha)
            if not math.isfinite(length):
                raise FloatingPointError("the step holds NaN or infinity")
            ahead = [self._evaluate(self._named(point), batch) for batch in batches]
            if known:
                behind, width = bases, alpha
            else:
                torch._foreach_neg_(point)
                torch._foreach_add_(point, before, alpha=2)
                behind, width = [self._evaluate(self._named(point), batch) for batch in batches], 2 * alpha
            spreads = torch.cat([spread(z - (y if y is not None else z)).flatten()
                                 for z, y in zip(ahead, behind, strict=True)])  # fmt: skip
            gap = float(check_finite("logits", spreads).max()) * alpha / width
            before_size, self.size = self.size, max(float(z.abs().max()) for z in ahead)
            self._rounding = epsilon * self.size / max(gap, 1e-30)
            if self.size > 2 * max(before_size, LARGE):
                wanted = wanted_change(epsilon, self.size, central=not known)
            if wanted / 10 <= gap <= 10 * wanted:
                break
            own = own or max(1.0, euclidean(before))
            most = 0.1 * own / length
            if gap < wanted and alpha >= most:
                break
            alpha = min(most, alpha * min(1e3, max(1e-3, wanted / max(gap, 1e-30))))
        return spreads / (width * length), length

    def _bases(self, before: Sequence[Tensor], batches: list[Seen], epsilon: float) -> list[Tensor | None]:
        """The logits at the old parameters, as far as training has computed them and they are those of eval mode."""
        versions = self.watch.versions_before
        bases = [batch.base(versions, before[0].dtype) for batch in batches]
        if any(base is None for base in bases):
            if not self.searched and any(seen.gives_loss for seen in self.watch.seen):
                self.searched = True  # from the next step on, the hook sits where the logits come from
                self.watch.find_logits(lambda: self._evaluate(self._named(before), batches[0]))
            return [None] * len(batches)
        if self.base_known is None or self.since_check >= _TRUST_FOR:
            self.since_check = 0
            pairs = [
                (base, self.watch.find_logits(lambda b=batch: self._evaluate(self._named(before), b)))
                for base, batch in zip(bases, batches, strict=True)
            ]
            self.base_known = all(
                base is not None
                and base.shape == logits.shape
                and float((base - logits).abs().max()) <= 64 * epsilon * max(1.0, float(logits.abs().max()))
                for base, logits in pairs
            )
        self.since_check += 1
        return bases if self.base_known else [None] * len(batches)

    def state_dict(self) -> dict[str, Any]:
        """What the next measurement builds on; plain data."""
        return {
            "rho": self.radius,
            "base_known": self.base_known,
            "since_check": self.since_check,
            "searched": self.searched,
            "size": self.size,
            "logits_module": self.watch.logits_module,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; what it lacks begins anew."""
        self.radius = float(state.get("rho", math.inf))
        self.base_known, self.since_check = state.get("base_known"), int(state.get("since_check", 0))
        self.searched, self.size = bool(state.get("searched", False)), float(state.get("size", 0.0))
        self.watch.look_at(str(state.get("logits_module", "")))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": []}

    def _named(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in zip(self.names, tensors, strict=True) if name is not None}


def _inputs(batch: Any) -> Any:
    """The inputs of a batch as a DataLoader gives it."""
    if isinstance(batch, list | tuple):
        if not batch:
            raise ValueError("samples must hold at least one sample, got an empty sequence")
        return batch[0]
    return batch


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.itemsize < 4 else value


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)
