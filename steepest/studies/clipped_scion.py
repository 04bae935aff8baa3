"""Gradient-norm clipping in any norm: does it descend where others do not, and does it help a constant learning rate?

The deterministic and stochastic claims (C1 to C4) are measured on functions written down, with the solvers of
`steepest.minimize`; the empirical ones (C5 to C8) on a small network and digits, where the paper had CIFAR-10 and GPT;
C9 on a two-layer transformer and text from a Markov chain. Baselines get as many settings to tune as the method.

Source: Pethick, Xie, Erdogan, Antonakopoulos, Silveti-Falls and Cevher 2025, arXiv 2506.01913.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry import Max, Spectral
from steepest.minimize import ConditionalGradient, ggnc, s3cg, steepest_descent, ucg
from steepest.studies._base import Claim, Run
from steepest.studies._clipped_scion_training import best_of, constrained, number, sweep, thresholds, transformer

COMPONENTS = (
    "steepest.optim.Clip",
    "steepest.optim.ClippedScion",
    "steepest.optim.Scion",
    "steepest.optim.init_on_ball_",
    "steepest.geometry.Product",
    "steepest.minimize.ggnc",
    "steepest.minimize.ucg",
    "steepest.minimize.steepest_descent",
    "steepest.minimize.s3cg",
)

L1, DIMENSION = 1.5, 20
COSH_SMOOTHNESS = 2 * 1.0757376915  # per coordinate: L0 of 2 cosh for L1 = 1.5
BETA, F_STAR = 1.5, 0.3515092247

CLAIMS = (
    Claim(
        id="C1",
        statement="On an (L0, L1)-smooth function clipped descent is monotone and meets its bound, normalised steps of "
        "the same largest length stop at a floor, and steepest descent diverges.",
        reported="theory: descent for step sizes up to 1 / (L0 + rho L1); a floor of order L0 gamma rho for uCG",
        criterion="sum 2 cosh(x_i) in the max-norm, 4000 steps: no increase, smallest dual norm below 1e-6 and below "
        "the bound; smallest dual norm of uCG above 1; steepest descent non-finite within 50 steps",
        judge=lambda m: [
            m["increases"]["ggnc"] == 0,
            m["smallest dual norm"]["ggnc"] < 1e-6 and m["smallest dual norm"]["ggnc"] <= m["bound"],
            m["smallest dual norm"]["ucg"] > 1,
            m["steepest descent stops at step"] is not None and m["steepest descent stops at step"] <= 50,
        ],
    ),
    Claim(
        id="C2",
        statement="That function is (L0, L1)-smooth with respect to the max-norm.",
        reported="theory",
        criterion="over random pairs at most 1/L1 apart, the difference of gradients never exceeds its bound",
        judge=lambda m: m["largest ratio"] <= 1,
    ),
    Claim(
        id="C3",
        statement="The short-step conditional gradient descends, stays in the ball, and its Wolfe gap goes to zero "
        "under its bound.",
        reported="theory, for gamma at most 1/L and rho at most L",
        criterion="projection of a 4 x 6 matrix on a spectral ball, 3000 steps: both variants monotone, spectral norm "
        "at most beta + 1e-9, excess at most 0.005 (variant 1) and 0.02 (variant 2), bound never violated",
        judge=lambda m: [
            part
            for name, most in (("norm", 0.005), ("ball", 0.02))
            for part in (
                m[name]["increases"] == 0,
                m[name]["largest norm"] <= BETA + 1e-9,
                m[name]["excess"] <= most,
                m[name]["bound violations"] == 0,
            )
        ],
    ),
    Claim(
        id="C4",
        statement="With noise and the paper's settings the mean dual norm falls like n^(-1/4).",
        reported="rate O(n^(-1/4))",
        criterion="slope of log mean dual norm against log n over the last three of n = 100, 1000, 10000, 100000, "
        "5 seeds, in [-0.32, -0.18]",
        judge=lambda m: -0.32 <= m["slope"] <= -0.18,
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C5",
        statement="With a constant learning rate Clipped Scion ends lower than Scion, and stands much larger steps.",
        reported="CIFAR-10, 80 epochs: 92.4 % without and 94.2 % with clipping; best step 2^-5 without, 2^-2 to 2^-3 "
        "with it",
        criterion="digits, each tuned over as many settings, 3 seeds: best mean excess training loss with clipping at "
        "most half of that without; at lr 2^-3 at most 0.3 times",
        judge=lambda m: [
            number(m[place]["clipped"]["loss"]) <= share * number(m[place]["scion"]["loss"])
            for place, share in (("best", 0.5), ("at 2^-3", 0.3))
        ],
    ),
    Claim(
        id="C6",
        statement="With linear decay of the learning rate the gain of clipping vanishes.",
        reported="CIFAR-10: 94.5 % both",
        criterion="digits, as C5 but decayed: best mean excess losses within a factor 2.5",
        judge=lambda m: max(m["ratio"], 1 / m["ratio"]) <= 2.5,
    ),
    Claim(
        id="C7",
        statement="A tiny threshold is Scion, none is steepest descent, which fails; between them lies something "
        "better.",
        reported="GPT: validation loss 3.355 to 3.370 over thresholds; unclipped fails",
        criterion="digits, lr 2^-4, 3 seeds: mean excess loss of the best middle threshold below half of that of a "
        "tiny one; every weight of the tiny one equals Scion's to 1e-6; without clipping, as steep as the best, the "
        "loss rises above ten times its start, and ends there, higher or not finite (to 1e-6), for every seed",
        judge=lambda m: [
            m["best middle"] < 0.5 * fmean(m["tiny"]),
            m["tiny against scion"] <= 1e-6,
            all(
                peak > 10 * m["start"] and number(loss) >= m["start"] - 1e-6
                for peak, loss in zip(m["peak of steepest descent"], m["steepest descent"], strict=True)
            ),
        ],
    ),
    Claim(
        id="C8",
        statement="In the constrained form the gap <d, v> grows during training, so that clipping hardly acts.",
        reported="CIFAR-10: 91.2 % without, 91.4 % with clipping, because <d, v> grows",
        criterion="digits, radii 1, 5, 20, 3 seeds, each form at its best setting: mean gap of the last epoch at least "
        "that of the first, for Scion and for Clipped Scion",
        judge=lambda m: [all(b >= a for a, b in m[name]["first and last gap"]) for name in ("scion", "clipped")],
    ),
    Claim(
        id="C9",
        statement="With a constant step, Clipped Scion reaches Scion's loss in 7 % fewer steps on a transformer.",
        reported="more than 10 % fewer steps on GPT (124M, 1B), 11 % on DeiT-B",
        criterion="two-layer transformer on text of a Markov chain, each tuned over as many settings: ratio of the "
        "steps to Scion's final validation loss at most 0.93, reached by each of 3 seeds",
        judge=lambda m: all(m["reached"]) and max(m["ratio of steps"]) <= 0.93,
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _smooth_descent(run.pick(smoke=300, desktop=4000))
        case "C2":
            return _smoothness(run, run.pick(smoke=1000, desktop=10_000))
        case "C3":
            return {name: _short_steps(name, run.pick(smoke=200, desktop=3000)) for name in ("norm", "ball")}
        case "C4":
            return _rate(run)
        case "C5":
            fixed = run.once("fixed", lambda: sweep(run, decay=False))
            near = [row for row in fixed["clipped"] if abs(row["lr"] - 2**-3) < 1e-9]
            scion = [row for row in fixed["scion"] if abs(row["lr"] - 2**-3) < 1e-9]
            return {
                "best": {name: best_of(rows) for name, rows in fixed.items()},
                "at 2^-3": {"scion": best_of(scion), "clipped": best_of(near)},
                "settings": fixed,
            }
        case "C6":
            decayed = run.once("decayed", lambda: sweep(run, decay=True))
            best = {name: best_of(rows) for name, rows in decayed.items()}
            return {"best": best, "ratio": best["clipped"]["loss"] / best["scion"]["loss"], "settings": decayed}
        case "C7":
            return thresholds(run)
        case "C8":
            return constrained(run)
        case "C9":
            return transformer(run)
    raise ValueError(f"no claim {claim!r}")


# C1 to C4: functions written down


def cosh(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Sum of 2 cosh: its curvature grows with its gradient."""
    return (2 * x.cosh()).sum(-1)


