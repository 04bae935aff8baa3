import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from steepest import __version__
from steepest.lab import atlas, cli
from steepest.lab._guard import user_message

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TASKS = """
import torch
from torch import nn

class Good:
    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def loss(self, model, batch):
        return (model(batch) - batch.sum(-1, keepdim=True)).square().mean()

    def batches(self, split, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            yield torch.randn(16, 4, generator=generator)

class NotANumber(Good):
    def loss(self, model, batch):
        return super().loss(model, batch) * float("nan")

class Empty(Good):
    def batches(self, split, seed):
        return []

class Incomplete:
    def model(self, seed):
        return nn.Linear(1, 1)

class NeedsMore(Good):
    def __init__(self, more):
        pass

not_a_class = 3

def wants(width):
    return nn.Linear(width, 3)

def breaks():
    raise RuntimeError("boom [/red]")

def no_model():
    return "text"

class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.thing = nn.Parameter(torch.zeros(7, 5))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STEEPEST_DEBUG", raising=False)
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "syntax.py").write_text("def broken(:\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "muon_polar.json").write_text("{")
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "race.json").write_text('{"format": 9}')
    return tmp_path


def run(line: str) -> Result:
    return CliRunner().invoke(cli.app, shlex.split(line), prog_name="steepest")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


WRONG = [
    ("frobnicate", "frobnicate"),
    ("atlas extra", "extra"),
    ("atlas --frobnicate", "--frobnicate"),
    ("atlas --json --markdown", "--json and --markdown"),
    ("atlas --results nowhere", "results is 'nowhere'"),
    ("atlas --results evidence", "muon_polar.json: not an evidence file"),
    ("study", "SLUG"),
    ("study nothing", "no study is named 'nothing'"),
    ("study muon_pola", "did you mean 'muon_polar'"),
    ("study ../cli", "no study is named '../cli'"),
    ("study muon_polar --scale huge", "scale must be one of smoke, desktop, gpu"),
    ("study muon_polar --scale smoke --record", "record at scale desktop"),
    ("roles", "MODEL"),
    ("roles nothing", "MODEL is 'nothing'"),
    ("roles gpt:", "MODEL is 'gpt:'"),
    ("roles missing.py:Net", "missing.py"),
    ("roles tasks.py:nothing", "nothing"),
    ("roles tasks.py:wants", "'width'"),
    ("roles tasks.py:breaks", "boom [/red]"),
    ("roles tasks.py:no_model", "must give a torch.nn.Module, got str"),
    ("roles syntax.py:x", "SyntaxError"),
    ("roles no_such_package.models:net", "no_such_package"),
    ("roles torch.nn:Nothing", "torch.nn has no 'Nothing'"),
    ("roles hf:nothing", "transformers knows no architecture 'nothing'"),
    ("roles mlp --override linear", "--override is 'linear'"),
    ("roles mlp --override x=linear", "'x'"),
    ("roles mlp --override *weight=wheel", "wheel"),
    ("report", "RUN"),
    ("report nothing", "RUN is 'nothing'"),
    ("report runs", "no race in 'runs'"),
    ("report old", "format"),
    ("race text --task digits", "given twice"),
    ("race digits --methods adamw,,muon", "--methods"),
    ("race digits --steps 0", "steps is 0"),
    ("race digits --steps many", "--steps"),
    ("race digits --steps 5 --minutes 1", "steps=5 and minutes=1"),
    ("race digits --minutes -1", "minutes is -1"),
    ("race digits --lr-range muon", "--lr-range is 'muon'"),
    ("race digits --lr-range muon=a:b", "--lr-range is 'muon=a:b'"),
    ("race digits --lr-range muon=1:0.1", "learning-rate range of muon"),
    ("race digits --lr-range muon=1:2 --lr-range muon=2:3", "twice for 'muon'"),
    ("race digits --lr-range lamb=1:2", "'lamb'"),
    ("race digits --lr-trials 0", "lr_trials is 0"),
    ("race digits --seeds 0", "seeds is 0"),
    ("race digits --finalists few", "--finalists is 'few'"),
    ("race digits --batch 0", "batch is 0"),
    ("race digits --clip 0", "clip is 0"),
    ("race digits --device abacus", "device is 'abacus'"),
    ("race digits --dtype int8", "dtype is 'int8'"),
    ("race digits --workers 0", "workers is 0"),
    ("race digits --name a/b", "name is 'a/b'"),
    ("race text --data nowhere.txt", "data is 'nowhere.txt'"),
]
# These are found out when the race is set up; its folder may then be there, but no race and no report.
WRONG_TASKS = [
    ("race nothing", "unknown task 'nothing'"),
    ("race missing.py:Task", "missing.py"),
    ("race syntax.py:Task", "SyntaxError"),
    ("race tasks.py:not_a_class", "not_a_class"),
    ("race tasks.py:Incomplete", "no method loss, batches"),
    ("race tasks.py:NeedsMore", "'more'"),
    ("race tasks.py:NotANumber --steps 5", "nan"),
    ("race tasks.py:Empty --steps 5", "no batch"),
    ("race tasks.py:Good --batch 3", "batch=3"),
    ("race digits --methods adam", "did you mean 'adamw'"),
    ("race digits --data empty.txt", "does not read a text file"),
    ("race text --data binary.txt", "binary.txt"),
    ("race text --data empty.txt", "empty.txt is empty"),
    ("race digits --storage nonsense", "storage is 'nonsense'"),
]


def check_one_message(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("steepest")
    assert message in lines[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_use_is_one_message_and_writes_nothing(here: Path, line: str, message: str) -> None:
    before = files(here)
    check_one_message(run(line), message)
    assert files(here) == before


@pytest.mark.parametrize(("line", "message"), WRONG_TASKS)
def test_a_wrong_task_is_one_message_and_makes_no_race(here: Path, line: str, message: str) -> None:
    before = files(here)
    check_one_message(run(line), message)
    assert not {name for name in files(here) - before if name.endswith((".json", ".html", ".ckpt"))}


def test_a_file_where_a_folder_must_be_is_refused(here: Path) -> None:
    check_one_message(run("race digits --steps 5 --out empty.txt"), "empty.txt")
    assert (here / "empty.txt").read_bytes() == b""


def test_help_and_version() -> None:
    top = run("--help")
    assert top.exit_code == 0
    for name in ("race", "report", "roles", "study", "atlas", "methods"):
        assert name in top.stdout
        assert run(f"{name} --help").exit_code == 0
    assert run("").stdout == top.stdout
    assert run("--version").stdout.strip() == __version__


def test_a_race_runs_and_its_report_is_rebuilt(here: Path) -> None:
    line = "race tasks.py:Good --methods adamw,sgd --steps 10 --lr-trials 1 --seeds 1 --name 'a[b] <c>'"
    result = run(line)
    assert result.exit_code == 0, result.output
    folder = here / "runs" / "a[b] <c>"
    document = json.loads((folder / "race.json").read_text())
    assert document["status"] == "complete"
    assert {method["name"] for method in document["methods"]} == {"adamw", "sgd"}
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    for wanted in ("'a[b] <c>'", "'runs/a[b] <c>'"):
        again = run(f"report {wanted}")
        assert again.exit_code == 0, again.output
        assert "report.html" in again.stdout
    assert (folder / "report.html").read_text() == page


def test_the_command_line_is_kept_without_passwords() -> None:
    typed = ["/usr/bin/steepest", "race", "a b.py:T", "--storage", "postgresql://me:secret@host/db"]
    assert cli.command_line(typed) == "steepest race 'a b.py:T' --storage 'postgresql://me:***@host/db'"


@pytest.mark.parametrize("model", ["gpt", "gpt-moe", "mlp", "resnet", "tasks.py:Good", "tasks.py:Strange", "hf:gpt2"])
def test_roles_of_all_kinds_of_models(here: Path, model: str) -> None:
    if model.startswith("hf:"):
        pytest.importorskip("transformers")
    result = run(f"roles {model} --json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert rows and {"name", "shape", "role", "reason", "layout"} <= set(rows[0])
    assert rows[0]["name"].split(".")[-1] in run(f"roles {model}").stdout.replace("\n", "")


def test_roles_are_strict_and_overridden_on_demand(here: Path) -> None:
    assert run("roles mlp --strict").exit_code == 0
    assert run("roles tasks.py:Strange").exit_code == 0
    strict = run("roles tasks.py:Strange --strict")
    assert strict.exit_code == 1
    assert "ambiguous: thing" in strict.stderr
    assert run("roles tasks.py:Strange --strict --override thing=linear").exit_code == 0


def test_study_prints_a_table_or_json(here: Path) -> None:
    shown = run("study muon_polar --scale smoke")
    assert shown.exit_code == 0, shown.output
    assert "C1" in shown.stdout and "holds" in shown.stdout
    document = json.loads(run("study muon_polar --scale smoke --json").stdout)
    assert document["paper"] == "muon_polar"
    assert not (here / "results").exists()


def test_atlas_and_methods_in_all_forms(here: Path) -> None:
    (here / "evidence" / "muon_polar.json").unlink()
    assert "muon_polar" in run("atlas --results evidence").stdout
    assert len(json.loads(run("atlas --json --results evidence").stdout)) >= 45
    assert run("atlas --markdown --results evidence").stdout.count("\n| `") >= 45
    assert "muon" in run("methods").stdout
    assert {"name", "title", "description", "lr_range"} <= set(json.loads(run("methods --json").stdout)[0])


def fail_with(error: BaseException):
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_bug_is_called_a_bug(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "entries", fail_with(ZeroDivisionError("oops")))
    result = run("atlas")
    assert result.exit_code == 1
    assert "this is a bug in steepest (ZeroDivisionError: oops)" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("STEEPEST_DEBUG", "1")
    assert "Traceback" in run("atlas").stderr


def test_ctrl_c_exits_with_130(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "entries", fail_with(KeyboardInterrupt()))
    result = run("atlas")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_only_what_is_raised_on_purpose_is_the_users_mistake() -> None:
    from steepest.geometry import polar

    def message(function) -> str | None:
        try:
            function()
        except Exception as error:
            return user_message(error)
        raise AssertionError("nothing was raised")

    import torch

    assert "steps" in str(message(lambda: polar(torch.ones(2, 2), "newton_schulz", steps=0)))
    assert message(lambda: int("x")) is None
    assert message(lambda: json.loads("{")) is None
    assert "nowhere" in str(message(lambda: Path("nowhere").read_text()))
    assert message(fail_with(ValueError("from a test, not from the package"))) is None


def steepest(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steepest", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, **options)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    wrong = steepest("study", "nothing", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    assert steepest("--version", cwd=tmp_path).stdout.strip() == __version__
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_heavy_library() -> None:
    code = "import sys, steepest.lab.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert not {"torch", "numpy", "optuna", "plotly", "sklearn", "transformers", "jinja2"} & set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["atlas"], ["atlas", "--json"], ["--help"]])
def test_a_closed_pipe_is_no_error(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "steepest", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


def test_an_interrupted_study_keeps_what_it_measured(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "steepest", "study", "muon_polar", "--runs", str(tmp_path / "kept")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "C2" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 130
    assert "Traceback" not in rest
    assert [path.name for path in (tmp_path / "kept").rglob("*.json")] == ["claim-C1.json"]


def test_colours_and_widths_are_respected(tmp_path: Path) -> None:
    for width in ("40", "200"):
        command = [sys.executable, "-m", "steepest", "atlas"]
        environment = {**ENVIRONMENT, "COLUMNS": width, "NO_COLOR": "1"}
        shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        assert "\x1b" not in shown
        assert max(map(len, shown.splitlines())) <= int(width)
