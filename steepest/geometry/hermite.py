r"""Hermite polynomials, orthonormal for a standard normal number, and functions in their basis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry.sphere import golub_welsch


def hermite_basis(u: Float[Tensor, "*batch"], degree: int) -> Float[Tensor, "*batch k"]:
    r"""$h_0(u), \dots, h_{degree}(u)$ with $h_k = He_k / \sqrt{k!}$, so that $E h_j(Z) h_k(Z) = \delta_{jk}$.

    Args:
        u: where.
        degree: the highest k.
    """
    check_int("degree", degree, 0)
    values = [torch.ones_like(u)]
    for k in range(degree):
        before = values[k - 1] * k**0.5 if k else 0.0
        values.append((u * values[k] - before) / (k + 1) ** 0.5)
    return torch.stack(values, dim=-1)


def normal_rule(nodes: int = 64) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
    r"""Nodes and weights of $E f(Z) = \sum_j w_j f(z_j)$, Z standard normal (Gauss-Hermite), in float64.

    Args:
        nodes: how many; exact for polynomials of degree at most 2 nodes - 1.
    """
    check_int("nodes", nodes)
    return golub_welsch(torch.arange(1, nodes, dtype=torch.float64).sqrt())


_SHORT = 9  # coefficients: up to degree 8 powers are as exact as the recurrence, and cheaper


@dataclass(frozen=True)
class HermiteSeries:
    r"""The function $\sigma(u) = \sum_k c_k h_k(u)$.

    Args:
        coefficients: $c_0, c_1, \dots$, at least one.

    Raises:
        ValueError: there is no coefficient, or one is not finite.
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(float(each) for each in self.coefficients)
        if not values or not all(map(_finite, values)):
            raise ValueError(f"coefficients must be finite numbers, at least one; got {self.coefficients!r}")
        object.__setattr__(self, "coefficients", values)

    def __call__(self, u: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The value.

        Args:
            u: where.
        """
        if len(self.coefficients) <= _SHORT:
            return self._powers(u)
        # Clenshaw's recurrence: no stack of the basis is kept.
        after = later = torch.zeros_like(u)
        for k in range(len(self.coefficients) - 1, -1, -1):
            now = self.coefficients[k] + u * after / (k + 1) ** 0.5 - later * ((k + 1) / (k + 2)) ** 0.5
            after, later = now, after
        return after

    def _powers(self, u: Tensor) -> Tensor:
        """Horner's scheme, in the square of u for odd and even functions: few passes over u."""
        powers = _monomials(self.coefficients)
        parity = {index % 2 for index, c in enumerate(powers) if c}
        if len(parity) != 1:
            base, step, first = u, 1, 0
        else:
            base, step, first = u.square(), 2, parity.pop()
        terms = powers[first::step]
        value = torch.full_like(u, terms[-1])
        for c in reversed(terms[:-1]):
            value = torch.addcmul(torch.full_like(u, c), value, base) if u.requires_grad else value.mul_(base).add_(c)
        return value * u if first else value

    def derivative(self) -> "HermiteSeries":
        r"""$\sigma'$, by $h_k' = \sqrt{k}\,h_{k-1}$."""
        return HermiteSeries(tuple(k**0.5 * c for k, c in enumerate(self.coefficients))[1:] or (0.0,))

    @property
    def exponent(self) -> int | None:
        r"""The information exponent: the least $k \ge 1$ with $c_k \ne 0$; None for a constant."""
        return next((k for k, c in enumerate(self.coefficients) if k and c), None)


@cache
def _monomials(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients of 1, u, u^2, ... of a series."""
    before, now = [0.0] * len(coefficients), [1.0] + [0.0] * (len(coefficients) - 1)
    total = [0.0] * len(coefficients)
    for k, c in enumerate(coefficients):
        total = [value + c * each for value, each in zip(total, now, strict=True)]
        shifted = [0.0, *now[:-1]]
        after = [(s - k**0.5 * b) / (k + 1) ** 0.5 for s, b in zip(shifted, before, strict=True)]
        before, now = now, after
    return tuple(total)


def hermite(k: int) -> HermiteSeries:
    r"""$h_k = He_k / \sqrt{k!}$: $h_2 = (u^2 - 1)/\sqrt2$, $h_3 = (u^3 - 3u)/\sqrt6$, and so on.

    Args:
        k: the degree, at least 0.

    Examples:
        >>> import torch
        >>> (hermite(2)(torch.tensor([1.0, 3.0])) * 2**0.5).round().tolist()
        [0.0, 8.0]
    """
    check_int("k", k, 0)
    return HermiteSeries((*[0.0] * k, 1.0))


def hermite_coefficients(f: Callable[[Tensor], Tensor], degree: int, nodes: int = 128) -> tuple[float, ...]:
    r"""$c_k = E f(Z) h_k(Z)$ for k up to `degree`, by quadrature: exact for polynomials, near for smooth functions.

    Args:
        f: a function that works elementwise on a float64 tensor.
        degree: the highest k.
        nodes: of the quadrature, more than `degree`.

    Raises:
        ValueError: too few nodes, or f is not finite or of another shape.
    """
    check_int("degree", degree, 0)
    check_int("nodes", nodes, degree + 1)
    z, w = normal_rule(nodes)
    values = f(z)
    if not isinstance(values, Tensor) or values.shape != z.shape or not bool(values.isfinite().all()):
        raise ValueError("f must return finite numbers, one for each number it is given")
    return tuple(float(each) for each in (w * values) @ hermite_basis(z, degree))


def information_exponent(link: Callable[[Tensor], Tensor], degree: int = 10, tol: float = 1e-3) -> int | None:
    r"""The least $k \ge 1$ with $|c_k| > tol \cdot (E f^2)^{1/2}$; None if there is none up to `degree`.

    Args:
        link: a `HermiteSeries`, whose coefficients are taken as they are, or any elementwise function.
        degree: the highest k that is looked at.
        tol: what counts as zero, for functions whose coefficients come from quadrature.

    Examples:
        >>> information_exponent(lambda u: u**3 - 3 * u + 2)
        3
    """
    if isinstance(link, HermiteSeries):
        return link.exponent
    z, w = normal_rule(128)
    size = float(w @ link(z).square()) ** 0.5
    found: Sequence[float] = hermite_coefficients(link, degree)
    return next((k for k, c in enumerate(found) if k and abs(c) > tol * size), None)


def _finite(value: float) -> bool:
    return value - value == 0
