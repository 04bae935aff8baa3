"""Complex zeros of the softmax's partition function: do they bound safe steps, and does their controller hold?

The theory (C1, C2) is measured on random samples and in many digits, the rest on digits and small networks, where the
paper had CIFAR-10 and a ResNet, too. C4b is ours: the same controller around three optimizers.

Source: Sao 2026, arXiv 2603.13552.
"""

import math
from collections.abc import Mapping
from decimal import Decimal, localcontext
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.curvature import Hessian
from steepest.curvature.logit_slopes import logit_slopes
from steepest.curvature.softmax_radius import exact_radius, radius, tight_radius
from steepest.models import MLP
from steepest.optim import RadiusClip, RadiusSGD
from steepest.studies._base import Claim, Run
from steepest.studies._ghosts_training import (
    MODELS,
    NormConv,
    TokenTransformer,
    accuracy,
    adam,
    data,
    downhill,
    fit,
    layer_norm_mlp,
    moved,
    one_step,
    seeded,
    spikes,
    survival,
)

COMPONENTS = (
    "steepest.dynamics.radius",
    "steepest.dynamics.tight_radius",
    "steepest.dynamics.exact_radius",
    "steepest.dynamics.logit_slopes",
    "steepest.dynamics.step_radius",
    "steepest.dynamics.network_radius",
    "steepest.dynamics.kl_remainder",
    "steepest.optim.RadiusClip",
    "steepest.optim.RadiusSGD",
    "steepest.nn.RIA",
)

INSIDE = (0.084, 0.0025, 3.2e-4, 9.6e-8, 1.2e-8)
OUTSIDE = (0.81, 0.19, 1.66, 5.8, 384.0)
SGD_RATES = (0.01, 0.03, 0.1, 0.3)


def _near(found: list[float], known: tuple[float, ...]) -> bool:
    return all(abs(one / other - 1) <= 0.05 for one, other in zip(found, known, strict=True))


def _column(m: Mapping[str, Any], ratio: float) -> list[float]:
    place = m["ratios"].index(ratio)
    return [row[place] for rows in m["retained"].values() for row in rows]


