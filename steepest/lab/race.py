"""`race`: tune every method at an equal budget, repeat the best over seeds, and say which one wins and why."""

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from steepest._files import write_atomic
from steepest.lab.console import Display
from steepest.lab.document import build_document
from steepest.lab.settings import RaceError, RaceInterruptedError, RaceSettings
from steepest.lab.start import find_device, join
from steepest.lab.storage import RaceStore
from steepest.lab.team import run_team
from steepest.lab.worker import open_bench, work

__all__ = ["RaceError", "RaceInterruptedError", "RaceSettings", "load_document", "race"]


def race(settings: RaceSettings, console: Any = None) -> dict[str, Any]:
    """Run a race to its end, or go on with one; write its document and its report; return the document.

    The race lives in its storage: run the same call again after any death, or at the same time on several machines
    that share the storage.

    Args:
        settings: What to race.
        console: A `rich.console.Console` for progress and the final table; None: silent.

    Returns:
        The race document, as written to `race.json`.

    Raises:
        RaceError: the settings, the task or the storage are wrong, or the workers cannot start.
        RaceInterruptedError: Ctrl-C or SIGTERM; all is saved.

    Examples:
        >>> document = race(RaceSettings(task="digits", methods=("adamw", "sgd"), steps=20))  # doctest: +SKIP
        >>> document["winner"]  # doctest: +SKIP
    """
    with _terminated_like_interrupted(), _threads(settings):
        try:
            device = find_device(settings.device)
            store, attributes, task = _join(settings, device, _sayer(console))
            with contextlib.closing(store):
                document = _run(settings, store, attributes, task, console)
        except KeyboardInterrupt:
            raise RaceInterruptedError(
                f"stopped; everything is saved in {settings.folder}. Give the same command again to go on"
            ) from None
    _write(settings.folder, document)
    _conclude(console, settings.folder, document)
    return document


def _run(
    settings: RaceSettings, store: RaceStore, attributes: dict[str, Any], task: Any, console: Any
) -> dict[str, Any]:
    say = _sayer(console)
    bench = open_bench(settings, store, attributes, task)
    done = len(store.finished())
    say(f"Race {settings.run_name}: {len(bench.methods)} methods, {bench.steps} steps a trial, on {bench.device}")
    say(f"Results go to {settings.folder}" + (f"; going on after {done} finished trials" if done else ""))
    with Display(console, bench.plan, done) as display:
        if settings.workers == 1:
            work(bench, display)
        else:
            run_team(bench, display)
    return build_document(store)


def load_document(run: str | Path, storage: str | None = None, name: str | None = None) -> dict[str, Any]:
    """The document of a race, finished or not, from its storage alone.

    Args:
        run: The run folder.
        storage: URL of the storage, if it is not the run folder's own `race.db`.
        name: The race's name, if it is not the folder's.

    Raises:
        RaceError: there is no such race.
    """
    folder = Path(run)
    if storage is None and not (folder / "race.db").is_file():
        stored = folder / "race.json"
        if not stored.is_file():
            raise RaceError(f"there is no race in {str(folder)!r}: it has no race.db and no race.json")
        try:
            return json.loads(stored.read_text())
        except (OSError, ValueError) as error:
            raise RaceError(f"{stored} cannot be read: {error}") from error
    url = storage or f"sqlite:///{(folder / 'race.db').resolve()}"
    with contextlib.closing(RaceStore(url, name or folder.resolve().name)) as store:
        return build_document(store)


def _write(folder: Path, document: dict[str, Any]) -> None:
    write_atomic(folder / "race.json", json.dumps(document, allow_nan=False, indent=1))
    from steepest.lab.report import write_report

    write_report(document, folder / "report.html")
    trials = folder / "trials"
    if document["status"] == "complete" and trials.is_dir():
        for part in trials.glob(".*.part"):  # of a checkpoint whose writing was killed
            part.unlink(missing_ok=True)
        if not any(trials.iterdir()):
            trials.rmdir()


def _conclude(console: Any, folder: Path, document: dict[str, Any]) -> None:
    if console is None:
        return
    from steepest.lab.report import terminal_table

    console.print(terminal_table(document))
    for sentence in document["why"][:3]:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"\nThe report: {folder / 'report.html'}", markup=False, highlight=False)
    console.print(f"Next: {_next_command(document)}", markup=False, highlight=False)


def _next_command(document: dict[str, Any]) -> str:
    """A command worth typing next, and why."""
    edges = [m["name"] for m in document["methods"] if m["best_at_edge"] and m["rank"] <= 3]
    settings, margin = document["settings"], document["winner_margin"]
    if edges:
        change, name = f"--lr-trials {settings['lr_trials'] + 3}", "wider"
        why = f"the best learning rate of {', '.join(edges)} is at the edge of those tried"
    elif margin is not None and not margin["significant"]:
        change, name = f"--seeds {max(4, len(settings['seeds']) + 2)}", "more-seeds"
        why = "more seeds are needed to be sure of the winner"
    else:
        change, name = f"--steps {4 * settings['steps']}", "longer"
        why = "does it hold for longer training?"
    if settings.get("balance"):
        change = f"--balance {settings['balance']} {change}"
    return f"steepest race --task {document['task']['spec']} {change} --name {document['name']}-{name}   ({why})"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RaceError(f"the run folder {str(folder)!r} cannot be made: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise RaceError(f"the run folder {str(folder)!r} cannot be written")


def _join(settings: RaceSettings, device: torch.device, say: Any) -> tuple[RaceStore, dict[str, Any], Any]:
    """Open the storage and join the race in it; if that fails, leave no folder behind that was not there before."""
    folder, store = settings.folder, None
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    _make_folder(folder)
    try:
        store = RaceStore(settings.storage_url, settings.run_name)
        return store, *join(settings, store, device, say)
    except BaseException:
        begun = store is not None and store.exists()  # by another worker, meanwhile
        if store is not None:
            store.close()
        if new and not begun:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # a parent that others have filled stays
                for parent in new[1:]:
                    parent.rmdir()
        raise


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM saves and stops, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def _threads(settings: RaceSettings) -> Iterator[None]:
    if settings.threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sayer(console: Any) -> Any:
    def say(text: str) -> None:
        if console is not None:
            console.print(text, markup=False, highlight=False)

    return say
