"""Simultaneous perturbation: a gradient from two values, whatever the dimension."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free._point_arguments import check_start, scale_at
from steepest.gradient_free.search import Objective, Search
from steepest.loop.schedules import Schedule


@dataclass(frozen=True, slots=True)
class PowerDecay:
    r"""A schedule: $v_t = a / (A + t + 1)^p$.

    Args:
        start: a.
        power: p.
        offset: A, at least 0.

    Examples:
        >>> PowerDecay(8.0, 0.5, offset=2)(1)
        4.0
    """

    start: float
    power: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ValueError(f"offset must be at least 0, got {self.offset}")

    def __call__(self, step: int) -> float:
        return self.start / (self.offset + step + 1) ** self.power


class SPSA(Search):
    r"""Simultaneous perturbation stochastic approximation.

    $x \leftarrow x - a_k\,\frac{f(x + c_k \Delta) - f(x - c_k \Delta)}{2 c_k}\,\Delta$ with $\Delta$ from
    $\{-1, 1\}^d$, averaged over `directions`. The usual gains are $a_k = a / (A + k)^{0.602}$ and
    $c_k = c / k^{0.101}$ for k = 1, 2, ...

    A direction with a value that is not finite is left out. The metrics of a step are ``best``, ``gradient`` (the norm
    of the estimate, the mean over runs), ``lr`` and ``radius``.

    Args:
        objective: points (..., n, d) to values (..., n), or None to use `ask` and `tell`.
        x0: where to start, (*batch, d); leading dimensions are independent runs. It is not changed.
        lr: a, the number in the usual gain; or a schedule, which is used as it is.
        radius: c, the number in the usual gain; or a schedule, which is used as it is.
        offset: A of the usual gain: about a tenth of the planned steps keeps the first steps from being too long.
        directions: pairs of points in a step, at least 1.
        generator: source of the draws. None: torch's global one.

    Attributes:
        x: the present point, (*batch, d). It is not itself evaluated.
        best: the best point that was evaluated, (*batch, d).
        best_value: its value.

    Raises:
        TypeError, ValueError: an argument that is not as described.
        RuntimeError: in a step, if no value of a run is finite; nothing is changed then.

    Source:
        Spall 1992, IEEE Transactions on Automatic Control 37(3); the gains after Spall 1998, IEEE Transactions on
        Aerospace and Electronic Systems 34(3).

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import SPSA
        >>> search = SPSA(
        ...     lambda x: (x - 1).square().sum(-1),
        ...     torch.zeros(5),
        ...     offset=20,
        ...     lr=0.5,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> _ = search.run(200, progress=False)
        >>> bool((search.x - 1).norm() < 0.1)
        True
    """

    _state: ClassVar[tuple[str, ...]] = (*Search._state, "x")

    def __init__(
        self,
        objective: Objective | None,
        x0: Float[Tensor, "*batch d"],
        *,
        lr: float | Schedule = 0.1,
        radius: float | Schedule = 0.1,
        offset: float = 0.0,
        directions: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        x = check_start(x0)
        check_int("directions", directions)
        scale_at("offset", offset, 0, positive=False)
        self.lr = lr if callable(lr) else PowerDecay(scale_at("lr", lr, 0, positive=False), 0.602, offset)
        self.radius = radius if callable(radius) else PowerDecay(scale_at("radius", radius, 0), 0.101)
        scale_at("lr", self.lr, 0, positive=False)
        scale_at("radius", self.radius, 0)
        super().__init__(objective, x)
        self.x, self.directions, self.generator = x, directions, generator

    def _propose(self) -> Float[Tensor, "*batch n d"]:
        *batch, d = self.x.shape
        device = self.x.device if self.generator is None else self.generator.device
        coins = torch.randint(2, (*batch, self.directions, d), device=device, generator=self.generator)
        signs = (2 * coins - 1).to(self.x)
        both = torch.cat((signs, -signs), -2)
        return torch.add(self.x.unsqueeze(-2), both, alpha=scale_at("radius", self.radius, self.steps))

    def _move(self, points: Float[Tensor, "*batch n d"], values: Float[Tensor, "*batch n"]) -> Mapping[str, Any]:
        lr = scale_at("lr", self.lr, self.steps, positive=False)
        radius = scale_at("radius", self.radius, self.steps)
        signs = (points[..., : self.directions, :] - self.x.unsqueeze(-2)).sign()
        forward, backward = values.chunk(2, -1)
        good = forward.isfinite() & backward.isfinite()
        slope = torch.where(good, forward - backward, 0) / (2 * radius)
        gradient = torch.einsum("...n,...nd->...d", slope, signs) / good.sum(-1, keepdim=True).clamp_min(1)
        if not bool(gradient.isfinite().all()):
            raise FloatingPointError("the estimated gradient is not finite: the values are too large for their dtype")
        self.x = torch.add(self.x, gradient, alpha=-lr)
        return {"gradient": gradient.norm(dim=-1).mean(), "lr": lr, "radius": radius}
