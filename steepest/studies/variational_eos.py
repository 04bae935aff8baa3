"""Variational learning at the edge of stability: is the sharpness where theorem 3.1 says?

A 64-40-40-10 tanh network with the loss (1/2) mean_n sum_k (f_k - onehot_k)^2 on 400 digits, full batch, float32. The
only randomness of a step is the noise on the weights. The sharpness is that of the loss at the mean of the weights,
measured every 50 steps; reported is its median over the second half of the training, times lr/2: 1 is the edge of
gradient descent.

Source: Ghosh et al. 2025, arXiv 2506.12903.
"""

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from steepest.dynamics import SharpnessMonitor, descent_modes, expected_descent, variational_factor, vgd_threshold
from steepest.dynamics.sharpness import step_settings
from steepest.models import MLP
from steepest.optim import IVON, VariationalSGD
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.optim.VariationalSGD",
    "steepest.optim.IVON",
    "steepest.dynamics.variational_factor",
    "steepest.dynamics.vgd_threshold",
    "steepest.dynamics.expected_descent",
    "steepest.dynamics.descent_probability",
    "steepest.dynamics.SharpnessMonitor",
)

SIGMAS = (0.01, 0.02, 0.03, 0.06)
DOFS = (3, 5, 10)
SIZES = (4e3, 4e4, 4e5)
SEEDS = 3
ACCURACY_SEEDS = 5


