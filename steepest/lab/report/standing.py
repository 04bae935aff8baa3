"""Each method of a race document with its result, and how far two of them are apart."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steepest.lab.compare import Difference, margin
from steepest.lab.report.text import clean, number, numbers

Trial = Mapping[str, Any]
_STATES = ("complete", "pruned", "failed", "diverged")


@dataclass(frozen=True, eq=False)
class Standing:
    """One method: its entry, its final validation loss, and all its trials.

    `values` are the finite final losses over seeds, `lost` is the number of seeds without one, `runs` are the complete
    trials at the best learning rate, one a seed. `mean` is None if any seed is lost: a lost seed is not averaged away.
    """

    entry: Mapping[str, Any]
    name: str
    title: str
    mean: float | None
    std: float | None
    values: tuple[float, ...]
    lost: int
    runs: tuple[Trial, ...]
    trials: tuple[Trial, ...]

    @property
    def finalist(self) -> bool:
        return bool(self.entry.get("finalist"))

    @property
    def curves(self) -> tuple[Trial, ...]:
        """What to draw: `runs`, or where no trial is complete, the trial that went furthest."""
        furthest = max(self.trials, key=lambda x: number(x.get("steps")) or 0.0, default=None)
        return self.runs or (() if furthest is None else (furthest,))

    def target(self, key: str) -> float | None:
        """The mean of `steps_to_target` or `seconds_to_target`; None where the target was not reached."""
        entry = self.entry.get(key)
        return number(entry.get("mean")) if isinstance(entry, Mapping) else None

    def by_seed(self) -> dict[int, float]:
        """Final loss by seed: of the runs, or in the order of `values` where the document has no runs."""
        found = {number(run.get("seed")): number(run.get("value")) for run in self.runs}
        paired = {int(k): v for k, v in found.items() if k is not None and v is not None}
        return paired or dict(enumerate(self.values))


def standings(document: Mapping[str, Any]) -> tuple[Standing, ...]:
    """The methods, best first: ranked ones by rank, then by loss, then those without a result."""
    trials: dict[str, list[Trial]] = defaultdict(list)
    for trial in document["trials"]:
        trials[str(trial.get("method"))].append(trial)

    def order(item: Standing) -> tuple[float, float]:
        rank = number(item.entry.get("rank"))
        return (math.inf if rank is None else rank, math.inf if item.mean is None else item.mean)

    return tuple(sorted((_standing(x, trials[str(x.get("name"))]) for x in document["methods"]), key=order))


def _standing(entry: Mapping[str, Any], trials: Sequence[Trial]) -> Standing:
    final = entry.get("final")
    final = final if isinstance(final, Mapping) else {}
    values = tuple(numbers(final.get("values")))
    recorded = final.get("values")
    lost = len(recorded) - len(values) if isinstance(recorded, list) else 0
    mean = None if lost else number(final.get("mean"))
    std = number(final.get("std")) if mean is not None and len(values) > 1 else None
    name = str(entry.get("name"))
    title = clean(entry.get("title") or name)
    return Standing(entry, name, title, mean, std, values, lost, best_runs(entry, trials), tuple(trials))


def best_runs(entry: Mapping[str, Any], trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The complete trials at the method's best learning rate, one a seed, in the order of seeds."""
    best = number(entry.get("best_lr"))
    found: dict[float, Trial] = {}
    for trial in trials:
        lr, seed = number(trial.get("lr")), number(trial.get("seed"))
        if best is None or lr is None or trial.get("state") != "complete":
            continue
        if math.isclose(lr, best, rel_tol=1e-6):
            found.setdefault(-1.0 if seed is None else seed, trial)
    return tuple(found[seed] for seed in sorted(found))


def apart(better: Standing, worse: Standing) -> Difference:
    """How much lower `better` ends, seed by seed, and whether that is more than the spread over seeds."""
    return margin(better.by_seed(), worse.by_seed())


def target_ratio(item: Standing, reference: Standing | None, key: str) -> float | None:
    """How many times fewer steps (or seconds) than the reference: reference / method, None where either is unknown."""
    ours = item.target(key)
    theirs = None if reference is None else reference.target(key)
    return theirs / ours if ours and theirs else None


def state_code(trial: Trial) -> int:
    """0 complete, 1 pruned, 2 failed (or unknown), 3 diverged."""
    state = str(trial.get("state"))
    return _STATES.index(state) if state in _STATES else 2
