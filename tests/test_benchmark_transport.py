"""The benchmark of entropic transport: its rows, and that every solver reaches what it says."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import transport
from steepest.studies.sinkhorn_newton_sparse import assignment


def test_solvers_are_timed_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transport, "SINGLE", {"tiny": (lambda: assignment(20, 0), 5)})
    monkeypatch.setattr(transport, "BATCH_ETAS", (5.0,))
    monkeypatch.setattr(transport, "BATCH", 10)
    monkeypatch.setattr(transport, "SIZE", 6)
    program.main(["transport", "--repeats", "1", "--out", str(tmp_path), "--device", "cpu"])
    rows = json.loads((tmp_path / "transport-cpu.json").read_text())["rows"]
    ours = [row for row in rows if row["solver"] in ("SNS", "DenseNewton", "one batched call")]
    assert len(ours) == 3 and all(row["seconds"] > 0 and row["error"] <= 1e-8 for row in ours)
    assert "Entropic transport" in capsys.readouterr().out


def test_clouds_are_scaled() -> None:
    C, r, c = transport.clouds(10)
    assert float(C.max()) == 1 and float(C.min()) >= 0
    assert float(r.sum()) == float(c.sum()) == pytest.approx(1)
