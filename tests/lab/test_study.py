import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from steepest._errors import UserError
from steepest.lab import study as studies
from steepest.lab.study import Study, check_verdicts, record, run_study, status
from steepest.studies._base import Claim, Run


def claim(name: str, judge: Any = lambda m: m["value"] > 0, **options: Any) -> Claim:
    return Claim(name, f"Claim {name}.", "1", "the value is positive", judge, **options)


def study(claims: tuple[Claim, ...], measure: Any, fingerprint: str = "f" * 64) -> Study:
    return Study("toy", "A toy.", ("steepest.toy",), claims, measure, fingerprint)


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        (True, "holds"),
        (False, "does not hold here"),
        ([True, True], "holds"),
        ([True, False], "partly"),
        ({"a": False, "b": False}, "does not hold here"),
        ({"a": False, "b": True}, "partly"),
    ],
)
def test_the_verdict_follows_from_the_parts(parts: Any, verdict: str) -> None:
    assert claim("C1", lambda measured: parts).verdict({}) == verdict


@pytest.mark.parametrize("answer", [None, "holds", [], [True, 0.5], 1])
def test_a_judge_must_answer_yes_or_no(answer: Any) -> None:
    with pytest.raises(TypeError, match="judge of claim 'C1'"):
        claim("C1", lambda measured: answer).verdict({})


def test_a_run_gives_what_the_scale_asks_and_notes_the_seeds() -> None:
    run = Run("desktop")
    assert run.pick(smoke=1, desktop=2, gpu=3) == 2
    assert Run("smoke").pick(smoke=0, desktop=2) == 0
    assert Run("gpu").pick(smoke=1, desktop=2) == 2
    assert Run("gpu").pick(smoke=1, desktop=2, gpu=0) == 0
    assert list(run.seeds(3)) == [0, 1, 2]
    assert run.generator(7).initial_seed() == 7
    assert run.used_seeds == {0, 1, 2, 7}


def test_a_study_runs_and_is_judged_claim_by_claim(tmp_path: Path) -> None:
    def measure(name: str, run: Run) -> Mapping[str, Any]:
        return {
            "value": {"C1": 1.0, "C2": math.nan}[name],
            "draws": [run.generator(s).seed() > 0 for s in run.seeds(2)],
        }

    seen = []
    toy = study((claim("C1"), claim("C2"), claim("C3", scales=("gpu",))), measure)
    evidence = run_study(toy, "desktop", runs=tmp_path, done=lambda result: seen.append(result.id))
    assert seen == ["C1", "C2"]
    assert [item.verdict for item in evidence.claims] == ["holds", "does not hold here"]
    assert evidence.claims[0].seeds == (0, 1)
    assert (evidence.paper, evidence.scale, evidence.fingerprint) == ("toy", "desktop", "f" * 64)
    assert {"python", "torch", "cpu"} <= set(evidence.environment)
    stored = json.loads(record(evidence, tmp_path / "results").read_text())
    assert stored["claims"][1]["measured"]["value"] == "NaN"


def test_an_interrupted_study_loses_only_the_claim_under_way(tmp_path: Path) -> None:
    calls: list[str] = []
    broken = [True]

    def measure(name: str, run: Run) -> Mapping[str, Any]:
        calls.append(name)
        base = run.once("base", lambda: calls.append("base") or {"x": [float(run.generator(5).initial_seed())]})
        if name == "C2" and broken[0]:
            raise KeyboardInterrupt
        return {"value": base["x"][0]}

    toy = study((claim("C1"), claim("C2")), measure)
    with pytest.raises(KeyboardInterrupt):
        run_study(toy, "desktop", runs=tmp_path)
    broken[0] = False
    evidence = run_study(toy, "desktop", runs=tmp_path)
    assert calls == ["C1", "base", "C2", "C2"]
    assert [item.seeds for item in evidence.claims] == [(5,), (5,)]

    run_study(study(toy.claims, measure, "e" * 64), "desktop", runs=tmp_path)
    assert calls[4:] == ["C1", "base", "C2"], "changed code is measured anew"


