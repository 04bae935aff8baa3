"""All papers of the project at a glance: what is implemented of each, and what its evidence says."""

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steepest._errors import UserError
from steepest.lab import study
from steepest.lab.evidence import Evidence
from steepest.studies._base import VERDICTS

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["fresh", "stale", "missing", "no study"]


@dataclass(frozen=True)
class Entry:
    """One line of the atlas.

    Attributes:
        slug: the paper's short name, and its study's.
        title: its title.
        authors: its authors.
        year: when it appeared.
        arxiv: its arXiv identifier; empty if none is known.
        rooms: the packages its methods live in, the main one first.
        kind: "paper", or "survey" for a study of ours over several sources.
        components: dotted names of what is implemented.
        status: "fresh", "stale" (the code changed since), "missing" (a study without evidence) or "no study".
        scale: the scale of the evidence, or None.
        verdicts: how many claims have each verdict; empty without evidence.
        recorded_at: when the evidence was recorded, or None.
    """

    slug: str
    title: str
    authors: str
    year: int
    arxiv: str
    rooms: tuple[str, ...]
    kind: str
    components: tuple[str, ...]
    status: Status
    scale: str | None
    verdicts: dict[str, int]
    recorded_at: str | None


def papers() -> dict[str, dict[str, Any]]:
    """The papers by slug: title, authors, year, arxiv, rooms, and kind."""
    return tomllib.loads(files("steepest.studies").joinpath("papers.toml").read_text(encoding="utf-8"))


def entries(results: Path | None = None) -> list[Entry]:
    """The atlas, in alphabetical order of the slugs.

    Args:
        results: the folder of the evidence; default: the checkout's.

    Raises:
        UserError: `results` is not a folder, an evidence file is malformed, or it belongs to no study.
    """
    if results is not None and not results.is_dir():
        raise UserError(f"results is {str(results)!r}, which is not a folder")
    studies = set(study.slugs())
    found = []
    for slug, paper in sorted(papers().items()):
        status, evidence = study.status(slug, results) if slug in studies else ("no study", None)
        found.append(
            Entry(
                slug=slug,
                title=paper["title"],
                authors=paper["authors"],
                year=paper["year"],
                arxiv=paper["arxiv"],
                rooms=tuple(paper["rooms"]),
                kind=paper.get("kind", "paper"),
                components=study.components(slug) if slug in studies else (),
                status=status,  # type: ignore[arg-type]
                scale=evidence.scale if evidence else None,
                verdicts={**evidence.counts()} if evidence else {},
                recorded_at=evidence.recorded_at if evidence else None,
            )
        )
    return found


def to_json(atlas: Sequence[Entry]) -> str:
    """The atlas as a JSON list."""
    return json.dumps([asdict(entry) for entry in atlas], indent=2, ensure_ascii=False)


def summary(atlas: Iterable[Entry]) -> str:
    """One sentence: how many papers, studies and claims there are, and what the claims come to."""
    atlas = list(atlas)
    counts = [sum(entry.verdicts.get(verdict, 0) for entry in atlas) for verdict in VERDICTS]
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in zip(VERDICTS, counts, strict=True))
    stale = [entry.slug for entry in atlas if entry.status == "stale"]
    missing = [entry.slug for entry in atlas if entry.status == "missing"]
    kinds = [entry.kind for entry in atlas]
    parts = [
        f"{kinds.count('paper')} papers and {kinds.count('survey')} survey",
        f"{sum(entry.status != 'no study' for entry in atlas)} with a study",
        f"{sum(counts)} claims judged ({verdicts})",
    ]
    sentence = ", ".join(parts) + "."
    if stale:
        sentence += f" Stale: {', '.join(stale)}."
    return sentence + (f" Without evidence: {', '.join(missing)}." if missing else "")


