"""Local search for MAX-SAT: its counts are the objective's, and its flips are the ones that the rule says."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.gradient_free.maxsat_search import GreedyFlips, WalkSAT


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def instance(variables: int, clauses: int, seed: int = 0, k: int = 3) -> Tensor:
    """Random literals; variables may repeat within a clause."""
    g = generator(seed)
    signs = 2 * torch.randint(2, (clauses, k), generator=g) - 1
    return (torch.randint(variables, (clauses, k), generator=g) + 1) * signs


def missed(clauses: Tensor, x: Tensor) -> int:
    values = x[..., clauses.abs() - 1] > 0
    return int((values != (clauses > 0)).all(-1).sum())


def start(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=generator(seed))


@given(st.integers(0, 500), st.integers(3, 12), st.integers(1, 60), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_counts_are_the_objectives_after_every_step(seed: int, n: int, m: int, k: int) -> None:
    clauses, x0 = instance(n, m, seed, k), start(n, seed)
    walk = WalkSAT(clauses, x0, flips_per_step=3, generator=generator(seed))
    greedy = GreedyFlips(clauses, x0, flips_per_step=2)
    for search in (walk, greedy):
        assert float(search.best_value) == missed(clauses, x0)
        for _ in range(6):
            metrics = search.step()
            assert metrics["value"] == missed(clauses, search.x)
            assert float(search.best_value) == missed(clauses, search.best)
            assert set(search.x.abs().tolist()) == {1.0}


@given(st.integers(0, 500), st.integers(3, 10), st.integers(5, 50))
@settings(max_examples=40, deadline=None)
def test_greedy_takes_the_best_flip_and_ends_in_a_local_minimum(seed: int, n: int, m: int) -> None:
    clauses = instance(n, m, seed)
    search = GreedyFlips(clauses, start(n, seed), flips_per_step=1)
    x = search.x
    for _ in range(2 * m):
        values = []
        for v in range(n):
            flipped = x.clone()
            flipped[v] *= -1
            values.append(missed(clauses, flipped))
        if min(values) >= missed(clauses, x):
            break
        x = x.clone()
        x[values.index(min(values))] *= -1
        search.step()
        assert torch.equal(search.x, x)
    search.step()
    assert search.converged
    assert torch.equal(search.x, x)


def test_walksat_flips_a_variable_of_a_missed_clause_and_a_free_one_first() -> None:
    clauses = instance(30, 126, seed=3)
    search = WalkSAT(clauses, start(30), flips_per_step=1, noise=0.0, generator=generator(2))
    for _ in range(60):
        x, before = search.x.clone(), missed(clauses, search.x)
        if not before:
            break
        search.step()
        (variable,) = (search.x != x).nonzero().flatten().tolist()
        held = ((x[clauses.abs() - 1] > 0) == (clauses > 0)).any(1)
        homes = [c for c in clauses[~held].tolist() if variable + 1 in map(abs, c)]
        assert homes, "the variable is in a missed clause"

        def broken(v: int, x: Tensor = x, held: Tensor = held) -> int:
            flipped = x.clone()
            flipped[v] *= -1
            after = ((flipped[clauses.abs() - 1] > 0) == (clauses > 0)).any(1)
            return int((held & ~after).sum())

        assert any(broken(variable) == min(broken(abs(lit) - 1) for lit in clause) for clause in homes)


def test_walksat_solves_what_greedy_does_not() -> None:
    clauses = instance(200, 800, seed=5)
    walk = WalkSAT(clauses, start(200), flips_per_step=20_000, generator=generator())
    greedy = GreedyFlips(clauses, start(200), flips_per_step=20_000)
    walk.step()
    greedy.step()
    assert float(walk.best_value) == 0
    assert float(greedy.best_value) > 0
    assert walk.evaluations <= 3 * walk.flips
    assert greedy.evaluations > 200
    flips = walk.flips
    walk.step()
    assert walk.flips == flips, "nothing is left to flip"


def test_tautologies_and_repeated_literals() -> None:
    clauses = torch.tensor([[1, -1, 2], [2, 2, 2], [-2, -2, 3]])
    x0 = torch.tensor([1.0, -1.0, -1.0])
    for search in (WalkSAT(clauses, x0, generator=generator()), GreedyFlips(clauses, x0)):
        search.step()
        assert float(search.best_value) == missed(clauses, search.best)
    assert float(WalkSAT(clauses, x0, generator=generator()).step()["best"]) == 0
    assert float(WalkSAT(torch.tensor([[1, -1]]), x0).best_value) == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WalkSAT(torch.ones(2, 3), start(3)), TypeError, "clauses must be a tensor of integers"),
        (lambda: WalkSAT(torch.ones(3, dtype=torch.long), start(3)), ValueError, r"shape \(m, k\)"),
        (lambda: GreedyFlips(torch.tensor([[0, 1]]), start(3)), ValueError, r"literals must be \+-1 to \+-3"),
        (lambda: GreedyFlips(torch.tensor([[4, 1]]), start(3)), ValueError, r"literals must be \+-1 to \+-3"),
        (lambda: GreedyFlips(torch.tensor([[1, 2]]), torch.ones(2, 3)), ValueError, r"x0 must have the shape \(n,\)"),
        (lambda: WalkSAT(torch.tensor([[1, 2]]), start(3), noise=1.5), ValueError, "noise must be a probability"),
        (lambda: WalkSAT(torch.tensor([[1, 2]]), start(3), flips_per_step=0), ValueError, "flips_per_step must be"),
    ],
)
def test_bad_input(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
