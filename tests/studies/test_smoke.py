"""Every study runs at scale smoke, and all recorded evidence says what its numbers say."""

from pathlib import Path

import pytest

from steepest.lab import evidence, study

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.mark.parametrize("slug", study.slugs())
def test_every_study_runs(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = study.load(slug)
    found = study.run_study(loaded, "smoke", runs=None)
    assert [claim.id for claim in found.claims] == [claim.id for claim in loaded.claims if "smoke" in claim.scales]
    assert evidence.parse(found.to_dict()).claims
    assert list(tmp_path.iterdir()) == [], "a study writes nothing by itself"


def test_recorded_verdicts_follow_from_recorded_numbers() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        found = evidence.load(path)
        assert found.paper == path.stem
        assert found.scale in ("desktop", "gpu")
        if study.status(found.paper, RESULTS)[0] == "fresh":
            assert study.check_verdicts(found) == []
