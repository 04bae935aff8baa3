"""Which classifier an optimizer selects: the largest margin in its own norm.

Normalised steepest descent in a norm N, on separable multiclass data, goes to the classifier with the largest margin in
N. This study runs sign descent, normalised gradient descent, spectral descent, their momentum forms and Adam on
Gaussian clusters, far past the underflow of the loss, and compares each with the largest margin from a linear program
or an interior-point method.

Source: Fan, Schmidt and Thrampoulidis 2025, arXiv 2502.04664 (NeurIPS 2025).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest.dynamics.conic import max_margin
from steepest.dynamics.implicit_bias import LinearAdam, LinearSteepestDescent
from steepest.dynamics.network import NetworkSteepestDescent, spectral_margins, two_layer
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.dynamics.LinearSteepestDescent",
    "steepest.dynamics.LinearAdam",
    "steepest.dynamics.LogDomainLoss",
    "steepest.dynamics.max_margin",
    "steepest.dynamics.margin_certificate",
    "steepest.dynamics.NetworkSteepestDescent",
)

# The norm of each method and its first step.
METHODS = {"max": 0.1, "euclidean": 0.1, "spectral": 0.05}
EPSILON = 1e-9
EQUAL_MARGIN = 40.0
# First steps whose raw margins after 2000 steps lie on both sides of 40.
NETWORK_STEPS = {"spectral": (0.25, 0.275, 0.3), "max": (0.025, 0.0275, 0.03), "euclidean": (1.0, 1.1, 1.2)}

CLAIMS = (
    Claim(
        id="C1",
        statement="At every iterate the dual norm of the gradient lies between gamma and 2B times the proxy, and the "
        "proxy between L (1 - n L / 2) and L (B: the largest l1 norm of a sample).",
        reported="lemmas of the paper",
        criterion="no violation beyond a relative 1e-9, in 1000 steps of each of the three methods, 3 data sets",
        judge=lambda m: [count == 0 for name, count in m.items() if name.startswith("violations")],
    ),
    Claim(
        id="C2",
        statement="Each normalised steepest descent goes to the classifier of largest margin in its own norm.",
        reported="convergence of the margin at rate log(t) / sqrt(t)",
        criterion="margin over the largest one in the own norm after 3000 steps, mean over 3 data sets: sign descent "
        "at least 0.98, normalised gradient descent at least 0.89, spectral descent at least 0.93",
        judge=lambda m: [
            fmean(m["max"]) >= 0.98,
            fmean(m["euclidean"]) >= 0.89,
            fmean(m["spectral"]) >= 0.93,
        ],
    ),
    Claim(
        id="C3",
        statement="The bias belongs to the norm: no method reaches the largest margin of another's norm as nearly.",
        reported="in the paper's plots each method is correlated with the classifier of its own norm only",
        criterion="the own norm's relative margin is the largest of the three for each method (means over 3 data "
        "sets), and the cosine with the own norm's best classifier is at least 0.95",
        judge=lambda m: [
            *(max(m["table"][name], key=lambda norm: m["table"][name][norm]) == name for name in METHODS),
            *(fmean(m["cosine"][name]) >= 0.95 for name in METHODS),
        ],
    ),
    Claim(
        id="C4",
        statement="Momentum does not change the limit.",
        reported="the same limit, with a rate slower by the dimension",
        criterion="with momentum 0.9 the own relative margin after 3000 steps is within 0.03 of that without (means "
        "over 3 data sets)",
        judge=lambda m: [
            abs(fmean(m["momentum 0.9"][name]) - fmean(m["momentum 0"][name])) <= 0.03 for name in METHODS
        ],
    ),
    Claim(
        id="C5",
        statement="The margin approaches the largest one like t^(-1/2).",
        reported="O((log t + n) / sqrt(t))",
        criterion="slope of log(1 - relative margin) over log t, spectral descent with first step 0.5, t = 300 .. "
        "30000, at most -0.35 (mean over 3 data sets)",
        judge=lambda m: fmean(m["slopes"]) <= -0.35,
    ),
    Claim(
        id="C6",
        statement="The gradient's dual norm over the proxy is an upper bound of the largest margin, which closes.",
        reported="the lemma behind the convergence; as a certificate: ours",
        criterion="upper bound over the largest margin within [1, 1.01] for sign descent after 3000 steps and for "
        "spectral descent with first step 0.5 at the end, on each of 3 data sets; never below 1 (relative 1e-9)",
        judge=lambda m: [
            all(1 - EPSILON <= ratio <= 1.01 for ratio in m["sign descent"]),
            all(1 - EPSILON <= ratio <= 1.01 for ratio in m["spectral descent, first step 0.5"]),
            m["lowest ever"] >= 1 - EPSILON,
        ],
    ),
    Claim(
        id="C7",
        statement="Adam without epsilon has the bias of sign descent, the largest entry, and needs a small b2 for it.",
        reported="rate t^(-1/3)",
        criterion="b1 = 0, b2 = 0.9, 30000 steps, means over 3 data sets: relative margin in the largest entry at "
        "least 0.97, above the one in the spectral norm, and above that of b2 = 0.999",
        judge=lambda m: [
            fmean(m["b2 0.9"]["max"]) >= 0.97,
            fmean(m["b2 0.9"]["max"]) > fmean(m["b2 0.9"]["spectral"]),
            fmean(m["b2 0.9"]["max"]) > fmean(m["b2 0.999"]["max"]),
        ],
    ),
    Claim(
        id="C8",
        statement="In a two-layer network spectral updates reach the largest spectral margins.",
        reported="MNIST, 100 per class, 100 sigmoid units: spectral descent and Muon grow both spectral margins most",
        criterion="digits, 100 per class; at raw margin 40 (interpolated over first steps, 2000 steps each, 3 seeds) "
        "the mean margin over ||V||_2 and over max(||V||_2, ||W||_2) is at least 1.1 times that of sign descent and of "
        "normalised gradient descent",
        judge=lambda m: [
            fmean(m[measure]["spectral"]) >= 1.1 * fmean(m[measure][other])
            for measure in ("over output", "over both")
            for other in ("max", "euclidean")
        ],
    ),
    Claim(
        id="C9",
        statement="A constant step also works in practice, though the theory needs a decreasing one.",
        reported="the paper's experiments with a constant step converge",
        criterion="reported only by the paper's summary; ours: own relative margin after 3000 steps, step constant at "
        "the first one, not more than 0.05 below that of the decreasing step (means over 3 data sets)",
        judge=lambda m: [fmean(m["constant"][name]) >= fmean(m["decreasing"][name]) - 0.05 for name in METHODS],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _lemmas(run)
        case "C2":
            return {name: _descents(run, 0.0)[name]["margins"][name] for name in METHODS}
        case "C3":
            found = _descents(run, 0.0)
            table = {name: {norm: fmean(found[name]["margins"][norm]) for norm in METHODS} for name in METHODS}
            return {"table": table, "cosine": {name: found[name]["cosine"] for name in METHODS}}
        case "C4":
            return {
                f"momentum {momentum:g}": {name: _descents(run, momentum)[name]["margins"][name] for name in METHODS}
                for momentum in (0.0, 0.9)
            }
        case "C5":
            return _rate(run)
        case "C6":
            slow, fast = _descents(run, 0.0), _rate(run)
            return {
                "sign descent": slow["max"]["upper"],
                "spectral descent, first step 0.5": fast["upper"],
                "lowest ever": min(*fast["upper"], *(min(slow[name]["upper"]) for name in METHODS)),
            }
        case "C7":
            return {f"b2 {beta}": run.once(f"Adam {beta}", partial(_adam, run, beta)) for beta in (0.9, 0.999)}
        case "C8":
            return _network(run)
        case "C9":
            decreasing, constant = (_descents(run, 0.0, power) for power in (0.5, 0.0))
            return {
                "decreasing": {name: decreasing[name]["margins"][name] for name in METHODS},
                "constant": {name: constant[name]["margins"][name] for name in METHODS},
            }
    raise ValueError(f"no claim {claim!r}")


def clusters(seeds: Sequence[int]) -> tuple[Float[Tensor, "seeds 500 25"], Int[Tensor, "500"]]:
    """For each seed 10 Gaussian centres in 25 dimensions, with 50 samples of standard deviation 0.1 around each."""
    found = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        centres = generator.normal(size=(10, 25))
        found.append(np.concatenate([centre + 0.1 * generator.normal(size=(50, 25)) for centre in centres]))
    return torch.from_numpy(np.stack(found)), torch.arange(10).repeat_interleave(50)


def _data(run: Run) -> tuple[Tensor, Tensor]:
    features, labels = clusters(run.seeds(run.pick(smoke=1, desktop=3)))
    return features.to(run.device), labels.to(run.device)


def _largest(run: Run) -> dict[str, Any]:
    """The largest margin in each norm and the classifier that has it, one for each data set."""

    def solve() -> dict[str, Any]:
        features, labels = (part.cpu() for part in _data(run))
        found = {norm: max_margin(features, labels, norm) for norm in METHODS}
        return {
            norm: {"margin": best.margin.tolist(), "upper": best.upper.tolist(), "weight": best.weight.tolist()}
            for norm, best in found.items()
        }

    return run.once("largest margins", solve)


def _gamma(run: Run, norm: str) -> Tensor:
    return torch.tensor(_largest(run)[norm]["margin"], dtype=torch.float64)


def _relative(run: Run, descent: LinearSteepestDescent | LinearAdam) -> dict[str, list[float]]:
    """The margin in each norm over the largest one."""
    return {norm: (descent.normalized_margin(norm).cpu() / _gamma(run, norm)).tolist() for norm in METHODS}


def _descents(run: Run, momentum: float, power: float = 0.5) -> dict[str, Any]:
    """Each method on the three data sets: relative margins in all norms, cosine with its own best, upper bound."""

    def descend() -> dict[str, Any]:
        found = {}
        for norm, lr in METHODS.items():
            run.say(f"{norm} descent, momentum {momentum:g}, power {power:g}")
            features, labels = _data(run)
            descent = LinearSteepestDescent(features, labels, lr, norm=norm, momentum=momentum, lr_power=power)
            for _ in range(run.pick(smoke=40, desktop=3000)):
                descent.step()
            best = torch.tensor(_largest(run)[norm]["weight"], dtype=torch.float64)
            found[norm] = {
                "margins": _relative(run, descent),
                "cosine": torch.cosine_similarity(descent.weight.cpu().flatten(1), best.flatten(1)).tolist(),
                "upper": (descent.bounds.upper.cpu() / _gamma(run, norm)).tolist(),
                "raw margin": descent.margin.tolist(),
            }
        return found

    return run.once(f"descents {momentum:g} {power:g}", descend)


def _lemmas(run: Run) -> dict[str, Any]:
    features, labels = _data(run)
    samples, bound = features.shape[1], features.abs().sum(-1).amax(-1)
    counts: dict[str, int] = dict.fromkeys(("lower", "upper", "proxy below loss", "proxy near loss"), 0)
    nearest, iterates = math.inf, 0
    for norm, lr in METHODS.items():
        descent = LinearSteepestDescent(features, labels, lr, norm=norm)
        gamma = _gamma(run, norm).to(features)
        for _ in range(run.pick(smoke=40, desktop=1000)):
            found = descent.evaluation
            log_ratio = descent.norm.dual(found.gradient.mantissa).log() + found.gradient.log_scale - found.log_proxy
            ratio, loss = log_ratio.exp(), found.log_loss.exp()
            share = (found.log_proxy - found.log_loss).exp()
            broken = {
                "lower": ratio < gamma * (1 - EPSILON),
                "upper": ratio > 2 * bound * (1 + EPSILON),
                "proxy below loss": share > 1 + EPSILON,
                "proxy near loss": share < 1 - samples * loss / 2 - EPSILON,
            }
            counts = {name: counts[name] + int(where.sum()) for name, where in broken.items()}
            nearest, iterates = min(nearest, float((ratio / gamma).min())), iterates + len(ratio)
            descent.step()
    return {**{f"violations, {name}": count for name, count in counts.items()}, "iterates": iterates} | {
        "least dual norm over gamma proxy": nearest
    }


def _rate(run: Run) -> dict[str, Any]:
    """Spectral descent with a long first step: 1 - relative margin at times equally spaced in their logarithm."""

    def descend() -> dict[str, Any]:
        features, labels = _data(run)
        first, last = run.pick(smoke=(5, 50), desktop=(300, 30_000))
        times = sorted({round(t) for t in np.geomspace(first, last, 41)})
        descent = LinearSteepestDescent(features, labels, 0.5, norm="spectral")
        gamma, gaps = _gamma(run, "spectral"), []
        for t in range(1, last + 1):
            descent.step()
            if t in times:
                gaps.append((1 - descent.normalized_margin().cpu() / gamma).tolist())
            if t % 5000 == 0:
                run.say(f"C5: {t} steps")
        slopes = [float(np.polyfit(np.log(times), np.log(np.maximum(row, 1e-12)), 1)[0]) for row in np.transpose(gaps)]
        upper = (descent.bounds.upper.cpu() / gamma).tolist()
        return {"slopes": slopes, "times": times, "gaps": gaps, "upper": upper}

    return run.once("rate", descend)


def _adam(run: Run, beta: float) -> dict[str, Any]:
    features, labels = _data(run)
    descent = LinearAdam(features, labels, 0.1, betas=(0.0, beta))
    for t in range(run.pick(smoke=40, desktop=30_000)):
        descent.step()
        if (t + 1) % 5000 == 0:
            run.say(f"C7: b2 {beta}, {t + 1} steps")
    return _relative(run, descent)


def digit_images(per_class: int) -> tuple[Float[Tensor, "n 64"], Int[Tensor, "n"]]:
    """The first digits of each class, pixels in [0, 1] minus their mean over these images."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:per_class] for digit in range(10)])
    pixels = torch.from_numpy(images[chosen] / 16)
    return pixels - pixels.mean(0), torch.from_numpy(labels[chosen].astype(np.int64))


