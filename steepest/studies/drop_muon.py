"""Drop-Muon: moving a random suffix of the layers at each step.

The theory is checked on quadratics, where the expectation over the suffix can be taken exactly, and the cost model
against random competitors. The practice is one network trained on digits to 99 % training accuracy, its cost counted
in floating-point operations (the clock is reported beside it), the learning rate of each method tuned on one grid.

Source: Gruntkowska, Maziane, Qu and Richtarik 2025, arXiv 2510.02239.
"""

import math
import time
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest.geometry import Spectral
from steepest.models import MLP
from steepest.optim import DropMuon, Full, Sharp, SuffixSampler, Uniform
from steepest.optim.layer_sampling import guaranteed_cost, optimal_update_probabilities, start_probabilities
from steepest.studies._base import Claim, Run
from steepest.studies._drop_muon_training import (
    fewest_seeds,
    flops_ratio,
    mean_steps,
    selected,
    train_all,
)

COMPONENTS = (
    "steepest.optim.DropMuon",
    "steepest.optim.RandomLayers",
    "steepest.optim.Uniform",
    "steepest.optim.EpochShift",
    "steepest.optim.Optimal",
    "steepest.optim.layer_smoothness",
)

EXAMPLES = {"1 2 4 8": (31, 48, 36), "8 2 4 1": (48, 48, 144), "2 1 8 4": (36, 48, 48)}


CLAIMS = (
    Claim(
        id="C1",
        statement="With steps of 1/L_i along the sharp direction, a step lowers f on average by at least "
        "sum p_i |grad_i|*^2 / (2 L_i).",
        reported="a theorem; an identity on a separable quadratic, where full updates end in one step and "
        "sum |grad_i|^2 / L_i = 2 f_0",
        criterion="exact mean over the suffixes, along 20 steps of uniform sampling: the mean of f_{k+1} at most "
        "f_k - sum p_i |grad_i|*^2 / (2 L_i) + 1e-12 on a separable and a coupled quadratic with Euclidean norms and "
        "on one of matrices with spectral norms; equal within 1e-12 on the separable one; full updates there: the sum "
        "within 1e-12 (relative) of 2 f_0, and |x| <= 1e-12 after one step",
        judge=lambda m: [
            *(excess <= 1e-12 for problem in m["excess"].values() for excess in problem),
            *(abs(gap) <= 1e-12 for gap in m["separable gap"]),
            *(abs(ratio - 1) <= 1e-12 for ratio in m["sum over 2 f0"]),
            *(size <= 1e-12 for size in m["after one step"]),
        ],
    ),
    Claim(
        id="C2",
        statement="p_i = max_{j<=i} L_j / max_j L_j has the least guaranteed cost; full updates are optimal exactly "
        "when the first layer has the largest constant.",
        reported="; ".join(f"L = ({name}): optimal {a}, full {b}, uniform {c}" for name, (a, b, c) in EXAMPLES.items()),
        criterion="these numbers within 1e-9; for 100 random (L, c, c_f) not beaten by 10000 random monotone p "
        "(relative 1e-9), and equal to full exactly when L_1 is the largest",
        judge=lambda m: [
            *(
                abs(found - wanted) <= 1e-9
                for name, triple in EXAMPLES.items()
                for found, wanted in zip(m["examples"][name], triple, strict=True)
            ),
            m["best competitor"] >= 1 - 1e-9,
            m["full optimal without L_1 largest"] == 0 and m["L_1 largest without full optimal"] == 0,
        ],
    ),
    Claim(
        id="C3",
        statement="A random suffix reaches the same training accuracy at a lower cost than full updates.",
        reported="up to 1.4 times faster (wall-clock)",
        criterion="digits to 99 % training accuracy, best learning rate of each on one grid, at least 4 seeds: FLOPs "
        "of full updates over FLOPs of uniform suffixes at least 1.10 (supported), and at least 1.3 (reproduced)",
        judge=lambda m: [
            fewest_seeds(m) >= 4 and flops_ratio(m) >= 1.10,
            fewest_seeds(m) >= 4 and flops_ratio(m) >= 1.3,
        ],
    ),
    Claim(
        id="C4",
        statement="It needs more steps than full updates.",
        reported="a point of the reviewers; no number",
        criterion="mean number of steps at the best rate of each: uniform suffixes above full updates",
        judge=lambda m: mean_steps(m, "uniform") > mean_steps(m, "full"),
    ),
    Claim(
        id="C5",
        statement="The gain depends on the learning rate: far from the best one it vanishes or reverses.",
        reported="no number",
        criterion="at rates 0.05 and 0.2 FLOPs of full updates over FLOPs of uniform suffixes at most 1",
        judge=lambda m: [m["ratio"].get(rate, math.inf) <= 1 for rate in ("0.05", "0.2")],
    ),
    Claim(
        id="C6",
        statement="A fixed biased law of the starts hurts; one that shifts over the epochs does not.",
        reported="biased sampling is worse than uniform, epoch shift about equal or better",
        criterion="at rate 0.1, FLOPs relative to uniform suffixes: P ~ (4, 3, 2, 1) and P ~ (1, 2, 3, 4) at least "
        "1.15, epoch shift over 15 epochs at most 1.05",
        judge=lambda m: [
            m["relative to uniform"]["4 3 2 1"] >= 1.15,
            m["relative to uniform"]["1 2 3 4"] >= 1.15,
            m["relative to uniform"]["epoch shift"] <= 1.05,
        ],
    ),
    Claim(
        id="C7",
        statement="Layers that rest cost nothing: no gradient, no change of weights or momentum, no backward time.",
        reported="backpropagation stops at the first active layer",
        criterion="parameters whose gradient was computed are those of active layers, in every start; weights and "
        "momenta of the others bit-identical after the step; on an MLP of equal widths the backward pass of the last "
        "layer alone takes at most half the time of the full one (median)",
        judge=lambda m: [m["gradients only of active layers"], m["rest bit-identical"], m["backward time"] <= 0.5],
    ),
    Claim(
        id="C8",
        statement="Open in the paper: the test accuracy at equal cost.",
        reported="training accuracy only",
        criterion="no pass or fail: the test accuracy of both at the FLOPs that the cheaper one needed is reported, at "
        "the best rate of each, for at least 4 seeds",
        judge=lambda m: all(len(values) >= 4 for values in m["test accuracy"].values()),
    ),
)


