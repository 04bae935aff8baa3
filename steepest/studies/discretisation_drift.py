"""Discretisation drift: how far training is from its flow, and what follows from it.

Flows that follow the discrete steps to higher order (one even where they diverge), the learning rate DAL that
keeps the drift as long as the step, the drift of two-player games and its cancellation, and smoothness: spectral
normalisation as a change of the optimizer, and the geometric complexity that large steps find.

Source: Rosca 2023, arXiv 2310.14036, with 2302.01952 (principal flow, DAL), 2105.13922 (games), 2307.05789 (several
steps), 2105.05246 (spectral normalisation) and 2209.13083 (geometric complexity).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.data import digits
from steepest.dynamics import IGR, NGF, Flow, PrincipalFlow, ThirdOrder, integrate, local_error
from steepest.optim import DAL
from steepest.studies._base import Claim, Run
from steepest.studies._drift_games import GAME_CLAIMS, measure_games

COMPONENTS = (
    "steepest.dynamics.PrincipalFlow",
    "steepest.dynamics.IGR",
    "steepest.dynamics.ThirdOrder",
    "steepest.dynamics.MultiStepLoss",
    "steepest.dynamics.stability_coefficients",
    "steepest.dynamics.step_drift",
    "steepest.optim.DAL",
    "steepest.dynamics.TwoPlayer",
    "steepest.dynamics.GameFlow",
    "steepest.optim.GameOptimizer",
    "steepest.nn.spectral_norm",
    "steepest.dynamics.geometric_complexity",
)

Loss = Callable[[Tensor], Tensor]
FLOWS: dict[str, tuple[Callable[[Loss, float], Flow], int]] = {
    "NGF": (NGF, 2),
    "IGR": (IGR, 3),
    "third order": (ThirdOrder, 4),
    "principal": (PrincipalFlow, 3),
    "principal, with the other term": (lambda loss, h: PrincipalFlow(loss, h, non_principal=True), 4),
}
FIXED = (0.05, 0.2, 0.5, 1.0, 2.0)

_OWN_CLAIMS = (
    Claim(
        id="C1",
        statement="The flows follow gradient descent to a higher order than the gradient flow.",
        reported="local errors O(h^2) for the gradient flow, O(h^3) for the IGR and the principal flow, O(h^4) with "
        "all terms of third order",
        criterion="a loss of three variables that is no quadratic, h = 0.1, 0.05, 0.025, integrated to 1e-12: order "
        "fitted to the local error within 0.25 of 2, 3, 4, 3, 4, on each of 3 random losses",
        judge=lambda m: [
            all(abs(order - FLOWS[name][1]) <= 0.25 for order in orders) for name, orders in m["orders"].items()
        ],
    ),
    Claim(
        id="C2",
        statement="On quadratics the principal flow is gradient descent, also where it oscillates or diverges; the "
        "gradient flow and the IGR flow cannot leave a minimum.",
        reported="a theorem, and plots",
        criterion="Hessian diag(2, 0.02), h = 0.9 and 1.05, 20 steps: error of the principal flow, solved exactly and "
        "integrated, below 1e-6 of each iterate; at h = 1.05 gradient descent grows while the norms of both other "
        "flows decrease at every step",
        judge=lambda m: [
            all(error < 1e-6 for errors in m["principal flow, largest error"].values() for error in errors.values()),
            m["gradient descent, growth at 1.05"] > 1,
            all(m["decreases at every step at 1.05"].values()),
        ],
    ),
    Claim(
        id="C4",
        statement="DAL trains without a learning rate to tune, and its power p trades speed for stability.",
        reported="DAL is stable on every network tried, DAL with p = 0.5 also fast",
        criterion="digits (1000), MLP 64-100-100-10, full batch, 200 steps, fixed rates 0.05 to 2; on each of 3 seeds: "
        "p = 0.5 ends below half the loss of the best fixed rate; p = 1 within 8 times, its loss never above 1.1 times "
        "the first; the fixed rate 2 ends no lower than 2.25 while p = 0.5 takes steps of 1.5 or more on average",
        judge=lambda m: [
            all(2 * mine < min(fixed) for mine, fixed in zip(m["loss"]["p 0.5"], _fixed(m), strict=True)),
            all(mine <= 8 * min(fixed) for mine, fixed in zip(m["loss"]["p 1"], _fixed(m), strict=True)),
            all(highest <= 1.1 for highest in m["highest over first loss"]["p 1"]),
            all(not loss < 2.25 for loss in m["loss"]["lr 2"]),
            all(rate >= 1.5 for rate in m["mean rate"]["p 0.5"]),
        ],
    ),
    Claim(
        id="C5",
        statement="A power p that is too small is unstable.",
        reported="p below 0.5 loses the stability",
        criterion="as C4, p = 0.25: the worst seed's loss is at least 5 times that of p = 0.5",
        judge=lambda m: not max(m["p 0.25"], key=_badness) < 5 * max(m["p 0.5"], key=_badness),
    ),
)
CLAIMS = tuple(sorted((*_OWN_CLAIMS, *GAME_CLAIMS), key=lambda claim: claim.id))


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _orders(run)
        case "C2":
            return _quadratic(run)
        case "C4":
            found = _training(run)
            return {key: {name: each[key] for name, each in found.items()} for key in next(iter(found.values()))}
        case "C5":
            return {name: _training(run)[name]["loss"] for name in ("p 0.5", "p 0.25")}
    return measure_games(claim, run)


def random_loss(generator: torch.Generator) -> tuple[Loss, Tensor]:
    """A smooth loss of three variables, not quadratic, holomorphic, with curvatures around one; and a start."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mix, bend, start = draw(3, 3), draw(3, 3), 0.5 * draw(3)

    def loss(theta: Tensor) -> Tensor:
        a, b = mix.to(theta.dtype) @ theta / 2, bend.to(theta.dtype) @ theta / 2
        return (a * a).sum() / 2 + a.sin().sum() + b.exp().sum() / 3 + (theta * theta).sum() / 2 + (b**3).sum() / 6

    return loss, start


