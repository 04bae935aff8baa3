"""The HTML page of a race: the document as view data, rendered by `template.html`."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from steepest.lab.report.charts import chart_data
from steepest.lab.report.standing import Standing, apart, target_ratio
from steepest.lab.report.summary import Summary, lr_note, summarize, validate
from steepest.lab.report.text import (
    MISSING,
    clean,
    clean_code,
    count,
    duration,
    loss,
    memory,
    milliseconds,
    number,
    ratio,
    short,
    spread,
)

TRIAL_ROWS = 2000
COLOURS = 7
DASHES = ("", "7 3", "2 3", "8 3 2 3", "12 4")
_ENVIRONMENT = {"cpu": "CPU", "python": "Python", "torch": "PyTorch", "steepest": "steepest"}


def render(document: Mapping[str, Any]) -> str:
    """The page as text; see `steepest.lab.report.write_report`."""
    import jinja2

    validate(document)
    summary = summarize(document)
    # Autoescape covers every value; the four pieces marked safe in the template are our own files and `embed`'s JSON.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_asset("template.html"))
    return template.render(
        summary=summary,
        name=clean(document.get("name")) or "race",
        task=_task(document),
        ranking=_ranking(summary),
        why=[clean(x, 1000) for x in _list(document.get("why"))],
        stability=_stability(summary),
        trials=[_trial_row(x, summary) for x in document["trials"][:TRIAL_ROWS]],
        trials_total=len(document["trials"]),
        command=clean_code(document.get("command")),
        environment=_environment(document),
        css=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_plotly(),
        data=embed(chart_data(summary.standings, summary.reference)),
    )


def embed(value: Any) -> str:
    """JSON that is safe inside `<script>`: ASCII, without `<`, `>` and `&`, so that nothing in it ends the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    """plotly.js, compressed (a third of its size); the page unpacks it with the browser's own `DecompressionStream`."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _asset(name: str) -> str:
    return files("steepest.lab.report").joinpath(name).read_text(encoding="utf-8")


def _task(document: Mapping[str, Any]) -> dict[str, str]:
    task, settings = _mapping(document.get("task")), _mapping(document.get("settings"))
    facts = []
    if number(task.get("parameters")) is not None:
        facts.append(f"{count(task['parameters'])} parameters")
    if number(settings.get("steps")) is not None:
        facts.append(f"{count(settings['steps'])} steps")
    facts.append(f"{len(document['methods'])} method{'s' * (len(document['methods']) != 1)}")
    if number(settings.get("lr_trials")) is not None:
        facts.append(f"{count(settings['lr_trials'])} learning rates each")
    if _list(settings.get("seeds")):
        seeds = len(_list(settings.get("seeds")))
        facts.append(f"{seeds} seed{'s' * (seeds != 1)} in the final")
    if number(document.get("seconds")) is not None:
        facts.append(f"{duration(document['seconds'])} of racing")
    name, description = clean(task.get("name") or document.get("name")), clean(task.get("description"), 400)
    return {
        "name": name or "unnamed task",
        "description": "" if description == name else description,
        "facts": " · ".join(facts),
    }


def _ranking(summary: Summary) -> list[dict[str, Any]]:
    ends = [v for x in summary.standings for v in (x.values or ([] if x.mean is None else (x.mean,)))]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    return [_ranking_row(i, item, summary, (low, high)) for i, item in enumerate(summary.standings)]


def _ranking_row(index: int, item: Standing, summary: Summary, ends: tuple[float, float]) -> dict[str, Any]:
    entry = item.entry
    rank = number(entry.get("rank"))
    notes = ["reference"] if item is summary.reference else []
    if item.lost:
        notes.append(f"{item.lost} of {item.lost + len(item.values)} seeds lost")
    elif item.mean is None:
        notes.append("no result")
    elif not item.finalist:
        notes.append("not in the final")
    if summary.best is not None and item is not summary.best and item.mean is not None:
        difference = apart(summary.best, item)
        if difference.seeds > 1 and not difference.significant:
            notes.append("not separable from the first")
    steps, seconds = item.target("steps_to_target"), item.target("seconds_to_target")
    factors = [
        None if item is summary.reference else target_ratio(item, summary.reference, key)
        for key in ("steps_to_target", "seconds_to_target")
    ]
    return {
        "index": index,
        "colour": index % COLOURS,
        "dash": DASHES[index // COLOURS % len(DASHES)],
        "rank": MISSING if rank is None else f"{rank:.0f}",
        "title": item.title,
        "description": clean(entry.get("description"), 300),
        "notes": notes,
        "dim": item.mean is None or not item.finalist,
        "first": item is summary.best,
        "loss": loss(item.mean),
        "std": f"± {spread(item.std)}" if item.std is not None else "",
        "seeds": f"{len(item.values)} seed{'s' * (len(item.values) != 1)}" if item.values else "",
        "strip": _strip(item, ends),
        "lr": short(entry.get("best_lr")),
        "lr_note": lr_note(item),
        "edge": bool(entry.get("best_at_edge")),
        "steps": count(steps),
        "steps_ratio": "" if factors[0] is None else ratio(factors[0]),
        "seconds": duration(seconds),
        "seconds_ratio": "" if factors[1] is None else ratio(factors[1]),
        "ms": milliseconds(entry.get("seconds_per_step")),
        "optimizer_ms": milliseconds(entry.get("optimizer_seconds_per_step")),
        "state": memory(entry.get("optimizer_state_bytes")),
        "peak": memory(entry.get("peak_memory_bytes")),
        "diverged": count(entry.get("diverged_trials")),
        "pruned": count(entry.get("pruned_trials")),
        "failed": count(entry.get("failed_trials")) if number(entry.get("failed_trials")) else "",
        "verdict": clean(entry.get("verdict"), 1000),
        "snippet": clean_code(entry.get("snippet")),
        "sort": {
            "rank": index if rank is None else rank,
            "loss": item.mean,
            "lr": number(entry.get("best_lr")),
            "steps": steps,
            "seconds": seconds,
            "ms": number(entry.get("seconds_per_step")),
            "optimizer_ms": number(entry.get("optimizer_seconds_per_step")),
            "state": number(entry.get("optimizer_state_bytes")),
            "peak": number(entry.get("peak_memory_bytes")),
            "lost": sum(number(entry.get(f"{x}_trials")) or 0 for x in ("diverged", "pruned", "failed")),
        },
    }


def _strip(item: Standing, ends: tuple[float, float]) -> dict[str, Any] | None:
    """Positions (0 to 100) of a method's seeds and mean between the best and the worst final loss of the race."""
    if item.mean is None:
        return None
    low, high = ends
    place = [round(100 * (v - low) / (high - low), 2) if high > low else 0.0 for v in (*item.values, item.mean)]
    place = [min(max(x, 0.0), 100.0) for x in place]
    return {"seeds": place[:-1], "mean": place[-1], "low": min(place), "high": max(place)}


