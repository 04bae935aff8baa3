"""Muon's Newton-Schulz iterations against the exact polar factor.

Muon replaces the momentum G = U diag(s) V' by an approximation of U V': five steps of an odd polynomial, which move
each singular value s towards one by a scalar map. This study measures that map through `steepest.geometry.polar`
(a 2 x 2 matrix diag(s, sqrt(1 - s^2)) has Frobenius norm one, so it shows the map at s), and asks whether training
notices that the factor is inexact.

Sources: Jordan et al. 2024 (Muon); Amsel et al. 2025, arXiv 2505.16932 (Polar Express); Grishina et al. 2025, arXiv
2506.10935 (CANS); the tables of torch, dion, modded-nanogpt and DeepSeek-style Muon.
"""

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from steepest.data import digits
from steepest.geometry import polar
from steepest.models import MLP
from steepest.optim import Muon
from steepest.studies._base import Claim, Run

COMPONENTS = ("steepest.geometry.polar", "steepest.geometry.COEFFICIENTS", "steepest.optim.Muon")

# As published. The library's own table divides its input by 1.17, and so stays below the flip.
AOL = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)
# name: (table, steps)
SETS = {
    "jordan 5": ("jordan", 5),
    "quintic 5": ("quintic", 5),
    "polar_express 5": ("polar_express", 5),
    "polar_express 8": ("polar_express", 8),
    "cans 5": ("cans", 5),
    "cubic 5": ("cubic", 5),
    "deepseek 10": ("deepseek", 10),
}
RANGE_FROM_001 = {
    "jordan 5": (0.6818, 1.1344),
    "quintic 5": (0.9778, 1.0318),
    "polar_express 5": (0.8703, 1.1236),
    "polar_express 8": (1.0000, 1.0000),
    "cans 5": (0.8844, 1.1198),
    "cubic 5": (0.7741, 1.3000),
    "deepseek 10": (1.0000, 1.0005),
}
RANGE_FROM_0001 = {
    "jordan 5": (0.4705, 1.2024),
    "quintic 5": (0.4750, 1.1450),
    "polar_express 5": (0.8462, 1.1236),
    "polar_express 8": (1.0000, 1.0000),
    "cans 5": (0.8844, 1.1198),
    "cubic 5": (0.1191, 1.3000),
    "deepseek 10": (1.0000, 1.0005),
}
SLOPES = {
    "jordan 5": 485,
    "quintic 5": 493,
    "polar_express 5": 976,
    "polar_express 8": 6363,
    "cans 5": 1049,
    "cubic 5": 119,
    "deepseek 10": 79263,
}
AOL_FLIP = 0.8837


def _close_ranges(reported: Mapping[str, tuple[float, float]]):
    return lambda measured: [
        abs(found - wanted) <= 1e-3
        for name in SETS
        for found, wanted in zip(measured[name], reported[name], strict=True)
    ]


def _in_words(ranges: Mapping[str, tuple[float, float]]) -> str:
    return "; ".join(f"{name} [{low:.4f}, {high:.4f}]" for name, (low, high) in ranges.items())


