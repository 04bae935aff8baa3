r"""What two players' gradients miss of the steps they take: the terms of a game's discretisation drift.

Player 1 holds φ and minimises E1, player 2 holds θ and minimises E2. To second order in the rates, a step follows the
flow of the drifted gradients

$$G_1 = \nabla_\phi E_1 + c_{s1} S_1 + c_{i1} I_1, \qquad G_2 = \nabla_\theta E_2 + c_{s2} S_2 + c_{i2} I_2.$$

$S_1 = \nabla^2_{\phi\phi}E_1 \nabla_\phi E_1$ is what a player's own step does to its gradient, and
$I_1 = \nabla^2_{\phi\theta} E_1 \nabla_\theta E_2$ what the other's step does to it; $S_2$ and $I_2$ likewise.
All of a player's terms are one product of the Hessian of its loss with a vector.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Scheme = Literal["simultaneous", "alternating"]
Convention = Literal["paper", "single_clock"]
Losses = tuple[Tensor, Tensor]

_OFFSET = 0.01  # of a finite difference: the distance in parameters


@dataclass(frozen=True)
class DriftCoefficients:
    """The factors of the drift terms, in units of a rate, each for (player 1, player 2).

    Attributes:
        self_: of $S_1$ and $S_2$.
        interaction: of $I_1$ and $I_2$.
    """

    self_: tuple[Any, Any]
    interaction: tuple[Any, Any]


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless `value` is one of the words of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")


def check_pair(name: str, pair: Any) -> None:
    """Raise unless `pair` has two entries."""
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"{name} must be a pair, one for each player; got {pair!r}")


def check_scheme(scheme: Scheme, inner: Sequence[int], convention: Convention) -> None:
    """Raise unless these three name a way to step that has coefficients."""
    check_choice("scheme", scheme, Scheme)
    check_choice("convention", convention, Convention)
    check_pair("inner", inner)
    for steps in inner:
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"inner must hold two whole numbers of at least 1, got {tuple(inner)!r}")
        if steps < 1:
            raise ValueError(f"inner must hold two whole numbers of at least 1, got {tuple(inner)!r}")
    if scheme == "simultaneous" and tuple(inner) != (1, 1):
        raise ValueError(f"inner must be (1, 1) in the simultaneous scheme, got {tuple(inner)!r}")


def drift_coefficients(
    rates: Sequence[float],
    scheme: Scheme = "simultaneous",
    inner: tuple[int, int] = (1, 1),
    convention: Convention = "paper",
) -> DriftCoefficients:
    r"""The coefficients of the drift of gradient descent in a game, right up to third-order local error.

    With rates (a, b) and inner steps (m, k), each of a/m or b/k:

    | scheme | convention | $c_{s1}$ | $c_{i1}$ | $c_{s2}$ | $c_{i2}$ |
    | --- | --- | --- | --- | --- | --- |
    | simultaneous | paper | a/2 | a/2 | b/2 | b/2 |
    | alternating | paper | a/2m | a/2 | b/2k | b/2 - a |
    | simultaneous | single clock | a/2 | b/2 | b/2 | a/2 |
    | alternating | single clock | a/2m | b/2 | b/2k | -a/2 |

    Args:
        rates: (a, b), of player 1 and player 2, positive.
        scheme: "simultaneous", or "alternating": player 1 takes its m steps, then player 2 its k steps.
        inner: (m, k).
        convention: which flow. "paper": $\dot\phi = -G_1, \dot\theta = -G_2$, φ read at time a and θ at time b.
            "single_clock": $\dot\phi = -a G_1, \dot\theta = -b G_2$ for time 1; only this flow can go on over many
            steps. They are the same for a = b.

    Raises:
        TypeError, ValueError: an argument out of its range, or inner steps in the simultaneous scheme.

    Source:
        Rosca, Wu, Dherin and Barrett 2021, arXiv 2105.13922; the single clock: ours.
    """
    check_scheme(scheme, inner, convention)
    check_pair("rates", rates)
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, Real):
            raise TypeError(f"rates must hold two positive numbers, got {tuple(rates)!r}")
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rates must hold two positive numbers, got {tuple(rates)!r}")
    (a, b), (m, k) = rates, inner
    if convention == "paper":
        interaction = (a / 2, b / 2) if scheme == "simultaneous" else (a / 2, b / 2 - a)
    else:
        interaction = (b / 2, a / 2) if scheme == "simultaneous" else (b / 2, -a / 2)
    return DriftCoefficients((a / (2 * m), b / (2 * k)), interaction)


def gradients(loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
    """First derivatives; None where the loss does not depend on a parameter. The graph of the loss stays."""
    if not loss.requires_grad or not parameters:
        return (None,) * len(parameters)
    return torch.autograd.grad(loss, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True)


class NotTwiceDifferentiableError(RuntimeError):
    """A loss has no second derivative in PyTorch."""


def derivative_along(
    derivatives: Sequence[Tensor | None],
    vectors: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """The derivative of `sum <derivative, vector>` with the vectors held fixed: a Hessian-vector product.

    Raises:
        NotTwiceDifferentiableError: an operation of the model has no second derivative in PyTorch.
    """
    pairs = [
        (d, v) for d, v in zip(derivatives, vectors, strict=True) if d is not None and v is not None and d.requires_grad
    ]
    if not pairs or not parameters:
        return (None,) * len(parameters)
    try:
        return torch.autograd.grad(
            [d for d, _ in pairs],
            parameters,
            [(v if create_graph else v.detach()).to(d.dtype) for d, v in pairs],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except (RuntimeError, NotImplementedError) as error:
        if "derivative" not in str(error) and "differentiate twice" not in str(error):
            raise
        raise NotTwiceDifferentiableError(
            f"the loss has no second derivative in PyTorch; PyTorch says: {error}"
        ) from error


def check_twice(derivatives: Sequence[Tensor | None]) -> None:
    """Raise NotTwiceDifferentiableError if a graph has a function marked as differentiable once.

    PyTorch raises only when all leaves are asked for; `torch.autograd.grad` passes it by and returns a wrong result.
    """
    waiting: list[Any] = [d.grad_fn for d in derivatives if d is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            raise NotTwiceDifferentiableError("the loss holds a function that can be differentiated once only")
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        waiting += new


def added(first: Sequence[Tensor | None], second: Sequence[Tensor | None], factor: float = 1.0) -> list[Tensor | None]:
    """`first + factor * second`, with None as zero."""
    found: list[Tensor | None] = []
    for a, b in zip(first, second, strict=True):
        found.append(a if b is None else factor * b if a is None else a + factor * b)
    return found


def scaled(tensors: Sequence[Tensor | None], factors: Sequence[Any]) -> list[Tensor | None]:
    """Each tensor times its factor."""
    return [None if t is None else t * f for t, f in zip(tensors, factors, strict=True)]


def check_losses(losses: Any) -> Losses:
    """The two losses, after a check that they are scalars with a graph."""
    if isinstance(losses, Tensor) or not isinstance(losses, Sequence) or len(losses) != 2:
        raise TypeError(f"closure must return the two losses (E1, E2), got {type(losses).__name__}")
    for number, loss in enumerate(losses, 1):
        if not isinstance(loss, Tensor):
            raise TypeError(f"closure must return tensors, loss {number} is {type(loss).__name__}")
        if loss.is_complex():
            raise TypeError(f"closure must return real losses, loss {number} is {loss.dtype}")
        if loss.numel() != 1:
            raise ValueError(f"closure must return scalars, loss {number} has shape {tuple(loss.shape)}")
    if not any(loss.requires_grad for loss in losses):
        raise RuntimeError(
            "closure must return losses with a graph: do not call backward() or item(), and do not disable gradients"
        )
    return losses[0].reshape(()), losses[1].reshape(())


def halves(batch: Any) -> tuple[Any, Any]:
    """The two halves of a batch: all its tensors, in tuples, lists and mappings, are cut along the first dimension.

    Raises:
        ValueError: fewer than two samples, no tensor, or tensors of different lengths.
    """
    lengths = {len(tensor) for tensor in _tensors(batch)}
    if len(lengths) != 1:
        what = "holds no tensor" if not lengths else f"has tensors of lengths {sorted(lengths)}"
        raise ValueError(f"batch must hold tensors with one sample per row for estimator='split'; it {what}")
    (size,) = lengths
    if size < 2:
        raise ValueError(f"batch must have at least two samples for estimator='split', got {size}")
    return _cut(batch, slice(None, size // 2)), _cut(batch, slice(size // 2, None))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)


def _cut(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _cut(part, rows) for key, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(part, rows) for part in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_cut(part, rows) for part in batch)
    return batch


@contextmanager
def kept_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modules' buffers back afterwards, unseen by autograd, which may have saved them for a backward pass."""
    before = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)


