"""Drift of two-player games: coefficients, terms, modified flows."""

import math

import pytest
import torch
from torch import Tensor, nn

from steepest.dynamics.game_flow import GameFlow, game_order
from steepest.dynamics.games import TwoPlayer, drift_coefficients, game_drift
from steepest.studies._drift_games import random_game


def bilinear() -> TwoPlayer:
    point = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-0.4], dtype=torch.float64)
    return TwoPlayer(lambda x, y: (x * y).sum(), lambda x, y: -(x * y).sum(), *point)


def game(seed: int = 0) -> TwoPlayer:
    return random_game(torch.Generator().manual_seed(seed))


def test_table_of_coefficients() -> None:
    a, b = 0.3, 0.2
    assert drift_coefficients((a, b)).interaction == (a / 2, b / 2)
    assert drift_coefficients((a, b)).self_ == (a / 2, b / 2)
    found = drift_coefficients((a, b), "alternating", (2, 3))
    assert found.self_ == (a / 4, b / 6)
    assert found.interaction == pytest.approx((a / 2, b / 2 * (1 - 2 * a / b)))
    assert drift_coefficients((a, b), convention="single_clock").interaction == (b / 2, a / 2)
    found = drift_coefficients((a, b), "alternating", (2, 3), "single_clock")
    assert found.self_ == (a / 4, b / 6)
    assert found.interaction == (b / 2, -a / 2)


@pytest.mark.parametrize("scheme", ["simultaneous", "alternating"])
def test_conventions_agree_for_equal_rates(scheme: str) -> None:
    one, other = (drift_coefficients((0.2, 0.2), scheme, convention=c) for c in ("paper", "single_clock"))  # type: ignore[arg-type]
    assert one.self_ == pytest.approx(other.self_)
    assert one.interaction == pytest.approx(other.interaction)


@pytest.mark.parametrize("convention", ["paper", "single_clock"])
@pytest.mark.parametrize(
    ("scheme", "inner"), [("simultaneous", (1, 1)), ("alternating", (1, 1)), ("alternating", (2, 3))]
)
def test_the_flow_is_of_third_order_with_its_own_reading(scheme: str, inner: tuple[int, int], convention: str) -> None:
    settings = (scheme, inner, convention)
    assert game_order(game(), (0.016, 0.01), *settings)[0] >= 2.8  # type: ignore[arg-type]
    assert game_order(game(), (0.016, 0.01), *settings, terms="self")[0] <= 2.2  # type: ignore[arg-type]
    assert game_order(game(), (0.016, 0.01), *settings, terms="none")[0] <= 2.2  # type: ignore[arg-type]


def test_terms_are_hessian_products() -> None:
    one = game(3)
    x, y = one.point[0][0], one.point[1][0]
    terms = one.terms()
    g1, g2 = terms.gradients[0][0], terms.gradients[1][0]
    full1 = torch.autograd.functional.hessian(one.losses[0], (x, y))
    full2 = torch.autograd.functional.hessian(one.losses[1], (x, y))
    cross1 = torch.func.grad(one.losses[0], 1)(x, y)
    torch.testing.assert_close(terms.self_[0][0], full1[0][0] @ g1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.interaction[0][0], full1[0][1] @ g2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.self_[1][0], full2[1][1] @ g2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.interaction[1][0], full2[1][0] @ g1, rtol=1e-12, atol=1e-12)
    assert cross1.shape == g2.shape


def test_zero_sum_terms_are_gradients_of_squares() -> None:
    loss = game(5).losses[0]
    x, y = game(5).point[0][0], game(5).point[1][0]
    zero_sum = TwoPlayer(loss, lambda x, y: -loss(x, y), x, y)
    expected = torch.func.grad(lambda x: -0.5 * torch.func.grad(loss, 1)(x, y).square().sum())(x)
    torch.testing.assert_close(zero_sum.terms().interaction[0][0], expected)
    expected = torch.func.grad(lambda y: -0.5 * torch.func.grad(loss, 0)(x, y).square().sum())(y)
    torch.testing.assert_close(zero_sum.terms().interaction[1][0], expected)


def test_bilinear_maps_and_flows() -> None:
    one = bilinear()
    jacobian = one.jacobian(lambda at: one.step((0.3, 0.2), "alternating", at=at))
    torch.testing.assert_close(
        torch.linalg.eigvals(jacobian).abs(), torch.ones(2, dtype=torch.float64), atol=1e-14, rtol=0
    )
    jacobian = one.jacobian(lambda at: one.step((0.3, 0.2), at=at))
    assert torch.linalg.eigvals(jacobian).abs().tolist() == pytest.approx([1.02956301] * 2, abs=1e-8)
    for scheme, trace in (("alternating", 0.0), ("simultaneous", 0.06)):
        flow = GameFlow(one, (0.3, 0.2), scheme)  # type: ignore[arg-type]
        assert float(one.jacobian(flow.velocity).trace()) == pytest.approx(trace, abs=1e-15)
        assert float(flow.eigenvalues().real.sum()) == pytest.approx(trace, abs=1e-14)


