r"""Which layers a step moves: random sets of layers, their probabilities, and what they cost.

Layers are numbered from 0 (next to the input) to b - 1. A *suffix* {s, ..., b - 1} is the set for which a network
saves most: backpropagation ends at layer s. With $P(s)$ the probability of the start s, layer i is moved with
probability $p_i = P(s \le i)$, which does not decrease with i, and $p_{b-1} = 1$.

Source: Gruntkowska, Maziane, Qu and Richtarik 2025, arXiv 2510.02239 (randomised progressive training).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int

_TOLERANCE = 1e-6


class LayerSampler(ABC):
    """Draws the layers that a step moves."""

    @abstractmethod
    def draw(self, layers: int, step: int, generator: torch.Generator) -> tuple[int, ...]:
        """The layers that step number `step` (from 0) moves: distinct numbers below `layers`, at least one."""

    @abstractmethod
    def update_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        """The probability $p_i$ that step number `step` moves layer i."""

    def expected_layers(self, layers: int, step: int = 0) -> float:
        """How many layers a step moves on average."""
        return float(self.update_probabilities(layers, step).sum())


class SuffixSampler(LayerSampler):
    """Moves layer s and all after it, with a random s."""

    @abstractmethod
    def start_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        """The probability P(s) of each start."""

    def draw(self, layers: int, step: int, generator: torch.Generator) -> tuple[int, ...]:
        """A suffix of the layers."""
        starts = self.start_probabilities(layers, step)
        start = int(torch.multinomial(starts, 1, generator=generator))
        return tuple(range(start, layers))

    def update_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        r"""$p_i = P(s \le i)$."""
        return self.start_probabilities(layers, step).cumsum(0)


@dataclass(frozen=True)
class Full(SuffixSampler):
    """All layers at every step: the method without dropping."""

    def start_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        starts = torch.zeros(_number_of(layers), dtype=torch.float64)
        starts[0] = 1.0
        return starts


@dataclass(frozen=True)
class Uniform(SuffixSampler):
    """Every start equally likely, P(s) = 1/b; (b + 1)/2 layers move on average."""

    def start_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        return torch.full((_number_of(layers),), 1 / layers, dtype=torch.float64)


@dataclass(frozen=True)
class EpochShift(SuffixSampler):
    r"""Full updates first, only late layers at the end.

    In epoch e of E, $P(s) \propto \exp(\alpha [(1 - e/E)(b - 1 - s) + (e/E) s])$; uniform at e = E/2.

    Args:
        epochs: E, over which the shift happens; later epochs are as epoch E.
        steps_per_epoch: how many steps make an epoch. Without epochs: 1, and `epochs` counts steps.
        alpha: sharpness; 0 is `Uniform`.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int
    steps_per_epoch: int = 1
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_int("epochs", self.epochs)
        check_int("steps_per_epoch", self.steps_per_epoch)
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be a finite number, at least 0; got {self.alpha!r}")

    def start_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        starts = torch.arange(_number_of(layers), dtype=torch.float64)
        progress = min(step // self.steps_per_epoch / self.epochs, 1.0)
        return (self.alpha * ((1 - progress) * (layers - 1 - starts) + progress * starts)).softmax(0)


@dataclass(frozen=True)
class DeepBiased(SuffixSampler):
    r"""Late starts more likely, $P(s) \propto (s + 1)^{power}$. The paper finds that a fixed bias hurts.

    Raises:
        ValueError: `power` is negative or not finite.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power >= 0):
            raise ValueError(f"power must be a finite number, at least 0; got {self.power!r}")

    def start_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        weights = (torch.arange(1, _number_of(layers) + 1, dtype=torch.float64) / layers) ** self.power
        return weights / weights.sum()


@dataclass(frozen=True, init=False)
class Starts(SuffixSampler):
    """Starts with given probabilities, one per layer.

    Raises:
        ValueError: they are negative or do not sum to one (within 1e-6), or there is not one for each layer.
    """

    probabilities: tuple[float, ...]

    def __init__(self, probabilities: Sequence[float] | Float[Tensor, "layers"]) -> None:
        object.__setattr__(self, "probabilities", _distribution("probabilities", probabilities))

    def start_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        if len(self.probabilities) != layers:
            raise ValueError(
                f"probabilities must be one per layer, got {len(self.probabilities)} for {layers} layers: "
                f"{self.probabilities}"
            )
        return torch.tensor(self.probabilities, dtype=torch.float64)


@dataclass(frozen=True, init=False)
class Optimal(Starts):
    r"""The starts with the least guaranteed cost, see `optimal_update_probabilities`.

    Args:
        smoothness: the constant $L_i$ of each layer, as `layer_smoothness` estimates them.

    Raises:
        ValueError: a constant is not positive.
    """

    def __init__(self, smoothness: Sequence[float] | Float[Tensor, "layers"]) -> None:
        super().__init__(start_probabilities(optimal_update_probabilities(smoothness)))


@dataclass(frozen=True, init=False)
class Subsets(LayerSampler):
    """One of given sets of layers, each with its probability. Sets that are no suffixes save little.

    Args:
        sets: sets of layer numbers, counted from 0; none empty.
        probabilities: one per set; None: all equally likely.

    Raises:
        ValueError: an empty or repeated set, a number that is no layer, or probabilities that are not one per set,
            negative, or do not sum to one.
    """

    sets: tuple[tuple[int, ...], ...]
    probabilities: tuple[float, ...]

    def __init__(self, sets: Sequence[Sequence[int]], probabilities: Sequence[float] | None = None) -> None:
        chosen = tuple(tuple(sorted(set(each))) for each in sets)
        if not chosen or not all(chosen) or any(each[0] < 0 for each in chosen):
            raise ValueError(f"sets must hold at least one set, and each a layer number from 0 on; got {sets!r}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"sets must be distinct, got {sets!r}")
        given = [1 / len(chosen)] * len(chosen) if probabilities is None else probabilities
        object.__setattr__(self, "sets", chosen)
        object.__setattr__(self, "probabilities", _distribution("probabilities", given))
        if len(self.probabilities) != len(chosen):
            raise ValueError(f"probabilities must be one per set, got {len(self.probabilities)} for {len(chosen)} sets")

    def draw(self, layers: int, step: int, generator: torch.Generator) -> tuple[int, ...]:
        self._check(layers)
        weights = torch.tensor(self.probabilities, dtype=torch.float64)
        return self.sets[int(torch.multinomial(weights, 1, generator=generator))]

    def update_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        self._check(layers)
        found = torch.zeros(layers, dtype=torch.float64)
        for members, probability in zip(self.sets, self.probabilities, strict=True):
            found[list(members)] += probability
        return found

    def _check(self, layers: int) -> None:
        largest = max(max(each) for each in self.sets)
        if largest >= _number_of(layers):
            raise ValueError(f"sets must hold numbers below the {layers} layers, got {largest}")


@dataclass(frozen=True)
class RandomCount(LayerSampler):
    """A fixed number of layers, every choice equally likely (the block-coordinate baseline).

    Raises:
        ValueError: `count` is below 1 or above the number of layers.
    """

    count: int = 1

    def __post_init__(self) -> None:
        check_int("count", self.count)

    def draw(self, layers: int, step: int, generator: torch.Generator) -> tuple[int, ...]:
        self.update_probabilities(layers)
        return tuple(sorted(torch.randperm(layers, generator=generator)[: self.count].tolist()))

    def update_probabilities(self, layers: int, step: int = 0) -> Float[Tensor, "layers"]:
        if self.count > _number_of(layers):
            raise ValueError(f"count must be at most the {layers} layers, got {self.count}")
        return torch.full((layers,), self.count / layers, dtype=torch.float64)


SAMPLERS: Mapping[str, type[LayerSampler]] = MappingProxyType(
    {"full": Full, "uniform": Uniform, "deep_biased": DeepBiased, "one": RandomCount}
)
"""The samplers that a name is enough for."""


def get_sampler(sampler: "str | LayerSampler | Sequence[float] | Tensor") -> LayerSampler:
    """A sampler from its name (`SAMPLERS`), from probabilities of the starts, or as it is.

    Raises:
        ValueError: an unknown name, or probabilities that are none.
        TypeError: something else.
    """
    if isinstance(sampler, LayerSampler):
        return sampler
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(
                f"sampler: no sampler {sampler!r}; the names are {', '.join(SAMPLERS)}; EpochShift, Optimal, Starts "
                "and Subsets are given as objects"
            )
        return SAMPLERS[sampler]()
    if isinstance(sampler, Sequence | Tensor):
        return Starts(sampler)
    raise TypeError(f"sampler must be a LayerSampler, a name, or probabilities; got {type(sampler).__name__}")


def start_probabilities(update: Float[Tensor, "layers"]) -> Float[Tensor, "layers"]:
    """P(s) of the suffixes that move layer i with probability `update[i]`: the increments of `update`.

    Raises:
        ValueError: `update` decreases somewhere, leaves [0, 1], or does not end at one.
    """
    update = torch.as_tensor(update, dtype=torch.float64)
    starts = update.diff(prepend=update.new_zeros(1))
    if not bool((starts >= 0).all()) or abs(float(update[-1]) - 1) > _TOLERANCE:
        raise ValueError(f"update must not decrease, start at 0 or above and end at 1; got {update.tolist()}")
    return starts


def optimal_update_probabilities(
    smoothness: Sequence[float] | Float[Tensor, "layers"],
) -> Float[Tensor, "layers"]:
    r"""$p_i = \max_{j \le i} L_j / \max_j L_j$: no other suffixes have a smaller `guaranteed_cost`, whatever the costs.

    For $T = \max_i L_i / p_i$ the smallest p that does not decrease is $p_i = \max_{j \le i} L_j / T$, so the cost is
    $c_f T + \sum_i c_i \max_{j \le i} L_j$, least at the smallest T, which is $\max_j L_j$. Moving all layers at every
    step is optimal exactly when the first layer has the largest constant.

    Args:
        smoothness: $L_i > 0$, one per layer.

    Raises:
        ValueError: a constant is not positive and finite, or there is none.
    """
    constants = _vector("smoothness", smoothness)
    if not bool((constants > 0).all()):
        raise ValueError(f"smoothness must be positive, got {constants.tolist()}")
    return constants.cummax(0).values / constants.max()


def expected_cost(
    update: Float[Tensor, "*batch layers"], layer_costs: Sequence[float] | Tensor, forward_cost: float
) -> Float[Tensor, "*batch"]:
    r"""The mean cost of a step, $c_f + \sum_i p_i c_i$.

    Args:
        update: $p_i$.
        layer_costs: $c_i$, of the backward pass and the update of layer i, in any unit.
        forward_cost: $c_f$, of the forward pass of all layers, in the same unit.

    Raises:
        ValueError: a cost is negative, or there is not one per layer.
    """
    costs = _vector("layer_costs", layer_costs)
    if not bool((costs >= 0).all()) or not (math.isfinite(forward_cost) and forward_cost >= 0):
        raise ValueError(f"costs must be at least 0, got {costs.tolist()} and forward_cost {forward_cost}")
    if update.shape[-1] != len(costs):
        raise ValueError(f"layer_costs must be one per layer, got {len(costs)} for {update.shape[-1]} layers")
    return forward_cost + update.double() @ costs


def guaranteed_cost(
    update: Float[Tensor, "*batch layers"],
    smoothness: Sequence[float] | Tensor,
    layer_costs: Sequence[float] | Tensor,
    forward_cost: float,
) -> Float[Tensor, "*batch"]:
    r"""The cost, up to a common factor, after which the theory guarantees small gradients in all layers.

    $$(c_f + \sum_i p_i c_i) \max_i L_i / p_i,$$ the cost of a step times the number of steps that the bound needs.
    It is a worst case: on an actual problem moving all layers may be cheaper.

    Args:
        update: $p_i > 0$.
        smoothness: $L_i$ of each layer.
        layer_costs: see `expected_cost`.
        forward_cost: see `expected_cost`.
    """
    steps = (_vector("smoothness", smoothness) / update.double()).amax(-1)
    return expected_cost(update, layer_costs, forward_cost) * steps


def _number_of(layers: int) -> int:
    check_int("layers", layers)
    return layers


def _vector(name: str, values: Sequence[float] | Tensor) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64)
    if vector.ndim != 1 or not len(vector) or not bool(vector.isfinite().all()):
        raise ValueError(f"{name} must be one finite number per layer, got {values!r}")
    return vector.detach().cpu()


def _distribution(name: str, values: Sequence[float] | Tensor) -> tuple[float, ...]:
    vector = _vector(name, values)
    if bool((vector < 0).any()):
        raise ValueError(f"{name} must not be negative, got {vector.tolist()}")
    if abs(float(vector.sum()) - 1) > _TOLERANCE:
        raise ValueError(f"{name} must sum to 1, got {vector.tolist()}, which sum to {float(vector.sum()):g}")
    return tuple(vector.tolist())
