"""Which minima SGD can stay at: linear stability bounds the trace of the Hessian, and with it norms that generalise.

At a minimum that fits all examples, stability of SGD bounds the trace of the Hessian by 2 / lr, that of GD only its
largest eigenvalue. In diagonal linear networks the trace is the l1 norm of the predictor, in two-layer ReLU networks
the path norm. This study checks the theory on random problems, and what SGD and GD reach on both networks.

The reported numbers come from other random data of the same distributions; the set-ups are those of the public
reproduction of the paper.

Source: Wu and Su 2023, arXiv 2305.17490 (ICML 2023).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.dynamics.diagonal_linear import DiagonalLinearNet
from steepest.dynamics.linear_stability import LinearStability
from steepest.dynamics.regression_paths import Net, RegressionSGD
from steepest.dynamics.two_layer_relu import TwoLayerReLU
from steepest.studies._base import Claim, Run

COMPONENTS = (
    "steepest.dynamics.LinearStability",
    "steepest.dynamics.mean_square_threshold",
    "steepest.dynamics.stability_report",
    "steepest.dynamics.trace_stability",
    "steepest.dynamics.SecondMoment",
    "steepest.dynamics.LinearisedSGD",
    "steepest.dynamics.DiagonalLinearNet",
    "steepest.dynamics.TwoLayerReLU",
    "steepest.dynamics.RegressionSGD",
)

DTYPE = torch.float64
EPSILON = 1e-9
SECOND_MOMENT = 1 / 3
DIAGONAL = {"SGD": (0.003, 0.01, 0.03, 0.06, 0.1), "GD": (0.003, 0.01, 0.03, 0.06, 0.2, 0.8)}
RELU = {"SGD": (3e-4, 1e-3, 3e-3), "GD": (1e-3, 3e-3, 1e-2)}
SGD_CLAIMED = ("0.003", "0.01", "0.03", "0.06")
GD_CLAIMED = ("0.003", "0.01", "0.03", "0.06", "0.2")
STARTS = (1.0, 2.0, 4.0, 8.0, 16.0)


def _each(table: Mapping[str, list[float]], names: tuple[str, ...]) -> list[list[float]]:
    """One row for each seed, with an entry for each learning rate."""
    return [list(row) for row in zip(*(table[name] for name in names), strict=True)]


def _spread(rows: list[list[float]]) -> list[float]:
    return [max(row) / min(row) - 1 for row in rows]


CLAIMS = (
    Claim(
        id="C1",
        statement="A minimum at which SGD with single examples is linearly stable has a trace of at most 2 / lr.",
        reported="proved in the paper; with larger batches a corrected form holds (derived)",
        criterion="300 random Jacobians, all batch sizes, both ways of sampling: no violation of exact threshold <= "
        "trace bound for the batch size, <= 2 / trace for single examples, <= 2 / largest eigenvalue; "
        "orthogonal gradients of equal length attain 2 / trace (0.5, and 2.0 for GD)",
        judge=lambda m: [
            all(count == 0 for count in m["violations"].values()),
            abs(m["orthogonal, SGD"] - 0.5) <= EPSILON and abs(m["orthogonal, GD"] - 2.0) <= EPSILON,
        ],
    ),
    Claim(
        id="C2",
        statement="Stability of GD is too weak to select the sparse solution, that of SGD is not.",
        reported="derived: trace 1.97, 1.93, 2.01 of the sparse target against 14.2, 14.1, 13.6 of the least l2 norm; "
        "largest eigenvalue .725, .727, .732 against .313, .316, .264; exact thresholds .794, .789, .786 against "
        ".1395, .1409, .1465; test error 0 against .69",
        criterion="diagonal network, balanced representations, each of 3 seeds: the trace is smaller for the target, "
        "the largest eigenvalue larger; at lr 0.5 SGD admits the target and rejects the solution of least l2 norm, GD "
        "admits both; test error below 1e-12 against above 0.5",
        judge=lambda m: [
            all(a < b for a, b in zip(m["target"]["trace"], m["least l2"]["trace"], strict=True)),
            all(a > b for a, b in zip(m["target"]["largest"], m["least l2"]["largest"], strict=True)),
            all(lr >= 0.5 for lr in m["target"]["SGD threshold"]),
            all(lr < 0.5 for lr in m["least l2"]["SGD threshold"]),
            all(lr >= 0.5 for kind in ("target", "least l2") for lr in m[kind]["GD threshold"]),
            max(m["target"]["test"]) < 1e-12 and min(m["least l2"]["test"]) > 0.5,
        ],
    ),
    Claim(
        id="C3",
        statement="The trace that SGD reaches follows 2 / lr; what GD reaches does not depend on lr.",
        reported="SGD 548 of 667, 173 of 200, 24.7 of 66.7, 2.9 of 33; GD 565 to 549",
        criterion="diagonal network, each of 3 seeds: trace of SGD at most 2 / lr for lr .003, .01, .03, .06, and at "
        "least 0.7 of it for .003 and .01; trace of GD varies by less than 5 % over lr .003 to .2",
        judge=lambda m: [
            all(share <= 1 for name in SGD_CLAIMED for share in m["SGD trace over 2 / lr"][name]),
            all(share >= 0.7 for name in SGD_CLAIMED[:2] for share in m["SGD trace over 2 / lr"][name]),
            max(_spread(_each(m["GD"]["trace"], GD_CLAIMED))) < 0.05,
        ],
    ),
    Claim(
        id="C4",
        statement="A larger lr makes SGD generalise better, but not GD.",
        reported="test error of SGD .0012, .0018, .0012 at lr .06, and 11.9, 12.1, 12.3 at .01; of GD 112 to 118",
        criterion="same runs, test error E (f - f*)^2, each of 3 seeds: SGD at .06 at least 100 times below SGD at "
        ".01; GD from .003 to .2 within 10 % of each other",
        judge=lambda m: [
            all(100 * a <= b for a, b in zip(m["SGD"]["0.06"], m["SGD"]["0.01"], strict=True)),
            max(_spread(_each(m["GD"], GD_CLAIMED))) <= 0.1,
        ],
    ),
    Claim(
        id="C5",
        statement="SGD balances the two layers, GD does not.",
        reported="balance of SGD 1.13, 1.21, 1.11 at lr .06 and 1.002 at .1; of GD 2.02",
        criterion="same runs, (|a|^2 + |b|^2) / (2 |a b|_1), each of 3 seeds: SGD at .06 at most 1.3; GD from .003 to "
        ".2 within 2 % of its initialisation",
        judge=lambda m: [
            max(m["SGD"]["0.06"]) <= 1.3,
            all(
                abs(end / start - 1) <= 0.02
                for name in GD_CLAIMED
                for end, start in zip(m["GD"][name], m["start"], strict=True)
            ),
        ],
    ),
    Claim(
        id="C6",
        statement="In a two-layer ReLU network the trace that SGD reaches follows 2 / lr, and path norm and test error "
        "fall with it; GD shows none of this.",
        reported="SGD 4765 of 6667, 1710 of 2000, 538 of 667; path norm 226, 125, 34; relative test error 27, 8.7, "
        ".99; GD: path norm 229 to 227, test error 28",
        criterion="each of 3 seeds: trace of SGD between .7 and 1.0 of 2 / lr for lr 3e-4, 1e-3, 3e-3; path norm and "
        "test error (over the variance of f*) of SGD fall from each lr to the next; "
        "those of GD (lr 1e-3, 3e-3, 1e-2) within 5 % of each other",
        judge=lambda m: [
            all(0.7 <= share <= 1.0 for shares in m["SGD trace over 2 / lr"].values() for share in shares),
            *(
                all(row[0] > row[1] > row[2] for row in _each(m["SGD"][what], tuple(m["SGD"][what])))
                for what in ("path norm", "test")
            ),
            *(max(_spread(_each(m["GD"][what], tuple(m["GD"][what])))) <= 0.05 for what in ("path norm", "test")),
        ],
    ),
    Claim(
        id="C7",
        statement="The trace of a two-layer ReLU network is half of |W|^2 + d |a|^2, and at least the path norm times "
        "sqrt(d).",
        reported="exact for inputs uniform on the sphere; 2 to 8 % off with 300 of them",
        criterion="trained and random networks: the trace on 300 inputs differs from the formula by at most 10 % of "
        "it, and is at least .9 sqrt(d) times the path norm",
        judge=lambda m: [
            max(max(errors) for errors in m["error"].values()) <= 0.1,
            min(min(ratios) for ratios in m["trace over least"].values()) >= 0.9,
        ],
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _random_jacobians(run)
        case "C2":
            return _solutions(run)
        case "C3":
            found = run.once("diagonal", lambda: _diagonal(run))
            shares = {
                name: [value * float(name) / 2 for value in values] for name, values in found["SGD"]["trace"].items()
            }
            what = ("trace", "frobenius", "largest", "loss")
            return {
                "SGD trace over 2 / lr": shares,
                "SGD threshold over lr": {
                    name: [value / float(name) for value in values]
                    for name, values in found["SGD"]["threshold"].items()
                },
                **{name: {each: found[name][each] for each in what} for name in DIAGONAL},
            }
        case "C4":
            found = run.once("diagonal", lambda: _diagonal(run))
            return {name: found[name]["test"] for name in DIAGONAL}
        case "C5":
            found = run.once("diagonal", lambda: _diagonal(run))
            return {
                **{name: found[name]["balance"] for name in DIAGONAL},
                "start": found["start balance"],
                "GD, spread over lr": _spread(_each(found["GD"]["balance"], GD_CLAIMED)),
                "SGD at 0.05 from balance": run.once("balance", lambda: _from_balance(run)),
            }
        case "C6":
            found = run.once("relu", lambda: _relu(run))
            return {
                "SGD trace over 2 / lr": {
                    name: [value * float(name) / 2 for value in values]
                    for name, values in found["SGD"]["trace"].items()
                },
                **{name: found[name] for name in RELU},
            }
        case "C7":
            found = run.once("relu", lambda: _relu(run))
            names = {f"{kind} {lr}": found[kind] for kind in RELU for lr in found[kind]["trace"]}
            return {
                what: {"random": found["random"][what]}
                | {name: values[what][name.split()[1]] for name, values in names.items()}
                for what in ("error", "trace over least")
            }
    raise ValueError(f"no claim {claim!r}")


def _random_jacobians(run: Run) -> dict[str, Any]:
    generator = run.generator(0)
    bounds = ("trace bound", "2 / trace", "2 / largest", "sufficient")
    violations: dict[str, int] = dict.fromkeys(bounds, 0)
    nearest: dict[str, float] = dict.fromkeys(bounds, math.inf)
    cases = 0
    for _ in range(run.pick(smoke=20, desktop=300)):
        n = int(torch.randint(2, 7, (), generator=generator))
        d = int(torch.randint(1, 6, (), generator=generator))
        scales = torch.randn(n, 1, generator=generator, dtype=DTYPE).exp()
        point = LinearStability(scales * torch.randn(n, d, generator=generator, dtype=DTYPE))
        for batch_size in range(1, n + 1):
            for replacement in (True, False):
                exact = point.threshold(batch_size, replacement, method="kron")
                ratios = {
                    "trace bound": point.trace_bound(batch_size, replacement) / exact,
                    "2 / largest": 2 / point.largest / exact,
                    "sufficient": exact / point.sufficient(batch_size, replacement),
                }
                if batch_size == 1:
                    ratios["2 / trace"] = 2 / point.trace / exact
                for name, ratio in ratios.items():
                    violations[name] += ratio < 1 - EPSILON
                    nearest[name] = min(nearest[name], ratio)
                cases += 1
    orthogonal = LinearStability(2 * torch.eye(4, dtype=DTYPE))
    return {
        "violations": violations,
        "least ratio": nearest,
        "cases": cases,
        "orthogonal, SGD": orthogonal.threshold(1),
        "orthogonal, GD": orthogonal.threshold(None),
    }


def diagonal_data(
    seed: int, samples: int = 300, features: int = 1000
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "d"], torch.Generator]:
    """Inputs uniform in [-1, 1], the sparse target (1, 1, 1, 0, ...), and the generator to go on with."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(samples, features, generator=generator, dtype=DTYPE) - 1
    beta = torch.zeros(features, dtype=DTYPE)
    beta[:3] = 1
    return x, beta, generator