def _smooth_descent(steps: int) -> dict[str, Any]:
    l0 = DIMENSION * COSH_SMOOTHNESS
    rho, gamma = l0 / L1, 1 / (2 * l0)
    x0 = torch.linspace(-6, 6, DIMENSION, dtype=torch.float64)
    found: dict[str, Any] = {"increases": {}, "smallest dual norm": {}, "last loss": {}}
    for name, stepper in {
        "ggnc": ggnc(cosh, x0, Max(), step_size=gamma, clip=rho),
        "ucg": ucg(cosh, x0, Max(), step_size=gamma * rho),
    }.items():
        losses, duals = _trace(stepper, steps)
        found["increases"][name] = sum(later > earlier for earlier, later in pairwise(losses))
        found["smallest dual norm"][name], found["last loss"][name] = min(duals), losses[-1]
    delta = float(cosh(x0)) - 2 * DIMENSION
    found["bound"] = math.sqrt(2 * delta / (gamma * steps)) + 2 * delta / (gamma * rho * steps)
    sharp = steepest_descent(cosh, x0, Max(), step_size=gamma)
    found["steepest descent stops at step"] = None
    for step in range(50):
        try:
            sharp.step()
        except FloatingPointError:
            found["steepest descent stops at step"] = step
            break
    return found