class Evaluation:
    """The derivatives that the drift terms need, for one batch, at the present parameters.

    Args:
        evaluate: gives the two losses of a batch.
        batch: the batch.
        players: the parameters of player 1 and of player 2.
        split: the differentiated factor from the first half of the batch, the other from the second; the gradients
            themselves are always of the whole batch.
        modules: their buffers do not change in the passes of the halves.
        differences: True: finite differences in the place of second derivatives; None: find out, see `differences`.

    Attributes:
        differences: whether a second derivative is missing, so that finite differences are taken; None: not known yet.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], Any],
        batch: Any,
        players: tuple[Sequence[Tensor], Sequence[Tensor]],
        *,
        split: bool = False,
        modules: Sequence[nn.Module] = (),
        differences: bool | None = None,
    ) -> None:
        self.players = players
        self.differences = differences
        self._evaluate, self._modules = evaluate, modules
        parts = halves(batch) if split else ()
        with torch.enable_grad():
            self.losses = check_losses(evaluate(batch))
            self._first = self._second = self.losses
            if parts:
                with kept_buffers(modules):
                    self._first, self._second = (check_losses(evaluate(part)) for part in parts)
        self._split = split
        self._part = parts[0] if parts else batch
        self._known: dict[tuple[int, str], tuple[Tensor | None, ...]] = {}

    def own(self, player: int) -> tuple[Tensor | None, ...]:
        """The gradient of a player's loss in its own parameters, on the whole batch."""
        return self._get(player, "whole")

    def prepare(self, player: int, own: bool, cross: bool) -> None:
        """Differentiate a player's loss once for all terms, before `own` does it without a graph."""
        if not own and not cross:
            return
        other = 1 - player
        wanted = [*(self.players[player] if own or not self._split else ()), *(self.players[other] if cross else ())]
        found = gradients(self._first[player], wanted, create_graph=True)
        count = len(wanted) - (len(self.players[other]) if cross else 0)
        self._known[player, "own"], self._known[player, "cross"] = found[:count], found[count:]
        if not self._split:
            self._known[player, "whole"] = tuple(None if g is None else g.detach() for g in found[:count])
        if cross and all(gradient is None for gradient in found[count:]):
            raise RuntimeError(
                f"loss {player + 1} does not depend on the parameters of player {other + 1}, so its interaction term "
                "cannot be computed; remove detach() and no_grad() between the players (a player's own step changes "
                "only its own parameters anyway), or set its interaction multiplier to 0"
            )

    def other(self, player: int) -> tuple[Tensor | None, ...]:
        """The factor that is held fixed: the gradient of a player's loss in its own parameters."""
        return self._get(player, "fixed") if self._split else self.own(player)

    def _get(self, player: int, kind: str) -> tuple[Tensor | None, ...]:
        if (player, kind) not in self._known:
            loss = (self.losses if kind == "whole" else self._second)[player]
            self._known[player, kind] = gradients(loss, self.players[player])
        return self._known[player, kind]

    def correction(
        self, player: int, own: Sequence[Any] | None, cross: Sequence[Any] | None
    ) -> tuple[Tensor | None, ...]:
        """`own * S + cross * I` of a player; the factors stand at each tensor of the vector, None leaves a term out.

        Where there is no second derivative it is a difference of two gradients, after one warning.
        """
        derivatives: list[Tensor | None] = []
        vectors: list[Tensor | None] = []
        places: list[Tensor] = []
        for name, factors, whose in (("own", own, player), ("cross", cross, 1 - player)):
            if factors is not None:
                derivatives += self._known[player, name]
                vectors += scaled(self.other(whose), factors)
                places += self.players[whose]
        if not self.differences:
            try:
                if self.differences is None:
                    check_twice(derivatives)
                    self.differences = False
                return derivative_along(derivatives, vectors, self.players[player])
            except NotTwiceDifferentiableError as error:
                warnings.warn(f"{error}; the drift is a finite difference instead", UserWarning, stacklevel=6)
                self.differences = True
        return self._difference(player, places, vectors)

    def _difference(
        self, player: int, places: Sequence[Tensor], vectors: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """The central difference of a player's gradient along the vectors, with equal random numbers on both sides."""
        moves = [(p, v.detach().to(p.dtype)) for p, v in zip(places, vectors, strict=True) if v is not None]
        length = float(torch.stack([v.float().square().sum().cpu() for _, v in moves]).sum().sqrt()) if moves else 0.0
        if not 0 < length < math.inf:
            return (None,) * len(self.players[player])
        before = [p.detach().clone() for p, _ in moves]
        devices = {p.device for p, _ in moves if p.device.type != "cpu"}
        ends = []
        try:
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    for (p, v), value in zip(moves, before, strict=True):
                        p.data.copy_(value + sign * _OFFSET / length * v)  # unseen by the graphs in use
                with torch.random.fork_rng(devices), kept_buffers(self._modules), torch.enable_grad():
                    loss = check_losses(self._evaluate(self._part))[player]
                    ends.append(gradients(loss, self.players[player]))
        finally:
            with torch.no_grad():
                for (p, _), value in zip(moves, before, strict=True):
                    p.data.copy_(value)
        found = added(ends[0], ends[1], -1.0)
        return tuple(scaled(found, [length / (2 * _OFFSET)] * len(found)))
