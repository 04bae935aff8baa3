"""Which trials a race runs: a pure function of the settings and of what has finished.

Any worker, on any machine, at any time, computes the same answer from the same finished trials; so a race needs no
coordinator, and goes on after any death.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TUNE, FINAL = "tune", "final"


@dataclass(frozen=True, order=True)
class TrialKey:
    """One training run: a method at one learning rate on one seed."""

    method: str
    lr: float
    seed: int
    stage: str

    def __str__(self) -> str:
        return f"{self.method} lr={self.lr:g} seed={self.seed} {self.stage}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"method": self.method, "lr": self.lr, "seed": self.seed, "stage": self.stage}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialKey":
        """The inverse of `to_json`."""
        return cls(str(data["method"]), float(data["lr"]), int(data["seed"]), str(data["stage"]))


@dataclass(frozen=True)
class Entrant:
    """A method in the race: its learning-rate range, and whether tuning must stay inside it."""

    name: str
    low: float
    high: float
    bounded: bool = False


@dataclass(frozen=True)
class PlanSettings:
    """What the plan depends on."""

    entrants: tuple[Entrant, ...]
    lr_trials: int
    seeds: int
    finalists: int | str
    reference: str | None


Finished = Mapping[TrialKey, float]
"""Final validation loss of each finished trial; infinity where it diverged, was pruned or failed."""


def next_trials(settings: PlanSettings, finished: Finished) -> list[TrialKey]:
    """The trials that can run now and have not finished, in the order in which they are best run.

    Tuning gives every method `lr_trials` learning rates on seed 0: first a log-spaced grid over its range, then, one
    by one, points that close in on the best (or go beyond the range, where the best lies at its edge). When all
    methods are tuned, the finalists run at their best learning rate on the other seeds. An empty list: all is done.
    """
    tuning = [key for entrant in settings.entrants for key in _tuning(settings, entrant, finished)]
    if tuning:
        return sorted(tuning, key=lambda key: _grid_order(settings, key))
    lacking = []
    for seed in range(1, settings.seeds):
        for name in finalists(settings, finished):
            key = TrialKey(name, _must(best_lr(name, finished)), seed, FINAL)
            if key not in finished:
                lacking.append(key)
    return lacking


def total_trials(settings: PlanSettings) -> int:
    """How many trials the race has in all (an upper bound: a method that never converges has no final)."""
    count = len(settings.entrants)
    final = count if settings.finalists == "all" else min(count, int(settings.finalists) + 1)
    return count * settings.lr_trials + final * (settings.seeds - 1)


def tuned(name: str, finished: Finished) -> dict[float, float]:
    """Learning rate -> value of the finished tuning trials of a method."""
    return {key.lr: value for key, value in finished.items() if key.method == name and key.stage == TUNE}


def best_lr(name: str, finished: Finished) -> float | None:
    """The learning rate with the lowest value (the lower one of equals); None where every one failed."""
    values = {lr: value for lr, value in tuned(name, finished).items() if value < math.inf}
    return min(values, key=lambda lr: (values[lr], lr)) if values else None


def finalists(settings: PlanSettings, finished: Finished) -> list[str]:
    """The methods that run on all seeds, best first: the top few by their best tuning value, and the reference."""
    scores = {}
    for entrant in settings.entrants:
        lr = best_lr(entrant.name, finished)
        if lr is not None:
            scores[entrant.name] = tuned(entrant.name, finished)[lr]
    ranked = sorted(scores, key=lambda name: (scores[name], name))
    if settings.finalists == "all":
        return ranked
    top = ranked[: int(settings.finalists)]
    return top + [name for name in ranked if name == settings.reference and name not in top]


def grid(entrant: Entrant, count: int) -> list[float]:
    """`count` log-spaced learning rates from the lowest to the highest of the range."""
    if count == 1:
        return [_round(math.sqrt(entrant.low * entrant.high))]
    ratio = entrant.high / entrant.low
    return _distinct(_round(entrant.low * ratio ** (i / (count - 1))) for i in range(count))


def refine(entrant: Entrant, values: Mapping[float, float]) -> float | None:
    """The next learning rate to try after `values`; None if the range holds no other.

    With the best in the middle: half-way (in log) to its better neighbour. With the best at an edge: beyond it, by
    half the distance (in log) to its neighbour, unless the range is a hard bound. With no finite value: below all.
    """
    lrs = sorted(values)
    finite = [lr for lr in lrs if values[lr] < math.inf]
    best = min(finite, key=lambda lr: (values[lr], lr)) if finite else lrs[0]
    at = lrs.index(best)
    below = lrs[at - 1] if at > 0 else None
    above = lrs[at + 1] if at + 1 < len(lrs) else None
    candidates = []
    if below is None:
        candidates.append(best / _stride(above / best) if above is not None else best / 3)
    elif above is None:
        candidates.append(best * _stride(best / below))
    if below is not None and above is not None:
        sides = sorted([below, above], key=lambda lr: (values[lr], lr))
        candidates += [math.sqrt(best * side) for side in sides]
    candidates += [math.sqrt(best * side) for side in (below, above) if side is not None]
    gaps = sorted(itertools.pairwise(lrs), key=lambda gap: -gap[1] / gap[0])
    candidates += [math.sqrt(low * high) for low, high in gaps]
    candidates += [math.sqrt(lrs[0] * entrant.low), math.sqrt(lrs[-1] * entrant.high)]
    for lr in map(_round, candidates):
        inside = entrant.low <= lr <= entrant.high
        if lr not in values and (inside or not entrant.bounded):
            return lr
    return None


def prune_reason(
    steps: int, val_step: Sequence[int], val_loss: Sequence[float], best: Mapping[int, float]
) -> str | None:
    """Why a tuning trial may stop now, or None.

    `best` holds the validation losses (step -> loss) of the best finished trial of the same method. A trial stops
    only if, from half-way on, at two measurements in a row, it has made less than half of the progress (initial loss
    minus loss) that the best had made at the same step. So a large learning rate, which looks worse until it decays,
    is safe.
    """
    if len(val_step) < 3 or val_step[0] not in best or best[val_step[0]] is None:
        return None
    start = val_loss[0]
    for step, loss in zip(val_step[-2:], val_loss[-2:], strict=True):
        if 2 * step < steps or step not in best or step >= steps:
            return None
        progress = best[val_step[0]] - best[step]
        if progress <= 0 or start - loss >= 0.5 * progress:
            return None
    step = val_step[-1]
    return (
        f"at step {step} its validation loss was {val_loss[-1]:.4g}, less than half of the way of this method's best "
        f"trial ({best[step]:.4g} at the same step)"
    )


def _tuning(settings: PlanSettings, entrant: Entrant, finished: Finished) -> list[TrialKey]:
    values = tuned(entrant.name, finished)
    coarse = grid(entrant, settings.lr_trials - settings.lr_trials // 3)
    missing = [lr for lr in coarse if lr not in values]
    if not missing and len(values) < settings.lr_trials:
        following = refine(entrant, values)
        missing = [] if following is None else [following]
    return [TrialKey(entrant.name, lr, 0, TUNE) for lr in missing]


def _grid_order(settings: PlanSettings, key: TrialKey) -> tuple[float, int]:
    """Middle learning rates first, method by method in turn: the likely best ones then serve the pruning."""
    names = [entrant.name for entrant in settings.entrants]
    entrant = settings.entrants[names.index(key.method)]
    middle = math.sqrt(entrant.low * entrant.high)
    return (round(abs(math.log(key.lr / middle)), 6), names.index(key.method))


def _stride(ratio: float) -> float:
    return max(math.sqrt(ratio), min(ratio, 2.0))


def _round(lr: float) -> float:
    return float(f"{lr:.3g}")


def _distinct(values: Iterable[float]) -> list[float]:
    return list(dict.fromkeys(values))


def _must(lr: float | None) -> float:
    assert lr is not None
    return lr
