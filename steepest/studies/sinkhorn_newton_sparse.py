"""Sinkhorn-Newton-Sparse: entropic optimal transport to machine precision where the entropy is weak.

Workloads: random assignments (costs uniform in [0, 1], equal marginals), and scikit-learn's digits doubled to 16 x 16,
divided by 16, plus 0.01, normalised, with the pixels' centres in the unit square.

Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao and Ying 2024, arXiv 2401.12253.
"""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steepest.studies._base import Claim, Run
from steepest.transport import OTResult, Sinkhorn, SinkhornNewton, entropic_ot, sinkhorn_rate, sinkhorn_sweep

COMPONENTS = (
    "steepest.transport.entropic_ot",
    "steepest.transport.SinkhornNewton",
    "steepest.transport.DenseNewton",
    "steepest.transport.Sinkhorn",
    "steepest.transport.sinkhorn_rate",
)
ETA = 1200.0
PAIRS = ((0, 1), (3, 8))
PREDICTED = {"200": 48, "600": 762, "1200": 69704}
PAPER_LAP = "n = 500, eta = 1200: SNS 29 iterations (20 + 9) and .34 s, Sinkhorn 56199 and 233 s"

CLAIMS = (
    Claim(
        id="C1",
        statement="Sinkhorn's rate is the squared second singular value of the scaled plan, and tends to 1 as eta "
        "grows.",
        reported="rate .89134 on a 3 x 3 problem; sweeps to 1e-12 at eta 200, 600, 1200: 48, 762, 69704 (n = 500)",
        criterion="measured ratio of errors within 1 % of sigma_2^2 (3 x 3; n = 500, eta 200 and 600, three seeds; of "
        "small errors near the solution); "
        "predicted sweeps at the three eta within 20 % of the known ones (seed 0)",
        judge=lambda m: [
            *(abs(each["measured"] / each["predicted"] - 1) <= 0.01 for each in m["rates"].values()),
            *(abs(m["sweeps to 1e-12"]["0"][eta] / known - 1) <= 0.2 for eta, known in PREDICTED.items()),
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C2",
        statement="SNS needs tens of iterations where Sinkhorn needs tens of thousands.",
        reported=PAPER_LAP,
        criterion="n = 500, eta = 1200, 20 sweeps first, no continuation, seed 0: error < 1e-12 in at most 35 "
        "iterations with keep = 5 or 10, and in at most a hundredth of the sweeps that Sinkhorn needs; Sinkhorn's "
        "error after 500 sweeps > 1e-6",
        judge=lambda m: [
            min(m["iterations"][keep][0] for keep in ("5", "10")) <= 35,
            min(m["iterations"][keep][0] for keep in ("5", "10")) <= m["sweeps to 1e-12"][0] / 100,
            m["Sinkhorn's error"][0] > 1e-6,
        ],
    ),
    Claim(
        id="C3",
        statement="The same for squared distances between images.",
        reported="28 x 28 images: SNS 53 iterations and 2.33 s, Sinkhorn 2041 and 18.8 s",
        criterion="digits (0, 1) and (3, 8), eta = 1200, 20 sweeps first: error < 1e-12 in at most 60 iterations; "
        "Sinkhorn's error after 2000 sweeps > 1e-7",
        judge=lambda m: [
            *(steps <= 60 for steps in m["iterations"].values()),
            *(error > 1e-7 for error in m["Sinkhorn's error"].values()),
        ],
    ),
    Claim(
        id="C4",
        statement="Distances in the l1 norm need more: their optimal plans are not unique.",
        reported="28 x 28 images: SNS 777 iterations (700 + 77) and 12.2 s, Sinkhorn 5748 and 45.8 s",
        criterion="same digits: without damping or continuation, 15 entries a row and 200 sweeps first, 150 Newton "
        "steps leave an error above 1e-6; with damping, and with continuation, < 1e-12 in at most 400 iterations; the "
        "cost is that of linear programming to 1e-6",
        judge=lambda m: [
            *(error > 1e-6 for error in m["plain error"].values()),
            *(steps <= 400 for steps in m["iterations, damping"].values()),
            *(steps <= 400 for steps in m["iterations, continuation"].values()),
            *(abs(m["cost"][pair] - m["exact cost"][pair]) <= 1e-6 for pair in m["cost"]),
        ],
    ),
    Claim(
        id="C5",
        statement="The entropic plan is close to the best vertex: |P - P*|_1 <= 6 n^2 exp(-eta D), D the gap to the "
        "second-best vertex.",
        reported="a theorem, for eta > (1 + 2 log n) / D",
        criterion="random assignments with n = 4, 5, 6, all vertices enumerated, eta = 1.5 (1 + 2 log n) / D, every "
        "seed: the bound holds",
        judge=lambda m: [
            all(a <= b for a, b in zip(each["distance"], each["bound"], strict=True)) for each in m.values()
        ],
    ),
    Claim(
        id="C6",
        statement="A Newton step costs about as much as a sweep.",
        reported="the same O(n^2)",
        criterion="medians of time, random assignments at eta = 1200, keep = 5: ratio at most 5 for n = 500, 1000, "
        "2000, and not more than 1.5 times larger at 2000 than at 500",
        judge=lambda m: [
            *(ratio <= 5 for ratio in m["ratio"].values()),
            m["ratio"]["2000"] <= 1.5 * m["ratio"]["500"],
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C7",
        statement="SNS beats current practice.",
        reported=PAPER_LAP + "; images: SNS 2.33 s, Sinkhorn 18.8 s",
        criterion="error below 1e-8 at least 10 times sooner than POT's sinkhorn_log, on the assignment with n = 500 "
        "and both pairs of digits. POT is stopped at a fixed number of sweeps: where it is not there, its time "
        "is a lower bound. regot and exact network simplex are reported beside it",
        judge=lambda m: [
            each["POT error"] > 1e-8 and each["POT seconds"] >= 10 * each["SNS seconds"] and each["SNS error"] <= 1e-8
            for each in m.values()
        ],
        scales=("desktop", "gpu"),
    ),
)

Problem = tuple[Float[Tensor, "n m"], Float[Tensor, "n"], Float[Tensor, "m"]]


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _rates(run)
        case "C2":
            return _assignments(run)
        case "C3":
            return _images(run)
        case "C4":
            return _degenerate(run)
        case "C5":
            return _vertices(run)
        case "C6":
            return _cost_of_a_step(run)
        case "C7":
            return _peers(run)
    raise ValueError(f"no claim {claim!r}")


def assignment(n: int, seed: int) -> Problem:
    """Costs uniform in [0, 1], equal marginals."""
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    return torch.from_numpy(np.random.default_rng(seed).random((n, n))), uniform, uniform.clone()


@cache
def _digit_images() -> np.ndarray:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images


def images(pair: tuple[int, int], power: int, factor: int = 2) -> Problem:
    """Two digits as distributions on the unit square; costs are |p - q|_2^2 (power 2) or |p - q|_1 (power 1)."""

    def density(index: int) -> Tensor:
        image = torch.from_numpy(_digit_images()[index] / 16 + 0.01)
        image = image.repeat_interleave(factor, 0).repeat_interleave(factor, 1).flatten()
        return image / image.sum()

    at = (torch.arange(8 * factor, dtype=torch.float64) + 0.5) / (8 * factor)
    points = torch.cartesian_prod(at, at)
    return (points[:, None] - points).abs().pow(power).sum(-1), density(pair[0]), density(pair[1])


def solve(problem: Problem, **options: Any) -> OTResult:
    """The solution, or how far it got: the study judges by the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return entropic_ot(*problem, ETA, "sns", **{"tol": 1e-12, **options})


def sweeps(problem: Problem, eta: float, count: int) -> list[float]:
    """Sinkhorn's error after each of `count` sweeps."""
    stepper, errors = Sinkhorn(*problem, eta), []
    for _ in range(count):
        stepper.step()
        errors.append(float(stepper.error))
    return errors


def local_rate(problem: Problem, solution: OTResult, eta: float, count: int) -> float:
    """How Sinkhorn's sweep shrinks a small deviation from the solution in the end.

    The deviation is brought back to one size before each sweep: from a distant start, rounding is met before the
    slowest part is alone.
    """
    C, r, c = problem
    x, y = solution.potentials
    deviation, ratio = torch.linspace(-1, 1, len(y), dtype=y.dtype), math.nan
    for _ in range(count):
        deviation = deviation - (c * deviation).sum() / c.sum()
        deviation = deviation * (1e-5 / eta / deviation.abs().max())
        _, moved = sinkhorn_sweep(x, y + deviation, C, r, c, eta)
        after = moved - y
        after = after - (c * after).sum() / c.sum()
        ratio, deviation = float(after.norm() / deviation.norm()), after
    return ratio


def exact_cost(problem: Problem) -> float:
    """The least cost without entropy, by linear programming."""
    from scipy import sparse
    from scipy.optimize import linprog

    C, r, c = (each.numpy() for each in problem)
    n, m = C.shape
    sums = sparse.vstack([sparse.kron(sparse.eye(n), np.ones((1, m))), sparse.kron(np.ones((1, n)), sparse.eye(m))])
    found = linprog(C.ravel(), A_eq=sums.tocsr()[:-1], b_eq=np.concatenate([r, c])[:-1], method="highs")
    return float(found.fun)


def _rates(run: Run) -> dict[str, Any]:
    C = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]], dtype=torch.float64)
    r = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found: dict[str, Any] = {"rates": {}, "sweeps to 1e-12": {}}

    def compare(name: str, problem: Problem, eta: float, count: int) -> None:
        result = entropic_ot(*problem, eta, tol=1e-12)
        errors = sweeps(problem, eta, count)
        late = [b / a for a, b in itertools.pairwise(errors) if 1e-12 < b < 1e-3]
        found["rates"][name] = {
            "measured": local_rate(problem, result, eta, 600),
            "last errors": late[-1],
            "predicted": sinkhorn_rate(result.plan()).rate,
        }

    compare("3 x 3", (C, r, r.flip(0)), 3.0, 100)
    for seed in run.seeds(3):
        problem = assignment(500, seed)
        compare(f"n = 500, eta = 200, seed {seed}", problem, 200.0, 60)
        compare(f"n = 500, eta = 600, seed {seed}", problem, 600.0, 500)
        found["sweeps to 1e-12"][str(seed)] = {
            eta: sinkhorn_rate(entropic_ot(*problem, float(eta), tol=1e-12).plan()).sweeps(1e-12) for eta in PREDICTED
        }
        run.say(f"C1: seed {seed}: {found['sweeps to 1e-12'][str(seed)]}")
    return found


