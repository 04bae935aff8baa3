"""What `entropic_ot` returns."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.couplings import coupling
from steepest.transport.certificate import Certificate, certify
from steepest.transport.problem import Transport
from steepest.transport.sparse_hessian import smallest_support


@dataclass(frozen=True)
class OTResult:
    r"""A solution of entropic optimal transport. Numbers are tensors of the batch's shape.

    Attributes:
        potentials: (x, y), (*batch, n) and (*batch, m), in the units of the costs; the maximiser of f, up to
            (x + t, y - t).
        cost: $\langle C, P \rangle$.
        value: f(x, y), at convergence the entropic optimum.
        error: $(|P 1 - r|_1 + |P^\top 1 - c|_1) / \text{mass}$.
        converged: whether every error is below the tolerance.
        steps: sweeps and Newton steps together.
        history: one mapping per step: ``iteration``, ``stage`` (0 sweep, 1 Newton), ``eta``, ``error``, ``value``,
            ``length``, ``cg_steps``, ``kept``.
        method: which method it was.
        problem: the checked problem.
    """

    potentials: tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]] = field(repr=False)
    cost: Float[Tensor, "*batch"]
    value: Float[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]
    converged: bool
    steps: int
    history: list[dict[str, Any]] = field(repr=False)
    method: str
    problem: Transport = field(repr=False)

    def plan(self, *, sparse: bool = False, dropped: float = 1e-9) -> Tensor:
        r"""The plan $P_{ij} = e^{\eta (x_i + y_j - C_{ij}) - 1}$.

        Args:
            sparse: give a sparse COO tensor with the fewest entries that leave out at most the share `dropped` of the
                mass. Not for a batch.
            dropped: that share.

        Raises:
            ValueError: sparse, for a batch; or `dropped` is not in [0, 1).
        """
        p = self.problem
        plan = coupling(p.C, *self.potentials, p.eta)
        if not sparse:
            return plan
        if p.batch:
            raise ValueError(f"sparse plans are for one problem, this is a batch {p.batch}")
        if not 0 <= dropped < 1:
            raise ValueError(f"dropped must be a share of the mass in [0, 1), got {dropped!r}")
        kept = smallest_support(plan, dropped * float(p.mass), plan.numel())
        rows = torch.div(kept, plan.shape[1], rounding_mode="floor")
        places = torch.stack([rows, kept - rows * plan.shape[1]])
        return torch.sparse_coo_tensor(places, plan.reshape(-1)[kept], plan.shape, check_invariants=False).coalesce()

    def certificate(self) -> Certificate:
        """A feasible plan, feasible duals, and bounds that follow from them."""
        return certify(self.problem, *self.potentials)