def measure(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one claim."""
    match claim:
        case "C1":
            return _descent(run)
        case "C2":
            return _costs(run)
        case "C7":
            return _rest(run)
        case "C3" | "C4" | "C5" | "C6" | "C8":
            return selected(claim, run.once("training", lambda: train_all(run)))
    raise ValueError(f"no claim {claim!r}")


# C1


class Blocks(nn.Module):
    """f = 1/2 <x, A x> over all layers together; a layer is one parameter."""

    def __init__(self, parts: list[Tensor], a: Float[Tensor, "n n"]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Part(part) for part in parts)
        self.a = a

    def forward(self) -> Float[Tensor, ""]:
        x = torch.cat([layer().flatten() for layer in self.layers])
        return x @ self.a @ x / 2


class _Part(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(value.clone())

    def forward(self) -> Tensor:
        return self.x


def _problem(kind: str, generator: torch.Generator) -> tuple[Blocks, list[float]]:
    """A quadratic and its layer-wise constants: A <= blockdiag(L_i I), by diagonal dominance of the blocks."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "separable":
        constants = torch.rand(5, generator=generator, dtype=torch.float64) * 4 + 0.5
        return Blocks(list(randn(5, 1)), torch.diag(constants)), constants.tolist()
    shape = (3,) if kind == "coupled" else (3, 4)
    size, layers = math.prod(shape), 4
    root = randn(size * layers, size * layers)
    a = root @ root.mT / (size * layers)
    blocks = a.view(layers, size, layers, size).transpose(1, 2)
    constants = torch.linalg.matrix_norm(blocks, 2).sum(1)
    if len(shape) == 2:  # |D|_F^2 <= rank |D|^2
        constants = constants * min(shape)
    return Blocks(list(randn(layers, *shape)), a), constants.tolist()


def _descent(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"excess": {}, "separable gap": [], "sum over 2 f0": [], "after one step": []}
    steps, seeds = run.pick(smoke=(2, 1), desktop=(20, 5))
    for kind in ("separable", "coupled", "spectral"):
        found["excess"][kind] = []
        for seed in run.seeds(seeds):
            model, constants = _problem(kind, run.generator(seed))
            gaps = [_mean_decrease(model, constants, run.generator(seed)) for _ in range(steps)]
            found["excess"][kind].append(max(gaps))
            if kind == "separable":
                found["separable gap"].append(max(gaps, key=abs))
                ratio, size = _full(*_problem(kind, run.generator(seed)))
                found["sum over 2 f0"].append(ratio)
                found["after one step"].append(size)
    return found


def _optimizer(model: Blocks, constants: list[float], sampler: SuffixSampler) -> DropMuon:
    rates = [1 / constant for constant in constants]
    return DropMuon(
        model,
        rates,
        layers=list(model.layers),
        sampler=sampler,
        momentum=0.0,
        norm=Spectral(),
        step_rule=Sharp(),
        adjust_lr_fn="none",
    )


def _gradient_step(model: Blocks, optimizer: DropMuon) -> tuple[float, list[Tensor]]:
    optimizer.zero_grad()
    loss = model()
    loss.backward()
    gradients = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return float(loss.detach()), gradients


def _mean_decrease(model: Blocks, constants: list[float], generator: torch.Generator) -> float:
    """E f_{k+1} - f_k + sum p_i |grad_i|*^2 / (2 L_i) at the model's point, which then moves one step."""
    layers = len(constants)
    optimizer = _optimizer(model, constants, Uniform())
    start = [parameter.detach().clone() for parameter in model.parameters()]
    p, starts = (law(layers) for law in (Uniform().update_probabilities, Uniform().start_probabilities))
    mean, bound, before = 0.0, 0.0, 0.0
    chosen = int(torch.multinomial(starts, 1, generator=generator))
    ends: list[list[Tensor]] = []
    for s in range(layers):
        optimizer.draw(range(s, layers))
        before, gradients = _gradient_step(model, optimizer)
        with torch.no_grad():
            mean += float(starts[s]) * float(model())
            ends.append([parameter.detach().clone() for parameter in model.parameters()])
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        if s == 0:
            squares = [float(Spectral().dual(g if g.ndim > 1 else g[:, None])) ** 2 for g in gradients]
            bound = sum(float(p[i]) * squares[i] / (2 * constants[i]) for i in range(layers))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), ends[chosen], strict=True):
            parameter.copy_(value)
    return mean - before + bound


