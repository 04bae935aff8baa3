"""Opening the database of a race, with clear errors, and so that many workers can write to one SQLite file."""

import contextlib
import logging
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steepest.lab.settings import RaceError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's own log lines."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def open_storage(url: str) -> Any:
    """An Optuna RDB storage; on SQLite every transaction takes the write lock at its start.

    Without that lock SQLite would let two workers read the same trial as waiting and both take it.
    """
    import optuna
    import sqlalchemy as sa
    from sqlalchemy import exc

    try:
        parsed = sa.engine.make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        lite = parsed.get_backend_name() == "sqlite"
    except (exc.ArgumentError, ValueError) as error:
        raise RaceError(
            f"storage is {url!r}, which is not a storage URL; examples: sqlite:///race.db, "
            "postgresql+psycopg://user:password@host/database"
        ) from error
    if lite and parsed.database in (None, "", ":memory:"):
        raise RaceError("storage is an SQLite database in memory, which no other worker can see; give a file")
    if lite:
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        engine: dict[str, Any] = {"connect_args": {"timeout": 60}, "poolclass": sa.pool.NullPool}
    else:
        engine = {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
    last: Exception = RuntimeError()
    for attempt in range(6):
        try:
            with quiet():
                storage = optuna.storages.RDBStorage(parsed.render_as_string(hide_password=False), engine_kwargs=engine)
            break
        except ImportError as error:
            raise RaceError(
                f"the storage {shown(url)} needs a database driver that is not installed: {error}"
            ) from error
        except exc.NoSuchModuleError as error:
            raise RaceError(f"storage is {shown(url)!r}, of a kind that SQLAlchemy does not know: {error}") from error
        except Exception as error:  # another worker may be making the tables at this moment
            last = error
            if "already exists" not in str(error) and "UNIQUE" not in str(error).upper() and "locked" not in str(error):
                raise RaceError(unreachable(url, error)) from error
            time.sleep(0.1 * (attempt + 1) + random.random() / 5)
    else:
        raise RaceError(unreachable(url, last)) from last
    if lite:
        _serialise(storage.engine)
    return storage


def _serialise(engine: Any) -> None:
    from sqlalchemy import event

    def connect(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA busy_timeout=60000")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def shown(url: str) -> str:
    """The URL without its password."""
    import sqlalchemy as sa
    from sqlalchemy import exc

    try:
        return sa.engine.make_url(url).render_as_string(hide_password=True)
    except (exc.ArgumentError, ValueError):
        return url


def unreachable(url: str, error: BaseException) -> str:
    """The message for a storage that gave an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    detail = lines[0] if lines else type(error).__name__
    return f"the storage {shown(url)} does not answer: {detail}"
