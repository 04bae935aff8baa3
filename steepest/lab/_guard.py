"""What the command line does when something goes wrong: one line on stderr and an exit code, not a traceback."""

import contextlib
import errno
import linecache
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import typer

from steepest._errors import UserError

WRONG_USE, BUG, INTERRUPTED = 2, 1, 130
_PACKAGE = str(Path(__file__).resolve().parents[1])
_MEANT_FOR_USERS = (ValueError, TypeError)


@contextlib.contextmanager
def guarded(command: str) -> Iterator[None]:
    """Turn what escapes from a command into a message on stderr and an exit code.

    * The user's mistake (`UserError`; any ValueError or TypeError that this package raises on purpose; a file that
      cannot be read or written): the message, exit code 2.
    * Ctrl-C: exit code 130. A closed pipe (``steepest atlas | head``): silence.
    * Anything else is a bug: one line that says so, exit code 1, and with ``STEEPEST_DEBUG=1`` the traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        say(f"{command}: interrupted; the same command goes on where it can")
        raise typer.Exit(INTERRUPTED) from interrupt
    except (SystemExit, typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if _is_closed_pipe(error):
            _drop_stdout()
            raise typer.Exit(0) from None
        if _is_usage_error(error):
            raise
        if os.environ.get("STEEPEST_DEBUG"):
            traceback.print_exc()
        if type(error).__name__ == "RaceInterruptedError":
            say(f"{command}: {error}")
            raise typer.Exit(INTERRUPTED) from None
        message = user_message(error)
        if message is not None:
            say(f"{command}: {message}")
            raise typer.Exit(WRONG_USE) from None
        say(
            f"{command}: this is a bug in steepest ({type(error).__name__}: {error}); "
            "set STEEPEST_DEBUG=1 to see where, and please report it"
        )
        raise typer.Exit(BUG) from None


def user_message(error: BaseException) -> str | None:
    """What to tell the user, if the error is about what they gave; None if it is a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return f"{name}{error.strerror}"
    if isinstance(error, _MEANT_FOR_USERS) and _raised_on_purpose(error.__traceback__):
        return str(error)
    return None


def say(message: str) -> None:
    """Write one line to stderr; control characters, which could come from a file's name, are made visible."""
    from steepest.lab.report.text import clean

    with contextlib.suppress(OSError, ValueError):
        print(clean(message, limit=2000), file=sys.stderr, flush=True)


def _raised_on_purpose(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is a ``raise`` statement of this package."""
    if trace is None:
        return False
    *_, innermost = traceback.extract_tb(trace)
    line = linecache.getline(innermost.filename, innermost.lineno or 0).strip()
    return innermost.filename.startswith(_PACKAGE) and line.startswith("raise ")


def _is_usage_error(error: BaseException) -> bool:
    """Whether the command-line parser raised it: those know how to show themselves."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _is_closed_pipe(error: BaseException) -> bool:
    return isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno == errno.EPIPE)


def _drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not complain when it exits."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
