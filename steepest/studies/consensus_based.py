"""Consensus-based optimization as gradient descent in disguise: the chain of approximations, and where it gets through.

The theory is measured by quadrature on a line, where infinitely many particles cost nothing; the practice by swarms on
a canyon that stops gradient descent, on Rastrigin's function, and on a softmax regression.

Source: Riedl, Klock, Geldhauser and Fornasier 2023, arXiv 2306.09778, and the authors' code.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from steepest.data import digits
from steepest.data.batches import Epochs
from steepest.gradient_free import (
    CBOTrainer,
    ConsensusBased,
    ConsensusHopping,
    DifferenceDescent,
    gaussian_grid,
    grand_canyon3_noisy,
    hopping_limit,
    local_entropy,
    proximal_point,
    quadratic,
    rastrigin,
)
from steepest.gradient_free.swarm_step import Noise
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.gradient_free.ConsensusBased",
    "steepest.gradient_free.ConsensusHopping",
    "steepest.gradient_free.CBOTrainer",
    "steepest.gradient_free.DifferenceDescent",
    "steepest.gradient_free.consensus_point",
    "steepest.gradient_free.local_entropy",
    "steepest.gradient_free.proximal_point",
)
ALPHAS = (10.0, 100.0, 1000.0, 10_000.0)
TAU = 0.05
NEAR = 0.25


CLAIMS = (
    Claim(
        id="C1",
        statement="Consensus hopping with infinitely many particles is gradient descent on the local entropy.",
        reported="an exact identity: x - alpha s^2 F'(x)",
        criterion="largest |x^CH - (m - alpha s^2 F'(m))| over 20 points m below 1e-6, F' by differences of F",
        judge=lambda m: m["largest gap"] < 1e-6,
    ),
    Claim(
        id="C2",
        statement="At fixed tau = alpha s^2 hopping approaches the proximal point as alpha grows, that point is "
        "a gradient step up to O(tau^2), and finitely many particles add an error of order N^(-1/2).",
        reported="error O(sqrt(tau / alpha) + N^(-1/2)) + O(tau) with high probability",
        criterion="slopes of log error: in alpha -1 +- 0.1 (smooth) and between -1 and -0.4 (kink); in tau 2 +- 0.1; "
        "in N -0.5 +- 0.07 for every seed",
        judge=lambda m: [
            abs(m["slope in alpha, smooth"] + 1) <= 0.1,
            -1 <= m["slope in alpha, kink"] <= -0.4,
            abs(m["slope in tau"] - 2) <= 0.1,
            all(abs(slope + 0.5) <= 0.07 for slope in m["slope in N"]),
        ],
    ),
    Claim(
        id="C3",
        statement="CBO and consensus hopping cross the barriers of a canyon that stop gradient descent.",
        reported="figure 1: CBO and hopping reach the global minimum; gradient descent gets stuck, annealed Langevin "
        "dynamics mostly too",
        criterion="share of runs that end within 0.25 of the minimum, mean over seeds: CBO >= 0.95, hopping >= 0.70, "
        "gradient descent <= 0.02, annealed Langevin <= 0.45",
        judge=lambda m: [
            fmean(m["CBO"]) >= 0.95,
            fmean(m["hopping"]) >= 0.70,
            fmean(m["gradient descent"]) <= 0.02,
            fmean(m["Langevin"]) <= 0.45,
        ],
    ),
    Claim(
        id="C4",
        statement="Neither gradients nor smoothness are needed: a staircase of the same canyon changes nothing.",
        reported="CBO is defined for continuous objectives without derivatives",
        criterion="on floor(20 E) / 20: CBO >= 0.9, gradient descent by differences 0",
        judge=lambda m: [fmean(m["CBO"]) >= 0.9, max(m["gradient descent"]) == 0],
    ),
    Claim(
        id="C5",
        statement="Anisotropic noise copes with the dimension better than isotropic noise.",
        reported="Carrillo et al. 2021: the admissible strength of anisotropic noise does not depend on d",
        criterion="Rastrigin, d = 10: share of runs with all coordinates within 0.25, anisotropic >= 0.6, isotropic <= "
        "0.2, gradient descent from 100 starts 0",
        judge=lambda m: [
            fmean(m["anisotropic"]) >= 0.6,
            fmean(m["isotropic"]) <= 0.2,
            max(m["gradient descent, 100 starts"]) == 0,
        ],
    ),
    Claim(
        id="C6",
        statement="Rastrigin in 20 dimensions with 100 particles and 500 steps is hard: it is not solved.",
        reported="the peer package's default noise solves a part of the runs",
        criterion="share of runs with all coordinates within 0.25 at the strongest noise below 0.9, and above 0",
        judge=lambda m: 0 < fmean(m["sigma 5.1"]) < 0.9,
    ),
    Claim(
        id="C7",
        statement="A classifier can be trained without gradients.",
        reported="MNIST: CBO reaches the accuracy of SGD on a shallow and on a convolutional network",
        criterion="softmax regression on digits (650 weights), the paper's settings, 60 epochs: test accuracy >= 0.85 "
        "for every seed",
        judge=lambda m: min(m["CBO"]) >= 0.85,
    ),
    Claim(
        id="C8",
        statement="Around a held consensus point the mean square decays at the rate 2 lambda - d sigma^2 (isotropic) "
        "or 2 lambda - sigma^2 (anisotropic).",
        reported="the rates of the mean-field theory",
        criterion="rate of the mean of |x|^2 within 3 % for every seed",
        judge=lambda m: [
            abs(found / entry["theory"] - 1) <= 0.03 for entry in m.values() for found in entry["measured"]
        ],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sigma=.* is above the bound", category=UserWarning)
        match claim:
            case "C1":
                return _identity()
            case "C2":
                return _chain(run)
            case "C3":
                return _canyon(run, grand_canyon3_noisy, langevin=True)
            case "C4":
                return _canyon(run, lambda x: (20 * grand_canyon3_noisy(x)).floor() / 20, langevin=False)
            case "C5":
                return _noises(run)
            case "C6":
                return _hard(run)
            case "C7":
                return _classifier(run)
            case "C8":
                return _decay(run)
    raise ValueError(f"no claim {claim!r}")


def _identity() -> dict[str, Any]:
    def waves(x: Tensor) -> Tensor:
        return (x.square() / 2 + 1.5 * (1 - torch.cos(2 * math.pi * x))).sum(-1)

    alpha, s, h, nodes = 3.0, 0.4, 1e-3, gaussian_grid()
    m = torch.linspace(-3, 3, 20, dtype=torch.float64)[:, None]
    hop = hopping_limit(waves, m, alpha, s, nodes)[:, 0]
    f = {k: local_entropy(waves, m + k * h, alpha, s, nodes) for k in (-2, -1, 1, 2)}
    gradient = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
    return {"largest gap": float((hop - (m[:, 0] - alpha * s**2 * gradient)).abs().max())}


def _chain(run: Run) -> dict[str, Any]:
    m = torch.tensor([1.3], dtype=torch.float64)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "smooth": lambda x: (x.square() / 2 + 0.5 * torch.cos(2 * x)).sum(-1),
        "kink": lambda x: (x - 1.28).abs().sum(-1),
    }
    found: dict[str, Any] = {}
    for name, function in functions.items():
        prox = proximal_point(function, m, TAU)
        gaps = []
        for alpha in ALPHAS:
            s = math.sqrt(TAU / alpha)
            nodes = gaussian_grid(run.pick(smoke=20_001, desktop=400_001), 40.0)
            gaps.append(float((hopping_limit(function, m, alpha, s, nodes) - prox).abs()))
        found[f"gap to the proximal point, {name}"] = gaps
        found[f"slope in alpha, {name}"] = _slope(ALPHAS, gaps)
    taus, smooth = (0.05, 0.025, 0.0125), functions["smooth"]
    gradient = 1.3 - math.sin(2.6)
    steps = [abs(float(proximal_point(smooth, m, tau)) - (1.3 - tau * gradient)) for tau in taus]
    return {**found, "proximal point to gradient step": steps, "slope in tau": _slope(taus, steps), **_sampling(run)}


def _sampling(run: Run) -> dict[str, Any]:
    """The error of one hop with N draws on a quadratic, whose proximal point is known."""
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    start, alpha, s = torch.tensor([1.0, -2.0], dtype=torch.float64), 5.0, 0.3
    exact = torch.linalg.solve(torch.eye(2, dtype=torch.float64) + alpha * s**2 * matrix, start)
    counts = run.pick(smoke=(100, 1000), desktop=(100, 1000, 10_000, 100_000))
    errors, slopes = [], []
    for seed in run.seeds(3):
        generator, means = run.generator(seed), []
        for count in counts:
            repeats = run.pick(smoke=50, desktop=min(400, 4_000_000 // count))
            search = ConsensusHopping(
                lambda x: quadratic(x, matrix),
                start.expand(repeats, 2),
                particles=count,
                alpha=alpha,
                width=s,
                generator=generator,
            )
            search.step()
            means.append(float((search.x - exact).norm(dim=-1).mean()))
        errors.append(means)
        slopes.append(_slope(counts, means))
    return {"N": list(counts), "error with N draws": errors, "slope in N": slopes}


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    logs = torch.tensor([x, y], dtype=torch.float64).log()
    deviations = logs - logs.mean(1, keepdim=True)
    return float((deviations[0] * deviations[1]).sum() / deviations[0].square().sum())


def _canyon(run: Run, objective: Callable[[Tensor], Tensor], langevin: bool) -> dict[str, Any]:
    runs, steps = run.pick(smoke=10, desktop=200), run.pick(smoke=20, desktop=10_000)
    found: dict[str, Any] = {"CBO": [], "hopping": [], "gradient descent": []}
    for seed in run.seeds(3):
        generator = run.generator(seed)
        x0 = 8 + 0.5 * torch.randn(runs, 200, 2, generator=generator, dtype=torch.float64)
        swarm = ConsensusBased(
            objective, x0, alpha=100.0, lam=1.0, dt=0.01, sigma=1.6, noise="isotropic", generator=generator
        )
        swarm.run(run.pick(smoke=20, desktop=250), progress=False)
        found["CBO"].append(_share(swarm.consensus))
        start = x0[:, 0]
        hopping = ConsensusHopping(objective, start, particles=200, alpha=100.0, width=0.7, generator=generator)
        hopping.run(run.pick(smoke=20, desktop=250), progress=False)
        found["hopping"].append(_share(hopping.x))
        descent = DifferenceDescent(objective, start, dt=1e-3)
        descent.run(steps, progress=False, record_every=steps)
        found["gradient descent"].append(_share(descent.x))
        found["where gradient descent ends"] = descent.x.median(0).values.tolist()
        run.say(f"canyon, seed {seed}: CBO {found['CBO'][-1]:.3f}, hopping {found['hopping'][-1]:.3f}")
        for sigma in (10.0, 5.0, 20.0) if langevin else ():
            search = DifferenceDescent(objective, start, dt=1e-3, sigma=sigma, generator=generator)
            search.run(steps, progress=False, record_every=steps)
            name = "Langevin" if sigma == 10.0 else f"Langevin, sigma {sigma:g}"
            found.setdefault(name, []).append(_share(search.x))
        searches = {"CBO": swarm, "hopping": hopping, "gradient descent": descent}
        found["evaluations a run"] = {name: each.evaluations for name, each in searches.items()}
    return found


def _share(x: Float[Tensor, "runs d"] | None) -> float:
    """The share of runs within 0.25 of the origin."""
    assert x is not None
    return float((x.norm(dim=-1) < NEAR).double().mean())


def _solved(x: Float[Tensor, "runs d"] | None) -> float:
    """The share of runs with all coordinates within 0.25 of the origin."""
    assert x is not None
    return float((x.abs().amax(-1) < NEAR).double().mean())


def _box(generator: torch.Generator, *shape: int) -> Float[Tensor, "..."]:
    return 6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 3


def _noises(run: Run) -> dict[str, Any]:
    d, runs, steps = 10, run.pick(smoke=4, desktop=30), run.pick(smoke=20, desktop=1000)
    found: dict[str, Any] = {"anisotropic": [], "isotropic": [], "gradient descent, 100 starts": []}
    for seed in run.seeds(3):
        generator = run.generator(seed)
        x0 = _box(generator, runs, 200, d)
        kinds: tuple[tuple[Noise, float], ...] = ("anisotropic", 1.2), ("isotropic", 1.2 / math.sqrt(d))
        for noise, sigma in kinds:
            swarm = ConsensusBased(rastrigin, x0, alpha=50.0, dt=0.01, sigma=sigma, noise=noise, generator=generator)
            swarm.run(steps, progress=False)
            found[noise].append(_solved(swarm.consensus))
        starts = x0[:, :100]
        descent = DifferenceDescent(
            rastrigin, starts, dt=0.01, gradient=lambda x: 2 * x + 5 * math.pi * torch.sin(2 * math.pi * x)
        )
        descent.run(steps, progress=False)
        best = rastrigin(descent.x).argmin(-1)
        found["gradient descent, 100 starts"].append(_solved(descent.x[torch.arange(runs), best]))
        run.say(
            f"noise, seed {seed}: anisotropic {found['anisotropic'][-1]:.2f}, isotropic {found['isotropic'][-1]:.2f}"
        )
    return found


def _hard(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"sigma 5.1": [], "sigma 2.5": []}
    for seed in run.seeds(3):
        generator = run.generator(seed)
        x0 = _box(generator, run.pick(smoke=4, desktop=40), 100, 20)
        for sigma in (5.1, 2.5):
            swarm = ConsensusBased(rastrigin, x0, alpha=1e4, dt=0.01, sigma=sigma, generator=generator)
            swarm.run(run.pick(smoke=20, desktop=500), progress=False)
            found[f"sigma {sigma}"].append(_solved(swarm.consensus))
    return found


def _classifier(run: Run) -> dict[str, Any]:
    data = digits(flat=True)
    found: dict[str, Any] = {"CBO": [], "SGD": []}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        generator = run.generator(seed)
        model = torch.nn.utils.skip_init(torch.nn.Linear, 64, 10)
        count = run.pick(smoke=120, desktop=len(data.train_x))
        batches = Epochs(data.train_x[:count], data.train_y[:count], 60, generator)
        trainer = CBOTrainer(model, cross_entropy, batches, generator=generator)
        trainer.run(run.pick(smoke=1, desktop=60), progress=False)
        found["CBO"].append(_accuracy(model, data))
        found["SGD"].append(max(_descend(run, seed, rate) for rate in (0.05, 0.2, 0.8)))
        run.say(f"softmax regression, seed {seed}: CBO {found['CBO'][-1]:.3f}, SGD {found['SGD'][-1]:.3f}")
    return found


def _descend(run: Run, seed: int, rate: float) -> float:
    data, generator = digits(flat=True), run.generator(seed)
    model = torch.nn.utils.skip_init(torch.nn.Linear, 64, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batches = Epochs(data.train_x, data.train_y, 60, generator)
    for _ in range(run.pick(smoke=5, desktop=60 * batches.per_epoch)):
        x, y = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return _accuracy(model, data)


@torch.no_grad()
def _accuracy(model: torch.nn.Module, data: Any) -> float:
    return float((model(data.test_x).argmax(1) == data.test_y).double().mean())


def _decay(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for d, sigma in ((4, 0.4), (2, 0.5)):
        kinds: tuple[tuple[Noise, int], ...] = ("isotropic", d), ("anisotropic", 1)
        for noise, directions in kinds:
            rates = []
            for seed in run.seeds(3):
                generator = run.generator(seed)
                count = run.pick(smoke=2000, desktop=200_000)
                x0 = torch.randn(count + 1, d, generator=generator, dtype=torch.float64)
                x0[0] = 0.0
                swarm = ConsensusBased(quadratic, x0, alpha=1e6, dt=0.01, sigma=sigma, noise=noise, generator=generator)
                swarm.run(100, progress=False)
                before, after = (x.square().sum(-1).mean() for x in (x0, swarm.x))
                rates.append(float((before / after).log()))
            entry = {"theory": 2 - directions * sigma**2, "measured": rates}
            found[f"{noise}, d {d}, sigma {sigma}"] = entry
    return found
