import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from steepest._errors import UserError
from steepest.lab import atlas
from steepest.lab import study as studies
from steepest.lab.evidence import ClaimResult, Evidence, save

PACKAGE = Path(atlas.__file__).parents[1]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    claims = (
        ClaimResult("C1", "a | b <script>", "1 * 2", "x_1 < 2", {"v": 0.123456, "w": [1.0, 2.5]}, "holds", (0, 1), 1.5),
        ClaimResult("C2", "second", "3", "y", {"v": {"inner": 1e-7}}, "does not hold here", (), 0.0),
    )
    code = studies.load("muon_polar").fingerprint
    when = "2026-01-02T03:04:05+00:00"
    save(Evidence("muon_polar", "desktop", code, {"python": "3"}, when, claims), tmp_path / "muon_polar.json")
    return tmp_path


def test_all_papers_are_listed(results: Path) -> None:
    found = atlas.entries(results)
    assert sum(entry.kind == "paper" for entry in found) == 44
    assert [entry.slug for entry in found] == sorted(entry.slug for entry in found)
    assert set(studies.slugs()) <= {entry.slug for entry in found}, "every study has its line in papers.toml"
    for entry in found:
        assert entry.title and entry.authors and entry.rooms and 2000 < entry.year < 2100
        assert entry.arxiv == "" or (len(entry.arxiv) == 10 and entry.arxiv[4] == ".")
    rooms = {path.name for path in PACKAGE.iterdir()}
    for entry in found:
        if entry.status != "no study":
            assert set(entry.rooms) <= rooms, f"{entry.slug} has a study, so its rooms exist"
            assert entry.components


def test_components_exist() -> None:
    from importlib import import_module

    for entry in atlas.entries():
        for name in entry.components:
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module), attribute), f"{entry.slug}: there is no {name}"


def test_verdicts_and_staleness_are_counted(results: Path) -> None:
    found = {entry.slug: entry for entry in atlas.entries(results)}["muon_polar"]
    assert (found.status, found.scale) == ("fresh", "desktop")
    assert found.verdicts == {"holds": 1, "partly": 0, "does not hold here": 1}
    assert "2 claims judged (1 holds, 0 partly, 1 does not hold here)" in atlas.summary(atlas.entries(results))
    stored = json.loads((results / "muon_polar.json").read_text())
    (results / "muon_polar.json").write_text(json.dumps({**stored, "fingerprint": "0" * 64}))
    assert "Stale: muon_polar." in atlas.summary(atlas.entries(results))
    (results / "muon_polar.json").unlink()
    lacking = atlas.summary(atlas.entries(results)).partition("Without evidence: ")[2]
    assert "muon_polar" in lacking
    with pytest.raises(UserError, match="not a folder"):
        atlas.entries(results / "nowhere")


def test_json_is_complete(results: Path) -> None:
    rows = json.loads(atlas.to_json(atlas.entries(results)))
    assert len(rows) >= 45
    assert {"slug", "title", "components", "verdicts", "status"} <= set(rows[0])


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_the_table_fits(results: Path, width: int) -> None:
    console = Console(width=width, record=True, file=StringIO())
    console.print(atlas.table(atlas.entries(results), width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("muon_polar") for line in lines)


def test_markdown_tables_have_one_row_each_and_escape_what_they_hold(results: Path) -> None:
    lines = atlas.markdown(results).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(atlas.papers())
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    text = atlas.evidence_markdown("muon_polar", results)
    assert "a \\| b &lt;script&gt;" in text and "<script>" not in text
    assert "1 \\* 2" in text and "x\\_1 &lt; 2" in text
    assert "v: 0.1235; w: \\[1, 2.5\\]" in text
    assert "Recorded 2026-01-02 at scale desktop; python 3." in text
    (results / "muon_polar.json").unlink()
    assert "No evidence is recorded yet" in atlas.evidence_markdown("muon_polar", results)
    with pytest.raises(UserError, match="no study is named 'nothing'"):
        atlas.evidence_markdown("nothing", results)
