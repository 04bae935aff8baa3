"""A worker: takes trials from the race's storage, runs them, and gives the results back, until none is left."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from steepest.lab.machine import me
from steepest.lab.methods import Method, get_methods
from steepest.lab.plan import TUNE, PlanSettings, TrialKey, next_trials, prune_reason
from steepest.lab.settings import RaceError, RaceInterruptedError, RaceSettings
from steepest.lab.storage import Claim, Heartbeat, RaceStore, Record
from steepest.lab.tasks import load_task
from steepest.lab.trial import TrainingTrial
from steepest.lab.watch import measurements

POLL_SECONDS = 0.5


class Watcher(Protocol):
    """Who is told what a worker does."""

    def started(self, key: TrialKey, steps: int, done: int) -> None: ...
    def stepped(self, step: int, loss: float) -> None: ...
    def ended(self, key: TrialKey, result: dict[str, Any]) -> None: ...
    def waiting(self, running: int) -> None: ...


@dataclass
class Bench:
    """What a worker needs to run trials."""

    settings: RaceSettings
    store: RaceStore
    task: Any
    methods: dict[str, Method]
    plan: PlanSettings
    steps: int
    race_id: str
    device: torch.device

    def checkpoint(self, key: TrialKey) -> Path:
        """Where the running trial is saved; the race's id keeps an older race's files apart."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{key.method}-{key.lr:g}-{key.seed}-{key.stage}").strip("-")
        return self.settings.folder / "trials" / f"{slug[-100:]}-{self.race_id[:8]}.ckpt"


def work(bench: Bench, watcher: Watcher | None = None, parent: int | None = None) -> None:
    """Run trials until the race is done.

    Raises:
        KeyboardInterrupt: Ctrl-C; the running trial is saved and given back.
        RaceError: the storage does not answer any more.
    """
    store = bench.store
    while True:
        if parent is not None and os.getppid() != parent:
            raise KeyboardInterrupt
        store.reclaim(bench.settings.grace)
        keys = next_trials(bench.plan, values(store.finished()))
        if not keys:
            return
        store.enqueue(keys)
        claim = store.claim()
        if claim is None:
            if watcher is not None:
                watcher.waiting(sum(record.state == "running" for record in store.records()))
            time.sleep(POLL_SECONDS)
            continue
        _run(bench, claim, watcher, parent)


def values(finished: dict[TrialKey, Record]) -> dict[TrialKey, float]:
    """What the plan needs to know of the finished trials."""
    return {key: record.value for key, record in finished.items()}


def _run(bench: Bench, claim: Claim, watcher: Watcher | None, parent: int | None) -> None:
    store, key = bench.store, claim.key
    path = bench.checkpoint(key)
    state: dict[str, Any] = {"step": 0}

    def progress() -> dict[str, Any]:
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGINT)
        return dict(state)

    try:
        with Heartbeat(store, claim, progress):
            result = _train(bench, key, path, watcher, state)
        store.finish(claim, {**result, "place": me()["place"]})
    except KeyboardInterrupt:
        with contextlib.suppress(RaceError):
            store.release(claim)
        raise
    path.unlink(missing_ok=True)
    if watcher is not None:
        watcher.ended(key, result)