def _full(model: Blocks, constants: list[float]) -> tuple[float, float]:
    optimizer = _optimizer(model, constants, Full())
    total, initial = 0.0, 0.0
    size = math.inf
    for step in range(3):
        loss, gradients = _gradient_step(model, optimizer)
        total += sum(float(g.square().sum()) / constant for g, constant in zip(gradients, constants, strict=True))
        if step == 0:
            initial = loss
            size = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    return total / (2 * initial), size


# C2


def _costs(run: Run) -> dict[str, Any]:
    ones = torch.ones(4, dtype=torch.float64)
    examples = {}
    for name in EXAMPLES:
        constants = torch.tensor([float(part) for part in name.split()], dtype=torch.float64)
        laws = (optimal_update_probabilities(constants), ones, Uniform().update_probabilities(4))
        examples[name] = [float(guaranteed_cost(law, constants, ones, 2.0)) for law in laws]
    problems, competitors = run.pick(smoke=(10, 1000), desktop=(100, 10_000))
    generator = run.generator(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    closest, only_full, only_first = math.inf, 0, 0
    for index in range(problems):
        layers = 2 + index % 7
        constants, costs, forward = rand(layers) * 10 + 0.01, rand(layers) * 3, float(rand(1)) * 5
        if index % 3 == 0:  # else the first constant is seldom the largest
            constants[0] = constants.max() * 1.1
        best = optimal_update_probabilities(constants)
        assert float(start_probabilities(best).sum()) > 1 - 1e-12
        others = rand(competitors, layers).sort(dim=1).values
        others[: competitors // 2] = others[: competitors // 2] ** 0.1 * best  # near the optimum, too
        others = others.clamp_min(1e-9).cummax(1).values
        others[:, -1] = 1.0
        least = float(guaranteed_cost(best, constants, costs, forward))
        closest = min(closest, float(guaranteed_cost(others, constants, costs, forward).min()) / least)
        full = float(guaranteed_cost(torch.ones(layers), constants, costs, forward))
        is_optimal, is_first = full <= least * (1 + 1e-12), bool(constants[0] == constants.max())
        only_full += is_optimal and not is_first
        only_first += is_first and not is_optimal
    return {
        "examples": examples,
        "problems": problems,
        "best competitor": closest,
        "full optimal without L_1 largest": only_full,
        "L_1 largest without full optimal": only_first,
    }


# C7


def _rest(run: Run) -> dict[str, Any]:
    depth, width, rows, repeats = run.pick(smoke=(4, 32, 16, 5), desktop=(6, 384, 256, 15))
    model = MLP([width] * (depth + 1), bias=False, generator=run.generator(0))
    optimizer = DropMuon(model)
    x = torch.randn(rows, width, generator=run.generator(1))
    touched: set[int] = set()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda same: touched.add(id(same)))
    only_active, identical = True, True
    for start in [0, *range(depth)]:
        optimizer.draw(range(start, depth))
        resting = [p for layer in optimizer.layers[:start] for p in layer.parameters.values()]
        before = [(p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in resting]
        touched.clear()
        model(x).square().mean().backward()
        moving = {id(p) for layer in optimizer.layers[start:] for p in layer.parameters.values()}
        only_active &= touched == moving
        optimizer.step()
        for parameter, (weight, momentum) in zip(resting, before, strict=True):
            identical &= torch.equal(parameter, weight)
            identical &= torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum)
        optimizer.zero_grad()
    times: dict[int, list[float]] = {start: [] for start in range(depth)}
    for _ in range(repeats):
        for start, seen in times.items():
            optimizer.draw(range(start, depth))
            loss = model(x).square().mean()
            begin = time.perf_counter()
            loss.backward()
            seen.append(time.perf_counter() - begin)
            optimizer.zero_grad()
    medians = [median(seen) for seen in times.values()]
    return {
        "gradients only of active layers": only_active,
        "rest bit-identical": bool(identical),
        "seconds of the backward pass by start": medians,
        "backward time": medians[-1] / medians[0],
        "monotone": all(one >= two for one, two in pairwise(medians)),
    }
