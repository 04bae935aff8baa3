r"""Minus the Hessian of the dual function, with the plan's largest entries only.

The Hessian of $-f$ is $\eta \begin{pmatrix} \mathrm{diag}(P 1) & P \\ P^\top & \mathrm{diag}(P^\top 1) \end{pmatrix}$.
Keeping the true diagonal and dropping entries of P leaves it diagonally dominant, so positive semidefinite.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest.curvature.operator import LinearOperator


class SparseHessian(LinearOperator):
    r"""$\eta \begin{pmatrix} \mathrm{diag}(a + s) & \tilde P \\ \tilde P^\top & \mathrm{diag}(b + s) \end{pmatrix}$.

    Of size n + m, on (dx, dy). If `augmented`, the rank-one term $w w^\top$ of the augmented potential
    $f - \frac12 (1^\top x - 1^\top y)^2$ is added, w = (1, -1): then nothing is in the null space.

    Args:
        a: true row sums of the plan, (n,).
        b: true column sums of the plan, (m,).
        rows: row of each kept entry.
        columns: column of each kept entry.
        values: the kept entries of the plan.
        eta: inverse temperature.
        shift: s, added to the diagonal: damping over $\eta$.
        augmented: whether the rank-one term is added.
    """

    def __init__(
        self,
        a: Float[Tensor, "n"],
        b: Float[Tensor, "m"],
        rows: Int[Tensor, "k"],
        columns: Int[Tensor, "k"],
        values: Float[Tensor, "k"],
        eta: float,
        *,
        shift: float = 0.0,
        augmented: bool = False,
    ) -> None:
        size = len(a) + len(b)
        super().__init__((size, size), dtype=a.dtype, device=a.device, symmetric=True)
        self.a, self.b, self.rows, self.columns, self.values = a, b, rows, columns, values
        self.eta, self.shift, self.augmented = eta, shift, augmented

    @classmethod
    def of_plan(
        cls, plan: Float[Tensor, "n m"], kept: Int[Tensor, "k"], eta: float, *, shift: float = 0.0
    ) -> "SparseHessian":
        """Of a plan, with the entries at these places of the flattened plan.

        Args:
            plan: P.
            kept: places in ``plan.flatten()``; see `largest_entries` and `smallest_support`.
            eta: inverse temperature.
            shift: added to the diagonal.
        """
        m = plan.shape[1]
        values = plan.reshape(-1)[kept]
        rows = torch.div(kept, m, rounding_mode="floor")
        return cls(plan.sum(1), plan.sum(0), rows, kept - rows * m, values, eta, shift=shift)

    def _products(self, columns: Tensor) -> Tensor:
        n = len(self.a)
        u, v = columns[:n], columns[n:]
        top = (self.a + self.shift)[:, None] * u + self.apply_plan(v)
        bottom = (self.b + self.shift)[:, None] * v + self.apply_plan_transposed(u)
        result = torch.cat([top, bottom]).mul_(self.eta)
        if self.augmented:
            tilt = u.sum(0) - v.sum(0)
            result[:n] += tilt
            result[n:] -= tilt
        return result

    def apply_plan(self, v: Float[Tensor, "m c"]) -> Float[Tensor, "n c"]:
        r"""$\tilde P v$."""
        return v.new_zeros(len(self.a), v.shape[1]).index_add_(0, self.rows, self.values[:, None] * v[self.columns])

    def apply_plan_transposed(self, u: Float[Tensor, "n c"]) -> Float[Tensor, "m c"]:
        r"""$\tilde P^\top u$."""
        return u.new_zeros(len(self.b), u.shape[1]).index_add_(0, self.columns, self.values[:, None] * u[self.rows])

    def diagonal(self) -> Float[Tensor, "n_plus_m"]:
        """The diagonal."""
        diagonal = self.eta * torch.cat([self.a + self.shift, self.b + self.shift])
        return diagonal + 1 if self.augmented else diagonal


class ReducedHessian(LinearOperator):
    r"""A `SparseHessian` from which dx is eliminated, without $\eta$: $D_b - \tilde P^\top D_a^{-1} \tilde P$.

    $D_a = \mathrm{diag}(a + s)$. Its own diagonal is a much better preconditioner than that of the whole matrix: where
    the plan is nearly a permutation, the two parts of it cancel to a tiny number, which sets the scale.

    Args:
        hessian: the whole one, not augmented.
    """

    def __init__(self, hessian: SparseHessian) -> None:
        super().__init__((len(hessian.b), len(hessian.b)), dtype=hessian.dtype, device=hessian.device, symmetric=True)
        if hessian.augmented:
            raise ValueError("the augmented Hessian has a dense part: use it as a whole")
        self.hessian = hessian
        self.scaled = hessian.values / (hessian.a + hessian.shift)[hessian.rows]
        self.below = (hessian.b + hessian.shift)[:, None]

    def _products(self, columns: Tensor) -> Tensor:
        h = self.hessian
        inner = columns.new_zeros(len(h.a), columns.shape[1]).index_add_(
            0, h.rows, self.scaled[:, None] * columns[h.columns]
        )
        return self.below * columns - h.apply_plan_transposed(inner)

    def diagonal(self) -> Float[Tensor, "m"]:
        """The diagonal, no smaller than rounding allows it to be known."""
        h = self.hessian
        lost = torch.zeros_like(h.b).index_add_(0, h.columns, h.values * self.scaled)
        below = self.below[:, 0]
        return torch.maximum(below - lost, torch.finfo(self.dtype).eps * below)

    def right_side(self, gx: Float[Tensor, "n"], gy: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
        r"""$g_y - \tilde P^\top D_a^{-1} g_x$."""
        h = self.hessian
        return gy - torch.zeros_like(gy).index_add_(0, h.columns, self.scaled * gx[h.rows])

    def back(self, gx: Float[Tensor, "n"], dy: Float[Tensor, "m"]) -> Float[Tensor, "n"]:
        r"""The dx that belongs to dy: $D_a^{-1} (g_x - \tilde P\, dy)$."""
        h = self.hessian
        return gx / (h.a + h.shift) - torch.zeros_like(gx).index_add_(0, h.rows, self.scaled * dy[h.columns])


def largest_entries(plan: Float[Tensor, "n m"], count: int) -> Int[Tensor, "k"]:
    """Places of the `count` largest entries in ``plan.flatten()``, the largest first; all if there are fewer."""
    flat = plan.reshape(-1)
    if count >= flat.numel():
        return torch.argsort(flat, descending=True)
    return _largest(flat, count)


def smallest_support(plan: Float[Tensor, "n m"], dropped: float, cap: int, least: int = 1) -> Int[Tensor, "k"]:
    """Places of the fewest entries that leave out at most the mass `dropped`, within [least, cap], the largest first.

    Args:
        plan: P.
        dropped: mass that may be left out.
        cap: how many entries at most, whatever is left out.
        least: how many entries at least.
    """
    flat = plan.reshape(-1)
    cap, least = min(cap, flat.numel()), min(least, flat.numel())
    # Entries below this are together lighter than `dropped`, so that none of them is needed.
    candidates = torch.nonzero(flat > dropped / flat.numel())[:, 0]
    if not least <= len(candidates) <= cap:
        candidates = largest_entries(plan, min(max(least, len(candidates)), cap))
    values, order = flat[candidates].sort(descending=True)
    outside = flat.sum() - values.sum() if dropped else 0.0
    tail = torch.cat([values.flip(0).cumsum(0).flip(0)[1:], values.new_zeros(1)])  # candidates after each one
    needed = int((outside + tail > dropped).sum()) + 1
    return candidates[order[: min(max(needed, least), cap)]]


def _largest(flat: Tensor, count: int) -> Tensor:
    """By a threshold from a sample first: a selection among all entries costs as much as computing them."""
    size = flat.numel()
    if size < 1 << 16:
        return flat.topk(count).indices
    sample = flat[:: (size >> 14) | 1]
    rank = min(int(1.3 * count / size * len(sample)) + 50, len(sample))
    candidates = torch.nonzero(flat > sample.topk(rank).values[-1])[:, 0]
    if len(candidates) < count:
        return flat.topk(count).indices
    return candidates[flat[candidates].topk(count).indices]
