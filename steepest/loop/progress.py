"""What a run shows: a bar on a terminal, a line now and then elsewhere, nothing if so asked. All on stderr."""

import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

REFRESH_SECONDS = 0.1
LINE_SECONDS = 30.0


class Reporter:
    """Shows nothing; the base of those that do.

    Args:
        label: a short name of the run.
        steps: step at which the run ends, if known.
        limit: running time at which the run ends, in seconds, if known.
    """

    period = float("inf")

    def __init__(self, label: str = "", steps: int | None = None, limit: float | None = None):
        self.label, self.steps, self.limit = label, steps, limit
        self._seen: deque[tuple[float, int]] = deque(maxlen=50)
        self._due = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def begin(self, step: int, seconds: float) -> None:
        """Note where the run starts."""
        self._seen.append((seconds, step))
        self._due = seconds + self.period

    def update(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Called after each step; shows something when it is time."""
        if seconds >= self._due:
            self._due = seconds + self.period
            self._seen.append((seconds, step))
            self.show(step, seconds, self.status(step, seconds, metrics))

    def end(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Called once after the last step."""

    def show(self, step: int, seconds: float, status: str) -> None:
        """Draw the status."""

    def say(self, text: str) -> None:
        """Print one line that stays."""

    def status(self, step: int, seconds: float, metrics: Mapping[str, float]) -> str:
        """Step, rate, time left and last metrics, in one line."""
        (since, first), (now, latest) = self._seen[0], self._seen[-1]
        rate = (latest - first) / (now - since) if now > since else 0.0
        left = [(self.steps - step) / rate] if self.steps and rate else []
        left += [self.limit - seconds] if self.limit else []
        words = [f"step {step}/{self.steps}" if self.steps else f"step {step}"]
        if rate:
            words.append(f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step")
        if left:
            words.append(f"{duration(max(0.0, min(left)))} left")
        return " · ".join([*words, *format_metrics(metrics)])


class Lines(Reporter):
    """Plain lines for a log file: one every half minute."""

    period = LINE_SECONDS

    def show(self, step: int, seconds: float, status: str) -> None:
        self.say(f"{self.label}: {status}")

    def say(self, text: str) -> None:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)


class Bar(Reporter):
    """A rich progress bar: an own one on stderr, or a task in the caller's."""

    period = REFRESH_SECONDS

    def __init__(self, *args: Any, progress: Any = None):
        super().__init__(*args)
        from rich.markup import escape

        self._escape: Callable[[str], str] = escape
        self._own = progress is None
        self._progress = _new_progress() if progress is None else progress

    def __enter__(self) -> "Bar":
        if self._own:
            self._progress.start()
        total = self.steps or self.limit
        self._task = self._progress.add_task(self._escape(self.label), total=total, status="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._own:
            self._progress.stop()

    def begin(self, step: int, seconds: float) -> None:
        super().begin(step, seconds)
        self._progress.update(self._task, completed=step if self.steps else seconds)

    def show(self, step: int, seconds: float, status: str) -> None:
        text = self.label if self._own else f"{self.label} {status}"
        completed = step if self.steps else seconds
        self._progress.update(self._task, completed=completed, description=self._escape(text), status=status)

    def end(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        self.show(step, seconds, self.status(step, seconds, metrics))
        self._progress.stop_task(self._task)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def reporter(progress: object, label: str, steps: int | None, limit: float | None) -> Reporter:
    """The reporter for the `progress` argument of `run`.

    Raises:
        TypeError: `progress` is not a bool and not a `rich.progress.Progress`.
    """
    if progress is False:
        return Reporter(label, steps, limit)
    if progress is True:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        return Bar(label, steps, limit) if terminal else Lines(label, steps, limit)
    if callable(getattr(progress, "add_task", None)) and hasattr(progress, "console"):
        return Bar(label, steps, limit, progress=progress)
    raise TypeError(f"progress must be True, False or a rich.progress.Progress, got {progress!r}")


def format_metrics(metrics: Mapping[str, float], most: int = 4) -> list[str]:
    """The first few metrics as short texts."""
    return [f"{name} {value:.4g}" for name, value in list(metrics.items())[:most]]


def duration(seconds: float) -> str:
    """A time span in the unit that reads best.

    Examples:
        >>> duration(75)
        '1 min 15 s'
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _new_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def column(**options: Any) -> Column:
        return Column(no_wrap=True, overflow="ellipsis", **options)

    return Progress(
        TextColumn("{task.description}", table_column=column(max_width=24)),
        BarColumn(bar_width=None, table_column=column(min_width=10, max_width=24)),
        TextColumn("{task.fields[status]}", markup=False, table_column=column()),
        console=Console(stderr=True),
        transient=True,
    )