def _trial_row(trial: Mapping[str, Any], summary: Summary) -> dict[str, Any]:
    name = str(trial.get("method"))
    index = next((i for i, x in enumerate(summary.standings) if x.name == name), None)
    state = clean(trial.get("state"), 20)
    return {
        "colour": 0 if index is None else index % COLOURS,
        "title": clean(name) if index is None else summary.standings[index].title,
        "order": len(summary.standings) if index is None else index,
        "lr": short(trial.get("lr")),
        "seed": clean(trial.get("seed"), 20) or MISSING,
        "stage": clean(trial.get("stage"), 20) or MISSING,
        "state": state or MISSING,
        "kind": state if state in {"complete", "pruned", "diverged", "failed"} else "other",
        "steps": count(trial.get("steps")),
        "seconds": duration(trial.get("seconds")),
        "value": loss(trial.get("value")),
        "reason": clean(trial.get("reason"), 300),
        "sort": {key: number(trial.get(key)) for key in ("lr", "seed", "steps", "seconds", "value")},
    }


def _stability(summary: Summary) -> list[dict[str, str]]:
    """A sentence for each method of which a trial was watched."""
    rows = []
    for item in summary.standings:
        sentences = [clean(t.get("stability_verdict"), 400) for t in item.curves if t.get("stability_verdict")]
        if sentences:
            rows.append({"title": item.title, "sentence": sentences[0]})
    return rows


def _environment(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(_ENVIRONMENT.get(str(k), str(k)), v) for k, v in _mapping(document.get("environment")).items()]
    settings = _mapping(document.get("settings"))
    rows += [(str(k), v) for k, v in settings.items() if v is not None and k != "device"]
    rows += [("started", document.get("started_at")), ("finished", document.get("finished_at"))]
    return [(clean(k, 40).replace("_", " "), _plain(v)) for k, v in rows if v is not None]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(k, 40)} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return clean(value, 300)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else []
