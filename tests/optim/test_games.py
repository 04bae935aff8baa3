"""Optimizers of two-player games."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from steepest.loop import run
from steepest.optim.game_baselines import SGA, Consensus, RungeKutta
from steepest.optim.games import GameOptimizer, TwoPlayerOptimizer
from steepest.studies._drift_games import random_game

Make = Callable[..., TwoPlayerOptimizer]
MAKERS: dict[str, Make] = {
    "simultaneous": lambda f, s, lr=0.05, **o: GameOptimizer(f, s, lr, **o),
    "alternating": lambda f, s, lr=0.05, **o: GameOptimizer(
        f, s, lr, **{"scheme": "alternating", "inner": (2, 3), "cancel": "all", **o}
    ),
    "single clock": lambda f, s, lr=0.05, **o: GameOptimizer(f, s, lr, convention="single_clock", **o),
    "split": lambda f, s, lr=0.05, **o: GameOptimizer(f, s, lr, estimator="split", **o),
    "plain": lambda f, s, lr=0.05, **o: GameOptimizer(f, s, lr, cancel="none", **o),
    "sga": lambda f, s, lr=0.05, **o: SGA(f, s, lr, strength=0.1, align=True, **o),
    "consensus": lambda f, s, lr=0.05, **o: Consensus(f, s, lr, strength=0.1, **o),
    "rk2": lambda f, s, lr=0.05, **o: RungeKutta(f, s, lr, order=2, **o),
    "rk4": lambda f, s, lr=0.05, **o: RungeKutta(f, s, lr, order=4, **o),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def gan(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype),
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype),
    )


def batch(seed: int, size: int = 8, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "noise": torch.randn(size, 2, generator=generator, dtype=torch.float64).to(dtype),
        "real": torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype) + 1,
    }


def closure_of(generator: nn.Module, critic: nn.Module) -> Callable[[Any], tuple[Tensor, Tensor]]:
    def closure(data: Any) -> tuple[Tensor, Tensor]:
        fake = critic(generator(data["noise"]))
        return softplus(-fake).mean(), softplus(fake).mean() + softplus(-critic(data["real"])).mean()

    return closure


def values(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def train(optimizer: TwoPlayerOptimizer, closure: Any, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        optimizer.step(closure, batch(step))
        if scheduler is not None:
            scheduler.step()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def dirac(multiplier: float | None = None, make: Make | None = None, steps: int = 100) -> list[float]:
    phi, theta = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    if make is None:
        assert multiplier is not None
        optimizer: Any = GameOptimizer([phi], [theta], 0.1, cancel="none", multipliers={"interaction": multiplier})
    else:
        optimizer = make([phi], [theta], 0.1)
    radii = []
    for _ in range(steps):
        optimizer.step(lambda: (-softplus(theta * phi), softplus(theta * phi)))
        radii.append(math.hypot(phi.item(), theta.item()))
    return [radii[0], radii[9], radii[99]]


@pytest.mark.parametrize(
    ("multiplier", "radii"),
    [
        (0.0, [1.41798763, 1.44723960, 1.58697138]),
        (-1.0, [1.41320497, 1.40668207, 1.41138380]),
        (-13.0, [1.35582010, 1.04093600, 0.30179072]),
    ],
)
def test_dirac_gan(multiplier: float, radii: list[float]) -> None:
    assert dirac(multiplier) == pytest.approx(radii, abs=1e-8)


def test_cancelling_in_a_zero_sum_game_is_symplectic_adjustment() -> None:
    assert dirac(make=lambda f, s, lr: SGA(f, s, lr, strength=lr / 2)) == pytest.approx(dirac(-1.0), abs=1e-12)


def test_runge_kutta_stays_on_the_circle() -> None:
    gaps = [abs(dirac(make=lambda f, s, lr: RungeKutta(f, s, lr, order=o))[-1] - 2**0.5) for o in (2, 4)]  # noqa: B023
    assert gaps[1] < 1e-7 < gaps[0] < 1e-3


@pytest.mark.parametrize("order", [2, 4])
def test_runge_kutta_order(order: Any) -> None:
    from steepest.dynamics.game_flow import GameFlow

    game = random_game(torch.Generator().manual_seed(0))
    errors = []
    for scale in (1.0, 0.5):
        rates = (0.016 * scale, 0.01 * scale)
        target = GameFlow(game, rates, terms="none").integrate(1.0, 32)
        x, y = (nn.Parameter(t[0].clone()) for t in game.point)
        RungeKutta([x], [y], rates, order=order).step(lambda: game.evaluate((x,), (y,)))  # noqa: B023
        errors.append(float(torch.cat([x - target[0][0], y - target[1][0]]).detach().norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.3)


@pytest.mark.parametrize("convention", ["paper", "single_clock"])
@pytest.mark.parametrize("cancel", ["interaction", "self", "all", "none"])
@pytest.mark.parametrize(("scheme", "inner"), [("simultaneous", (1, 1)), ("alternating", (2, 3))])
def test_a_step_is_the_descent_on_the_drifted_gradients(scheme: Any, inner: Any, cancel: Any, convention: Any) -> None:
    from steepest.dynamics.games import TwoPlayer, drift_coefficients

    game, rates = random_game(torch.Generator().manual_seed(1)), (0.03, 0.02)
    c = drift_coefficients(rates, scheme, inner, convention)
    r_self = -1.0 if cancel in ("self", "all") else 0.0
    r_cross = -1.0 if cancel in ("interaction", "all") else 0.0
    point = [game.point[0][0], game.point[1][0]]

    def moved(player: int, at: list[Tensor], rate: float) -> Tensor:
        terms = TwoPlayer(*game.losses, *at).terms()
        slope = terms.gradients[player][0]
        slope = slope + r_self * c.self_[player] * terms.self_[player][0]
        return at[player] - rate * (slope + r_cross * c.interaction[player] * terms.interaction[player][0])

    if scheme == "simultaneous":
        point = [moved(0, point, rates[0]), moved(1, point, rates[1])]
    else:
        for player in (0, 1):
            for _ in range(inner[player]):
                point[player] = moved(player, point, rates[player] / inner[player])
    x, y = (nn.Parameter(t[0].clone()) for t in game.point)
    optimizer = GameOptimizer([x], [y], rates, scheme=scheme, inner=inner, cancel=cancel, convention=convention)
    losses = optimizer.step(lambda: game.evaluate((x,), (y,)))
    torch.testing.assert_close(x.detach(), point[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(y.detach(), point[1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(losses[0], game.terms().losses[0])
    assert [group["lr"] for group in optimizer.param_groups] == list(rates)


def test_full_cancellation_on_one_clock_follows_the_flow() -> None:
    """With all terms cancelled the step is of third order about the plain flow, for different rates, too."""
    from steepest.dynamics.game_flow import GameFlow

    game = random_game(torch.Generator().manual_seed(2))
    for scheme, inner in (("simultaneous", (1, 1)), ("alternating", (2, 3))):
        errors = []
        for scale in (1.0, 0.5):
            rates = (0.016 * scale, 0.01 * scale)
            target = GameFlow(game, rates, terms="none").integrate(1.0, 8)
            x, y = (nn.Parameter(t[0].clone()) for t in game.point)
            options: Any = {"scheme": scheme, "inner": inner, "convention": "single_clock", "cancel": "all"}
            GameOptimizer([x], [y], rates, **options).step(lambda: game.evaluate((x,), (y,)))  # noqa: B023
            errors.append(float(torch.cat([x - target[0][0], y - target[1][0]]).detach().norm()))
        assert math.log2(errors[0] / errors[1]) > 2.8


def test_split_takes_the_factors_from_different_halves() -> None:
    x, y = nn.Parameter(torch.tensor([0.5, -0.3]).double()), nn.Parameter(torch.tensor([0.2, 0.7]).double())
    data = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def losses(a: Tensor, b: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        score = torch.einsum("nij,i,j->n", part, a, b)
        return score.exp().mean(), (b.sum() + score.sin()).square().mean()

    g2_second = torch.func.grad(lambda b: losses(x, b, data[3:])[1])(y.detach())
    cross = torch.func.grad(lambda a: torch.func.grad(lambda b: losses(a, b, data[:3])[0])(y.detach()) @ g2_second)
    whole = torch.func.grad(lambda a: losses(a, y.detach(), data)[0])(x.detach())
    expected = x.detach() - 0.1 * (whole - 0.05 * cross(x.detach()))
    GameOptimizer([x], [y], 0.1, estimator="split").step(lambda part: losses(x, y, part), data)
    torch.testing.assert_close(x.detach(), expected.detach(), rtol=1e-12, atol=1e-14)


def test_split_is_unbiased_and_same_is_not() -> None:
    """E1 = s x y and E2 = s y with noise s: I1 = s * s', the second factor fixed; s and s' must be independent."""
    found = {}
    for estimator in ("same", "split"):
        total, draws = 0.0, 400
        for seed in range(draws):
            x, y = nn.Parameter(torch.ones(1).double()), nn.Parameter(torch.ones(1).double())
            noise = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            noise = torch.tensor([1.0, -1.0], dtype=torch.float64) if estimator == "none" else noise

            def closure(part: Tensor, x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
                return (part.mean() * x * y).sum(), (part.mean() * y).sum() + 0 * x.sum()

            options: Any = {"estimator": estimator, "multipliers": {"interaction": (-1, 0)}}
            GameOptimizer([x], [y], 0.1, **options).step(closure, noise)
            assert x.grad is not None
            total += float((x.grad - noise.mean()) / -0.05)
        found[estimator] = total / draws
    assert abs(found["split"]) < 0.15
    assert found["same"] == pytest.approx(0.5, abs=0.15)


@every
def test_training_goes_on_bit_for_bit(make: Make) -> None:
    whole = gan()
    train(make(*whole), closure_of(*whole), range(6))
    first, second = gan(), gan()
    optimizer = make(*first)
    train(optimizer, closure_of(*first), range(3))
    file = io.BytesIO()
    torch.save({"models": [m.state_dict() for m in first], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for module, state in zip(second, saved["models"], strict=True):
        module.load_state_dict(state)
    resumed = make(*second, lr=0.7)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, closure_of(*second), range(3, 6))
    assert equal(values(*second), values(*whole))


def test_momentum_resumes_and_schedulers_scale_the_coefficients() -> None:
    whole, first, second = gan(), gan(), gan()
    options: Any = {"momentum": 0.9, "weight_decay": 0.01, "cancel": "all"}

    def make(players: Any) -> tuple[Any, Any]:
        optimizer = GameOptimizer(*players, lr=(0.05, 0.02), **options)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    optimizer, scheduler = make(whole)
    train(optimizer, closure_of(*whole), range(6), scheduler)
    optimizer, scheduler = make(first)
    train(optimizer, closure_of(*first), range(3), scheduler)
    resumed, later = make(second)
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(old.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    later.load_state_dict(scheduler.state_dict())
    train(resumed, closure_of(*second), range(3, 6), later)
    assert equal(values(*second), values(*whole))


def test_plain_steps_are_those_of_the_given_optimizers() -> None:
    ours, theirs = gan(torch.float32), gan(torch.float32)

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), 1e-2, betas=(0.5, 0.999))

    optimizer = GameOptimizer(adam(ours[0]), adam(ours[1]), cancel="none")
    parts = [adam(theirs[0]), adam(theirs[1])]
    for step in range(4):
        data = batch(step, dtype=torch.float32)
        optimizer.step(closure_of(*ours), data)
        losses = closure_of(*theirs)(data)
        found = [
            torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)
            for loss, m in zip(losses, theirs, strict=True)
        ]
        for module, gradients in zip(theirs, found, strict=True):
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = gradient
        for part in parts:
            part.step()
    for a, b in zip(values(*ours), values(*theirs), strict=True):
        torch.testing.assert_close(a, b)


@every
def test_frozen_unused_and_noncontiguous_parameters(make: Make) -> None:
    first, second = gan()
    first.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    second[0].bias.requires_grad_(False)  # type: ignore[union-attr, index]
    weight = second[0].weight  # type: ignore[index]
    weight.data = weight.data.T.contiguous().T  # type: ignore[union-attr, operator]
    before = values(first, second)
    train(make(first, second), closure_of(first, second), range(2))
    assert torch.equal(first.unused.detach(), torch.ones(2, dtype=torch.float64))  # type: ignore[arg-type, union-attr, operator]
    moved = [not torch.equal(a, b) for a, b in zip(before, values(first, second), strict=True)]
    names = [f"{i}.{n}" for i, m in enumerate((first, second)) for n, _ in m.named_parameters()]
    assert {name for name, m in zip(names, moved, strict=True) if not m} == {"0.unused", "1.0.bias"}


def test_maximize_is_descent_on_the_negative() -> None:
    ours, theirs = gan(), gan()
    rise = torch.optim.SGD(ours[1].parameters(), 0.05, maximize=True)
    optimizer = GameOptimizer(torch.optim.SGD(ours[0].parameters(), 0.05), rise)
    other = GameOptimizer(*theirs, 0.05)

    def turned(data: Any) -> tuple[Tensor, Tensor]:
        first, second = closure_of(*ours)(data)
        return first, -second

    for step in range(3):
        a, b = optimizer.step(turned, batch(step)), other.step(closure_of(*theirs), batch(step))
        assert float(a[1]) == pytest.approx(-float(b[1]))
    for x, y in zip(values(*ours), values(*theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_several_rates_on_one_clock() -> None:
    """Two groups of equal rate are one group; with different rates the paper's convention has no coefficients."""
    one, two = gan(), gan()
    groups: list[Any] = [{"params": list(two[0][0].parameters())}, {"params": list(two[0][2].parameters())}]  # type: ignore[index]
    optimizer = GameOptimizer(groups, two[1], 0.05, cancel="all", convention="single_clock")
    train(GameOptimizer(*one, 0.05, cancel="all", convention="single_clock"), closure_of(*one), range(2))
    train(optimizer, closure_of(*two), range(2))
    assert equal(values(*one), values(*two))
    optimizer.param_groups[0]["lr"] = 0.01
    train(optimizer, closure_of(*two), range(2))
    groups[0]["lr"] = 0.01
    with pytest.raises(ValueError, match=r"several values.*single_clock"):
        GameOptimizer(groups, two[1], 0.05)
    GameOptimizer(groups, two[1], 0.05, cancel="none").step(closure_of(*two), batch(0))


