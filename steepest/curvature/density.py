"""The density of eigenvalues by stochastic Lanczos quadrature."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.curvature.operator import LinearOperator, symmetric_operator


class Density(NamedTuple):
    """Where the eigenvalues of an operator lie.

    Attributes:
        grid: Increasing values.
        density: The share of eigenvalues for each unit of the grid; it integrates to 1.
        nodes: Ritz values of all probes, before they were smoothed.
        weights: Their weights, with sum 1: `(weights * f(nodes)).sum()` estimates tr f(A) / n.
        products: How many products it took.
    """

    grid: Float[Tensor, "points"]
    density: Float[Tensor, "points"]
    nodes: Float[Tensor, "nodes"]
    weights: Float[Tensor, "nodes"]
    products: int


def spectral_density(
    A: LinearOperator | Tensor,
    *,
    steps: int = 40,
    probes: int = 8,
    points: int = 512,
    width: float | None = None,
    generator: torch.Generator | None = None,
) -> Density:
    r"""The density of the eigenvalues of a symmetric operator.

    Each probe is a random vector; `steps` of Lanczos from it give a Gauss quadrature whose nodes and weights match the
    first 2 steps moments of the operator seen from that vector. The density is their mean, smoothed by a Gaussian.
    All probes run at once, with full reorthogonalisation.

    Args:
        A: Symmetric.
        steps: Products of each probe, at most; the size of A is enough.
        probes: Number of random vectors.
        points: Length of the grid.
        width: Standard deviation of the Gaussian; 1 % of the range of the nodes if None.
        generator: Source of the vectors; a new one with seed 0 if None.

    Raises:
        TypeError, ValueError: an argument is wrong.
        FloatingPointError: a product is not finite.

    Source:
        Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl. 38(4), 1075-1099; Ghorbani, Krishnan and Xiao 2019,
        arXiv 1901.10159.

    Examples:
        >>> found = spectral_density(torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])))
        >>> round(float(torch.trapezoid(found.density, found.grid)), 3)
        1.0
    """
    A = symmetric_operator(A)
    for name, value in (("steps", steps), ("probes", probes)):
        check_int(name, value)
    check_int("points", points, least=2)
    if width is not None and not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be positive, got {width}")
    n = A.shape[0]
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    start = torch.randn(probes, n, dtype=torch.float64, generator=generator, device=generator.device)
    q = torch.nn.functional.normalize(start.to(A.device, A.dtype), dim=1)
    alphas, betas, products = _lanczos(A, q, min(steps, n))
    nodes, weights = [], []
    for alpha, beta in zip(alphas, betas, strict=True):
        theta, S = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
        nodes.append(theta)
        weights.append(S[0].square() / probes)
    found, mass = torch.cat(nodes), torch.cat(weights)
    low, high = float(found.min()), float(found.max())
    spread = width or max(0.01 * (high - low), 1e-3 * max(abs(low), abs(high))) or 1e-12
    grid = torch.linspace(low - 5 * spread, high + 5 * spread, points, dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((grid[:, None] - found) / spread).square()) / (spread * math.sqrt(2 * math.pi))
    return Density(grid, bumps @ mass, found, mass, products)


def _lanczos(A: LinearOperator, q: Tensor, steps: int) -> tuple[list[Tensor], list[Tensor], int]:
    """The tridiagonal matrices of all probes; that of a probe ends where its Krylov space is exhausted."""
    probes, n = q.shape
    Q = torch.empty(probes, steps, n, dtype=q.dtype, device=q.device)
    alphas = torch.zeros(probes, steps, dtype=torch.float64)
    betas = torch.zeros(probes, steps, dtype=torch.float64)
    lengths, alive, products = [steps] * probes, list(range(probes)), 0
    for j in range(steps):
        Q[:, j] = q
        w = torch.zeros_like(q)
        w[alive] = (A @ q[alive].T).T
        products += len(alive)
        alphas[:, j] = (w * q).sum(1).double().cpu()
        for _ in range(2):
            w = w - torch.bmm(torch.bmm(w[:, None], Q[:, : j + 1].mT), Q[:, : j + 1])[:, 0]
        beta = torch.linalg.vector_norm(w, dim=1).double().cpu()
        if not bool((alphas[:, j] + beta).isfinite().all()):
            raise FloatingPointError(f"product {products} with the operator is not finite")
        betas[:, j] = beta
        scale = (alphas.abs() + betas).amax(1)
        small = beta <= 4 * torch.finfo(q.dtype).eps * math.sqrt(n) * scale
        for probe in [probe for probe in alive if bool(small[probe])]:
            lengths[probe] = j + 1
            alive.remove(probe)
        if not alive:
            break
        q = w / beta.clamp_min(torch.finfo(torch.float64).tiny).to(w)[:, None]
        q[[probe for probe in range(probes) if probe not in alive]] = 0.0
    alpha = [alphas[i, :length] for i, length in enumerate(lengths)]
    return alpha, [betas[i, : length - 1] for i, length in enumerate(lengths)], products
