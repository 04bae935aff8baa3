r"""The discretisation drift of two-player games, measured.

Two players that descend do not follow the flow of their gradients: to second order they follow the flow of drifted
gradients, see `steepest.optim.game_terms`. Here they are measured at a point; `game_flow` follows them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.optim.game_terms import (
    Convention,
    DriftCoefficients,
    Scheme,
    check_choice,
    check_losses,
    check_twice,
    derivative_along,
    drift_coefficients,
    gradients,
)

__all__ = ["DriftCoefficients", "GameDrift", "GameTerms", "TwoPlayer", "drift_coefficients", "game_drift"]

Point = Tensor | Sequence[Tensor]
Tensors = tuple[Tensor, ...]
Terms = Literal["all", "self", "interaction", "none"]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class GameTerms:
    """What drift is made of, at one point: (player 1, player 2) of each, one tensor for each parameter.

    Attributes:
        losses: E1 and E2.
        gradients: the gradient of each player's loss in its own parameters.
        self_: $S_1$ and $S_2$.
        interaction: $I_1$ and $I_2$.
    """

    losses: tuple[Tensor, Tensor]
    gradients: tuple[Tensors, Tensors]
    self_: tuple[Tensors, Tensors]
    interaction: tuple[Tensors, Tensors]


@dataclass(frozen=True)
class GameDrift:
    """A game's drift at one point: the terms, their coefficients, and what the players follow because of them."""

    coefficients: DriftCoefficients
    terms: GameTerms

    def correction(self, player: int, kind: str = "all") -> Tensors:
        """`c_s S + c_i I` of player 0 or 1, or one of the two terms."""
        check_choice("kind", kind, Terms)
        c_self = self.coefficients.self_[player] if kind in ("all", "self") else 0.0
        c_cross = self.coefficients.interaction[player] if kind in ("all", "interaction") else 0.0
        pairs = zip(self.terms.self_[player], self.terms.interaction[player], strict=True)
        return tuple(c_self * own + c_cross * cross for own, cross in pairs)

    @property
    def drifted(self) -> tuple[Tensors, Tensors]:
        """$G_1$ and $G_2$: against these the players really go."""
        first, second = (
            tuple(g + c for g, c in zip(self.terms.gradients[player], self.correction(player), strict=True))
            for player in (0, 1)
        )
        return first, second

    def metrics(self) -> dict[str, Tensor]:
        """For each player the length of the gradient, and of each part of the drift over it (infinite at a zero of it).

        Values far below one mean that the players follow their gradients. The sign of "interaction along gradient"
        says whether the other player's step helps (positive: the drift points as the gradient does) or works against.
        """
        found: dict[str, Tensor] = {}
        for player, name in enumerate(("first", "second")):
            gradient = self.terms.gradients[player]
            size = length(gradient)
            found[f"{name} gradient"] = size
            found[f"{name} self drift"] = length(self.correction(player, "self")) / size
            cross = self.correction(player, "interaction")
            found[f"{name} interaction drift"] = length(cross) / size
            along = sum(((g * c).sum() for g, c in zip(gradient, cross, strict=True)), torch.zeros(()))
            found[f"{name} interaction along gradient"] = along / size**2
        return found


