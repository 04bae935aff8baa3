"""PolyStep: descent from forward passes, by softmax weights over the vertices of random polytopes.

Measured on small problems: one-sided transport and its limits, a rate on a smooth function, networks of stairs and of
spiking neurons on the 8x8 digits, an oblique tree, random 3-SAT, and CartPole. Competitors are compared at equal
evaluations and at equal time, since the paper's budgets differ by a factor of 40 to 800.

Source: Le 2026, arXiv 2605.01928, and the result files of its reference code.
"""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch

from steepest.gradient_free import one_sided_ot
from steepest.studies import _polystep_networks as networks
from steepest.studies import _polystep_tasks as tasks
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.gradient_free.PolyStep",
    "steepest.gradient_free.PolyStepSearch",
    "steepest.gradient_free.NetworkLoss",
    "steepest.gradient_free.Hybrid",
    "steepest.gradient_free.one_sided_ot",
    "steepest.gradient_free.MaxSat",
    "steepest.gradient_free.EvolutionStrategy",
    "steepest.gradient_free.SPSA",
    "steepest.gradient_free.WalkSAT",
    "steepest.nn.Population",
    "steepest.nn.Staircase",
    "steepest.nn.HardLIF",
    "steepest.nn.HardTree",
    "steepest.nn.QuantizedLinear",
    "steepest.nn.SignLinear",
)

LAMBDAS = (0.0, 0.01, 0.1, 1.0, math.inf)
MODES = ("float", "int8", "binary")
EVOLUTION = {"paper": (0.02, 0.01), "tuned": (0.1, 0.1)}
MAXSAT_GRID = ((0.02, 0.01), (0.1, 0.1), (0.3, 0.3), (1.0, 1.0), (1.0, 3.0))


def _tests(runs: list[dict[str, Any]]) -> list[float]:
    return [run["test"] for run in runs]


def _leads(found: Mapping[str, list[dict[str, Any]]]) -> bool:
    means = {name: fmean(_tests(runs)) for name, runs in found.items()}
    return all(means["PolyStep"] > mean for name, mean in means.items() if name != "PolyStep")


