"""The series behind the charts of a report: averaged over seeds, thinned out, and rounded."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from steepest.lab.report.standing import Standing, Trial, state_code
from steepest.lab.report.text import number, plot_text

CURVE_POINTS = 400  # a curve on a 1200 pixel wide chart shows no more
ROLE_POINTS = 60_000  # all role curves together
STABILITY = ("relative_sharpness", "sharpness", "trace", "radius_ratio", "overshoot", "drift")
QUANTITIES = ("update_to_weight", "grad_norm", "weight_norm", "update_norm")
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def chart_data(items: Sequence[Standing], reference: Standing | None) -> dict[str, Any]:
    """Everything the page draws, as plain lists; `m` in a series is the method's index in `methods`.

    All text in the result is already neutral for plotly (see `plot_text`).
    """
    chosen = [item.curves for item in items]
    metrics = _metrics(trial for group in chosen for trial in group)
    return {
        "methods": [
            {"name": plot_text(x.title), "finalist": x.finalist, "reference": x is reference, "n": len(group)}
            for x, group in zip(items, chosen, strict=True)
        ],
        "metrics": [{"key": f"v{i}", "label": plot_text(name.replace("_", " "))} for i, name in enumerate(metrics)],
        "target": None if reference is None or reference.mean is None else _round(reference.mean),
        "targetLabel": "" if reference is None else f"{plot_text(reference.title)}’s final loss",
        "validation": [
            {"m": m, "metric": i, **band}
            for m, group in enumerate(chosen)
            for i, name in enumerate(metrics)
            if (band := seed_band(group, name))
        ],
        "training": [x for m, group in enumerate(chosen) if (x := training_curve(m, group))],
        "sensitivity": [x for m, item in enumerate(items) if (x := sensitivity(m, item.trials))],
        **role_data(chosen),
        **stability_data(chosen),
    }


def seed_band(trials: Sequence[Trial], metric: str) -> dict[str, Any] | None:
    """Mean, minimum and maximum of a validation metric over seeds, on the steps that all of them reached."""
    curves = [curve for trial in trials if (curve := _curve(trial.get("val"), metric)) is not None]
    if not curves:
        return None
    step = np.unique(np.concatenate([c[0] for c in curves]))
    step = step[(step >= max(c[0][0] for c in curves)) & (step <= min(c[0][-1] for c in curves))]
    if not len(step):
        return None
    step = step[_spaced(len(step), CURVE_POINTS)]
    y = np.stack([np.interp(step, c[0], c[2]) for c in curves])
    seconds = np.stack([np.interp(step, c[0], c[1]) for c in curves]).mean(0)
    band = {"step": _list(step), "seconds": _list(seconds), "mean": _list(y.mean(0)), "n": len(curves)}
    return band | ({"low": _list(y.min(0)), "high": _list(y.max(0))} if len(curves) > 1 else {})


def training_curve(m: int, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Training loss of the first of the best trials, averaged over windows where it has too many points."""
    for trial in trials:
        if (curve := _curve(trial.get("curve"), "train_loss")) is not None:
            step, seconds, y = (windows(x, CURVE_POINTS) for x in curve)
            window = math.ceil(len(curve[0]) / CURVE_POINTS)
            return {"m": m, "step": _list(step), "seconds": _list(seconds), "y": _list(y), "window": window}
    return None


