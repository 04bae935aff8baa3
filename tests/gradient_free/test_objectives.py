import math

import pytest
import torch
from torch import Tensor

from steepest.gradient_free import ackley, grand_canyon3, grand_canyon3_noisy, quadratic, rastrigin


def points(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found: Tensor, expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=tolerance)


def test_the_noisy_canyon() -> None:
    x = points([0, 0], [8, 8], [1, 1], [4, 2], [-1, 0.5])
    close(grand_canyon3_noisy(x), [0.0, 39.0125366, 23.3868305, 10.6875, 28.1521421], 6e-8)


def test_the_canyons_differ_by_the_height_of_the_ripples() -> None:
    x = points([0.3, -1.2], [8, 8], [2.0, 3.0])
    waves = 2 - torch.cos(0.75 * math.pi * x).sum(-1)
    torch.testing.assert_close(grand_canyon3_noisy(x) - grand_canyon3(x), (1.1625 - 0.25) * waves)


def test_the_canyon_is_of_two_variables() -> None:
    with pytest.raises(ValueError, match="two variables"):
        grand_canyon3(torch.zeros(4, 3))


def test_values_by_hand() -> None:
    close(rastrigin(points([0, 0], [1, -2], [0.5, 0])), [0.0, 5.0, 5.25], 1e-14)
    close(rastrigin(points([0.5, 1.0]), amplitude=10.0, curvature=2.0), [22.5], 1e-13)
    close(quadratic(points([1, 2]), points([2, 0.5], [0.5, 1])), [4.0], 1e-15)
    close(quadratic(points([3, 4])), [25.0], 0)
    close(ackley(points([0, 0], [1, 1])), [0.0, 20 - 20 * math.exp(-0.2)], 1e-14)


@pytest.mark.parametrize("function", [rastrigin, ackley, quadratic, grand_canyon3, grand_canyon3_noisy])
def test_leading_dimensions_and_dtype_are_kept(function) -> None:
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    found = function(x.mT.contiguous().mT)
    assert found.shape == (4, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, function(x.double()).float())
    assert torch.equal(found[1, 2], function(x[1, 2]))
