"""Checks of arguments that several packages share."""

from typing import Any


def check_int(name: str, value: Any, least: int = 1) -> None:
    """Raise TypeError or ValueError, naming the argument, unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
