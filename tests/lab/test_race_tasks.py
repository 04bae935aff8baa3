import pytest
import torch

from steepest.lab.check import check_task
from steepest.lab.methods import get_methods
from steepest.lab.race import RaceError, RaceSettings, load_document, race
from steepest.lab.settings import DEFAULT_METHODS
from steepest.lab.tasks import load_task, task_description, task_name

CONV = '''
import neighbour
import torch
from torch import nn

class Stripes:
    """Tell horizontal from vertical stripes."""
    name = "stripes <b>"

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
        )

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["image"]), batch["label"])

    def batches(self, split, seed):
        return neighbour.batches(split, seed)

    def metrics(self, model, batch):
        return {"accuracy": (model(batch["image"]).argmax(1) == batch["label"]).float().mean()}
'''

NEIGHBOUR = """
import torch

def batches(split, seed):
    generator = torch.Generator().manual_seed(seed if split == "train" else 99)
    out = []
    for _ in range(6 if split == "train" else 2):
        label = torch.randint(2, (16,), generator=generator)
        wave = torch.sin(torch.arange(8.0))[None, None, :, None].expand(16, 1, 8, 8)
        image = torch.where(label[:, None, None, None] == 1, wave, wave.transpose(2, 3))
        out.append({"image": image + 0.3 * torch.randn(16, 1, 8, 8, generator=generator), "label": label})
    return out
"""

GPT2 = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

class TinyGPT2:
    def model(self, seed):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))

    def loss(self, model, batch):
        return model(input_ids=batch, labels=batch).loss

    def batches(self, split, seed):
        generator = torch.Generator().manual_seed(seed if split == "train" else 99)
        while True:
            start = torch.randint(32, (8, 1), generator=generator)
            yield (start + torch.arange(16)) % 32
            if split == "val":
                return
