import pytest
import torch
from loop_steppers import NoisyDescent, Scripted
from torch import nn

from steepest.loop import Diverged, run

MODEL = nn.Linear(2, 1)
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)


def closure():
    raise AssertionError("nothing may run")


class NoState:
    def step(self):
        raise AssertionError("nothing may run")


WRONG = {
    "steps 0": ({"steps": 0}, "steps must be a positive integer, got 0"),
    "steps negative": ({"steps": -3}, "steps must be a positive integer, got -3"),
    "steps float": ({"steps": 10.0}, "steps must be a positive integer, got 10.0"),
    "steps bool": ({"steps": True}, "steps must be a positive integer, got True"),
    "no end": ({"steps": None}, "nothing would end this run"),
    "not a stepper": ({"stepper": 3}, r"stepper must have step\(\), .*; int has no step\(\)"),
    "no state": ({"stepper": NoState()}, r"NoState has no state_dict\(\)"),
    "class": ({"stepper": NoisyDescent}, "got the class NoisyDescent"),
    "module": ({"stepper": MODEL}, "got the module Linear: pass its optimizer"),
    "no closure": ({"stepper": SGD}, r"\(SGD\) needs closure=.*got None"),
    "bad closure": ({"stepper": SGD, "closure": 1.0}, "needs closure=.*got 1.0"),
    "closure with stepper": ({"closure": closure}, "closure= goes with a torch optimizer only"),
    "scheduler with stepper": (
        {"scheduler": torch.optim.lr_scheduler.ConstantLR(SGD)},
        "scheduler= goes with a torch optimizer only",
    ),
    "bad scheduler": ({"stepper": SGD, "closure": closure, "scheduler": 0.1}, "scheduler must be a learning-rate"),
    "plateau": (
        {"stepper": SGD, "closure": closure, "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(SGD)},
        "ReduceLROnPlateau needs a metric",
    ),
    "state list": ({"state": [MODEL]}, "state must be a mapping of names"),
    "state value": ({"state": {"n": 3}}, r"state\['n'\] must be an object with state_dict.*got 3"),
    "state class": ({"state": {"n": NoisyDescent}}, "got the class NoisyDescent"),
    "state name": ({"state": {"stepper": MODEL}}, "'stepper' cannot be used as a name"),
    "callback": ({"callbacks": [print, 3]}, "callbacks must be a function or a list of functions, got 3"),
    "callback text": ({"callbacks": "log"}, "callbacks must be a function"),
    "rule": ({"stop": 5}, "stop must be a function or a list of functions, got 5"),
    "rule class": ({"stop": [Diverged]}, r"Diverged is a class; make an instance of it: Diverged\(...\)"),
    "record_every": ({"record_every": 0}, "record_every must be a positive integer"),
    "progress": ({"progress": "yes"}, "progress must be True, False or a rich.progress.Progress, got 'yes'"),
    "every without path": ({"checkpoint_every": 5}, "checkpoint_every=5 needs checkpoint="),
    "seconds without path": ({"checkpoint_seconds": 5}, "checkpoint_seconds=5 needs checkpoint="),
    "checkpoint kind": ({"checkpoint": 3}, "checkpoint must be a path, got 3"),
    "every": ({"checkpoint": "a", "checkpoint_every": 0}, "checkpoint_every must be a positive integer"),
    "seconds": ({"checkpoint": "a", "checkpoint_seconds": 0}, "checkpoint_seconds must be a positive number"),
    "folder": ({"checkpoint": "."}, "is a folder; try run.ckpt"),
    "empty": ({"checkpoint": ""}, "is a folder"),
    "device": ({"checkpoint": "/dev/null"}, "/dev/null is a device"),
    "long": ({"checkpoint": "x" * 300}, "cannot be written: .*too long"),
    "null": ({"checkpoint": "a\0b"}, "cannot be written: .*null"),
    "file as folder": ({"checkpoint": "file/run.ckpt"}, "checkpoint file/run.ckpt cannot be written.*Not a directory"),
    "unwritable": ({"checkpoint": "/proc/x/run.ckpt"}, "checkpoint /proc/x/run.ckpt cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named_before_anything_runs(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    change, text = WRONG[case]
    stepper = Scripted(1.0)
    arguments = {"stepper": stepper, "steps": 1, "progress": False, **change}
    with pytest.raises((TypeError, ValueError), match=text):
        run(**arguments)
    assert stepper.position == 0 and [p.name for p in tmp_path.iterdir()] == ["file"]
