"""Random 3-SAT as an objective: how many clauses an assignment leaves unsatisfied, and what few flips change."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int


def random_3sat(
    variables: int, ratio: float = 4.27, *, generator: torch.Generator | None = None
) -> Int[Tensor, "clauses 3"]:
    """Clauses of three different variables each, with random signs.

    Args:
        variables: n, at least 3.
        ratio: clauses for each variable; 4.27 is near the threshold of satisfiability.
        generator: source of the randomness; None: torch's own.

    Returns:
        Literals as in the DIMACS format: +v or -v for variable v = 1 .. n or its negation.

    Raises:
        ValueError: fewer than three variables, or no clause.
    """
    check_int("variables", variables, 3)
    count = round(ratio * variables)
    if count < 1:
        raise ValueError(f"ratio must give at least one clause, got {ratio} for {variables} variables")
    device = generator.device if generator is not None else torch.device("cpu")
    # The second is drawn from n - 1 places and the third from n - 2, and each steps over those that are taken.
    first, second, third = (
        torch.randint(variables - i, (count,), generator=generator, device=device) for i in range(3)
    )
    second = second + (second >= first)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    third = third + (third >= low)
    third = third + (third >= high)
    sign = torch.randint(2, (count, 3), generator=generator, device=device) * 2 - 1
    return (torch.stack([first, second, third], 1) + 1) * sign


class MaxSat:
    """The number of unsatisfied clauses, for assignments given by real vectors: variable v is true where x_v > 0.

    Called with points (..., n) it returns counts (...). `local` does the same where only one particle's coordinates
    change, and looks only at the clauses that the particle occurs in: O(occurrences), not O(clauses).

    Args:
        clauses: literals +v or -v, v from 1 to n, shape (m, k): k literals in each clause.
        variables: n; None: the largest that occurs.
        share: return the share of unsatisfied clauses instead of their number.
        weights: of the clauses, (m,); None: 1 each.

    Raises:
        TypeError: clauses are no integers.
        ValueError: a shape, a literal 0, or one beyond `variables`.

    Examples:
        >>> problem = MaxSat(torch.tensor([[1, 2, 3], [-1, -2, 3]]))
        >>> problem(torch.tensor([[-1.0, -1.0, -1.0], [1.0, -1.0, -1.0]])).tolist()
        [1.0, 0.0]
    """

    def __init__(
        self,
        clauses: Int[Tensor, "m k"],
        variables: int | None = None,
        *,
        share: bool = False,
        weights: Float[Tensor, " m"] | None = None,
    ) -> None:
        if not isinstance(clauses, Tensor) or clauses.is_floating_point() or clauses.dtype == torch.bool:
            raise TypeError("clauses must be a tensor of integers, literals +v and -v")
        if clauses.ndim != 2 or not clauses.numel():
            raise ValueError(f"clauses must have the shape (m, k) with m, k >= 1, got {tuple(clauses.shape)}")
        largest = int(clauses.abs().max())
        self.variables = largest if variables is None else variables
        if bool((clauses == 0).any()) or largest > self.variables:
            raise ValueError(f"literals must be +-1 to +-{self.variables}, got 0 or one up to {largest}")
        if weights is not None and weights.shape != (len(clauses),):
            raise ValueError(f"weights must have the shape ({len(clauses)},), got {tuple(weights.shape)}")
        self.clauses, self.weights, self.share = clauses, weights, share
        self._variable, self._positive = clauses.abs() - 1, clauses > 0
        places = range(clauses.shape[1])
        self._columns = [
            (self._variable[:, place].contiguous(), self._positive[:, place, None].to(torch.uint8)) for place in places
        ]
        self._incidence: tuple[int, Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
        """Unsatisfied clauses.

        Raises:
            ValueError: x does not end in n.
        """
        if x.shape[-1] != self.variables:
            raise ValueError(f"points must have the shape (..., {self.variables}), got {tuple(x.shape)}")
        # Rows are variables, then clauses, over all points: gathers and reductions go along the rows.
        bits = (x > 0).reshape(-1, self.variables).mT.contiguous().view(torch.uint8)
        missed = torch.ones(len(self.clauses), bits.shape[1], dtype=torch.uint8, device=x.device)
        for column, positive in self._columns:
            missed &= bits.index_select(0, column).bitwise_xor_(positive)
        if self.weights is None:
            count = missed.sum(0, dtype=torch.int32).to(x.dtype)
        else:
            count = self.weights.to(x) @ missed.to(x.dtype)
        return (count * self._factor).reshape(x.shape[:-1])

    @property
    def _factor(self) -> float:
        if not self.share:
            return 1.0
        return 1 / (len(self.clauses) if self.weights is None else float(self.weights.sum()))

    def local(self, x: Float[Tensor, " n"], pieces: Float[Tensor, "P c p"]) -> Float[Tensor, "P c"]:
        """The objective at x with one particle's coordinates replaced.

        Args:
            x: the point.
            pieces: c candidates of each particle; particle i has the coordinates i p to (i + 1) p.
        """
        particles, count, p = pieces.shape
        clause, particle, inside = self._incidences(p)
        variable, positive = self._variable[clause], self._positive[clause]
        present = (x > 0)[variable] == positive
        # A clause that another particle satisfies is satisfied whatever this one does.
        open_ = ~(present & ~inside).any(-1)
        clause, particle, inside = clause[open_], particle[open_], inside[open_]
        variable, positive, present = variable[open_], positive[open_], present[open_]
        bits = (pieces > 0).transpose(1, 2)  # (P, p, c)
        missed = torch.ones(len(clause), count, dtype=torch.bool, device=x.device)
        for place in range(self.clauses.shape[1]):
            own = inside[:, place].nonzero().squeeze(1)
            if own.numel():
                chosen = bits[particle[own], variable[own, place] % p]
                missed[own] &= chosen != positive[own, place, None]
        weight = None if self.weights is None else self.weights.to(x)[clause]
        change = missed.to(x.dtype) - (~present.any(-1)).to(x.dtype).unsqueeze(-1)
        if weight is not None:
            change = change * weight.unsqueeze(-1)
        sums = torch.zeros(particles, count, dtype=x.dtype, device=x.device).index_add_(0, particle, change)
        return self(x) + sums * self._factor

    def _incidences(self, p: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each pair of a clause and a particle that occurs in it: clause, particle, which literals are the particle's.

        Made once for each p.
        """
        if self._incidence is None or self._incidence[0] != p:
            owner = self._variable // p
            k = owner.shape[1]
            fresh = torch.ones_like(owner, dtype=torch.bool)
            for place in range(1, k):
                fresh[:, place] = (owner[:, :place] != owner[:, place : place + 1]).all(-1)
            clause, place = fresh.nonzero().unbind(-1)
            particle = owner[clause, place]
            self._incidence = (p, clause, particle, owner[clause] == particle.unsqueeze(-1))
        return self._incidence[1:]
