"""Imports point downward only, and the library loads nothing heavy before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "steepest"
FOUNDATIONS = frozenset({"averages", "geometry", "curvature", "graphs", "loop"})
SHARED = frozenset({"optim", "nn"})
TOP = {"lab", "studies"}
HEAVY = ("jinja2", "optuna", "plotly", "rich", "scipy", "sklearn", "tokenizers", "transformers", "typer")


def rooms() -> list[str]:
    return sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})


def allowed(room: str) -> frozenset[str]:
    """What a room may import besides itself and the private helpers of the package."""
    everything = frozenset(rooms())
    if room in FOUNDATIONS:
        return FOUNDATIONS - {"loop"}
    if room == "studies":
        return everything - {"lab"}
    if room in TOP or room.startswith("__"):
        return everything
    return FOUNDATIONS | SHARED


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports, at its top or inside functions; not those for types alone."""
    found = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "steepest" else node.module for alias in node.names
            ]
        found |= {name.split(".")[1] for name in names if name and name.startswith("steepest.")}
        nodes += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("room", [room for room in rooms() if room != "__init__"])
def test_imports_point_downward(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for path in files:
        above = {name for name in imports(path) - allowed(room) - {room} if not name.startswith("_")}
        assert not above, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(above))}, which lies above or beside"


def run(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_top_level_loads_nothing() -> None:
    loaded = run("import steepest, sys; print(*sys.modules)")
    assert not {"torch", "numpy", *HEAVY} & set(loaded)


def test_heavy_libraries_wait() -> None:
    library = "import steepest.geometry, steepest.loop, steepest.optim, steepest.nn, steepest.models, steepest.data"
    loaded = run(f"import torch, sys; before = set(sys.modules); {library}; print(*set(sys.modules) - before)")
    assert "steepest.optim" in loaded
    assert not set(HEAVY) & set(loaded)
