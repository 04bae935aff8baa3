"""A hash of the code that a study runs: it changes when a result could, and not when a comment does.

The study's module is read, not imported. Every name it takes from this package is followed to the module that defines
it, through the re-exports of package ``__init__`` files, and so on. Docstrings, comments and layout are ignored.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
# Modules that never stale evidence: they say how a study looks, and compute nothing that is measured.
HARNESS = {"studies._base"}


class _Use(NamedTuple):
    """A module of the package, by its dotted path, and the attributes that are taken from it."""

    module: tuple[str, ...]
    names: tuple[str, ...]


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
    found: dict[str, Path] = {}
    waiting = [_Module(module.resolve(), package)]
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

    def uses(self) -> set[_Use]:
        """Everything this module uses from its package."""
        bound: dict[str, set[_Use]] = {}
        used: set[_Use] = set()
        for node in _running(self.tree):
            for alias, target, through_root in self._imported(node):
                if alias == "*":
                    used.add(target)
                else:
                    bound.setdefault(alias, set()).add(_Use((), ()) if through_root else target)
                    if through_root:
                        bound.setdefault(f"{alias}.", set()).add(target)
        chains = set(_chains(self.tree))
        named = {root for root, _ in chains}
        for root, attributes in chains:
            used |= {_Use(target.module, target.names + attributes) for target in bound.get(root, ())}
        for alias, targets in bound.items():
            used |= targets if alias.rstrip(".") not in named else set()
        return used - {_Use((), ())}

    def exports(self, name: str) -> list[_Use]:
        """Where this package ``__init__`` takes the public `name` from, imports for type checkers included."""
        return [
            target
            for node in ast.walk(self.tree)
            for alias, target, through_root in self._imported(node)
            if alias == name and not through_root and target != _Use(self.parts, (name,))
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

    def _imported(self, node: ast.AST) -> Iterator[tuple[str, _Use, bool]]:
        """(bound name, what it is, whether the name is bound to the whole package) of an import statement."""
        root = self.package.name
        if isinstance(node, ast.Import):
            for item in node.names:
                parts = tuple(item.name.split("."))
                if parts[0] == root:
                    yield item.asname or root, _Use(parts[1:], ()), item.asname is None
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
                star = item.name == "*"
                yield "*" if star else item.asname or item.name, _Use(base, () if star else (item.name,)), False


def _resolve(use: _Use, package: Path, seen: set[_Use]) -> list[_Module]:
    """The modules that stand behind a use: a module, or the one that defines a name."""
    if use in seen:
        return []
    seen.add(use)
    folder = package.joinpath(*use.module)
    if use.module and folder.with_suffix(".py").is_file():
        return [_Module(folder.with_suffix(".py"), package)]
    init = folder / "__init__.py"
    if not init.is_file():
        return []
    here = _Module(init, package)
    if not use.names:
        return [here]
    first, rest = use.names[0], use.names[1:]
    origins = here.exports(first)
    if not origins and ((folder / f"{first}.py").is_file() or (folder / first).is_dir()):
        origins = [_Use((*use.module, first), ())]
    if origins:
        further = (_Use(origin.module, origin.names + rest) for origin in origins)
        return [module for target in further for module in _resolve(target, package, seen)]
    # A name made by a lazy ``__getattr__`` cannot be followed: rather all modules of the folder than too few.
    return [here] if here.defines(first) else [_Module(file, package) for file in sorted(folder.glob("*.py"))]


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
