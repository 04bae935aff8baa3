"""The result of a race as a rich table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from steepest.lab.report.standing import Standing
from steepest.lab.report.summary import Summary, summarize, validate
from steepest.lab.report.text import MISSING, clean, count, duration, loss, memory, milliseconds, number, short, spread

_STYLE = {"good": "bold green", "unsure": "bold yellow", "none": "bold"}
_COLUMNS = ("#", "method", "lr", "val loss", "seeds", "steps", "time", "ms/step", "opt ms", "state", "div/pruned")
_LESS = frozenset({"opt ms", "state", "div/pruned"})  # left out where the terminal has no room
_ROOM = 100


def table(document: Mapping[str, Any]) -> RenderableType:
    """See `steepest.lab.report.terminal_table`."""
    validate(document)
    summary = summarize(document)
    # Everything is a Text: rich reads markup only in plain strings, so a name such as "[bold]" stays what it is.
    parts: list[RenderableType] = [
        Text(summary.title, style=_STYLE[summary.badges[0].kind]),
        Text(summary.lead),
        *(Text(badge.text, style="dim") for badge in summary.badges),
        Text(),
        _Ranking(summary),
        Text(),
    ]
    if summary.reference is not None:
        goal = f"the final validation loss of {summary.reference.title}"
        parts.append(Text(f"steps, time: to reach {goal}", style="dim"))
    if any(not x.finalist and x.mean is not None for x in summary.standings):
        parts.append(Text("dim: not in the final; the loss of the best tuning trial, one seed", style="dim"))
    edges = [x for x in summary.standings if x.entry.get("best_at_edge")]
    parts += [
        Text(f"{x.title}: the best lr is at the edge of the range searched; widen it", style="dim") for x in edges
    ]
    if summary.partial:
        parts += [Text(f"Partial. {summary.partial}", style="yellow")]
    return Group(*parts)


class _Ranking:
    """The ranking; on a narrow terminal with fewer columns."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept = [i for i, name in enumerate(_COLUMNS) if options.max_width >= _ROOM or name not in _LESS]
        grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for i in kept:
            left = _COLUMNS[i] == "method"
            grid.add_column(_COLUMNS[i], justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for item in self.summary.standings:
            first = item is self.summary.best
            cells = _cells(item)
            grid.add_row(*(Text(cells[i]) for i in kept), style="bold" if first else "" if item.finalist else "dim")
        yield grid


def _cells(item: Standing) -> tuple[str, ...]:
    entry = item.entry
    rank = number(entry.get("rank"))
    return (
        MISSING if rank is None else f"{rank:.0f}",
        clean(item.title, 40),
        short(entry.get("best_lr")),
        loss(item.mean) + (f" ± {spread(item.std)}" if item.std is not None else ""),
        str(len(item.values)),
        count(item.target("steps_to_target")),
        duration(item.target("seconds_to_target")),
        milliseconds(entry.get("seconds_per_step")),
        milliseconds(entry.get("optimizer_seconds_per_step")),
        memory(entry.get("optimizer_state_bytes")),
        "/".join(count(entry.get(key)) for key in ("diverged_trials", "pruned_trials")),
    )
