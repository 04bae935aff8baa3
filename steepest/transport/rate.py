"""How fast Sinkhorn's iteration converges, from the plan it converges to."""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from steepest.curvature.lanczos import top_eigenpairs
from steepest.curvature.operator import FunctionOperator


class SinkhornRate(NamedTuple):
    r"""The local rate of Sinkhorn's iteration.

    Attributes:
        rate: $\sigma_2^2$: the factor by which a sweep shrinks the error in the end.
        gap: $1 - \sigma_2^2$.
        accuracy: `rate` is within this of an eigenvalue.
        products: products with the plan and its transpose that it took.
    """

    rate: float
    gap: float
    accuracy: float
    products: int

    def sweeps(self, reduction: float) -> float:
        r"""Sweeps that shrink the error by the factor `reduction`: $\log(\text{reduction}) / \log \sigma_2^2$.

        Args:
            reduction: in (0, 1), for example 1e-12.

        Raises:
            ValueError: it is not in (0, 1).
        """
        if not 0 < reduction < 1:
            raise ValueError(f"reduction must be in (0, 1), got {reduction!r}")
        if self.rate <= 0:
            return 1.0
        return math.inf if self.gap <= 0 else math.log(reduction) / math.log1p(-self.gap)


def sinkhorn_rate(plan: Float[Tensor, "n m"], *, tol: float = 1e-10, max_products: int | None = None) -> SinkhornRate:
    r"""$\sigma_2^2$, the second largest eigenvalue of $A^\top A$ with $A = D_a^{-1/2} P D_b^{-1/2}$, by Lanczos.

    $D_a$ and $D_b$ hold the sums of the rows and of the columns. The largest eigenvalue is 1, with the eigenvector
    $\sqrt{b}$, which is taken out.

    Args:
        plan: the plan at the solution (or near it).
        tol: accuracy of the eigenvalue's residual.
        max_products: products at most; 10 min(n, m) within 200 to 3000 if None.

    Raises:
        TypeError, ValueError: `plan` is no matrix, or has a row or column without mass.

    Source:
        Knight 2008, The Sinkhorn-Knopp algorithm: convergence and applications.

    Examples:
        >>> import torch
        >>> sinkhorn_rate(torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64)).rate
        0.25
    """
    if not isinstance(plan, Tensor) or not plan.is_floating_point() or plan.ndim != 2:
        raise TypeError(f"plan must be a real matrix, got {getattr(plan, 'shape', type(plan).__name__)}")
    a, b = plan.sum(1), plan.sum(0)
    if not bool((a > 0).all()) or not bool((b > 0).all()) or not bool((plan >= 0).all()):
        raise ValueError("plan must not be negative, and needs mass in every row and column")
    if min(plan.shape) == 1:
        return SinkhornRate(0.0, 1.0, 0.0, 0)
    if plan.shape[1] > plan.shape[0]:
        plan, a, b = plan.T, b, a
    scaled = plan / (a.sqrt()[:, None] * b.sqrt())
    first = (b / b.sum()).sqrt()[:, None]

    def products(v: Tensor) -> Tensor:
        v = v - first * (first * v).sum(0)
        w = scaled.T @ (scaled @ v)
        return w - first * (first * w).sum(0)

    n = plan.shape[1]
    limit = min(max(10 * n, 200), 3000) if max_products is None else max_products
    operator = FunctionOperator(products, (n, n), dtype=plan.dtype, device=plan.device, symmetric=True)
    pairs = top_eigenpairs(operator, 1, tol=tol, max_products=limit)
    rate = min(max(float(pairs.values[0]), 0.0), 1.0)
    return SinkhornRate(rate, 1 - rate, float(pairs.residuals[0]), pairs.products)
