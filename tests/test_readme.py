"""Every Python block of the README and the documentation runs, in order, as a reader would run it."""

import re
from pathlib import Path

import pytest
import torch

from steepest.lab.check import check_task
from steepest.lab.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r'^```python(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if BLOCK.search(page.read_text())
]


def test_the_readme_has_blocks() -> None:
    assert ROOT / "README.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for match in BLOCK.finditer(text):
            line = text[: match.start("code")].count("\n")
            source = "\n" * line + match["code"]  # so that a failure points at the line of the page
            exec(compile(source, str(page), "exec"), names)


@pytest.mark.parametrize("page", ["README.md", "docs/guides/race.md"])
def test_task_blocks_can_be_raced(page: str, tmp_path: Path) -> None:
    match = next(m for m in BLOCK.finditer((ROOT / page).read_text()) if m["title"])
    path = tmp_path / match["title"]
    path.write_text(match["code"])
    spec = f"{path}:Waves"
    with torch.random.fork_rng(devices=[]):
        check_task(load_task(spec), spec, torch.device("cpu"))
