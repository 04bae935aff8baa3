"""A parabola along each axis of the rotated frame, from the probes at two or more distances."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Refinement = Literal["newton", "trust_region"]
LEAST, MOST = 0.1, 3.0


@dataclass(frozen=True)
class QuadraticFit:
    r"""$L(x_i + s\,R_i e_j) \approx c + g_{ij} s + \tfrac12 H_{ij} s^2$, exact if L is quadratic.

    With $D_k = L(+h_k) - L(-h_k)$ and $S_k = L(+h_k) + L(-h_k)$: $g = \sum_k h_k D_k / (2 \sum_k h_k^2)$, and H is the
    slope of the regression of S on $h^2$.

    Attributes:
        gradient: g, (*batch, P, p).
        curvature: H, (*batch, P, p).
        centre: c, the mean of the fitted values at the present point, (*batch,).
    """

    gradient: Float[Tensor, "*batch P p"]
    curvature: Float[Tensor, "*batch P p"]
    centre: Float[Tensor, "*batch"]

    @classmethod
    def of(cls, losses: Float[Tensor, "*batch P V K"], distances: Float[Tensor, "*batch K"]) -> "QuadraticFit":
        """Fit to the losses at an orthoplex, V = 2p, of K >= 2 probes each."""
        plus, minus = losses.chunk(2, dim=-2)
        h = distances.to(losses)[..., None, None, :]
        square = h.square()
        tiny = torch.finfo(losses.dtype).tiny
        gradient = ((plus - minus) * h).sum(-1) / (2 * square.sum(-1)).clamp_min(tiny)
        both = plus + minus
        deviation = square - square.mean(-1, keepdim=True)
        spread = deviation.square().sum(-1).clamp_min(tiny)
        curvature = ((both - both.mean(-1, keepdim=True)) * deviation).sum(-1) / spread
        centre = (both.mean(-1) - curvature * square.mean(-1)) / 2
        return cls(gradient, curvature, centre.mean((-2, -1)))

    def change(self, inside: Float[Tensor, "*batch P p"]) -> Float[Tensor, "*batch P"]:
        """What the parabolas predict for moves given in the frame."""
        return (self.gradient * inside + 0.5 * self.curvature * inside.square()).sum(-1)

    def newton(
        self,
        displacement: Float[Tensor, "*batch P p"],
        frame: Float[Tensor, "*batch P p p"],
        radius: Float[Tensor, "*batch"],
    ) -> Float[Tensor, "*batch P p"]:
        """-g / H where H is positive and otherwise the given move, no longer than the radius; or, particle by particle,
        the given move, where the parabolas predict less for it.

        Args:
            displacement: a move of each particle.
            frame: row j is the axis j.
            radius: largest length.
        """
        given = (frame @ displacement.unsqueeze(-1)).squeeze(-1).to(self.gradient)
        floor = 1e-6 * self.curvature.abs().amax(-1, keepdim=True)
        curved = self.curvature > floor
        inside = torch.where(curved, -self.gradient / torch.where(curved, self.curvature, 1.0), given)
        length = torch.linalg.vector_norm(inside, dim=-1, keepdim=True)
        limit = radius.to(inside)[..., None, None]
        inside = inside * torch.where(length > limit, limit / torch.where(length > 0, length, 1.0), 1.0)
        chosen = torch.where((self.change(inside) <= self.change(given)).unsqueeze(-1), inside, given)
        return (chosen.to(frame).unsqueeze(-2) @ frame).squeeze(-2)

    def minimiser(self, radius: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch P p"]:
        r"""The least value of the parabolas within the radius: $-g/(H + \mu)$, $\mu \ge 0$ found by bisection."""
        limit = radius.to(self.gradient)[..., None]
        lowest = self.curvature.amin(-1)
        length = torch.linalg.vector_norm(self.gradient, dim=-1)
        tiny = torch.finfo(self.gradient.dtype).tiny
        low = (-lowest).clamp_min(0)
        high = low + length / limit.clamp_min(tiny) + tiny

        def at(shift: Tensor) -> Tensor:
            divisor = self.curvature + shift.unsqueeze(-1)
            return -self.gradient / torch.where(divisor > 0, divisor, tiny)

        free = torch.linalg.vector_norm(at(torch.zeros_like(low)), dim=-1)
        inner = (lowest > 0) & (free <= limit)
        for _ in range(60):
            middle = (low + high) / 2
            long = torch.linalg.vector_norm(at(middle), dim=-1) > limit
            low, high = torch.where(long, middle, low), torch.where(long, high, middle)
        found = torch.where(inner.unsqueeze(-1), at(torch.zeros_like(high)), at(high))
        # Rounding, or a gradient that is zero along the lowest axis (then a shorter move is good enough).
        length = torch.linalg.vector_norm(found, dim=-1, keepdim=True)
        found = torch.where(length > limit.unsqueeze(-1), found * limit.unsqueeze(-1) / length, found)
        return torch.where(found.isfinite(), found, 0.0)

    def trusted(self, multiplier: Float[Tensor, "*batch"], before: Float[Tensor, "*batch 2"]) -> Tensor:
        """The multiplier of the radius, after the fall from `before` was compared with what was predicted there.

        Halved where the fall is less than a quarter of the prediction, and 1.5 times where it is more than three.

        Args:
            multiplier: the present one; it stays in [0.1, 3].
            before: centre and predicted change of the step before.
        """
        predicted = before[..., 1]
        ratio = (self.centre.double() - before[..., 0]) / torch.where(predicted < 0, predicted, -1.0)
        factor = 1 + 0.5 * (ratio > 0.75).double() - 0.5 * (ratio < 0.25).double()
        usable = (predicted < 0) & ratio.isfinite()
        return (multiplier * torch.where(usable, factor, 1.0)).clamp(LEAST, MOST)
