"""What the study `discretisation_drift` measures of games and of smoothness: its claims C3, C6, C7 and C8.

`GAME_CLAIMS` are these claims, with their judges, for the study's `CLAIMS`; `measure_games(claim, run)` gives the
numbers of one of them. In the study: ``CLAIMS = (..., *GAME_CLAIMS)``, and in its `measure`, for the ids of
`GAME_CLAIMS`, ``return measure_games(claim, run)``. `GAME_COMPONENTS` belongs into `COMPONENTS`.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from steepest.data import digits
from steepest.dynamics.complexity import geometric_complexity
from steepest.dynamics.game_flow import game_order
from steepest.dynamics.games import TwoPlayer
from steepest.models import MLP
from steepest.optim.games import GameOptimizer
from steepest.studies._base import Claim, Run
from steepest.studies._catch import Mode
from steepest.studies._catch import train as catch

GAME_COMPONENTS = (
    "steepest.dynamics.TwoPlayer",
    "steepest.dynamics.GameFlow",
    "steepest.optim.GameOptimizer",
    "steepest.nn.spectral_norm",
    "steepest.dynamics.geometric_complexity",
)


def gain(share: Mapping[str, float], mode: str) -> float:
    """What a mode catches more than the plain network."""
    return share[mode] - share["none"]


def _recovered(share: Mapping[str, float]) -> float:
    return gain(share, "divout") / gain(share, "sn") if gain(share, "sn") > 0 else -math.inf


GAME_CLAIMS = (
    Claim(
        id="C3",
        statement="Two players' steps follow the flow of the drifted gradients with these coefficients, and not "
        "without the interaction term.",
        reported="Theorems for simultaneous and alternating steps; the flow on one clock: ours",
        criterion="random smooth general-sum games (3 seeds), a and b differ, alternating with 2 and 3 inner steps: "
        "order of the local error at least 2.8 for both schemes and both conventions, each with its own reading, "
        "at most 2.2 without the interaction term",
        judge=lambda m: [
            all(order >= 2.8 for orders in m["all"].values() for order in orders),
            all(order <= 2.2 for orders in m["self"].values() for order in orders),
        ],
    ),
    Claim(
        id="C6",
        statement="Cancelling the interaction drift stabilises simultaneous play; a stronger term makes it converge.",
        reported="DiracGAN: the plain steps spiral outwards, the cancelled ones stay on the circle of the flow",
        criterion="DiracGAN from (1, 1), lr 0.1, 1000 steps: radius above 2.5 plain, within 1% of the root of 2 with "
        "the drift cancelled (c = lr / 4), below 1e-5 with c = lr / 4 + 0.3",
        judge=lambda m: [
            m["plain"] > 2.5,
            abs(m["cancelled"] / math.sqrt(2) - 1) <= 0.01,
            m["stronger"] < 1e-5,
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C7",
        statement="Spectral normalisation of one layer widens the range of Adam's learning rates; dividing the output "
        "by the norm does the same, dividing the gradients in part.",
        reported="the schedulers recover most of the gain of spectral normalisation in deep RL",
        criterion="DQN on 10x5 Catch, MLP 50-64-64-3, last layer but one, 16 boards, 2000 steps, 5 rates 3e-4 .. 3e-2, "
        "6 seeds; share of balls caught in the last quarter, mean over all: normalisation gains at least 0.04, and "
        "dividing the output recovers at least 60% of that. Once with a target network (copied every 100 steps), "
        "and once without, as the source of the criterion does not say which",
        judge=lambda m: [
            part
            for share in m["share caught"].values()
            for part in (gain(share, "sn") >= 0.04, _recovered(share) >= 0.6)
        ],
        scales=("desktop", "gpu"),
    ),
    Claim(
        id="C8",
        statement="Larger steps find networks of lower geometric complexity at the same training loss.",
        reported="the larger the step, the stronger the implicit regularisation, which bounds the geometric complexity",
        criterion="500 digits, MLP 64-100-100-10, SGD with batches of 16, stopped at the first epoch with training "
        "loss at most 0.02: complexity of the logits strictly decreasing over lr 0.02, 0.1, 0.4 on each of 3 seeds",
        judge=lambda m: [
            row["0.02"]["complexity"] > row["0.1"]["complexity"] > row["0.4"]["complexity"] for row in m["seeds"]
        ],
        scales=("desktop", "gpu"),
    ),
)


def measure_games(claim: str, run: Run) -> Mapping[str, Any]:
    """The numbers for one of `GAME_CLAIMS`."""
    match claim:
        case "C3":
            return measured_orders(run)
        case "C6":
            return {name: dirac_radius(multiplier, 1000) for name, multiplier in DIRAC.items()}
        case "C7":
            return catching(run)
        case "C8":
            return {"seeds": [complexities(run, seed) for seed in run.seeds(3)]}
    raise ValueError(f"no claim {claim!r} among those of games")


SETTINGS = {
    "simultaneous, paper": ("simultaneous", (1, 1), "paper"),
    "simultaneous, single clock": ("simultaneous", (1, 1), "single_clock"),
    "alternating, paper": ("alternating", (2, 3), "paper"),
    "alternating, single clock": ("alternating", (2, 3), "single_clock"),
}


def random_game(generator: torch.Generator) -> TwoPlayer:
    """A smooth general-sum game of a player with 3 and one with 4 parameters, float64."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mix, own1, own2 = draw(3, 4), draw(3, 3), draw(4, 4)

    def first(x: Tensor, y: Tensor) -> Tensor:
        return torch.sin(x @ mix) @ y + torch.tanh(own1 @ x).square().sum() + 0.3 * torch.sin(x.sum() * y).sum()

    def second(x: Tensor, y: Tensor) -> Tensor:
        return torch.cos(own2 @ y).sum() + 0.5 * x @ mix @ torch.tanh(y) + y.square().sum() * torch.cos(x).sum()

    return TwoPlayer(first, second, draw(3), draw(4))


