"""The command line. Each command is a thin function over the library; what it needs is imported when it runs."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from steepest._errors import UserError
from steepest.lab._guard import INTERRUPTED, guarded, say

if TYPE_CHECKING:
    from rich.console import Console

    from steepest.lab.evidence import ClaimResult, Evidence


class _Commands(TyperGroup):
    """Shows every wrong use as one line on stderr with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        with guarded("steepest"):
            return super().invoke(ctx)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            context: Any = getattr(error, "ctx", None)
            path = context.command_path if context else "steepest"
            message = str(error.format_message()).strip().rstrip(".")  # type: ignore[attr-defined]
            say(f"{path}: {message or 'what shall it do?'} (see {path} --help)")
            code = getattr(error, "exit_code", 2)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=_Commands,
    help="Race optimizers on your task, see what each parameter is for, and re-run the claims of papers.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command ``steepest``."""
    app(prog_name="steepest")


def _version(wanted: bool) -> None:
    if wanted:
        from steepest import __version__

        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


Results = Annotated[Path | None, typer.Option(help="Folder of the evidence. Default: results of the checkout.")]


@app.command()
def race(
    task_argument: Annotated[
        str | None,
        typer.Argument(metavar="TASK", help="text, text-moe, digits, or path/to/file.py:Class. Default: text."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="The same as TASK.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas between, or path/to/file.py:function. Default: all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every trial.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the whole race, instead of steps.")] = None,
    lr_range: Annotated[
        list[str] | None, typer.Option(help="METHOD=LOWEST:HIGHEST, for example muon=1e-3:1e-1. May be repeated.")
    ] = None,
    lr_trials: Annotated[int | None, typer.Option(help="Learning rates tried for each method.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of each finalist.")] = None,
    finalists: Annotated[str | None, typer.Option(help="How many of the best run on all seeds, or all.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", "--batch-size", help="Batch size of a built-in task.")] = None,
    data: Annotated[Path | None, typer.Option(help="A text file of yours, for the text tasks.")] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            help="How text-moe balances its experts: none, switch, global_switch, loss_free, phi; or NAME=STRENGTH."
        ),
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Clip the norm of the whole gradient at this value.")] = None,
    prune: Annotated[bool, typer.Option(help="Stop tuning trials that fall clearly behind.")] = True,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast).")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the race and of its folder. Default: the task's.")] = None,
    runs: Annotated[Path | None, typer.Option("--runs", "--out", help="Folder of all races. Default: runs.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database URL that several machines share. Default: a file in the race's folder.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each process.")] = None,
) -> None:
    """Race optimizers on a task: tune each at an equal budget, repeat over seeds, write a report.

    Stop it at any moment; the same command goes on.
    """
    from steepest.lab.settings import RaceSettings

    if task is not None and task_argument is not None and task != task_argument:
        raise UserError(f"the task is given twice: {task_argument!r} and --task {task!r}; give one")
    given = {
        "task": task_argument if task is None else task,
        "methods": _names(methods),
        "steps": steps,
        "minutes": minutes,
        "lr_ranges": _lr_ranges(lr_range),
        "lr_trials": lr_trials,
        "seeds": seeds,
        "finalists": _finalists(finalists),
        "batch": batch,
        "data": data,
        "balance": balance,
        "clip": clip,
        "prune": prune,
        "device": device,
        "dtype": dtype,
        "name": name,
        "runs": runs,
        "storage": storage,
        "workers": workers,
        "threads": threads,
        "command": command_line(sys.argv),
    }
    settings = RaceSettings(**{key: value for key, value in given.items() if value is not None})
    from steepest.lab.race import race as run_race

    run_race(settings, console=_console())


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The race's folder, or its name.")],
    runs: Annotated[Path, typer.Option("--runs", "--out", help="Folder of all races.")] = Path("runs"),
    storage: Annotated[str | None, typer.Option(help="The database URL, if the race is kept in one.")] = None,
) -> None:
    """Write the HTML report of a race again, finished or not."""
    from steepest.lab.race import load_document
    from steepest.lab.report import terminal_table, write_report

    folder = next((path for path in (Path(run), runs / run) if path.is_dir()), None)
    if folder is None and storage is None:
        raise UserError(f"RUN is {run!r}; there is no such folder, and none of that name in {str(runs)!r}")
    name = Path(run).name if storage is not None else None
    document = load_document(folder or runs / run, storage, name)
    path = write_report(document, (folder or runs / run) / "report.html")
    console = _console()
    console.print(terminal_table(document))
    console.print(f"Report: {path}", markup=False, soft_wrap=True)


