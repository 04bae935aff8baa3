"""The rows of the benchmark of PolyStep. What it times is not asserted."""

from importlib.util import find_spec

import pytest
import torch

from benchmarks import polystep


def test_every_program_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polystep, "TRAIN_STEPS", 1)
    monkeypatch.setattr(polystep, "SEEDS", 1)
    monkeypatch.setattr(polystep, "SAT_SIZES", (30,))
    rows = list(polystep.rows(1, torch.device("cpu")))
    assert [row["method"] for row in rows] == ["PolyStep", *(["polystep"] if find_spec("polystep") else []), "PolyStep"]
    assert all(row["ms a step"] > 0 for row in rows)
    assert rows[-1]["peak memory, MiB"] > 0