def _train(bench: Bench, key: TrialKey, path: Path, watcher: Watcher | None, state: dict[str, Any]) -> dict[str, Any]:
    from steepest.loop import run

    def build() -> TrainingTrial:
        return TrainingTrial(
            bench.task,
            bench.methods[key.method],
            key,
            steps=bench.steps,
            device=bench.device,
            dtype=bench.settings.dtype,
            clip=bench.settings.clip,
            prune=_pruner(bench, key),
            watched=measurements(key, bench.plan, bench.steps),
        )

    last = 0.0

    def follow(step: int, metrics: Any) -> None:
        nonlocal last
        state["step"] = step
        now = time.monotonic()
        if watcher is not None and now - last > 0.2:
            last = now
            watcher.stepped(step, metrics.get("loss", float("nan")))

    trial: TrainingTrial | None = None
    try:
        for attempt in range(2):
            trial = build()
            if watcher is not None:
                watcher.started(key, bench.steps, 0)
            try:
                run(
                    trial,
                    steps=bench.steps,
                    callbacks=follow,
                    stop=trial.stop,
                    record_every=bench.steps,
                    checkpoint=path,
                    checkpoint_seconds=bench.settings.checkpoint_every,
                    progress=False,
                )
                break
            except ValueError:  # a checkpoint of another version: begin again without it
                if attempt or trial.step_count > 0 or not path.exists():
                    raise
                path.unlink()
    except RaceError:
        raise
    except Exception as error:
        return _failed(trial, error)
    assert trial is not None
    return trial.result()


def _failed(trial: TrainingTrial | None, error: Exception) -> dict[str, Any]:
    reason = f"{type(error).__name__}: {error}".strip()
    with contextlib.suppress(Exception):
        if trial is not None:
            return {**trial.result(), "state": "failed", "reason": reason[:2000], "value": None}
    return {"state": "failed", "reason": reason[:2000], "value": None, "steps": 0, "seconds": 0.0}


def _pruner(bench: Bench, key: TrialKey) -> Any:
    if key.stage != TUNE or not bench.settings.prune:
        return None

    def prune(steps: list[int], losses: list[float]) -> str | None:
        if 2 * steps[-1] < bench.steps:
            return None
        own = [r for k, r in bench.store.finished().items() if k.method == key.method and k.stage == TUNE]
        complete = [r for r in own if (r.result or {}).get("state") == "complete"]
        if not complete:
            return None
        val = (min(complete, key=lambda record: record.value).result or {})["val"]
        best = {int(s): v for s, v in zip(val["step"], val["loss"], strict=True) if v is not None}
        return prune_reason(bench.steps, steps, losses, best)

    return prune


def open_bench(settings: RaceSettings, store: RaceStore, attributes: dict[str, Any], task: Any = None) -> Bench:
    """A worker's bench, from the settings and from what the race's storage holds."""
    from steepest.lab.start import find_device, plan_settings

    if task is None:
        task = load_task(settings.task, batch=settings.batch, data=settings.data, balance=settings.balance)
    return Bench(
        settings=settings,
        store=store,
        task=task,
        methods={method.name: method for method in get_methods(settings.methods, settings.lr_ranges, task)},
        plan=plan_settings(attributes),
        steps=int(attributes["steps"]),
        race_id=str(attributes["id"]),
        device=find_device(settings.device),
    )


def main() -> None:
    """Entry of a worker process; its settings come as JSON on the standard input."""
    given = json.loads(sys.stdin.read())
    settings = settings_from_json(given["settings"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if given["threads"] is not None:
        torch.set_num_threads(int(given["threads"]))
    try:
        store = RaceStore(settings.storage_url, settings.run_name, given["command"])
        attributes = store.attributes()
        if attributes is None:
            raise RaceError(f"the race {settings.run_name!r} is not in its storage")
        with contextlib.closing(store):
            work(open_bench(settings, store, attributes), parent=int(given["parent"]))
    except (KeyboardInterrupt, RaceInterruptedError):
        sys.exit(130)
    except RaceError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def settings_to_json(settings: RaceSettings) -> dict[str, Any]:
    """The settings as JSON data."""
    plain = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    for name in ("runs", "data"):
        plain[name] = None if plain[name] is None else str(plain[name])
    return {
        **plain,
        "methods": list(settings.methods),
        "lr_ranges": {k: list(v) for k, v in settings.lr_ranges.items()},
    }


def settings_from_json(data: dict[str, Any]) -> RaceSettings:
    """The inverse of `settings_to_json`."""
    ranges = {name: (float(low), float(high)) for name, (low, high) in data["lr_ranges"].items()}
    return RaceSettings(**{**data, "methods": tuple(data["methods"]), "lr_ranges": ranges})
