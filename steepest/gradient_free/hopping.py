"""Consensus hopping: from a point to the consensus point of a Gaussian cloud around it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free._swarm_arguments import AlphaRule, alpha_at, check_generator, check_number, check_points
from steepest.gradient_free.consensus import gibbs_weights, weighted_mean
from steepest.gradient_free.search import Objective, Search
from steepest.gradient_free.swarm_step import standard_normal
from steepest.loop.schedules import Schedule, value_at


class ConsensusHopping(Search):
    r"""Consensus hopping (CH): $x_{k+1} = x_\alpha(\text{n draws from } N(x_k, s^2 I))$.

    With many draws a step is gradient descent on the local entropy, $x_{k+1} = x_k - \tau \nabla F(x_k)$ with
    $\tau = \alpha s^2$ and $F(x) = -\frac1\alpha \log \mathbb{E}\,e^{-\alpha E(x + s \xi)}$. At fixed $\tau$ and large
    $\alpha$ it is the proximal step $\arg\min_y E(y) + |y - x_k|^2 / (2 \tau)$; at $\alpha \to 0$ the step of evolution
    strategies, $-\alpha\,\mathrm{Cov}(x, E)$. A fixed width leaves a floor of about s over the root of the effective
    sample size: let it shrink with ``Geometric(0.7, 0.98, every=100)``.

    The metrics of a step are ``best``, ``change`` (largest entry of the hop, over all runs), ``alpha``, ``width`` and
    ``evaluations``.

    Args:
        objective: points (..., n, d) to values (..., n), or None to use `ask` and `tell`.
        x0: where to start, (*batch, d); leading dimensions are independent runs. It is not changed.
        particles: n, the draws of a hop, at least 1.
        alpha: $\alpha \ge 0$: a number, one for each run, a schedule of the step, or `EffectiveSampleSize`.
        width: s, a number or a schedule, positive.
        generator: source of the draws. None: torch's global one.

    Attributes:
        x: the present point, (*batch, d).
        best, best_value: the best point that was evaluated, and its value.

    Raises:
        TypeError, ValueError: an argument that is not as described.
        RuntimeError: in a step, if no value of a run is finite; nothing is changed then.

    Source:
        Riedl, Klock, Geldhauser and Fornasier 2023, arXiv 2306.09778, equation (4).

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import ConsensusHopping, grand_canyon3_noisy
        >>> from steepest.loop import Geometric
        >>> search = ConsensusHopping(
        ...     grand_canyon3_noisy,
        ...     torch.tensor([8.0, 8.0]),
        ...     width=Geometric(0.7, 0.98, every=10),
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> _ = search.run(250, progress=False)
        >>> bool(search.x.norm() < 0.25)
        True
    """

    _state: ClassVar[tuple[str, ...]] = (*Search._state, "x")

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "*batch d"],
        *,
        particles: int = 200,
        alpha: AlphaRule = 100.0,
        width: float | Schedule = 0.7,
        generator: torch.Generator | None = None,
    ) -> None:
        check_points("x0", x0[..., None, :] if isinstance(x0, Tensor) and x0.ndim else x0, least=1)
        check_int("particles", particles)
        check_generator(generator)
        super().__init__(objective, x0)
        self.x = x0.detach().clone(memory_format=torch.contiguous_format)
        self.particles, self.alpha, self.width = particles, alpha, width
        self.generator = generator
        self._width_of()
        alpha_at(alpha, torch.zeros(*x0.shape[:-1], particles, dtype=x0.dtype, device=x0.device), 0)

    @property
    def consensus(self) -> Float[Tensor, "*batch d"]:
        """The consensus point of the last cloud: the present point."""
        return self.x

    def _propose(self) -> Float[Tensor, "*batch n d"]:
        centre = self.x[..., None, :].expand(*self.x.shape[:-1], self.particles, self.x.shape[-1])
        return torch.add(centre, standard_normal(centre, self.generator), alpha=self._width_of())

    def _move(self, points: Float[Tensor, "*batch n d"], values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        alpha = alpha_at(self.alpha, values, self.steps)
        consensus = weighted_mean(points, gibbs_weights(values, alpha))
        change = (consensus - self.x).abs().amax()
        self.x = consensus
        return {
            "change": change,
            "alpha": alpha.mean() if isinstance(alpha, Tensor) else alpha,
            "width": self._width_of(),
            "evaluations": self.evaluations + self.particles,
        }

    def _width_of(self) -> float:
        return check_number("width", value_at(self.width, self.steps, "width"), positive=True)
