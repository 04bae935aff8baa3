"""Warmup-stable-decay schedules and the river valley.

The theory is checked on the exactly solvable valley: one hill for the shape of the decay, hills and rivers for the
whole schedules. Training is checked on the bi-gram language, whose population loss is exact, and on a small
transformer of characters, all schedules with the same seeds and batches, each with its own tuned learning rate.

Source: Wen, Li, Wang, Hall, Liang and Ma 2024, arXiv 2410.05192.
"""

import itertools
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from steepest.dynamics import BigramToy, RiverValley
from steepest.optim.schedules import Schedule, branch_points, cyclic_cosine, open_ended, oracle_cosine, wsd, wsds
from steepest.studies._base import Claim, Run
from steepest.studies._wsd_s_runs import (
    Bigram,
    Characters,
    Family,
    Problem,
    at_checkpoints,
    compare,
    start,
    train,
    wsd_branches,
)

COMPONENTS = (
    "steepest.optim.WSDS",
    "steepest.optim.WSD",
    "steepest.optim.CyclicCosine",
    "steepest.optim.OracleCosine",
    "steepest.optim.branch_points",
    "steepest.loop.branch",
    "steepest.loop.on_checkpoint",
    "steepest.dynamics.RiverValley",
    "steepest.dynamics.river_residual",
    "steepest.dynamics.BigramToy",
)

BUDGETS = (1250, 2500, 5000)
VALUES = {
    "WSD-S, total": (0.00153675, 0.000647091, 0.000285493),
    "WSD-S, cycle": (0.00153675, 0.000782571, 0.000305183),
    "WSD, equal compute": (0.00153675, 0.000650378, 0.000287469),
    "cyclic cosine": (0.00238607, 0.00118717, 0.000492394),
    "oracle cosine": (0.00238607, 0.00115205, 0.000477903),
    "constant at the peak": (0.0121180, 0.0114430, 0.0111790),
    "constant at the floor": (0.00576574, 0.00553272, 0.00510652),
}
TUNED = ("wsds", "wsd", "cyclic cosine")
ORDER = ("WSD-S, total", "WSD, equal compute", "oracle cosine", "cyclic cosine")


def _last(measured: Mapping[str, Any], name: str, problem: str) -> float:
    """The mean over seeds of a schedule's loss at the last checkpoint."""
    return fmean(seed[name][-1] for seed in measured[problem])


def _seeds(measured: Mapping[str, Any]) -> bool:
    return all(len(runs) >= 3 for runs in measured.values())


def _compares(measured: Mapping[str, Any]) -> dict[str, bool]:
    found = {}
    for problem in ("bi-gram", "transformer"):
        ours = _last(measured, "WSD-S", problem)
        found[f"{problem}, cyclic"] = ours <= 0.97 * _last(measured, "cyclic cosine", problem)
        found[f"{problem}, WSD"] = abs(ours / _last(measured, "WSD", problem) - 1) <= 0.1
    return found if _seeds({key: measured[key] for key in ("bi-gram", "transformer")}) else {"seeds": False}


def _sharp(measured: Mapping[str, Any]) -> list[bool]:
    return [
        last > 0 and last >= 5 * before
        for problem in measured.values()
        for last, before in [(fmean(seed["last"] for seed in problem), fmean(seed["before"] for seed in problem))]
    ]


def _free(measured: Mapping[str, Any]) -> list[bool]:
    parts = []
    for problem in measured.values():
        parts.append(
            all(
                steps is not None and steps <= 2 * down
                for seed in problem
                for steps, down in zip(seed["recovery"], seed["decays"], strict=False)
            )
        )
        pairs = zip(
            *(zip(seed["WSD-S"][1:], seed["WSD, same decays"][1:], strict=True) for seed in problem), strict=True
        )
        parts.append(all(fmean(ours for ours, _ in pair) <= 1.02 * fmean(wsd for _, wsd in pair) for pair in pairs))
    return parts