def _network(run: Run) -> dict[str, Any]:
    per_class, steps, level = run.pick(smoke=(2, 10, 0.0), desktop=(100, 2000, EQUAL_MARGIN))
    features, labels = (part.to(run.device) for part in digit_images(per_class))
    found: dict[str, Any] = {"over output": {}, "over both": {}, "runs": {}}
    for norm, rates in NETWORK_STEPS.items():
        runs = []
        for seed in run.seeds(run.pick(smoke=1, desktop=3)):
            for lr in rates[: run.pick(smoke=1, desktop=len(rates))]:
                generator = np.random.default_rng(seed)
                hidden, output = generator.normal(size=(100, 64)) / 8, generator.normal(size=(10, 100)) / 10
                weights = [torch.from_numpy(weight).to(run.device) for weight in (hidden, output)]
                descent = NetworkSteepestDescent(two_layer, weights, features, labels, lr, norm=norm)
                for _ in range(steps):
                    descent.step()
                both = spectral_margins(descent.margin, [weight.detach() for weight in descent.weights])
                runs.append([seed, lr, float(descent.margin), float(both[0]), float(both[1])])
                run.say(f"C8: {norm}, first step {lr}, seed {seed}: raw margin {runs[-1][2]:.4g}")
        found["runs"][norm] = runs
        for column, measure in ((3, "over output"), (4, "over both")):
            seeds = sorted({row[0] for row in runs})
            found[measure][norm] = [
                at_margin([(row[2], row[column]) for row in runs if row[0] == seed], level) for seed in seeds
            ]
    return found


def at_margin(points: Sequence[tuple[float, float]], level: float) -> float:
    """The value at raw margin `level`, linear between (margin, value) pairs; nan if it lies outside of them."""
    margins, values = zip(*sorted(points), strict=True)
    if not margins[0] <= level <= margins[-1]:
        return math.nan
    return float(np.interp(level, margins, values))