"""


def test_a_conv_net_of_the_users_races(tmp_path):
    (tmp_path / "stripes.py").write_text(CONV)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    settings = RaceSettings(
        task=f"{tmp_path}/stripes.py:Stripes", steps=30, lr_trials=1, seeds=2, finalists=2, runs=tmp_path / "runs"
    )
    document = race(settings)
    assert document["name"] == "stripes-Stripes"
    assert document["task"]["name"] == "stripes <b>"
    assert document["task"]["description"] == "Tell horizontal from vertical stripes."
    assert document["task"]["train_examples_or_tokens_per_step"] == 16
    assert {m["name"] for m in document["methods"]} == set(DEFAULT_METHODS)
    assert {trial["state"] for trial in document["trials"]} == {"complete"}
    assert "conv" in document["trials"][0]["roles"]
    assert "accuracy" in document["trials"][0]["val"]
    best = document["methods"][0]
    assert best["final"]["mean"] < 0.6  # log(2) = 0.69 at the start
    namespace = {"model": load_task(settings.task).model(0)}
    exec(best["snippet"], namespace)
    assert isinstance(namespace["optimizer"], torch.optim.Optimizer)


def test_a_hugging_face_gpt2_races(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "gpt2.py").write_text(GPT2)
    document = race(
        RaceSettings(
            task=f"{tmp_path}/gpt2.py:TinyGPT2",
            methods=("adamw", "muon"),
            steps=16,
            lr_trials=1,
            seeds=1,
            runs=tmp_path / "runs",
        )
    )
    assert {trial["state"] for trial in document["trials"]} == {"complete"}
    assert document["winner"] in ("adamw", "muon")
    assert {"embedding", "qkv"} <= set(document["trials"][0]["roles"])


def settings(**changes):
    return RaceSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ""}, "task is ''"),
        ({"methods": ()}, "at least one method"),
        ({"methods": ("adamw", "adamw")}, "adamw is there twice"),
        ({"methods": "adamw"}, "tuple"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"minutes": -1}, "minutes is -1"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"steps": 10, "minutes": 1}, "one budget"),
        ({"lr_trials": 0}, "lr_trials is 0"),
        ({"seeds": True}, "seeds is True"),
        ({"finalists": "some"}, "finalists is 'some'"),
        ({"batch": 0}, "batch is 0"),
        ({"clip": -1.0}, "clip is -1"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"workers": 0}, "workers is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"grace": 0}, "grace is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"lr_ranges": {"muon": (0.1, 0.01)}}, "learning-rate range of muon"),
        ({"lr_ranges": {"muon": (0.0, 0.01)}}, "learning-rate range of muon"),
        ({"lr_ranges": {"adam": (0.1, 1.0)}}, "'adam', which is not among the methods"),
        ({"name": "../up"}, "folder name"),
        ({"name": ".."}, "folder name"),
        ({"name": " "}, "folder name"),
        ({"name": "x" * 300}, "folder name"),
        ({"data": "no/such/file.txt"}, "not a file"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(RaceError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "txt"}, r"unknown task 'txt', did you mean 'text'\?"),
        ({"task": "missing.py:Task"}, "there is no file 'missing.py'"),
        ({"task": "digits", "methods": ("moun",)}, r"unknown method 'moun', did you mean 'muon'\?"),
        ({"task": "digits", "methods": ("missing.py:f",)}, "there is no file"),
        ({"task": "digits", "device": "cuda:99"}, "not available"),
        ({"task": "digits", "batch": 10**6}, "batches"),
    ],
)
def test_a_race_that_cannot_start_stores_nothing(changes, message, tmp_path):
    with pytest.raises(RaceError, match=message):
        race(RaceSettings(**changes, runs=tmp_path / "runs", name="r"))
    if (tmp_path / "runs" / "r" / "race.db").exists():
        with pytest.raises(RaceError, match="no race"):
            load_document(tmp_path / "runs" / "r")
    assert not (tmp_path / "runs" / "r" / "race.json").exists()


GOOD = {
    "model": "return torch.nn.Linear(2, 1)",
    "loss": "return model(batch).square().mean()",
    "batches": "return [torch.ones(4, 2)]",
}


def write(path, **changes):
    bodies = {**GOOD, **changes}
    heads = {
        "model": "model(self, seed)",
        "loss": "loss(self, model, batch)",
        "batches": "batches(self, split, seed)",
        "metrics": "metrics(self, model, batch)",
        "__init__": "__init__(self)",
    }
    methods = [f"    def {heads[name]}:\n        {body}" for name, body in bodies.items() if body is not None]
    path.write_text("import itertools, math, torch\nclass Mine:\n" + "\n".join(methods) + "\n")
    return f"{path}:Mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no method model"),
        ({"loss": None, "batches": None}, "no method loss, batches"),
        ({"__init__": "raise OSError('no data')"}, r"Mine\(\) .* raised OSError: no data"),
        ({"model": "return 3"}, r"model\(0\) .* returned int"),
        ({"model": "raise KeyError('w')"}, r"model\(0\) .* raised KeyError"),
        ({"model": "return torch.nn.ReLU()"}, "no trainable parameter"),
        ({"loss": "return 1.0"}, "returned float; it must be a scalar"),
        ({"loss": "return model(batch)"}, r"has shape \(4, 1\)"),
        ({"loss": "return model(batch).mean().detach()"}, "not differentiable"),
        ({"loss": "return model(batch).mean() * math.nan"}, "is nan at the start"),
        ({"loss": "return batch.clone().requires_grad_().mean()"}, "does not depend on the model"),
        ({"loss": "return model(batch[:, :1]).mean()"}, r"loss\(model, batch\) .* raised RuntimeError"),
        ({"batches": "return []"}, "gives no batch"),
        ({"batches": "return 3"}, r"batches\('train', 0\) .* raised TypeError"),
        (
            {"batches": "return [torch.ones(4, 2)] if split == 'train' else []"},
            r"batches\('val', 0\) .* gives no batch",
        ),
        ({"batches": "return itertools.repeat(torch.ones(4, 2))"}, "it must end"),
        (
            {"batches": "self.n = getattr(self, 'n', 0) + 1; return [torch.full((4, 2), float(self.n))]"},
            "other batches at each call",
        ),
        ({"metrics": "return {'a': 1 / 0}"}, "raised ZeroDivisionError"),
        ({"metrics": "return 3"}, "metrics"),
    ],
)
def test_a_wrong_task_is_one_clear_message(tmp_path, changes, message):
    spec = write(tmp_path / "mine.py", **changes)
    with pytest.raises(RaceError, match=message) as caught:
        check_task(load_task(spec), spec, torch.device("cpu"))
    assert "mine.py:Mine" in str(caught.value)


def test_the_good_task_is_good(tmp_path):
    spec = write(tmp_path / "mine.py")
    task = load_task(spec)
    check_task(task, spec, torch.device("cpu"))
    assert task_name(task) == "Mine"
    assert task_description(task) == ""


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("class Other: pass\nclass Third: pass\n", "Mine", "no class 'Mine'; the classes there: Other, Third"),
        ("from pathlib import Path\n", "Mine", "there are no classes in it"),
        ("def Mine(): pass\n", "Mine", "is a function; it must be a class"),
        ("import nosuchmodule\n", "Mine", r"cannot be loaded: ModuleNotFoundError: .*nosuchmodule.* \(line 1\)"),
        ("x = 1\nraise SystemExit(3)\n", "Mine", r"cannot be loaded: SystemExit.*\(line 2\)"),
        ("def broken(:\n", "Mine", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_file_that_cannot_give_the_task(tmp_path, text, spec, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(RaceError, match=message):
        load_task(f"{path}:{spec}")


def test_options_that_do_not_fit_the_task(tmp_path):
    spec = write(tmp_path / "mine.py")
    with pytest.raises(RaceError, match="decides its batch size itself"):
        load_task(spec, batch=3)
    with pytest.raises(RaceError, match="does not read a text file"):
        load_task("digits", data="x.txt")
    with pytest.raises(RaceError, match="'text' is not text-moe"):
        load_task("text", balance="phi")
    for balance, message in (("even", "balance must be one of"), ("phi=much", "NAME=STRENGTH"), ("phi=-1", "got -1")):
        with pytest.raises(RaceError, match=f"balance is '{balance}'.*{message}"):
            load_task("text-moe", balance=balance)


def test_experts_are_balanced_as_asked(tmp_path):
    settings = RaceSettings(
        task="text-moe", balance="phi=0.3", batch=2, methods=("adamw",), steps=10, lr_trials=1, seeds=1, runs=tmp_path
    )
    assert settings.run_name == "text-moe-phi-0.3"
    document = race(settings)
    assert "balance phi of strength 0.3" in document["task"]["description"]
    assert document["settings"]["balance"] == "phi=0.3"
    found = document["trials"][0]["val"]
    assert len(found["max_violation"]) == len(found["soft_max_violation"]) == len(found["loss"])
    assert 0 <= found["soft_max_violation"][-1] < found["max_violation"][-1] < 3
    with pytest.raises(RaceError, match=r"balance was phi=0\.3, now switch"):
        race(RaceSettings(**{**vars(settings), "balance": "switch", "name": settings.run_name}))


def test_a_text_of_the_users(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("the cat sat on the mat. a dog ran to the cat; " * 400)
    task = load_task("text", data=path, batch=2)
    check_task(task, "text", torch.device("cpu"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(RaceError, match=r"empty\.txt"):
        task = load_task("text", data=empty)
        check_task(task, "text", torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(model, lr): pass\n", "no learning-rate range"),
        ("def f(model, lr): pass\nf.lr_range = (1, 0.1)\n", "lr_range of"),
        ("f = 3\n", "not a function"),
        ("def g(model, lr): pass\n", "no function 'f'; the functions there: g"),
    ],
)
def test_a_method_of_the_users_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(RaceError, match=message):
        get_methods((f"{path}:f",), {})


def test_a_method_that_returns_no_optimizer(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(model, lr): return lr\nf.lr_range = (0.1, 1.0)\n")
    with pytest.raises(RaceError, match="returned float; it must return a"):
        race(RaceSettings(task="digits", methods=(f"{path}:f",), steps=2, runs=tmp_path / "runs"))


def test_the_report_of_a_missing_run(tmp_path):
    with pytest.raises(RaceError, match="there is no race in"):
        load_document(tmp_path / "nothing")
    (tmp_path / "race.json").write_text("{half")
    with pytest.raises(RaceError, match="cannot be read"):
        load_document(tmp_path)
    with pytest.raises(RaceError, match="holds no race"):
        load_document(tmp_path, storage=f"sqlite:///{tmp_path / 'x.db'}")
