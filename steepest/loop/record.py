"""What a run reports: the metrics of a step, the record handed to stop rules, the history, the result."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Stepper(Protocol):
    """What `run` drives: a method that advances by one step at a time.

    `step` returns the metrics of the step, name to number (a float or a tensor of one element). The state dict holds
    everything that the next step depends on, as tensors, numbers, text and containers of them.
    """

    def step(self) -> Mapping[str, Any]: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Metrics(Mapping[str, float]):
    """The metrics of one step, as floats; tensors are read from their device when a value is first asked for.

    Read a value during the step it belongs to: the stepper may reuse the tensor in its next step.
    """

    __slots__ = ("_pending", "_values")

    def __init__(self, raw: Mapping[str, Any]):
        self._pending: dict[str, Any] | None = None
        self._values: dict[str, Any] = {}
        self.update(raw)

    def update(self, raw: Mapping[str, Any]) -> None:
        """Add or replace metrics."""
        pending = self._pending or {}
        for name, value in raw.items():
            pending[name] = value.detach() if isinstance(value, Tensor) else value
            self._values[name] = None
        self._pending = pending or None

    def floats(self) -> dict[str, float]:
        """All metrics as Python floats, in one transfer per device.

        Raises:
            TypeError: a name is not text, or a value is not a number.
            ValueError: a tensor has more than one element.
        """
        if self._pending is not None:
            self._values.update(_convert(self._pending))
            self._pending = None
        return self._values

    def __getitem__(self, name: str) -> float:
        if name not in self._values:
            raise KeyError(name)
        return self.floats()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Metrics({self.floats()})"


def _convert(raw: Mapping[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    remote: dict[torch.device, list[str]] = {}
    for name, value in raw.items():
        if not isinstance(name, str):
            raise TypeError(f"a metric's name must be a str, got {name!r}")
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex():
                raise ValueError(
                    f"metric {name!r} must be a real number or a tensor of one element, "
                    f"got a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
                )
            if value.device.type != "cpu":
                remote.setdefault(value.device, []).append(name)
                continue
            value = value.item()  # noqa: PLW2901
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"metric {name!r} must be a real number or a tensor of one element, got {type(value).__name__}"
            ) from None
    for device, names in remote.items():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([raw[name].reshape(()).to(dtype) for name in names])
        values.update(zip(names, stacked.tolist(), strict=True))
    return values


@dataclass(frozen=True, slots=True)
class Record:
    """One step, as a stop rule sees it.

    Attributes:
        step: number of complete steps, counted over all resumes; the first record has 1.
        seconds: running time up to here, in seconds, counted over all resumes.
        metrics: the step's metrics; reading one from a GPU waits for the GPU.
        recorded: whether this step enters the history (every `record_every`-th does).
        history: metric -> its values so far, this step's included if it is recorded.
    """

    step: int
    seconds: float
    metrics: Mapping[str, float]
    recorded: bool
    history: Mapping[str, list[float]]


@dataclass(frozen=True)
class Result:
    """What a run did.

    Attributes:
        history: metric -> one float per recorded step; nan where the metric was not finite or not reported.
        recorded_steps: the steps that the history's entries belong to.
        recorded_seconds: the running time at these steps.
        steps: complete steps in total, those before a resume included.
        seconds: running time in total, that before a resume included.
        stopped_by: why the run ended. The first word is fixed: "steps", "seconds", "tolerance" or "diverged" for the
            rules of this package, "interrupted" for a signal; otherwise it is the text that a rule or callback gave.
        resumed_from: the step at which a checkpoint was taken up; 0 for a fresh start.
        checkpoint: the checkpoint file, if there is one.
    """

    history: dict[str, list[float]]
    recorded_steps: list[int]
    recorded_seconds: list[float]
    steps: int
    seconds: float
    stopped_by: str
    resumed_from: int = 0
    checkpoint: Path | None = None

    @property
    def last(self) -> dict[str, float]:
        """The last recorded value of each metric."""
        return {name: values[-1] for name, values in self.history.items()}


@dataclass
class History:
    """The recorded steps; `last` is the latest record, which at the end of a run may lie off the recording grid."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    last: dict[str, Any] | None = None

    def append(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self.mark(step, seconds, values)
        _extend(self.metrics, len(self.steps), values)
        self.steps.append(step)
        self.seconds.append(seconds)

    def mark(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self.last = {"step": step, "seconds": seconds, "metrics": dict(values)}

    def latest(self) -> dict[str, float]:
        """The metrics of the latest record, as they were: not finite if they were not."""
        return {} if self.last is None else self.last["metrics"]

    def complete(self) -> tuple[dict[str, list[float]], list[int], list[float]]:
        """Metrics, steps and seconds, with the last record even if it is off the grid."""
        metrics = {name: list(values) for name, values in self.metrics.items()}
        if self.last is None or (self.steps and self.steps[-1] >= self.last["step"]):
            return metrics, list(self.steps), list(self.seconds)
        _extend(metrics, len(self.steps), self.last["metrics"])
        return metrics, [*self.steps, self.last["step"]], [*self.seconds, self.last["seconds"]]

    def state_dict(self) -> dict[str, Any]:
        return {
            "metrics": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.metrics.items()},
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "last": self.last,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "History":
        """The history that `state_dict` wrote; any other content raises."""
        metrics = {str(name): _column(values) for name, values in state["metrics"].items()}
        history = cls(metrics, _column(state["steps"]), _column(state["seconds"]), state["last"])
        if {len(values) for values in (*metrics.values(), history.seconds)} != {len(history.steps)}:
            raise ValueError("history columns of different lengths")
        if history.last is not None:
            last = history.last
            history.mark(int(last["step"]), float(last["seconds"]), dict(last["metrics"]))
        return history


def _column(values: Tensor) -> list[Any]:
    if values.ndim != 1:
        raise ValueError(f"a history column of shape {tuple(values.shape)}")
    return values.tolist()


def _extend(metrics: dict[str, list[float]], length: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if name not in metrics:
            metrics[name] = [math.nan] * length
        metrics[name].append(value if math.isfinite(value) else math.nan)
    for column in metrics.values():
        if len(column) == length:
            column.append(math.nan)
