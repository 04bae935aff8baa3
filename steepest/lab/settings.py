"""What the user asks of a race, checked before anything is made."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steepest._errors import UserError

DEFAULT_METHODS = ("adamw", "sgd", "sign", "muon", "scion", "clipped_scion", "symmetry_stack")
REFERENCE = "adamw"
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16")


class RaceError(UserError):
    """A race cannot start or go on; the message says what to do."""


class RaceInterruptedError(RaceError):
    """The race was stopped by Ctrl-C or a signal; everything is saved (a command line exits with 130)."""


@dataclass(frozen=True)
class RaceSettings:
    """One race: what runs, how long, and where it is kept.

    The first group decides the results; a race that exists already goes on only with the same values.
    The second group only says where and how the work is done, and may change between two runs of the command.

    Args:
        task: A built-in task (`text`, `text-moe`, `digits`) or `path/to/file.py:ClassName`.
        methods: Names from `steepest.lab.methods`, or `path/to/file.py:function` with
            `function(model, lr) -> Optimizer`.
        steps: Training steps of every trial; None: from `minutes`, or the task's default.
        minutes: Time for the whole race on this machine, turned into steps once by a calibration.
        lr_ranges: Method name -> (lowest, highest) learning rate, a hard bound; others use their default range,
            which tuning may leave when the best learning rate lies at its edge.
        lr_trials: Learning rates tried for each method (the same number for all).
        seeds: Number of seeds of each finalist; the tuning run of its best learning rate is the first.
        finalists: How many of the best methods run on all seeds ("all" for every one); the reference always does.
        batch: Batch size of a built-in task; None: the task's default.
        data: A text file to use instead of the embedded corpus (text tasks).
        balance: What keeps the experts of `text-moe` evenly used: a name of `steepest.nn.BALANCERS`, or NAME=STRENGTH;
            None: the model's default.
        clip: Clip the gradient's global norm at this value; None: no clipping.
        prune: Stop a tuning trial that falls clearly behind its own method's best one.
        device: "auto" takes CUDA if there is one, else the CPU.
        dtype: "float32", or "bfloat16" for autocast.
        name: Name of the race and of its folder; default: the task's name.
        runs: Folder of all run folders.
        storage: SQLAlchemy URL of the shared storage; default: SQLite in the run folder.
        workers: Processes on this machine.
        threads: CPU threads of each worker; default: the machine's cores divided by `workers`, when there are several.
        checkpoint_every: Seconds between checkpoints of the running trial.
        grace: Seconds without a sign of life after which a worker on another machine counts as dead.
        command: The command line, for the report.
    """

    task: str = "text"
    methods: tuple[str, ...] = DEFAULT_METHODS
    steps: int | None = None
    minutes: float | None = None
    lr_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lr_trials: int = 4
    seeds: int = 2
    finalists: int | str = 4
    batch: int | None = None
    data: str | Path | None = None
    balance: str | None = None
    clip: float | None = None
    prune: bool = True
    device: str = "auto"
    dtype: str = "float32"

    name: str | None = None
    runs: str | Path = "runs"
    storage: str | None = None
    workers: int = 1
    threads: int | None = None
    checkpoint_every: float = 10.0
    grace: float = 60.0
    command: str | None = None

    def __post_init__(self):
        _check(self)

    @property
    def run_name(self) -> str:
        """The race's name: `name`, or one derived from the task."""
        if self.name is not None:
            return self.name
        path, colon, cls = self.task.rpartition(":")
        name = f"{Path(path).stem}-{cls}" if colon else self.task
        return name if self.balance is None else f"{name}-{self.balance.replace('=', '-')}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.run_name

    @property
    def storage_url(self) -> str:
        """URL of the Optuna storage."""
        return self.storage or f"sqlite:///{(self.folder / 'race.db').resolve()}"

    def identity(self, device: str) -> dict[str, Any]:
        """The settings that decide the results, as plain JSON; `device` is the kind in use ("cpu", "cuda").

        Files count by their content, so that two machines may keep them in different places.
        """
        return {
            "task": _named_file(self.task),
            "methods": [_named_file(method) for method in self.methods],
            "steps": self.steps,
            "minutes": self.minutes,
            "lr_ranges": {name: [float(lo), float(hi)] for name, (lo, hi) in sorted(self.lr_ranges.items())},
            "lr_trials": self.lr_trials,
            "seeds": self.seeds,
            "finalists": self.finalists,
            "batch": self.batch,
            "data": f"{Path(self.data).name} ({_digest(Path(self.data))})" if self.data else None,
            "balance": self.balance,
            "clip": self.clip,
            "prune": self.prune,
            "device": device,
            "dtype": self.dtype,
        }


