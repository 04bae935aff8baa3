import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from loop_steppers import NoisyDescent, Scripted

from steepest.loop import run


def quiet(*args, **options):
    return run(*args, progress=False, **options)


@pytest.fixture(autouse=True)
def handlers():
    """Each test must leave the handlers as they were."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture
def own_sigterm():
    heard = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, previous)


def send(*numbers):
    """A step during which the signals arrive."""

    def step():
        for number in numbers:
            signal.raise_signal(number)
        return {"loss": 2.0}

    return step


def test_ctrl_c_finishes_the_step_saves_and_goes_on_later(tmp_path):
    path = tmp_path / "run.ckpt"
    interrupted = NoisyDescent()

    def press(step, metrics):
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        quiet(interrupted, 20, checkpoint=path, callbacks=press, record_every=3)
    assert interrupted.calls == 7 and torch.load(path, weights_only=True)["step"] == 7
    whole, second = NoisyDescent(), NoisyDescent(1)
    expected = quiet(whole, 20, record_every=3)
    result = quiet(second, 20, checkpoint=path, record_every=3)
    assert result.resumed_from == 7 and torch.equal(whole.x, second.x)
    assert result.history == expected.history and result.recorded_steps == expected.recorded_steps


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    path, stepper = tmp_path / "run.ckpt", Scripted(1.0, send(signal.SIGINT, signal.SIGINT), 3.0)
    with pytest.raises(KeyboardInterrupt):
        quiet(stepper, 3, checkpoint=path, checkpoint_every=1)
    assert torch.load(path, weights_only=True)["step"] == 1


def test_a_handler_that_returns_makes_the_run_return(tmp_path, own_sigterm):
    path = tmp_path / "run.ckpt"
    result = quiet(Scripted(1.0, send(signal.SIGTERM), 3.0), 3, checkpoint=path)
    assert result.stopped_by == "interrupted" and result.steps == 2 and own_sigterm == [signal.SIGTERM]
    assert quiet(Scripted(1.0, 2.0, 3.0), 3, checkpoint=path).history["loss"] == [1.0, 2.0, 3.0]


def test_a_signal_in_the_last_step_is_not_lost(tmp_path, own_sigterm):
    result = quiet(Scripted(1.0, send(signal.SIGTERM)), 2, checkpoint=tmp_path / "run.ckpt")
    assert result.stopped_by == "steps: 2 done" and own_sigterm == [signal.SIGTERM]


def test_without_a_checkpoint_signals_are_left_alone():
    handlers = []
    quiet(Scripted(lambda: handlers.append(signal.getsignal(signal.SIGINT)) or {"loss": 1.0}), 1)
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_an_ignored_signal_stays_ignored(tmp_path):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert quiet(Scripted(send(signal.SIGINT), 2.0), 2, checkpoint=tmp_path / "run.ckpt").steps == 2
    finally:
        signal.signal(signal.SIGINT, previous)


def test_handlers_are_restored_after_an_exception(tmp_path):
    with pytest.raises(RuntimeError):
        quiet(Scripted(RuntimeError("broke")), 1, checkpoint=tmp_path / "run.ckpt")


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    seen = []

    def work():
        step = lambda: seen.append(signal.getsignal(signal.SIGINT)) or {"loss": 1.0}  # noqa: E731
        seen.append(quiet(Scripted(step), 1, checkpoint=tmp_path / "run.ckpt").steps)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT), 1]


def test_a_run_inside_a_step_leaves_the_signal_to_the_outer_run(tmp_path, own_sigterm):
    inner = []

    def step():
        inner.append(quiet(Scripted(1.0, send(signal.SIGTERM), 3.0), 3, checkpoint=tmp_path / "in", resume=False))
        return {"loss": 0.0}

    outer = quiet(Scripted(step, 1.0), 2, checkpoint=tmp_path / "out")
    assert inner[0].steps == 3 and outer.steps == 1 and outer.stopped_by == "interrupted"
    assert own_sigterm == [signal.SIGTERM]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_the_process_ends_as_the_signal_says(tmp_path, number, code):
    path = tmp_path / "run.ckpt"
    script = (
        "import sys, signal\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from loop_steppers import NoisyDescent\n"
        "from steepest.loop import run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"press = lambda step, metrics: signal.raise_signal({int(number)}) if step == 3 else None\n"
        f"run(NoisyDescent(), 10, callbacks=press, checkpoint={str(path)!r})\n"
        "print('not reached')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout == ""
    assert f"interrupted · saved {path}" in done.stderr
    assert torch.load(path, weights_only=True)["step"] == 3