def relu_data(
    seed: int, samples: int = 300, features: int = 100, teachers: int = 10, tests: int = 10_000
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator]:
    """Inputs uniform on the sphere of radius sqrt(d) with targets sum_i relu(v_i x), then the same to test on."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, features, generator=generator, dtype=DTYPE), dim=-1)

    x, v, test = math.sqrt(features) * unit(samples), unit(teachers), math.sqrt(features) * unit(tests)
    return x, (x @ v.mT).relu().sum(-1), test, (test @ v.mT).relu().sum(-1), generator


def _sizes(run: Run) -> tuple[int, int]:
    return run.pick(smoke=(12, 40), desktop=(300, 1000))


def _test_error(net: DiagonalLinearNet, beta: Tensor) -> float:
    return float((net.beta.detach() - beta).square().sum()) * SECOND_MOMENT


def _solutions(run: Run) -> dict[str, Any]:
    names = ("trace", "largest", "SGD threshold", "GD threshold", "test")
    found: dict[str, Any] = {kind: {name: [] for name in names} for kind in ("target", "least l2")}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        x, beta, _ = diagonal_data(seed, *_sizes(run))
        for kind, solution in (("target", beta), ("least l2", torch.linalg.pinv(x) @ (x @ beta))):
            net = DiagonalLinearNet.balanced(solution)
            point = LinearStability(net.jacobian(x))
            values = (point.trace, point.largest, point.threshold(1), point.threshold(None), _test_error(net, beta))
            for name, value in zip(names, values, strict=True):
                found[kind][name].append(value)
    return found


def _descend(run: Run, label: str, descent: RegressionSGD) -> list[Net]:
    """To a train loss of 1e-9, or to the cap."""
    steps = run.pick(smoke=100, desktop=80_000)
    for step in range(steps):
        descent.step()
        if step % 200 == 199 and not descent.retire():
            break
    run.say(f"{label}: {descent.steps} steps, train loss {float(descent.loss().max()):.3g} at most")
    return descent.models()


def _sharpness(net: Net, x: Tensor, y: Tensor, threshold: bool) -> dict[str, float]:
    gram, loss = net.gram(x), float((net(x).detach() - y).square().mean()) / 2
    names = ("trace", "frobenius", "largest", *(["threshold"] if threshold else []))
    if not bool(gram.isfinite().all()):
        return {**dict.fromkeys(names, math.inf), "loss": loss}
    point = LinearStability.of_gram(gram)
    values = (point.trace, point.frobenius, point.largest, *([point.threshold(1)] if threshold else []))
    return {**dict(zip(names, values, strict=True)), "loss": loss}


def _diagonal(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"SGD": {}, "GD": {}, "start balance": []}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        x, beta, generator = diagonal_data(seed, *_sizes(run))
        y, start = x @ beta, DiagonalLinearNet(x.shape[1], generator=generator, dtype=DTYPE)
        found["start balance"].append(start.balance())
        for kind, rates in DIAGONAL.items():
            batch = 1 if kind == "SGD" else None
            descent = RegressionSGD(start, x, y, rates, seeds=seed, batch_size=batch, clip=50.0)
            for lr, net in zip(rates, _descend(run, f"diagonal, {kind}, seed {seed}", descent), strict=True):
                assert isinstance(net, DiagonalLinearNet)
                values = _sharpness(net, x, y, kind == "SGD")
                values |= {"balance": net.balance(), "path norm": net.path_norm(), "test": _test_error(net, beta)}
                _note(found[kind], lr, values)
    return found


def _from_balance(run: Run) -> dict[str, list[float]]:
    """The balance that SGD ends with, for starts of several balances; entries of a with variance 0.1."""
    found: dict[str, list[float]] = {}
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        x, beta, generator = diagonal_data(seed, *_sizes(run))
        starts = [
            DiagonalLinearNet.unbalanced(x.shape[1], balance, generator=generator, dtype=DTYPE) for balance in STARTS
        ]
        descent = RegressionSGD(starts, x, x @ beta, 0.05, seeds=seed, clip=50.0)
        for balance, net in zip(STARTS, _descend(run, f"from balance, seed {seed}", descent), strict=True):
            found.setdefault(f"{balance:g}", []).append(net.balance())
    return found


def _relu(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"SGD": {}, "GD": {}, "random": {"error": [], "trace over least": []}}
    sizes = run.pick(smoke=(20, 8, 3, 100), desktop=(300, 100, 10, 10_000))
    for seed in run.seeds(run.pick(smoke=1, desktop=3)):
        x, y, test_x, test_y, generator = relu_data(seed, *sizes)
        features = x.shape[1]
        start = TwoLayerReLU(features, features, generator=generator, dtype=DTYPE)

        def equivalence(net: TwoLayerReLU, trace: float) -> dict[str, float]:
            least = math.sqrt(net.weight.shape[1]) * net.path_norm()
            return {"error": abs(net.population_trace() / trace - 1), "trace over least": trace / least}

        for name, value in equivalence(start, LinearStability.of_gram(start.gram(x)).trace).items():
            found["random"][name].append(value)
        for kind, rates in RELU.items():
            batch = 1 if kind == "SGD" else None
            descent = RegressionSGD(start, x, y, rates, seeds=seed, batch_size=batch, clip=100.0)
            for lr, net in zip(rates, _descend(run, f"ReLU, {kind}, seed {seed}", descent), strict=True):
                assert isinstance(net, TwoLayerReLU)
                values = _sharpness(net, x, y, False)
                error = (net(test_x).detach() - test_y).square().mean() / test_y.var()
                values |= {"path norm": net.path_norm(), "test": float(error), "balance": net.balance()}
                _note(found[kind], lr, values | equivalence(net, values["trace"]))
    return found


def _note(table: dict[str, Any], lr: float, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        table.setdefault(name, {}).setdefault(f"{lr:g}", []).append(value)
