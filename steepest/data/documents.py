"""Text as named documents: what ships inside Python itself, or the user's own file or folder."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from steepest._errors import UserError

# Tests, generated tables, machine-dependent files, and what only some installations have.
_SKIPPED = {
    "__phello__",
    "_sysconfigdata",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}


@dataclass(frozen=True)
class Document:
    """A name that identifies the document, and its text."""

    name: str
    text: str


def embedded() -> list[Document]:
    """The text inside Python: the language reference (`pydoc_data.topics`) and the standard library's sources.

    Returns:
        The documents, sorted by name. They differ between Python versions.

    Raises:
        UserError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = [Document(f"reference/{name}", text) for name, text in _reference().items()]
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        if name.startswith("_sysconfigdata"):
            continue
        paths = [root / f"{name}.py", *(root / name).rglob("*.py")]
        for path in paths:
            parts = path.relative_to(root).parts
            if _SKIPPED.isdisjoint(parts) and path.is_file():
                text = _read(path)
                if text is not None and text.strip():
                    documents.append(Document("library/" + "/".join(parts), text))
    if not any(document.name.startswith("library/") for document in documents):
        raise UserError(
            f"path must be given, a text file or folder of your own: this Python has no library sources in {root}"
        )
    return sorted(documents, key=lambda document: document.name)


def from_path(path: str | Path, suffixes: Sequence[str] | None = None) -> list[Document]:
    """The text of a file, or of every file below a folder (names that begin with a dot are left out).

    Args:
        path: The file or folder.
        suffixes: Take only the files of a folder with these endings, such as `[".txt", ".md"]`; all if None.

    Returns:
        The documents, sorted by name; files that hold only blanks are left out.

    Raises:
        UserError: there is no such file or folder, a file is not UTF-8 text, or there is no text at all.
    """
    path = Path(path).expanduser()
    if path.is_file():
        files = [(path.name, path)]
    elif path.is_dir():
        found = [(file.relative_to(path), file) for file in path.rglob("*")]
        files = [
            (name.as_posix(), file)
            for name, file in found
            if not any(part.startswith(".") for part in name.parts)
            and (suffixes is None or file.name.endswith(tuple(suffixes)))
            and file.is_file()
        ]
    else:
        raise UserError(f"path must be a text file or a folder of text files; there is no {path}")
    documents = []
    for name, file in sorted(files):
        text = _read(file)
        if text is None:
            hint = "" if path.is_file() else "; leave it out with suffixes, for example ['.txt']"
            raise UserError(f"path must hold UTF-8 text, but {file} is binary or has another encoding{hint}")
        if text.strip():
            documents.append(Document(name, text))
    if not documents:
        raise UserError(f"path must hold some text, but {path} is empty")
    return documents


def capped(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """A fixed, mixed subset: documents in the order of the hash of their names, as long as they fit into `max_bytes`.

    The first one is cut if even that does not fit. The result is sorted by name.
    """
    chosen, room = [], max_bytes
    ordered = sorted(documents, key=lambda document: name_hash(document.name))
    for document in ordered:
        size = len(document.text.encode())
        if size <= room:
            chosen.append(document)
            room -= size
    if not chosen:
        cut = ordered[0].text.encode()[:max_bytes].decode(errors="ignore")
        chosen = [Document(ordered[0].name, cut)]
    return sorted(chosen, key=lambda document: document.name)


def divide(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, none in both; a name always falls on the same side.

    A document is for validation if the hash of its name, as a number in [0, 1), is below `val_fraction`. A single
    document is cut in two near the last `val_fraction` of its characters, at the end of a line if one is close.
    """
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        wanted = round(len(text) * (1 - val_fraction))
        line = text.rfind("\n", 0, wanted) + 1
        cut = line if line > 0.9 * wanted else wanted
        return [Document(f"{name}#train", text[:cut])], [Document(f"{name}#val", text[cut:])]
    ordered = sorted(documents, key=lambda document: name_hash(document.name))
    size = sum(name_hash(document.name) < val_fraction for document in ordered)
    size = min(max(size, 1), len(ordered) - 1)
    return ordered[size:], ordered[:size]


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 of the documents' names and texts, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def _reference() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {name: text for name, text in topics.items() if text.strip()}


def _read(path: Path) -> str | None:
    """The text, or None if it is not UTF-8 or holds a NUL byte (which no text does; it separates documents here)."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"path must be readable, but {path} is not: {error.strerror}") from None
    return None if "\0" in text else text.replace("\r\n", "\n")
