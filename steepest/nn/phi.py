"""Balancing of the expected routing by a convex potential: a price for each expert."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from steepest.geometry.mirror import EuclideanMap, LogBarrierMap, MirrorMap, NegentropyMap, PowerMap
from steepest.nn.balancing import StatefulBalancer, check_real, needed, recomputing, zero

FLOOR = 1e-12
POTENTIALS: Mapping[str, MirrorMap] = MappingProxyType(
    {
        "neg_entropy": NegentropyMap(),
        "euclidean": EuclideanMap(),
        "power": PowerMap(1.5),
        "log_barrier": LogBarrierMap(),
    }
)
"""The potentials by name. `PowerMap(alpha)` gives other powers."""


class PhiBalancer(StatefulBalancer):
    r"""Minimises a convex potential $\varphi$ of the *expected* routing $\bar p = E_x[p(x)]$, not of each mini-batch's.

    By duality $\varphi(\bar p) = \max_q \langle \bar p, q \rangle - \varphi^*(q)$, which is linear in the routing, and
    mirror ascent in $q$ is an average: with the batch mean $p_t$ of the probabilities,

    $$m \leftarrow (1 - \eta) m + \eta\, p_t, \qquad q = \nabla\varphi(m), \qquad
    \text{loss} = \lambda \langle p_t, q \rangle,$$

    where the gradient flows through $p_t$ only. An expert that is used too much has a high price, and so loses
    probability. It controls the mean probability: the load after top-k can stay uneven while that is nearly even.

    Near balance the entropy's price differs between experts by the relative excess of their use, as does the Switch
    loss's `E f`: the same coefficient then pulls equally hard. With `scale="E"` that is so for the Euclidean potential.

    Source: Chen et al. 2026, arXiv 2605.15403, algorithm 1. `debias`, `selection`, `hard`, and the potentials beyond
    the first two are ours.

    Args:
        experts: Number of experts E, at least 2.
        momentum: Weight of the past in m, in [0, 1): 1 - eta of the paper.
        potential: A name in `POTENTIALS`, a `MirrorMap`, or a function from m to its price. It must treat all experts
            alike.
        coefficient: The paper's lambda, at least 0; 0.01 if None, or 0 where `selection` is above 0.
        debias: Whether m is divided by the weight of what it has seen, since it starts at zero. For the entropy this
            changes nothing; for the others it removes a factor of about eta t in the first steps.
        scale: "none", or "E" to multiply the loss and the selection bias by the number of experts.
        centred: Whether the mean price is taken off the loss: the same gradient, and a value that is 0 at balance.
        selection: Strength of a bias `-selection * (q - mean(q))` on the scores that choose the experts.
        hard: Whether m averages the loads after top-k in place of the probabilities.
        accumulation: Micro-batches for each optimizer step. m is updated by each one with momentum^(1/accumulation), so
            that its memory, counted in steps, stays the same.
        sync: Whether p_t is pooled over the data-parallel ranks (sums and counts), so that all have one price.
        process_group: The ranks; the default group if None.

    Attributes:
        average: (experts,) m, in float32 or better, starting at zero.
        weight: The weight of what m has seen: 1 - momentum^t after t steps.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: `potential` is of another type.

    Examples:
        >>> balancer = PhiBalancer(4, coefficient=1.0)
        >>> probabilities = torch.randn(32, 4).softmax(-1).requires_grad_()
        >>> balancer(probabilities).backward()
    """

    average: Tensor
    weight: Tensor

    def __init__(
        self,
        experts: int,
        momentum: float = 0.99,
        potential: str | MirrorMap | Callable[[Tensor], Tensor] = "neg_entropy",
        *,
        coefficient: float | None = None,
        debias: bool = True,
        scale: str = "none",
        centred: bool = False,
        selection: float = 0.0,
        hard: bool = False,
        accumulation: int = 1,
        sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(experts, accumulation=accumulation, sync=sync, process_group=process_group)
        self.momentum = check_real("momentum", momentum, below=1.0)
        self.selection = check_real("selection", selection)
        default = 0.0 if self.selection else 0.01
        self.coefficient = default if coefficient is None else check_real("coefficient", coefficient)
        if scale not in ("none", "E"):
            raise ValueError(f'scale must be "none" or "E", got {scale!r}')
        self.gradient = _gradient(potential, experts)
        self.debias = debias
        self.scale = scale
        self.centred = centred
        self.hard = hard
        self._state("average", experts)
        self._state("weight")

    @property
    def active(self) -> bool:
        """Whether the loss or the selection bias is on."""
        return self.coefficient > 0 or self.selection > 0

    def mean_routing(self) -> Float[Tensor, "experts"]:
        """The estimate of the expected routing that sets the price: m, debiased if asked for."""
        if not self.debias:
            return self.average.clone()
        return self.average / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)

    def price(self, centred: bool = False) -> Float[Tensor, "experts"]:
        """The price q of each expert, without gradient; entries of m below 1e-12 count as 1e-12.

        Args:
            centred: Whether to take off the mean over experts.
        """
        with torch.no_grad():
            q = self.gradient(self.mean_routing().clamp_min(FLOOR))
        return q - q.mean() if centred else q

    def selection_bias(self, strength: float | None = None) -> Float[Tensor, "experts"] | None:
        """`-strength * (q - mean(q))`, times E with `scale="E"`.

        Args:
            strength: `selection` if None.

        Returns:
            The bias; None if its strength is 0.
        """
        strength = self.selection if strength is None else check_real("strength", strength)
        return -strength * self._factor * self.price(centred=True) if strength else None

    def forward(
        self,
        probabilities: Float[Tensor, "*tokens experts"],
        load: Float[Tensor, "experts"] | None = None,
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """Update m (while training), and give `coefficient * <p_t, q>` with the new price.

        With several ranks, the average of the returned losses over ranks is the loss of all their tokens.

        Args:
            probabilities: The softmax over all experts, before top-k.
            load: The fraction of choices that each expert got; needed with `hard` only.
            mask: True for the tokens that count; all if None. If none counts, m stays, and the loss is 0.

        Returns:
            The loss.

        Raises:
            ValueError: the probabilities are not a softmax over `experts`, or `load` is missing with `hard`.
            TypeError: `mask` is not of type bool.
        """
        total, count = self._flat(probabilities, mask, self.experts)
        observed = needed(load, probabilities) * count if self.hard else total.detach()
        if self.training and not recomputing():
            self._observe(observed, count)
        if not self.coefficient:
            return zero(probabilities)
        mean = self._mean(total, count)
        return self.coefficient * self._factor * (mean * self.price(self.centred).to(mean.dtype)).sum()

    def extra_repr(self) -> str:
        """Shown by `print`."""
        shown = f"experts={self.experts}, momentum={self.momentum:g}, coefficient={self.coefficient:g}"
        return shown + (f", selection={self.selection:g}" if self.selection else "")

    @property
    def _factor(self) -> int:
        return self.experts if self.scale == "E" else 1

    @torch.no_grad()
    def _observe(self, observed: Float[Tensor, "experts"], count: Float[Tensor, ""]) -> None:
        (sums, tokens), ranks = self._pooled(observed.to(self.average.dtype), count.to(self.average.dtype))
        self._per_token = ranks / tokens.clamp_min(1)
        fresh = sums / tokens.clamp_min(1)
        rate = 1 - self.momentum ** (1 / self.accumulation)
        # A batch without tokens, or with a router that has just diverged, must not spoil the state.
        good = (tokens > 0) & fresh.isfinite().all()
        self.average.copy_(torch.where(good, self.average.lerp(fresh, rate), self.average))
        self.weight.copy_(torch.where(good, self.weight + rate * (1 - self.weight), self.weight))


def _gradient(potential: str | MirrorMap | Callable[[Tensor], Tensor], experts: int) -> Callable[[Tensor], Tensor]:
    if isinstance(potential, str):
        if potential not in POTENTIALS:
            raise ValueError(f"potential must be one of {', '.join(POTENTIALS)}, got {potential!r}")
        potential = POTENTIALS[potential]
    if isinstance(potential, MirrorMap):
        return potential.to_dual
    if not callable(potential):
        raise TypeError(f"potential must be a name, a MirrorMap or a function, got {type(potential).__name__}")
    price = potential(torch.full((experts,), 1 / experts))
    if not isinstance(price, Tensor) or price.shape != (experts,) or float(price.max() - price.min()) > 1e-4:
        raise ValueError(f"potential must give one price for each expert, and equal ones for equal use, got {price}")
    return potential
