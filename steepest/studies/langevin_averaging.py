"""Averages of noisy iterates on the sphere find what no iterate shows: smoothing by noise.

A planted direction of information exponent k sits behind a saddle at the equator. The study runs Langevin dynamics and
minibatch SGD on planted tensors and single-index models, and compares their averages with their last iterates, with
the partial-trace oracle that the averages tend to, with ascent without noise, and with explicit smoothing. The paper's
text gives rates; sizes, steps and criteria are ours, with numbers from prototypes under "reported".

Source: Wei, Damian and Lee 2026, arXiv 2603.06028 (ICLR 2026).
"""

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from steepest.inference import (
    SingleIndex,
    SmoothedSGD,
    SphericalAscent,
    SphericalLangevin,
    SphericalSGD,
    TensorPCA,
    estimate_from_trace,
    overlap,
    two_stages,
)
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.averages.IterateAverage",
    "steepest.geometry.sphere",
    "steepest.geometry.hermite",
    "steepest.inference.TensorPCA",
    "steepest.inference.SingleIndex",
    "steepest.inference.SphericalLangevin",
    "steepest.inference.SphericalSGD",
    "steepest.inference.SmoothedSGD",
    "steepest.inference.SphericalAscent",
    "steepest.inference.two_stages",
    "steepest.optim.WeightAverage",
)

BROWNIAN = 0.09972
LANGEVIN_D, SGD_D = 24, 50


def _noise(d: int) -> float:
    """What an overlap of independent directions stays below but for one case in 400."""
    return 3 / math.sqrt(d)


