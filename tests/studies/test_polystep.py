"""The judges of the PolyStep study, and the problems that it makes."""

from typing import Any

import pytest
import torch

from steepest.studies import polystep
from steepest.studies._polystep_networks import Data, checkerboard, staircase
from steepest.studies._polystep_tasks import Tree, gradient_norms


def claim(name: str) -> Any:
    return next(claim for claim in polystep.CLAIMS if claim.id == name)


def test_claims() -> None:
    assert [each.id for each in polystep.CLAIMS] == [f"C{i}" for i in range(1, 9)]


@pytest.mark.parametrize(("ours", "verdict"), [(0.95, "holds"), (0.92, "partly"), (0.5, "does not hold here")])
def test_leading_means_at_every_budget(ours: float, verdict: str) -> None:
    runs = lambda *values: [{"test": value} for value in values]  # noqa: E731
    budgets = ("equal evaluations", "equal time", "20,000 evaluations")
    rivals = (0.94, 0.93, 0.91)
    measured = {
        budget: {"PolyStep": runs(ours, ours), "evolution, tuned": runs(rival, rival)}
        for budget, rival in zip(budgets, rivals, strict=True)
    }
    assert claim("C4").verdict(measured) == verdict


def test_two_of_three_policies() -> None:
    measured = {mode: {"last": [500.0, 9.0, 460.0]} for mode in polystep.MODES}
    assert claim("C8").verdict(measured) == "holds"
    measured["binary"] = {"last": [500.0, 9.0, 440.0]}
    assert claim("C8").verdict(measured) == "partly"


def test_the_digits() -> None:
    data = Data()
    assert data.train_x.shape == (1347, 64) and data.test_x.shape == (450, 64)
    assert float(data.train_x.mean(0).abs().max()) < 1e-5 and float(data.train_x.std(0).max()) < 0.5
    x, y = next(data.batches(torch.Generator().manual_seed(0)))
    assert x.shape == (128, 64) and y.shape == (128,)
    model = staircase(torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in model.parameters()) == 3466 and 0 <= data.accuracy(model) <= 0.4


def test_the_tree_votes() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = checkerboard(600, generator)
    assert 0.35 < float(y.float().mean()) < 0.55 and float(x.abs().max()) < 1.3
    tree = Tree(x, y)
    splits = torch.randn(3, tree.population.size, generator=generator)
    assert tree.population.size == 45
    for row, error in zip(splits, tree(splits).tolist(), strict=True):
        tree.population.write(row)
        leaf = tree.tree(x).argmax(-1)
        wrong = sum(int((y[leaf == each] != y[leaf == each].mode().values).sum()) for each in leaf.unique())
        assert error == pytest.approx(wrong / 600, abs=1e-6)
        assert tree.accuracy(row, x, y) == pytest.approx(1 - error, abs=1e-6)


def test_the_smooth_function_begins_at_two() -> None:
    squares = gradient_norms(3, torch.Generator().manual_seed(0))
    assert float(squares[0]) == pytest.approx(16 * 0.8**2)
    assert float(squares[2]) > float(squares[0])  # the slope is greatest at one
