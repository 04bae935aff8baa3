"""What a race document says, as a few facts and sentences that the page and the terminal share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steepest.lab.compare import Difference
from steepest.lab.report.standing import Standing, apart, standings, target_ratio
from steepest.lab.report.text import MISSING, count, duration, listed, loss, number, numbers, ratio, short, spread

FORMAT = 1


@dataclass(frozen=True)
class Tile:
    """One key figure: what it is, the figure, and its context."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Badge:
    """A short judgement; `kind` is "good", "unsure" or "none"."""

    text: str
    kind: str


@dataclass(frozen=True)
class Summary:
    """The head of a report; `best` is None while there is nothing to rank."""

    title: str
    lead: str
    badges: tuple[Badge, ...]
    tiles: tuple[Tile, ...]
    partial: str | None
    standings: tuple[Standing, ...]
    best: Standing | None
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


def summarize(document: Mapping[str, Any]) -> Summary:
    """The headline, the key figures and the warnings of a race."""
    table = standings(document)
    partial = _partial(document)
    measured = [x for x in table if x.mean is not None]
    reference = next((x for x in table if x.name == document.get("reference")), None)
    if not measured:
        lead = "No trial has ended with a validation loss, so there is nothing to rank."
        return Summary("No result yet", lead, (Badge("No result", "none"),), (), partial, table, None, reference)
    winner = next((x for x in measured if x.name == document.get("winner")), measured[0])
    runner_up = next((x for x in measured if x is not winner), None)
    others = tuple(dict.fromkeys(x for x in (runner_up, reference) if x in measured and x is not winner and x))
    gaps = {other: apart(winner, other) for other in others}
    return Summary(
        title=_title(winner, runner_up, gaps, partial is not None),
        lead=_lead(winner, runner_up, reference, gaps),
        badges=tuple(_badge(other, difference) for other, difference in gaps.items())
        or (Badge("Nothing to compare with", "unsure"),),
        tiles=_tiles(document, winner, reference, table),
        partial=partial,
        standings=table,
        best=winner,
        reference=reference,
    )


def lr_note(item: Standing) -> str:
    """The range searched, and a warning where the best value lies at its edge."""
    low, high = [*numbers(item.entry.get("lr_range")), None, None][:2]
    text = "" if low is None or high is None else f"searched {short(low)} to {short(high)}"
    if item.entry.get("best_at_edge"):
        return f"{text}: at the edge, widen it" if text else "at the edge of the range, widen it"
    return text


def _partial(document: Mapping[str, Any]) -> str | None:
    if document.get("status") == "complete":
        return None
    trials = document["trials"]
    done = sum(trial.get("state") == "complete" for trial in trials)
    return (
        f"The race has not ended: of the trials so far ({len(trials)}), {done} ran to the end. "
        "Ranks and gaps can still change. The same command goes on where it stopped."
    )


def _title(winner: Standing, runner_up: Standing | None, gaps: Mapping[Standing, Difference], partial: bool) -> str:
    if runner_up is None:
        return f"{winner.title} is the only method with a result"
    difference = gaps[runner_up]
    if difference.seeds < 2:
        return f"{winner.title} is ahead on one seed"
    if not difference.significant:
        return f"{winner.title} is ahead, but not separable from {runner_up.title}"
    return f"{winner.title} {'leads so far' if partial else 'wins'}"


def _badge(other: Standing, difference: Difference) -> Badge:
    if difference.seeds < 2:
        return Badge(f"Against {other.title}: one seed, so the spread is unknown", "unsure")
    p = "" if difference.p_value is None else f", p = {difference.p_value:.2g}"
    over = f"({difference.seeds} seeds{p})"
    if difference.significant:
        return Badge(f"Ahead of {other.title} by more than the seed spread {over}", "good")
    return Badge(f"Not separable from {other.title} {over}", "unsure")


def _lead(
    winner: Standing, runner_up: Standing | None, reference: Standing | None, gaps: Mapping[Standing, Difference]
) -> str:
    text = f"Final validation loss {loss(winner.mean)}{_over_seeds(winner)}"
    parts = []
    for other, difference in gaps.items():
        if difference.mean is None:
            continue
        side = "lower" if difference.mean >= 0 else "higher"
        words = [word for word, holder in (("next", runner_up), ("the reference", reference)) if other is holder]
        parts.append(f"{spread(abs(difference.mean))} {side} than {other.title} ({listed(words)})")
    return f"{text}: {listed(parts)}." if parts else f"{text}."


def _over_seeds(item: Standing) -> str:
    if item.std is not None:
        return f" ± {spread(item.std)} over {len(item.values)} seeds"
    return " from one seed" if len(item.values) == 1 else ""


def _tiles(
    document: Mapping[str, Any], winner: Standing, reference: Standing | None, table: tuple[Standing, ...]
) -> tuple[Tile, ...]:
    tiles = [Tile("Final validation loss", loss(winner.mean), _over_seeds(winner).strip())]
    if reference is not None and reference is not winner:
        tiles += [_target_tile(winner, reference, unit) for unit in ("steps", "seconds")]
    else:
        tiles += _margin_tiles(document, table)
        step, own = (number(winner.entry.get(k)) for k in ("seconds_per_step", "optimizer_seconds_per_step"))
        note = "" if own is None else f"{short(own * 1e3)} ms of it in the optimizer"
        tiles.append(Tile("Time per step", MISSING if step is None else f"{short(step * 1e3)} ms", note))
    tiles.append(Tile("Best learning rate", short(winner.entry.get("best_lr")), lr_note(winner)))
    return tuple(tiles)


def _target_tile(winner: Standing, reference: Standing, unit: str) -> Tile:
    label = f"{'Steps' if unit == 'steps' else 'Time'} to {reference.title}’s final loss"
    ours, theirs = (x.target(f"{unit}_to_target") for x in (winner, reference))
    factor = target_ratio(winner, reference, f"{unit}_to_target")
    show = duration if unit == "seconds" else count
    if ours is None or theirs is None or factor is None:
        return Tile(label, "not reached" if ours is None else show(ours), "")
    return Tile(label, _factor(factor, unit), f"{show(ours)} instead of {show(theirs)}")


def _margin_tiles(document: Mapping[str, Any], table: tuple[Standing, ...]) -> list[Tile]:
    """Where the reference itself wins, or none was raced: the way to the runner-up's final loss."""
    margin = document.get("winner_margin")
    if not isinstance(margin, Mapping):
        return []
    other = next((x for x in table if x.name == margin.get("against")), None)
    share = number(margin.get("steps_ratio"))
    if other is None or share is None or share <= 0:
        return []
    return [Tile(f"Steps to {other.title}’s final loss", _factor(1 / share, "steps"), "the best of the others")]


def _factor(factor: float, unit: str) -> str:
    if abs(factor - 1) < 0.005:
        return "as many" if unit == "steps" else "as fast"
    word = ("fewer" if factor >= 1 else "more") if unit == "steps" else ("faster" if factor >= 1 else "slower")
    return f"{ratio(factor if factor >= 1 else 1 / factor)} {word}"
