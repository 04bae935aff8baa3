import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import steepest

WAVES = '''
import os, time
import torch
from torch import nn

COUNT = os.environ.get("WAVES_COUNT")
SLEEP = float(os.environ.get("WAVES_SLEEP", "0"))

class Waves:
    """Fit a sine wave."""

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

    def loss(self, model, batch):
        if model.training:
            time.sleep(SLEEP)
            if COUNT:
                with open(COUNT, "a") as file:
                    file.write("x")
        x, y = batch
        return nn.functional.mse_loss(model(x), y)

    def batches(self, split, seed):
        generator = torch.Generator().manual_seed(seed if split == "train" else 10**6)
        for _ in range(7 if split == "train" else 2):
            x = torch.rand(8, 1, generator=generator) * 6
            yield x, torch.sin(x)

    def metrics(self, model, batch):
        return {"error": (model(batch[0]) - batch[1]).abs().max().item()}

def adam(model, lr):
    """Adam."""
    return torch.optim.AdamW(model.parameters(), lr=lr)

adam.lr_range = (1e-3, 1e-1)

def sgd(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

sgd.lr_range = (1e-3, 1e-1)
'''


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """A file with a tiny task `Waves` and two methods, `adam` and `sgd`."""
    path = tmp_path / "waves.py"
    path.write_text(WAVES)
    return path


@pytest.fixture
def race_process(tmp_path: Path):
    """Starts `race(RaceSettings(**given))` in a process of its own; all are killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(given: str, **environment: str) -> subprocess.Popen[bytes]:
        code = f"""
            import pathlib, sys
            from steepest.lab.race import RaceInterruptedError, RaceSettings, race
            try:
                race(RaceSettings({given}))
            except RaceInterruptedError as error:
                print(error)
                sys.exit(130)
        """
        root = str(Path(steepest.__file__).parents[1])
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
