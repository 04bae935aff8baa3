"""Where the river of a loss is: how far a point is from it, and a surface to look at."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.curvature import Eigenpairs, Hessian, top_eigenpairs


def river_residual(
    hessian: Hessian, *, tol: float = 1e-6, max_products: int | None = None, generator: torch.Generator | None = None
) -> float:
    r"""How far a point is from the river, $\|(I - v v^\top)\nabla L\| / \|\nabla L\|$ in [0, 1]; 0 on it.

    The river is where the gradient is an eigenvector of the Hessian for its smallest eigenvalue, here v, which comes
    from Lanczos: for small problems. Of a multiple eigenvalue, all eigenvectors count.

    Args:
        hessian: the Hessian of the loss at the point, `Hessian(model, loss_fn, data)` or `Hessian.of(function, x)`.
        tol: of the eigenvector, see `steepest.curvature.top_eigenpairs`.
        max_products: the most Hessian products of one search; a second one looks for a second eigenvector.
        generator: of the random start.

    Returns:
        The residual; 0 where the gradient is zero.

    Raises:
        RuntimeError: the eigenvector did not converge.

    Source:
        Wen et al. 2024, arXiv 2410.05192 (the definition of the river).

    Examples:
        >>> import torch
        >>> valley = lambda w: (w * torch.tensor([10.0, 0.1]) * w).sum() / 2
        >>> on, off = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])
        >>> round(river_residual(Hessian.of(valley, on)), 3), round(river_residual(Hessian.of(valley, off)), 3)
        (0.0, 1.0)
    """
    gradient = hessian.gradient()
    length = gradient.norm()
    if not bool(length > 0):
        return 0.0

    def search(k: int) -> Eigenpairs:
        return top_eigenpairs(hessian, k, which="smallest", tol=tol, max_products=max_products, generator=generator)

    pairs = search(1)
    if not pairs.converged:
        raise RuntimeError(
            f"the smallest eigenvector did not converge in {pairs.products} products (residual "
            f"{float(pairs.residuals[0]):.3g}): raise max_products or tol"
        )
    v = pairs.vectors
    probe = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0)).to(gradient)
    rounding = 10 * torch.finfo(gradient.dtype).eps * float((hessian @ probe).norm())  # of the Frobenius norm, about
    while v.shape[1] < len(gradient):
        more = search(min(2 * v.shape[1], len(gradient)))
        same = more.values <= more.values[0] + more.residuals.max() + rounding
        if not more.converged or int(same.sum()) <= v.shape[1]:
            break
        v = more.vectors[:, same]
    return float((gradient - v @ (v.mT @ gradient)).norm() / length)


@dataclass(frozen=True)
class WindingValley:
    r"""A river valley to look at, $L(x, y) = \tfrac12 \gamma (x - \sin y)^2 + \tfrac12 \kappa y^2$.

    Attributes:
        gamma: curvature of the hills.
        kappa: curvature along the river, much smaller.

    Raises:
        ValueError: unless 0 < kappa < gamma.
    """

    gamma: float = 1.0
    kappa: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.kappa < self.gamma < float("inf"):
            raise ValueError(f"0 < kappa < gamma is needed, got kappa={self.kappa!r}, gamma={self.gamma!r}")

    def __call__(self, w: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
        """The loss of points (x, y)."""
        x, y = w.unbind(-1)
        return (self.gamma * (x - y.sin()).square() + self.kappa * y.square()) / 2

    def gradient(self, w: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """The gradient at points (x, y)."""
        x, y = w.unbind(-1)
        up = self.gamma * (x - y.sin())
        return torch.stack([up, self.kappa * y - up * y.cos()], -1)

    def river(self, y: Float[Tensor, "*batch"], *, steps: int = 50) -> Float[Tensor, "*batch 2"]:
        """The points of the river at given y: not the floor x = sin y, but off it, where the floor bends the gradient.

        By Newton's method on the component of H g across g, from the point where g is along the floor.
        """
        c, s = y.cos(), y.sin()
        u = self.kappa * y * c / (self.gamma * (1 + c.square()))
        for _ in range(steps):
            # g = (a, b), H = [[gamma, -gamma c], [-gamma c, d]]; all are linear in u = x - sin y
            a, b, d = (
                self.gamma * u,
                self.kappa * y - self.gamma * u * c,
                self.gamma * (c.square() + u * s) + self.kappa,
            )
            across = (self.gamma * (a - c * b)) * b - (d * b - self.gamma * c * a) * a
            da, db, dd = self.gamma, -self.gamma * c, self.gamma * s
            slope = (
                self.gamma * (da - c * db) * b
                + self.gamma * (a - c * b) * db
                - (dd * b + d * db - self.gamma * c * da) * a
                - (d * b - self.gamma * c * a) * da
            )
            u = u - torch.where(slope == 0, torch.zeros_like(u), across / slope)
        return torch.stack([s + u, y], -1)
