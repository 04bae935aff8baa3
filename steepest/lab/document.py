"""The race document, built from the storage alone: what ran, who won, by how much, and why."""

import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from steepest.lab.compare import margin, reach, spread
from steepest.lab.plan import (
    FINAL,
    TUNE,
    PlanSettings,
    TrialKey,
    best_lr,
    finalists,
    next_trials,
)
from steepest.lab.start import plan_settings
from steepest.lab.storage import DUPLICATE, RaceStore, Record
from steepest.lab.why import explain, verdict

FORMAT = 1
EMPTY = {
    "curve": ("step", "seconds", "train_loss", "grad_norm", "lr"),
    "val": ("step", "seconds", "loss"),
}


def build_document(store: RaceStore) -> dict[str, Any]:
    """The document of a race, finished or under way (its format stands in the reference of the report).

    Raises:
        RaceError: the race is not in the storage, or the storage does not answer.
    """
    from steepest.lab.settings import RaceError

    attributes = store.attributes() if store.exists() else None
    if attributes is None:
        raise RaceError(f"the storage holds no race {store.name!r}")
    records = store.records()
    finished = _first_of_each(records)
    plan = plan_settings(attributes)
    known = {key: record.value for key, record in finished.items()}
    methods = [_method(entrant, plan, finished, known, attributes) for entrant in attributes["entrants"]]
    reference = attributes["reference"]
    _rank(methods, plan, known)
    _targets(methods, reference, attributes, finished)
    winner = next((m for m in methods if m["rank"] == 1 and m["best_lr"] is not None), None)
    against = _against(methods, winner, reference)
    document: dict[str, Any] = {
        "format": FORMAT,
        "name": attributes["name"],
        "task": _task(attributes, finished),
        "settings": _settings(attributes),
        "status": "partial" if next_trials(plan, known) else "complete",
        **_times(attributes, records),
        "environment": attributes["environment"],
        "command": attributes["command"],
        "methods": methods,
        "reference": reference,
        "winner": winner["name"] if winner else None,
        "winner_margin": _margin(winner, against, attributes, finished),
        "trials": [_trial(record) for record in sorted(finished.values(), key=_trial_order)],
    }
    for method in methods:
        method["verdict"] = verdict(document, method)
    document["why"] = explain(document)
    return _finite(document)


def final_trials(name: str, lr: float | None, finished: Mapping[TrialKey, Record]) -> dict[int, Record]:
    """Seed -> trial at the best learning rate; the tuning trial is the one of seed 0."""
    if lr is None:
        return {}
    return {
        key.seed: record
        for key, record in finished.items()
        if key.method == name and key.lr == lr and key.stage in (TUNE, FINAL)
    }


def _first_of_each(records: Sequence[Record]) -> dict[TrialKey, Record]:
    found: dict[TrialKey, Record] = {}
    for record in records:
        if record.state == "finished" and record.reason != DUPLICATE:
            found.setdefault(record.key, record)
    return found


