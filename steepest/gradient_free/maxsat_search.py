"""Local search for MAX-SAT that sees the clauses: what a black-box method should be compared with."""

import heapq
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int
from steepest.gradient_free._point_arguments import check_start
from steepest.loop import Resumable


class _LocalSearch(Resumable):
    """An assignment, the number of true literals of every clause, and flips in O(occurrences)."""

    _state: ClassVar[tuple[str, ...]] = ("x", "best", "best_value", "evaluations", "flips", "steps")

    def __init__(self, clauses: Int[Tensor, "m k"], x0: Float[Tensor, "n"], flips_per_step: int) -> None:
        x = check_start(x0)
        if x.ndim != 1:
            raise ValueError(f"x0 must have the shape (n,), one number for each variable, got {tuple(x.shape)}")
        if not isinstance(clauses, Tensor) or clauses.is_floating_point() or clauses.dtype == torch.bool:
            raise TypeError("clauses must be a tensor of integers, literals +v and -v")
        if clauses.ndim != 2 or not clauses.numel():
            raise ValueError(f"clauses must have the shape (m, k) with m, k >= 1, got {tuple(clauses.shape)}")
        if bool((clauses == 0).any()) or int(clauses.abs().max()) > len(x):
            raise ValueError(f"literals must be +-1 to +-{len(x)}, got 0 or one beyond")
        check_int("flips_per_step", flips_per_step)
        self.flips_per_step = flips_per_step
        # A literal is 2 v + 1 for variable v = 0 .. n - 1, and 2 v for its negation. Clauses that hold always are left
        # out, and so are repeated literals: then a clause with one true literal is broken by that variable alone.
        codes = ((clauses.abs() - 1) * 2 + (clauses > 0)).tolist()
        distinct = [sorted(set(clause)) for clause in codes]
        self._clauses = [c for c in distinct if not any(a ^ 1 == b for a, b in pairwise(c))]
        self._occurs: list[list[int]] = [[] for _ in range(2 * len(x))]
        for number, clause in enumerate(self._clauses):
            for literal in clause:
                self._occurs[literal].append(number)
        self.x = torch.where(x > 0, 1.0, -1.0).to(x)
        self.evaluations, self.flips, self.steps = 0, 0, 0
        self._build()
        self.best, self.best_value = self.x.clone(), torch.full((), float(len(self._missed)), dtype=x.dtype)
        self.best_value = self.best_value.to(x.device)

    def _build(self) -> None:
        self._true = (self.x > 0).tolist()
        self._count = [sum(self._true[a >> 1] == (a & 1) for a in clause) for clause in self._clauses]
        self._missed = [number for number, count in enumerate(self._count) if not count]
        self._place = {number: place for place, number in enumerate(self._missed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; see `Resumable`."""
        super().load_state_dict(state)
        self._build()

    def _flip(self, variable: int) -> None:
        """Flip, and keep the counts and the list of missed clauses."""
        made = 2 * variable + (not self._true[variable])
        self._true[variable] = not self._true[variable]
        for number in self._occurs[made]:
            self._count[number] += 1
            if self._count[number] == 1:
                place, last = self._place.pop(number), self._missed.pop()
                if last != number:
                    self._missed[place] = last
                    self._place[last] = place
        for number in self._occurs[made ^ 1]:
            self._count[number] -= 1
            if not self._count[number]:
                self._place[number] = len(self._missed)
                self._missed.append(number)
        self.flips += 1

    def _finish(self, best: list[bool], fewest: int) -> dict[str, Any]:
        """Put lists back into tensors at the end of a step."""
        signs = torch.tensor(self._true, dtype=torch.bool, device=self.x.device)
        self.x = torch.where(signs, 1.0, -1.0).to(self.x)
        if fewest < float(self.best_value):
            signs = torch.tensor(best, dtype=torch.bool, device=self.x.device)
            self.best = torch.where(signs, 1.0, -1.0).to(self.x)
            self.best_value = torch.full_like(self.best_value, fewest)
        self.steps += 1
        return {"best": float(self.best_value), "value": float(len(self._missed)), "flips": self.flips}


class WalkSAT(_LocalSearch):
    """Random walk in missed clauses (WalkSAT/SKC), with O(occurrences) work for a flip.

    A flip: pick a missed clause at random. If one of its variables can be flipped without missing another clause, flip
    it; otherwise, with probability `noise`, flip one of its variables at random, and else the one that breaks fewest
    clauses (the first of equals in a random order).

    An evaluation, as counted here, is one flip scored: the number of clauses that it would break. The metrics of a step
    are ``best`` and ``value``, missed clauses at best and now, and ``flips``. It ends flipping when none is missed.

    Args:
        clauses: Literals +v or -v, v from 1 to n, shape (m, k).
        x0: Where to start, (n,): variable v is true where `x0[v - 1] > 0`.
        noise: Probability of a random flip, in [0, 1].
        flips_per_step: Flips in one step, at least 1.
        generator: Source of the draws. None: torch's global one.

    Attributes:
        x: The present assignment as signs, (n,).
        best: The best assignment, (n,).
        best_value: Its number of missed clauses.
        evaluations: Flips scored.
        flips: Flips made.

    Raises:
        TypeError, ValueError: an argument that is not as described.

    Source:
        Selman, Kautz and Cohen 1994, Noise strategies for improving local search, AAAI.

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import WalkSAT
        >>> search = WalkSAT(torch.tensor([[1, 2], [-1, 2], [1, -2]]), torch.tensor([-1.0, -1.0]))
        >>> _ = search.step()
        >>> search.best.tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        clauses: Int[Tensor, "m k"],
        x0: Float[Tensor, "n"],
        *,
        noise: float = 0.5,
        flips_per_step: int = 1000,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise <= 1:
            raise ValueError(f"noise must be a probability, from 0 to 1, got {noise!r}")
        super().__init__(clauses, x0, flips_per_step)
        self.noise, self.generator = float(noise), generator

    def step(self) -> dict[str, Any]:
        """Make some flips."""
        device = torch.device("cpu") if self.generator is None else self.generator.device
        draws = torch.rand(self.flips_per_step, 3, dtype=torch.float64, generator=self.generator, device=device)
        # The order of the missed clauses depends on the past: sorted, a resumed run draws the same ones.
        self._missed.sort()
        self._place = {number: place for place, number in enumerate(self._missed)}
        fewest = len(self._missed)
        since: list[int] = []  # flips since the fewest
        for which, coin, turn in draws.tolist():
            if not self._missed:
                break
            clause = self._clauses[self._missed[int(which * len(self._missed))]]
            start = int(turn * len(clause))
            clause = clause[start:] + clause[:start]
            # In a missed clause all literals are false: flipping one breaks clauses that only its negation holds.
            breaks = [sum(self._count[number] == 1 for number in self._occurs[literal ^ 1]) for literal in clause]
            self.evaluations += len(clause)
            least = min(breaks)
            chosen = 0 if least and coin < self.noise else breaks.index(least)
            self._flip(clause[chosen] >> 1)
            since.append(clause[chosen] >> 1)
            if len(self._missed) < fewest:
                fewest = len(self._missed)
                since.clear()
        best = list(self._true)
        for variable in since:
            best[variable] = not best[variable]
        return self._finish(best, fewest)


class GreedyFlips(_LocalSearch):
    """Steepest one-flip descent: flip the variable that gains most clauses, until no flip gains any.

    Of equal gains the variable with the lowest number is flipped. After a flip only the gains of variables that share a
    clause with it are renewed. An evaluation, as counted here, is one flip scored: n at the start, then the variables
    renewed. The metrics of a step are ``best`` and ``value``, missed clauses at best and now, and ``flips``.

    Args:
        clauses: Literals +v or -v, v from 1 to n, shape (m, k).
        x0: Where to start, (n,): variable v is true where `x0[v - 1] > 0`.
        flips_per_step: Flips in one step at most.

    Attributes:
        x: The present assignment as signs, (n,).
        best: The best assignment, (n,): the present one.
        best_value: Its number of missed clauses.
        evaluations: Flips scored.
        flips: Flips made.
        converged: Whether no flip gains a clause.

    Raises:
        TypeError, ValueError: an argument that is not as described.

    Examples:
        >>> import torch
        >>> from steepest.gradient_free import GreedyFlips
        >>> search = GreedyFlips(torch.tensor([[1, 2], [-1, 2], [1, -2]]), torch.tensor([-1.0, -1.0]))
        >>> int(search.step()["best"]), search.converged
        (1, True)
    """

    def __init__(self, clauses: Int[Tensor, "m k"], x0: Float[Tensor, "n"], *, flips_per_step: int = 1000) -> None:
        super().__init__(clauses, x0, flips_per_step)
        self.evaluations = len(self.x)

    def _build(self) -> None:
        super()._build()
        self._gain = [0] * len(self._true)
        for number in range(len(self._clauses)):
            self._share(number, 1)
        self._heap = [(-gain, variable) for variable, gain in enumerate(self._gain) if gain > 0]
        heapq.heapify(self._heap)

    def _share(self, number: int, sign: int) -> None:
        """Add or take back what a clause gives to the gains: 1 to all if missed, -1 to the only one that holds it."""
        count = self._count[number]
        if count > 1:
            return
        for literal in self._clauses[number]:
            if not count:
                self._gain[literal >> 1] += sign
            elif self._true[literal >> 1] == (literal & 1):
                self._gain[literal >> 1] -= sign

    @property
    def converged(self) -> bool:
        """Whether no flip gains a clause."""
        while self._heap and self._gain[self._heap[0][1]] != -self._heap[0][0]:
            heapq.heappop(self._heap)  # the gain has changed since
        return not self._heap

    def step(self) -> dict[str, Any]:
        """Make some flips."""
        for _ in range(self.flips_per_step):
            if self.converged:
                break
            variable = self._heap[0][1]
            touched = self._occurs[2 * variable] + self._occurs[2 * variable + 1]
            for number in touched:
                self._share(number, -1)
            self._flip(variable)
            for number in touched:
                self._share(number, 1)
            renewed = {literal >> 1 for number in touched for literal in self._clauses[number]}
            self.evaluations += len(renewed)
            for other in renewed:
                if self._gain[other] > 0:
                    heapq.heappush(self._heap, (-self._gain[other], other))
        return self._finish(self._true, len(self._missed))
