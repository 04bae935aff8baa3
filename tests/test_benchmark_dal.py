"""The rows of the benchmark of DAL. What it times is not asserted."""

import pytest
import torch

from benchmarks import dal


def test_every_method_takes_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dal, "SETS", {"tiny": ([4, 3, 2], 5)})
    rows = list(dal.rows(1, torch.device("cpu")))
    assert [row["optimizer"] for row in rows] == list(dal.METHODS)
    assert all(row["ms a step"] > 0 and row["matrices"] == "tiny" for row in rows)
