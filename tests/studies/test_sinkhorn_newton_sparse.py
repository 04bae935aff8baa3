import itertools
import math

import numpy as np
import pytest
import torch

from steepest.studies import sinkhorn_newton_sparse as study


def claim(name: str):
    return next(each for each in study.CLAIMS if each.id == name)


def test_the_images_are_distributions_on_the_unit_square() -> None:
    C, r, c = study.images((0, 1), 2)
    assert C.shape == (256, 256) and r.shape == c.shape == (256,)
    assert float(r.sum()) == pytest.approx(1) and float(c.min()) > 0
    assert float(C.max()) == pytest.approx(2 * (15 / 16) ** 2)
    assert float(study.images((0, 1), 1)[0].max()) == pytest.approx(2 * 15 / 16)
    coarse = study.images((0, 1), 2, factor=1)
    assert torch.allclose(r.view(8, 2, 8, 2).sum((1, 3)).flatten(), coarse[1])


def test_the_exact_cost_of_an_assignment() -> None:
    from scipy.optimize import linear_sum_assignment

    problem = study.assignment(7, 3)
    C = problem[0].numpy()
    assert np.array_equal(C, np.random.default_rng(3).random((7, 7)))
    assert study.exact_cost(problem) == pytest.approx(C[linear_sum_assignment(C)].sum() / 7, abs=1e-12)
    assert study.exact_cost((problem[0][:, :3], problem[1], torch.full((3,), 1 / 3).double())) > 0


def test_the_l1_pair_costs_what_is_known() -> None:
    assert study.exact_cost(study.images((0, 1), 1)) == pytest.approx(0.11220251, abs=5e-9)


def test_sweeps_are_counted_from_the_first() -> None:
    errors = study.sweeps(study.assignment(10, 0), 20.0, 5)
    assert len(errors) == 5 and all(a > b for a, b in itertools.pairwise(errors))


def test_a_miss_in_one_part_is_no_full_success() -> None:
    good = {"iterations": {"5": [30], "10": [28]}, "sweeps to 1e-12": [7e4], "Sinkhorn's error": [1e-5]}
    assert claim("C2").verdict(good) == "holds"
    assert claim("C2").verdict({**good, "iterations": {"5": [36], "10": [math.inf]}}) == "partly"
    row = {"POT error": 1e-5, "POT seconds": 20.0, "SNS seconds": 1.0, "SNS error": 1e-9}
    assert claim("C7").verdict({"a": row, "b": row}) == "holds"
    assert claim("C7").verdict({"a": row, "b": {**row, "SNS seconds": 2.1}}) == "partly"
    assert claim("C6").verdict({"ratio": {"500": 1.0, "1000": 1.2, "2000": 1.6}}) == "partly"
