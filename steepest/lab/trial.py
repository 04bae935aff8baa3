"""One trial: a model trained by one method at one learning rate on one seed, as a stepper that can be resumed."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from steepest.dynamics.role_norms import RoleNorms, grad_norm
from steepest.lab.batches import Feed, count_examples, to_device
from steepest.lab.machine import peak_memory, reset_peak_memory
from steepest.lab.methods import Method
from steepest.lab.plan import TrialKey
from steepest.lab.settings import RaceError
from steepest.lab.streams import RandomStream
from steepest.lab.watch import Watch

RUNGS = 8
CURVE_POINTS = 100
ROLE_POINTS = 40
WARMUP = 0.05

Prune = Callable[[list[int], list[float]], str | None]


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor of a step (counted from 0): linear warm-up over the first 5 %, then linear to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


class TrainingTrial:
    """Trains one model; `steepest.loop.run` drives it.

    All methods see the same initial weights and the same batches at the same seed. The learning rate follows
    `schedule`. Validation happens before the first step and at 8 equal intervals. It stops itself (`stop`) when the
    loss is not finite or explodes, or when `prune` says why.

    Args:
        task: The task; see `steepest.lab.tasks`.
        method: Builds the optimizer.
        key: Learning rate and seed.
        steps: Length of the trial.
        device: Where it trains.
        dtype: "float32", or "bfloat16" for autocast.
        clip: Largest global gradient norm; None: gradients stay as they are.
        prune: Called after each validation with the steps and losses so far; gives a reason to stop, or None.
        watched: How many steps are measured for their stability.
    """

    def __init__(
        self,
        task: Any,
        method: Method,
        key: TrialKey,
        *,
        steps: int,
        device: torch.device,
        dtype: str = "float32",
        clip: float | None = None,
        prune: Prune | None = None,
        watched: int = 0,
    ):
        self.task, self.key, self.steps, self.device, self.clip, self.prune = task, key, steps, device, clip, prune
        self.autocast = dtype == "bfloat16"
        self.stream = RandomStream(key.seed, device)
        reset_peak_memory(device)
        with self.stream:
            self.model = task.model(key.seed).to(device)
            self.optimizer = method.build(self.model, key.lr)
        if clip is not None and getattr(self.optimizer, "closure_only", False):
            raise RaceError(f"clip does not apply to {method.name}: its gradient is taken within the step")
        self.feed = Feed(task, key.seed)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.dynamics = RoleNorms(self.model)
        self.watch: Watch | None = None
        if watched:
            self.watch = Watch(task, self.model, self.optimizer, steps=steps, count=watched, device=device)
        self.rungs = _points(steps, RUNGS)
        self.marks = _points(steps, CURVE_POINTS)
        self.observed = _points(steps, ROLE_POINTS)
        self.step_count = 0
        self.examples: int | None = None
        self.stopped: tuple[str, str] | None = None
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], "train_loss": [], "grad_norm": [], "lr": []}
        self.val: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.window = [torch.zeros((), device=device), 0]
        self.first_loss: float | None = None

    def step(self) -> Mapping[str, Any]:
        """One training step, and what is due after it."""
        if self.step_count == 0 and not self.val["step"]:
            self._validate()
        number = self.step_count + 1
        marked, observed, timed = number in self.marks, number in self.observed, self._timed(number)
        begin = time.perf_counter()
        batch = to_device(self.feed.next(), self.device)
        if self.examples is None:
            self.examples = count_examples(batch)
        factor = schedule(self.step_count, self.steps)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        inside = getattr(self.optimizer, "closure_only", False)  # the gradient is taken within the step
        loss = torch.zeros((), device=self.device)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(0 if inside else getattr(self.optimizer, "samples", 1)):
            with self.stream, self._sampled():
                loss = self._loss(batch)
                loss.backward()
        if self.clip is not None and not inside:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if self.device.type == "cpu" and not math.isfinite(loss.item()):
            return self._diverge(f"the training loss was {loss.item()} at step {number}", loss)
        if timed or marked:
            self._wait()
        looked = time.perf_counter()
        norm = grad_norm(self.parameters) if marked and not inside else None
        copies = self.dynamics.before() if observed else None
        if self.watch is not None:
            self.watch.before(number)
        if timed:
            self._wait()
        before = time.perf_counter()
        begin += before - looked  # looking is not part of the step
        try:
            if inside:
                with self.stream:
                    loss = cast(Any, self.optimizer).step(lambda: self._loss(batch))
            else:
                self.optimizer.step()
        except Exception as error:
            if inside and isinstance(error, FloatingPointError):
                return self._diverge(f"the step was not finite at step {number}: {error}", loss)
            if math.isfinite(float(grad_norm(self.parameters))):
                raise
            return self._diverge(f"a gradient was not finite at step {number}", loss)
        if timed:
            self._wait()
        end = time.perf_counter()
        if timed and not observed:
            self.optimizer_seconds.append(end - before)
            self.step_seconds.append(end - begin)
        self.seconds += end - begin
        self.step_count = number
        if copies is not None:
            self.dynamics.after(number, copies)
        if self.watch is not None:
            self.watch.after(number)
        self.window[0] = self.window[0] + loss.detach()
        self.window[1] += 1
        if marked:
            self._mark(number, factor, grad_norm(self.parameters) if inside else norm)
        if number in self.rungs and self.stopped is None:
            self._validate()
        return {"loss": loss.detach()}

    def stop(self, record: Any = None) -> str | None:
        """A stop rule for `run`: why the trial ended itself, if it did."""
        return None if self.stopped is None else f"{self.stopped[0]}: {self.stopped[1]}"

    def result(self) -> dict[str, Any]:
        """All that is kept of the trial, as JSON data."""
        state, reason = self.stopped or ("complete", None)
        value = self.val["loss"][-1] if self.val["loss"] else None
        return {
            "state": state,
            "reason": reason,
            "value": value,
            "steps": self.step_count,
            "seconds": self.seconds,
            "curve": _rounded(self.curve),
            "val": _rounded(self.val),
            "roles": {role: _rounded(curve) for role, curve in self.dynamics.curves.items()},
            "stability": {} if self.watch is None else _rounded(self.watch.columns()),
            "stability_verdict": None if self.watch is None else self.watch.verdict(),
            "seconds_per_step": statistics.median(self.step_seconds) if self.step_seconds else None,
            "optimizer_seconds_per_step": statistics.median(self.optimizer_seconds) if self.optimizer_seconds else None,
            "optimizer_state_bytes": _bytes(self.optimizer.state_dict()["state"]),
            "peak_memory_bytes": peak_memory(self.device),
            "examples_per_step": self.examples,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "feed": self.feed.state_dict(),
            "dynamics": self.dynamics.state_dict(),
            "watch": None if self.watch is None else self.watch.state_dict(),
            "step": self.step_count,
            "examples": self.examples,
            "stopped": self.stopped,
            "curve": {name: list(values) for name, values in self.curve.items()},
            "val": {name: list(values) for name, values in self.val.items()},
            "seconds": self.seconds,
            "step_seconds": list(self.step_seconds),
            "optimizer_seconds": list(self.optimizer_seconds),
            "window": [self.window[0].cpu(), self.window[1]],
            "first_loss": self.first_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the data is fed forward to the same place."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        self.feed.load_state_dict(state["feed"])
        self.dynamics.load_state_dict(state["dynamics"])
        if self.watch is not None and state.get("watch") is not None:
            self.watch.load_state_dict(state["watch"])
        self.step_count, self.examples = int(state["step"]), state["examples"]
        self.stopped = None if state["stopped"] is None else tuple(state["stopped"])
        self.curve, self.val = dict(state["curve"]), dict(state["val"])
        self.seconds, self.first_loss = float(state["seconds"]), state["first_loss"]
        self.step_seconds, self.optimizer_seconds = list(state["step_seconds"]), list(state["optimizer_seconds"])
        self.window = [state["window"][0].to(self.device), state["window"][1]]

    def _mark(self, number: int, factor: float, norm: Tensor | None) -> None:
        total, count = self.window
        mean = float(total) / count
        self.window = [torch.zeros_like(total), 0]
        self.curve["step"].append(number)
        self.curve["seconds"].append(self.seconds)
        self.curve["train_loss"].append(mean)
        self.curve["grad_norm"].append(math.nan if norm is None else float(norm))
        self.curve["lr"].append(self.base_lrs[0] * factor if self.base_lrs else 0.0)
        first = self.first_loss if self.first_loss is not None else mean if math.isfinite(mean) else 0.0
        self.first_loss = first
        if not math.isfinite(mean) or mean > first + 10 * max(abs(first), 1.0):
            self._diverge(f"the training loss was {mean:.4g} at step {number}, from {first:.4g} at the start")

    def _diverge(self, reason: str, loss: Tensor | None = None) -> Mapping[str, Any]:
        self.stopped = ("diverged", reason)
        return {} if loss is None else {"loss": loss.detach()}

    def _validate(self) -> None:
        self._wait()
        with RandomStream(0, self.device), self._precision():
            loss, metrics = evaluate(self.task, self.model, self.device)
        self.val["step"].append(self.step_count)
        self.val["seconds"].append(self.seconds)
        self.val["loss"].append(loss)
        for name, value in metrics.items():
            self.val.setdefault(name, []).append(value)
        if not math.isfinite(loss):
            self.stopped = ("diverged", f"the validation loss was {loss} at step {self.step_count}")
        elif self.prune is not None and (reason := self.prune(self.val["step"], self.val["loss"])):  # type: ignore[arg-type]
            self.stopped = ("pruned", reason)

    def _loss(self, batch: Any) -> Tensor:
        with self._precision():
            return self.task.loss(self.model, batch)

    def _sampled(self) -> Any:
        """Where an optimizer that learns at noisy weights, such as `steepest.optim.IVON`, wants its gradients."""
        enter = getattr(self.optimizer, "sampled_params", None)
        return nullcontext() if enter is None else enter(train=True)

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def _timed(self, number: int) -> bool:
        """On a GPU waiting for the clock costs time, so only some steps are timed one by one."""
        return self.device.type == "cpu" or number % 10 == 0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def evaluate(task: Any, model: torch.nn.Module, device: torch.device) -> tuple[float, dict[str, float]]:
    """Mean validation loss, and the mean of each of the task's metrics, over its validation batches.

    A batch counts by its number of examples. Gradients are off, unless the task's loss itself needs them.
    """
    was_training = model.training
    model.eval()
    total, weight = 0.0, 0
    sums: dict[str, float] = {}
    metrics = getattr(task, "metrics", None)
    try:
        for raw in task.batches("val", 0):
            batch = to_device(raw, device)
            count = count_examples(batch) or 1
            with torch.no_grad():
                try:
                    loss = task.loss(model, batch)
                except RuntimeError as error:
                    if "does not require grad" not in str(error):
                        raise
                    with torch.enable_grad():
                        loss = task.loss(model, batch).detach()
                found = metrics(model, batch) if metrics is not None else {}
            total += float(loss) * count
            weight += count
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value) * count
    finally:
        model.train(was_training)
    if weight == 0:
        return math.nan, {}
    return total / weight, {name: value / weight for name, value in sums.items()}


def _points(steps: int, count: int) -> set[int]:
    """`count` equally spaced steps, the last included."""
    return {max(1, round(steps * (i + 1) / count)) for i in range(count)}


def _rounded(curve: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {
        name: [
            value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.6g}") for value in values
        ]
        for name, values in curve.items()
    }


def _bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(_bytes(value) for value in state.values())
    return sum(_bytes(value) for value in state) if isinstance(state, list | tuple) else 0