def test_what_was_kept_elsewhere_or_is_broken_is_measured_anew(tmp_path: Path) -> None:
    toy = study((claim("C1"),), lambda name, run: {"value": 1})
    run_study(toy, "desktop", runs=tmp_path)
    (kept,) = tmp_path.rglob("claim-C1.json")
    entry = json.loads(kept.read_text())
    for content in ("{", json.dumps({**entry, "value": {"value": -1}, "environment": {"python": "2.7"}})):
        kept.write_text(content)
        assert run_study(toy, "desktop", runs=tmp_path).claims[0].verdict == "holds"
    kept.write_text(json.dumps({**entry, "value": {"value": -1}}))
    assert run_study(toy, "desktop", runs=tmp_path).claims[0].verdict == "does not hold here"


def test_nothing_is_kept_unless_a_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_study(study((claim("C1"),), lambda name, run: {"value": 1}), "smoke", runs=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("measured", [None, {}, 3.0])
def test_measure_must_return_numbers_by_name(measured: Any) -> None:
    with pytest.raises(TypeError, match=r"measure\('C1'\) of study 'toy'"):
        run_study(study((claim("C1"),), lambda name, run: measured), "smoke", runs=None)


def test_wrong_scales_and_names_are_refused(tmp_path: Path) -> None:
    toy = study((claim("C1", scales=("gpu",)),), lambda name, run: {"value": 1})
    with pytest.raises(UserError, match="scale must be one of"):
        run_study(toy, "huge", runs=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="measures nothing at scale 'smoke'"):
        run_study(toy, "smoke", runs=None)
    with pytest.raises(UserError, match="did you mean 'muon_polar'"):
        studies.source("muon_pola")
    with pytest.raises(UserError, match=r"the studies are: .*muon_polar"):
        studies.source("../../etc/passwd")
    smoke = run_study(study((claim("C1"),), lambda name, run: {"value": 1}), "smoke", runs=None)
    with pytest.raises(UserError, match="scale smoke only shows"):
        record(smoke, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_studies_are_found_without_being_imported() -> None:
    assert "muon_polar" in studies.slugs()
    assert not any(slug.startswith("_") for slug in studies.slugs())
    assert "steepest.optim.Muon" in studies.components("muon_polar")


def test_evidence_is_missing_then_fresh_then_stale(tmp_path: Path) -> None:
    assert status("muon_polar", tmp_path) == ("missing", None)
    real = studies.load("muon_polar")
    evidence = run_study(study((claim("C1"),), lambda name, run: {"value": 1}, real.fingerprint), "desktop", runs=None)
    path = record(evidence, tmp_path)
    stored = json.loads(path.read_text())
    path.rename(tmp_path / "muon_polar.json")
    with pytest.raises(UserError, match="paper must be 'muon_polar'"):
        status("muon_polar", tmp_path)
    for fingerprint, state in ((real.fingerprint, "fresh"), ("0" * 64, "stale")):
        document = {**stored, "paper": "muon_polar", "fingerprint": fingerprint}
        (tmp_path / "muon_polar.json").write_text(json.dumps(document))
        assert status("muon_polar", tmp_path)[0] == state


def test_a_verdict_that_its_numbers_do_not_give_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = study((claim("C1"), claim("C2")), lambda name, run: {"value": 1})
    evidence = run_study(toy, "smoke", runs=None)
    monkeypatch.setattr(studies, "load", lambda slug: toy)
    assert check_verdicts(evidence) == []
    negative = study((claim("C1", lambda m: m["value"] < 0),), toy.measure)
    monkeypatch.setattr(studies, "load", lambda slug: negative)
    wrong = check_verdicts(evidence)
    assert any("C1: recorded as 'holds', but its numbers say 'does not hold here'" in line for line in wrong)
    assert any("C2: the study has no such claim" in line for line in wrong)