def _assignments(run: Run) -> dict[str, Any]:
    n, count = run.pick(smoke=(40, 50), desktop=(500, 500))
    found: dict[str, Any] = {"iterations": {}, "Newton steps": {}, "sweeps to 1e-12": [], "Sinkhorn's error": []}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        problem = assignment(n, seed)
        for keep in run.pick(smoke=(5, 10), desktop=(2, 3, 5, 10)):
            result = solve(problem, keep=keep, n_sinkhorn=20, continuation=False, max_newton=150)
            found["iterations"].setdefault(str(keep), []).append(result.steps if result.converged else math.inf)
            newton = sum(each["stage"] == 1 for each in result.history)
            found["Newton steps"].setdefault(str(keep), []).append(newton)
        plan = solve(problem).plan()
        found["sweeps to 1e-12"].append(min(sinkhorn_rate(plan).sweeps(1e-12), 1e12))
        found["Sinkhorn's error"].append(sweeps(problem, ETA, count)[-1])
        run.say(f"C2: seed {seed}: {[each[-1] for each in found['iterations'].values()]} iterations with keep 2 to 10")
    return found


def _images(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"iterations": {}, "cost": {}, "exact cost": {}, "Sinkhorn's error": {}}
    for pair in run.pick(smoke=PAIRS[:1], desktop=PAIRS):
        problem, name = images(pair, 2, run.pick(smoke=1, desktop=2)), str(pair)
        result = solve(problem, keep=5, n_sinkhorn=20, continuation=False)
        found["iterations"][name] = result.steps if result.converged else math.inf
        found["cost"][name], found["exact cost"][name] = float(result.cost), exact_cost(problem)
        found["Sinkhorn's error"][name] = sweeps(problem, ETA, run.pick(smoke=50, desktop=2000))[-1]
        run.say(f"C3: {name}: {result.steps} iterations")
    return found