CLAIMS = (
    Claim(
        id="C1",
        statement="The nearest complex zero is never nearer than pi over the spread of the slopes, and for two equal "
        "logits it is just there; the tight bound holds, too.",
        reported="theory",
        criterion="200 random samples of 2 to 7 classes, logits N(0, 4), slopes N(0, 1), zeros by winding number: no "
        "violation of either bound; the equal pair to 1e-6",
        judge=lambda m: [
            m["violations"] == 0,
            m["violations of the tight bound"] == 0,
            abs(m["equal pair"] - 1) <= 1e-6,
        ],
    ),
    Claim(
        id="C2",
        statement="The Taylor series of the loss converges inside the exact radius and diverges outside.",
        reported=f"errors at orders 5, 10, 20, 40, 60: {INSIDE} at 0.8, {OUTSIDE} at 1.2 times the radius",
        criterion="z = (1, 0, -1), a = (0.5, -1, 2), 80 digits: all errors within 5 % of these, the last below 1e-7 "
        "inside and above 100 outside",
        judge=lambda m: [
            _near(m["0.8"], INSIDE),
            _near(m["1.2"], OUTSIDE),
            m["0.8"][-1] < 1e-7 and m["1.2"][-1] > 100,
        ],
    ),
    Claim(
        id="C3",
        statement="One gradient step shorter than the radius breaks no network; steps of many radii break all.",
        reported="six architectures: no failure for r < 1, collapse appears for r >= 1",
        criterion="digits, four architectures after 400 steps of Adam (batches of 64, 1e-3), "
        "3 seeds: at least 0.93 of the test accuracy left for r up to 0.75, and "
        "at most 0.65 at r = 100, in every run",
        judge=lambda m: [
            min(min(_column(m, ratio)) for ratio in (0.25, 0.5, 0.75)) >= 0.93,
            max(_column(m, 100.0)) <= 0.65,
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C4",
        statement="Adam collapses when its learning rate is multiplied by a thousand and stays there; under the "
        "controller it survives.",
        reported="learning rates 1e-4, 1e-3, 1e-2 times 1000 from step 50 of 200 on: the controller survives",
        criterion="digits, 64-128-10, 3 seeds, radius over the training set: accuracy under the controller at least "
        "0.94 everywhere (also at 1e-3 times 10^4), plain Adam at most 0.25 at 1e-3 and 1e-2, largest r at most "
        "1 + 1e-6",
        judge=lambda m: [
            all(min(row["controller"]) >= 0.94 for row in m.values()),
            all(max(row["plain"]) <= 0.25 for key, row in m.items() if key in ("0.001 x 1000", "0.01 x 1000")),
            all(row["largest r"] <= 1 + 1e-6 for row in m.values()),
        ],
    ),
    Claim(
        id="C4b",
        statement="The same controller carries Adam, SGD and Muon through spikes of any size.",
        reported="not in the paper; a bar of this library",
        criterion="as C4, learning rates 1e-3 (Adam), 0.05 (SGD, momentum 0.9), 0.01 (Muon), spikes of 10, 1000 and "
        "10^4, 3 seeds: mean accuracy under the controller at most 0.03 below that without a spike, with the radius "
        "over the training set, and over the current batch",
        judge=lambda m: [
            fmean(values) >= fmean(rows["no spike"]) - 0.03
            for rows in m.values()
            for name, values in rows.items()
            if name.startswith("controller")
        ],
    ),
    Claim(
        id="C5",
        statement="In units of the radius the step at which the loss doubles hardly depends on the temperature.",
        reported="standard deviation of the onsets over temperatures 0.25 to 64: 0.992 raw, 0.164 normalised (6 times)",
        criterion="digits, 64-128-128-10 GELU after 120 steps of Adam at each temperature (full batch, "
        "0.01), standard deviation of log10 of the onset over temperatures: raw over "
        "normalised at least 2, mean of 3 seeds",
        judge=lambda m: fmean(m["reduction"]) >= 2,
    ),
    Claim(
        id="C6",
        statement="The step that the Hessian allows, 2 / (v' H v), is longer than the radius in every direction, and "
        "more and more so during training.",
        reported="10 times early, 460 times late",
        criterion="digits, MLP with layer norm, Adam (full batch, 0.01), 20 "
        "random directions, 3 seeds: ratio above 1 in all (directions "
        "without positive curvature allow any step); median at step 300 at least 10 times that at step 5",
        judge=lambda m: [
            min(m["smallest"]) > 1,
            all(late / early >= 10 for early, late in zip(m["median at 5"], m["median at 300"], strict=True)),
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C7",
        statement="SGD whose steps are one radius long needs no learning rate: it is as good as the best fixed one.",
        reported="ResNet-18, CIFAR-10: r = 1 85.3 %, best fixed learning rate 82.6 %; r = 0.5 80.4, 2 84.4, 4 72.1 %",
        criterion="digits, small CNN, momentum 0.9, weight decay 5e-4, 10 epochs, 3 seeds: mean accuracy at r = 1 at "
        "most 0.01 below the best of four learning rates; larger spread over seeds at r = 4 than at r = 1",
        judge=lambda m: [
            fmean(m["r = 1"]) >= max(fmean(m[f"lr {rate}"]) for rate in SGD_RATES) - 0.01,
            stdev(m["r = 4"]) > stdev(m["r = 1"]),
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C8",
        statement="A single step with a learning rate 10^4 times too high ruins Adam with clipped gradients, but not "
        "under the controller.",
        reported="accuracy, controller against clipping: transformer 95.3 / 38.7, MLP with layer norm 93.9 / 51.5, CNN "
        "with batch norm 71.6 / 10.3 %",
        criterion="digits, full batch, 200 steps, spike at step 50, 3 seeds: mean accuracy under the controller (on "
        "Adam's own step) at least 0.2 above that under clipping, for the transformer and for the MLP",
        judge=lambda m: [
            fmean(m[name]["controller"]) - fmean(m[name]["gradient clip"]) >= 0.2
            for name in ("transformer", "mlp + layer norm")
        ],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _bounds(run)
        case "C2":
            return _series()
        case "C3":
            return one_step(run)
        case "C4":
            return spikes(run)
        case "C4b":
            return survival(run)
        case "C5":
            return _temperature(run)
        case "C6":
            return _hessian_scale(run)
        case "C7":
            return _radius_sgd(run)
        case "C8":
            return _single_spike(run)
    raise ValueError(f"no claim {claim!r}")


def _bounds(run: Run) -> dict[str, Any]:
    generator = run.generator(0)
    ratios, tight = [], []
    for _ in range(run.pick(smoke=8, desktop=200)):
        classes = int(torch.randint(2, 8, (), generator=generator))
        z = 2 * torch.randn(classes, dtype=torch.float64, generator=generator)
        a = torch.randn(classes, dtype=torch.float64, generator=generator)
        exact = float(exact_radius(z, a))
        ratios.append(exact / float(radius(a)))
        tight.append(exact / float(tight_radius(z, a)))
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return {
        "violations": sum(ratio < 1 - 1e-9 for ratio in ratios),
        "violations of the tight bound": sum(ratio < 1 - 1e-9 for ratio in tight),
        "ratio": {"least": min(ratios), "median": median(ratios), "largest": max(ratios)},
        "median of the tight bound": median(tight),
        "equal pair": float(exact_radius(0 * pair, pair)) / math.pi,
    }


def _series() -> dict[str, Any]:
    z, a = (1, 0, -1), (0.5, -1, 2)
    rho = float(exact_radius(torch.tensor(z, dtype=torch.float64), torch.tensor(a, dtype=torch.float64)))
    order = 60
    with localcontext() as context:
        context.prec = 80
        w = [Decimal(x).exp() for x in z]
        f = [
            sum((u * Decimal(x) ** n for u, x in zip(w, a, strict=True)), Decimal(0)) / math.factorial(n) / sum(w)
            for n in range(order + 1)
        ]
        c = [sum(w, Decimal(0)).ln()]
        for n in range(1, order + 1):
            c.append(f[n] - sum((k * c[k] * f[n - k] for k in range(1, n)), Decimal(0)) / n)
        found: dict[str, Any] = {"radius": rho}
        for share in ("0.8", "1.2"):
            t = Decimal(share) * Decimal(rho)
            true = sum((u * (Decimal(x) * t).exp() for u, x in zip(w, a, strict=True)), Decimal(0)).ln()
            sums = [sum((c[n] * t**n for n in range(last + 1)), Decimal(0)) for last in (5, 10, 20, 40, 60)]
            found[share] = [float(abs(value - true)) for value in sums]
    return found


def _temperature(run: Run) -> dict[str, Any]:
    steps, count = run.pick(smoke=(10, 200), desktop=(120, None))
    x, y, *_ = data(count)
    temperatures = [2.0**power for power in range(-2, 7)]
    found: dict[str, Any] = {"temperatures": temperatures, "raw": [], "normalised": [], "reduction": []}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        raw, normalised = [], []
        for temperature in temperatures:
            model = MLP([64, 128, 128, 10], "gelu", generator=run.generator(seed))
            fit(model, x, y, steps, adam(model), temperature)
            start = [p.detach().clone() for p in model.parameters()]
            v, rho = downhill(model, x, y, temperature)
            onset = _onset(model, start, v, rho, x, y, temperature)
            raw.append(math.log10(onset * rho))
            normalised.append(math.log10(onset))
        found["raw"].append(raw)
        found["normalised"].append(normalised)
        found["reduction"].append(stdev(raw) / stdev(normalised))
        run.say(f"C5: seed {seed}: raw {stdev(raw):.3f}, normalised {stdev(normalised):.3f}")
    return found


@torch.no_grad()
def _onset(
    model: nn.Module, start: list[Tensor], v: list[Tensor], rho: float, x: Tensor, y: Tensor, temperature: float
) -> float:
    """The first step, in radii, after which the loss has doubled."""

    def loss(ratio: float) -> float:
        moved(model, start, v, ratio * rho)
        return float(cross_entropy(model(x) / temperature, y))

    base, ratio = loss(0.0), 0.01
    while loss(ratio) < 2 * base:
        ratio *= 1.05
        if ratio > 1e6:
            return ratio
    return ratio


def _hessian_scale(run: Run) -> dict[str, Any]:
    directions = run.pick(smoke=2, desktop=20)
    x, y, *_ = data(run.pick(smoke=100, desktop=None))
    times = run.pick(smoke=(2, 5), desktop=(5, 30, 100, 300))
    found: dict[str, Any] = {"smallest": [], **{f"median at {t}": [] for t in times}, "not positive": 0}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        generator = run.generator(seed)
        model = MODELS["mlp + layer norm"](generator)
        optimizer, smallest, done = adam(model), math.inf, 0
        for t in times:
            fit(model, x, y, t - done, optimizer)
            done = t
            hessian = Hessian(model, cross_entropy, (x, y))
            v = torch.randn(hessian.shape[1], directions, generator=generator)
            v = v / v.norm(dim=0)
            curvature = (v * (hessian @ v)).sum(0)
            ratios = []
            for k in range(directions):
                rho = float(radius(logit_slopes(model, x, hessian.unflatten(v[:, k].contiguous()))))
                ratios.append(2 / float(curvature[k]) / rho if float(curvature[k]) > 0 else math.inf)
            found["not positive"] += sum(ratio == math.inf for ratio in ratios)
            smallest = min(smallest, *ratios)
            found[f"median at {t}"].append(median(min(ratio, 1e9) for ratio in ratios))
        found["smallest"].append(smallest)
        run.say(f"C6: seed {seed}: medians {[round(found[f'median at {t}'][-1], 1) for t in times]}")
    return found


def _radius_sgd(run: Run) -> dict[str, Any]:
    x, y, test_x, test_y = data(run.pick(smoke=200, desktop=None))
    epochs = run.pick(smoke=1, desktop=10)
    found: dict[str, Any] = {}

    def train(seed: int, r: float | None, rate: float) -> float:
        generator = run.generator(seed)
        model = MODELS["cnn"](generator)
        optimizer: torch.optim.Optimizer
        if r is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = RadiusSGD(model.parameters(), model, r=r, weight_decay=5e-4)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(64):
                optimizer.zero_grad()
                cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        return accuracy(model, test_x, test_y)

    for name, r, rate in [
        *((f"r = {r:g}", r, 0.0) for r in run.pick(smoke=(1.0,), desktop=(0.5, 1.0, 2.0, 4.0))),
        *((f"lr {rate}", None, rate) for rate in run.pick(smoke=SGD_RATES[:1], desktop=SGD_RATES)),
    ]:
        found[name] = [train(seed, r, rate) for seed in run.seeds(run.pick(smoke=1, desktop=3))]
        run.say(f"C7: {name}: {found[name]}")
    return found


NETWORKS = {
    "transformer": seeded(TokenTransformer),
    "mlp + layer norm": seeded(layer_norm_mlp),
    "cnn + batch norm": seeded(NormConv),
}


def _single_spike(run: Run) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    cut = len(x) // 5
    test_x, test_y, x, y = x[:cut], y[:cut], x[cut:], y[cut:]
    steps = run.pick(smoke=4, desktop=200)
    if run.scale == "smoke":
        x, y = x[:100], y[:100]

    def train(make: Any, seed: int, guard: str) -> float:
        model = make(run.generator(seed))
        inner = torch.optim.Adam(model.parameters(), lr=0.015)
        optimizer: torch.optim.Optimizer = inner
        if guard == "controller":
            optimizer = RadiusClip(inner, model, samples=x, method="fd")
        for step in range(steps):
            inner.param_groups[0]["lr"] = 0.015 * (1e4 if step == steps // 4 else 1.0)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if guard == "gradient clip":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            elif guard == "controller on the gradient":
                _limit_rate(inner, model, x)
            optimizer.step()
        return accuracy(model, test_x, test_y)

    found: dict[str, Any] = {}
    for name, make in NETWORKS.items():
        found[name] = {}
        for guard in ("plain", "gradient clip", "controller", "controller on the gradient"):
            ends = [train(make, seed, guard) for seed in run.seeds(run.pick(smoke=1, desktop=3))]
            found[name][guard] = ends
            run.say(f"C8: {name}, {guard}: {ends}")
    return found


def _limit_rate(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor) -> None:
    """The variant of the paper's code: the learning rate is cut as if Adam stepped along the gradient."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    if length:
        rho = float(radius(logit_slopes(model, x, {name: g / length for name, g in gradients.items()})))
        group = optimizer.param_groups[0]
        group["lr"] = min(group["lr"], rho / length)
