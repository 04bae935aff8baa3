"""Files that are either the old version or the new one, never half of either."""

import io
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` so that a reader, or a kill at any moment, sees the old file or the new one.

    The text (UTF-8) or bytes go to a temporary file beside `path`, reach the disk, and replace it in one rename.
    Missing parent folders are made.

    Returns:
        The path written.

    Raises:
        OSError: the folder cannot be made or written; `path` is then unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def save_atomic(path: str | Path, state: Any) -> Path:
    """`torch.save(state, path)`, atomically (see `write_atomic`)."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return write_atomic(path, buffer.getvalue())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