def _named_file(spec: str) -> str:
    path, colon, name = spec.rpartition(":")
    if not colon or not Path(path).is_file():
        return spec
    return f"{Path(path).name}:{name} ({_digest(Path(path))})"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _require(ok: bool, what: str, got: Any, right: str) -> None:
    if not ok:
        raise RaceError(f"{what} is {got!r}; it must be {right}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check(s: RaceSettings) -> None:
    _require(isinstance(s.task, str) and bool(s.task.strip()), "task", s.task, "a task name or path/to/file.py:Class")
    _require(
        isinstance(s.methods, tuple) and len(s.methods) > 0 and all(isinstance(m, str) for m in s.methods),
        "methods",
        s.methods,
        "a tuple of at least one method name",
    )
    twice = sorted({m for m in s.methods if s.methods.count(m) > 1})
    _require(not twice, "methods", s.methods, f"a tuple of different names ({', '.join(twice)} is there twice)")
    _require(s.steps is None or (_whole(s.steps) and s.steps >= 1), "steps", s.steps, "a whole number of at least 1")
    _require(s.minutes is None or _positive(s.minutes), "minutes", s.minutes, "a positive number")
    if s.steps is not None and s.minutes is not None:
        raise RaceError(f"steps={s.steps} and minutes={s.minutes:g} were both given; a race has one budget: give one")
    _require(_whole(s.lr_trials) and s.lr_trials >= 1, "lr_trials", s.lr_trials, "a whole number of at least 1")
    _require(_whole(s.seeds) and s.seeds >= 1, "seeds", s.seeds, "a whole number of at least 1")
    _require(
        s.finalists == "all" or (_whole(s.finalists) and int(s.finalists) >= 1),
        "finalists",
        s.finalists,
        'a whole number of at least 1, or "all"',
    )
    _require(s.batch is None or (_whole(s.batch) and s.batch >= 1), "batch", s.batch, "a whole number of at least 1")
    _require(s.clip is None or _positive(s.clip), "clip", s.clip, "a positive number, or None for no clipping")
    _require(s.device.partition(":")[0] in DEVICES, "device", s.device, f"one of {', '.join(DEVICES)}")
    _require(s.dtype in DTYPES, "dtype", s.dtype, f"one of {', '.join(DTYPES)}")
    _require(_whole(s.workers) and 1 <= s.workers <= 256, "workers", s.workers, "a whole number from 1 to 256")
    _require(s.threads is None or (_whole(s.threads) and s.threads >= 1), "threads", s.threads, "at least 1")
    _require(_positive(s.checkpoint_every), "checkpoint_every", s.checkpoint_every, "a positive number of seconds")
    _require(_positive(s.grace), "grace", s.grace, "a positive number of seconds")
    for method, bounds in s.lr_ranges.items():
        if method not in s.methods:
            raise RaceError(f"a learning-rate range is given for {method!r}, which is not among the methods raced")
        ok = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(_positive(b) for b in bounds)
        _require(ok and bounds[0] <= bounds[1], f"learning-rate range of {method}", bounds, "0 < lowest <= highest")
    name = s.run_name
    bad = not name.strip() or name in {".", ".."} or len(name.encode()) > 200
    if bad or any(c in "/\\\0\n\r" for c in name):
        raise RaceError(
            f"name is {name!r}; it must be a folder name: not empty, no slash, backslash or line break, "
            "at most 200 bytes"
        )
    if s.data is not None and not Path(s.data).is_file():
        raise RaceError(f"data is {str(s.data)!r}, which is not a file")
