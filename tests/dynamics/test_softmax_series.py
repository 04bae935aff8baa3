"""Divergences and series along a step, against direct sums in many digits."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from steepest.curvature.softmax_radius import exact_radius
from steepest.dynamics import kl_remainder, log_partition_series


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


Z, A = tensor(1, 0, -1), tensor(0.5, -1, 2)


def test_the_sheets_numbers() -> None:
    found = kl_remainder(Z, A, 0.1)
    assert float(found.forward) == pytest.approx(0.00348919, abs=5e-9)
    assert float(found.reverse) == pytest.approx(0.00349299, abs=5e-9)
    assert float(found.quadratic) == pytest.approx(0.00349681, abs=5e-9)
    assert 2 * float(found.quadratic) / 0.01 == pytest.approx(0.6993621, abs=5e-8)


def test_divergences_are_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    z, a = (2 * torch.randn(50, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    for step in (0.01, 0.3, 4.0, -2.0):
        p, q = z.log_softmax(-1), (z + step * a).log_softmax(-1)
        found = kl_remainder(z, a, step)
        torch.testing.assert_close(found.reverse, (p.exp() * (p - q)).sum(-1), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(found.forward, (q.exp() * (q - p)).sum(-1), rtol=1e-9, atol=1e-15)
        assert bool(((found.forward - found.quadratic).abs() <= found.forward_bound).all())
        assert bool(((found.reverse - found.quadratic).abs() <= found.reverse_bound).all())


def test_the_constants_are_nearly_reached() -> None:
    assert 1 / (18 * math.sqrt(3)) == pytest.approx(0.0320750, abs=5e-8)
    assert 1 / (36 * math.sqrt(3)) == pytest.approx(0.0160375, abs=5e-8)
    p = (1 + 1 / math.sqrt(3)) / 2
    z, a = tensor(math.log(p / (1 - p)), 0), tensor(1, 0)
    found = kl_remainder(z, a, 1e-3)
    assert float((found.reverse - found.quadratic).abs() / found.reverse_bound) == pytest.approx(1, abs=2e-3)
    assert float((found.forward - found.quadratic).abs() / found.forward_bound) == pytest.approx(1, abs=2e-3)


def test_tiny_steps_do_not_cancel() -> None:
    found = kl_remainder(Z, A, 1e-9)
    assert float(found.reverse / found.quadratic) == pytest.approx(1, abs=1e-8)


def test_series_against_decimals() -> None:
    order = 60
    with localcontext() as context:
        context.prec = 80
        z, a = ([Decimal(str(float(x))) for x in v] for v in (Z, A))
        w = [x.exp() for x in z]
        f = [sum(u * x**n for u, x in zip(w, a, strict=True)) / math.factorial(n) / sum(w) for n in range(order + 1)]
        c = [sum(w).ln()]
        for n in range(1, order + 1):
            c.append((n * f[n] - sum(k * c[k] * f[n - k] for k in range(1, n))) / n)
        expected = [float(x) for x in c]
    found = log_partition_series(Z, A, order)
    scale = float(exact_radius(Z, A)) ** -torch.arange(order + 1, dtype=torch.float64)
    assert float(((found - torch.tensor(expected, dtype=torch.float64)) / scale).abs().max()) < 1e-9
    for n, root in ((20, 2.4649), (40, 2.3839), (60, 2.3663)):
        assert float(found[n].abs()) ** (-1 / n) == pytest.approx(root, abs=5e-5)
    assert float(log_partition_series(Z, A, 0)) == pytest.approx(float(Z.logsumexp(0)))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="two classes"):
        kl_remainder(Z[:1], A[:1], 0.1)
    with pytest.raises(ValueError, match="shape"):
        kl_remainder(Z, A[:2], 0.1)
    with pytest.raises(ValueError, match="order"):
        log_partition_series(Z, A, -1)
