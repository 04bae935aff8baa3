"""What a race document says, as a few facts and sentences that the page and the terminal share."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steepest.lab.report.text import clean, duration, listed, loss, number, numbers, ratio, short, spread

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Standing:
    """One method of the race: its document entry and its final validation loss over seeds."""

    entry: Mapping[str, Any]
    name: str
    title: str
    mean: float | None
    std: float | None
    values: tuple[float, ...]

    @property
    def finalist(self) -> bool:
        return bool(self.entry.get("finalist"))

    @property
    def single(self) -> bool:
        """Measured, but with one seed: no spread is known."""
        return self.mean is not None and len(self.values) < 2

    def target(self, key: str) -> float | None:
        """The mean of `steps_to_target` or `seconds_to_target`; None where the target was not reached."""
        entry = self.entry.get(key)
        return number(entry.get("mean")) if isinstance(entry, Mapping) else None


@dataclass(frozen=True)
class Gap:
    """How much lower the loss of one method is than another's, and whether seeds alone could explain it."""

    difference: float
    spread: float | None

    @property
    def separable(self) -> bool | None:
        """True if the gap exceeds the seed spread, False if not, None if the spread is unknown."""
        return None if self.spread is None else self.difference > self.spread


@dataclass(frozen=True)
class Tile:
    """One key figure: what it is, the figure, and its context."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Summary:
    """The head of a report."""

    title: str
    lead: str
    badge: str
    kind: str  # "good", "unsure" or "none"
    tiles: tuple[Tile, ...]
    partial: str | None
    standings: tuple[Standing, ...]
    reference: Standing | None


def validate(document: Any) -> None:
    """Raise unless `document` is a race document of the format this report reads."""
    if not isinstance(document, Mapping):
        raise TypeError(f"document must be a race document (a mapping, as in race.json), got {type(document).__name__}")
    if document.get("format") != FORMAT:
        raise ValueError(
            f"document['format'] must be {FORMAT}, got {document.get('format')!r}: not a race document, or from "
            "another version of steepest; the run's `steepest race` command writes it anew"
        )
    for key in ("methods", "trials"):
        entries = document.get(key)
        if not isinstance(entries, list) or not all(isinstance(x, Mapping) for x in entries):
            raise ValueError(f"document[{key!r}] must be a list of objects, got {type(entries).__name__}")


def standings(document: Mapping[str, Any]) -> tuple[Standing, ...]:
    """The methods, best first: ranked ones by rank, then by loss, then those without a result."""

    def order(item: Standing) -> tuple[float, float]:
        rank = number(item.entry.get("rank"))
        return (math.inf if rank is None else rank, math.inf if item.mean is None else item.mean)

    return tuple(sorted((_standing(entry) for entry in document["methods"]), key=order))


def _standing(entry: Mapping[str, Any]) -> Standing:
    final = entry.get("final")
    final = final if isinstance(final, Mapping) else {}
    values = tuple(numbers(final.get("values")))
    mean, std = number(final.get("mean")), number(final.get("std"))
    if mean is None and values:
        mean = statistics.fmean(values)
    if len(values) < 2:
        std = None
    elif std is None:
        std = statistics.stdev(values)
    name = str(entry.get("name"))
    return Standing(entry, name, clean(entry.get("title") or name), mean, std, values)


def gap(better: Standing, worse: Standing) -> Gap | None:
    """`worse.mean - better.mean` against the root of the summed squares of their standard deviations over seeds."""
    if better.mean is None or worse.mean is None:
        return None
    known = better.std is not None and worse.std is not None
    return Gap(worse.mean - better.mean, math.hypot(better.std or 0.0, worse.std or 0.0) if known else None)


def summarize(document: Mapping[str, Any]) -> Summary:
    """The headline, the key figures and the warnings of a race."""
    table = standings(document)
    partial = _partial(document)
    measured = [x for x in table if x.mean is not None]
    reference = next((x for x in table if x.name == document.get("reference")), None)
    if not measured:
        lead = "No trial has finished with a validation loss, so there is nothing to rank."
        return Summary("No result yet", lead, "No result", "none", (), partial, table, reference)
    winner = next((x for x in measured if x.name == document.get("winner")), measured[0])
    others = [x for x in measured if x is not winner]
    runner_up = next((x for x in others if x.finalist), others[0] if others else None)
    title, badge, kind = _title(winner, runner_up, _gap_to(winner, runner_up), partial is not None)
    tiles = _tiles(document, winner, reference)
    return Summary(title, _lead(winner, runner_up, reference), badge, kind, tiles, partial, table, reference)


def _gap_to(winner: Standing, other: Standing | None) -> Gap | None:
    return None if other is None else gap(winner, other)


def _partial(document: Mapping[str, Any]) -> str | None:
    if document.get("status") == "complete":
        return None
    trials = document["trials"]
    done = sum(trial.get("state") == "complete" for trial in trials)
    return (
        f"The race has not ended: {done} of the {len(trials)} trials so far are complete. "
        "Ranks and gaps can still change. The same command goes on where it stopped."
    )


def _title(winner: Standing, runner_up: Standing | None, lead: Gap | None, partial: bool) -> tuple[str, str, str]:
    if runner_up is None or lead is None:
        return f"{winner.title} is the only method with a result", "Nothing to compare with", "unsure"
    if lead.spread is None:
        return f"{winner.title} is ahead on one seed", "One seed: the spread is unknown", "unsure"
    sizes = f"{spread(lead.difference)} against {spread(lead.spread)}"
    if not lead.separable:
        title = f"{winner.title} is ahead, but not separable from {runner_up.title}"
        return title, f"Lead within the seed spread: {sizes}", "unsure"
    return (
        f"{winner.title} {'leads so far' if partial else 'wins'}",
        f"Lead larger than the seed spread: {sizes}",
        "good",
    )


def _lead(winner: Standing, runner_up: Standing | None, reference: Standing | None) -> str:
    seeds = len(winner.values)
    text = f"Final validation loss {loss(winner.mean)}"
    if winner.std is not None:
        text += f" ± {spread(winner.std)} over {seeds} seeds"
    elif seeds == 1:
        text += " from one seed"
    parts = []
    for other in dict.fromkeys(x for x in (runner_up, reference) if x is not None and x is not winner):
        difference = gap(winner, other)
        if difference is None:
            continue
        side = "lower" if difference.difference >= 0 else "higher"
        role = " and ".join(
            word for word, holder in (("next", runner_up), ("the reference", reference)) if other is holder
        )
        parts.append(f"{spread(abs(difference.difference))} {side} than {other.title} ({role})")
    return f"{text}: {listed(parts)}." if parts else f"{text}."


def target_ratio(winner: Standing, reference: Standing | None, key: str) -> float | None:
    """How many times fewer steps (or seconds) than the reference: reference / method, None where either is unknown."""
    ours = winner.target(key)
    theirs = None if reference is None else reference.target(key)
    return theirs / ours if ours and theirs else None


def _tiles(document: Mapping[str, Any], winner: Standing, reference: Standing | None) -> tuple[Tile, ...]:
    seeds = len(winner.values)
    over = f"± {spread(winner.std)} over {seeds} seeds" if winner.std is not None else "one seed" if seeds == 1 else ""
    tiles = [Tile("Final validation loss", loss(winner.mean), over)]
    if reference is not None and reference is not winner:
        goal = f"to {reference.title}'s final loss"
        tiles.append(_target_tile(document, winner, reference, "steps", f"Steps {goal}"))
        tiles.append(_target_tile(document, winner, reference, "seconds", f"Time {goal}"))
    else:
        step, own = (number(winner.entry.get(k)) for k in ("seconds_per_step", "optimizer_seconds_per_step"))
        note = "" if own is None else f"{short(own * 1e3)} ms of it in the optimizer"
        tiles.append(Tile("Time per step", "–" if step is None else f"{short(step * 1e3)} ms", note))
    tiles.append(Tile("Best learning rate", short(winner.entry.get("best_lr")), lr_note(winner)))
    return tuple(tiles)


def _target_tile(document: Mapping[str, Any], winner: Standing, reference: Standing, unit: str, label: str) -> Tile:
    ours, theirs = (x.target(f"{unit}_to_target") for x in (winner, reference))
    factor = target_ratio(winner, reference, f"{unit}_to_target")
    if factor is None:
        margin = document.get("winner_margin")
        factor = number(margin.get(f"{unit}_ratio")) if isinstance(margin, Mapping) else None
    show = duration if unit == "seconds" else lambda x: f"{x:,.0f}"
    if ours is None or factor is None or factor <= 0:
        return Tile(label, "not reached" if ours is None else show(ours), "")
    word = ("fewer" if factor >= 1 else "more") if unit == "steps" else ("faster" if factor >= 1 else "slower")
    note = show(ours) if theirs is None else f"{show(ours)} instead of {show(theirs)}"
    return Tile(label, f"{ratio(factor if factor >= 1 else 1 / factor)} {word}", note)


def lr_note(item: Standing) -> str:
    """The range searched, and a warning where the best value lies at its edge."""
    low, high = [*numbers(item.entry.get("lr_range")), None, None][:2]
    text = "" if low is None or high is None else f"searched {short(low)} to {short(high)}"
    if item.entry.get("best_at_edge"):
        return f"{text}: at the edge, widen it" if text else "at the edge of the range, widen it"
    return text
