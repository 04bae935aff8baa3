"""The rows of the table of matrix powers; what it times is not asserted."""

import pytest
import torch

from benchmarks import freon


def test_every_backend_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freon, "SETS", {"tiny": [(2, 8, 8), (1, 16, 8)]})
    rows = list(freon.rows(1, torch.device("cpu")))
    assert [row["optimizer"] for row in rows] == list(freon.MAKERS)
    assert rows[0]["times svd"] == 1 and rows[-1]["over Muon"] == 1
    assert all(row["ms a step"] > 0 for row in rows)