def _increasing(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _follows(measured: float, predicted: float) -> bool:
    """Within a factor of 1.7, and where the projection is not noisy (above 0.6) within 10 %."""
    ratio = measured / predicted
    return abs(ratio - 1) <= 0.1 if measured > 0.6 else 1 / 1.7 <= ratio <= 1.7


CLAIMS = (
    Claim(
        id="C1",
        statement="The loss of a quadratic falls in expectation if every eigenvalue is below (2/lr) VF(z), with VF the "
        "root of a cubic; the expected change of a step has a closed form.",
        reported="theorem 3.1; measured before: -2.66744 +- 0.00035 by Monte Carlo, -2.667824 by the formula",
        criterion="VF is the root of the cubic to 1e-10 for z lr^2 from 1e-12 to 1e12; the mean change over steps of "
        "VariationalSGD is within 3 standard errors of the formula; in random quadratics the change of a mode is "
        "negative exactly below its threshold",
        judge=lambda m: [
            m["largest relative error"] <= 1e-10,
            abs(m["mean change"] - m["expected change"]) <= 3 * m["standard error"],
            m["signs agree"],
        ],
    ),
    Claim(
        id="C2",
        statement="Gradient descent without noise trains at the sharpness 2/lr.",
        reported="sharpness times lr/2 (measured before): 0.997, 1.005, 1.007 at lr 0.1; 1.009 at lr 0.2",
        criterion="within [0.97, 1.04] for lr 0.1 and 0.2, each of 3 seeds",
        judge=lambda m: [0.97 <= value <= 1.04 for values in m.values() for value in values],
    ),
    Claim(
        id="C3",
        statement="Variational descent trains at a lower sharpness, which the measured VF predicts.",
        reported="sharpness times lr/2 beside VF (measured before), lr 0.1, sigma 0.01 to 0.06: 0.639/0.665, "
        "0.384/0.346, 0.238/0.182, 0.131/0.139; lr 0.2: 0.818/0.801, 0.421/0.322 (0.03), 0.250/0.275 (0.06)",
        criterion="lr 0.1, one sample, each of 3 seeds: the sharpness falls with every larger sigma, and times lr/2 is "
        "within a factor 1.7 of the median VF, within 10 % where it is above 0.6. Reported beside: VF of the mean of "
        "the projections, since the expected descent is linear in it",
        judge=lambda m: [
            *(_increasing([run["relative sharpness"] for run in reversed(seed)]) for seed in m["lr 0.1"]),
            *(_follows(run["relative sharpness"], run["factor"]) for seed in m["lr 0.1"] for run in seed),
        ],
    ),
    Claim(
        id="C4",
        statement="Fewer samples per step end at a lower sharpness.",
        reported="1 sample / 4 samples (measured before): 7.69/9.13, 7.46/8.59, 7.68/8.65; gradient descent 20",
        criterion="lr 0.1, sigma 0.02: S(1) < S(4) < S(gradient descent) for each of 3 seeds",
        judge=lambda m: [_increasing(list(values)) for values in zip(*m.values(), strict=True)],
    ),
    Claim(
        id="C5",
        statement="Heavier tails of the noise end at a lower sharpness.",
        reported="Student-t with 3, 5, 10 degrees of freedom, Gaussian (measured before, 2 seeds): 4.1/3.9, 5.8/5.6, "
        "7.0/6.3, 7.7/7.5. Control: a Gaussian with the same variance gives the same (3.97/3.82, 5.66/5.43), and t "
        "noise of the Gaussian's variance its sharpness (7.80/7.36, 7.80/7.70): it is the variance, not the tail",
        criterion="lr 0.1, sigma 0.02: S(3) < S(5) < S(10) < S(Gaussian) for each of 3 seeds; the controls of equal "
        "variance are reported beside",
        judge=lambda m: [_increasing(list(values)) for values in zip(*m["student_t"], strict=True)],
    ),
    Claim(
        id="C6",
        statement="IVON's preconditioned sharpness stays below the level 2/lr of Adam, and a narrower posterior "
        "(larger effective sample size) is sharper.",
        reported="preconditioned sharpness times lr/2 (measured before): Adam 1.030, 1.034, 1.026; IVON at ess 4e3 "
        "0.140/0.136/0.143, at 4e4 0.474/0.510/0.466, at 4e5 0.923/0.929/0.911",
        criterion="each of 3 seeds: Adam in [0.97, 1.08]; IVON rises with ess and stays below 1",
        judge=lambda m: [
            *(0.97 <= value <= 1.08 for value in m["adam"]),
            *(_increasing(list(values)) and values[-1] < 1 for values in zip(*m["ivon"], strict=True)),
        ],
    ),
    Claim(
        id="C7",
        statement="Flatter solutions have the better test accuracy.",
        reported="the paper: on images, IVON above Adam and gradient descent; measured before: no gain at equal steps, "
        "0.92 to 0.95 everywhere, a larger sigma fits more slowly",
        criterion="a report, not a bar: lr 0.1, 5 seeds, for each sigma the mean of the gain over "
        "gradient descent of the same seed is above 2 of its standard errors",
        judge=lambda m: [
            fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else gains[0] > 0
            for gains in (
                [a - b for a, b in zip(values, m["accuracy"]["0"], strict=True)]
                for name, values in m["accuracy"].items()
                if name != "0"
            )
        ],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    count = run.pick(smoke=1, desktop=SEEDS)
    match claim:
        case "C1":
            return _theory(run)
        case "C2":
            return {
                f"lr {lr}": [_vgd(run, seed, lr=lr)["relative sharpness"] for seed in run.seeds(count)]
                for lr in (0.1, 0.2)
            }
        case "C3":
            rates = run.pick(smoke=(0.1,), desktop=(0.1, 0.2))
            sigmas = {"sigma": list(SIGMAS)}
            return sigmas | {
                f"lr {lr}": [
                    [_short(_vgd(run, seed, lr=lr, sigma=sigma)) for sigma in SIGMAS] for seed in run.seeds(count)
                ]
                for lr in rates
            }
        case "C4":
            settings = {"1 sample": (0.02, 1), "4 samples": (0.02, 4), "gradient descent": (0.0, 1)}
            return {
                name: [_vgd(run, seed, sigma=sigma, samples=samples)["sharpness"] for seed in run.seeds(count)]
                for name, (sigma, samples) in settings.items()
            }
        case "C5":
            return _tails(run, count)
        case "C6":
            return _preconditioned(run, count)
        case "C7":
            return _accuracy(run)
    raise ValueError(f"no claim {claim!r}")


def _short(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in ("relative sharpness", "factor", "factor of the mean projection")}


def cubic_root(s: Tensor) -> Tensor:
    """The root y of y^3 + (s/4)(y - 1), by Newton's method from above, where it falls monotonically."""
    quarter = s / 4
    y = torch.minimum(torch.ones_like(s), quarter ** (1 / 3))
    for _ in range(60):
        y = y - (y**3 + quarter * (y - 1)) / (3 * y**2 + quarter)
    return y


def _theory(run: Run) -> dict[str, Any]:
    s = torch.logspace(-12, 12, run.pick(smoke=241, desktop=24_001), dtype=torch.float64)
    error = 0.0
    for lr in (0.01, 0.1, 1.0):
        error = max(error, float((variational_factor(s / lr**2, lr) / cubic_root(s) - 1).abs().max()))
    diagonal = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)
    mean, lr, sigma, samples = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.4, 0.05**0.5, 2
    copies = run.pick(smoke=20_000, desktop=1_000_000)
    weights = torch.nn.Parameter(mean.repeat(copies, 1))
    optimizer = VariationalSGD([weights], lr, sigma, samples=samples, generator=run.generator(0))

    def closure() -> None:
        weights.grad = weights.detach() * diagonal

    before = 0.5 * float((diagonal * mean**2).sum())
    optimizer.step(closure)
    change = 0.5 * (diagonal * weights.detach() ** 2).sum(1) - before
    signs = True
    generator = run.generator(1)
    for _ in range(run.pick(smoke=20, desktop=2000)):
        a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        m = torch.randn(4, generator=generator, dtype=torch.float64)
        modes = descent_modes(a @ a.T, m, float(torch.rand((), generator=generator)), 0.05, samples)
        signs &= bool(((modes.changes < 0) == (modes.eigenvalues < modes.thresholds)).all())
    return {
        "largest relative error": error,
        "mean change": float(change.mean()),
        "standard error": float(change.std()) / copies**0.5,
        "expected change": float(expected_descent(torch.diag(diagonal), mean, lr, sigma**2, samples)),
        "signs agree": signs,
    }


def images(count: int, seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits x/16 - 0.3 with their labels: the first `count` of a seeded permutation, and the rest."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    inputs, labels = torch.from_numpy(x).float()[order] / 16 - 0.3, torch.from_numpy(y).long()[order]
    return (inputs[:count], labels[:count]), (inputs[count:], labels[count:])


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed over classes, averaged over examples."""
    return 0.5 * (output - targets).square().sum(-1).mean()


def train(run: Run, seed: int, make: Any, steps: int) -> dict[str, float]:
    """Train with the optimizer `make(parameters)`; the medians over the second half, and what came out."""
    count = run.pick(smoke=100, desktop=400)
    (x, y), (test_x, test_y) = images(count)
    targets = torch.nn.functional.one_hot(y, 10).float()
    width = run.pick(smoke=10, desktop=40)
    model = MLP([64, width, width, 10], activation=torch.tanh, generator=run.generator(seed))
    optimizer: Any = make(model.parameters())
    every = run.pick(smoke=steps // 4, desktop=50)
    monitor = SharpnessMonitor(model, loss_fn, (x, targets), optimizer=optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), targets)
        loss.backward()
        return loss

    found = []
    for step in range(1, steps + 1):
        optimizer.step(closure)
        if step % every == 0 and 2 * step > steps:
            found.append(monitor.measure())
    lr, _, variance, samples = step_settings(optimizer)
    projection = fmean(now.projection for now in found)
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(1) == test_y).double().mean())
        loss = float(loss_fn(model(x), targets))
    return {
        "sharpness": median(now.sharpness for now in found),
        "relative sharpness": median(now.relative_sharpness for now in found),
        "factor": median(now.factor for now in found),
        "factor of the mean projection": vgd_threshold(lr, projection, variance, samples) * lr / 2,
        "accuracy": accuracy,
        "loss": loss,
    }


def _vgd(run: Run, seed: int, lr: float = 0.1, sigma: float = 0.0, samples: int = 1, **noise: Any) -> dict[str, float]:
    """One run of variational gradient descent, shared by the claims that ask for it."""
    name = f"vgd {seed} {lr} {sigma} {samples} {sorted(noise.items())}"
    run.used_seeds.add(seed)

    def compute() -> dict[str, float]:
        source = torch.Generator().manual_seed(1000 + seed)
        make = partial(VariationalSGD, lr=lr, sigma=sigma, samples=samples, generator=source, **noise)
        result = train(run, seed, make, run.pick(smoke=12, desktop=2000))
        run.say(f"lr {lr}, sigma {sigma:.4g}, {samples} samples {noise or ''}, seed {seed}: "
                f"{result['relative sharpness']:.3f} of the edge, VF {result['factor']:.3f} (median), "
            f"{result['factor of the mean projection']:.3f} (of the mean projection)")  # fmt: skip
        return result

    return run.once(name, compute)


def _tails(run: Run, count: int) -> dict[str, Any]:
    """Sharpness of Student-t noise by degrees of freedom, then of the Gaussian; and both controls of equal variance."""
    dofs = run.pick(smoke=(3,), desktop=DOFS)
    seeds = run.seeds(count)
    gauss = [_vgd(run, seed, sigma=0.02)["sharpness"] for seed in seeds]

    def heavy(dof: int, match: bool) -> list[float]:
        options = {"noise": "student_t", "dof": float(dof), "match_variance": match}
        return [_vgd(run, seed, sigma=0.02, **options)["sharpness"] for seed in seeds]

    controls = run.pick(smoke=(), desktop=(3, 5))
    wide = {dof: 0.02 * math.sqrt(dof / (dof - 2)) for dof in controls}
    return {
        "dof": [*dofs, "Gaussian"],
        "student_t": [*(heavy(dof, False) for dof in dofs), gauss],
        "Gaussian with the variance of t": {
            str(dof): [_vgd(run, seed, sigma=sigma)["sharpness"] for seed in seeds] for dof, sigma in wide.items()
        },
        "t with the variance of the Gaussian": {str(dof): heavy(dof, True) for dof in controls},
    }


def _preconditioned(run: Run, count: int) -> dict[str, Any]:
    steps = run.pick(smoke=12, desktop=1500)
    sizes = run.pick(smoke=SIZES[:2], desktop=SIZES)
    found: dict[str, Any] = {
        "ess": list(sizes),
        "adam": [],
        "ivon": [[] for _ in sizes],
        "ivon VF": [[] for _ in sizes],
        "ivon VF of the mean projection": [[] for _ in sizes],
    }
    for seed in run.seeds(count):
        adam = partial(torch.optim.Adam, lr=5e-4, betas=(0.0, 0.99))
        found["adam"].append(train(run, seed, adam, steps)["relative sharpness"])
        run.say(f"C6: seed {seed}, Adam at {found['adam'][-1]:.3f} of its edge")
        for place, ess in enumerate(sizes):
            source = run.generator(1000 + seed)
            make = partial(
                IVON, lr=0.1, ess=ess, hess_init=0.1, betas=(0.0, 0.999), weight_decay=1e-4, generator=source
            )
            result = train(run, seed, make, steps)
            found["ivon"][place].append(result["relative sharpness"])
            found["ivon VF"][place].append(result["factor"])
            found["ivon VF of the mean projection"][place].append(result["factor of the mean projection"])
            run.say(f"C6: seed {seed}, IVON with ess {ess:g} at {result['relative sharpness']:.3f}")
    return found


def _accuracy(run: Run) -> dict[str, Any]:
    seeds = run.seeds(run.pick(smoke=1, desktop=ACCURACY_SEEDS))
    results = {
        f"{sigma:g}": [_vgd(run, seed, sigma=sigma) for seed in seeds]
        for sigma in (0.0, *run.pick(smoke=SIGMAS[:2], desktop=SIGMAS))
    }
    return {
        what: {name: [result[what] for result in values] for name, values in results.items()}
        for what in ("accuracy", "loss", "sharpness")
    }
