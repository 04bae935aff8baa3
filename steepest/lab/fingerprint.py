"""A hash of the code that a study runs: it changes when a result could, and not when a comment does.

The study's module is read, not imported. Every name it takes from this package is followed to the module that defines
it, through the re-exports of package ``__init__`` files, and so on. Docstrings, comments and layout are ignored.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
HARNESS = {"studies._base"}
"""Modules that never stale evidence: they say how a study looks, and compute nothing that is measured."""


def fingerprint(module: Path, package: Path = PACKAGE) -> str:
    """The hash of a study and of all modules of `package` that it reaches.

    Args:
        module: the study's file, inside `package`.
        package: the root folder of the package whose imports are followed.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        SyntaxError: one of the files is not Python.
    """
    digest = hashlib.sha256()
    for name, path in sorted(dependencies(module, package).items()):
        digest.update(f"{name}\n{_normalised(path.read_bytes())}\n".encode())
    return digest.hexdigest()


def dependencies(module: Path, package: Path = PACKAGE) -> dict[str, Path]:
    """The modules of `package` whose code `module` runs, itself included, by their dotted name in the package."""
    package = package.resolve()
    first = _Module(module.resolve(), package)
    found: dict[str, Path] = {}
    waiting = [first]
    while waiting:
        current = waiting.pop()
        if current.name in found or current.name in HARNESS:
            continue
        found[current.name] = current.path
        for used in current.uses():
            waiting.extend(_resolve(used, package, set()))
    return found


class _Module:
    """One source file and the names it takes from its own package."""

    def __init__(self, path: Path, package: Path):
        self.path = path
        self.package = package
        parts = path.relative_to(package).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.parts = parts[:-1] if self.is_package else parts
        self.name = ".".join(self.parts)
        self.tree = _parse(path.read_bytes())

    def uses(self) -> set[tuple[str, ...]]:
        """Dotted paths, relative to the package, of everything this module uses from it."""
        bound: dict[str, tuple[str, ...]] = {}
        used: set[tuple[str, ...]] = set()
        for node in _running(self.tree):
            for alias, target, binds_root in self._imported(node):
                if binds_root:
                    bound[alias] = ()
                    used.add(target)
                elif alias == "*":
                    used.add(target)
                else:
                    bound[alias] = target
        seen: set[str] = set()
        for root, attributes in _chains(self.tree):
            if root in bound:
                seen.add(root)
                if bound[root] + attributes:
                    used.add(bound[root] + attributes)
        used.update(target for alias, target in bound.items() if alias not in seen and target)
        return used

    def exports(self, name: str) -> list[tuple[str, ...]]:
        """Where this package ``__init__`` takes the public `name` from, imports for type checkers included."""
        return [
            target
            for node in ast.walk(self.tree)
            for alias, target, binds_root in self._imported(node)
            if alias == name and not binds_root and target != (*self.parts, name)
        ]

    def defines(self, name: str) -> bool:
        """Whether the file itself assigns, or defines, the public `name`."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return True
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return True
        return False

    def _imported(self, node: ast.AST) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """(bound name, path in the package, whether the bound name is the package's root) of an import statement."""
        root = self.package.name
        if isinstance(node, ast.Import):
            for item in node.names:
                parts = tuple(item.name.split("."))
                if parts[0] == root:
                    yield item.asname or root, parts[1:], item.asname is None
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                here = self.parts if self.is_package else self.parts[:-1]
                base = here[: len(here) - node.level + 1] + parts
            elif parts[:1] == (root,):
                base = parts[1:]
            else:
                return
            for item in node.names:
                if item.name == "*":
                    yield "*", base, False
                else:
                    yield item.asname or item.name, (*base, item.name), False


def _resolve(path: tuple[str, ...], package: Path, seen: set[tuple[str, ...]]) -> list[_Module]:
    """The modules that stand behind a dotted path: a module, or the one that defines a name."""
    if path in seen:
        return []
    seen.add(path)
    folder = package
    for index, part in enumerate(path):
        init = folder / "__init__.py"
        here = _Module(init, package) if init.is_file() else None
        origins = here.exports(part) if here else []
        if origins:
            rest = path[index + 1 :]
            return [module for origin in origins for module in _resolve(origin + rest, package, seen)]
        if (folder / f"{part}.py").is_file():
            return [_Module(folder / f"{part}.py", package)]
        if (folder / part).is_dir():
            folder = folder / part
            continue
        if here is None:
            return []
        # A name made by a lazy ``__getattr__`` cannot be followed: rather all modules of the folder than too few.
        return [here] if here.defines(part) else [_Module(file, package) for file in sorted(folder.glob("*.py"))]
    init = folder / "__init__.py"
    return [_Module(init, package)] if init.is_file() else []


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``, which never run."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield other
                yield from _running(other)
            continue
        yield child
        yield from _running(child)


def _chains(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every ``name.attribute.attribute`` in the code, as (name, attributes); a bare name has no attributes."""
    inner: set[int] = set()
    for outermost in _running(tree):
        node = outermost
        if id(node) in inner or not isinstance(node, ast.Attribute | ast.Name):
            continue
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
            inner.add(id(node))
        if isinstance(node, ast.Name):
            yield node.id, tuple(reversed(attributes))


@lru_cache(maxsize=512)
def _parse(source: bytes) -> ast.Module:
    return ast.parse(source)


@lru_cache(maxsize=512)
def _normalised(source: bytes) -> str:
    return _dump(_parse(source))


def _dump(node: object) -> str:
    """A text of the syntax tree that is the same for all Python versions we run on: empty fields are left out."""
    if isinstance(node, list):
        return "[" + ",".join(_dump(item) for item in node if not _is_note(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={_dump(value)}"
        for name, value in ast.iter_fields(node)
        if value != [] and (value is not None or isinstance(node, ast.Constant))
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_note(node: object) -> bool:
    """A string that stands alone as a statement: a docstring, or a note under an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
