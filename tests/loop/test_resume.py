import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_steppers import NoisyDescent, Scripted, Training
from torch import nn

from steepest.loop import Diverged, Seconds, Tolerance, run
from steepest.loop.checkpoint import FORMAT, KIND


def quiet(*args, **options):
    return run(*args, progress=False, **options)


def same(a, b):
    """Bitwise equal, nan included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def same_history(a, b):
    assert a.history.keys() == b.history.keys()
    for name in a.history:
        assert same(torch.tensor(a.history[name]), torch.tensor(b.history[name])), name
    assert a.recorded_steps == b.recorded_steps


@pytest.mark.parametrize("record_every", [1, 7])
def test_a_stepper_resumes_to_the_bit(tmp_path, record_every):
    whole, first, second = NoisyDescent(), NoisyDescent(), NoisyDescent(seed=9)
    expected = quiet(whole, 100, record_every=record_every)
    quiet(first, 40, checkpoint=tmp_path / "run.ckpt", record_every=record_every)
    result = quiet(second, 100, checkpoint=tmp_path / "run.ckpt", record_every=record_every)
    assert second.calls == 60 and result.resumed_from == 40 and result.steps == 100
    assert same(whole.x, second.x)
    assert torch.equal(whole.generator.get_state(), second.generator.get_state())
    same_history(expected, result)
    assert result.recorded_seconds == sorted(result.recorded_seconds)


@settings(max_examples=15, deadline=None)
@given(split=st.integers(1, 19), record_every=st.integers(1, 6), every=st.integers(1, 6))
def test_any_split_gives_the_same_bits(split, record_every, every):
    whole, second = NoisyDescent(), NoisyDescent(seed=9 if split > every else 0)
    expected = quiet(whole, 20, record_every=record_every)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ckpt"
        options = {"checkpoint": path, "checkpoint_every": every, "record_every": record_every}
        with contextlib.suppress(InterruptedError):
            quiet(NoisyDescent(), 20, callbacks=fail_at(split), **options)
        result = quiet(second, 20, **options)
    assert result.resumed_from == (split - 1) // every * every
    assert same(whole.x, second.x)
    same_history(expected, result)


def fail_at(last):
    def callback(step, metrics):
        if step == last:
            raise InterruptedError

    return callback


def test_a_training_resumes_to_the_bit(tmp_path):
    whole = Training()
    expected = whole.run(100)
    Training().run(40, tmp_path / "run.ckpt")
    torch.manual_seed(999)
    second = Training(seed=3)
    result = second.run(100, tmp_path / "run.ckpt")
    assert second.data.served == 100
    assert all(same(a, b) for a, b in zip(whole.tensors(), second.tensors(), strict=True))
    assert whole.scheduler.get_last_lr() == second.scheduler.get_last_lr()
    same_history(expected, result)


def test_without_rng_the_global_generator_is_left_alone(tmp_path):
    Training().run(4, tmp_path / "run.ckpt", rng=False)
    second = Training(seed=3)
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    quiet(
        second.optimizer,
        4,
        closure=second.closure,
        scheduler=second.scheduler,
        state={"model": second.model, "data": second.data},
        checkpoint=tmp_path / "run.ckpt",
        rng=False,
    )
    assert torch.equal(expected, torch.get_rng_state())
    with pytest.raises(ValueError, match="pass rng=False"):
        Training().run(5, tmp_path / "run.ckpt", rng=True)


def test_parameters_are_saved_even_without_the_model(tmp_path):
    def make():
        x = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.9)

        def closure():
            optimizer.zero_grad()
            loss = x.square().sum()
            loss.backward()
            return loss

        return x, optimizer, closure

    x, optimizer, closure = make()
    quiet(optimizer, 10, closure=closure)
    y, optimizer, closure = make()
    quiet(optimizer, 4, closure=closure, checkpoint=tmp_path / "a")
    z, optimizer, closure = make()
    quiet(optimizer, 10, closure=closure, checkpoint=tmp_path / "a")
    assert same(x.detach(), z.detach()) and not same(x.detach(), y.detach())


def test_a_generator_can_be_part_of_the_state(tmp_path):
    def draw(steps):
        generator = torch.Generator().manual_seed(1)
        stepper = Scripted(*[lambda: {"loss": torch.rand(1, generator=generator)}] * 6)
        return quiet(stepper, steps, state={"generator": generator}, checkpoint=tmp_path / "g")

    first = draw(2).history["loss"]
    whole = draw(6).history["loss"]
    generator = torch.Generator().manual_seed(1)
    assert whole == [torch.rand(1, generator=generator).item() for _ in range(6)] and whole[:2] == first


@pytest.mark.parametrize("kill_at", [1, 23])
def test_kill_9_in_the_middle_of_a_step_and_run_again(tmp_path, kill_at):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from loop_steppers import Training\n"
        "training = Training()\n"
        "def closure(original=training.closure):\n"
        "    loss = original()\n"
        "    if training.data.served == int(sys.argv[1]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return loss\n"
        "training.closure = closure\n"
        f"result = training.run(30, {str(tmp_path / 'run.ckpt')!r}, checkpoint_every=5)\n"
        "torch.save((training.tensors(), result.history, result.resumed_from), sys.argv[2])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def start(at, out):
        command = [sys.executable, str(script), str(at), str(out)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    killed = start(kill_at, tmp_path / "never")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = start(0, tmp_path / "end")
    assert again.returncode == 0, again.stderr
    tensors, history, resumed_from = torch.load(tmp_path / "end")
    assert resumed_from == kill_at // 5 * 5
    whole = Training()
    expected = whole.run(30)
    assert all(same(a, b) for a, b in zip(whole.tensors(), tensors, strict=True))
    assert history == expected.history


def test_a_finished_run_is_returned_at_once(tmp_path):
    path = tmp_path / "run.ckpt"
    first = quiet(NoisyDescent(), 10, checkpoint=path, record_every=4)
    content = path.read_bytes()
    again = NoisyDescent()
    second = quiet(again, 10, checkpoint=path, record_every=4)
    assert again.calls == 0 and path.read_bytes() == content
    assert second.recorded_steps == [4, 8, 10] and second.stopped_by == first.stopped_by
    same_history(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"stop": Tolerance("loss", 0.5)},
        {"stop": Diverged(factor=None)},
        {"stop": lambda r: "low" if r.metrics["loss"] < 0.5 else None},
        {"callbacks": lambda s, m: "three" if s == 3 else None},
    ],
)
def test_a_run_that_a_rule_ended_stays_ended(tmp_path, options):
    script = [1.0, 1.0, 0.1 if "Diverged" not in repr(options) else math.inf, 1.0, 1.0]
    first = quiet(Scripted(*script), 5, checkpoint=tmp_path / "run.ckpt", **options)
    assert first.steps == 3
    again = quiet(Scripted(*script), 5, checkpoint=tmp_path / "run.ckpt", **options)
    assert again.steps == 3 and again.stopped_by == first.stopped_by
    if "stop" in options:
        assert quiet(Scripted(*script), 5, checkpoint=tmp_path / "run.ckpt").steps == 5
    assert quiet(Scripted(*script), 2, checkpoint=tmp_path / "run.ckpt", resume=False).steps == 2


def test_patience_counts_across_a_resume(tmp_path):
    script, rule = [1.0, 0.1, 0.1, 0.1, 0.1], Tolerance("loss", 0.5, patience=3)
    quiet(Scripted(*script), 3, stop=rule, checkpoint=tmp_path / "run.ckpt")
    assert quiet(Scripted(*script), 5, stop=rule, checkpoint=tmp_path / "run.ckpt").steps == 4


def test_seconds_count_across_resumes(tmp_path):
    path = tmp_path / "run.ckpt"
    first = quiet(NoisyDescent(), 5, checkpoint=path)
    content = torch.load(path, weights_only=True)
    assert content["seconds"] == first.seconds
    torch.save({**content, "seconds": 1000.0}, path)
    second = quiet(NoisyDescent(), 6, checkpoint=path)
    assert 1000 < second.seconds < 1100 and second.recorded_seconds[-1] > 1000
    third = NoisyDescent()
    result = quiet(third, stop=Seconds(900), checkpoint=path)
    assert third.calls == 0 and result.stopped_by.startswith("seconds")


def test_saves_every_n_steps_and_after_so_many_seconds(tmp_path):
    path, saved = tmp_path / "run.ckpt", []

    def look(step, metrics):
        if path.exists():
            saved.append(torch.load(path, weights_only=True)["step"])

    quiet(NoisyDescent(), 7, checkpoint=path, checkpoint_every=3, callbacks=look)
    assert saved == [3, 3, 3, 6]
    saved.clear()
    quiet(NoisyDescent(), 4, checkpoint=path, checkpoint_seconds=1e-9, callbacks=look, resume=False)
    assert saved == [7, 1, 2, 3]


def test_a_step_that_raises_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "deep" / "er" / "run.ckpt"
    with pytest.raises(RuntimeError, match="broke"):
        quiet(Scripted(1.0, 2.0, 3.0, RuntimeError("broke")), 6, checkpoint=path, checkpoint_every=2)
    assert [p.name for p in path.parent.iterdir()] == ["run.ckpt"]
    result = quiet(Scripted(1.0, 2.0, 5.0, 6.0), 4, checkpoint=path)
    assert result.resumed_from == 2 and result.history["loss"] == [1.0, 2.0, 5.0, 6.0]


def test_a_resumed_run_forgets_an_interrupted_record_off_the_grid(tmp_path):
    path = tmp_path / "run.ckpt"
    quiet(Scripted(1.0, 2.0, {"loss": 3.0, "odd": 1.0}), 3, record_every=2, checkpoint=path)
    result = quiet(Scripted(*[1.0] * 3, 4.0), 4, record_every=2, checkpoint=path)
    assert result.history == {"loss": [2.0, 4.0]} and result.recorded_steps == [2, 4]


def test_what_a_checkpoint_cannot_hold_is_refused_before_the_first_step(tmp_path):
    stepper = Scripted(1.0)
    stepper.state_dict = lambda: {"position": 0, "nested": [{"f": slice(3)}]}
    with pytest.raises(TypeError, match=r"stepper\['nested'\]\[0\]\['f'\] is a builtins.slice"):
        quiet(stepper, 1, checkpoint=tmp_path / "run.ckpt")
    assert stepper.position == 0 and not list(tmp_path.iterdir())


def saved_run(path, **changes):
    quiet(NoisyDescent(), 5, checkpoint=path)
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


class Evil:
    def __reduce__(self):
        return (os.system, ("echo never",))


BROKEN = {
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "text": (lambda p: p.write_text("hello"), "damaged"),
    "pickle": (lambda p: torch.save(Evil(), p), "damaged"),
    "cut": (lambda p: (saved_run(p), p.write_bytes(p.read_bytes()[:-200])), "damaged"),
    "foreign": (lambda p: torch.save({"model": torch.ones(2)}, p), "not written by steepest.run"),
    "list": (lambda p: torch.save([1, 2], p), "not written by steepest.run"),
    "newer": (lambda p: saved_run(p, format=FORMAT + 1), "of a newer steepest"),
    "bad format": (lambda p: saved_run(p, format="x"), r"not what it should be \(format\)"),
    "rng": (lambda p: saved_run(p, rng=None), "pass rng=False"),
    "rng content": (lambda p: saved_run(p, rng={"cpu": torch.zeros(3)}), "random number generator does not take"),
    "missing": (lambda p: torch.save({"kind": KIND, "format": 1}, p), "not what it should be"),
    "negative": (lambda p: saved_run(p, step=-1), "not what it should be"),
    "history": (lambda p: saved_run(p, history={"metrics": {}}), "history cannot be read"),
    "ragged": (
        lambda p: saved_run(p, history={"metrics": {}, "steps": torch.ones(2), "seconds": torch.ones(3), "last": None}),
        "history cannot be read",
    ),
    "parts": (lambda p: saved_run(p, parts={"other": {}}), "holds the state of"),
    "stepper": (lambda p: saved_run(p, stepper="Muon"), "of a run of Muon, not of NoisyDescent"),
    "past": (lambda p: quiet(NoisyDescent(), 20, checkpoint=p), "at step 20, past steps=10"),
    "shape": (
        lambda p: saved_run(p, parts={"stepper": {"x": torch.ones(2), "generator": torch.Generator().get_state()}}),
        r"stepper does not take its state: x has shape \(2,\)",
    ),
    "key": (lambda p: saved_run(p, parts={"stepper": {}}), "stepper does not take its state: 'x'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_resumed(tmp_path, case):
    path = tmp_path / "run.ckpt"
    write, text = BROKEN[case]
    write(path)
    content, stepper = path.read_bytes(), NoisyDescent()
    x, state = stepper.x.clone(), stepper.generator.get_state()
    with pytest.raises(ValueError, match=text) as caught:
        quiet(stepper, 10, checkpoint=path, rng="rng" in case)
    assert str(path) in str(caught.value) and "resume=False" in str(caught.value)
    assert stepper.calls == 0 and torch.equal(stepper.x, x) and torch.equal(stepper.generator.get_state(), state)
    assert path.read_bytes() == content
    assert quiet(stepper, 2, checkpoint=path, resume=False).steps == 2


def test_a_state_that_fits_in_part_is_taken_back(tmp_path):
    path = tmp_path / "run.ckpt"
    Training().run(4, path)
    content = torch.load(path, weights_only=True)
    content["parts"]["data"] = {"generator": torch.zeros(3)}
    torch.save(content, path)
    training = Training(seed=8)
    before = [t.clone() for t in training.tensors()]
    rate = training.scheduler.get_last_lr()
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match="data does not take its state"):
        training.run(8, path)
    assert all(same(a, b) for a, b in zip(before, training.tensors(), strict=True))
    assert rate == training.scheduler.get_last_lr() and torch.equal(generator, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_resume_to_the_bit(tmp_path):
    def draw(steps, path=None):
        stepper = Scripted(*[lambda: {"loss": torch.rand(1, device="cuda")}] * 6)
        return quiet(stepper, steps, checkpoint=path, rng=True if path else None).history["loss"]

    torch.cuda.manual_seed(1)
    whole = draw(6)
    torch.cuda.manual_seed(1)
    draw(2, tmp_path / "c")
    torch.cuda.manual_seed(2)
    assert draw(6, tmp_path / "c") == whole
