"""Traces from products with random vectors."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steepest._checks import check_int
from steepest.curvature.operator import LinearOperator, as_operator


class Estimate(NamedTuple):
    """A random estimate.

    Attributes:
        value: The estimate; its mean is the truth.
        standard_error: The standard deviation of the estimate, estimated from the same samples.
        products: How many products it took.
    """

    value: float
    standard_error: float
    products: int


def hutchinson(
    A: LinearOperator | Tensor,
    *,
    probes: int = 32,
    distribution: Literal["rademacher", "gaussian"] = "rademacher",
    at_once: int = 8,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""The trace of a square operator, the mean of $z^T A z$ over random vectors z.

    With random signs the variance of one sample is $2 \sum_{i \ne j} A_{ij}^2$ for symmetric A, so a diagonal A costs
    one probe; with Gaussian vectors it is $2 \|A\|_F^2$.

    Args:
        A: Square.
        probes: Number of vectors, at least 2.
        distribution: Of their entries: "rademacher" (random signs) or "gaussian".
        at_once: Vectors multiplied at once.
        generator: Source of the vectors; a new one with seed 0 if None.

    Raises:
        TypeError, ValueError: an argument is wrong.
        FloatingPointError: a product is not finite.

    Source:
        Hutchinson 1990, Communications in Statistics 19(2), 433-450.

    Examples:
        >>> hutchinson(torch.diag(torch.tensor([1.0, 2.0])), probes=2)
        Estimate(value=3.0, standard_error=0.0, products=2)
    """
    A = _square(A)
    check_int("probes", probes, least=2)
    check_int("at_once", at_once)
    draw = _Draw(A, distribution, generator)
    samples = torch.cat([_quadratic(A, draw(min(at_once, probes - first))) for first in range(0, probes, at_once)])
    return _estimate(0.0, samples, probes)


def hutch_plus_plus(
    A: LinearOperator | Tensor,
    *,
    products: int = 30,
    distribution: Literal["rademacher", "gaussian"] = "rademacher",
    at_once: int = 8,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""The trace of a square operator, exact on a random low-rank part and by `hutchinson` on the rest.

    A third of the products finds a subspace Q with most of A, a third gives $\mathrm{tr}(Q^T A Q)$, and a third
    estimates the trace of the remainder $(I - QQ^T) A (I - QQ^T)$. For a spectrum that decays, the error falls like
    1/products instead of its root. If A is no larger than a third of the products the trace is exact.

    Args:
        A: Square.
        products: Number of products in all, at least 6.
        distribution: Of the entries of the random vectors.
        at_once: Vectors multiplied at once.
        generator: Source of the vectors; a new one with seed 0 if None.

    Raises:
        TypeError, ValueError: an argument is wrong.
        FloatingPointError: a product is not finite.

    Source:
        Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649.

    Examples:
        >>> estimate = hutch_plus_plus(torch.diag(torch.tensor([9.0, 0.0, 0.0])), products=9)
        >>> round(estimate.value, 5), round(estimate.standard_error, 5), estimate.products
        (9.0, 0.0, 3)
    """
    A = _square(A)
    check_int("products", products, least=6)
    check_int("at_once", at_once)
    n, third = A.shape[0], products // 3
    if third >= n:
        identity = torch.eye(n, dtype=A.dtype, device=A.device)
        value = sum(float(_quadratic(A, part).sum()) for part in identity.split(at_once, 1))
        return Estimate(value, 0.0, n)
    draw = _Draw(A, distribution, generator)
    Q = torch.linalg.qr(torch.cat([A @ part for part in draw(third).split(at_once, 1)], 1)).Q
    value = sum(float(_quadratic(A, part).sum()) for part in Q.split(at_once, 1))
    rest = draw(products - 2 * third)
    rest = rest - Q @ (Q.T @ rest)
    samples = torch.cat([_quadratic(A, part) for part in rest.split(at_once, 1)])
    return _estimate(value, samples, products)


def _quadratic(A: LinearOperator, columns: Tensor) -> Tensor:
    found = (columns * (A @ columns)).sum(0).double()
    if not bool(found.isfinite().all()):
        raise FloatingPointError("a product with the operator is not finite")
    return found


def _estimate(exact: float, samples: Tensor, products: int) -> Estimate:
    error = float(samples.std()) / math.sqrt(len(samples))
    return Estimate(exact + float(samples.mean()), error, products)


def _square(A: LinearOperator | Tensor) -> LinearOperator:
    A = as_operator(A)
    if A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"A must be square and not empty, got shape {A.shape}")
    return A


class _Draw:
    def __init__(self, A: LinearOperator, distribution: str, generator: torch.Generator | None) -> None:
        if distribution not in ("rademacher", "gaussian"):
            raise ValueError(f"distribution must be rademacher or gaussian, got {distribution!r}")
        self.A, self.gaussian = A, distribution == "gaussian"
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def __call__(self, k: int) -> Tensor:
        """(n, k)."""
        options = {"generator": self.generator, "device": self.generator.device}
        shape = (k, self.A.shape[0])
        if self.gaussian:
            rows = torch.randn(shape, dtype=torch.float64, **options)
        else:
            rows = torch.randint(2, shape, **options) * 2 - 1
        return rows.to(self.A.device, self.A.dtype).T