def test_batch_norm_buffers_see_each_batch_once() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    second = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    other = copy.deepcopy(first), copy.deepcopy(second)
    GameOptimizer(first, second, 0.0, estimator="split").step(closure_of(first, second), batch(0))
    GameOptimizer(*other, 0.0, cancel="none").step(closure_of(*other), batch(0))
    assert equal(
        [b for m in (first, second) for b in m.buffers()],
        [b for m in other for b in m.buffers()],
    )


@every
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_nonfinite_gradients_change_nothing(make: Make, policy: str) -> None:
    players = gan()
    optimizer = make(*players, nonfinite=policy)
    train(optimizer, closure_of(*players), range(1))
    before = values(*players)

    def closure(data: Any) -> tuple[Tensor, Tensor]:
        first, second = closure_of(*players)(data)
        return first * float("nan"), second * float("nan")

    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"player 1: .*not changed"):
            optimizer.step(closure, batch(1))
    else:
        optimizer.step(closure, batch(1))
        assert optimizer.skipped_steps >= 1
    assert equal(values(*players), before)
    train(optimizer, closure_of(*players), range(2, 3))


def test_runge_kutta_puts_the_parameters_back_when_a_stage_fails() -> None:
    players = gan()
    before, calls = values(*players), []

    def closure(data: Any) -> tuple[Tensor, Tensor]:
        calls.append(0)
        if len(calls) == 3:
            raise KeyError("third")
        return closure_of(*players)(data)

    with pytest.raises(KeyError):
        RungeKutta(*players, 0.1).step(closure, batch(0))
    assert equal(values(*players), before)


