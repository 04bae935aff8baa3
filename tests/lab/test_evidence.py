import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from steepest._errors import UserError
from steepest.lab.evidence import ClaimResult, Evidence, load, numbers, parse, plain, save
from steepest.lab.fingerprint import dependencies, fingerprint


def example(**changes) -> Evidence:
    claim = ClaimResult("C1", "It works.", "1.0", "within 0.1", {"value": 1.05}, "holds", (0, 1), 0.25)
    values = {
        "paper": "example",
        "scale": "desktop",
        "fingerprint": "0" * 64,
        "environment": {"python": "3.11"},
        "recorded_at": "2026-01-02T03:04:05+00:00",
        "claims": (claim,),
    }
    return Evidence(**{**values, **changes})


def document(**changes) -> dict:
    return {**example().to_dict(), **changes}


def with_claim(**changes) -> dict:
    found = example().to_dict()
    return {**found, "claims": [{**found["claims"][0], **changes}]}


def without(name: str) -> dict:
    return {key: value for key, value in document().items() if key != name}


def test_a_file_holds_exactly_the_documented_fields_and_comes_back(tmp_path: Path) -> None:
    path = save(example(), tmp_path / "new" / "example.json")
    stored = json.loads(path.read_text())
    assert list(stored) == ["paper", "scale", "fingerprint", "environment", "recorded_at", "claims"]
    assert list(stored["claims"][0]) == [
        *("id", "statement", "reported", "criterion", "measured", "verdict", "seeds", "seconds")
    ]
    assert load(path) == example()
    assert example().counts() == {"holds": 1, "partly": 0, "does not hold here": 0}


def test_numbers_survive_even_where_json_has_no_word_for_them(tmp_path: Path) -> None:
    measured = {
        "tensor": torch.tensor([1.5, math.inf]),
        "scalar": np.float32(0.5),
        "nan": math.nan,
        "low": -math.inf,
        "nested": {"a": (1, [2.0, True, None, "word"])},
    }
    text = json.dumps(plain(measured), allow_nan=False)
    back = numbers(json.loads(text))
    assert back["tensor"] == [1.5, math.inf] and back["scalar"] == 0.5 and back["low"] == -math.inf
    assert math.isnan(back["nan"])
    assert back["nested"] == {"a": [1, [2.0, True, None, "word"]]}
    with pytest.raises(TypeError, match="object"):
        plain({"x": object()})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "must be a JSON object"),
        (without("paper"), "missing paper"),
        (without("claims"), "missing claims"),
        (document(extra=1), "unknown field 'extra'"),
        (document(paper=" "), "paper must be"),
        (document(scale="huge"), "scale must be one of smoke, desktop, gpu"),
        (document(fingerprint="abc"), "64 hexadecimal"),
        (document(environment={}), "environment must be"),
        (document(recorded_at="yesterday"), "recorded_at must be an ISO time"),
        (document(recorded_at="2026-01-02T03:04:05"), "with a zone"),
        (document(claims=[]), "claims must be a list"),
        (document(claims=document()["claims"] * 2), "ids must be unique, C1"),
        (with_claim(verdict="true"), r"claims\[0\] \(C1\): verdict must be one of holds, partly, does not hold here"),
        (with_claim(statement=3), "statement must be"),
        (with_claim(measured={}), "measured must be"),
        (with_claim(measured=3.0), "measured must be"),
        (with_claim(seeds=[0.5]), "seeds must be"),
        (with_claim(seeds=[True]), "seeds must be"),
        (with_claim(seconds=-1), "seconds must be"),
        (with_claim(seconds="1 s"), "seconds must be"),
    ],
)
def test_a_malformed_file_is_refused_by_name(wrong, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match="not an evidence file"):
            load(tmp_path / "x.json")


def test_nothing_malformed_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scale"):
        save(example(scale="huge"), tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []
    assert parse(document()) == example()


FILES = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg import low\n",
    "low/__init__.py": "from pkg.low.map import map, other\nfrom pkg.low.unused import unused\n",
    "low/map.py": "import pkg.tools as tools\ndef map(x):\n    return tools.twice(x)\ndef other():\n    pass\n",
    "low/unused.py": "unused = 1\n",
    "tools.py": "def twice(x):\n    return 2 * x\n",
    "types_only.py": "T = int\n",
    "late.py": "late = 1\n",
    "lazy/__init__.py": "def __getattr__(name):\n    ...\n",
    "lazy/one.py": "one = 1\n",
    "studies/_base.py": "from pkg.low import unused\n",
    "studies/paper.py": (
        '"""A study."""\n'
        "from typing import TYPE_CHECKING\n"
        "from pkg.low import map\n"
        "from pkg.studies._base import Claim\n"
        "if TYPE_CHECKING:\n    from pkg.types_only import T\n"
        "def measure(claim, run):\n    from pkg.late import late\n    return map(late)\n"
    ),
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "pkg"


def test_the_fingerprint_follows_what_runs(package: Path) -> None:
    found = dependencies(package / "studies/paper.py", package)
    assert set(found) == {"studies.paper", "low.map", "tools", "late"}


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("import pkg\npkg.low.map(1)", {"low.map", "tools"}),
        ("import pkg.low\nx = pkg.low.unused", {"low.unused"}),
        ("from pkg import low\nlow.map(1)", {"low.map", "tools"}),
        ("from ..low import map", {"low.map", "tools"}),
        ("from .. import late", {"late"}),
        ("import pkg.late", {"late"}),
        ("from pkg.low import *", {"low", "low.map", "low.unused", "tools"}),
        ("from pkg import low\nf(low)", {"low", "low.map", "low.unused", "tools"}),
        ("from pkg.lazy import anything", {"lazy", "lazy.one"}),
        ("import pkgother.late\nfrom other import pkg", set()),
    ],
)
def test_every_way_to_import_is_followed(package: Path, statement: str, wanted: set[str]) -> None:
    path = package / "studies/paper.py"
    path.write_text(statement)
    assert set(dependencies(path, package)) - {"studies.paper"} == wanted


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("tools.py", "2 * x", "3 * x", True),
        ("late.py", "1", "2", True),
        ("studies/paper.py", "map(late)", "map(-late)", True),
        ("tools.py", "def twice(x):", 'def twice(x):\n    """Doubles."""\n    # a comment', False),
        ("tools.py", "    return 2 * x", "    return (2\n        * x)", False),
        ("studies/paper.py", "A study.", "Another text.", False),
        ("low/unused.py", "1", "2", False),
        ("low/__init__.py", "unused", "renamed", False),
        ("types_only.py", "int", "str", False),
        ("studies/_base.py", "from", "x = 1\nfrom", False),
    ],
)
def test_the_fingerprint_changes_exactly_with_the_code(package: Path, file: str, old: str, new: str, changes) -> None:
    before = fingerprint(package / "studies/paper.py", package)
    path = package / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert (fingerprint(package / "studies/paper.py", package) != before) is changes
