"""φ-balancing: prices from a convex potential of the expected routing, against losses of the mini-batch and biases.

The theory (C1, C2) is checked on numbers that can be worked out. The empirical claims are measured on two problems: a
regression with a mixture of eight experts on sixteen Gaussian clusters of unequal weight (C3, C4), where every method
gets the same number of strengths; and a small mixture-of-experts GPT on the embedded text (C6), where every method gets
the same number of trials. The paper's own scale is out of reach here.

Source: Chen et al. 2026, arXiv 2605.15403. Baselines: Fedus et al. 2021, arXiv 2101.03961; Wang et al. 2024, arXiv
2408.15664.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from steepest.data import text
from steepest.geometry import EuclideanMap, NegentropyMap
from steepest.models import GPT, GPTConfig, MoE
from steepest.nn import Balancer, PhiBalancer, Router, load_metrics, make_balancer, max_violation
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.nn.PhiBalancer",
    "steepest.nn.SwitchBalancer",
    "steepest.nn.GlobalSwitchBalancer",
    "steepest.nn.LossFreeBalancer",
    "steepest.nn.Router",
    "steepest.nn.load_metrics",
)

SPREAD, RATES, BATCHES = 0.3, (0.01, 0.1), (4, 16, 64)
MATCHED = 0.2
BETTER = 0.05
STRENGTHS: dict[str, tuple[float, ...]] = {
    "phi": (0.1, 0.17, 0.3, 0.55, 1.0),
    "switch": (0.03, 0.055, 0.1, 0.17, 0.3),
    "loss_free": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
TEXT_TRIALS: dict[str, tuple[tuple[float, float | None], ...]] = {
    "phi": tuple((rate, strength) for rate in (2e-3, 6e-3) for strength in (0.01, 0.03, 0.1)),
    "switch": tuple((rate, strength) for rate in (2e-3, 6e-3) for strength in (0.01, 0.03, 0.1)),
    "loss_free": tuple((rate, strength) for rate in (2e-3, 6e-3) for strength in (1e-3, 3e-3, 1e-2)),
    "none": tuple((rate, None) for rate in (1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 9e-3)),
}
EVEN = 0.3


def _judge_bias(m: Mapping[str, Any]) -> list[bool]:
    norms = [_near(m["squared norm"][f"B={b}"], 0.5 + 2 * SPREAD**2 / b, 0.01) for b in BATCHES]
    pulls = [_near(m["mini-batch pull"][f"B={b}"], 2 * SPREAD / b, 0.05) for b in BATCHES]
    ratios = [_near(m["ratio"][f"eta={rate}, B={b}"], rate, 0.05) for rate in RATES for b in BATCHES]
    return [all(norms), all(pulls), all(ratios)]


def _judge_front(m: Mapping[str, Any]) -> list[bool]:
    pairs = [pair for pair in m["matched with switch"]["batch 8"] if pair["matched"]]
    return [pair["loss ratio"] <= 1 - BETTER for pair in pairs] or [False]


def _judge_loss_free(m: Mapping[str, Any]) -> list[bool]:
    parts = []
    for batch in m["most even"].values():
        phi, free = batch["phi"], batch["loss_free"]
        parts += [phi["violation"] <= free["violation"], phi["violation std"] <= free["violation std"]]
    return parts


def _judge_text(m: Mapping[str, Any]) -> list[bool]:
    phi = m["final"]["phi"]
    parts = []
    for name in ("switch", "loss_free"):
        other = m["final"][name]
        spread = max(_spread(phi["loss"]), _spread(other["loss"]))
        parts.append(fmean(other["loss"]) - fmean(phi["loss"]) > spread)
        parts.append(fmean(phi["violation"]) <= (1 + MATCHED) * fmean(other["violation"]))
    return parts


CLAIMS = (
    Claim(
        id="C1",
        statement="Balance losses of a mini-batch pull although the population is perfectly balanced; the dual form's "
        "pull is smaller by the factor eta.",
        reported="p(x) = (1/2 + s c, 1/2 - s c), c a fair coin: E|p_t|^2 = 1/2 + 2 s^2 / B, pull of the mini-batch "
        "loss 2 s / B, of the Euclidean dual form 2 eta s / B",
        criterion="s = 0.3, B in {4, 16, 64}, eta in {0.01, 0.1}: squared norm within 1 %, mini-batch pull within 5 %, "
        "ratio of the pulls within 5 % of eta",
        judge=_judge_bias,
    ),
    Claim(
        id="C2",
        statement="The min-max problem is the convex problem, and mirror ascent on the price is a moving average.",
        reported="identity, for negative entropy and the Euclidean potential",
        criterion="float64: largest difference between the two iterations, and largest duality gap at the price of p, "
        "below 1e-12; no random price does better",
        judge=lambda m: [
            *(m["iteration difference"][name] < 1e-12 for name in m["iteration difference"]),
            *(m["duality gap"][name] < 1e-12 for name in m["duality gap"]),
            *(excess <= 1e-12 for excess in m["best random price beyond it"].values()),
        ],
    ),
    Claim(
        id="C3",
        statement="At equal balance, phi-balancing costs less quality than the Switch loss.",
        reported="better quality than Switch-style losses, most so for small batches; no numbers at this scale",
        criterion=f"cluster regression, batch 8, {len(STRENGTHS['phi'])} strengths each: for each strength of Switch "
        f"whose MaxVio lies within {MATCHED:.0%} of that of a strength of phi (the nearest), mean MSE of phi at least "
        f"{BETTER:.0%} lower; one part for each such pair",
        judge=_judge_front,
    ),
    Claim(
        id="C4",
        statement="phi-balancing uses experts more evenly, and more stably, than the loss-free bias.",
        reported="more stable and effective utilisation than loss-free balancing; no numbers at this scale",
        criterion="cluster regression, batch 8 and 32, the strength with the lowest mean MaxVio of each method: phi's "
        "mean is at most that of the loss-free bias, and so is its standard deviation over seeds",
        judge=_judge_loss_free,
    ),
    Claim(
        id="C5",
        statement="The overhead is negligible.",
        reported="one vector of state per layer and one dot product",
        criterion="8192 tokens, 64 experts: the extra time of router and loss, forward and backward, is below 5 % of "
        "that of the whole layer (width 256, experts of 256 neurons, k = 2)",
        judge=lambda m: m["extra share"] < 0.05,
    ),
    Claim(
        id="C6",
        statement="In a language model at equal tuning, phi-balancing ends at a lower loss than the Switch loss and "
        "the loss-free bias, with experts used as evenly.",
        reported="better downstream averages than both, at scales that are out of reach here",
        criterion=f"mixture-of-experts GPT on the embedded text, {len(TEXT_TRIALS['phi'])} trials for each method, the "
        f"one with the lowest validation loss among those with MaxVio up to {EVEN} (else that with the lowest MaxVio), "
        f"then at least 3 seeds: against each baseline, the mean loss is lower by more than the larger standard "
        f"deviation over seeds, and the mean MaxVio is at most {1 + MATCHED:g} times the baseline's",
        judge=_judge_text,
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _bias(run)
        case "C2":
            return _duality(run)
        case "C3":
            front = run.once("front", lambda: _front(run))
            return {"front": front, "matched with switch": {name: _matched(cells) for name, cells in front.items()}}
        case "C4":
            front = run.once("front", lambda: _front(run))
            return {"front": front, "most even": {name: _most_even(cells) for name, cells in front.items()}}
        case "C5":
            return _overhead(run)
        case "C6":
            return _language(run)
    raise ValueError(f"no claim {claim!r}")


def _bias(run: Run) -> dict[str, Any]:
    steps = run.pick(smoke=300, desktop=200_000)
    found: dict[str, Any] = {"squared norm": {}, "mini-batch pull": {}, "dual pull": {}, "ratio": {}}
    for size in BATCHES:
        coins = torch.randint(2, (steps, size), generator=run.generator(size)) * 2.0 - 1
        mean = coins.double().mean(-1)
        p = torch.stack([0.5 + SPREAD * mean, 0.5 - SPREAD * mean], dim=-1)
        found["squared norm"][f"B={size}"] = float(p.square().sum(-1).mean())
        plain = float((mean * (p[:, 0] - p[:, 1])).mean())  # d/ds of <p, q> at q = p
        found["mini-batch pull"][f"B={size}"] = plain
        for rate in RATES:
            run.say(f"C1: B = {size}, eta = {rate}")
            balancer = PhiBalancer(2, 1 - rate, "euclidean", coefficient=0.0).double()
            balancer.validate = False
            prices = torch.empty_like(p)
            for row, price in zip(p.unsqueeze(1), prices, strict=True):
                balancer(row)
                price.copy_(balancer.price())
            pull = float((mean * (prices[:, 0] - prices[:, 1])).mean())
            found["dual pull"][f"eta={rate}, B={size}"] = pull
            found["ratio"][f"eta={rate}, B={size}"] = pull / plain
    return found


def _duality(run: Run) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {
        "iteration difference": {},
        "duality gap": {},
        "best random price beyond it": {},
    }
    for name, mirror in {"neg_entropy": NegentropyMap(), "euclidean": EuclideanMap()}.items():
        difference, gap, beyond = 0.0, 0.0, -math.inf
        for seed in run.seeds(run.pick(smoke=3, desktop=200)):
            generator = run.generator(seed)
            m, p = torch.randn(2, 8, dtype=torch.float64, generator=generator).softmax(-1)
            rate = float(torch.rand((), generator=generator))
            balancer = PhiBalancer(8, 1 - rate, name).double()
            balancer.average.copy_(m)
            balancer.weight.fill_(1)
            balancer(p)
            q = mirror.to_dual(m)
            q = mirror.to_dual(mirror.to_primal(q) + (1 - balancer.momentum) * (p - mirror.to_primal(q)))
            difference = max(difference, float((q - balancer.price()).abs().max()))
            difference = max(difference, float((mirror.to_primal(q) - balancer.average).abs().max()))
            best = mirror.to_dual(p)
            value = mirror.potential(p)
            gap = max(gap, float(abs((p * best).sum() - mirror.conjugate(best) - value)))
            others = best + torch.randn(64, 8, dtype=torch.float64, generator=generator)
            beyond = max(beyond, float(((p * others).sum(-1) - mirror.conjugate(others) - value).max()))
        found["iteration difference"][name] = difference
        found["duality gap"][name] = gap
        found["best random price beyond it"][name] = beyond
    return found


class Clusters:
    """Sixteen Gaussian clusters of weight 1/rank, each with its own map to four outputs."""

    count, inputs, outputs = 16, 16, 4

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.centres = 2 * torch.randn(self.count, self.inputs, generator=generator)
        self.maps = torch.randn(self.count, self.outputs, self.inputs, generator=generator) / self.inputs**0.5
        self.offsets = torch.randn(self.count, self.outputs, generator=generator)

    def sample(self, size: int) -> tuple[Float[Tensor, "size inputs"], Float[Tensor, "size outputs"]]:
        """Points and their targets."""
        weights = 1 / torch.arange(1.0, self.count + 1)
        which = torch.multinomial(weights, size, replacement=True, generator=self.generator)
        x = self.centres[which] + torch.randn(size, self.inputs, generator=self.generator)
        return x, torch.tanh(torch.einsum("noi,ni->no", self.maps[which], x)) + self.offsets[which]


class Mixture(nn.Module):
    """Top-1 mixture of eight two-layer networks; the output is scaled by the probability of its expert."""

    def __init__(self, balancer: Balancer, generator: torch.Generator, experts: int = 8, hidden: int = 16) -> None:
        super().__init__()
        inputs, outputs = Clusters.inputs, Clusters.outputs
        self.router = Router(inputs, experts, 1, balancer=balancer, generator=generator)
        self.first = nn.Parameter(torch.randn(experts, inputs, hidden, generator=generator) / inputs**0.5)
        self.second = nn.Parameter(torch.randn(experts, hidden, outputs, generator=generator) / hidden**0.5)
        self.first_bias = nn.Parameter(torch.zeros(experts, 1, hidden))
        self.second_bias = nn.Parameter(torch.zeros(experts, 1, outputs))

    def forward(self, x: Float[Tensor, "size inputs"]) -> tuple[Float[Tensor, "size outputs"], Float[Tensor, ""]]:
        """The outputs and the router's loss. Every expert runs on every point, which is fast for so few."""
        chosen, weights, loss = self.router(x)
        hidden = torch.baddbmm(self.first_bias, x.expand(len(self.first), -1, -1), self.first).relu()
        y = torch.baddbmm(self.second_bias, hidden, self.second)
        return weights * y[chosen[:, 0], torch.arange(len(x))], loss