@every
def test_wrong_closures_are_named(make: Make) -> None:
    players = gan()
    optimizer = make(*players)
    before = values(*players)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure must return the two losses"):
        optimizer.step(lambda _: torch.ones(()), batch(0))
    with pytest.raises(ValueError, match="closure must return scalars"):
        optimizer.step(lambda d: (players[0](d["noise"]), players[1](d["real"])), batch(0))
    with pytest.raises(TypeError, match="closure must return tensors, loss 2"):
        optimizer.step(lambda d: (players[0](d["noise"]).sum(), 1.0), batch(0))
    with pytest.raises(RuntimeError, match="with a graph"):
        optimizer.step(lambda d: tuple(loss.detach() for loss in closure_of(*players)(d)), batch(0))
    with pytest.raises(TypeError, match="real losses"):
        optimizer.step(lambda d: tuple(loss + 0j for loss in closure_of(*players)(d)), batch(0))
    assert equal(values(*players), before)


def test_a_detached_player_is_named() -> None:
    generator, critic = gan()

    def closure(data: Any) -> tuple[Tensor, Tensor]:
        fake = generator(data["noise"])
        return softplus(-critic(fake)).mean(), softplus(critic(fake.detach())).mean()

    before = values(generator, critic)
    with pytest.raises(RuntimeError, match=r"loss 2 does not depend on .* player 1.*detach"):
        GameOptimizer(generator, critic, 0.1).step(closure, batch(0))
    assert equal(values(generator, critic), before)
    GameOptimizer(generator, critic, 0.1, multipliers={"interaction": (-1, 0)}).step(closure, batch(0))
    GameOptimizer(generator, critic, 0.1, cancel="self").step(closure, batch(0))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr .*-1"),
        ({"lr": None}, ValueError, "lr must be given for the first player"),
        ({"lr": (0.1,)}, ValueError, "lr must be a pair"),
        ({"scheme": "both"}, ValueError, "scheme must be one of"),
        ({"inner": (2, 1)}, ValueError, "inner must be .1, 1. in the simultaneous"),
        ({"cancel": "some"}, ValueError, "cancel must be one of interaction, self, all, none"),
        ({"estimator": "half"}, ValueError, "estimator must be one of same, split"),
        ({"multipliers": {"cross": 1}}, ValueError, "'self' and 'interaction', got 'cross'"),
        ({"multipliers": {"self": (1, 2, 3)}}, ValueError, "must be a pair"),
        ({"multipliers": {"self": float("nan")}}, ValueError, "must be finite"),
        ({"nonfinite": "warn"}, ValueError, "nonfinite must be one of"),
        ({"momentum": 1.0}, ValueError, "momentum"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        GameOptimizer(*gan(), **{"lr": 0.1, **options})


def test_wrong_players_are_named() -> None:
    first, second = gan()
    with pytest.raises(ValueError, match="belong to the optimizer"):
        GameOptimizer(torch.optim.Adam(first.parameters()), second, 0.1)
    with pytest.raises(ValueError, match="part"):
        GameOptimizer(first, first, 0.1)
    with pytest.raises(TypeError, match="real floating-point"):
        GameOptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))], second, 0.1)
    with pytest.raises(TypeError, match="first must be a module or parameters"):
        RungeKutta(torch.optim.SGD(first.parameters(), 0.1), second, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="order must be 2 or 4"):
        RungeKutta(first, second, 0.1, order=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength"):
        SGA(first, second, 0.1, strength=-1.0)
    optimizer = GameOptimizer(first, second, 0.1, estimator="split")
    with pytest.raises(ValueError, match="at least two samples"):
        optimizer.step(closure_of(first, second), batch(0, size=1))
    with pytest.raises(ValueError, match="batch must be given"):
        optimizer.step(lambda: closure_of(first, second)(batch(0)))
    with pytest.raises(ValueError, match=r"lengths \[5, 8\]"):
        optimizer.step(closure_of(first, second), {**batch(0), "noise": batch(0)["noise"][:5]})


def test_half_precision_and_autocast() -> None:
    players = gan(torch.bfloat16)
    GameOptimizer(*players, 0.05).step(closure_of(*players), batch(0, dtype=torch.bfloat16))
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in values(*players))
    players = gan(torch.float32)

    def closure(data: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first, second = closure_of(*players)(data)
        return first.float(), second.float()

    GameOptimizer(*players, 0.05).step(closure, batch(0, dtype=torch.float32))
    assert all(bool(p.isfinite().all()) for p in values(*players))


def test_copies_pickles_and_lr_tensors() -> None:
    players = gan()
    optimizer = GameOptimizer(*players, torch.tensor(0.05, dtype=torch.float64), scheme="alternating", inner=(2, 1))
    train(optimizer, closure_of(*players), range(2))
    copied = copy.deepcopy(optimizer)
    assert isinstance(copied, GameOptimizer)
    assert copied.inner == (2, 1)
    assert repr(copied).startswith("GameOptimizer")
    other = gan()
    train(GameOptimizer(*other, 0.05, scheme="alternating", inner=(2, 1)), closure_of(*other), range(2))
    for a, b in zip(values(*players), values(*other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class Once(torch.autograd.Function):
    """tanh, marked as differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Missing(torch.autograd.Function):
    """tanh, as PyTorch has it for operations whose second derivative is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return MissingBackward.apply(gradient, ctx.saved_tensors[0])


class MissingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (1 - x.tanh() ** 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("derivative for aten::tanh_backward is not implemented")


@pytest.mark.parametrize("estimator", ["same", "split"])
@pytest.mark.parametrize("kind", [Once, Missing])
def test_operations_without_second_derivative_fall_back_with_one_warning(kind: Any, estimator: Any) -> None:
    ours, theirs = gan(), gan()

    def closure(function: Any, players: Any, dropout: bool) -> Any:
        def losses(data: Any) -> tuple[Tensor, Tensor]:
            fake = players[0](data["noise"])
            fake = fake * (torch.rand(fake.shape, dtype=fake.dtype) if dropout else 1)
            fake, real = (players[1](function(part)) for part in (fake, data["real"]))
            return softplus(-fake).mean(), softplus(fake).mean() + softplus(-real).mean()

        return losses

    options: Any = {"cancel": "all", "estimator": estimator}
    optimizer, exact = GameOptimizer(*ours, 0.5, **options), GameOptimizer(*theirs, 0.5, **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for step in range(3):
            optimizer.step(closure(kind.apply, ours, False), batch(step))
            exact.step(closure(torch.tanh, theirs, False), batch(step))
    assert len([w for w in seen if "finite difference" in str(w.message)]) == 1
    for a, b in zip(values(*ours), values(*theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(closure(kind.apply, ours, True), batch(9))
    assert all(bool(p.isfinite().all()) and float(p.abs().max()) < 10 for p in values(*ours))
    with pytest.raises(RuntimeError, match=r"no second derivative|once only"):
        SGA(*ours, 0.1).step(closure(kind.apply, ours, False), batch(0))


@pytest.mark.parametrize("scheme", ["simultaneous", "alternating"])
def test_the_loop_runs_a_game_and_records_both_losses(scheme: Any, tmp_path: Any) -> None:
    def fresh() -> tuple[GameOptimizer, Any]:
        one = torch.ones(2, dtype=torch.float64)
        first, second = nn.Parameter(one.clone()), nn.Parameter(0.5 * one)
        optimizer = GameOptimizer([first], [second], lr=(0.1, 0.05), scheme=scheme, momentum=0.5)
        return optimizer, lambda: ((first * second).sum(), second.square().sum() - (first * second).sum())

    def point(optimizer: GameOptimizer) -> list[Tensor]:
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    whole, losses = fresh()
    found = run(whole, 6, closure=losses, progress=False)
    assert {"first loss", "second loss"} <= set(found.history)
    assert found.history["first loss"][0] == 1.0 and found.history["second loss"][0] == -0.5
    path = tmp_path / "game.pt"
    part, losses = fresh()
    run(part, 3, closure=losses, progress=False, checkpoint=path, checkpoint_every=3)
    rest, losses = fresh()
    run(rest, 6, closure=lambda: (losses(), {"note": 1.0}), progress=False, checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(point(whole), point(rest), strict=True))
    with pytest.raises(TypeError, match="2 losses"):
        run(fresh()[0], 1, closure=lambda: losses()[0], progress=False)
    sgd = torch.optim.SGD(point(rest), lr=0.1)
    with pytest.raises(TypeError, match="the loss"):
        run(sgd, 1, closure=losses, progress=False)
