"""`python -m benchmarks`: time everything, print the tables, store them in benchmarks/results/."""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import (
    averages,
    cheap,
    consensus,
    curvature,
    dal,
    distributed,
    freon,
    ivon,
    mixture_vi,
    polystep,
    radius,
    schedules,
    spectral,
    spectral_norm,
    stability,
    transport,
)
from steepest._files import write_atomic
from steepest.lab.machine import environment

RESULTS = Path(__file__).parent / "results"
SUITES = {
    "spectral": spectral,
    "cheap": cheap,
    "freon": freon,
    "schedules": schedules,
    "curvature": curvature,
    "consensus": consensus,
    "dal": dal,
    "radius": radius,
    "ivon": ivon,
    "mixture_vi": mixture_vi,
    "stability": stability,
    "spectral_norm": spectral_norm,
    "polystep": polystep,
    "distributed": distributed,
    "averages": averages,
    "transport": transport,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the suites named on the command line, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each; the median counts (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"SUITE must be any of {', '.join(SUITES)}; got {', '.join(sorted(unknown))}")
    if options.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {options.repeats}")
    device, console = torch.device(options.device), Console()
    for name in options.suites or SUITES:
        suite = SUITES[name]
        rows: list[dict[str, Any]] = []
        with console.status(f"Timing {name} ...") as status:
            for row in suite.rows(options.repeats, device):
                rows.append(row)
                status.update(f"Timing {name}: {row['matrices']}")
        if not rows:
            console.print(f"{name}: nothing to measure on {device.type}")
            continue
        document = {
            "title": f"{suite.TITLE} ({device.type.upper()})",
            "description": suite.DESCRIPTION,
            "environment": environment(device),
            "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": rows,
        }
        path = write_atomic(options.out / f"{name}-{device.type}.json", json.dumps(document, indent=2) + "\n")
        console.print(as_table(document["title"], rows))
        console.print(f"Stored in {path}\n")


def as_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    main()