CLAIMS = (
    Claim(
        id="C1",
        statement="Time averages of Brownian motion on the sphere shrink like 4 / ((d - 1) T).",
        reported="derived: 8 / ((d-1)^2 T^2) ((d-1) T / 2 - 1 + exp(-(d-1) T / 2)) = .09972; prototype .1017",
        criterion="d = 20, h = .002, T = 2, 2000 chains, each of 3 seeds: the mean squared norm within 5 % of .09972",
        judge=lambda m: [all(abs(value / BROWNIAN - 1) <= 0.05 for value in m["squared norm"])],
    ),
    Claim(
        id="C2",
        statement="Noise and averaging smooth the landscape: the average of the chains is the partial trace.",
        reported="derived: E theta = 6 eps tr T / (d (d + 2)); prototype: slope .991, cosine .964",
        criterion="symmetric noise tensor, k = 3, d = 10, eps = 1, 20000 chains of 500 steps, each of 3 seeds: slope "
        "of the average on the formula between .9 and 1.1, cosine above .9",
        judge=lambda m: [all(0.9 <= value <= 1.1 for value in m["slope"]), min(m["cosine"]) > 0.9],
    ),
    Claim(
        id="C3",
        statement="Odd exponent: the average of minibatch SGD recovers the direction, the iterates do not.",
        reported="prototype: average .978, .974, .961; iterates .16, random points .113",
        criterion="h_3, d = 50, n = 10 d^2, lr .1, 32 chains of 5000 steps, 5 seeds: overlap of the mean at least .93 "
        "in all; mean |overlap| of the last iterates at most .25",
        judge=lambda m: [min(m["average"]) >= 0.93, fmean(m["last iterates"]) <= 0.25],
    ),
    Claim(
        id="C4",
        statement="The rate is d^ceil(k/2): for k = 3 a constant n / d^2 gives a constant overlap.",
        reported="prototype: .978, .973, .977; oracle .91, .92, .93",
        criterion="h_3, d = 25, 50, 100, n = 3 d^2, lr .1 sqrt(50 / d), 64 chains of 5000 max(1, (d / 50)^2) steps, "
        "each of 3 seeds: overlap of the mean at least .93 at each d; its means over seeds within .04 of each other",
        judge=lambda m: [
            min(min(values) for values in m["average"].values()) >= 0.93,
            max(map(fmean, m["average"].values())) - min(map(fmean, m["average"].values())) <= 0.04,
        ],
    ),
    Claim(
        id="C5",
        statement="Even exponent: the second moment is needed, the mean has no sign to hold on to.",
        reported="prototype: second order .937, oracle .93 to .97",
        criterion="Langevin, h_4, d = 24, n = 20 d^2, eps = 6, h = .2 / d, 256 chains of 800 steps, 5 seeds: "
        "|overlap| of the top eigenvector at least .85 in all; the overlap of the mean has both signs among the seeds",
        judge=lambda m: [min(m["second"]) >= 0.85, min(m["first"]) < 0 < max(m["first"])],
    ),
    Claim(
        id="C6",
        statement="Control, ours: recovery by minibatch SGD with an even exponent is no evidence for smoothing, "
        "because it survives labels of random sign, which leave no drift: E y^2 x x' is spiked.",
        reported="prototype: second order .980, .987, .988 on scrambled labels; first order .14, .02, .32; Langevin "
        ".39 against .94",
        criterion="scrambled labels, 3 seeds: |overlap| of the top eigenvector at least .95 for SGD with h_4, d = 50; "
        "|overlap| of the mean of the same runs and with h_3 below 3 / sqrt(d); that of full-gradient Langevin with "
        "h_4, d = 24 below 3 / sqrt(d)",
        judge=lambda m: [
            min(m["SGD, h_4, second"]) >= 0.95,
            max(map(abs, m["SGD, h_4, first"])) < _noise(SGD_D),
            max(map(abs, m["SGD, h_3, first"])) < _noise(SGD_D),
            max(m["Langevin, h_4, second"]) < _noise(LANGEVIN_D),
        ],
    ),
    Claim(
        id="C7",
        statement="Tensor PCA: the average beats the last iterate.",
        reported="prototype: average .92, last iterates .149",
        criterion="k = 3, d = 40, n = 5 d^2, eps = 10, 64 chains of 4000 steps, 5 seeds: overlap of the mean at least "
        ".85 in all; mean |overlap| of the last iterates at most .25",
        judge=lambda m: [min(m["average"]) >= 0.85, fmean(m["last iterates"]) <= 0.25],
    ),
    Claim(
        id="C8",
        statement="Without averaging it takes d^(k-1) samples: ascent from random starts fails at n of order d^2 for "
        "k = 4 (an asymptotic statement).",
        reported="prototype: at these d 30 to 80 % of the starts succeed",
        criterion="tensor PCA, k = 4, d = 24, 40, 56, n from d^2 / 4 to 4 d^2, 3 seeds, the best of three step sizes: "
        "at each d at most 5 % of the random starts end with an overlap of .5 or more; one part for each d",
        judge=lambda m: [max(map(fmean, each.values())) <= 0.05 for each in m["share of starts"].values()],
    ),
    Claim(
        id="C9",
        statement="A warm start by averaging on d^(k/2) samples lets online SGD finish; a random start does not.",
        reported="prototype: stage one .61 to .78, stage two .978 to .985; from a random start .25 at most",
        criterion="h_3, d = 100, 4000 samples, lr .05, 64 chains of 8000 steps; then one pass over 8000 fresh "
        "samples, lr .001, multipliers clipped to [-4, 4]; 5 seeds: stage one at least .5 in 4, stage two at least "
        ".95 in all, from a random start |overlap| at most .4 in 4",
        judge=lambda m: [
            sum(value >= 0.5 for value in m["stage one"]) >= 4,
            min(m["stage two"]) >= 0.95,
            sum(abs(value) <= 0.4 for value in m["stage two from a random start"]) >= 4,
        ],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    measures: dict[str, Callable[[Run], Mapping[str, Any]]] = {
        "C1": _brownian,
        "C2": _smoothing,
        "C3": _odd,
        "C4": _rate,
        "C5": _even,
        "C6": _scrambled,
        "C7": _tensor,
        "C8": _ascent,
        "C9": _two_stages,
    }
    if claim not in measures:
        raise ValueError(f"no claim {claim!r}")
    return measures[claim](run)


def _advance(stepper: Any, steps: int) -> Any:
    for _ in range(steps):
        stepper.step()
    return stepper


def _along(theta: Tensor, problem: TensorPCA | SingleIndex) -> float:
    return float(overlap(theta, problem.theta_star))


def _last(stepper: Any, problem: TensorPCA | SingleIndex) -> float:
    return float(overlap(stepper.theta, problem.theta_star).abs().mean())


def _oracle(problem: TensorPCA | SingleIndex) -> float:
    return _along(estimate_from_trace(problem.partial_trace()), problem)


def _still(theta: Tensor) -> Tensor:
    return theta


def _brownian(run: Run) -> dict[str, Any]:
    chains, steps = run.pick(smoke=(200, 50), desktop=(2000, 1000))
    found = []
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        generator = run.generator(seed)
        # A batch of single chains: each keeps its own average.
        start = torch.randn(chains, 1, 20, generator=generator)
        motion = SphericalLangevin(_still, eps=0.0, h=0.002, start=start, order="first", generator=generator)
        found.append(float(_advance(motion, steps).estimate().mean.square().sum(-1).mean()))
    return {"squared norm": found, "formula": BROWNIAN, "asymptotic": 4 / (19 * 2)}


def _smoothing(run: Run) -> dict[str, Any]:
    """The tensor of the criterion, with entries of size one, and one a quarter as large, for which eps is small."""
    chains, steps = run.pick(smoke=(300, 60), desktop=(20_000, 500))
    found: dict[str, list[float]] = {}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        for label, n in (("", 1), (", a quarter as large", 16)):
            generator = run.generator(seed)
            problem = TensorPCA(10, 3, n, generator, signal=0.0)
            walk = SphericalLangevin(problem, eps=1.0, chains=chains, burn_in=45, order="first", generator=generator)
            mean, formula = _advance(walk, steps).estimate().mean, problem.small_eps_average(1.0)
            found.setdefault(f"slope{label}", []).append(float(mean @ formula / formula.square().sum()))
            found.setdefault(f"cosine{label}", []).append(float(overlap(mean, formula)))
    return found


def _odd(run: Run) -> dict[str, Any]:
    d, steps = run.pick(smoke=(10, 60), desktop=(SGD_D, 5000))
    names = ("average", "last iterates", "oracle", "signal")
    found: dict[str, Any] = {name: [] for name in names}
    for seed in run.seeds(run.pick(smoke=1, desktop=5)):
        generator = run.generator(seed)
        problem = SingleIndex(d, 3, 10 * d**2, generator=generator)
        sgd = _advance(SphericalSGD(problem, lr=0.1, chains=32, generator=generator), steps)
        estimate = sgd.estimate()
        values = (
            _along(estimate.first, problem),
            _last(sgd, problem),
            _oracle(problem),
            float(estimate.signal),
        )
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
        run.say(f"C3, seed {seed}: average {values[0]:.3f}, last iterates {values[1]:.3f}")
    return {**found, "one pass, mean |overlap| of 8 starts": _one_pass(run, d)}


def _one_pass(run: Run, d: int) -> dict[str, list[float]]:
    """Baselines that see each sample once: online SGD, plain, and smoothed for the first half of the samples."""
    found: dict[str, list[float]] = {}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        problem = SingleIndex(d, 3, run.pick(smoke=50, desktop=10 * d**2), generator=run.generator(seed))
        half = problem.n // 2

        def smoothing(step: int, half: int = half) -> float:
            return d**0.25 if step < half else 0.0

        options: dict[str, Any] = {"chains": 8, "clip": 4.0}
        for scale in run.pick(smoke=(0.1,), desktop=(0.1, 0.4)):
            plain = SphericalSGD(problem, lr=scale / d, sampling="one_pass", order="first", **options)
            smoothed = SmoothedSGD(problem, smoothing=smoothing, samples=None, lr=scale / d, **options)
            for name, stepper in (("plain", plain), ("smoothed", smoothed)):
                value = _last(_advance(stepper, problem.n), problem)
                found.setdefault(f"{name}, lr {scale:g} / d", []).append(value)
    return found


def _rate(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"average": {}, "oracle": {}}
    for d in run.pick(smoke=(6, 8), desktop=(25, 50, 100)):
        steps = run.pick(smoke=40, desktop=int(5000 * max(1, (d / 50) ** 2)))
        for seed in run.seeds(run.pick(smoke=1, desktop=3)):
            generator = run.generator(seed)
            problem = SingleIndex(d, 3, 3 * d**2, generator=generator)
            sgd = SphericalSGD(problem, lr=0.1 * math.sqrt(50 / d), chains=64, order="first", generator=generator)
            value = _along(_advance(sgd, steps).estimate().first, problem)
            found["average"].setdefault(str(d), []).append(value)
            found["oracle"].setdefault(str(d), []).append(_oracle(problem))
            run.say(f"C4, d = {d}, seed {seed}: {value:.3f}")
    return found


def _langevin(run: Run, seed: int, scramble: bool) -> tuple[SingleIndex, Any]:
    d, chains, steps = run.pick(smoke=(6, 16, 30), desktop=(LANGEVIN_D, 256, 800))
    generator = run.generator(seed)
    problem = SingleIndex(d, 4, 20 * d**2, generator=generator)
    driven = _scramble(problem, generator) if scramble else problem
    walk = SphericalLangevin(driven, eps=6.0, h=0.2 / d, chains=chains, generator=generator)
    return problem, _advance(walk, steps).estimate()


def _scramble(problem: SingleIndex, generator: torch.Generator) -> SingleIndex:
    """Labels with random signs: no drift is left, and y^2 is what it was."""
    return problem.relabelled(problem.y * (2 * torch.randint(2, problem.y.shape, generator=generator) - 1))


def _even(run: Run) -> dict[str, Any]:
    found: dict[str, list[float]] = {"second": [], "first": [], "oracle": [], "gap": []}
    for seed in run.seeds(run.pick(smoke=1, desktop=5)):
        problem, estimate = _langevin(run, seed, False)
        found["second"].append(abs(_along(estimate.second, problem)))
        found["first"].append(_along(estimate.first, problem))
        found["oracle"].append(abs(_oracle(problem)))
        found["gap"].append(float(estimate.gap))
        run.say(f"C5, seed {seed}: second order {found['second'][-1]:.3f}")
    return found


def _scrambled(run: Run) -> dict[str, Any]:
    d, steps = run.pick(smoke=(8, 40), desktop=(SGD_D, 5000))
    found: dict[str, list[float]] = {}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        for k in (4, 3):
            generator = run.generator(seed)
            problem = SingleIndex(d, k, 10 * d**2, generator=generator)
            driven = _scramble(problem, generator)
            sgd = SphericalSGD(driven, lr=0.1, chains=32, order="auto", generator=generator)
            estimate = _advance(sgd, steps).estimate()
            found.setdefault(f"SGD, h_{k}, second", []).append(abs(_along(estimate.second, problem)))
            found.setdefault(f"SGD, h_{k}, first", []).append(_along(estimate.first, problem))
        problem, estimate = _langevin(run, seed, True)
        found.setdefault("Langevin, h_4, second", []).append(abs(_along(estimate.second, problem)))
        run.say(f"C6, seed {seed}: SGD {found['SGD, h_4, second'][-1]:.3f}")
    return found


def _tensor(run: Run) -> dict[str, Any]:
    d, steps = run.pick(smoke=(8, 40), desktop=(40, 4000))
    names = ("average", "last iterates", "oracle", "power iteration, best of 64", "power iteration, share of starts")
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in run.seeds(run.pick(smoke=1, desktop=5)):
        generator = run.generator(seed)
        problem = TensorPCA(d, 3, 5 * d**2, generator)
        walk = _advance(SphericalLangevin(problem, eps=10.0, generator=generator), steps)
        power = _advance(SphericalAscent(problem, starts=64, generator=generator), 100)
        reached = overlap(power.theta, problem.theta_star) >= 0.5
        values = (
            _along(walk.estimate().first, problem),
            _last(walk, problem),
            _oracle(problem),
            _along(power.best(), problem),
            float(reached.float().mean()),
        )
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found


def _ascent(run: Run) -> dict[str, Any]:
    """The share of random starts that reach an overlap of .5, for each d and n / d^2: the best step size counts."""
    found: dict[str, Any] = {"share of starts": {}, "oracle": {}, "best lr": {}}
    starts, steps = run.pick(smoke=(4, 5), desktop=(16, 60))
    for d in run.pick(smoke=(5, 6), desktop=(24, 40, 56)):
        for ratio in run.pick(smoke=(1.0,), desktop=(0.25, 0.5, 1.0, 2.0, 4.0)):
            shares: dict[str, list[float]] = {}
            oracles = []
            for seed in run.seeds(run.pick(smoke=1, desktop=3)):
                generator = run.generator(seed)
                problem = TensorPCA(d, 4, max(1.0, ratio * d**2), generator)
                start = torch.randn(starts, d, generator=generator)
                oracles.append(abs(_oracle(problem)))
                for lr in run.pick(smoke=(math.inf,), desktop=(0.1, 0.5, math.inf)):
                    ascent = _advance(SphericalAscent(problem, lr=lr, start=start), steps)
                    reached = overlap(ascent.theta, problem.theta_star).abs() >= 0.5
                    shares.setdefault(f"{lr:g}", []).append(float(reached.float().mean()))
            best = max(shares, key=lambda lr: fmean(shares[lr]))
            for name, value in (("share of starts", shares[best]), ("oracle", oracles), ("best lr", best)):
                found[name].setdefault(str(d), {})[f"{ratio:g}"] = value
        run.say(f"C8, d = {d}: {found['share of starts'][str(d)]}")
    return found


def _two_stages(run: Run) -> dict[str, Any]:
    d, steps, samples = run.pick(smoke=(8, 40, 40), desktop=(100, 8000, 8000))
    found: dict[str, list[float]] = {"stage one": [], "stage two": [], "stage two from a random start": []}
    for seed in run.seeds(run.pick(smoke=1, desktop=5)):
        generator = run.generator(seed)
        problem = SingleIndex(d, 3, round(4 * d**1.5), generator=generator)
        fresh = problem.fresh(samples, generator)
        both = two_stages(problem, fresh, steps=steps, order="first", generator=generator)
        cold = SphericalSGD(
            fresh, lr=0.001, clip=4.0, chains=1, sampling="one_pass", order="first", generator=generator
        )
        found["stage one"].append(_along(both.first.direction, problem))
        found["stage two"].append(_along(both.theta, problem))
        found["stage two from a random start"].append(_along(_advance(cold, samples).theta[0], problem))
        run.say(f"C9, seed {seed}: {found['stage one'][-1]:.3f}, then {found['stage two'][-1]:.3f}")
    return found
