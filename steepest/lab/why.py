"""Plain sentences about a race, each computed from its numbers: what was seen, not what must be so."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NEAR = 0.02


def explain(document: Mapping[str, Any]) -> list[str]:
    """The sentences under "why", the most important first."""
    methods = {m["name"]: m for m in document["methods"]}
    winner = methods.get(document["winner"] or "")
    if winner is None:
        return ["No method trained to the end at any learning rate: every trial diverged, was pruned or failed."]
    margin = document["winner_margin"]
    other = methods.get(margin["against"]) if margin else None
    sentences = [_result(winner, other, margin)]
    if other is not None and margin is not None:
        sentences += _speed(winner, other, margin)
        sentences += _updates(document, winner, other)
        sentences += _gradients(document, winner, other)
    sentences += _sensitivity(document)
    sentences += _divergence(document)
    sentences += _edges(document)
    return sentences


def verdict(document: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    """Why a method ranks where it does."""
    if method["best_lr"] is None:
        tried = sum(t["method"] == method["name"] for t in document["trials"])
        if not tried:
            return "No trial has finished yet."
        states = _states(document, method["name"])
        return f"None of its {_count(tried, 'trial')} reached the end ({states}), so it has no result."
    final, runs = method["final"], len(method["final"]["values"])
    parts = []
    if final["mean"] is None:
        bad = sum(value is None for value in final["values"])
        parts.append(f"At its best learning rate {_count(bad, 'seed')} of {runs} did not reach the end.")
    elif runs > 1:
        parts.append(f"Ends at {_value(final)} over {runs} seeds.")
    else:
        seen = "" if method["finalist"] else ", and did not reach the final" if document["status"] == "complete" else ""
        parts.append(f"Ends at {final['mean']:.4g} on one seed{seen}.")
    reference = document["reference"]
    base = next((m for m in document["methods"] if m["name"] == reference), None)
    if base is not None and base is not method and base["final"]["mean"] is not None:
        reached = method["steps_to_target"]
        if reached is not None:
            share = 100 * reached["mean"] / document["settings"]["steps"]
            parts.append(f"Reaches {base['title']}'s final loss after {share:.0f}% of the steps.")
        elif final["mean"] is not None:
            parts.append(f"Does not reach {base['title']}'s final loss.")
        ratio = _ratio(method["seconds_per_step"], base["seconds_per_step"])
        if ratio is not None and abs(ratio - 1) > 0.1:
            parts.append(f"A step takes {_times(ratio)} as long.")
    if method["diverged_trials"]:
        parts.append(f"{_count(method['diverged_trials'], 'trial')} diverged.")
    if method["best_at_edge"]:
        parts.append("Its best learning rate is at the edge of those tried, so it may do better with a wider range.")
    return " ".join(parts)


def _result(winner: Mapping[str, Any], other: Mapping[str, Any] | None, margin: Mapping[str, Any] | None) -> str:
    ends = f"{winner['title']} ends lowest, at a validation loss of {_value(winner['final'])}"
    if other is None or margin is None or margin["loss"] is None:
        return ends + "."
    text = f"{ends}; {other['title']} ends at {_value(other['final'])}, {_gap(margin['loss'])}."
    if margin["seeds"] < 2:
        return text + " With one seed, nothing can be said about how much of this is chance."
    how = (
        ""
        if margin["p_value"] is None
        else f" (paired t-test over {margin['seeds']} seeds, p = {margin['p_value']:.2g})"
    )
    if margin["significant"]:
        return f"{text} The difference is larger than the spread over seeds{how}."
    noise = max(winner["final"]["std"] or 0.0, other["final"]["std"] or 0.0)
    if abs(margin["loss"]) < 2 * noise:
        return f"{text} The difference is within the spread over seeds{how}: take the two as equal here, or add seeds."
    return f"{text} The difference is large, but {margin['seeds']} seeds are too few to be sure of it{how}: add seeds."


def _speed(winner: Mapping[str, Any], other: Mapping[str, Any], margin: Mapping[str, Any]) -> list[str]:
    cost = _ratio(winner["seconds_per_step"], other["seconds_per_step"])
    if margin["steps_ratio"] is None:
        return []
    share = f"{100 * margin['steps_ratio']:.0f}% of the steps"
    text = f"{winner['title']} reaches the final loss of {other['title']} after {share}"
    if cost is None or margin["seconds_ratio"] is None:
        return [text + "."]
    return [
        f"{text}. Its step takes {_times(cost)} as long, so this is {100 * margin['seconds_ratio']:.0f}% of the time."
    ]


def _updates(document: Mapping[str, Any], winner: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Relative step sizes by role, at the middle half of training, at each method's best learning rate."""
    mine, theirs = _relative_updates(document, winner), _relative_updates(document, other)
    shared = [role for role in mine if role in theirs and mine[role] > 0 and theirs[role] > 0]
    if not shared:
        return []
    ratios = {role: mine[role] / theirs[role] for role in shared}
    most, least = max(shared, key=ratios.__getitem__), min(shared, key=ratios.__getitem__)
    sentences = []
    if ratios[most] > 1.25 or ratios[least] < 0.8:
        text = (
            f"In the middle of training {winner['title']} changes the {_role(most)} parameters by {mine[most]:.2g} of "
        )
        text += "their size per step"
        text += f" ({other['title']}: {theirs[most]:.2g})"
        if most != least:
            text += f", and the {_role(least)} parameters by {mine[least]:.2g} ({other['title']}: {theirs[least]:.2g})"
        sentences.append(text + ".")
    evenness = {m["title"]: _evenness(v) for m, v in ((winner, mine), (other, theirs))}
    (a, x), (b, y) = evenness.items() if len(evenness) == 2 else [("", None), ("", None)]
    if x is not None and y is not None and max(x, y) > 1.5 * min(x, y):
        even, uneven = ((a, x), (b, y)) if x < y else ((b, y), (a, x))
        sentences.append(
            f"{even[0]} moves the weight matrices at a more even relative speed: its fastest role moves {even[1]:.2g} "
            f"times as fast as its slowest, against {uneven[1]:.2g} times for {uneven[0]}."
        )
    return sentences