def _method(
    entrant: Mapping[str, Any],
    plan: PlanSettings,
    finished: Mapping[TrialKey, Record],
    known: Mapping[TrialKey, float],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    name = entrant["name"]
    own = {key: record for key, record in finished.items() if key.method == name}
    results = [record.result or {} for record in own.values()]
    lr = best_lr(name, known)
    tried = sorted(key.lr for key in own if key.stage == TUNE)
    runs = final_trials(name, lr, finished)
    values = [runs[seed].value for seed in sorted(runs)]
    tuned_all = all(_tuned(e.name, plan, known) for e in plan.entrants)
    return {
        "name": name,
        "title": entrant["title"],
        "description": entrant["description"],
        "rank": 0,
        "finalist": tuned_all and name in finalists(plan, known),
        "best_lr": lr,
        "lr_range": [tried[0], tried[-1]] if tried else [entrant["low"], entrant["high"]],
        "best_at_edge": lr is not None and len(tried) > 1 and lr in (tried[0], tried[-1]),
        "snippet": entrant["snippet"].replace("{lr}", repr(lr)) if lr is not None else "",
        "final": spread(values).to_json(),
        "tune_value": values[0] if values else None,
        "steps_to_target": None,
        "seconds_to_target": None,
        "seconds_per_step": _median(results, "seconds_per_step"),
        "optimizer_seconds_per_step": _median(results, "optimizer_seconds_per_step"),
        "peak_memory_bytes": _median(results, "peak_memory_bytes", whole=True),
        "optimizer_state_bytes": _median(results, "optimizer_state_bytes", whole=True) or 0,
        "diverged_trials": sum(result.get("state") == "diverged" for result in results),
        "pruned_trials": sum(result.get("state") == "pruned" for result in results),
        "failed_trials": sum(result.get("state") == "failed" for result in results),
        "verdict": "",
    }


def _tuned(name: str, plan: PlanSettings, known: Mapping[TrialKey, float]) -> bool:
    return not any(key.method == name and key.stage == TUNE for key in next_trials(plan, known))


def _rank(methods: list[dict[str, Any]], plan: PlanSettings, known: Mapping[TrialKey, float]) -> None:
    """Finalists by their mean over seeds; the others, and a reference below the finalists, by their tuning value.

    A value of one seed is never set above a mean over several: a method that did not reach the final ranks below
    those that did by merit.
    """
    top = finalists(plan, known)
    merit = top if plan.finalists == "all" else top[: int(plan.finalists)]

    def order(method: dict[str, Any]) -> tuple[float, float, str]:
        mean = method["final"]["mean"]
        if method["best_lr"] is None:
            return (2, math.inf, method["name"])
        if method["name"] in merit and method["finalist"]:
            return (0, math.inf if mean is None else mean, method["name"])
        value = method["tune_value"]
        return (1 if any(m["finalist"] for m in methods) else 0, math.inf if value is None else value, method["name"])

    for rank, method in enumerate(sorted(methods, key=order), start=1):
        method["rank"] = rank
    methods.sort(key=lambda method: method["rank"])


def _targets(
    methods: list[dict[str, Any]],
    reference: str | None,
    attributes: Mapping[str, Any],
    finished: Mapping[TrialKey, Record],
) -> None:
    """Steps and seconds that each method needs to the reference's final loss."""
    base = next((m for m in methods if m["name"] == reference), None)
    if base is None:
        return
    for method in methods:
        reached = _steps_to(method, base, finished, attributes["steps"])
        if reached is None:
            continue
        method["steps_to_target"] = reached
        cost = method["seconds_per_step"]
        if cost is not None:
            values = [None if value is None else value * cost for value in reached["values"]]
            method["seconds_to_target"] = {"mean": reached["mean"] * cost, "values": values}


def _steps_to(
    method: Mapping[str, Any], other: Mapping[str, Any], finished: Mapping[TrialKey, Record], steps: int
) -> dict[str, Any] | None:
    """Steps until a method's validation loss comes down to the final loss of another; None where it does not.

    The mean is that of the curve averaged over seeds, to the other's mean over the same seeds; the values are seed by
    seed, each to the other's loss at that seed.
    """
    mine, theirs = (final_trials(m["name"], m["best_lr"], finished) for m in (method, other))
    seeds = [seed for seed in sorted(mine) if seed in theirs]
    curves = [(mine[seed].result or {}).get("val") or {} for seed in seeds]
    targets = [theirs[seed].value for seed in seeds]
    if not seeds or not all(math.isfinite(value) for value in targets):
        return None
    if method["name"] == other["name"]:
        return {"mean": float(steps), "values": [float(steps)] * len(seeds)}
    points = curves[0].get("step", [])
    if any(curve.get("step") != points for curve in curves):
        return None
    losses = [[curve["loss"][i] for curve in curves] for i in range(len(points))]
    average = [None if None in at else statistics.fmean(at) for at in losses]
    mean = reach(points, average, statistics.fmean(targets))
    if not math.isfinite(mean):
        return None
    values = [reach(points, curve["loss"], target) for curve, target in zip(curves, targets, strict=True)]
    return {"mean": mean, "values": [value if math.isfinite(value) else None for value in values]}


def _against(
    methods: list[dict[str, Any]], winner: Mapping[str, Any] | None, reference: str | None
) -> dict[str, Any] | None:
    """Whom the winner is measured against: the reference, or the runner-up where the reference itself wins."""
    if winner is None:
        return None
    others = [m for m in methods if m["name"] != winner["name"] and m["best_lr"] is not None]
    chosen = next((m for m in others if m["name"] == reference), None)
    return chosen or next(iter(others), None)


def _margin(
    winner: Mapping[str, Any] | None,
    against: Mapping[str, Any] | None,
    attributes: Mapping[str, Any],
    finished: Mapping[TrialKey, Record],
) -> dict[str, Any] | None:
    if winner is None or against is None:
        return None
    mine, theirs = _by_seed(winner, finished), _by_seed(against, finished)
    difference = margin(mine, theirs)
    reached = _steps_to(winner, against, finished, attributes["steps"])
    ratio = reached["mean"] / attributes["steps"] if reached is not None else None
    costs = winner["seconds_per_step"], against["seconds_per_step"]
    seconds = ratio * costs[0] / costs[1] if ratio is not None and all(costs) else None
    return {
        "against": against["name"],
        "loss": difference.mean,
        "steps_ratio": ratio,
        "seconds_ratio": seconds,
        "significant": difference.significant,
        "p_value": difference.p_value,
        "seeds": difference.seeds,
    }


def _by_seed(method: Mapping[str, Any], finished: Mapping[TrialKey, Record]) -> dict[int, float]:
    runs = final_trials(method["name"], method["best_lr"], finished)
    return {seed: record.value for seed, record in runs.items()}


def _task(attributes: Mapping[str, Any], finished: Mapping[TrialKey, Record]) -> dict[str, Any]:
    results = [record.result or {} for record in finished.values()]
    first = next((r for r in results if r.get("parameters") is not None), {})
    task = attributes["task"]
    return {
        "name": task["name"],
        "spec": task["spec"],
        "description": task["description"],
        "parameters": first.get("parameters"),
        "train_examples_or_tokens_per_step": task.get("per_step") or first.get("examples_per_step"),
    }


def _settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "steps": attributes["steps"],
        "budget_seconds": attributes["budget_seconds"],
        "seeds": list(range(attributes["seeds"])),
        "lr_trials": attributes["lr_trials"],
        "finalists": attributes["finalists"],
        "device": attributes["device"],
        "dtype": attributes["dtype"],
        "batch": attributes["batch"],
        "balance": attributes.get("balance"),
        "clip": attributes["clip"],
        "prune": attributes["prune"],
        "schedule": "linear warm-up over 5% of the steps, then linear to zero",
    }