CLAIMS = (
    Claim(
        id="C1",
        statement="On a hill the best decay is linear in the inverse of the learning rate.",
        reported="a theorem; final variance 0.0208333 for curvature 1, noise 0.5, from stationary at 0.4, 20 updates",
        criterion="all 20 rates searched numerically from a constant one: within 1e-6 (relative) of the greedy "
        "formula, final variance 0.0208333, increments of the inverse rate equal to the curvature within 1e-9",
        judge=lambda m: [
            m["largest relative difference"] <= 1e-6,
            f"{m['final variance']:.6g}" == "0.0208333",
            m["largest error of an increment"] <= 1e-9,
        ],
    ),
    Claim(
        id="C2",
        statement="In the stable phase the loss is high and the river fast; the decay shows it. Both matter.",
        reported="; ".join(f"{name} {' / '.join(f'{x:g}' for x in row)}" for name, row in VALUES.items()),
        criterion="three hills and two rivers, checkpoints 1250, 2500, 5000: all values in the six digits given, and "
        "at the last one " + " < ".join(ORDER),
        judge=lambda m: [
            *(
                float(f"{found:.6g}") == wanted
                for name, row in VALUES.items()
                for found, wanted in zip(m[name], row, strict=True)
            ),
            all(m[a][-1] < m[b][-1] for a, b in itertools.pairwise(ORDER)),
        ],
    ),
    Claim(
        id="C3",
        statement="The landscape comes from the data: certain contexts are the river, uncertain ones the hills.",
        reported="deterministic excess .0004 against .0038 at the small rate; uncertain excess .0383 to .0080, .0377 "
        "to .0081, .0414 to .0081 in the decay; plateau .03486 predicted",
        criterion="V = 64, K = 8, batches of 64, SGD at 20 for 4000 updates and a harmonic decay of 400 to 2, beside "
        "constant 20 and constant 2; in each of at least 3 seeds: deterministic excess at most 1/5 of that of constant "
        "2; uncertain excess at least 3 times lower after the decay, deterministic part changed by less than 10 %; the "
        "mean plateau over the last 1000 stable updates within 25 % of the prediction",
        judge=lambda m: {
            "seeds": len(m["runs"]) >= 3,
            "river": all(r["decayed"][0] <= r["constant, low"][0] / 5 for r in m["runs"]),
            "hills": all(r["before"][1] >= 3 * r["decayed"][1] for r in m["runs"]),
            "river in the decay": all(abs(r["decayed"][0] / r["before"][0] - 1) < 0.1 for r in m["runs"]),
            "plateau": all(abs(r["plateau"] / m["predicted plateau"] - 1) <= 0.25 for r in m["runs"]),
        },
    ),
    Claim(
        id="C4",
        statement="WSD-S is better than WSD and cyclic cosine over several budgets in one run.",
        reported="bi-gram: .01066/.01004/.01149 against .01215/.01147/.01222 (cyclic) and .01088/.00990/.01132 (WSD at "
        "equal compute): a tie with WSD",
        criterion="decays of 10 % of the budget so far; (a) bi-gram, checkpoints 800, 1600, 3200, rate 20 to 1; (b) a "
        "transformer of characters with AdamW, the rate of each schedule tuned on one grid; mean over at least 3 seeds "
        "at the last checkpoint, both problems: at least 3 % below cyclic cosine, within 10 % of WSD at equal compute",
        judge=_compares,
    ),
    Claim(
        id="C5",
        statement="The loss stays high while the rate is, and falls sharply in the decay.",
        reported="the curves of the paper; no number",
        criterion="WSD runs of C3 and C4, mean over at least 3 seeds: the loss falls in the last 10 % of the updates "
        "(a branch: of its budget) at least 5 times as much as in the 10 % before",
        judge=lambda m: [all(len(runs) >= 3 for runs in m.values()) and part for part in _sharp(m)],
    ),
    Claim(
        id="C6",
        statement="Going on from the decayed checkpoint costs nothing.",
        reported="no number",
        criterion="after every jump to the peak the training loss on the same batches (moving mean) reaches that of "
        "the run that never decayed within 2 D_k updates, in each of at least 3 seeds; the mean losses of the next "
        "checkpoints at most 2 % above those of WSD branches with the same decays at equal updates",
        judge=lambda m: [all(len(runs) >= 3 for runs in m.values()) and part for part in _free(m)],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _hill(run)
        case "C2":
            return _valley()
        case "C3":
            return _emergence(run)
    runs = run.once("comparison", lambda: _comparison(run))
    match claim:
        case "C4":
            return {**runs, "WSD-S relative to": _relative(runs)}
        case "C5":
            return {"C3": [_drops(r["path"]) for r in _emergence(run)["runs"]]} | {
                name: [_drops(seed["WSD before"]) for seed in runs[name]] for name in ("bi-gram", "transformer")
            }
        case "C6":
            wanted = ("recovery", "decays", "WSD-S", "WSD, same decays")
            return {
                name: [{key: seed[key] for key in wanted} for seed in runs[name]] for name in ("bi-gram", "transformer")
            }
    raise ValueError(f"no claim {claim!r}")


def _hill(run: Run) -> dict[str, Any]:
    hill, steps = RiverValley([1.0], [0.5]), 20
    variance = hill.stationary_variance(0.4)
    greedy = hill.greedy_lrs(steps, variance=variance)
    optimal = hill.optimal_lrs(steps, variance=variance, start=0.1)
    return {
        "rates": optimal.tolist(),
        "largest relative difference": float((optimal / greedy - 1).abs().max()),
        "final variance": float(hill.run(optimal, variance=variance).variance[-1]),
        "largest error of an increment": float(((1 / greedy).diff() - 1).abs().max()),
    }


def _valley() -> dict[str, Any]:
    valley = RiverValley([1.0, 0.5, 0.2, 1e-3, 3e-4], [0.01, 0.01, 0.01, 1e-6, 1e-6])

    def losses(schedule: Schedule, *marks: int) -> list[float]:
        run = valley.run(schedule.lrs(range(max(marks))), mean=[1.0, 1.0, 1.0, 3.0, 3.0])
        return [float(run.loss[mark]) for mark in marks]

    low = 0.02
    found = {
        "WSD-S, total": losses(wsds(BUDGETS, floor_ratio=low, reference="total"), *BUDGETS),
        "WSD-S, cycle": losses(wsds(BUDGETS, floor_ratio=low), *BUDGETS),
        "cyclic cosine": losses(cyclic_cosine(BUDGETS, floor_ratio=low), *BUDGETS),
        "oracle cosine": [losses(oracle_cosine(total, floor_ratio=low), total)[0] for total in BUDGETS],
        "constant at the peak": losses(open_ended(), *BUDGETS),
        "constant at the floor": losses(open_ended(peak=low), *BUDGETS),
    }
    for name, compute in (("WSD, equal compute", "equal"), ("WSD, branches not counted", "excluded")):
        points = branch_points(BUDGETS, compute=compute)  # type: ignore[arg-type]
        found[name] = [losses(p.schedule(floor_ratio=low), p.start + p.decay)[0] for p in points]
    return found


def _emergence(run: Run) -> dict[str, Any]:
    return run.once("emergence", lambda: _emerge(run))


def _emerge(run: Run) -> dict[str, Any]:
    vocab, choices, batch = run.pick(smoke=(16, 4, 16), desktop=(64, 8, 64))
    stable, down, seeds = run.pick(smoke=(100, 20, 1), desktop=(4000, 400, 3))
    high, low = 20.0, 2.0
    runs = []
    for seed in run.seeds(seeds):
        problem = Bigram(BigramToy(vocab, choices, seed), batch)
        marks = [int(part * (stable + down)) for part in (0.8, 0.9, 1)]
        excess: dict[int, tuple[float, float]] = {}

        def look(updates: int, state: Any, loss: float, excess: dict = excess, problem: Bigram = problem) -> None:
            if updates % 10 == 0 or updates in (stable, stable + down):
                excess[updates] = problem.excess(state["model"])

        ends = {}
        schedules = {"constant, low": (low, open_ended()), "constant, high": (high, open_ended())}
        for name, (lr, schedule) in schedules.items():
            state = train(problem, start(problem, seed, lr, schedule), stable + down)
            ends[name] = problem.excess(state["model"])
        decay = wsd(stable + down, decay=(down,), floor_ratio=low / high)
        state = train(problem, start(problem, seed, high, decay), stable + down, look)
        late = [u for t, (_, u) in excess.items() if 3 / 4 * stable < t <= stable]
        near = [min(excess, key=lambda t, mark=mark: abs(t - mark)) for mark in marks]
        runs.append(
            {
                **{name: list(pair) for name, pair in ends.items()},
                "before": list(excess[stable]),
                "decayed": list(excess[stable + down]),
                "plateau": fmean(late),
                "path": [sum(excess[t]) for t in near],
            }
        )
        run.say(f"C3, seed {seed}: uncertain {runs[-1]['before'][1]:.4f} to {runs[-1]['decayed'][1]:.4f}")
    toy = BigramToy(vocab, choices)
    return {"runs": runs, "predicted plateau": toy.plateau(high, batch)}


def _comparison(run: Run) -> dict[str, Any]:
    seeds = run.pick(smoke=1, desktop=3)
    vocab, choices, batch = run.pick(smoke=(16, 4, 16), desktop=(64, 8, 64))
    checkpoints = run.pick(smoke=(20, 40, 80), desktop=(800, 1600, 3200))
    family, found = Family(checkpoints, floor_ratio=1 / 20), {}
    high: dict[str, float] = dict.fromkeys(TUNED, 20.0)
    found["bi-gram"] = [
        _one(run, "bi-gram", Bigram(BigramToy(vocab, choices, seed), batch), seed, high, family)
        for seed in run.seeds(seeds)
    ]
    characters = run.pick(smoke=Characters(16, 1, 16, 2, 4, 200_000), desktop=Characters())
    checkpoints, warmup = run.pick(smoke=((10, 20, 40), 2), desktop=((200, 400, 800), 20))
    family = Family(checkpoints, floor_ratio=0.1, warmup=warmup)
    grid = run.pick(smoke=(3e-3,), desktop=(4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2))
    lrs, tuning = _tuned(run, characters, grid, family)
    found["transformer"] = [_one(run, "transformer", characters, seed, lrs, family) for seed in run.seeds(seeds)]
    return {**found, "best rates": lrs, "tuning": tuning}


def _one(run: Run, name: str, problem: Problem, seed: int, lrs: dict[str, float], family: Family) -> dict[str, Any]:
    found = compare(problem, seed, lrs, family, window=10)
    found["decays"] = family.decays
    ours, wsd_loss, cosine = (found[key][-1] for key in ("WSD-S", "WSD", "cyclic cosine"))
    run.say(f"{name}, seed {seed}: WSD-S {ours:.5f}, WSD {wsd_loss:.5f}, cyclic cosine {cosine:.5f}")
    return found


def _tuned(run: Run, problem: Problem, grid: tuple[float, ...], family: Family) -> tuple[dict[str, float], Any]:
    """The rate of each schedule with the least mean loss at the last checkpoint, on seeds of its own."""
    best: dict[str, float] = {}
    tuning: dict[str, list[float]] = {name: [] for name in TUNED}
    for lr in grid:
        ends: dict[str, list[float]] = {name: [] for name in TUNED}
        for seed in range(100, 100 + run.pick(smoke=1, desktop=2)):
            ends["wsds"].append(at_checkpoints(problem, start(problem, seed, lr, family.wsds()), family)[-1])
            ends["wsd"].append(wsd_branches(problem, seed, lr, family, only_equal=True).equal[-1])
            cosine = start(problem, seed, lr, family.cyclic_cosine())
            ends["cyclic cosine"].append(at_checkpoints(problem, cosine, family)[-1])
        for name in TUNED:
            mean = fmean(ends[name])
            tuning[name].append(mean if math.isfinite(mean) else math.inf)
        run.say(f"rate {lr:g}: {', '.join(f'{name} {tuning[name][-1]:.4f}' for name in TUNED)}")
    for name, means in tuning.items():
        best[name] = grid[means.index(min(means))]
    return best, {"rates": list(grid), **tuning}


def _relative(runs: Mapping[str, Any]) -> dict[str, Any]:
    """The mean loss of WSD-S at the last checkpoint over that of each rival, less one."""
    rivals = ("WSD", "WSD-S, decays of the cycle", "cyclic cosine", "oracle cosine", "constant", "constant, averaged")
    return {
        problem: {name: _last(runs, "WSD-S", problem) / _last(runs, name, problem) - 1 for name in rivals}
        for problem in ("bi-gram", "transformer")
    }


def _drops(path: list[float]) -> dict[str, float]:
    """From the losses 20 % and 10 % of the updates before the end, and there."""
    return {"before": path[0] - path[1], "last": path[1] - path[2]}
