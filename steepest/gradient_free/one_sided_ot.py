"""One-sided entropic transport: how much weight each particle gives to each vertex, from softmax to Sinkhorn."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from steepest._checks import check_int
from steepest.geometry.couplings import column_log_sums, row_log_sums


@runtime_checkable
class Solver(Protocol):
    """Costs to weights: what `PolyStep` asks of a solver.

    `weights(cost, epsilon)` takes costs (*batch, particles, vertices) and returns weights of that shape, each row of
    them summing to one. A solver with memory (warm starts) also has `reset`, `state_dict` and `load_state_dict`.
    """

    def weights(self, cost: Tensor, epsilon: float) -> Tensor: ...


def one_sided_ot(
    cost: Float[Tensor, "*batch n m"],
    epsilon: float,
    lam: float = 0.0,
    *,
    a: Float[Tensor, "*#batch n"] | None = None,
    b: Float[Tensor, "*#batch m"] | None = None,
    relaxation: float = 1.0,
    tol: float | None = None,
    max_iterations: int = 10_000,
) -> Float[Tensor, "*batch n m"]:
    r"""Entropic transport with exact row sums and column sums that are only encouraged.

    Minimises $\langle C, T\rangle + \varepsilon \sum T (\log T - 1) + \lambda\,\mathrm{KL}(T^\top 1 \,|\, b)$ subject
    to $T 1 = a$, by the alternation

    $$g_j = \tfrac{\lambda}{\lambda + \varepsilon}\,\varepsilon
    \Big(\log b_j - \log \sum_i e^{(f_i - C_{ij})/\varepsilon}\Big), \quad
    f_i = \varepsilon\Big(\log a_i - \log \sum_j e^{(g_j - C_{ij})/\varepsilon}\Big),
    \quad T = e^{(f + g - C)/\varepsilon}.$$

    $\lambda = 0$ is a softmax of each row, times a; $\lambda = \infty$ is Sinkhorn. The rows are updated last, so their
    sums are exact.

    Args:
        cost: C; an infinite entry forbids its pair.
        epsilon: $\varepsilon > 0$, the temperature.
        lam: $\lambda \ge 0$, weight of the column marginal; ``math.inf`` fixes it.
        a: row marginal, positive; None: 1/n each.
        b: column marginal, positive; None: 1/m each. With $\lambda = \infty$ the sums of a and b must agree.
        relaxation: over-relaxation of g, from 1 (none) to below 2.
        tol: stop when no g changes by more than this times epsilon; None: 1e-12 in float64, 1e-6 in float32.
        max_iterations: warn and return what is there after so many.

    Raises:
        ValueError: an argument out of its range, NaN or minus infinity in the costs, or a row that is all infinite.

    Source:
        Le 2026, arXiv 2605.01928; Chizat, Peyré, Schmitzer and Vialard 2018, arXiv 1607.05816 (unbalanced scaling).

    Examples:
        >>> cost = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
        >>> one_sided_ot(cost, 1.0).sum(-1).tolist()
        [0.5, 0.5]
    """
    _check(cost, epsilon, lam)
    plan, _ = _solve(cost, epsilon, lam, a, b, None, relaxation, tol, max_iterations)
    return plan


def _check(cost: Tensor, epsilon: float, lam: float) -> None:
    if not isinstance(cost, Tensor) or not cost.is_floating_point() or cost.ndim < 2 or 0 in cost.shape[-2:]:
        kind = f"{cost.dtype} of shape {tuple(cost.shape)}" if isinstance(cost, Tensor) else type(cost).__name__
        raise ValueError(f"cost must be a real tensor of shape (..., n, m), got {kind}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if not lam >= 0:
        raise ValueError(f"lam must be at least 0, got {lam}")
    if bool(cost.isnan().any()) or bool((cost == -math.inf).any()):
        raise ValueError("cost must hold no NaN and no minus infinity")
    if bool((cost == math.inf).all(-1).any()):
        raise ValueError("a row of cost is all infinite: it has nowhere to go")


def _marginal(name: str, value: Tensor | None, cost: Tensor, size: int) -> Tensor:
    if value is None:
        return torch.full((size,), -math.log(size), dtype=cost.dtype, device=cost.device)
    if value.shape[-1:] != (size,) or not bool((value > 0).all()) or not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be {size} positive numbers, got shape {tuple(value.shape)}, least {value.min()}")
    return value.to(cost).log()


def _solve(
    cost: Tensor,
    epsilon: float,
    lam: float,
    a: Tensor | None,
    b: Tensor | None,
    g: Tensor | None,
    relaxation: float,
    tol: float | None,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """The plan and the column potentials g, over epsilon."""
    n, m = cost.shape[-2:]
    log_a, log_b = _marginal("a", a, cost, n), _marginal("b", b, cost, m)
    if lam == math.inf:
        sums = log_a.exp().sum(-1), log_b.exp().sum(-1)
        if not bool(torch.isclose(sums[0], sums[1], rtol=1e-5, atol=0).all()):
            raise ValueError("lam=inf fixes both marginals: a and b must have the same sum")
    if not 1 <= relaxation < 2:
        raise ValueError(f"relaxation must be in [1, 2), got {relaxation}")
    tol = (1e-12 if cost.dtype == torch.float64 else 1e-6) if tol is None else tol
    # Potentials do not change when a row of costs is shifted; shifted rows keep their digits.
    scaled = (cost - cost.amin(-1, keepdim=True)) / epsilon
    share = 1.0 if lam == math.inf else lam / (lam + epsilon)
    g = torch.zeros(*cost.shape[:-2], m, dtype=cost.dtype, device=cost.device) if g is None else g
    if share > 0:
        for _ in range(max_iterations):
            f = log_a - row_log_sums(scaled, g, 1.0)
            new = share * (log_b - column_log_sums(scaled, f, 1.0))
            if share == 1:
                new = new - new.mean(-1, keepdim=True)
            new = torch.where(new.isfinite(), new, g)  # a column that nothing may enter
            step = new - g
            g = g + relaxation * step
            if not bool((step.abs() > tol * (1 + g.abs())).any()):
                break
        else:
            warnings.warn(
                f"one_sided_ot stopped after {max_iterations} iterations at a change of {float(step.abs().max()):.2g}: "
                "raise epsilon, lower lam, or raise max_iterations",
                UserWarning,
                stacklevel=3,
            )
    # The row update is a softmax, which gives row sums that are exact to rounding.
    plan = torch.softmax(g.unsqueeze(-2) - scaled, -1) * log_a.exp().unsqueeze(-1)
    return plan, g


@dataclass(frozen=True)
class Softmax:
    r"""$W_{iv} = e^{-C_{iv}/\varepsilon} / \sum_u e^{-C_{iu}/\varepsilon}$: transport with the row marginal alone."""

    def weights(self, cost: Float[Tensor, "*b p v"], epsilon: float) -> Float[Tensor, "*b p v"]:
        return torch.softmax(-(cost - cost.amin(-1, keepdim=True)) / epsilon, -1)


@dataclass(frozen=True)
class Tempered:
    r"""A softmax whose temperature is fixed, whatever epsilon is.

    Args:
        temperature: $\tau > 0$.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def weights(self, cost: Float[Tensor, "*b p v"], epsilon: float) -> Float[Tensor, "*b p v"]:
        return Softmax().weights(cost, self.temperature)


