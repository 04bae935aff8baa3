r"""The two-layer ReLU network, a test bed: its trace of curvature is the path norm of the network, or more."""

import math
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest.dynamics.diagonal_linear import ratio


class TwoLayerReLU(nn.Module):
    r"""$f(x) = \sum_j a_j\,\sigma(w_j^\top x)$ without biases; $\sigma'(0) = 0$.

    For inputs uniform on the sphere of radius $\sqrt d$ the Hessian of $\tfrac12 E (f - f^*)^2$ at a minimum has
    $tr G = \tfrac12 (\|W\|_F^2 + d \|a\|^2) \ge \sqrt d\,\|\theta\|_P$, with the path norm
    $\|\theta\|_P = \sum_j |a_j| \|w_j\|$, and equality where $\|w_j\| = \sqrt d |a_j|$ (`balance` one).

    Args:
        features: d.
        hidden: m.
        output_std: of the entries of a at the start.
        hidden_std: of the entries of W at the start; None: $d^{-1/4}$.
        generator: of the start; torch's own if None.
        dtype: of the parameters.

    Source:
        Wu and Su 2023, arXiv 2305.17490, section on two-layer ReLU networks.

    Examples:
        >>> net = TwoLayerReLU.of(torch.tensor([[1.0, -1], [0.5, 2], [-1, 0.3]]), torch.tensor([1.0, -0.5, 2]))
        >>> round(net.path_norm(), 6)
        4.533051
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        output_std: float = 1.0,
        hidden_std: float | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("features", features)
        check_int("hidden", hidden)
        scale = features**-0.25 if hidden_std is None else hidden_std
        for name, value in (("output_std", output_std), ("hidden_std", scale)):
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        self.a = nn.Parameter(output_std * torch.randn(hidden, generator=generator, dtype=dtype))
        self.weight = nn.Parameter(scale * torch.randn(hidden, features, generator=generator, dtype=dtype))

    @classmethod
    def of(cls, weight: Float[Tensor, "m d"], a: Float[Tensor, "m"]) -> Self:
        """The network with these parameters.

        Raises:
            ValueError: shapes that do not fit.
        """
        if weight.ndim != 2 or a.shape != weight.shape[:1] or not weight.numel():
            raise ValueError(f"weight (m, d) and a (m,) do not fit: {tuple(weight.shape)}, {tuple(a.shape)}")
        net = cls(weight.shape[1], weight.shape[0], output_std=0.0, hidden_std=0.0)
        net.a, net.weight = nn.Parameter(a.detach().clone()), nn.Parameter(weight.detach().to(a).clone())
        return net

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return (x @ self.weight.mT).relu() @ self.a

    @torch.no_grad()
    def jacobian(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
        """Per-example gradients of the output, in the order (a, W)."""
        z = x @ self.weight.mT
        outer = ((z > 0).to(z) * self.a)[:, :, None] * x[:, None, :]
        return torch.cat([z.relu(), outer.flatten(1)], -1)

    @torch.no_grad()
    def gram(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
        r"""K = J J', without J: $S S^\top + (A A^\top) \circ (X X^\top)$."""
        z = x @ self.weight.mT
        active = (z > 0).to(z) * self.a
        return z.relu() @ z.relu().mT + (active @ active.mT) * (x @ x.mT)

    @torch.no_grad()
    def population_trace(self) -> float:
        r"""$tr G$ for inputs uniform on the sphere of radius $\sqrt d$: $\tfrac12 (\|W\|_F^2 + d \|a\|^2)$."""
        return float(self.weight.double().square().sum() + self.weight.shape[1] * self.a.double().square().sum()) / 2

    @torch.no_grad()
    def path_norm(self) -> float:
        r"""$\sum_j |a_j| \|w_j\|$, which no rescaling of a unit changes."""
        return float(self.a.double().abs() @ self.weight.double().norm(dim=-1))

    def balance(self) -> float:
        r"""`population_trace` over its least value for this path norm, $\sqrt d\,\|\theta\|_P$; at least 1."""
        return ratio(self.population_trace(), math.sqrt(self.weight.shape[1]) * self.path_norm())
