"""Reports of a race: one self-contained HTML page, and one table for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["terminal_table", "write_report"]


def write_report(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write the HTML report of a race.

    The page needs no network and asks for none: style, script, data and plotly.js are inside it, and its
    Content-Security-Policy forbids every request. It is written atomically, and the same document gives the same bytes.

    Args:
        document: a race document (`race.json`, format 1). Any number in it may be missing or null.
        path: the HTML file to write; missing parent folders are made.

    Returns:
        The path written.

    Raises:
        TypeError: `document` is not a mapping.
        ValueError: `document` has another format, or `methods` or `trials` is not a list of objects.
        OSError: `path` cannot be written; it is then unchanged.

    Examples:
        >>> import json
        >>> document = json.loads(Path("runs/text/race.json").read_text())  # doctest: +SKIP
        >>> write_report(document, "runs/text/report.html")  # doctest: +SKIP
    """
    from steepest._files import write_atomic
    from steepest.lab.report.page import render

    return write_atomic(path, render(document))


def terminal_table(document: Mapping[str, Any]) -> "RenderableType":
    """The result of a race for a terminal: the headline, the ranking, and how far to trust it.

    Args:
        document: a race document (`race.json`, format 1). Any number in it may be missing or null.

    Returns:
        A rich renderable; names in it are plain text, never markup or control sequences.

    Raises:
        TypeError: `document` is not a mapping.
        ValueError: `document` has another format, or `methods` or `trials` is not a list of objects.
    """
    from steepest.lab.report.terminal import table

    return table(document)