def _degenerate(run: Run) -> dict[str, Any]:
    names = ("plain error", "iterations, damping", "iterations, continuation", "cost", "exact cost")
    found: dict[str, Any] = {name: {} for name in names}
    for pair in run.pick(smoke=PAIRS[:1], desktop=PAIRS):
        problem, name = images(pair, 1, run.pick(smoke=1, desktop=2)), str(pair)
        steep: dict[str, Any] = {"keep": 15, "n_sinkhorn": run.pick(smoke=20, desktop=200), "continuation": False}
        plain = solve(problem, damping="none", max_newton=run.pick(smoke=5, desktop=150), **steep)
        found["plain error"][name] = float(plain.error)
        damped = solve(problem, damping="levenberg", max_newton=run.pick(smoke=5, desktop=300), **steep)
        found["iterations, damping"][name] = damped.steps if damped.converged else math.inf
        climbed = solve(problem, continuation=True)
        found["iterations, continuation"][name] = climbed.steps if climbed.converged else math.inf
        found["cost"][name], found["exact cost"][name] = float(climbed.cost), exact_cost(problem)
        run.say(f"C4: {name}: error {float(plain.error):.2g} plain; {damped.steps} and {climbed.steps} iterations")
    return found


def _vertices(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for n in (4, 5, 6):
        distances, bounds = [], []
        for seed in run.seeds(run.pick(smoke=2, desktop=10)):
            C, r, c = assignment(n, seed)
            orders = torch.tensor(list(itertools.permutations(range(n))))
            costs = C[torch.arange(n), orders].sum(-1) / n
            values, places = costs.sort()
            gap = float(values[1] - values[0])
            eta = 1.5 * (1 + 2 * math.log(n)) / gap
            plan = entropic_ot(C, r, c, eta, "newton", tol=1e-11).plan()
            vertex = torch.zeros_like(plan)
            vertex[torch.arange(n), orders[places[0]]] = 1 / n
            distances.append(float((plan - vertex).abs().sum()))
            bounds.append(6 * n**2 * math.exp(-eta * gap))
        found[str(n)] = {"distance": distances, "bound": bounds}
    return found


def _cost_of_a_step(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"ratio": {}, "ms a sweep": {}, "ms a Newton step": {}}
    for n in (500, 1000, 2000):
        problem = assignment(n, 0)
        run.used_seeds.add(0)
        newton = SinkhornNewton(*problem, ETA, keep=5, n_sinkhorn=20, continuation=False, tol=1e-12)
        sweep, seconds = Sinkhorn(*problem, ETA), {"sweep": [], "newton": []}
        while not newton.converged and newton.steps < 100:
            started = time.perf_counter()
            metrics = newton.step()
            middle = time.perf_counter()
            sweep.step()
            if metrics["stage"]:
                seconds["newton"].append(middle - started)
            seconds["sweep"].append(time.perf_counter() - middle)
        found["ms a sweep"][str(n)] = 1e3 * median(seconds["sweep"])
        found["ms a Newton step"][str(n)] = 1e3 * median(seconds["newton"])
        found["ratio"][str(n)] = median(seconds["newton"]) / median(seconds["sweep"])
        run.say(f"C6: n = {n}: a Newton step takes {found['ratio'][str(n)]:.2f} sweeps")
    return found


def _peers(run: Run) -> dict[str, Any]:
    workloads = {"assignment, n = 500": (assignment(500, 0), 400)}
    workloads |= {f"digits {pair}": (images(pair, 2), 2000) for pair in PAIRS}
    run.used_seeds.add(0)
    found = {}
    for name, (problem, count) in workloads.items():
        result, seconds = _timed(lambda problem=problem: solve(problem, tol=1e-8), repeats=3)
        row: dict[str, Any] = {"SNS seconds": seconds, "SNS iterations": result.steps, "SNS error": float(result.error)}
        row |= _pot(problem, count) | _regot(problem)
        found[name] = row
        run.say(f"C7: {name}: {row}")
    return found


def _timed(call: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return result, median(seconds)


def _error(plan: np.ndarray, problem: Problem) -> float:
    _, r, c = (each.numpy() for each in problem)
    return float(np.abs(plan.sum(1) - r).sum() + np.abs(plan.sum(0) - c).sum())


def _pot(problem: Problem, count: int) -> dict[str, Any]:
    import ot

    C, r, c = (each.numpy() for each in problem)
    options: dict[str, Any] = {"method": "sinkhorn_log", "numItermax": count, "stopThr": 1e-8, "warn": False}
    plan, seconds = _timed(lambda: ot.sinkhorn(r, c, C, 1 / ETA, **options))
    _, exact = _timed(lambda: ot.emd(r, c, C), repeats=3)
    found = {"POT seconds": seconds, "POT sweeps": count, "POT error": _error(np.asarray(plan), problem)}
    return found | {"exact emd seconds": exact}


def _regot(problem: Problem) -> dict[str, Any]:
    if not find_spec("regot"):
        return {}
    import regot

    C, r, c = (each.numpy() for each in problem)
    found = {}
    for name in ("sinkhorn_ssns", "sinkhorn_splr"):
        result, seconds = _timed(
            lambda name=name: getattr(regot, name)(np.asfortranarray(C), r, c, 1 / ETA, tol=1e-8, max_iter=1000), 3
        )
        found[f"regot {name} seconds"] = seconds
        found[f"regot {name} iterations"] = int(result.niter)
        found[f"regot {name} error"] = _error(result.plan, problem)
    return found