def _times(attributes: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """When it began and ended, and the seconds in which at least one counted trial was running."""
    spans = sorted((r.started, r.ended) for r in records if r.state == "finished" and r.started and r.ended)
    seconds, until = 0.0, -math.inf
    for begin, end in spans:
        if end is not None and begin is not None and end > until:
            seconds += end - max(begin, until)
            until = end
    last = datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds") if spans else attributes["started_at"]
    return {"started_at": attributes["started_at"], "finished_at": last, "seconds": seconds}


def _trial(record: Record) -> dict[str, Any]:
    result, key = record.result or {}, record.key
    return {
        "key": str(key),
        **key.to_json(),
        "state": result.get("state", "failed"),
        "reason": result.get("reason"),
        "steps": result.get("steps", 0),
        "seconds": result.get("seconds", 0.0),
        "value": result.get("value"),
        "curve": result.get("curve") or {name: [] for name in EMPTY["curve"]},
        "val": result.get("val") or {name: [] for name in EMPTY["val"]},
        "roles": result.get("roles") or {},
        "stability": result.get("stability") or {},
        "stability_verdict": result.get("stability_verdict"),
    }


def _trial_order(record: Record) -> tuple[str, str, float, int]:
    key = record.key
    return (key.method, "0" if key.stage == TUNE else "1", key.lr, key.seed)


def _median(results: Sequence[Mapping[str, Any]], name: str, whole: bool = False) -> Any:
    values = [result[name] for result in results if result.get(name) is not None]
    if not values:
        return None
    middle = statistics.median(values)
    return round(middle) if whole else middle


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