def _trace(stepper: ConditionalGradient, steps: int) -> tuple[list[float], list[float]]:
    measured = [stepper.step() for _ in range(steps)]
    return [float(m["loss"]) for m in measured], [float(m["dual_norm"]) for m in measured]


def _smoothness(run: Run, pairs: int) -> dict[str, float]:
    generator, l0 = run.generator(0), DIMENSION * COSH_SMOOTHNESS
    x = 6 * (2 * torch.rand(pairs, DIMENSION, dtype=torch.float64, generator=generator) - 1)
    apart = (2 * torch.rand(pairs, DIMENSION, dtype=torch.float64, generator=generator) - 1) / L1
    apart[::2] = apart[::2].sign() / L1  # half of the pairs as far apart as allowed, in every coordinate
    norm = Max(event_ndim=1)
    gradient, other = 2 * x.sinh(), 2 * (x + apart).sinh()
    ratio = norm.dual(gradient - other) / ((l0 + L1 * norm.dual(gradient)) * norm.norm(apart))
    return {"largest ratio": float(ratio.max()), "pairs": pairs}


def _short_steps(short_step: Any, steps: int) -> dict[str, Any]:
    target = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 6)))
    gamma, rho = 0.25, 4.0
    stepper = s3cg(
        lambda x: 0.5 * (x - target).square().sum(),
        torch.zeros_like(target),
        Spectral(),
        radius=BETA,
        step_size=gamma,
        clip=rho,
        short_step=short_step,
    )
    losses, gaps, norms = [], [], []
    for _ in range(steps):
        metrics = stepper.step()
        losses.append(float(metrics["loss"]))
        gaps.append(float(metrics["gap"]))
        assert isinstance(stepper.x, Tensor)
        norms.append(float(torch.linalg.matrix_norm(stepper.x, 2)))
    delta, smallest, violations = losses[0] - F_STAR, math.inf, 0
    for n, gap in enumerate(gaps, 1):
        smallest = min(smallest, gap)
        violations += smallest > 2 * BETA * math.sqrt(delta / (gamma * n)) + 2 * delta / (gamma * rho * n)
    return {
        "increases": sum(later > earlier + 1e-12 for earlier, later in pairwise(losses)),
        "largest norm": max(norms),
        "excess": losses[-1] - F_STAR,
        "smallest gap": smallest,
        "bound violations": violations,
    }


def _rate(run: Run) -> dict[str, Any]:
    d, noise, numbers = 5, 0.5, (100, 1000, 10_000, 100_000)
    l0 = d * COSH_SMOOTHNESS
    start = (torch.linspace(-2, 2, d, dtype=torch.float64) + 0.3).expand(5, d)
    means: dict[str, list[float]] = {}
    for n in numbers:
        generators = [run.generator(seed) for seed in run.seeds(5)]
        total, drawn = torch.zeros(5, dtype=torch.float64), [torch.empty(0)]

        def gradient(
            x: Tensor, generators: Any = generators, total: Tensor = total, drawn: list[Any] = drawn
        ) -> Tensor:
            if not len(drawn[0]):
                block = [torch.randn(1000, d, dtype=torch.float64, generator=each) for each in generators]
                drawn[0] = torch.stack(block, dim=1)
            exact = 2 * x.sinh()
            total.add_(exact.abs().sum(-1))
            sample, drawn[0] = drawn[0][0], drawn[0][1:]
            return exact + noise * sample

        stepper = ggnc(
            None,
            start,
            Max(event_ndim=1),
            step_size=1 / (math.sqrt(n) * l0),
            clip=l0 / (2 * n**0.25 * L1),
            momentum=1 - 1 / math.sqrt(n),
            gradient=gradient,
        )
        for _ in range(n):
            stepper.step()
        means[str(n)] = (total / n).tolist()
        run.say(f"C4: n = {n}: mean dual norm {fmean(means[str(n)]):.3f}")
    logs = [(math.log10(n), math.log10(fmean(means[str(n)]))) for n in numbers[-3:]]
    slope = float(np.polyfit([x for x, _ in logs], [y for _, y in logs], 1)[0])
    return {"slope": slope, "mean dual norm": means}
