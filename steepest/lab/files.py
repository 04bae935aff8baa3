"""Loading a class or function from a Python file of the user's."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from steepest.lab.settings import RaceError


def load_object(spec: str, kind: str) -> Any:
    """The object of `path/to/file.py:Name`.

    The file's folder is on `sys.path` while the file is loaded, so that it may import its neighbours.

    Args:
        spec: Path and name.
        kind: "class" or "function", for the messages.

    Raises:
        RaceError: no such file, the file raises, or it has no such name (the message lists the names it has).
    """
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise RaceError(f"{spec!r}: there is no file {str(path)!r}")
    module = _load(path)
    if name and hasattr(module, name):
        found = getattr(module, name)
        if kind == "class" and not isinstance(found, type):
            raise RaceError(f"{name!r} in {path} is a {type(found).__name__}; it must be a class")
        return found
    own = [
        key
        for key, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
        and not key.startswith("_")
        and (isinstance(value, type) if kind == "class" else callable(value) and not isinstance(value, type))
    ]
    plural = "classes" if kind == "class" else "functions"
    listed = f"the {plural} there: {', '.join(own)}" if own else f"there are no {plural} in it"
    raise RaceError(f"{path} has no {kind} {name!r}; {listed}")


def _load(path: Path) -> Any:
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"_steepest_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RaceError(f"{str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        line = _line(error, path)
        raise RaceError(f"{path} cannot be loaded: {type(error).__name__}: {error}{line}") from error
    finally:
        sys.path.remove(folder)
    return module


def _line(error: BaseException, path: Path) -> str:
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line is not None else ""
