import io
import sys

import pytest
from loop_steppers import NoisyDescent, Scripted
from rich.console import Console
from rich.progress import Progress

from steepest.loop import Seconds, run
from steepest.loop import progress as module
from steepest.loop.progress import Lines, Reporter, duration


def test_silent(capfd):
    run(NoisyDescent(), 3, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_log_file_gets_one_end_line(capfd, tmp_path):
    path = tmp_path / "run.ckpt"
    run(Scripted(1.0, 0.25), 2, checkpoint=path, label="my [bold]run")
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("my [bold]run: 2 steps in ") and err.count("\n") == 1
    assert err.endswith(f" · loss 0.25 · steps: 2 done · saved {path}\n")
    run(Scripted(1.0, 0.25, 0.5), 3, checkpoint=path, label="again")
    err = capfd.readouterr().err.splitlines()
    assert err[0] == f"again: resumed from {path} at step 2" and err[1].startswith("again: 3 steps in")
    run(Scripted(1.0, 0.25, 0.5), 3, checkpoint=path, label="again")
    assert capfd.readouterr().err == f"again: {path} holds the finished run (steps: 3 done)\n"


def test_lines_now_and_then(capfd, monkeypatch):
    monkeypatch.setattr(Lines, "period", 0.0)
    run(Scripted(1.0, 2.0), 2)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("Scripted: step 1/2 · ") and lines[0].endswith("loss 1")


def test_status_shows_rate_and_time_left():
    report = Reporter("x", 100, None)
    report.period = 0.0
    report.begin(40, 10.0)
    report.update(60, 20.0, {})
    assert (
        report.status(60, 20.0, {"loss": 0.123456, "b": 1.0})
        == "step 60/100 · 2 steps/s · 20 s left · loss 0.1235 · b 1"
    )
    slow = Reporter("x", None, 100.0)
    slow.period = 0.0
    slow.begin(0, 0.0)
    slow.update(2, 25.0, {})
    assert slow.status(2, 25.0, {}) == "step 2 · 12.5 s/step · 1 min 15 s left"
    both = Reporter("x", 1000, 30.0)
    both.period = 0.0
    both.begin(0, 0.0)
    both.update(1, 10.0, {})
    assert "20 s left" in both.status(1, 10.0, {})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (59.4, "59 s"),
        (75, "1 min 15 s"),
        (7505, "2 h 05 min"),
        (3599.9, "1 h 00 min"),
        (9.96, "10 s"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("period", [0.0, 1e9])
def test_a_bar_on_a_terminal(monkeypatch, period):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module.Bar, "period", period)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    inner = lambda: {"loss": run(Scripted(0.5), 1, label="inner").last["loss"]}  # noqa: E731
    run(Scripted(*[inner] * 8), 8, label="hostile [/red] [link]")
    drawn = sys.stderr.getvalue()
    assert "hostile [/red] [link]" in drawn and "step 8/8" in drawn and "loss 0.5" in drawn
    assert "inner: 1 step in" in drawn
    last = drawn.strip().splitlines()[-1]
    assert "8 steps in" in last and "steps: 8 done" in last


def test_the_callers_progress_gets_a_task():
    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console) as progress:
        run(NoisyDescent(), 5, progress=progress, label="a [b]")
        run(NoisyDescent(), stop=Seconds(1e-9), progress=progress)
        assert progress.live.is_started
    assert (progress.tasks[0].total, progress.tasks[0].finished) == (5, True)
    assert "a [b]: 5 steps in" in console.file.getvalue()


def test_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert run(NoisyDescent(), 2).steps == 2
