"""Several worker processes on this machine, watched: who dies is reported and replaced."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.lab.console import Display
from steepest.lab.machine import cores
from steepest.lab.plan import next_trials
from steepest.lab.settings import RaceError
from steepest.lab.worker import Bench, settings_to_json, values

POLL_SECONDS = 0.3
MOST_IDLE_DEATHS = 3


@dataclass
class Member:
    """A worker process."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path


def run_team(bench: Bench, display: Display) -> None:
    """Run the race with `settings.workers` processes, until it is done.

    Each process is a fresh interpreter with its share of the cores, in its own session: a Ctrl-C reaches only this
    process, which passes it on once, so that every worker saves what it does.

    Raises:
        KeyboardInterrupt: Ctrl-C, after all workers have saved.
        RaceError: a worker met an error that ends the race, or workers die before they take any trial.
    """
    team = [_start(bench, number) for number in range(1, bench.settings.workers + 1)]
    idle_deaths = 0
    shown: set[Any] = set(bench.store.finished())
    try:
        while team:
            time.sleep(POLL_SECONDS)
            _show(bench, display, shown)
            for member in list(team):
                code = member.process.poll()
                if code is None:
                    continue
                team.remove(member)
                if code == 0:
                    member.log.unlink(missing_ok=True)
                    continue
                if code in (2, 130):
                    raise RaceError(_tail(member.log) or f"worker {member.number} was stopped") from None
                idle_deaths = 0 if _had_trial(bench, member) else idle_deaths + 1
                display.say(f"worker {member.number} {_fate(code)}; its trial is run again from its last checkpoint")
                if idle_deaths >= MOST_IDLE_DEATHS:
                    raise RaceError(
                        f"{idle_deaths} workers died before they took a trial; the last one {_fate(code)}. "
                        f"{_tail(member.log)}"
                    )
                bench.store.reclaim(bench.settings.grace)
                if next_trials(bench.plan, values(bench.store.finished())):
                    team.append(_start(bench, member.number))
        _show(bench, display, shown)
    finally:
        _stop(team)


def _start(bench: Bench, number: int) -> Member:
    settings = bench.settings
    threads = settings.threads or max(1, cores() // settings.workers)
    given = {
        "settings": settings_to_json(settings),
        "command": bench.store.command_id,
        "parent": os.getpid(),
        "threads": threads,
    }
    log = settings.folder / f"worker-{number}.log"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from steepest.lab.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(given).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass
    return Member(number, process, log)


def _stop(team: list[Member]) -> None:
    for member in team:
        if member.process.poll() is None:
            member.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    for member in team:
        try:
            member.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            member.process.kill()
            member.process.wait()
        if member.process.returncode in (0, 130):
            member.log.unlink(missing_ok=True)


def _show(bench: Bench, display: Display, shown: set[Any]) -> None:
    for key, record in bench.store.finished().items():
        if key not in shown:
            shown.add(key)
            display.ended(key, record.result or {"state": "failed"})
    running = [record for record in bench.store.records() if record.state == "running" and record.owner]
    if running:
        first = running[0]
        display.started(first.key, bench.steps, int((first.owner or {}).get("step", 0)))


def _had_trial(bench: Bench, member: Member) -> bool:
    return any((record.owner or {}).get("pid") == member.process.pid for record in bench.store.records())


def _fate(code: int) -> str:
    if code < 0:
        why = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{why}"
    return f"ended with exit code {code}"


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ") if lines else ""