def sensitivity(m: int, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """All trials of a method as (lr, loss, state, steps), and the line of the mean loss over complete ones per lr."""
    points, complete = [], defaultdict(list)
    for trial in trials:
        lr, value, state = number(trial.get("lr")), number(trial.get("value")), str(trial.get("state"))
        if lr is None or lr <= 0:
            continue
        if state == "complete" and value is not None:
            complete[lr].append(value)
        if value is not None or state in {"diverged", "failed"}:
            shown = None if state in {"diverged", "failed"} else _round(value)
            code = state_code(trial)
            points.append(
                [_round(lr), shown, code, int(number(trial.get("steps")) or 0), plot_text(trial.get("seed"), 12)]
            )
    if not points:
        return None
    line = sorted((lr, sum(v) / len(v)) for lr, v in complete.items())
    return {"m": m, "points": points, "line": [[_round(lr), _round(v)] for lr, v in line]}


def role_data(chosen: Sequence[Sequence[Trial]]) -> dict[str, Any]:
    """Curves per role of the first of each method's best trials, thinned out so that extremes stay."""
    groups = [_roles(group) for group in chosen]
    names = list(dict.fromkeys(name for roles in groups for name in roles))
    present = [q for q in QUANTITIES if any(q in curves for roles in groups for curves in roles.values())]
    total = sum(len(roles) for roles in groups) * max(len(present), 1)
    points = int(min(max(ROLE_POINTS / max(total, 1), 24), 240))
    series = []
    for m, roles in enumerate(groups):
        for name, curves in roles.items():
            for quantity in present:
                if (curve := _curve(curves, quantity)) is not None:
                    keep = extremes(curve[2], points)
                    x, y = _list(curve[0][keep]), _list(curve[2][keep])
                    series.append({"m": m, "role": names.index(name), "quantity": quantity, "x": x, "y": y})
    labels = [plot_text(name.replace("_", " ")) for name in names]
    return {"roles": labels, "quantities": present, "dynamics": series}


def stability_data(chosen: Sequence[Sequence[Trial]]) -> dict[str, Any]:
    """Curves of the stability of the first watched one of each method's best trials, and the threshold of each."""
    series = []
    for m, group in enumerate(chosen):
        curves = next((t["stability"] for t in group if isinstance(t.get("stability"), Mapping) and t["stability"]), {})
        for quantity in STABILITY:
            if (curve := _curve(curves, quantity)) is None:
                continue
            # The optimizers that see the curvature itself have their threshold in its units.
            own = quantity == "sharpness" and "preconditioned_sharpness" not in curves
            limit = _curve(curves, "threshold") if own else None
            more = {} if limit is None else {"tx": _list(limit[0]), "ty": _list(limit[2])}
            series.append({"m": m, "quantity": quantity, "x": _list(curve[0]), "y": _list(curve[2]), **more})
    present = [quantity for quantity in STABILITY if any(s["quantity"] == quantity for s in series)]
    return {"stabilityQuantities": present, "stability": series}


def windows(x: np.ndarray, points: int) -> np.ndarray:
    """Means over equal windows, so that at most `points` values are left."""
    width = math.ceil(len(x) / points)
    if width <= 1:
        return x
    starts = np.arange(0, len(x), width)
    return np.add.reduceat(x, starts) / np.diff(np.append(starts, len(x)))


def extremes(y: np.ndarray, points: int) -> np.ndarray:
    """Indices of the first, the last, and each window's smallest and largest value: about `points` of them."""
    if len(y) <= points:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), max(points // 2, 1) + 1).astype(int)
    keep = {0, len(y) - 1}
    for start, end in pairwise(edges):
        keep |= {start + int(np.argmin(y[start:end])), start + int(np.argmax(y[start:end]))}
    return np.array(sorted(keep))


def _roles(trials: Sequence[Trial]) -> dict[str, Mapping[str, Any]]:
    for trial in trials:
        roles = trial.get("roles")
        if isinstance(roles, Mapping) and roles:
            return {str(name): curves for name, curves in roles.items() if isinstance(curves, Mapping)}
    return {}


def _metrics(trials: Iterable[Trial]) -> list[str]:
    names = {"loss": None}
    for trial in trials:
        val = trial.get("val")
        for name in val if isinstance(val, Mapping) else ():
            if name not in {"step", "seconds"}:
                names.setdefault(str(name))
    return list(names)


def _curve(columns: Any, key: str) -> Arrays | None:
    """(step, seconds, value) without the points that miss a step or a value, in order of steps."""
    if not isinstance(columns, Mapping) or not isinstance(columns.get(key), list):
        return None
    step, y = _column(columns.get("step")), _column(columns[key])
    size = min(len(step), len(y))
    seconds = _column(columns.get("seconds"))
    seconds = seconds[:size] if len(seconds) >= size else np.full(size, np.nan)
    step, y = step[:size], y[:size]
    good = np.isfinite(step) & np.isfinite(y)
    if not good.any():
        return None
    step, first = np.unique(step[good], return_index=True)
    return step, seconds[good][first], y[good][first]


def _column(values: Any) -> np.ndarray:
    values = values if isinstance(values, list) else []
    return np.array([math.nan if (x := number(v)) is None else x for v in values], dtype=np.float64)


def _spaced(size: int, points: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, points)).round().astype(int))


def _list(x: np.ndarray) -> list[float | int | None]:
    return [_round(v) for v in x.tolist()]


def _round(value: float | None) -> float | int | None:
    x = number(value)
    if x is None:
        return None
    return int(x) if x.is_integer() and abs(x) < 1e15 else float(f"{x:.5g}")
