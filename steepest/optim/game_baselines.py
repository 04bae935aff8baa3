"""Other optimizers of two-player games: symplectic adjustment, consensus, Runge-Kutta."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.optim.checks import NonFinite, check_number
from steepest.optim.game_terms import Evaluation, added, check_twice, derivative_along, gradients, scaled
from steepest.optim.games import Found, Player, TwoPlayerOptimizer


class SGA(TwoPlayerOptimizer):
    r"""Symplectic gradient adjustment: $\xi + \lambda A^\top \xi$ of both players at once.

    $\xi = (\nabla_\phi E_1, \nabla_\theta E_2)$, $J = \partial\xi$ and $A = (J - J^\top)/2$. For equal rates in a
    zero-sum game it is `GameOptimizer` with $\lambda = lr/2$.

    Args:
        first: see `GameOptimizer`.
        second: see `GameOptimizer`.
        lr: see `GameOptimizer`.
        strength: $\lambda$.
        align: choose the sign of $\lambda$ so that the adjustment goes towards stable and away from unstable fixed
            points: the sign of $\langle\xi, J^\top\xi\rangle \langle A^\top\xi, J^\top\xi\rangle / d + 1/10$.
        momentum: of SGD.
        weight_decay: of SGD.
        nonfinite: see `GameOptimizer`.

    Source:
        Balduzzi, Racaniere, Martens, Foerster, Tuyls and Graepel 2018, arXiv 1802.05642.
    """

    def __init__(
        self,
        first: Player,
        second: Player,
        lr: float | Tensor | Sequence[float | Tensor] | None = None,
        *,
        strength: float = 1.0,
        align: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        check_number(strength, "strength")
        super().__init__(first, second, lr, momentum=momentum, weight_decay=weight_decay, nonfinite=nonfinite)
        self.strength, self.align = float(strength), bool(align)

    def _play(self, evaluate: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Tensor]:
        players = self._players()
        at = Evaluation(self._signed(evaluate), batch, players)
        everything = [*players[0], *players[1]]
        count = len(players[0])
        full = [gradients(loss, everything, create_graph=True) for loss in at.losses]
        check_twice([*full[0], *full[1]])
        ours = [full[0][:count], full[1][count:]]
        xi = [*ours[0], *ours[1]]
        transposed = derivative_along(xi, xi, everything)
        forward = [
            *derivative_along(full[0], xi, everything)[:count],
            *derivative_along(full[1], xi, everything)[count:],
        ]
        turn = scaled(added(transposed, forward, -1.0), [0.5] * len(xi))
        strength: Any = self.strength
        if self.align:
            size = sum(parameter.numel() for parameter in everything)
            strength = strength * torch.sign(_dot(xi, transposed) * _dot(turn, transposed) / size + 0.1)
        moved = added(_detached(xi), scaled(turn, [strength] * len(xi)))
        result = self._result(at.losses)
        self._move({0: moved[:count], 1: moved[count:]}, at.losses)
        return result


class Consensus(TwoPlayerOptimizer):
    r"""Consensus optimisation: $\xi + \gamma \nabla \frac12\|\xi\|^2$, which both players lower together.

    Args:
        first: see `GameOptimizer`.
        second: see `GameOptimizer`.
        lr: see `GameOptimizer`.
        strength: $\gamma$.
        momentum: of SGD.
        weight_decay: of SGD.
        nonfinite: see `GameOptimizer`.

    Source:
        Mescheder, Nowozin and Geiger 2017, arXiv 1705.10461.
    """

    def __init__(
        self,
        first: Player,
        second: Player,
        lr: float | Tensor | Sequence[float | Tensor] | None = None,
        *,
        strength: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        check_number(strength, "strength")
        super().__init__(first, second, lr, momentum=momentum, weight_decay=weight_decay, nonfinite=nonfinite)
        self.strength = float(strength)

    def _play(self, evaluate: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Tensor]:
        players = self._players()
        at = Evaluation(self._signed(evaluate), batch, players)
        count = len(players[0])
        xi = [
            *gradients(at.losses[0], players[0], create_graph=True),
            *gradients(at.losses[1], players[1], create_graph=True),
        ]
        check_twice(xi)
        pull = derivative_along(xi, xi, [*players[0], *players[1]])
        moved = added(_detached(xi), pull, self.strength)
        result = self._result(at.losses)
        self._move({0: moved[:count], 1: moved[count:]}, at.losses)
        return result


class RungeKutta(TwoPlayerOptimizer):
    r"""Runge-Kutta steps along the flow $\dot\phi = -a\nabla_\phi E_1, \dot\theta = -b\nabla_\theta E_2$.

    Order 2 averages the gradients of two places with weights (1/2, 1/2), order 4 of four with (1/6, 1/3, 1/3, 1/6). All
    stages use the same batch; random numbers that the closure draws differ between the stages.

    Args:
        first: a module, parameters or groups of them.
        second: the same.
        lr: a, or (a, b).
        order: 2 or 4; the closure is called as often.
        nonfinite: see `GameOptimizer`.

    Source:
        Qin, Wu, Springenberg, Brock, Donahue, Lillicrap and Kohli 2020, arXiv 2010.15040 (ODE-GAN).
    """

    def __init__(
        self,
        first: nn.Module | Iterable[Any],
        second: nn.Module | Iterable[Any],
        lr: float | Tensor | Sequence[float | Tensor],
        *,
        order: Literal[2, 4] = 4,
        nonfinite: NonFinite = "raise",
    ) -> None:
        if order not in (2, 4):
            raise ValueError(f"order must be 2 or 4, got {order!r}")
        for name, player in (("first", first), ("second", second)):
            if isinstance(player, Optimizer):
                raise TypeError(f"{name} must be a module or parameters; a Runge-Kutta step has no other optimizer")
        super().__init__(first, second, lr, nonfinite=nonfinite)
        self.order = order

    def _play(self, evaluate: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Tensor]:
        evaluate, players, rates = self._signed(evaluate), self._players(), self._rates()
        everything, steps = [*players[0], *players[1]], [*rates[0], *rates[1]]
        places, weights = ((0.0, 1.0), (0.5, 0.5)) if self.order == 2 else ((0.0, 0.5, 0.5, 1.0), (1.0, 2.0, 2.0, 1.0))
        start = [parameter.detach().clone() for parameter in everything]
        total: Found = [None] * len(everything)
        stage: Found = list(total)
        losses: Any = None
        try:
            for place, weight in zip(places, weights, strict=True):
                if place:
                    with torch.no_grad():
                        for parameter, value, slope, lr in zip(everything, start, stage, steps, strict=True):
                            parameter.copy_(value if slope is None else value - place * lr * slope)
                at = Evaluation(evaluate, batch, players)
                stage = [*at.own(0), *at.own(1)]
                total = added(total, stage, weight / sum(weights))
                losses = losses if losses is not None else at.losses
        finally:
            with torch.no_grad():
                for parameter, value in zip(everything, start, strict=True):
                    parameter.copy_(value)
        result = self._result(losses)
        count = len(players[0])
        self._move({0: total[:count], 1: total[count:]}, losses)
        return result


def _dot(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Any:
    products = [(a * b).sum() for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return cast(Any, sum(products))


def _detached(tensors: Sequence[Tensor | None]) -> Found:
    return [None if tensor is None else tensor.detach() for tensor in tensors]
