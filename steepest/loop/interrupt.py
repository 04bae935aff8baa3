"""Ctrl-C and SIGTERM that let the step under way finish."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is noted in `received`, and the handlers before are put back.

    A second signal therefore acts at once. Does nothing outside the main thread, for a signal that is ignored or was
    set up outside Python, or inside another run that already listens.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if self.enabled:
            for number in SIGNALS:
                previous = signal.getsignal(number)
                nested = isinstance(getattr(previous, "__self__", None), Interrupts)
                if previous is not None and previous is not signal.SIG_IGN and not nested:
                    self._previous[number] = previous
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def deliver(self) -> None:
        """Send the noted signal again, now to the handler that was there before this run."""
        if self.received is not None:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, previous = self._previous.popitem()
            if signal.getsignal(number) == self._note:
                signal.signal(number, previous)
