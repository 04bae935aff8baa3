r"""The diagonal linear network, a test bed: its trace of curvature is the l1 norm of what it has learned, or more."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int


class Sharpness(NamedTuple):
    """Trace, Frobenius norm and largest eigenvalue of a Hessian."""

    trace: float
    frobenius: float
    largest: float


class DiagonalLinearNet(nn.Module):
    r"""$f(x) = \langle a \odot b, x \rangle$.

    On inputs with independent centred coordinates of second moment s, the Hessian of $\tfrac12 E (f - f^*)^2$ at a
    minimum splits into blocks $s\,(b_j, a_j)(b_j, a_j)^\top$, so $tr G = s \sum (a_j^2 + b_j^2) \ge 2 s \|\beta\|_1$
    for $\beta = a \odot b$, with equality where $|a_j| = |b_j|$ (`balance` one).

    Args:
        features: d.
        std: a and b start as independent normal numbers of this deviation.
        generator: of the start; torch's own if None.
        dtype: of the parameters.

    Source:
        Wu and Su 2023, arXiv 2305.17490, section on diagonal linear networks; Woodworth et al. 2020 (the model).

    Examples:
        >>> net = DiagonalLinearNet.of([1.0, -2.0, 0.5], [0.5, 1.0, 4.0])
        >>> net.population_sharpness(1.0).trace, net.balance(), net.path_norm()
        (22.5, 2.5, 4.5)
    """

    def __init__(
        self,
        features: int,
        *,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("features", features)
        if not (isinstance(std, int | float) and 0 <= std < math.inf):
            raise ValueError(f"std must be a finite number of at least 0, got {std!r}")
        self.a, self.b = (nn.Parameter(std * torch.randn(features, generator=generator, dtype=dtype)) for _ in range(2))

    @classmethod
    def of(cls, a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> Self:
        """The network with these factors, (d,) each.

        Raises:
            ValueError: shapes differ, or are no vectors.
        """
        a, b = (x.detach().clone() if isinstance(x, Tensor) else torch.tensor(x) for x in (a, b))
        if a.ndim != 1 or a.shape != b.shape or not len(a):
            raise ValueError(f"a and b must be vectors of one length, got {tuple(a.shape)} and {tuple(b.shape)}")
        net = cls(len(a), std=0.0)
        net.a, net.b = nn.Parameter(a), nn.Parameter(b.to(a))
        return net

    @classmethod
    def balanced(cls, beta: Tensor, balance: float = 1.0) -> Self:
        r"""The network that computes `beta`, (d,), with $r(\theta)$ = `balance`: $|b_j| = c |a_j|$ in each coordinate.

        Raises:
            ValueError: a balance below one, which no network has.
        """
        c = _ratio(balance)
        a = (beta.abs() / c).sqrt()
        return cls.of(a, c * beta.sign() * a)

    @classmethod
    def unbalanced(
        cls,
        features: int,
        balance: float,
        *,
        std: float = math.sqrt(0.1),
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        r"""A random start of a given balance $r_0$: a normal, $b = c\,\epsilon \odot a$ with random signs $\epsilon$,
        $c = r_0 + \sqrt{r_0^2 - 1}$.

        Raises:
            ValueError: a balance below one.
        """
        c = _ratio(balance)
        a, signs = (torch.randn(features, generator=generator, dtype=dtype) for _ in range(2))
        return cls.of(std * a, c * std * signs.sign() * a)

    @property
    def beta(self) -> Float[Tensor, "d"]:
        """What the network computes."""
        return self.a * self.b

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return x @ self.beta

    @torch.no_grad()
    def jacobian(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
        """Per-example gradients of the output, in the order (a, b)."""
        return torch.cat([x * self.b, x * self.a], -1)

    @torch.no_grad()
    def gram(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
        """K = J J', without J."""
        return (x * (self.a.square() + self.b.square())) @ x.mT

    @torch.no_grad()
    def population_sharpness(self, second_moment: float) -> Sharpness:
        r"""Of the population Hessian: $s \sum (a_j^2 + b_j^2)$, $s (\sum (a_j^2 + b_j^2)^2)^{1/2}$, $s \max$.

        They are at least $2 s \|\beta\|_q$ with q = 1, 2 and infinity (`norm_bounds`).

        Args:
            second_moment: s, of each input coordinate.
        """
        squares = (self.a.square() + self.b.square()).double() * second_moment
        return Sharpness(float(squares.sum()), float(squares.norm()), float(squares.max()))

    @torch.no_grad()
    def norm_bounds(self, second_moment: float) -> Sharpness:
        r"""$2 s \|\beta\|_1$, $2 s \|\beta\|_2$, $2 s \|\beta\|_\infty$: the least for this beta."""
        beta = self.beta.double().abs() * 2 * second_moment
        return Sharpness(float(beta.sum()), float(beta.norm()), float(beta.max()))

    @torch.no_grad()
    def path_norm(self) -> float:
        r"""$\|\beta\|_1$."""
        return float(self.beta.double().abs().sum())

    @torch.no_grad()
    def balance(self) -> float:
        r"""$r(\theta) = (\|a\|^2 + \|b\|^2) / (2 \|\beta\|_1) \ge 1$; one where all parameters are zero."""
        squares = float((self.a.double().square() + self.b.double().square()).sum())
        return ratio(squares, 2 * self.path_norm())


def ratio(above: float, below: float) -> float:
    """Above over below; one if both are zero."""
    if below:
        return above / below
    return math.inf if above else 1.0


def _ratio(balance: float) -> float:
    if not (isinstance(balance, int | float) and 1 <= balance < math.inf):
        raise ValueError(f"balance must be a finite number of at least 1, got {balance!r}")
    return balance + math.sqrt(balance * balance - 1)
