"""MAX-SAT: counts against brute force, and changes of few variables against the whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.gradient_free import MaxSat, PolyStepSearch, random_3sat
from steepest.loop.schedules import Cosine


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unsatisfied(clauses: Tensor, x: list[float]) -> int:
    return sum(not any((x[abs(v) - 1] > 0) == (v > 0) for v in clause) for clause in clauses.tolist())


def test_random_clauses() -> None:
    clauses = random_3sat(7, 30.0, generator=seeded())
    assert clauses.shape == (210, 3)
    variables = clauses.abs()
    assert int(variables.min()) == 1 and int(variables.max()) == 7
    assert all(len(set(row)) == 3 for row in variables.tolist())
    counts = torch.bincount(variables.flatten(), minlength=8)[1:].float()
    assert float((counts / counts.mean() - 1).abs().max()) < 0.35  # 90 +- 8 each
    assert 0.4 < float((clauses > 0).float().mean()) < 0.6
    sets = {tuple(sorted(row)) for row in random_3sat(4, 50.0, generator=seeded()).abs().tolist()}
    assert sets == set(itertools.combinations(range(1, 5), 3))
    assert len(random_3sat(100, generator=seeded())) == 427
    with pytest.raises(ValueError, match="at least 3"):
        random_3sat(2)
    with pytest.raises(ValueError, match="at least one clause"):
        random_3sat(3, 0.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 9), st.integers(1, 4), st.integers(0, 1000), st.booleans(), st.booleans())
def test_counts_and_changes(n: int, p: int, seed: int, share: bool, weighted: bool) -> None:
    clauses = random_3sat(n, 3.0, generator=seeded(seed))
    weights = torch.rand(len(clauses), generator=seeded(seed + 1), dtype=torch.float64) if weighted else None
    problem = MaxSat(clauses, n, share=share, weights=weights)
    x = torch.randn(4, n, generator=seeded(seed + 2), dtype=torch.float64)
    if not weighted:
        expected = [unsatisfied(clauses, row) / (len(clauses) if share else 1) for row in x.tolist()]
        torch.testing.assert_close(problem(x), torch.tensor(expected, dtype=torch.float64))
    search = PolyStepSearch(problem, x[0], particle_dim=p, step_radius=1.5, probes=2, generator=seeded(seed))
    padded = torch.nn.functional.pad(x[0], (0, search.particles * p - n)).view(search.particles, 1, p)
    pieces = padded + search._offsets(search._look())
    torch.testing.assert_close(problem.local(x[0], pieces).flatten(), problem(search.ask()))


def test_clauses_that_repeat_a_variable_or_have_other_lengths() -> None:
    clauses = torch.tensor([[1, 1], [1, -1], [-2, 3]])
    problem = MaxSat(clauses)
    x = torch.tensor([-1.0, 1.0, -1.0])
    assert float(problem(x)) == 2
    pieces = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    assert problem.local(x, pieces).tolist() == [[1.0, 1.0], [1.0, 2.0]]


def test_steps_by_changes_are_the_steps_by_points() -> None:
    problem = MaxSat(random_3sat(31, generator=seeded()), 31)
    start = torch.randn(31, generator=seeded(1), dtype=torch.float64)
    options = {"particle_dim": 2, "epsilon": 0.5, "step_radius": 1.0, "momentum": 0.5, "coast": 1}
    fast = PolyStepSearch(problem, start, generator=seeded(2), **options)
    slow = PolyStepSearch(problem.__call__, start, generator=seeded(2), **options)
    for _ in range(10):
        fast.step()
        slow.step()
        assert torch.equal(fast.x, slow.x) and float(fast.best_value) == float(slow.best_value)
        assert float(problem(fast.best)) == float(fast.best_value)
    assert fast.evaluations == slow.evaluations == 10 * 16 * 4 and fast.steps == slow.steps


@pytest.mark.filterwarnings("ignore:flat landscape")
def test_it_solves_most_of_a_random_instance() -> None:
    problem = MaxSat(random_3sat(300, generator=seeded()), 300, share=False)
    search = PolyStepSearch(
        problem, 0.1 * torch.randn(300, generator=seeded()), particle_dim=2, epsilon=Cosine(5.0, 0.5, 100),
        step_radius=Cosine(1.0, 0.2, 100), probe_radius=Cosine(4.0, 1.0, 100), momentum=0.5, cost_scale=None,
    )  # fmt: skip
    search.run(100, progress=False)
    assert 1 - float(search.best_value) / len(problem.clauses) > 0.965  # 0.875 by chance


@pytest.mark.parametrize(("clauses", "error"), [
    (torch.tensor([[1, 0, 2]]), "literals"), (torch.tensor([[1, 9]]), "literals"), (torch.tensor([1, 2]), "shape"),
    (torch.zeros(0, 3, dtype=torch.int64), "shape"),
])  # fmt: skip
def test_bad_clauses(clauses: Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        MaxSat(clauses, 5)


def test_other_bad_input() -> None:
    with pytest.raises(TypeError, match="integers"):
        MaxSat(torch.tensor([[1.0, 2.0]]))  # pyright: ignore[reportArgumentType]
    problem = MaxSat(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"shape \(..., 3\)"):
        problem(torch.zeros(4))
    with pytest.raises(ValueError, match="weights"):
        MaxSat(torch.tensor([[1, 2, 3]]), weights=torch.ones(2))
    with pytest.raises(ValueError, match="takes one run"):
        PolyStepSearch(problem, torch.zeros(2, 3))
