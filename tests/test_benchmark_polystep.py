"""The rows of the benchmark of PolyStep. What it times is not asserted."""

from importlib.util import find_spec

import pytest
import torch

from benchmarks import polystep


def test_every_program_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polystep, "TRAIN_STEPS", 1)
    monkeypatch.setattr(polystep, "SEEDS", 1)
    monkeypatch.setattr(polystep, "SAT_SIZES", ())
    rows = list(polystep.rows(1, torch.device("cpu")))
    assert [row["method"] for row in rows] == ["PolyStep", *(["polystep"] if find_spec("polystep") else [])]
    assert all(row["ms a step"] > 0 for row in rows)


def test_maxsat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polystep, "SAT_STEPS", 3)
    threads = torch.get_num_threads()
    try:
        seconds, share, memory = polystep.maxsat(30)
    finally:
        torch.set_num_threads(threads)
    assert seconds > 0 and 0.8 < share <= 1 and memory > 1
