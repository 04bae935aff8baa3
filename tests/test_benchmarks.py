"""The benchmark program: the rows of its tables, and numbers that can be right. What it times is not asserted."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import cheap, distributed, ivon, schedules, spectral, spectral_norm, stability
from benchmarks.timing import interleaved_medians

TINY = {"tiny": [(2, 8, 8), (1, 16, 8)]}


@pytest.fixture(autouse=True)
def tiny_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "SETS", TINY)
    monkeypatch.setattr(cheap, "SETS", TINY)
    monkeypatch.setattr(distributed, "CHOSEN", TINY)


def test_tables_are_printed_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["spectral", "cheap", "--repeats", "1", "--out", str(tmp_path), "--device", "cpu"])
    for name in ("spectral", "cheap"):
        document = json.loads((tmp_path / f"{name}-cpu.json").read_text())
        assert {"title", "description", "environment", "recorded_at", "rows"} <= set(document)
        assert all(row["matrices"] == "tiny" and row["ms a step"] > 0 for row in document["rows"])
    assert "spectral-cpu.json" in capsys.readouterr().out.replace("\n", "")


def test_processes_send_each_part_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["distributed", "--repeats", "1", "--out", str(tmp_path), "--device", "cpu"])
    rows = json.loads((tmp_path / "distributed-cpu.json").read_text())["rows"]
    assert [row["sent / floor"] is None for row in rows] == [True, False, False]
    assert all(row["ms a step"] > 0 for row in rows)
    assert not list(distributed.rows(1, torch.device("meta")))


def test_schedules_are_timed_by_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedules, "STEPS", 300)
    program.main(["schedules", "--repeats", "1", "--out", str(tmp_path), "--device", "cpu"])
    rows = json.loads((tmp_path / "schedules-cpu.json").read_text())["rows"]
    assert len(rows) == 5 and all(row["us a step"] > 0 for row in rows)
    assert "300 steps" in capsys.readouterr().out


def test_ways_to_the_same_curvature_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "NETWORK", (12, (3, 4, 1)))
    monkeypatch.setattr(stability, "THRESHOLDS", ((6, 8, 1), (6, 8, 2)))
    program.main(["stability", "--repeats", "1", "--out", str(tmp_path), "--device", "cpu"])
    rows = json.loads((tmp_path / "stability-cpu.json").read_text())["rows"]
    assert all(row["ms"] > 0 for row in rows)
    exact = [row["relative error"] for row in rows if row["way"] == "trace_stability, exact"]
    assert exact == [0.0]


def test_ivon_is_timed_beside_the_least_it_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ivon, "SIZES", {"tiny": 8})
    monkeypatch.setattr(ivon, "memory", lambda *_: 4.0)
    program.main(["ivon", "--repeats", "1", "--out", str(tmp_path), "--device", "cpu"])
    rows = json.loads((tmp_path / "ivon-cpu.json").read_text())["rows"]
    assert {"IVON", "noise and copies alone"} <= {row["optimizer"] for row in rows}
    assert all(row["ms a step"] > 0 for row in rows)


def test_our_update_is_closer_to_orthogonal_than_torchs() -> None:
    ours = spectral.orthogonality_error(spectral.Muon, [(1, 128, 512)], torch.device("cpu"))
    theirs = spectral.orthogonality_error(torch.optim.Muon, [(1, 128, 512)], torch.device("cpu"))
    assert ours <= theirs


def test_every_round_makes_each_call_once() -> None:
    calls: list[str] = []
    medians = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=0)
    assert calls == ["a", "b"] * 3
    assert set(medians) == {"a", "b"}


@pytest.mark.parametrize("arguments", [["speed"], ["--repeats", "0"], ["--repeats", "x"]])
def test_wrong_use_is_one_message(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_normalised_networks_and_games_are_timed() -> None:
    rows = list(spectral_norm.rows(1, torch.device("cpu")))
    assert {row["method"] for row in rows} >= {"torch", "steepest sn", "interaction cancelled", "SGA"}
    assert all(row["ms a step"] > 0 for row in rows)
