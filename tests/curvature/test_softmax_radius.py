"""Radii against numbers computed by hand or elsewhere, the winding number, and what must not change them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from steepest.curvature.softmax_radius import (
    binary_radius,
    dominance_radius,
    exact_radius,
    ghosts,
    radius,
    spread,
    tight_radius,
    top2_radius,
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cases(count: int, classes: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, a = (torch.randn(count, classes, dtype=torch.float64, generator=generator) for _ in range(2))
    return scale * z, a


A = tensor(1, 0.2, -0.7, -1.5)


@pytest.mark.parametrize(
    ("gap", "width", "expected"), [(2.0, 3.0, 1.2413973), (-3.5, 0.8, 5.8789354), (0.0, 1.0, math.pi)]
)
def test_binary_radius(gap: float, width: float, expected: float) -> None:
    assert float(binary_radius(gap, width)) == pytest.approx(expected, abs=5e-8)
    assert float(exact_radius(tensor(gap, 0), tensor(width, 0))) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize(
    ("z", "exact", "dominated"),
    [(tensor(2, 0.5, -1, 0), 1.684737, None), (tensor(6, 0.5, -1, 0), 2.716919, 2.367435)],
)
def test_four_classes(z: Tensor, exact: float, dominated: float | None) -> None:
    # to all digits: 2.7169179 and 2.3674345
    assert float(exact_radius(z, A)) == pytest.approx(exact, abs=2e-6)
    assert float(radius(A)) == pytest.approx(1.256637, abs=5e-7)
    if dominated is not None:
        assert float(dominance_radius(z, A)) == pytest.approx(dominated, abs=1e-6)


def test_three_classes() -> None:
    z, a = tensor(1, 0, -1), tensor(0.5, -1, 2)
    assert float(exact_radius(z, a)) == pytest.approx(2.187293, abs=1e-6)
    assert float(radius(a)) == pytest.approx(1.047198, abs=5e-7)


def test_linear_softmax_model() -> None:
    weight = (torch.arange(12, dtype=torch.float64).reshape(3, 4) / 10).requires_grad_()
    x = torch.tensor([[1, 0, -1, 2], [0.5, 0.5, 0.5, 0.5], [0, 1, 0, -1]], dtype=torch.float64)
    loss = cross_entropy(x @ weight.T, torch.tensor([0, 2, 1]))
    loss.backward()
    assert weight.grad is not None
    slopes = x @ (weight.grad / weight.grad.norm()).T
    assert loss.item() == pytest.approx(1.2338826, abs=5e-8)
    assert float(weight.grad.norm()) == pytest.approx(1.0214065, abs=5e-8)
    torch.testing.assert_close(spread(slopes), tensor(2.9530960, 0.4241522, 1.4031943), rtol=0, atol=5e-8)
    assert float(radius(slopes)) == pytest.approx(1.0638302, abs=5e-8)
    exact = exact_radius((x @ weight.T).detach(), slopes)
    # zeros to 30 digits by Newton
    torch.testing.assert_close(exact, tensor(1.3247550, 10.875158, 2.7373713), rtol=5e-6, atol=0)


@pytest.mark.parametrize("classes", [2, 3, 5, 7])
def test_bounds_are_below_the_exact_radius(classes: int) -> None:
    z, a = cases(25, classes, 3.0, seed=classes)
    exact = exact_radius(z, a)
    tight = tight_radius(z, a)
    assert bool((tight >= radius(a, reduce="none")).all())
    assert bool((exact >= tight * (1 - 1e-9)).all())
    if classes == 2:
        torch.testing.assert_close(exact, binary_radius(z[:, 0] - z[:, 1], (a[:, 0] - a[:, 1]).abs()))
        torch.testing.assert_close(exact, top2_radius(z, a))


def test_dominance_solves_its_equation() -> None:
    z, a = cases(50, 5, 4.0)
    r = dominance_radius(z, a)
    y = z.argmax(-1, keepdim=True)
    terms = (z - z.gather(-1, y) + (a - a.gather(-1, y)).abs() * r[:, None]).exp().sum(-1) - 1
    dominated = r > 0
    assert bool(dominated.any())
    torch.testing.assert_close(terms[dominated], torch.ones_like(terms[dominated]), rtol=1e-9, atol=0)
    assert bool((terms[~dominated] >= 1).all())


def test_exact_radius_is_a_zero() -> None:
    z, a = cases(10, 4, 2.0)
    for one, other, r in zip(z, a, exact_radius(z, a), strict=True):
        angle = torch.linspace(0, math.pi, 400_001, dtype=torch.float64)
        values = (one + other * torch.polar(r.expand_as(angle), angle)[:, None]).exp().sum(-1)
        assert float(values.abs().min()) < 1e-4 * float(values.abs().max())


def test_top2_is_no_bound() -> None:
    z, a = cases(60, 5, 2.0)
    assert bool((top2_radius(z, a) > exact_radius(z, a)).any())
    t = ghosts(z, a)
    torch.testing.assert_close(t.abs(), top2_radius(z, a))
    y = z.argmax(-1)
    torch.testing.assert_close(top2_radius(z, a, y), top2_radius(z, a))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-50, 50), st.floats(0.01, 30), st.floats(0.1, 10))
def test_invariances(seed: int, shift: float, factor: float, temperature: float) -> None:
    z, a = cases(6, 4, 3.0, seed=seed)
    for found in (lambda z, a, **o: radius(a, **o), tight_radius, top2_radius):
        base = found(z, a)
        for other in (found(z + shift, a), found(z, a + shift), found(z, -a)):
            torch.testing.assert_close(other, base, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found(z, factor * a), base / factor, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found(z / temperature, a / temperature), found(z, a, temperature=temperature))
    torch.testing.assert_close(radius(torch.cat([a, a])), radius(a))


def test_exact_radius_is_invariant() -> None:
    z, a = cases(3, 4, 3.0)
    base = exact_radius(z, a)
    for other in (exact_radius(z + 7, a), exact_radius(z, a - 3), exact_radius(z, -a), 2 * exact_radius(z, 2 * a)):
        torch.testing.assert_close(other, base, rtol=1e-8, atol=0)
    torch.testing.assert_close(exact_radius(z, a, temperature=3.0), exact_radius(z / 3, a / 3), rtol=1e-8, atol=0)


def test_no_spread_is_an_infinite_radius() -> None:
    z, a = tensor(1, 2, 3), tensor(0.5, 0.5, 0.5)
    assert float(radius(a)) == float(exact_radius(z, a)) == float(tight_radius(z, a)) == math.inf


def test_reduce() -> None:
    slopes = torch.stack([torch.zeros(100, dtype=torch.float64), torch.arange(1, 101, dtype=torch.float64)], -1)
    assert float(radius(slopes)) == pytest.approx(math.pi / 100)
    assert float(radius(slopes, reduce=0.99)) == pytest.approx(math.pi / 99)
    assert radius(slopes.reshape(10, 10, 2), reduce="none").shape == (10, 10)
    assert float(radius(slopes, temperature=2.0)) == pytest.approx(2 * math.pi / 100)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: radius(torch.zeros(3, 1)), "two classes"),
        (lambda: tight_radius(torch.zeros(3, 1), torch.zeros(3, 1)), "two classes"),
        (lambda: radius(torch.zeros(0, 4)), "at least one sample"),
        (lambda: radius(torch.tensor([[1.0, math.nan]])), "finite"),
        (lambda: radius(A, reduce="mean"), "reduce"),
        (lambda: radius(A, reduce=1.5), "reduce"),
        (lambda: radius(A, temperature=0.0), "temperature"),
        (lambda: tight_radius(A, A[:3]), "shape"),
        (lambda: exact_radius(tensor(1, math.inf), tensor(1, 2)), "finite"),
        (lambda: ghosts(A, A, torch.zeros(2, dtype=torch.int64)), "labels"),
        (lambda: binary_radius(1.0, -1.0), "spread"),
    ],
)  # fmt: skip
def test_bad_input(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_the_binary_radius_of_whole_numbers() -> None:
    assert float(binary_radius(torch.tensor(2), torch.tensor(3))) == pytest.approx(1.2413973, abs=5e-8)
    for gap, width in ((math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="finite"):
            binary_radius(gap, width)
