"""Two relatives of consensus-based optimization on the same swarm: sampling a density, and moment estimates."""

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.gradient_free._swarm_arguments import AlphaRule, check_choice, check_number
from steepest.gradient_free.consensus_based import ConsensusBased
from steepest.gradient_free.search import Objective
from steepest.gradient_free.swarm_step import consensus_step, standard_normal


class ConsensusSampling(ConsensusBased):
    r"""Consensus-based sampling (CBS): the swarm becomes a sample of the density $\propto e^{-E}$, without gradients.

    $x_i \leftarrow x_\alpha + a (x_i - x_\alpha) + \sqrt{(1 - a^2)\,b\,C_\alpha}\;\xi_i$ with $a = e^{-\Delta t}$ and
    $C_\alpha$ the Gibbs-weighted covariance; $b = 1 + \alpha$ to sample, 1 to optimize. For a Gaussian density and
    many particles the swarm's mean and covariance converge to the density's, at any $\alpha$ and $\Delta t$; other
    densities are seen as their Gaussian approximation. With `kernel_width` several modes can be held.

    Args:
        objective: E, points (..., n, d) to values (..., n), or None.
        x0: the swarm at the start, (*batch, n, d).
        alpha: $\alpha$, as for `ConsensusBased`.
        dt: $\Delta t$.
        mode: ``"sample"``, or ``"optimize"``: the covariance shrinks, and the swarm ends at a minimum.
        generator: source of the noise.
        options: further ones of `ConsensusBased`: batches, schedules, kernel.

    Source:
        Carrillo, Hoffmann, Stuart and Vaes 2022, arXiv 2106.02519, equation (1.4).
    """

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "*batch n d"],
        *,
        alpha: AlphaRule = 1.0,
        dt: float = 0.1,
        mode: Literal["sample", "optimize"] = "sample",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        check_choice("mode", mode, ("sample", "optimize"))
        if fixed := {"lam", "sigma", "noise", "noise_after_drift", "memory", "memory_sigma"} & set(options):
            raise TypeError(
                f"consensus-based sampling has no {', '.join(sorted(fixed))}: its drift and noise are fixed"
            )
        dt = check_number("dt", dt, positive=True)
        self.mode = mode
        options |= {"lam": -math.expm1(-dt) / dt, "sigma": 1.0, "noise": "covariance"}
        super().__init__(objective, x0, alpha=alpha, dt=dt, generator=generator, **options)

    def _noise_scale(self, alpha: float | Tensor, sigma: float) -> float | Tensor:
        spread = -math.expm1(-2 * self.dt) / self.dt
        inflation = 1 + alpha if self.mode == "sample" else 1.0
        return sigma * (inflation * spread) ** 0.5


class AdamConsensus(ConsensusBased):
    r"""Consensus-based optimization with moment estimates (Adam-CBO).

    Of $D_i = x_i - x_\alpha$, as Adam of a gradient: $m \leftarrow \beta_1 m + (1 - \beta_1) D$,
    $v \leftarrow \beta_2 v + (1 - \beta_2) D^2$, both without their bias, and
    $x \leftarrow x - \lambda \Delta t\,m / (\sqrt v + \epsilon) + \sigma \sqrt{\Delta t}\,S(D)\,\xi$: the drift has
    about the length $\lambda \Delta t$ in each coordinate, wherever the consensus point is.

    Args:
        objective: points to values, or None.
        x0: the swarm at the start, (*batch, n, d).
        betas: $(\beta_1, \beta_2)$ in [0, 1).
        eps: $\epsilon$, positive, in units of x.
        options: those of `ConsensusBased`, with ``move="all"`` and no correction, memory or noise after the drift.

    Source:
        Chen, Jin and Lyu 2022, arXiv 2012.04827, algorithm 1.
    """

    _state: ClassVar[tuple[str, ...]] = (*ConsensusBased._state, "_mean", "_square")

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "*batch n d"],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        self.betas, self.eps = betas, check_number("eps", eps, positive=True)
        super().__init__(objective, x0, **options)
        if self.move != "all" or self.correction or self.memory is not None or self.noise_after_drift:
            raise ValueError("AdamConsensus moves all particles, with no correction, memory or noise after the drift")
        self._mean, self._square = torch.zeros_like(self.x), torch.zeros_like(self.x)

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        self._mean = torch.take_along_dim(self._mean, index[..., None], -2)
        self._square = torch.take_along_dim(self._square, index[..., None], -2)

    def _displace(
        self, moving: Tensor, consensus: Tensor, share: Tensor | None, sigma: float | Tensor, factor: Tensor | None
    ) -> Tensor:
        offset = moving - consensus
        noisy = consensus_step(
            moving,
            consensus,
            standard_normal(moving, self.generator),
            lam=0.0,
            dt=self.dt,
            sigma=sigma,
            noise=self.noise,
            factor=factor,
        )
        one, two = self.betas
        self._mean = one * self._mean + (1 - one) * offset
        self._square = two * self._square + (1 - two) * offset.square()
        turn = self.steps + 1
        root = (self._square / (1 - two**turn)).sqrt_().add_(self.eps)
        return noisy - self.lam * self.dt / (1 - one**turn) * self._mean / root