@app.command()
def roles(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="gpt, gpt-moe, mlp, resnet; path/to/file.py:name or package.module:name (a model, a function that "
            "makes one, or a task); or hf:ARCHITECTURE, such as hf:gpt2.",
        ),
    ],
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=ROLE over parameter names. May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 if a role is ambiguous.")] = False,
) -> None:
    """Show which role each parameter of a model has, why, and how an optimizer will treat it."""
    overrides: dict[str, str] = {}
    for item in override or []:
        pattern, equals, role = item.rpartition("=")
        if not equals or not pattern or not role:
            raise UserError(
                f"--override is {item!r}; it must be PATTERN=ROLE, for example '*.proj.weight=attention_out'"
            )
        overrides[pattern] = role
    from steepest.lab._models import load_model
    from steepest.optim.roles import roles as find_roles

    found = find_roles(load_model(model), overrides or None)
    if as_json:
        import json

        print(json.dumps(found.to_dicts(), indent=2))
    else:
        _console().print(found.table())
    if strict and found.ambiguous:
        say(f"ambiguous: {', '.join(parameter.name for parameter in found.ambiguous)}")
        raise typer.Exit(1)


@app.command()
def study(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="A study, or all.")],
    scale: Annotated[str, typer.Option(help="smoke (seconds), desktop (minutes) or gpu.")] = "desktop",
    record: Annotated[bool, typer.Option("--record", help="Write the verdicts to the results folder.")] = False,
    results: Results = None,
    runs: Annotated[
        Path, typer.Option(help="Where measured claims are kept, so that an interrupted study goes on.")
    ] = Path("runs/studies"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the evidence as JSON.")] = False,
) -> None:
    """Measure the claims of a paper and judge them."""
    import json

    from steepest.lab import study as studies

    names = studies.slugs() if slug == "all" else [studies.source(slug).stem]
    chosen = studies.check_scale(scale)
    if record:
        studies.check_recordable(chosen)
    found = []
    for name in names:
        progress = _console(stderr=True)
        evidence = studies.run_study(
            name,
            chosen,
            runs=None if chosen == "smoke" else runs,
            say=lambda line, console=progress: console.print(line, style="dim", markup=False),
        )
        found.append(evidence.to_dict())
        if record:
            say(f"recorded in {studies.record(evidence, results)}")
        if not as_json:
            _show_evidence(evidence)
    if as_json:
        print(json.dumps(found if slug == "all" else found[0], indent=2, ensure_ascii=False))


@app.command()
def atlas(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    results: Results = None,
) -> None:
    """List all papers: what is implemented of each, how its claims were judged, and which evidence is stale."""
    from steepest.lab import atlas as papers

    if as_json and markdown:
        raise UserError("--json and --markdown were both given; give one")
    entries = papers.entries(results)
    if as_json:
        print(papers.to_json(entries))
    elif markdown:
        print(papers.markdown(results))
    else:
        console = _console()
        console.print(papers.table(entries, console.width))
        console.print(papers.summary(entries), markup=False)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the methods that can be raced and built."""
    from steepest.lab.methods import METHODS

    known = [
        {"name": m.name, "title": m.title, "description": m.description, "lr_range": list(m.lr_range)}
        for m in METHODS.values()
    ]
    if as_json:
        import json

        print(json.dumps(known, indent=2))
        return
    _show_table(
        ("method", "learning rate", "what it does"),
        [(m.name, f"{m.lr_range[0]:g} to {m.lr_range[1]:g}", f"{m.title}. {m.description}") for m in METHODS.values()],
    )


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, without the password of a database URL."""
    words = ["steepest", *(re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", word) for word in arguments[1:])]
    return shlex.join(words)


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UserError(f"--methods is {text!r}; it must be names with commas between, for example adamw,muon")
    return names


def _lr_ranges(items: Sequence[str] | None) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for item in items or []:
        method, equals, bounds = item.rpartition("=")
        low, colon, high = bounds.partition(":")
        try:
            pair = (float(low), float(high))
        except ValueError:
            pair = None
        if not method or not equals or not colon or pair is None:
            raise UserError(f"--lr-range is {item!r}; it must be METHOD=LOWEST:HIGHEST, for example muon=1e-3:1e-1")
        if method in ranges:
            raise UserError(f"--lr-range is given twice for {method!r}")
        ranges[method] = pair
    return ranges


def _finalists(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--finalists is {text!r}; it must be a number, or all") from None


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _show_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(header):
        table.add_column(heading, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    _console().print(table)


def _show_evidence(evidence: "Evidence") -> None:
    from rich.text import Text

    colours = {"holds": "green", "partly": "yellow", "does not hold here": "red"}

    def row(claim: "ClaimResult") -> tuple[Any, ...]:
        return claim.id, claim.statement, Text(claim.verdict, style=colours[claim.verdict]), f"{claim.seconds:.1f} s"

    print(f"{evidence.paper}, scale {evidence.scale}")
    _show_table(("claim", "statement", "verdict", "time"), [row(claim) for claim in evidence.claims])
    if evidence.scale == "smoke":
        print("Scale smoke shows that the study runs; its verdicts mean nothing.")