def test_the_single_clock_follows_many_steps() -> None:
    one = bilinear()
    point = one.point
    for _ in range(100):
        point = one.step((0.03, 0.02), "alternating", at=point)
    ends = {
        terms: GameFlow(one, (0.03, 0.02), "alternating", terms=terms).integrate(100.0, 400)  # type: ignore[arg-type]
        for terms in ("all", "none")
    }

    def gap(end: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> float:
        return math.hypot(*(float((end[i][0] - point[i][0]).item()) for i in (0, 1)))

    assert gap(ends["all"]) < 5e-4 < 5e-3 < gap(ends["none"])


def test_inner_steps_are_one_step_when_there_is_one() -> None:
    one = game()
    for a, b in zip(one.step((0.1, 0.2), "alternating"), one.step((0.1, 0.2), "alternating", (1, 1)), strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)


def test_drift_of_networks_agrees_with_the_functional_game() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
    data = torch.randn(7, 2, dtype=torch.float64)
    frozen = first.bias.requires_grad_(False)

    def closure() -> tuple[Tensor, Tensor]:
        out = second(first(data).tanh())
        return out.square().mean(), out.exp().mean()

    before = [p.clone() for p in (*first.parameters(), *second.parameters())]
    found = game_drift(closure, list(first.parameters()), list(second.parameters()), (0.1, 0.2), "alternating")

    def output(w: Tensor, theta: list[Tensor]) -> Tensor:
        return torch.tanh(data @ w.T + frozen) @ theta[0].T + theta[1]

    same = TwoPlayer(
        lambda w, t: output(w, t).square().mean(),
        lambda w, t: output(w, t).exp().mean(),
        first.weight,
        list(second.parameters()),
    ).drift((0.1, 0.2), "alternating")
    for player in (0, 1):
        for a, b in zip(found.drifted[player], same.drifted[player], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(before, (*first.parameters(), *second.parameters()), strict=True))
    assert all(value.ndim == 0 for value in found.metrics().values())
    assert all(parameter.grad is None for parameter in (*first.parameters(), *second.parameters()))


def test_a_player_that_is_not_there_has_no_interaction() -> None:
    second = (torch.ones(2), torch.ones(3))
    one = TwoPlayer(lambda x, y: x.square().sum(), lambda x, y: y[0].sum().square(), torch.ones(2), second)
    terms = one.terms()
    assert not terms.interaction[0][0].any()
    assert terms.gradients[1][1].shape == (3,)
    assert not terms.gradients[1][1].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((0.1, 0.1), "together"), "scheme must be one of simultaneous, alternating"),
        (((0.1, 0.1), "simultaneous", (2, 1)), "inner must be .1, 1. in the simultaneous scheme"),
        (((0.1, 0.1), "alternating", (0, 1)), "inner must hold two whole numbers"),
        (((0.1, 0.1), "alternating", (1, 1), "clock"), "convention must be one of"),
        (((0.1, 0.0),), "rates must hold two positive"),
        (((0.1, math.nan),), "rates must hold two positive"),
        (((0.1,),), "rates must be a pair"),
    ],
)
def test_wrong_settings_are_named(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drift_coefficients(*arguments)
    with pytest.raises(ValueError, match=words):
        game().drift(*arguments)


def test_wrong_games_are_named() -> None:
    ones = torch.ones(2)
    with pytest.raises(TypeError, match="first must be real floating-point"):
        TwoPlayer(lambda x, y: x.sum(), lambda x, y: y.sum(), ones.to(torch.complex64), ones)
    with pytest.raises(ValueError, match="second must hold at least one"):
        TwoPlayer(lambda x, y: x.sum(), lambda x, y: y.sum(), ones, [])
    with pytest.raises(ValueError, match=r"scalars, loss 1 has shape \(2,\)"):
        TwoPlayer(lambda x, y: x * y, lambda x, y: y.sum(), ones, ones).terms()
    with pytest.raises(TypeError, match="inner must hold two whole"):
        drift_coefficients((0.1, 0.1), "alternating", (1.5, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="time must be finite"):
        GameFlow(game(), (0.1, 0.1)).integrate(math.inf)
    with pytest.raises(ValueError, match="at least two positive"):
        game_order(game(), (0.1, 0.1), scales=(1.0,))
    with pytest.raises(ValueError, match="requires gradients"):
        game_drift(lambda: (ones.sum(), ones.sum()), [ones], [ones], (0.1, 0.1))
