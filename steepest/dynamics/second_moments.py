r"""Eigenvalues of the map on second moments of SGD, in the eigenbasis of G.

There the per-example gradients are z, (n, k, r), G is diagonal with entries g > 0, and the null space of G is absent,
so that no rounding error can live in it. Stability of $T = I - 2 \eta C + \eta^2 D$ is decided by the largest
eigenvalue of $C^{-1/2} D C^{-1/2}$ on symmetric matrices, with $C(M) = \tfrac12 (G M + M G)$, which is diagonal here,
and $D(M) = (1 - p) G M G + p \tfrac1n \sum_i H_i M H_i$.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def kron_top(z: Float[Tensor, "n k r"], g: Float[Tensor, "r"], p: float) -> float:
    """The largest eigenvalue, from the dense matrix over the r (r + 1) / 2 coordinates of symmetric matrices."""
    row, column = torch.triu_indices(len(g), len(g), device=g.device)
    c = (g[row] + g[column]) / 2
    # Coordinates that keep the inner product of symmetric matrices, divided by the root of C.
    weight = (1 + (row != column).to(g)).sqrt() / c.sqrt()
    matrix = torch.diag((1 - p) * g[row] * g[column] / c)
    for part in z.split(max(1, 2**21 // (len(row) * z.shape[1] ** 2))):
        pairs = torch.einsum("ika,ilb->iklab", part, part).flatten(0, 2)
        factor = (pairs + pairs.mT)[:, row, column] * (weight / 2)
        matrix.addmm_(factor.mT, factor, alpha=p / len(z))
    return float(torch.linalg.eigvalsh(matrix)[-1])


def diag_top(z: Float[Tensor, "n 1 r"], g: Float[Tensor, "r"]) -> float:
    """The same for p = 1 and one output: D sees only n numbers of M, so n x n entries that are not negative do."""
    values = g * len(z)
    u = z[:, 0] / values.sqrt()
    s = values[:, None] * values / (values[:, None] + values)
    rows = []
    for row in u:
        y = row * u
        rows.append(2 * ((y @ s) * y).sum(-1))
    matrix = torch.stack(rows)
    return float(torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[-1])


def lanczos_top(z: Float[Tensor, "n k r"], g: Float[Tensor, "r"], p: float, tol: float, max_steps: int) -> float:
    """The same by Lanczos with r x r matrices as vectors; three of them are kept.

    Raises:
        RuntimeError: the relative residual is above `tol` after `max_steps`.
    """
    root = ((g[:, None] + g) / 2).sqrt()
    fixed = (1 - p) * g[:, None] * g / root.square()

    def product(x: Tensor) -> Tensor:
        noise = pull(z, push(z, x / root)) / root
        found = fixed * x + (p / len(z)) * noise
        return (found + found.mT) / 2

    # The wanted M is positive semidefinite, so the identity is never orthogonal to it.
    x = torch.diag(g.sqrt())
    x, before = x / x.norm(), torch.zeros_like(x)
    alphas: list[float] = []
    betas: list[float] = []
    top, last = 0.0, 1.0
    for step in range(max_steps):
        y = product(x)
        alphas.append(float((x * y).sum()))
        y = y - alphas[-1] * x - (betas[-1] * before if betas else 0.0)
        betas.append(float(y.norm()))
        if step < 8 or step % 4 == 0 or step == max_steps - 1:
            top, last = _tridiagonal_top(alphas, betas[:-1])
            if betas[-1] * last <= tol * top:
                return top
        x, before = y / (betas[-1] or 1.0), x
    raise RuntimeError(
        f"Lanczos has a relative residual of {betas[-1] * last / top:.2g} after {max_steps} steps (tol {tol:g}); "
        "raise max_steps or tol"
    )


def power_threshold(z: Float[Tensor, "n k r"], g: Float[Tensor, "r"], p: float, tol: float, max_steps: int) -> float:
    """The lr where power iteration of T, with its trace normalised, stops to shrink: by bisection."""
    low, high = 0.0, 2 / float(g[0])
    while high - low > tol * high:
        lr = (low + high) / 2
        low, high = (lr, high) if _growth(z, g, lr, p, max_steps) <= 1 else (low, lr)
    return (low + high) / 2


def _growth(z: Tensor, g: Tensor, lr: float, p: float, max_steps: int) -> float:
    moment, growth, settled = torch.eye(len(g)).to(g), 0.0, 0
    for _ in range(max_steps):
        moment = advance(z, g, moment / moment.trace(), lr, p)
        before, growth = growth, float(moment.trace())
        settled = settled + 1 if abs(growth - before) <= 1e-3 * abs(growth - 1) else 0
        if settled == 10 or growth == 0:
            break
    return growth


def advance(
    z: Float[Tensor, "n k r"], g: Float[Tensor, "r"], moment: Float[Tensor, "r r"], lr: float, p: float
) -> Float[Tensor, "r r"]:
    """T(M)."""
    shrink = 1 - lr * g
    noise = pull(z, push(z, moment)) / len(z) - g[:, None] * g * moment
    found = shrink[:, None] * shrink * moment + lr * lr * p * noise
    # An antisymmetric part would come from rounding alone, and grow.
    return (found + found.mT) / 2


def push(z: Float[Tensor, "n k r"], x: Float[Tensor, "r r"]) -> Float[Tensor, "n k k"]:
    """z_i x z_i' for each example."""
    return (z.flatten(0, 1) @ x).reshape(z.shape) @ z.mT


def pull(z: Float[Tensor, "n k r"], blocks: Float[Tensor, "n k k"]) -> Float[Tensor, "r r"]:
    """The sum of z_i' b_i z_i over the examples."""
    return (blocks @ z).flatten(0, 1).mT @ z.flatten(0, 1)


def _tridiagonal_top(diagonal: list[float], off: list[float]) -> tuple[float, float]:
    """The largest eigenvalue of a symmetric tridiagonal matrix, and the size of the last entry of its eigenvector."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off:
        side = torch.diag(torch.tensor(off, dtype=torch.float64), 1)
        matrix = matrix + side + side.mT
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), abs(float(vectors[-1, -1]))
