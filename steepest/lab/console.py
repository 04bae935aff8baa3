"""What a race shows while it runs: live bars on a terminal, one line per finished trial elsewhere."""

import time
from typing import Any

from steepest.lab.plan import PlanSettings, TrialKey, total_trials


class Display:
    """Progress of a race on a rich console; a context manager, silent without a console.

    Args:
        console: A `rich.console.Console`, or None.
        plan: Tells how many trials there are.
        done: Trials finished before.
    """

    def __init__(self, console: Any, plan: PlanSettings, done: int):
        self.console, self.total, self.done = console, total_trials(plan), done
        self._begun_with, self._since = done, time.monotonic()
        self._bars: Any = None

    def __enter__(self) -> "Display":
        if self.console is not None and self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._race = self._bars.add_task("race", total=self.total, completed=self.done, note="trials")
            self._trial = self._bars.add_task("", total=1, visible=False, note="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False)

    def started(self, key: TrialKey, steps: int, done: int) -> None:
        """A trial begins."""
        if self._bars is not None:
            self._bars.update(
                self._trial, description=str(key), total=steps, completed=done, visible=True, note="steps"
            )

    def stepped(self, step: int, loss: float) -> None:
        """A trial made a step."""
        if self._bars is not None:
            self._bars.update(self._trial, completed=step, note=f"steps · loss {loss:.4g}")

    def ended(self, key: TrialKey, result: dict[str, Any]) -> None:
        """A trial ended."""
        self.finished(self.done + 1)
        state, value = result["state"], result.get("value")
        outcome = (
            f"loss {value:.4f}" if state == "complete" and value is not None else f"{state}: {result.get('reason')}"
        )
        self.say(f"{self.done:>4}/{self.total}  {key.method:<12} lr {key.lr:<9g} seed {key.seed}  {outcome}")

    def finished(self, done: int) -> None:
        """So many trials have finished, by all workers."""
        self.done = max(done, self.done)
        if self._bars is not None:
            self._bars.update(self._race, completed=min(self.done, self.total), note=f"trials · {self._eta()}")

    def waiting(self, running: int) -> None:
        """This worker has nothing to do; others are still at work."""
        if self._bars is not None:
            self._bars.update(self._trial, description=f"waiting for {running} running trials", note="", visible=True)

    def _eta(self) -> str:
        made = self.done - self._begun_with
        if made < 1:
            return ""
        left = max(0, self.total - self.done) * (time.monotonic() - self._since) / made
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"