CLAIMS = (
    Claim(
        id="C1",
        statement="Singular values in [0.01, 1] end in the range that is known for each table of coefficients.",
        reported=_in_words(RANGE_FROM_001),
        criterion="both ends of every range within 0.001 of the reported number",
        judge=_close_ranges(RANGE_FROM_001),
    ),
    Claim(
        id="C2",
        statement="The same for singular values in [0.001, 1].",
        reported=_in_words(RANGE_FROM_0001),
        criterion="both ends of every range within 0.001 of the reported number",
        judge=_close_ranges(RANGE_FROM_0001),
    ),
    Claim(
        id="C3",
        statement="Tiny singular values grow by the product of the linear coefficients; Polar Express and CANS lift "
        "them about twice as far as the tables of Jordan and You.",
        reported="; ".join(f"{name} {slope}" for name, slope in SLOPES.items()),
        criterion="every factor within 1 % of the reported number, and both lift at least 1.9 times as far as Jordan's",
        judge=lambda m: [
            *(abs(m[name] / slope - 1) <= 0.01 for name, slope in SLOPES.items()),
            m["polar_express 5"] >= 1.9 * m["jordan 5"],
            m["cans 5"] >= 1.9 * m["jordan 5"],
        ],
    ),
    Claim(
        id="C4",
        statement="Jordan's iteration does not converge, however many steps it takes; eight Polar Express steps do.",
        reported="Jordan: values stay spread over about [0.7, 1.2]; Polar Express, 8 steps: 1.0000 on [0.001, 1]",
        criterion="largest |s - 1| over [0.1, 1] at least 0.1 after 5, 10, 20 and 40 steps of Jordan's; at most 1e-4 "
        "over [0.001, 1] after 8 steps of Polar Express",
        judge=lambda m: [*(error >= 0.1 for error in m["jordan"].values()), m["polar_express 8"] <= 1e-4],
    ),
    Claim(
        id="C5",
        statement="After plain Frobenius normalisation the AOL table as published turns large singular values "
        "negative, so that a nearly rank-one gradient is followed uphill.",
        reported=f"negative for s > {AOL_FLIP}; range [-1.0844, 1.0844]",
        criterion="sign change within 0.001 of the reported place, lowest value within 0.001 of -1.0844",
        judge=lambda m: [abs(m["flips above"] - AOL_FLIP) <= 1e-3, abs(m["lowest"] + 1.0844) <= 1e-3],
    ),
    Claim(
        id="C6",
        statement="With its own preconditioner the AOL table as published is safe.",
        reported="the table is meant for AOL-preconditioned input, whose singular values are at most one",
        criterion="no singular direction changes sign, on Gaussian matrices, and on nearly rank-one matrices",
        judge=lambda m: [all(gain > 0 for gain in gains) for gains in m.values()],
    ),
    Claim(
        id="C7",
        statement="Training does not notice: Muon with five Newton-Schulz steps reaches the loss of Muon with the "
        "exact polar factor.",
        reported="Jordan et al.: values anywhere in about [0.7, 1.2] leave the loss curve of Muon unharmed",
        criterion="an MLP on digits, learning rate of each tuned on held-out data over the same grid, at least 3 "
        "seeds: the means of the final training loss, and of the final test loss, differ by at most the larger of the "
        "two standard deviations over seeds",
        judge=lambda m: [_within_spread(m["train loss"]), _within_spread(m["test loss"])],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    points = run.pick(smoke=2_000, desktop=20_000)
    match claim:
        case "C1":
            return {name: _range(*table, 1e-2, points) for name, table in SETS.items()}
        case "C2":
            return {name: _range(*table, 1e-3, points) for name, table in SETS.items()}
        case "C3":
            tiny = torch.tensor([1e-9], dtype=torch.float64)
            return {name: float(scalar_map(tiny, *table)) / 1e-9 for name, table in SETS.items()}
        case "C4":
            return _convergence(points)
        case "C5":
            grid = torch.linspace(0.01, 1, points, dtype=torch.float64)
            images = scalar_map(grid, AOL)
            return {"flips above": float(grid[images > 0].max()), "lowest": float(images.min())}
        case "C6":
            return _preconditioned_gains(run)
        case "C7":
            return _training(run)
    raise ValueError(f"no claim {claim!r}")


def scalar_map(values: Float[Tensor, " k"], coefficients: Any, steps: int | None = None) -> Float[Tensor, " k"]:
    """What an iteration makes of singular values in [0, 1], by the library's own polar factor of 2 x 2 matrices."""
    x = torch.diag_embed(torch.stack([values, (1 - values.square()).clamp_min(0).sqrt()], dim=-1))
    return polar(x, "newton_schulz", coefficients=coefficients, steps=steps, normalize="frobenius")[:, 0, 0]


def _grid(low: float, points: int) -> Float[Tensor, " k"]:
    return torch.logspace(math.log10(low), 0, points, dtype=torch.float64).clamp_max(1)


def _range(coefficients: Any, steps: int, low: float, points: int) -> tuple[float, float]:
    images = scalar_map(_grid(low, points), coefficients, steps)
    return float(images.min()), float(images.max())


def _convergence(points: int) -> dict[str, Any]:
    error = {}
    for steps in (5, 10, 20, 40):
        low, high = _range("jordan", steps, 0.1, points)
        error[str(steps)] = max(1 - low, high - 1)
    low, high = _range("polar_express", 8, 1e-3, points)
    return {"jordan": error, "polar_express 8": max(1 - low, high - 1)}


def _preconditioned_gains(run: Run) -> dict[str, list[float]]:
    """The smallest of diag(U' Q V) per seed: what the AOL iteration makes of each singular direction of its input."""
    gains: dict[str, list[float]] = {"Gaussian": [], "nearly rank one": []}
    for seed in run.seeds(5):
        generator = run.generator(seed)
        u, v, noise = (torch.randn(64, size, dtype=torch.float64, generator=generator) for size in (1, 1, 64))
        for name, x in {"Gaussian": noise, "nearly rank one": u @ v.mT + 0.01 * noise}.items():
            left, _, right = torch.linalg.svd(x)
            q = polar(x, "newton_schulz", coefficients=AOL, normalize="aol")
            gains[name].append(float((left.mT @ q @ right.mT).diagonal().min()))
    return gains


VARIANTS: dict[str, dict[str, Any]] = {
    "newton_schulz 5": {"method": "newton_schulz", "ns_coefficients": "jordan", "ns_steps": 5},
    "exact": {"method": "svd"},
}


def _training(run: Run) -> dict[str, Any]:
    rates = run.pick(smoke=[0.02], desktop=[0.002 * 1.6**power for power in range(9)])
    tuning, final = run.pick(smoke=(1, 1), desktop=(2, 5))
    found: dict[str, Any] = {"rates": rates, "best rate": {}, "tuning": {}, "train loss": {}, "test loss": {}}
    for name, options in VARIANTS.items():
        tuned = []
        for rate in rates:
            losses = [_train(run, seed, rate, options)["held-out loss"] for seed in range(100, 100 + tuning)]
            tuned.append(fmean(losses) if all(map(math.isfinite, losses)) else math.inf)
            run.say(f"C7: {name}, learning rate {rate:.4g}: held-out loss {tuned[-1]:.4f}")
        found["tuning"][name] = tuned
        found["best rate"][name] = best = rates[min(range(len(rates)), key=lambda i: tuned[i])]
        ends = [_train(run, seed, best, options) for seed in run.seeds(final)]
        for loss in ("train loss", "test loss"):
            found[loss][name] = [end[loss] for end in ends]
    return found


def _train(run: Run, seed: int, rate: float, options: Mapping[str, Any]) -> dict[str, float]:
    """Train an MLP on digits; the last 300 training images are held out for tuning."""
    data, generator = digits(flat=True), run.generator(seed)
    train_x, train_y = data.train_x[:-300], data.train_y[:-300]
    model = MLP([64, 128, 128, 10], generator=generator)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2][:-1]
    others = [parameter for parameter in model.parameters() if id(parameter) not in set(map(id, matrices))]
    optimizers = [
        Muon(matrices, lr=rate, weight_decay=0.0, **options),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0),
    ]
    steps = run.pick(smoke=5, desktop=300)
    decays = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 - step / steps) for each in optimizers]
    for _ in range(steps):
        batch = torch.randint(len(train_x), (128,), generator=generator)
        loss = cross_entropy(model(train_x[batch]), train_y[batch])
        loss.backward()
        for optimizer, decay in zip(optimizers, decays, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    with torch.no_grad():
        parts = {
            "train loss": (train_x, train_y),
            "held-out loss": (data.train_x[-300:], data.train_y[-300:]),
            "test loss": (data.test_x, data.test_y),
        }
        return {name: float(cross_entropy(model(x), y)) for name, (x, y) in parts.items()}


def _within_spread(losses: Mapping[str, list[float]]) -> bool:
    groups = list(losses.values())
    if min(map(len, groups)) < 3 or not all(math.isfinite(loss) for group in groups for loss in group):
        return False
    spread = max(stdev(group) for group in groups)
    return abs(fmean(groups[0]) - fmean(groups[1])) <= spread