CLAIMS = (
    Claim(
        id="C1",
        statement="One-sided transport goes from a softmax of each row to Sinkhorn as the column marginal counts more.",
        reported="proved; derived: column violation .096, .093, .070, .020, 0 at lambda 0, .01, .1, 1, infinity",
        criterion="random 5x4 costs, epsilon .2: lambda 0 is the softmax to 1e-15, row sums are exact to 1e-15, and "
        "the column violation falls monotonically, to at most 1e-10",
        judge=lambda m: [
            m["softmax error"] <= 1e-15,
            max(m["row error"]) <= 1e-15,
            all(a > b for a, b in zip(m["column violation"][:-1], m["column violation"][1:], strict=True))
            and m["column violation"][-1] <= 1e-10,
        ],
    ),
    Claim(
        id="C2",
        statement="With radii t^(-1/4) the averaged squared gradient falls like log T / sqrt(T).",
        reported="abstract: O(log T / sqrt T); derived: average times sqrt(T) / log T is 29.1 at 10^2 and 22.8 at 10^4",
        criterion="sum of log(1 + x_i^2), d = 16, each of 3 seeds: that product at T = 10^4 at most 1.2 times that at "
        "10^2, and the least squared gradient below 1e-2 by T = 1000",
        judge=lambda m: [
            all(last <= 1.2 * first for first, last in zip(m["first"], m["last"], strict=True)),
            max(m["least by 1000"]) < 1e-2,
        ],
    ),
    Claim(
        id="C3",
        statement="It trains a network of stairs, and needs the soft weights for that.",
        reported="MNIST: 93.2 %; ablation: softmax and Sinkhorn 96.4 %, greedy about 10 %; derived on digits: softmax "
        ".913, .920, .947, greedy .35, .14, .20",
        criterion="64-32-32-10 on digits, each of 3 seeds: test accuracy at least .88 with softmax weights and at "
        "most .45 with greedy ones",
        judge=lambda m: [min(_tests(m["softmax"])) >= 0.88, max(_tests(m["greedy"])) <= 0.45],
    ),
    Claim(
        id="C4",
        statement="It leads every gradient-free competitor.",
        reported="LIF: 93.4 against ES 33.1, SPSA 29.4, CMA 16.2, with 20 to 80 million forward passes against 500,000 "
        "and 100,000; derived on digits: ES .938, .918, .927 with a tenth of PolyStep's evaluations",
        criterion="network of stairs, mean test accuracy over 3 seeds: above the tuned evolution strategy with equal "
        "evaluations, and with equal time; and, with 20,000 evaluations each, above it, the paper's settings of it, "
        "SPSA and CMA-ES",
        judge=lambda m: [_leads(m[budget]) for budget in ("equal evaluations", "equal time", "20,000 evaluations")],
    ),
    Claim(
        id="C5",
        statement="It trains a spiking network with hard thresholds.",
        reported="MNIST: 93.4 %; derived on digits: .81, chance (.091) if no output neuron fires at the start; "
        "evolution strategy with 20,000 evaluations .88 to .90",
        criterion="64-10 with 32 hidden hard LIF neurons, 8 steps, each of 3 seeds: test accuracy at least .70 after "
        "240 steps; from the usual initial values still at most .2 after 80",
        judge=lambda m: [
            min(_tests(m["PolyStep"])) >= 0.70,
            max(_tests(m["dead start"])) <= 0.2,
        ],
    ),
    Claim(
        id="C6",
        statement="It fits a hard oblique tree better than other searches.",
        reported="derived: .962, .860, .948; evolution strategy .770, .770, .807; soft tree by Adam, hardened, .947",
        criterion="depth 4, 3x3 checkerboard, 600 points, 40,000 evaluations, each of 3 seeds: training accuracy at "
        "least .85; the mean over seeds more than .05 above evolution strategy and SPSA",
        judge=lambda m: [
            min(m["PolyStep"]["train"]) >= 0.85,
            *(fmean(m["PolyStep"]["train"]) > fmean(m[name]["train"]) + 0.05 for name in ("evolution", "SPSA")),
        ],
    ),
    Claim(
        id="C7",
        statement="On MAX-SAT it holds its quality at scale, where evolution strategies drop.",
        reported="98.0 % at 1e5 and 92.6 % at 1e6 variables (evolution 88.9, 87.8 with fewer evaluations); derived: "
        ".980 and .979, .981; evolution .948, .950 with 50,000 evaluations and .989, .990 with 600,000",
        criterion="random 3-SAT, ratio 4.27, 500 and 2000 variables, each of 3 seeds: at least .975 of the clauses "
        "after 150 steps; mean above that of a tuned evolution strategy with 50,000 evaluations, with equal "
        "evaluations, and with equal time",
        judge=lambda m: [
            min(min(found["PolyStep"]["satisfied"]) for found in m["runs"].values()) >= 0.975,
            *(
                all(
                    fmean(found["PolyStep"]["satisfied"]) > fmean(found[f"evolution, {budget}"]["satisfied"])
                    for found in m["runs"].values()
                )
                for budget in ("few evaluations", "equal evaluations", "equal time")
            ),
        ],
    ),
    Claim(
        id="C8",
        statement="It finds policies with int8 and with binary weights.",
        reported="paper: policies survive quantisation; derived: mean returns 500, 500, 500 (float), 9, 500, 500 "
        "(int8), 500, 500, 500 (binary)",
        criterion="CartPole, 4-16-2, 10^4 evaluations on 4 episodes: mean return of the last policy over 50 starts at "
        "least 450 in at least 2 of 3 seeds, for float, int8 and binary weights (biases of the binary net are real; "
        "signs throughout are reported beside)",
        judge=lambda m: [sum(value >= 450 for value in m[mode]["last"]) >= 2 for mode in MODES],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flat landscape")
        match claim:
            case "C1":
                return _transport(run)
            case "C2":
                return _rate(run)
            case "C3":
                ours = run.once("stairs", lambda: _stairs(run))
                return {name: ours[name] for name in ours}
            case "C4":
                return _competitors(run)
            case "C5":
                return _spiking(run)
            case "C6":
                return _tree(run)
            case "C7":
                return _maxsat(run)
            case "C8":
                return _cartpole(run)
    raise ValueError(f"no claim {claim!r}")


def _seeds(run: Run) -> range:
    return run.seeds(run.pick(smoke=1, desktop=3))


def _transport(run: Run) -> dict[str, Any]:
    cost = torch.rand(5, 4, dtype=torch.float64, generator=run.generator(0))
    plans = [one_sided_ot(cost, 0.2, lam) for lam in LAMBDAS]
    return {
        "lambda": [str(lam) for lam in LAMBDAS],
        "softmax error": float((plans[0] - torch.softmax(-cost / 0.2, -1) / 5).abs().max()),
        "row error": [float((plan.sum(-1) - 0.2).abs().max()) for plan in plans],
        "column violation": [float((plan.sum(-2) - 0.25).abs().max()) for plan in plans],
    }


def _rate(run: Run) -> dict[str, Any]:
    horizons = run.pick(smoke=(10, 100), desktop=(100, 10_000))
    found: dict[str, Any] = {"horizons": list(horizons), "first": [], "last": [], "least by 1000": []}
    for seed in _seeds(run):
        squares = tasks.gradient_norms(horizons[1], run.generator(seed))
        for name, horizon in zip(("first", "last"), horizons, strict=True):
            found[name].append(float(squares[:horizon].mean()) * math.sqrt(horizon) / math.log(horizon))
        found["least by 1000"].append(float(squares[:1000].min()))
        run.say(f"C2, seed {seed}: {found['first'][-1]:.3g}, {found['last'][-1]:.3g}")
    return found


def _stairs(run: Run) -> dict[str, list[dict[str, Any]]]:
    data, steps = networks.Data(), run.pick(smoke=2, desktop=120)
    found: dict[str, list[dict[str, Any]]] = {}
    for solver in run.pick(smoke=("softmax", "greedy"), desktop=("softmax", "greedy", "sinkhorn")):
        found[solver] = []
        for seed in _seeds(run):
            generator = run.generator(seed)
            model = networks.staircase(generator)
            found[solver].append(networks.polystep(model, data, steps, generator, solver=solver, **networks.STAIRCASE))
            run.say(f"C3, {solver}, seed {seed}: {found[solver][-1]['test']:.3f}")
    return found


def _competitors(run: Run) -> dict[str, Any]:
    data, few = networks.Data(), run.pick(smoke=200, desktop=20_000)
    ours = run.once("stairs", lambda: _stairs(run))["softmax"]
    found: dict[str, Any] = {
        "equal evaluations": {"PolyStep": ours},
        "equal time": {"PolyStep": ours},
        "20,000 evaluations": {"PolyStep": []},
        "surrogate by Adam": [],
    }

    def search(budget: str, name: str, make: Any, points: int, evaluations: int, seed: int) -> dict[str, Any]:
        generator = run.generator(seed)
        model = networks.staircase(generator)
        result = networks.searched(model, data, make(generator), max(1, evaluations // points), generator)
        found[budget].setdefault(name, []).append(result)
        run.say(f"C4, {budget}, {name}, seed {seed}: {result['test']:.3f}, {result['seconds']:.0f} s")
        return result

    for seed in _seeds(run):
        generator = run.generator(seed)
        model = networks.staircase(generator)
        steps = round(few / (ours[seed]["evaluations"] / run.pick(smoke=2, desktop=120))) or 1
        found["20,000 evaluations"]["PolyStep"].append(
            networks.polystep(model, data, steps, generator, **networks.STAIRCASE)
        )
        competitors: dict[str, tuple[Any, int]] = {
            f"evolution, {name}": (partial(networks.evolution, *settings), 50) for name, settings in EVOLUTION.items()
        }
        competitors["SPSA"] = (networks.spsa, 2)
        competitors["CMA-ES"] = (networks.cma, 16)
        for name, (make, points) in competitors.items():
            first = search("20,000 evaluations", name, make, points, few, seed)
            rate = first["evaluations"] / first["seconds"]
            if name == "evolution, tuned":
                search("equal evaluations", name, make, points, ours[seed]["evaluations"], seed)
                search("equal time", name, make, points, int(rate * ours[seed]["seconds"]), seed)
        generator = run.generator(seed)
        twin = networks.adam(networks.staircase(generator), data, run.pick(smoke=5, desktop=600), generator)
        found["surrogate by Adam"].append(twin)
    return found


def _spiking(run: Run) -> dict[str, Any]:
    data, steps = networks.Data(), run.pick(smoke=2, desktop=240)
    found: dict[str, Any] = {
        "PolyStep": [], "dead start": [], "evolution, 20,000 evaluations": [], "surrogate by Adam": []
    }  # fmt: skip
    for seed in _seeds(run):
        generator = run.generator(seed)
        model = networks.spiking(generator)
        found["PolyStep"].append(networks.polystep(model, data, steps, generator, **networks.SPIKING))
        generator = run.generator(seed)
        dead = networks.spiking(generator, alive=False)
        found["dead start"].append(networks.polystep(dead, data, max(1, steps // 3), generator, **networks.SPIKING))
        generator = run.generator(seed)
        make, count = networks.evolution(0.1, 0.1, generator), run.pick(smoke=2, desktop=400)
        model = networks.spiking(generator)
        found["evolution, 20,000 evaluations"].append(networks.searched(model, data, make, count, generator))
        generator = run.generator(seed)
        twin = networks.adam(networks.spiking(generator), data, run.pick(smoke=2, desktop=600), generator)
        found["surrogate by Adam"].append(twin)
        run.say(f"C5, seed {seed}: " + ", ".join(f"{name} {runs[-1]['test']:.3f}" for name, runs in found.items()))
    return found


def _tree(run: Run) -> dict[str, Any]:
    evaluations = run.pick(smoke=300, desktop=40_000)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in _seeds(run):
        generator = run.generator(seed)
        tree = tasks.Tree(*networks.checkerboard(600, generator))
        new = networks.checkerboard(2000, generator)
        start = torch.randn(tree.population.size, generator=generator)
        splits = {
            name: getattr(tasks.finish(search, evaluations), "x", start)
            for name, search in tasks.tree_searches(tree, start, evaluations, generator).items()
        }
        splits["soft tree by Adam"] = tree.by_adam(run.pick(smoke=5, desktop=800), generator)
        for name, x in splits.items():
            entry = found.setdefault(name, {"train": [], "test": []})
            entry["train"].append(1 - float(tree(x)))
            entry["test"].append(tree.accuracy(x, *new))
        run.say(f"C6, seed {seed}: " + ", ".join(f"{name} {each['train'][-1]:.3f}" for name, each in found.items()))
    return found


def _maxsat(run: Run) -> dict[str, Any]:
    steps, small = run.pick(smoke=5, desktop=150), run.pick(smoke=500, desktop=50_000)
    tuned = run.once("tuning", lambda: _tuned(run, small))
    runs: dict[str, Any] = {}
    for variables in run.pick(smoke=(30,), desktop=(500, 2000)):
        found = runs.setdefault(str(variables), {})
        for seed in _seeds(run):
            results = tasks.maxsat(variables, steps, run.generator(seed), tuned, small)
            for name, numbers in results.items():
                for what, value in numbers.items():
                    found.setdefault(name, {}).setdefault(what, []).append(value)
            run.say(
                f"C7, {variables}, seed {seed}: " + ", ".join(f"{n} {x['satisfied']:.4f}" for n, x in results.items())
            )
    return {"evolution's settings": tuned, "runs": runs}


def _tuned(run: Run, small: int) -> dict[str, float]:
    """The best settings of the evolution strategy with few evaluations, on an instance of its own."""
    from steepest.gradient_free import EvolutionStrategy, MaxSat, random_3sat
    from steepest.loop.schedules import Linear

    generator = run.generator(100)
    variables = run.pick(smoke=30, desktop=500)
    problem = MaxSat(random_3sat(variables, generator=generator), variables)
    start, count = 0.1 * torch.randn(variables, generator=generator), small // 50
    found = {}
    for sigma, lr in MAXSAT_GRID:
        decay = Linear(lr, 0.1 * lr, count)
        search = EvolutionStrategy(problem, start, population=50, sigma=sigma, lr=decay, generator=generator)
        found[sigma, lr] = float(problem(tasks.finish(search, small).best))
    sigma, lr = min(found, key=lambda each: found[each])
    return {"sigma": sigma, "lr": lr}


def _cartpole(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    evaluations, episodes, tests, length = run.pick(smoke=(228, 1, 3, 20), desktop=(10_000, 4, 50, 500))
    for mode in (*MODES, "binary throughout"):
        entry = found.setdefault(mode, {})
        for seed in _seeds(run):
            result = tasks.cartpole(mode, evaluations, episodes, tests, run.generator(seed), length)
            for what, value in result.items():
                entry.setdefault(what, []).append(value)
            run.say(f"C8, {mode}, seed {seed}: last {result['last']:.0f}, best {result['best']:.0f}")
    return found
