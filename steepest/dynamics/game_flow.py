"""The modified flow of a two-player game, and how closely it follows the steps."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex
from torch import Tensor

from steepest._checks import check_int
from steepest.dynamics.games import GameDrift, Tensors, Terms, TwoPlayer, length
from steepest.optim.game_terms import Convention, Scheme, check_choice, check_pair, drift_coefficients


class GameFlow:
    r"""The modified flow that follows the steps of a game: $\dot\phi = -G_1$, $\dot\theta = -G_2$.

    On a single clock it is $\dot\phi = -aG_1$, $\dot\theta = -bG_2$, and a step takes time 1.

    Args:
        game: the game.
        rates: (a, b).
        scheme: see `drift_coefficients`.
        inner: see `drift_coefficients`.
        convention: see `drift_coefficients`; only "single_clock" is one trajectory over many steps.
        terms: which drift to keep: "all", "self", "interaction", or "none" (the plain flow of the gradients).

    Source:
        Rosca, Wu, Dherin and Barrett 2021, arXiv 2105.13922; the single clock: ours.
    """

    def __init__(
        self,
        game: TwoPlayer,
        rates: Sequence[float],
        scheme: Scheme = "simultaneous",
        inner: tuple[int, int] = (1, 1),
        convention: Convention = "single_clock",
        *,
        terms: Terms = "all",
    ) -> None:
        check_choice("terms", terms, Terms)
        self.coefficients = drift_coefficients(rates, scheme, inner, convention)
        self.game, self.rates, self.convention, self.kind = game, (rates[0], rates[1]), convention, terms

    def velocity(self, at: tuple[Tensors, Tensors] | None = None) -> tuple[Tensors, Tensors]:
        """The flow's velocity at a point (None: the game's own)."""
        found = GameDrift(self.coefficients, self.game.terms(at))
        speeds = self.rates if self.convention == "single_clock" else (1.0, 1.0)
        first, second = (
            tuple(
                -speed * (g + c)
                for g, c in zip(found.terms.gradients[player], found.correction(player, self.kind), strict=True)
            )
            for player, speed in enumerate(speeds)
        )
        return first, second

    def integrate(
        self, time: float, steps: int = 8, at: tuple[Tensors, Tensors] | None = None
    ) -> tuple[Tensors, Tensors]:
        """The point after `time`, by `steps` classical Runge-Kutta steps of fourth order.

        Raises:
            TypeError, ValueError: `time` is not finite, or `steps` is not a whole number of at least 1.
        """
        if not math.isfinite(time):
            raise ValueError(f"time must be finite, got {time!r}")
        check_int("steps", steps)
        size = time / steps
        point = self.game.point if at is None else at
        for _ in range(steps):
            k1 = self.velocity(point)
            k2 = self.velocity(_shifted(point, k1, size / 2))
            k3 = self.velocity(_shifted(point, k2, size / 2))
            k4 = self.velocity(_shifted(point, k3, size))
            for slope, weight in ((k1, 1), (k2, 2), (k3, 2), (k4, 1)):
                point = _shifted(point, slope, weight * size / 6)
        return point

    def after_step(self, steps: int = 8) -> tuple[Tensors, Tensors]:
        """Where the flow puts the players after one step of the game: by the paper's convention each at its own time.

        Args:
            steps: of the integration.
        """
        if self.convention == "single_clock":
            return self.integrate(1.0, steps)
        return self.integrate(self.rates[0], steps)[0], self.integrate(self.rates[1], steps)[1]

    def eigenvalues(self) -> Complex[Tensor, "d"]:
        """Of the velocity's derivative at the game's point; a fixed point is stable if all real parts are negative."""
        return torch.linalg.eigvals(self.game.jacobian(self.velocity))


def game_order(
    game: TwoPlayer,
    rates: Sequence[float],
    scheme: Scheme = "simultaneous",
    inner: tuple[int, int] = (1, 1),
    convention: Convention = "single_clock",
    *,
    terms: Terms = "all",
    scales: Sequence[float] = (1.0, 0.5, 0.25),
) -> tuple[float, list[float]]:
    """How the distance between one step and the flow falls with the rates.

    Args:
        game: the game, best in float64.
        rates: (a, b) at scale 1.
        scheme: see `drift_coefficients`.
        inner: see `drift_coefficients`.
        convention: see `drift_coefficients`.
        terms: see `GameFlow`.
        scales: the factors of the rates, at least two.

    Returns:
        The power of the scale, fitted by least squares (3 with all terms, 2 without), and the errors.
    """
    if len(scales) < 2 or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"scales must be at least two positive numbers, got {scales!r}")
    check_pair("rates", rates)
    errors = []
    for scale in scales:
        smaller = (rates[0] * scale, rates[1] * scale)
        end = GameFlow(game, smaller, scheme, inner, convention, terms=terms).after_step(4)
        target = game.step(smaller, scheme, inner)
        gaps = [a - b for i in (0, 1) for a, b in zip(end[i], target[i], strict=True)]
        errors.append(float(length(gaps)))
    if min(errors) == 0:
        return math.inf, errors
    logs = torch.tensor([[math.log(s), math.log(e)] for s, e in zip(scales, errors, strict=True)], dtype=torch.float64)
    x, y = (logs - logs.mean(0)).unbind(1)
    return float((x * y).sum() / x.square().sum()), errors


def _shifted(point: tuple[Tensors, Tensors], slope: tuple[Tensors, Tensors], time: float) -> tuple[Tensors, Tensors]:
    first, second = (tuple(p + time * s for p, s in zip(point[i], slope[i], strict=True)) for i in (0, 1))
    return first, second