def length(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together."""
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()


class TwoPlayer:
    r"""A game of two players: φ minimises `first_loss(φ, θ)`, θ minimises `second_loss(φ, θ)`.

    Args:
        first_loss: E1, a differentiable function of both players' tensors, to a scalar.
        second_loss: E2.
        first: φ, a tensor or several.
        second: θ, a tensor or several.

    Raises:
        TypeError: parameters that are not real floating-point tensors.
        ValueError: a player without parameters.

    Examples:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> game = TwoPlayer(lambda x, y: (x * y).sum(), lambda x, y: -(x * y).sum(), one, one)
        >>> game.drift((0.1, 0.1)).drifted
        ((tensor([0.9500], dtype=torch.float64),), (tensor([-1.0500], dtype=torch.float64),))
    """

    def __init__(self, first_loss: Loss, second_loss: Loss, first: Point, second: Point) -> None:
        self.losses = (first_loss, second_loss)
        self.point = (_tensors("first", first), _tensors("second", second))
        self._single = (isinstance(first, Tensor), isinstance(second, Tensor))

    def evaluate(self, first: Tensors, second: Tensors) -> tuple[Tensor, Tensor]:
        """Both losses at a point."""
        arguments = [p[0] if single else p for p, single in zip((first, second), self._single, strict=True)]
        return check_losses((self.losses[0](*arguments), self.losses[1](*arguments)))

    def terms(self, at: tuple[Tensors, Tensors] | None = None) -> GameTerms:
        """Gradients, self and interaction terms at a point (None: the game's own).

        Where the point requires gradients, the terms can be differentiated.
        """
        with torch.enable_grad():
            players, graph = _leaves(self.point if at is None else at)
            return _terms(self.evaluate(*players), players, graph)

    def drift(
        self,
        rates: Sequence[float],
        scheme: Scheme = "simultaneous",
        inner: tuple[int, int] = (1, 1),
        convention: Convention = "paper",
    ) -> GameDrift:
        """The drift of a step with these settings, see `drift_coefficients`, at the game's point."""
        return GameDrift(drift_coefficients(rates, scheme, inner, convention), self.terms())

    def step(
        self,
        rates: Sequence[float],
        scheme: Scheme = "simultaneous",
        inner: tuple[int, int] = (1, 1),
        at: tuple[Tensors, Tensors] | None = None,
    ) -> tuple[Tensors, Tensors]:
        """The point after one step of gradient descent by both players; the game stays where it is."""
        drift_coefficients(rates, scheme, inner)
        first, second = self.point if at is None else at
        if scheme == "simultaneous":
            return self._moved(0, first, second, rates[0])[0], self._moved(1, first, second, rates[1])[1]
        for _ in range(inner[0]):
            first, second = self._moved(0, first, second, rates[0] / inner[0])
        for _ in range(inner[1]):
            first, second = self._moved(1, first, second, rates[1] / inner[1])
        return first, second

    def _moved(self, player: int, first: Tensors, second: Tensors, rate: float) -> tuple[Tensors, Tensors]:
        with torch.enable_grad():
            (own, other), graph = _leaves((first, second) if player == 0 else (second, first))
            losses = self.evaluate(own, other) if player == 0 else self.evaluate(other, own)
            found = _filled(gradients(losses[player], own, create_graph=graph), own)
            moved = tuple(p - rate * g for p, g in zip(own, found, strict=True))
        moved = moved if graph else tuple(p.detach() for p in moved)
        return (moved, second) if player == 0 else (first, moved)

    def jacobian(self, function: Callable[[tuple[Tensors, Tensors]], tuple[Tensors, Tensors]]) -> Float[Tensor, "d d"]:
        """The derivative at the game's point of a map of points, such as `step` or a flow's velocity.

        Examples:
            >>> one = torch.ones(1, dtype=torch.float64)
            >>> game = TwoPlayer(lambda x, y: (x * y).sum(), lambda x, y: -(x * y).sum(), one, one)
            >>> matrix = game.jacobian(lambda at: game.step((0.3, 0.2), "alternating", at=at))
            >>> [round(float(size), 6) for size in torch.linalg.eigvals(matrix).abs()]
            [1.0, 1.0]
        """
        flat = torch.cat([tensor.reshape(-1) for player in self.point for tensor in player]).detach()

        def of_vector(vector: Tensor) -> Tensor:
            result = function(self.unflatten(vector))
            return torch.cat([tensor.reshape(-1) for player in result for tensor in player])

        found = torch.autograd.functional.jacobian(of_vector, flat)
        assert isinstance(found, Tensor)
        return found

    def unflatten(self, vector: Float[Tensor, "d"]) -> tuple[Tensors, Tensors]:
        """A vector of all parameters, player 1's first, as a point."""
        shapes = [tensor.shape for player in self.point for tensor in player]
        parts = vector.split([shape.numel() for shape in shapes])
        tensors = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        count = len(self.point[0])
        return tensors[:count], tensors[count:]


def game_drift(
    closure: Callable[[], Any],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    rates: Sequence[float],
    scheme: Scheme = "simultaneous",
    inner: tuple[int, int] = (1, 1),
    convention: Convention = "paper",
) -> GameDrift:
    """The drift of two networks in training, at their parameters, which are not changed.

    Args:
        closure: computes and returns both losses (E1, E2), both graphs whole: neither player detached.
        first: the parameters of player 1; those that do not require gradients are left out.
        second: the parameters of player 2.
        rates: (a, b).
        scheme: see `drift_coefficients`.
        inner: see `drift_coefficients`.
        convention: see `drift_coefficients`.

    Raises:
        TypeError, ValueError, RuntimeError: settings, parameters or losses that cannot be used.
    """
    coefficients = drift_coefficients(rates, scheme, inner, convention)
    players = tuple(tuple(t for t in _tensors(n, p, keep=True) if t.requires_grad) for n, p in
                    (("first", first), ("second", second)))  # fmt: skip
    for name, player in zip(("first", "second"), players, strict=True):
        if not player:
            raise ValueError(f"{name} must hold a parameter that requires gradients")
    with torch.enable_grad():
        return GameDrift(coefficients, _terms(check_losses(closure()), (players[0], players[1]), False))


def _tensors(name: str, given: Point, keep: bool = False) -> Tensors:
    tensors = (given,) if isinstance(given, Tensor) else tuple(given)
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor")
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be real floating-point tensors, got {kind}")
    return tensors if keep else tuple(tensor.detach() for tensor in tensors)


def _leaves(point: tuple[Tensors, Tensors]) -> tuple[tuple[Tensors, Tensors], bool]:
    """The point as something to differentiate by, and whether its own graph has to go on.

    Copies, as a tensor of the point may depend on another one, which partial derivatives must not see.
    """
    graph = any(tensor.requires_grad for player in point for tensor in player)
    first, second = (
        tuple(t.clone() if t.requires_grad else t.detach().requires_grad_() for t in player) for player in point
    )
    return (first, second), graph


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensors:
    return tuple(torch.zeros_like(p) if t is None else t for t, p in zip(found, like, strict=True))


def _terms(losses: tuple[Tensor, Tensor], players: tuple[Tensors, Tensors], graph: bool) -> GameTerms:
    both = [*players[0], *players[1]]
    count = len(players[0])
    full = [gradients(loss, both, create_graph=True) for loss in losses]
    check_twice([*full[0], *full[1]])
    own = full[0][:count], full[1][count:]
    cross = full[0][count:], full[1][:count]
    self_ = [derivative_along(own[i], own[i], players[i], create_graph=graph) for i in (0, 1)]
    interaction = [derivative_along(cross[i], own[1 - i], players[i], create_graph=graph) for i in (0, 1)]

    def pair(found: Sequence[Sequence[Tensor | None]]) -> tuple[Tensors, Tensors]:
        first, second = (_filled(found[i], players[i]) for i in (0, 1))
        if graph:
            return first, second
        return tuple(t.detach() for t in first), tuple(t.detach() for t in second)

    values = losses if graph else (losses[0].detach(), losses[1].detach())
    return GameTerms(values, pair(own), pair(self_), pair(interaction))