@dataclass(frozen=True)
class Greedy:
    """All weight on the best vertex; shared equally where several are best. The limit of softmax at epsilon = 0."""

    def weights(self, cost: Float[Tensor, "*b p v"], epsilon: float) -> Float[Tensor, "*b p v"]:
        best = (cost == cost.amin(-1, keepdim=True)).to(cost)
        return best / best.sum(-1, keepdim=True)


@dataclass(frozen=True)
class TopK:
    """Equal weight on the k best vertices; all ties at the k-th place share what is left.

    Args:
        k: how many; at most the number of vertices counts.
    """

    k: int = 2

    def __post_init__(self) -> None:
        check_int("k", self.k)

    def weights(self, cost: Float[Tensor, "*b p v"], epsilon: float) -> Float[Tensor, "*b p v"]:
        k = min(self.k, cost.shape[-1])
        limit = cost.sort(-1).values[..., k - 1 : k]
        below, tied = (cost < limit).to(cost), (cost == limit).to(cost)
        rest = (k - below.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)
        return (below + rest * tied) / k


class SemiRelaxed:
    r"""Rows of `one_sided_ot` over all particles of a run, with warm starts from step to step.

    Args:
        lam: $\lambda > 0$; ``math.inf`` is Sinkhorn, which needs at least two particles: with one its plan is uniform,
            whatever the costs are.
        relaxation: over-relaxation, in [1, 2).
        tol: see `one_sided_ot`; None: 1e-9 in float64, 1e-5 in float32.
        max_iterations: see `one_sided_ot`.

    Raises:
        ValueError: an argument out of its range; Sinkhorn with one particle, at the first use.
    """

    def __init__(
        self, lam: float, *, relaxation: float = 1.0, tol: float | None = None, max_iterations: int = 1_000
    ) -> None:
        if isinstance(lam, bool) or not isinstance(lam, int | float) or not lam > 0:
            raise ValueError(f"lam must be positive (lam = 0 is Softmax()), got {lam!r}")
        if not 1 <= relaxation < 2:
            raise ValueError(f"relaxation must be in [1, 2), got {relaxation}")
        check_int("max_iterations", max_iterations)
        self.lam, self.relaxation, self.tol, self.max_iterations = float(lam), relaxation, tol, max_iterations
        self.potential: Tensor | None = None

    def __repr__(self) -> str:
        return f"SemiRelaxed(lam={self.lam})"

    def weights(self, cost: Float[Tensor, "*b p v"], epsilon: float) -> Float[Tensor, "*b p v"]:
        if self.lam == math.inf and cost.shape[-2] == 1:
            raise ValueError("Sinkhorn with one particle is uniform, whatever the costs are: use solver='softmax'")
        tol = (1e-9 if cost.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        start = self.potential
        if start is not None and start.shape != (*cost.shape[:-2], cost.shape[-1]):
            start = None
        start = None if start is None else start.to(cost)
        options = (self.relaxation, tol, self.max_iterations)
        plan, self.potential = _solve(cost, epsilon, self.lam, None, None, start, *options)
        return plan / plan.sum(-1, keepdim=True)

    def reset(self) -> None:
        """Forget the potentials: the next solve starts cold."""
        self.potential = None

    def state_dict(self) -> dict[str, Any]:
        return {"potential": None if self.potential is None else self.potential.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["potential"]
        if saved is not None and not isinstance(saved, Tensor):
            raise ValueError(f"state: potential must be a tensor or None, got {saved!r:.60}")
        self.potential = None if saved is None else saved.clone()


SOLVERS = ("softmax", "sinkhorn", "greedy", "top_k")


def make_solver(solver: str | Solver) -> Solver:
    """A solver from its name.

    Raises:
        ValueError: an unknown name, or an object without `weights`.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, or an object, got {solver!r}")
        by_name = {"softmax": Softmax, "sinkhorn": lambda: SemiRelaxed(math.inf), "greedy": Greedy, "top_k": TopK}
        return by_name[solver]()
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise ValueError(f"solver must be a name or have weights(cost, epsilon), got {solver!r}")
    return solver
