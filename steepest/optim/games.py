"""Optimizers of two-player games, such as GANs: both players' parameters in one optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from steepest.optim.checks import NonFinite, check_number, check_parameter, first_nonfinite
from steepest.optim.game_terms import (
    Convention,
    Evaluation,
    Scheme,
    added,
    check_choice,
    check_pair,
    check_scheme,
)
from steepest.optim.mixed import Mixed

Player = nn.Module | Optimizer | Iterable[Any]
Cancel = Literal["interaction", "self", "all", "none"]
Estimator = Literal["same", "split"]
Found = list[Tensor | None]

_CANCELLED: dict[str, tuple[float, float]] = {
    "interaction": (0.0, -1.0),
    "self": (-1.0, 0.0),
    "all": (-1.0, -1.0),
    "none": (0.0, 0.0),
}


class TwoPlayerOptimizer(Mixed):
    """What the optimizers of games share: two players, one closure that gives both losses, one state.

    Players are named "first" and "second" in `parts`; `param_groups` joins their groups, so that any scheduler works.
    A step calculates gradients itself, with `torch.autograd.grad`, leaves them in `.grad`, and lets each player's own
    optimizer apply them. Parameters that do not require gradients rest.
    """

    loss_names = ("first loss", "second loss")  # what `steepest.run` records of the closure's losses

    def __init__(
        self,
        first: Player,
        second: Player,
        lr: float | Tensor | Sequence[float | Tensor] | None = None,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        rates = tuple(lr) if isinstance(lr, Sequence) else (lr, lr)
        check_pair("lr", rates)
        parts = {
            name: _optimizer(name, player, rate, momentum, weight_decay)
            for name, player, rate in zip(("first", "second"), (first, second), rates, strict=True)
        }
        super().__init__(parts, nonfinite=nonfinite)
        self.modules: tuple[nn.Module, ...] = tuple(p for p in (first, second) if isinstance(p, nn.Module))
        for group in self.param_groups:
            for parameter in group["params"]:
                check_parameter(parameter)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[..., Any] | None = None, batch: Any = None
    ) -> tuple[Tensor, Tensor]:
        """One step of both players.

        Args:
            closure: computes both losses and returns them as (E1, E2), without calling backward. It is called as
                `closure(batch)`, or `closure()` if `batch` is None, and may be called several times in a step: random
                numbers that must be the same each time belong into the batch. Do not detach one player in the other's
                loss: the terms between the players need that graph.
            batch: what a step is computed from: a tensor with one sample per row, or tuples, lists and mappings of
                such.

        Returns:
            The two losses at the beginning of the step, without graph.

        Raises:
            RuntimeError: no closure, or losses without a graph.
            TypeError, ValueError: the closure returned something else than two real scalars.
            FloatingPointError: under nonfinite="raise", a gradient with NaN or infinity. The player that it belongs to
                is not changed.
        """
        if closure is None:
            raise RuntimeError(
                "step needs a closure that returns both losses, step(closure) or step(closure, batch): the terms "
                "between the players cannot be computed from .grad"
            )
        return self._play((lambda _: closure()) if batch is None else closure, batch)

    def _play(self, evaluate: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} says how to step in _play")

    def _players(self) -> tuple[list[Tensor], list[Tensor]]:
        first, second = (
            [p for group in part.param_groups for p in group["params"] if p.requires_grad]
            for part in self.parts.values()
        )
        return first, second

    def _rates(self) -> tuple[list[Any], list[Any]]:
        """The present learning rate of each parameter of each player."""
        first, second = (
            [group["lr"] for group in part.param_groups for p in group["params"] if p.requires_grad]
            for part in self.parts.values()
        )
        return first, second

    def _signed(self, evaluate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The losses as both players minimise them; a player whose optimizer maximises has its sign turned."""
        signs = self._signs()
        if signs == (1.0, 1.0):
            return evaluate

        def turned(batch: Any) -> Any:
            losses = evaluate(batch)
            if not isinstance(losses, Sequence) or len(losses) != 2:
                return losses
            return [loss * sign for loss, sign in zip(losses, signs, strict=True)]

        return turned

    def _signs(self) -> tuple[float, float]:
        signs = []
        for name, part in self.parts.items():
            turned = {bool(group.get("maximize", False)) for group in part.param_groups}
            if len(turned) > 1:
                raise ValueError(f"maximize must be the same in all parameter groups of the {name} player")
            signs.append(-1.0 if True in turned else 1.0)
        return signs[0], signs[1]

    def _put(self, found: Mapping[int, Sequence[Tensor | None]], losses: Sequence[Tensor]) -> bool:
        """Leave these gradients in `.grad`; False: they are to be skipped."""
        players, signs = self._players(), self._signs()
        for player, tensors in found.items():
            filled = [t for t in tensors if t is not None]
            if self.nonfinite != "ignore" and (bad := first_nonfinite([*filled, losses[player].detach()])) is not None:
                if self.nonfinite == "skip":
                    self._skipped += 1
                    return False
                what = "its loss is" if bad == len(filled) else f"a gradient of shape {tuple(filled[bad].shape)} is"
                raise FloatingPointError(
                    f"player {player + 1}: {what} NaN or infinite; the player was not changed. Lower lr, look for the "
                    "cause, or pass nonfinite='skip' to leave such steps out"
                )
        for player, tensors in found.items():
            for parameter, tensor in zip(players[player], tensors, strict=True):
                value = None if tensor is None else tensor.detach().to(parameter.dtype)
                parameter.grad = value if value is None or signs[player] > 0 else -value
        return True

    def _move(self, found: Mapping[int, Sequence[Tensor | None]], losses: Sequence[Tensor]) -> None:
        if self._put(found, losses):
            for player in found:
                self._part(player).step()

    def _part(self, player: int) -> Optimizer:
        return list(self.parts.values())[player]

    def _result(self, losses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (loss.detach() * sign for loss, sign in zip(losses, self._signs(), strict=True))
        return first, second

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return {**kept, **super().__getstate__()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {super().__repr__()}"


def _optimizer(name: str, player: Player, lr: Any, momentum: float, weight_decay: float) -> Optimizer:
    if isinstance(player, Optimizer):
        if lr is not None or momentum or weight_decay:
            raise ValueError(f"lr, momentum and weight_decay belong to the optimizer given as the {name} player")
        return player
    if lr is None:
        raise ValueError(f"lr must be given for the {name} player, or the player as an optimizer of its own")
    if not (isinstance(lr, Tensor) and lr.numel() == 1):
        check_number(lr, "lr")
    check_number(momentum, "momentum", below=1.0)
    check_number(weight_decay, "weight_decay")
    return SGD(
        player.parameters() if isinstance(player, nn.Module) else player,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
    )


class GameOptimizer(TwoPlayerOptimizer):
    r"""Gradient descent of two players, with the drift between them cancelled.

    Player 1 (φ) goes against $\nabla_\phi E_1 + r_s c_{s1} S_1 + r_i c_{i1} I_1$, and so player 2; for the terms and
    their coefficients c see `drift_coefficients`. $r = -1$ cancels a drift term, 0 leaves it, +1 doubles it.
    In a zero-sum game, cancelling the interaction adds $\frac{a}{4}\|\nabla_\theta E\|^2$ to the loss of φ and
    $\frac{b}{4}\|\nabla_\phi E\|^2$ to that of θ, and keeps simultaneous play from spiralling outwards.

    The coefficients follow the present learning rates, so schedulers work. They are derived for plain gradient
    descent; under other optimizers they are a regulariser of that size. One double-backward per player and step; where
    an operation has no second derivative, a finite difference takes its place, with one warning.

    Args:
        first: player 1: a module, parameters or groups (SGD moves them), or an optimizer.
        second: player 2.
        lr: a, or (a, b); None if both players are optimizers.
        scheme: "simultaneous", or "alternating": player 1 moves first, and player 2 answers at the new place.
        cancel: "interaction", "self", "all" or "none".
        multipliers: r, overrides `cancel`: "self" and "interaction", each a number or one for each player.
        inner: (m, k), alternating only: player 1 takes m steps of a/m, then player 2 k steps of b/k.
        estimator: "same": all factors from the whole batch, biased under sampling noise. "split": the differentiated
            factor from the first half of the batch and the fixed one from the second, unbiased; needs `batch`.
        convention: "paper" or "single_clock", see `drift_coefficients`. Only the second one can cancel the drift of
            many steps where a and b differ, or be used with several learning rates in one player.
        momentum: of SGD.
        weight_decay: of SGD.
        nonfinite: "raise" at, "skip", or "ignore" gradients or losses with NaN or infinity, player by player.

    Raises:
        TypeError: parameters that are not real; other arguments of the wrong kind.
        ValueError: a setting out of its range, parameters in both players, several learning rates in one player.
        RuntimeError: from `step`: one loss does not depend on the other player, though its interaction term is asked
            for.

    Source:
        Rosca, Wu, Dherin and Barrett 2021, arXiv 2105.13922.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
        >>> optimizer = GameOptimizer(generator, critic, lr=(0.01, 0.005))
        >>> def closure(batch):
        ...     noise, real = batch
        ...     fake = critic(generator(noise))
        ...     return -fake.mean(), nn.functional.softplus(fake).mean() + nn.functional.softplus(-critic(real)).mean()
        >>> losses = optimizer.step(closure, (torch.randn(8, 2), torch.randn(8, 3)))
    """

    def __init__(
        self,
        first: Player,
        second: Player,
        lr: float | Tensor | Sequence[float | Tensor] | None = None,
        *,
        scheme: Scheme = "simultaneous",
        cancel: Cancel = "interaction",
        multipliers: Mapping[str, float | Sequence[float]] | None = None,
        inner: tuple[int, int] = (1, 1),
        estimator: Estimator = "same",
        convention: Convention = "paper",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        check_scheme(scheme, inner, convention)
        check_choice("cancel", cancel, Cancel)
        check_choice("estimator", estimator, Estimator)
        self_, interaction = _CANCELLED[cancel]
        chosen = {"self": (self_, self_), "interaction": (interaction, interaction)}
        for key, value in (multipliers or {}).items():
            if key not in chosen:
                raise ValueError(f"multipliers must have the keys 'self' and 'interaction', got {key!r}")
            pair = tuple(value) if isinstance(value, Sequence) else (value, value)
            check_pair(f"multipliers[{key!r}]", pair)
            for number in pair:
                if isinstance(number, bool) or not isinstance(number, Real) or not abs(number) < float("inf"):
                    raise ValueError(f"multipliers[{key!r}] must be finite numbers, got {value!r}")
            chosen[key] = (float(pair[0]), float(pair[1]))
        super().__init__(first, second, lr, momentum=momentum, weight_decay=weight_decay, nonfinite=nonfinite)
        self.scheme: Scheme = scheme
        self.convention: Convention = convention
        self.estimator: Estimator = estimator
        self.inner = (inner[0], inner[1])
        self.multipliers = chosen
        self.differences: bool | None = None
        self._one_rate()

    def _one_rate(self) -> None:
        if self.convention == "paper" and any(any(value) for value in self.multipliers.values()):
            for name, rates in zip(self.parts, self._rates(), strict=True):
                if len({id(rate) if isinstance(rate, Tensor) else rate for rate in rates}) > 1:
                    raise ValueError(
                        f"lr of the {name} player has several values, for which convention='paper' has no "
                        "coefficients; use convention='single_clock'"
                    )

    def _factors(self, player: int) -> tuple[list[Any] | None, list[Any] | None]:
        """What stands at each own and each opposite gradient of a player's drift; None: the term is left out."""
        r_self, r_cross = self.multipliers["self"][player], self.multipliers["interaction"][player]
        rates = self._rates()
        own, other = rates[player], rates[1 - player]
        if not own:
            return None, None
        at_self = [r_self * rate / (2 * self.inner[player]) for rate in own] if r_self else None
        if not r_cross or not other:
            return at_self, None
        late = self.scheme == "alternating" and player == 1
        if self.convention == "single_clock":
            cross = [(-r_cross if late else r_cross) * rate / 2 for rate in other]
        else:
            rate = own[0] / 2 - other[0] if late else own[0] / 2
            cross = [r_cross * rate] * len(other)
        return at_self, cross

    def _play(self, evaluate: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Tensor]:
        self._one_rate()
        if self.estimator == "split" and batch is None:
            raise ValueError("batch must be given for estimator='split', which halves it: step(closure, batch)")
        evaluate = self._signed(evaluate)
        if self.scheme == "simultaneous":
            return self._turn((0, 1), evaluate, batch)
        losses = []
        for player, count in enumerate(self.inner):
            losses += [self._turn((player,), evaluate, batch, 1 / count) for _ in range(count)]
        return losses[0]

    def _turn(
        self, moving: tuple[int, ...], evaluate: Callable[[Any], Any], batch: Any, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Move these players once, at this share of their learning rates."""
        factors = {player: self._factors(player) for player in moving}
        terms = any(term is not None for pair in factors.values() for term in pair)
        split = terms and self.estimator == "split"
        at = Evaluation(
            evaluate, batch, self._players(), split=split, modules=self.modules, differences=self.differences
        )
        for player, (own, cross) in factors.items():
            at.prepare(player, own is not None, cross is not None)
        found: dict[int, Found] = {
            player: added(at.own(player), at.correction(player, own, cross)) for player, (own, cross) in factors.items()
        }
        self.differences = at.differences
        result = self._result(at.losses)
        if self._put(found, at.losses):
            for player in moving:
                self._step_part(self._part(player), share)
        return result

    @staticmethod
    def _step_part(part: Optimizer, share: float) -> None:
        rates = [group["lr"] for group in part.param_groups]
        try:
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate if share == 1.0 else rate * share
            part.step()
        finally:
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate
