"""What is shipped is whole, the pins agree with the ranges, and nothing in the tree knows one machine."""

import re
import shutil
import subprocess
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import steepest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# A build of PyTorch for GPUs brings these, and pins them itself.
BROUGHT_BY_TORCH = re.compile("nvidia-|cuda-|triton")


@cache
def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line of constraints.txt is NAME==VERSION"
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def declared() -> list[Requirement]:
    extras = [line for group in PROJECT["optional-dependencies"].values() for line in group]
    found = [Requirement(line) for line in [*PROJECT["dependencies"], *extras, "hatchling>=1.27"]]
    return [requirement for requirement in found if requirement.name != "steepest"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    return ZipFile(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


def metadata_of(wheel: ZipFile, name: str) -> str:
    return wheel.read(next(item for item in wheel.namelist() if item.endswith(f".dist-info/{name}"))).decode()


def test_the_wheel_has_every_file_of_the_package(wheel: ZipFile) -> None:
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "steepest").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == here
    assert {"steepest/py.typed", "steepest/studies/papers.toml"} <= shipped


def test_the_wheel_has_license_script_and_version(wheel: ZipFile) -> None:
    assert "Apache License" in metadata_of(wheel, "licenses/LICENSE")
    assert "steepest = steepest.lab.cli:main" in metadata_of(wheel, "entry_points.txt")
    assert re.search(r"^Version: (.+)$", metadata_of(wheel, "METADATA"), re.MULTILINE)[1] == steepest.__version__


def test_the_changelog_knows_the_version() -> None:
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or Version(released[0]) <= Version(steepest.__version__)


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_declared_range_contains_its_pin(requirement: Requirement) -> None:
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is not in constraints.txt"
    assert pin in requirement.specifier, f"constraints.txt has {requirement.name} {pin}, pyproject.toml {requirement}"


def test_pins_are_complete_for_what_is_installed() -> None:
    installed = {canonicalize_name(item.metadata["Name"]): item for item in metadata.distributions()}
    waiting = [(canonicalize_name(item.name), frozenset(item.extras)) for item in declared()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = item = waiting.pop()
        if item in seen or name not in installed or BROUGHT_BY_TORCH.match(name):
            continue
        seen.add(item)
        assert name in pins(), f"{name} is needed but not in constraints.txt"
        for line in installed[name].requires or []:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))


def test_pytorch_is_pinned_without_a_build() -> None:
    assert pins()["torch"].local is None
    assert "3.11" in SpecifierSet(PROJECT["requires-python"])
    assert "3.10" not in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_has_the_promised_commands() -> None:
    command = ["make", "-n", "-C", str(ROOT), "race", "test", "check", "bench", "docs", "help", "clean"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def tree() -> list[Path]:
    """The files that are, or would be, under version control."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    return [path for path in (ROOT / name for name in names if name) if path.is_file()]


FOREIGN = {
    "an absolute path of one machine": r"""(?<![\w.}~*-])/(?:home|root|Users|work|workspace|mnt|srv)/\w""",
    "a package index": r"(?:--|PIP_|pip\.)(?:extra-)?index[-_]url|find[-_]links|trusted[-_]host",
    "unfinished work": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
}


def test_the_tree_knows_no_machine() -> None:
    for path in tree():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for what, pattern in FOREIGN.items():
            found = re.search(pattern, text, re.IGNORECASE if "path" not in what else 0)
            if found:
                line = text[: found.start()].count("\n") + 1
                pytest.fail(f"{path.relative_to(ROOT)}:{line} has {what}: {found[0]!r}")