def table(atlas: Iterable[Entry], width: int = 120) -> "Table":
    """The atlas for a terminal of `width` columns; a narrow one leaves out the titles and the rooms."""
    from rich.table import Table
    from rich.text import Text

    colours = {"fresh": "green", "stale": "yellow", "missing": "red", "no study": "dim"}
    shown = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    shown.add_column("paper", no_wrap=True, min_width=12, overflow="ellipsis")
    if width >= 110:
        shown.add_column("title", ratio=3, overflow="ellipsis", no_wrap=True)
    if width >= 90:
        shown.add_column("rooms", overflow="fold")
    shown.add_column("implemented", ratio=2, overflow="fold")
    for heading in ("holds", "partly", "not"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("evidence", no_wrap=True)
    for entry in atlas:
        cells = [entry.slug]
        if width >= 110:
            cells.append(entry.title)
        if width >= 90:
            cells.append(", ".join(entry.rooms))
        cells.append("\n".join(name.removeprefix("steepest.") for name in entry.components))
        cells += [str(entry.verdicts[verdict]) if entry.verdicts else "" for verdict in VERDICTS]
        shown.add_row(*map(Text, cells), Text(entry.status, style=colours[entry.status]))
    return shown


def markdown(results: Path | None = None) -> str:
    """The atlas as a Markdown table, with a sentence that sums it up."""
    atlas = entries(results)
    rows = []
    for entry in atlas:
        title = f"[{_cell(entry.title)}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else _cell(entry.title)
        counts = [str(entry.verdicts[verdict]) if entry.verdicts else "" for verdict in VERDICTS]
        implemented = ", ".join(f"`{name}`" for name in entry.components)
        rooms = ", ".join(entry.rooms)
        rows.append([f"`{entry.slug}`", f"{title}, {entry.year}", rooms, implemented, *counts, entry.status])
    header = ["Paper", "Title", "Rooms", "Implemented", *VERDICTS, "Evidence"]
    return f"{summary(atlas)}\n\n{_markdown_table(header, rows)}"


def evidence_markdown(slug: str, results: Path | None = None) -> str:
    """The claims of one study with their verdicts and measured numbers, as Markdown.

    Raises:
        UserError: there is no such study, or its evidence is malformed.
    """
    study.source(slug)
    status, evidence = study.status(slug, results)
    if evidence is None:
        return f"No evidence is recorded yet. `steepest study {slug} --record` measures and records it."
    claims = [
        [claim.id, _cell(claim.statement), _cell(claim.reported), _cell(claim.criterion), f"**{claim.verdict}**"]
        for claim in evidence.claims
    ]
    measured = [
        [claim.id, _cell(_brief(claim.measured)), ", ".join(map(str, claim.seeds)), f"{claim.seconds:.3g} s"]
        for claim in evidence.claims
    ]
    return "\n\n".join(
        [
            _markdown_table(["Claim", "Statement", "Reported", "Holds when", "Verdict"], claims),
            _markdown_table(["Claim", "Measured", "Seeds", "Time"], measured),
            _provenance(evidence, status),
        ]
    )


def _provenance(evidence: Evidence, status: str) -> str:
    day = datetime.fromisoformat(evidence.recorded_at).date().isoformat()
    around = ", ".join(f"{name} {_cell(str(value))}" for name, value in evidence.environment.items())
    stale = " **Stale: the code has changed since.**" if status == "stale" else ""
    return f"Recorded {day} at scale {evidence.scale}; {around}.{stale}"


def _brief(value: Any, inner: bool = False) -> str:
    """Numbers with four digits, with their names; what is nested stands in brackets."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        text = "; ".join(f"{name}: {_brief(item, inner=True)}" for name, item in value.items())
        return f"({text})" if inner else text
    if isinstance(value, list):
        return "[" + ", ".join(_brief(item, inner=True) for item in value) + "]"
    return str(value)


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(text: str) -> str:
    """Text that stays inside its table cell, and is not read as Markdown or HTML."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\|*_`[]" else letter for letter in text)
