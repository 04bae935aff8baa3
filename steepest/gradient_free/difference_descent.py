"""The baselines that follow a gradient: descent by finite differences, and annealed Langevin dynamics."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.gradient_free._swarm_arguments import check_generator, check_number, check_points
from steepest.gradient_free.search import Objective, Search
from steepest.gradient_free.swarm_step import standard_normal


class DifferenceDescent(Search):
    r"""Gradient descent without a gradient, or annealed Langevin dynamics, of many runs at once.

    $v_k = v_{k-1} - \Delta t\,\nabla E(v_{k-1}) + \frac{\sigma}{\log(k + 1)} \sqrt{\Delta t}\,\xi_k$ for k = 1, 2, ...
    The gradient is of central differences, at 2 d points a step; one point if `gradient` is given. In a coordinate in
    which a value is not finite the run stays.

    Args:
        objective: points (..., n, d) to values (..., n), or None to use `ask` and `tell`.
        x0: where to start, (*batch, d).
        dt: $\Delta t$, the learning rate.
        sigma: $\sigma$; 0: gradient descent.
        h: half the distance of the two points of a difference.
        gradient: points (*batch, d) to gradients (*batch, d), instead of differences.
        generator: source of the noise.

    Attributes:
        x: the present point, (*batch, d).
        best, best_value: the best point that was evaluated, and its value.

    Raises:
        TypeError, ValueError: an argument that is not as described.

    Source:
        The baselines of Riedl, Klock, Geldhauser and Fornasier 2023, arXiv 2306.09778, figure 1; annealing: Chiang,
        Hwang and Sheu 1987.

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import DifferenceDescent, quadratic
        >>> search = DifferenceDescent(quadratic, torch.ones(2, dtype=torch.float64), dt=0.1)
        >>> _ = search.run(100, progress=False)
        >>> bool(search.x.abs().max() < 1e-6)
        True
    """

    _state: ClassVar[tuple[str, ...]] = (*Search._state, "x")

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "*batch d"],
        *,
        dt: float = 1e-3,
        sigma: float = 0.0,
        h: float = 1e-5,
        gradient: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_points("x0", x0[..., None, :] if isinstance(x0, Tensor) and x0.ndim else x0, least=1)
        check_generator(generator)
        if gradient is not None and not callable(gradient):
            raise TypeError(f"gradient must be a function of points (*batch, d), got {gradient!r}")
        super().__init__(objective, x0)
        self.x = x0.detach().clone(memory_format=torch.contiguous_format)
        self.dt, self.sigma = check_number("dt", dt, positive=True), check_number("sigma", sigma)
        self.h = check_number("h", h, positive=True)
        self.gradient, self.generator = gradient, generator

    def _propose(self) -> Float[Tensor, "*batch n d"]:
        centre = self.x[..., None, :]
        if self.gradient is not None:
            return centre
        steps = self.h * torch.eye(self.x.shape[-1], dtype=self.x.dtype, device=self.x.device)
        return torch.cat([centre + steps, centre - steps], -2)

    def _move(self, points: Float[Tensor, "*batch n d"], values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        if self.gradient is None:
            ahead, behind = values.chunk(2, -1)
            slope = torch.where(ahead.isfinite() & behind.isfinite(), (ahead - behind) / (2 * self.h), 0.0)
        else:
            slope = self.gradient(self.x).detach()
            if slope.shape != self.x.shape:
                raise ValueError(f"gradient must return the shape {tuple(self.x.shape)}, got {tuple(slope.shape)}")
        x = self.x - self.dt * slope
        if self.sigma:
            scale = self.sigma / math.log(self.steps + 2) * math.sqrt(self.dt)
            x = torch.add(x, standard_normal(x, self.generator), alpha=scale)
        change = (x - self.x).abs().amax()
        self.x = x
        return {"value": values.mean(), "change": change, "evaluations": self.evaluations + points.shape[-2]}
