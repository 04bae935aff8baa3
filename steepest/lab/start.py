"""The beginning of a race: check everything, decide the number of steps, and make or join the study."""

import statistics
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import torch

from steepest.lab.machine import environment
from steepest.lab.methods import Method, get_methods
from steepest.lab.plan import TUNE, Entrant, PlanSettings, TrialKey, total_trials
from steepest.lab.settings import REFERENCE, RaceError, RaceSettings
from steepest.lab.storage import RaceStore
from steepest.lab.tasks import load_task, task_budget, task_description, task_name
from steepest.lab.trial import RUNGS, TrainingTrial

FEWEST_STEPS = 10
TRIAL_OVERHEAD = 0.3
SAFETY = 0.92


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA if there is one, else the CPU.

    Raises:
        RaceError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RaceError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error
    return device


def join(settings: RaceSettings, store: RaceStore, device: torch.device, say: Any) -> tuple[dict[str, Any], Any]:
    """Join the race of this name, or make it; returns what the storage holds of it, and the task.

    Raises:
        RaceError: the task or a method is wrong, or the race exists with other settings.
    """
    from steepest.lab.check import check_task

    task = load_task(settings.task, batch=settings.batch, data=settings.data, balance=settings.balance)
    methods = get_methods(settings.methods, settings.lr_ranges, task)
    identity = settings.identity(device.type)
    if store.exists():
        attributes = store.attributes()
        if attributes is not None:
            _same(settings.run_name, attributes["identity"], identity)
            return attributes, task
    say(f"Checking the task {settings.task} and the methods")
    check_task(task, settings.task, device)
    costs = check_methods(task, methods, settings, device)
    attributes = _attributes(settings, task, methods, identity, device, costs)
    if store.create(attributes):
        return attributes, task
    found = store.attributes()
    if found is None:
        store.adopt(attributes)
        return attributes, task
    _same(settings.run_name, found["identity"], identity)
    return found, task


def plan_settings(attributes: dict[str, Any]) -> PlanSettings:
    """The plan's settings, from what the storage holds of the race."""
    return PlanSettings(
        entrants=tuple(Entrant(e["name"], e["low"], e["high"], e["bounded"]) for e in attributes["entrants"]),
        lr_trials=attributes["lr_trials"],
        seeds=attributes["seeds"],
        finalists=attributes["finalists"],
        reference=attributes["reference"],
    )


def check_methods(
    task: Any, methods: list[Method], settings: RaceSettings, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Seconds of a step and of a validation with each method, from a few steps; so every method is known to work.

    Raises:
        RaceError: a method cannot be built for the task's model, or fails at its first steps.
    """
    costs = {}
    count = 8 if settings.steps is None else 1
    for method in methods:
        low, high = settings.lr_ranges.get(method.name, method.lr_range)
        key = TrialKey(method.name, (low * high) ** 0.5 / 10, 0, TUNE)
        try:
            trial = TrainingTrial(
                task, method, key, steps=1000, device=device, dtype=settings.dtype, clip=settings.clip
            )
            begin = time.perf_counter()
            trial._validate()
            validation = time.perf_counter() - begin
            seconds = []
            for _ in range(count):
                begin = time.perf_counter()
                trial.step()
                trial._wait()
                seconds.append(time.perf_counter() - begin)
        except RaceError:
            raise
        except Exception as error:
            raise RaceError(
                f"the method {method.name!r} fails on the task {settings.task}: {type(error).__name__}: {error}"
            ) from error
        costs[method.name] = (statistics.median(seconds[1:] or seconds), validation)
    return costs


def _attributes(
    settings: RaceSettings,
    task: Any,
    methods: list[Method],
    identity: dict[str, Any],
    device: torch.device,
    costs: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    entrants = []
    for method in methods:
        low, high = settings.lr_ranges.get(method.name, method.lr_range)
        entrants.append(
            {
                "name": method.name,
                "title": method.title,
                "description": method.description,
                "low": low,
                "high": high,
                "bounded": method.name in settings.lr_ranges,
                "snippet": method.snippet("{lr}"),
            }
        )
    names = [method.name for method in methods]
    attributes: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "identity": identity,
        "name": settings.run_name,
        "task": {
            "name": task_name(task),
            "spec": settings.task,
            "description": task_description(task),
            "per_step": getattr(task, "per_step", None),
        },
        "entrants": entrants,
        "reference": REFERENCE if REFERENCE in names else None,
        "lr_trials": settings.lr_trials,
        "seeds": settings.seeds,
        "finalists": settings.finalists,
        "batch": getattr(task, "batch", settings.batch),
        "balance": settings.balance,
        "clip": settings.clip,
        "prune": settings.prune,
        "dtype": settings.dtype,
        "device": str(device),
        "command": settings.command or f"steepest race --task {settings.task}",
        "environment": environment(device),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    budget = task_budget(task)
    minutes = settings.minutes if settings.minutes or settings.steps else budget.minutes
    steps = settings.steps if settings.steps or minutes else budget.steps
    if steps is None:
        assert minutes is not None
        # A default must give a race worth reading on a slow or busy machine, too, and then takes longer.
        fewest = None if settings.minutes else budget.fewest
        steps = steps_for(plan_settings(attributes), minutes * 60, costs, fewest)
    return {**attributes, "steps": steps, "budget_seconds": None if minutes is None else minutes * 60}


def steps_for(
    plan: PlanSettings, seconds: float, costs: dict[str, tuple[float, float]], fewest: int | None = None
) -> int:
    """The number of steps with which the whole race takes about `seconds`.

    Args:
        plan: The plan.
        seconds: The budget.
        costs: Method -> (seconds of a step, seconds of a validation).
        fewest: Take at least this many, whatever the budget; None: refuse a budget that is too short.

    Raises:
        RaceError: the budget is too short for any useful race.
    """
    trials = total_trials(plan)
    tuning = plan.lr_trials * len(plan.entrants)
    final = trials - tuning
    dearest = max(step for step, _ in costs.values())
    per_step = plan.lr_trials * sum(step for step, _ in costs.values()) + final * dearest
    fixed = trials * (TRIAL_OVERHEAD + (RUNGS + 1) * max(validation for _, validation in costs.values()))
    steps = int((seconds * SAFETY - fixed) / per_step)
    if fewest is not None:
        return max(steps, fewest)
    if steps < FEWEST_STEPS:
        least = (FEWEST_STEPS * per_step + fixed) / SAFETY / 60
        raise RaceError(
            f"minutes={seconds / 60:g} is too short: {trials} trials of {FEWEST_STEPS} steps take about {least:.1f} "
            "minutes here; give more minutes, or fewer methods, learning rates or seeds"
        )
    return steps


def _same(name: str, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in asked if stored.get(key) != asked[key]]
    if differing:
        changes = "; ".join(f"{key} was {_text(stored.get(key))}, now {_text(asked[key])}" for key in differing)
        raise RaceError(
            f"the race {name!r} exists with other settings: {changes}. Give the same settings to go on with it, or "
            "another name (--name other) to begin a new one"
        )


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
