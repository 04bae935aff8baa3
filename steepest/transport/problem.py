r"""The problem of entropic optimal transport, checked, and its dual.

$$\min_P \langle C, P \rangle + \frac{1}{\eta} \sum_{ij} P_{ij} \log P_{ij}, \quad P 1 = r, \quad P^\top 1 = c.$$

With potentials x of the rows and y of the columns the plan is $P_{ij} = e^{\eta (x_i + y_j - C_{ij}) - 1}$. The dual
function, which is concave and is maximised, is $f(x, y) = r^\top x + c^\top y - \frac{1}{\eta} \sum_{ij} P_{ij}$. The
two optima are equal. (x + t, y - t) has the same plan and the same f for every number t.
"""

import math
import warnings
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from steepest.geometry.couplings import column_potential, coupling, exponent_floor, row_potential

MASS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Transport:
    r"""Costs, marginals and inverse temperature, batched over leading dimensions.

    Use `Transport.of`, which checks them. The marginals have one total mass each, usually 1.

    Attributes:
        C: costs, (*batch, n, m); $+\infty$ where `of` was told that this forbids an entry.
        r: wanted row sums, (*batch, n).
        c: wanted column sums, (*batch, m), scaled to the exact total of r.
        eta: inverse temperature $\eta$: the entropy has the weight $1/\eta$ (`reg` of other packages).
    """

    C: Float[Tensor, "*batch n m"]
    r: Float[Tensor, "*batch n"]
    c: Float[Tensor, "*batch m"]
    eta: float
    log_r: Float[Tensor, "*batch n"] = field(init=False, repr=False)
    log_c: Float[Tensor, "*batch m"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_r", self.r.log())
        object.__setattr__(self, "log_c", self.c.log())

    @classmethod
    def of(
        cls,
        C: Float[Tensor, "*#batch n m"],
        r: Float[Tensor, "*#batch n"] | None,
        c: Float[Tensor, "*#batch m"] | None,
        eta: float,
        *,
        forbidden: bool = False,
    ) -> "Transport":
        r"""The problem, checked. Batches of C, r and c broadcast; r and c take the dtype and device of C.

        Args:
            C: costs.
            r: row sums; None: uniform, with the mass of c, or 1.
            c: column sums; None: uniform, with the mass of r, or 1.
            eta: inverse temperature, positive.
            forbidden: whether $+\infty$ in C forbids an entry; otherwise it is an error.

        Raises:
            TypeError: C is no float32 or float64 tensor, or r or c is no real tensor.
            ValueError: a shape, a value or a total does not fit; the message names the argument.
        """
        if not isinstance(C, Tensor) or C.dtype not in (torch.float32, torch.float64):
            what = str(C.dtype) if isinstance(C, Tensor) else type(C).__name__
            raise TypeError(f"C must be a float32 or float64 tensor of costs, got {what}")
        if C.layout != torch.strided or C.ndim < 2 or C.shape[-1] == 0 or C.shape[-2] == 0:
            raise ValueError(f"C must be a dense tensor (*batch, n, m) with n, m >= 1, got {tuple(C.shape)}")
        if isinstance(eta, bool) or not isinstance(eta, int | float) or not (math.isfinite(eta) and eta > 0):
            raise ValueError(f"eta must be a positive number (1 / regularisation), got {eta!r}")
        C = C.detach()
        _check_costs(C, forbidden)
        rows = None if r is None else _marginal("r", r, C, C.shape[-2])
        columns = None if c is None else _marginal("c", c, C, C.shape[-1])
        r = _uniform(columns, C, C.shape[-2]) if rows is None else rows
        c = _uniform(rows, C, C.shape[-1]) if columns is None else columns
        try:
            batch = torch.broadcast_shapes(C.shape[:-2], r.shape[:-1], c.shape[:-1])
        except RuntimeError:
            shapes = f"{tuple(C.shape)}, {tuple(r.shape)}, {tuple(c.shape)}"
            raise ValueError(f"the batch dimensions of C, r and c must broadcast, got the shapes {shapes}") from None
        total, other = r.double().sum(-1, keepdim=True), c.double().sum(-1, keepdim=True)
        # A sum in float32 is known no better than this.
        slack = max(MASS_TOLERANCE, 8 * torch.finfo(C.dtype).eps * math.sqrt(max(C.shape[-2:])))
        if bool(((total - other).abs() > slack * torch.maximum(total, other)).any()):
            raise ValueError(
                f"r and c must have the same sum; the largest relative difference is "
                f"{float(((total - other).abs() / total).max()):.3g}. Scale one of them"
            )
        c = (c * (total / other)).to(C.dtype)
        finite = max(map(abs, _range(C)))
        if not eta * finite <= 0.1 * torch.finfo(C.dtype).max:
            raise ValueError(f"eta times the largest cost must be in the range of {C.dtype}, got {eta:g} x {finite:g}")
        if C.dtype == torch.float32 and eta * finite > 1e4:
            warnings.warn(
                f"eta times the largest cost is {eta * finite:.3g}: too much for float32, whose plan then has "
                "relative errors of a tenth of a percent and more. Use float64, or subtract row and column minima "
                "from C",
                UserWarning,
                stacklevel=3,
            )
        return cls(C.expand(*batch, *C.shape[-2:]), r.expand(*batch, -1), c.expand(*batch, -1), float(eta))

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.C.shape[:-2])

    @property
    def mass(self) -> Float[Tensor, "*batch"]:
        """Total mass of each problem."""
        return self.r.sum(-1)

    @property
    def spread(self) -> float:
        """Largest less smallest finite cost, over the whole batch."""
        lowest, highest = _range(self.C)
        return highest - lowest

    def at(self, eta: float) -> "Transport":
        """The same problem at another temperature."""
        return replace(self, eta=float(eta))

    def flat(self) -> "Transport":
        """The same problems with one batch dimension."""
        n, m = self.C.shape[-2:]
        return Transport(self.C.reshape(-1, n, m), self.r.reshape(-1, n), self.c.reshape(-1, m), self.eta)

    def select(self, index: Tensor) -> "Transport":
        """Some of the problems of one batch dimension."""
        return Transport(self.C[index], self.r[index], self.c[index], self.eta)

    def plan(self, x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch n m"]:
        """The plan, entries far below rounding lifted to a tiny positive number for speed."""
        exponent = (x.unsqueeze(-1) + y.unsqueeze(-2)).sub_(self.C).mul_(self.eta).sub_(1)
        return exponent.clamp_min_(exponent_floor(self.C.dtype)).exp_()

    def sweep(self, y: Float[Tensor, "*batch m"]) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]]:
        """Both half updates, the rows first."""
        x = row_potential(self.C, y, self.log_r, self.eta)
        return x, column_potential(self.C, x, self.log_c, self.eta)

    def error(self, a: Float[Tensor, "*batch n"], b: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
        r"""$(|a - r|_1 + |b - c|_1) / \text{mass}$ of a plan with these row and column sums."""
        return ((a - self.r).abs().sum(-1) + (b - self.c).abs().sum(-1)) / self.mass

    def value(
        self, x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch m"], total: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """f, for a plan of this total."""
        return (self.r * x).sum(-1) + (self.c * y).sum(-1) - total / self.eta


def sinkhorn_sweep(
    x: Float[Tensor, "*batch n"],
    y: Float[Tensor, "*batch m"],
    C: Float[Tensor, "*batch n m"],
    r: Float[Tensor, "*batch n"],
    c: Float[Tensor, "*batch m"],
    eta: float,
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]]:
    r"""One sweep of Sinkhorn's iteration: x from y, then y from the new x; each step maximises f exactly.

    Args:
        x: potentials of the rows; only the shape counts.
        y: potentials of the columns.
        C: costs.
        r: row sums, positive.
        c: column sums, positive.
        eta: inverse temperature.

    Returns:
        The new potentials; the columns of the plan then sum to c.

    Examples:
        >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> half = torch.full((2,), 0.5)
        >>> x, y = sinkhorn_sweep(torch.zeros(2), torch.zeros(2), C, half, half, 10.0)
        >>> coupling(C, x, y, 10.0).sum(0)
        tensor([0.5000, 0.5000])
    """
    x = row_potential(C, y, r.log(), eta)
    return x, column_potential(C, x, c.log(), eta)


def dual_value(
    x: Float[Tensor, "*batch n"],
    y: Float[Tensor, "*batch m"],
    C: Float[Tensor, "*batch n m"],
    r: Float[Tensor, "*batch n"],
    c: Float[Tensor, "*batch m"],
    eta: float,
) -> Float[Tensor, "*batch"]:
    r"""$f(x, y) = r^\top x + c^\top y - \frac{1}{\eta} \sum_{ij} P_{ij}$: a lower bound of the optimum.

    Args:
        x: potentials of the rows.
        y: potentials of the columns.
        C: costs.
        r: row sums.
        c: column sums.
        eta: inverse temperature.
    """
    return (r * x).sum(-1) + (c * y).sum(-1) - coupling(C, x, y, eta).sum((-2, -1)) / eta


def dual_gradient(
    x: Float[Tensor, "*batch n"],
    y: Float[Tensor, "*batch m"],
    C: Float[Tensor, "*batch n m"],
    r: Float[Tensor, "*batch n"],
    c: Float[Tensor, "*batch m"],
    eta: float,
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]]:
    r"""$\nabla f = (r - P 1,\; c - P^\top 1)$.

    Args:
        x: potentials of the rows.
        y: potentials of the columns.
        C: costs.
        r: row sums.
        c: column sums.
        eta: inverse temperature.
    """
    plan = coupling(C, x, y, eta)
    return r - plan.sum(-1), c - plan.sum(-2)


def _range(C: Tensor) -> tuple[float, float]:
    """The least and the largest finite cost."""
    if not C.numel():
        return 0.0, 0.0
    lowest, highest = map(float, C.aminmax())
    if highest == math.inf:
        highest = float(torch.where(torch.isposinf(C), -math.inf, C).max())
    return lowest, highest


def _check_costs(C: Tensor, forbidden: bool) -> None:
    if all(map(math.isfinite, map(float, C.aminmax() if C.numel() else ()))):
        return
    if not forbidden or bool(C.isnan().any()) or bool(torch.isneginf(C).any()):
        raise ValueError(
            "C must be finite, but holds NaN or infinity. With forbidden=True, +inf means that an entry must stay empty"
        )
    allowed = C.isfinite()
    if not (bool(allowed.any(-1).all()) and bool(allowed.any(-2).all())):
        raise ValueError("C forbids a whole row or column: each needs a finite entry")


def _uniform(other: Tensor | None, C: Tensor, size: int) -> Tensor:
    """Equal masses, with the total of the other marginal, or 1."""
    if other is None:
        return C.new_full((size,), 1 / size)
    return (other.sum(-1, keepdim=True) / size).expand(*other.shape[:-1], size)


def _marginal(name: str, value: Tensor, C: Tensor, size: int) -> Tensor:
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a real tensor, got {what}")
    if value.ndim < 1 or value.shape[-1] != size:
        raise ValueError(
            f"{name} must have the shape (*batch, {size}), as C is {tuple(C.shape)}; got {tuple(value.shape)}"
        )
    value = value.detach().to(C.device, C.dtype)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    if bool((value <= 0).any()):
        axis = "rows" if name == "r" else "columns"
        raise ValueError(
            f"{name} must be positive, but its least entry is {float(value.min()):.3g}: drop the {axis} without mass "
            f"from C and {name}"
        )
    return value