def _front(run: Run) -> dict[str, list[dict[str, Any]]]:
    """For both batch sizes, the mean test error and MaxVio of every method at every strength."""
    found = {}
    for size, count in run.pick(smoke={8: 1, 32: 1}, desktop={8: 4, 32: 3}).items():
        trials: list[tuple[str, float | None]] = [("none", None)]
        trials += [
            (name, strength) for name, many in STRENGTHS.items() for strength in many[: run.pick(smoke=1, desktop=9)]
        ]
        cells = []
        for name, strength in trials:
            ends = [_regress(run, seed, name, strength, size) for seed in run.seeds(count)]
            cell: dict[str, Any] = {"method": name, "strength": strength}
            for key in ends[0]:
                cell[key] = fmean(end[key] for end in ends)
                cell[f"{key} std"] = _spread([end[key] for end in ends])
            cells.append(cell)
            at = "" if strength is None else f" {strength:g}"
            run.say(f"C3: batch {size}, {name}{at}: MSE {cell['loss']:.4f}, MaxVio {cell['violation']:.3f}")
        found[f"batch {size}"] = cells
    return found


def _regress(run: Run, seed: int, name: str, strength: float | None, size: int) -> dict[str, float]:
    generator = run.generator(seed)
    clusters = Clusters(generator)
    model = Mixture(make_balancer(name, 8, strength), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = run.pick(smoke=10, desktop=1500)
    x, y = clusters.sample(steps * size)
    for inputs, targets in zip(x.split(size), y.split(size), strict=True):
        optimizer.zero_grad()
        outputs, loss = model(inputs)
        (mse_loss(outputs, targets) + loss).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        inputs, targets = clusters.sample(8192)
        error = mse_loss(model(inputs)[0], targets)
    hard, soft = (float(max_violation(load)) for load in (model.router.load, model.router.soft_load))
    return {"loss": float(error), "violation": hard, "soft violation": soft}


def _of(cells: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell["method"] == name]


def _matched(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each strength of Switch beside the strength of phi with the nearest MaxVio."""
    pairs = []
    for switch in _of(cells, "switch"):
        phi = min(_of(cells, "phi"), key=lambda cell: abs(cell["violation"] - switch["violation"]))
        pairs.append(
            {
                "switch": switch["strength"],
                "phi": phi["strength"],
                "violation ratio": phi["violation"] / switch["violation"],
                "loss ratio": phi["loss"] / switch["loss"],
                "matched": _near(phi["violation"], switch["violation"], MATCHED),
            }
        )
    return pairs


def _most_even(cells: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: min(_of(cells, name), key=lambda cell: cell["violation"]) for name in ("phi", "loss_free", "switch")}


def _overhead(run: Run) -> dict[str, Any]:
    tokens, repeats = run.pick(smoke=(128, 1), desktop=(8192, 25))
    generator = run.generator(0)
    x = torch.randn(tokens, 256, generator=generator)
    routers = {
        name: Router(256, 64, 2, balancer=make_balancer(name, 64), generator=generator) for name in ("none", "phi")
    }
    layer = MoE(256, 256, 64, 2, generator=generator)

    def route(name: str) -> Callable[[], Tensor]:
        def work() -> Tensor:
            routing = routers[name](x)
            return routing.loss + routing.weights.square().mean()

        return work

    def whole() -> Tensor:
        y, loss = layer(x)
        return loss + y.square().mean()

    times: dict[str, list[float]] = {"router": [], "router with phi": [], "layer": []}
    for _ in range(repeats):  # in turn, so that a busy machine slows all of them
        for name, work in (("router", route("none")), ("router with phi", route("phi")), ("layer", whole)):
            start = time.perf_counter()
            work().backward()
            times[name].append(time.perf_counter() - start)
    middle = {name: median(seconds) for name, seconds in times.items()}
    return {"seconds": middle, "extra share": (middle["router with phi"] - middle["router"]) / middle["layer"]}


def _language(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"trials": {}, "chosen": {}, "final": {}}
    for name, many in TEXT_TRIALS.items():
        trials = []
        for rate, strength in many[: run.pick(smoke=1, desktop=9)]:
            end = _train(run, 100, name, rate, strength)
            trials.append({"learning rate": rate, "strength": strength, **end})
            run.say(f"C6: {name} {strength}, learning rate {rate:g}: {end['loss']:.4f}, MaxVio {end['violation']:.3f}")
        found["trials"][name] = trials
        even = [trial for trial in trials if trial["violation"] <= EVEN or name == "none"]
        best = min(even, key=lambda t: t["loss"]) if even else min(trials, key=lambda t: t["violation"])
        found["chosen"][name] = {key: best[key] for key in ("learning rate", "strength")}
        ends = [
            _train(run, seed, name, best["learning rate"], best["strength"])
            for seed in run.seeds(run.pick(smoke=1, desktop=4))
        ]
        found["final"][name] = {key: [end[key] for end in ends] for key in ends[0]}
        run.say(f"C6: {name}: loss {fmean(found['final'][name]['loss']):.4f} at {found['chosen'][name]}")
    return found


def _train(run: Run, seed: int, name: str, rate: float, strength: float | None) -> dict[str, float]:
    """Train the GPT of the race's task `text-moe` with AdamW, warm-up and linear decay."""
    corpus = text("bpe", vocab_size=1024)
    width, steps = run.pick(smoke=(16, 3), desktop=(128, 200))
    batch, context, windows = run.pick(smoke=(2, 16, 1), desktop=(8, 64, 16))
    generator = run.generator(seed)
    config = GPTConfig(corpus.vocab_size, context, 2, 4, width, experts=4, balance=name, balance_strength=strength)
    model = GPT(config, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    warmup = max(1, round(0.05 * steps))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    batches = iter(corpus.batches("train", batch, context, generator))
    for _ in range(steps):
        optimizer.zero_grad()
        model(*next(batches)).backward()
        optimizer.step()
        decay.step()
    model.eval()
    losses, hard, soft = [], [], []
    with torch.no_grad():
        for x, y in corpus.batches("val", batch, context, max_batches=windows):
            losses.append(float(model(x, y)))
            hard.append(model.expert_load())
            soft.append(model.expert_load(soft=True))
    measures = load_metrics(torch.stack(hard).mean(0))
    return {
        "loss": fmean(losses),
        "violation": measures["max_violation"],
        "soft violation": load_metrics(torch.stack(soft).mean(0))["max_violation"],
        "dead experts": measures["dead_experts"],
    }


def _near(value: float, wanted: float, share: float) -> bool:
    return abs(value - wanted) <= share * abs(wanted)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