def _orders(run: Run) -> dict[str, Any]:
    steps = run.pick(smoke=(0.1, 0.05), desktop=(0.1, 0.05, 0.025))
    tol = run.pick(smoke=1e-9, desktop=1e-12)
    orders: dict[str, list[float]] = {name: [] for name in FLOWS}
    curvature = []
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        loss, start = random_loss(run.generator(seed))
        curvature.append(float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start)).abs().max()))
        for name, (make, _) in FLOWS.items():
            errors = [float(local_error(make(loss, h), start, "dop853", tol=tol)) for h in steps]
            orders[name].append(_slope(steps, errors))
    return {"steps": list(steps), "largest curvature at the start": curvature, "orders": orders}


def _slope(steps: tuple[float, ...], errors: list[float]) -> float:
    x, y = [math.log(step) for step in steps], [math.log(error) for error in errors]
    middle, height = fmean(x), fmean(y)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def _quadratic(run: Run) -> dict[str, Any]:
    diagonal, start = torch.tensor([2.0, 0.02], dtype=torch.float64), torch.tensor([-0.35, -0.2], dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return (diagonal * theta * theta).sum() / 2

    count, tol = run.pick(smoke=(2, 1e-8), desktop=(20, 1e-12))
    found: dict[str, Any] = {"principal flow, largest error": {}, "decreases at every step at 1.05": {}}
    for h in (0.9, 1.05):
        times = [n * h for n in range(count + 1)]
        iterates = torch.stack([start * (1 - h * diagonal) ** n for n in range(count + 1)])
        errors = {}
        for method in ("exact_quadratic", "dop853"):
            states = integrate(PrincipalFlow(loss, h), start, times, method, tol=tol)  # type: ignore[arg-type]
            errors[method] = float(((states - iterates).norm(dim=1) / iterates.norm(dim=1)).max())
        found["principal flow, largest error"][str(h)] = errors
    found["gradient descent, growth at 1.05"] = float(iterates[-1].norm() / iterates[0].norm())
    for name in ("NGF", "IGR"):
        norms = integrate(FLOWS[name][0](loss, 1.05), start, times, "dop853", tol=tol).norm(dim=1)
        found["decreases at every step at 1.05"][name] = bool((norms.diff() < 0).all())
    return found


def _training(run: Run) -> dict[str, Any]:
    """For each way to choose the rate, over the seeds: last loss, highest loss over the first, mean rate."""
    methods = {f"lr {lr:g}": {"lr": lr, "p": 0.0} for lr in FIXED} | {f"p {p:g}": {"p": p} for p in (1.0, 0.5, 0.25)}
    found: dict[str, Any] = {name: {"loss": [], "highest over first loss": [], "mean rate": []} for name in methods}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        for name, options in methods.items():
            ends = run.once(f"digits, {name}, seed {seed}", partial(_train, run, seed, options))
            for key, values in found[name].items():
                values.append(ends[key])
            run.say(f"digits, seed {seed}, {name}: loss {ends['loss']:.4f}")
    return found


def _train(run: Run, seed: int, options: Mapping[str, Any]) -> dict[str, float]:
    data, generator = digits(flat=True), run.generator(seed)
    low, high = data.train_x.min(), data.train_x.max()
    x = ((data.train_x[:1000] - low) / (high - low)).to(run.device)  # pixels from 0 to 1
    y = data.train_y[:1000].to(run.device)
    layers = [nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in layers[::2]:
            for parameter in layer.parameters():  # torch's own distribution, from the study's generator
                parameter.uniform_(-1, 1, generator=generator).mul_(layer.in_features**-0.5)
    model.to(run.device)
    optimizer = DAL(model.parameters(), **options)
    losses, rates = [], []
    for _ in range(run.pick(smoke=3, desktop=200)):
        try:
            losses.append(optimizer.step(lambda: cross_entropy(model(x), y)))
        except FloatingPointError:
            return {"loss": math.inf, "highest over first loss": math.inf, "mean rate": math.nan}
        rates.append(optimizer.last_lr)
    with torch.no_grad():
        last = float(cross_entropy(model(x), y))
    highest = float(torch.stack(losses).max() / losses[0])
    return {"loss": last, "highest over first loss": highest, "mean rate": float(torch.stack(rates).mean())}


def _fixed(m: Mapping[str, Any]) -> list[list[float]]:
    """For each seed the losses of the fixed rates that did not diverge."""
    columns = zip(*(m["loss"][f"lr {lr:g}"] for lr in FIXED), strict=True)
    return [[loss for loss in column if math.isfinite(loss)] for column in columns]


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