def measured_orders(run: Run) -> dict[str, Any]:
    """Fitted orders of the local error, all terms and without the interaction, for each setting and seed."""
    games = [random_game(run.generator(seed)) for seed in run.seeds(run.pick(smoke=1, desktop=3))]
    orders: dict[str, Any] = {}
    for terms in ("all", "self"):
        orders[terms] = {
            name: [game_order(game, (0.016, 0.01), *setting, terms=terms)[0] for game in games]  # pyright: ignore[reportArgumentType]
            for name, setting in SETTINGS.items()
        }
    return orders


# With lr 0.1 the interaction drift has the coefficient lr / 4; a multiplier of -13 gives lr / 4 + 0.3.
DIRAC = {"plain": 0.0, "cancelled": -1.0, "stronger": -13.0}


def dirac_radius(multiplier: float, steps: int, lr: float = 0.1) -> float:
    """Distance from the equilibrium after simultaneous steps of the DiracGAN from (1, 1).

    The discriminator φ ascends, and the generator θ descends, `softplus(θ φ)`.
    """
    phi, theta = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    optimizer = GameOptimizer([phi], [theta], lr, cancel="none", multipliers={"interaction": multiplier})

    def losses() -> tuple[Tensor, Tensor]:
        value = softplus(theta * phi)
        return -value, value

    for _ in range(steps):
        optimizer.step(losses)
    return float(torch.hypot(phi.detach(), theta.detach()))


def complexities(run: Run, seed: int, enough: float = 0.02) -> dict[str, dict[str, float]]:
    """Geometric complexity, epochs and training loss of the digits' network for each learning rate."""
    data = digits(flat=True)
    x, y = data.train_x[:500], data.train_y[:500]
    found = {}
    for lr in (0.02, 0.1, 0.4):
        generator = run.generator(seed)
        model = MLP([64, 100, 100, 10], generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr)
        loss, epochs = math.inf, 0
        while loss > enough and epochs < 500:
            for batch in torch.randperm(len(y), generator=generator).split(16):
                optimizer.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            epochs += 1
            with torch.no_grad():
                loss = float(cross_entropy(model(x), y))
        with torch.no_grad():
            found[f"{lr:g}"] = {"complexity": float(geometric_complexity(model, x)), "loss": loss, "epochs": epochs}
        run.say(f"seed {seed}, lr {lr:g}: {epochs} epochs")
    return found


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TARGETS = {"target network": 100, "no target network": 1}
MODES: tuple[Mode, ...] = ("none", "sn", "divout", "divgrad", "muleps")


def catching(run: Run) -> dict[str, Any]:
    """The share of balls caught for each mode, over all rates and seeds, and for each of them."""
    seeds = run.seeds(6)
    tables: dict[str, dict[str, list[list[float]]]] = {}
    for name, every in TARGETS.items():
        tables[name] = {}
        for mode in MODES:
            run.say(f"Catch, {name}, {mode}")
            generators = [run.generator(seed) for seed in seeds]
            tables[name][mode] = catch(mode, RATES, generators, target_every=every)["during"]
    means = {
        name: {mode: fmean(share for row in rows for share in row) for mode, rows in table.items()}
        for name, table in tables.items()
    }
    return {"share caught": means, "rates": list(RATES), "by rate and seed": tables}
