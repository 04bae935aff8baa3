"""What the history of a monitor says about a run, in plain words."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

State = Literal[
    "unknown",
    "stable",
    "at the edge of stability",
    "beyond the edge of stability",
    "diverging by a spike",
    "noise-limited",
]

EDGE = 0.85  # of the threshold: from here on a run counts as at its edge
NOISE = 0.3  # cosine between gradients of a batch and of the monitor's data
FLAT = 0.05  # relative change of the loss over the window that counts as none
BEYOND = 10.0  # times the threshold, or the radius within which the loss's expansion means something
SPIKE = 3.0  # times the lowest loss so far
RECENT = 5


class Verdict(NamedTuple):
    """How a run stands.

    Attributes:
        state: In two or three words.
        sentence: With the numbers that it follows from.
    """

    state: State
    sentence: str


def judge(history: Mapping[str, Sequence[float]]) -> Verdict:
    """The state of a run from a monitor's history; the first of these that holds for the last measurements.

    - diverging by a spike: the loss is not finite, or the last one is 3 times the lowest and above the first;
    - beyond the edge of stability: the sharpness is in the median 10 times its threshold, or a step 10 times the radius
      within which the loss's expansion converges;
    - at the edge of stability: the median relative sharpness is at least 0.85;
    - noise-limited: the median cosine between a step's gradient and that of the monitor's data is below 0.3, and the
      loss has changed by less than 5 % between the halves of the history's second half;
    - stable: none of them.

    Args:
        history: Of `steepest.dynamics.Monitor`.
    """
    losses = list(history.get("loss", ()))
    if not losses:
        return Verdict("unknown", "Unknown: nothing has been measured yet.")
    if (spike := _spike(history, losses)) is not None:
        return Verdict("diverging by a spike", spike)
    if causes := _causes(history, statistics.median, BEYOND, names=("relative_sharpness", "radius_ratio")):
        return Verdict(
            "beyond the edge of stability",
            f"Beyond the edge of stability: {causes}; a smaller learning rate would train.",
        )
    ratio = _recent(history, "relative_sharpness")
    if ratio is not None and ratio >= EDGE:
        edge = _recent(history, "threshold")
        return Verdict(
            "at the edge of stability",
            f"At the edge of stability: the sharpness is {ratio:.2f} of its threshold {edge:.3g}: curvature and "
            "learning rate hold each other there.",
        )
    cosine, change = _recent(history, "alignment"), _change(losses)
    if cosine is not None and cosine < NOISE and change is not None and change < FLAT:
        return Verdict(
            "noise-limited",
            f"Noise-limited: gradients of a batch point {cosine:.2f} along the gradient of all data, and the loss has "
            f"changed by {100 * change:.1f} % lately; a smaller learning rate or a larger batch can bring it down.",
        )
    return Verdict("stable", f"Stable: {_margin(history, ratio)}.")


def _spike(history: Mapping[str, Sequence[float]], losses: list[float]) -> str | None:
    last = losses[-1]
    finite = [loss for loss in losses if math.isfinite(loss)]
    step = int(history["step"][-1])
    if math.isfinite(last):
        low = min(finite)
        if not (last > losses[0] and last > low + (SPIKE - 1) * max(abs(low), 1e-12)):
            return None
        change = f"the loss rose from {low:.3g} to {last:.3g} by step {step}"
    else:
        change = f"the loss is not finite at step {step}"
    causes = _causes(history, max, 1.0)
    return f"Diverging by a spike: {change}" + (f"; {causes}." if causes else ".")


WORDS = {
    "relative_sharpness": "the sharpness reached {:.3g} times its threshold",
    "radius_ratio": "a step was {:.3g} times the radius within which the loss's expansion converges",
    "overshoot": "a step's second-order effect was {:.3g} times its first-order effect",
}


def _causes(
    history: Mapping[str, Sequence[float]],
    of: Callable[[list[float]], float],
    least: float,
    names: Iterable[str] = tuple(WORDS),
) -> str:
    """What of the last measurements was too large, in words; nothing if nothing was."""
    causes = []
    for name in names:
        values = [v for v in list(history.get(name, ()))[-RECENT:] if math.isfinite(v)]
        if values and of(values) > least:
            causes.append(WORDS[name].format(of(values)))
    return ", and ".join(causes)


def _margin(history: Mapping[str, Sequence[float]], ratio: float | None) -> str:
    parts = []
    if ratio is not None:
        parts.append(f"the sharpness is {ratio:.2f} of its threshold")
    radius = _recent(history, "radius_ratio")
    if radius is not None:
        parts.append(f"a step is {radius:.2g} of the convergence radius")
    overshoot = _recent(history, "overshoot")
    if not parts and overshoot is not None:
        parts.append(f"the second-order effect of a step is {overshoot:.2g} of the first-order one")
    return " and ".join(parts) or "the loss is finite and has not spiked"


def _recent(history: Mapping[str, Sequence[float]], name: str) -> float | None:
    values = [v for v in list(history.get(name, ()))[-RECENT:] if math.isfinite(v)]
    return statistics.median(values) if values else None


def _change(losses: list[float]) -> float | None:
    """Relative difference of the mean loss between the halves of the last half of the history."""
    late = losses[len(losses) // 2 :]
    if len(late) < 4:
        return None
    half = len(late) // 2
    first, second = statistics.fmean(late[:half]), statistics.fmean(late[half:])
    return abs(second - first) / max(abs(first), 1e-300)
