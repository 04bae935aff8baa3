"""How long the next step of an optimizer can be, from what is known before it is taken."""

import math
from typing import Any

from torch import Tensor

from steepest.optim.checks import norm_text


class Forecast:
    """The last step, and what it was made with."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.length = float(state.get("length", math.inf))
        self.gradient = float(state.get("gradient", 0.0))
        self.rates: list[float] = list(state.get("rates", ()))
        self.settings: list[dict[str, Any]] = list(state.get("settings", ()))

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"length": self.length, "gradient": self.gradient, "rates": self.rates, "settings": self.settings}

    def length_now(self, groups: list[dict[str, Any]], gradient: float) -> float:
        """The last length, times the growth of the learning rates and of the gradient; infinite if all is new."""
        rates, settings = _read(groups)
        if settings != self.settings or not math.isfinite(self.length):
            return math.inf
        growth = 1.0
        for now, before in zip([*rates, gradient], [*self.rates, self.gradient], strict=True):
            if now > before:
                growth *= now / before if before > 0 else math.inf
        return self.length * growth

    def note(self, groups: list[dict[str, Any]], gradient: float, length: float) -> None:
        """A step was taken."""
        self.rates, self.settings = _read(groups)
        self.gradient, self.length = gradient, length


def _read(groups: list[dict[str, Any]]) -> tuple[list[float], list[dict[str, Any]]]:
    rates = [float(group["lr"]) if "lr" in group else 1.0 for group in groups]
    settings = [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names", "lr")}
        for group in groups
    ]
    return rates, settings


def _plain(value: Any) -> Any:
    """Something that can be compared and saved."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str | None) else norm_text(str(value))