def _gradients(document: Mapping[str, Any], winner: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    mine, theirs = (_late_gradient(_best_trials(document, m)) for m in (winner, other))
    if mine is None or theirs is None or 0.67 < mine / theirs < 1.5:
        return []
    compared = f"{theirs / mine:.2g} times smaller" if mine < theirs else f"{mine / theirs:.2g} times larger"
    return [f"Late in training the gradient norm of {winner['title']} is {compared} than that of {other['title']}."]


def _sensitivity(document: Mapping[str, Any]) -> list[str]:
    """Over which factor of learning rates each method stays near its best value."""
    widths = {}
    for method in document["methods"]:
        points = sorted(
            (t["lr"], t["value"])
            for t in document["trials"]
            if t["method"] == method["name"]
            and t["stage"] == "tune"
            and t["state"] == "complete"
            and t["value"] is not None
        )
        if method["best_lr"] is None or len(points) < 3:
            continue
        best = min(value for _, value in points)
        near = [lr for lr, value in points if value <= best + NEAR * max(abs(best), 1e-12)]
        widths[method["title"]] = max(near) / min(near)
    if len(widths) < 2:
        return []
    wide, narrow = max(widths, key=widths.__getitem__), min(widths, key=widths.__getitem__)
    if widths[wide] < 1.5 * widths[narrow]:
        return []
    rest = (
        f"only {narrow}'s best one did"
        if widths[narrow] == 1
        else f"for {narrow} over a factor of {widths[narrow]:.2g}"
    )
    return [
        f"{wide} forgives a wrong learning rate most: it stays within {100 * NEAR:.0f}% of its best loss over a factor "
        f"of {widths[wide]:.2g} among the rates tried; {rest}."
    ]


def _divergence(document: Mapping[str, Any]) -> list[str]:
    sentences = []
    for method in document["methods"]:
        lrs = [t["lr"] for t in document["trials"] if t["method"] == method["name"] and t["state"] == "diverged"]
        if lrs:
            count = len(lrs)
            at = f"at a learning rate of {min(lrs):g}" + (" and above" if max(lrs) > min(lrs) else "")
            sentences.append(f"{method['title']} diverged in {_count(count, 'trial')}, {at}.")
    return sentences


def _edges(document: Mapping[str, Any]) -> list[str]:
    titles = [m["title"] for m in document["methods"] if m["best_at_edge"]]
    if not titles:
        return []
    subject = "The best learning rate of " + _list(titles)
    return [f"{subject} is at the edge of the rates tried: with a wider range the result may improve."]


def _best_trials(document: Mapping[str, Any], method: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        t
        for t in document["trials"]
        if t["method"] == method["name"] and t["lr"] == method["best_lr"] and t["state"] == "complete"
    ]


def _relative_updates(document: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for trial in _best_trials(document, method):
        for role, curve in trial["roles"].items():
            ratios = curve["update_to_weight"]
            middle = _numbers(ratios[len(ratios) // 4 : max(1, 3 * len(ratios) // 4)])
            found.setdefault(role, []).extend(middle)
    return {role: statistics.median(values) for role, values in found.items() if values}


def _evenness(ratios: Mapping[str, float]) -> float | None:
    """Fastest over slowest relative speed among the roles of weight matrices."""
    small = {"norm", "bias", "scalar", "position", "vector"}
    values = [value for role, value in ratios.items() if role not in small and value > 0]
    return max(values) / min(values) if len(values) > 1 else None


def _late_gradient(trials: Iterable[Mapping[str, Any]]) -> float | None:
    values: list[float] = []
    for trial in trials:
        norms = trial["curve"]["grad_norm"]
        values += _numbers(norms[3 * len(norms) // 4 :])
    middle = statistics.median(values) if values else 0.0
    return middle if middle > 0 else None


def _states(document: Mapping[str, Any], name: str) -> str:
    states = [t["state"] for t in document["trials"] if t["method"] == name]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in values if isinstance(value, int | float) and math.isfinite(value)]


def _value(final: Mapping[str, Any]) -> str:
    if final["mean"] is None:
        return "no finite value"
    return f"{final['mean']:.4g}" + (f" ± {final['std']:.2g}" if final["std"] is not None else "")


def _gap(loss: float) -> str:
    return f"{abs(loss):.2g} {'higher' if loss >= 0 else 'lower'}"


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _role(role: str) -> str:
    return role.replace("_", " ")


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
