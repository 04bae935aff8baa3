"""Polar factors: exactness, convergence, scale, rank, batches, dtypes, and the Gram form's restarts."""

import math

import pytest
import torch

from steepest.geometry import COEFFICIENTS, coefficient_schedule, polar, polar_error, singular_value_map
from steepest.geometry.polar import _restarts

EXACT = ["svd", "eigh"]
ITERATIVE = ["newton_schulz", "gram", "auto"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    u, _ = torch.linalg.qr(randn(m, len(values), seed=seed))
    v, _ = torch.linalg.qr(randn(n, len(values), seed=seed + 1))
    return (u * values) @ v.mT


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (2, 4, 6), (2, 3, 6, 4), (1, 1), (1, 5)])
def test_exact_factor_is_the_nearest_partial_isometry(method: str, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    q = polar(x, method)
    short = q @ q.mT if shape[-2] <= shape[-1] else q.mT @ q
    assert torch.allclose(short, torch.eye(min(shape[-2:]), dtype=torch.float64).expand_as(short), atol=1e-10)
    stretch = q.mT @ x
    assert torch.allclose(stretch, stretch.mT, atol=1e-10)
    assert float(torch.linalg.eigvalsh(stretch).min()) > -1e-10


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (3, 4, 30), (2, 2, 30, 4), (1, 1), (1, 8)])
def test_iterations_converge_to_the_exact_factor(method: str, shape: tuple[int, ...]) -> None:
    x = randn(*shape, seed=3)
    assert torch.allclose(polar(x, method, steps=20), polar(x, "svd"), atol=1e-9)


@pytest.mark.parametrize("table", sorted(COEFFICIENTS))
@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
def test_iterations_are_the_scalar_polynomial_on_the_spectrum(table: str, method: str) -> None:
    values = torch.logspace(0, -3, 8, dtype=torch.float64)
    x = with_spectrum(values, 8, 20)
    s = values / values.square().sum().sqrt()
    for a, b, c in coefficient_schedule(table):
        s = a * s + b * s**3 + c * s**5
    got = polar(x, method, coefficients=table, normalize="frobenius")
    want = singular_value_map(x, lambda _: s)
    assert torch.allclose(got, want, atol=1e-9)


def test_schatten4_normalisation_is_the_polynomial_at_the_tighter_scale() -> None:
    values = torch.logspace(0, -2, 8, dtype=torch.float64)
    x = with_spectrum(values, 12, 8)
    s = values / values.pow(4).sum().pow(0.25)
    for a, b, c in coefficient_schedule("polar_express"):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(polar(x, "newton_schulz"), singular_value_map(x, lambda _: s), atol=1e-9)


# Output ranges of singular values in [low, 1] and slope at zero, from the survey of the peers.
RANGES = [
    ("jordan", 5, 0.01, 0.6818, 1.1344),
    ("jordan", 5, 0.001, 0.4705, 1.2024),
    ("quintic", 5, 0.01, 0.9778, 1.0318),
    ("quintic", 5, 0.001, 0.4750, 1.1450),
    ("polar_express", 5, 0.01, 0.8703, 1.1236),
    ("polar_express", 5, 0.001, 0.8462, 1.1236),
    ("polar_express", 8, 0.001, 1.0000, 1.0000),
    ("cans", 5, 0.001, 0.8844, 1.1198),
    ("cubic", 5, 0.01, 0.7741, 1.3000),
    ("cubic", 5, 0.001, 0.1191, 1.3000),
    ("deepseek", 10, 0.001, 1.0000, 1.0005),
    ("aol", 4, 0.1, 0.9874, 1.0117),
]
SLOPES = {"jordan": 485, "quintic": 493, "polar_express": 976, "cans": 1049, "cubic": 119, "aol": 89}


@pytest.mark.parametrize(("table", "steps", "low", "least", "most"), RANGES)
def test_ranges_of_the_tables(table: str, steps: int, low: float, least: float, most: float) -> None:
    s = torch.logspace(math.log10(low), 0, 20001, dtype=torch.float64)
    for a, b, c in coefficient_schedule(table, steps):
        s = a * s + b * s**3 + c * s**5
    assert float(s.min()) == pytest.approx(least, abs=1e-4)
    assert float(s.max()) == pytest.approx(most, abs=1e-4)


@pytest.mark.parametrize(("table", "slope"), SLOPES.items())
def test_slopes_of_the_tables(table: str, slope: int) -> None:
    assert math.prod(a for a, _, _ in coefficient_schedule(table)) == pytest.approx(slope, abs=1)


@pytest.mark.parametrize("method", [*EXACT, *ITERATIVE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_gives_zero_and_keeps_shape_and_dtype(method: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 5, dtype=dtype)
    x[1] = randn(3, 5, dtype=dtype)
    q = polar(x, method)
    assert q.dtype == dtype and q.shape == x.shape
    assert not q[0].any() and q[1].isfinite().all() and float(q[1].float().norm()) > 1
    for shape in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        assert polar(torch.zeros(shape, dtype=dtype), method).shape == shape


@pytest.mark.parametrize("method", [*EXACT, *ITERATIVE])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e38])
def test_no_scale_underflows_or_overflows(method: str, scale: float) -> None:
    x = randn(3, 4, 6, dtype=torch.float32).clamp(-3, 3)
    tiny_and_plain = torch.stack([x[0] * scale, x[1], x[2]])
    assert torch.allclose(polar(tiny_and_plain, method), polar(x, method), atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [*EXACT, *ITERATIVE])
def test_half_precision_is_finite_and_near(dtype: torch.dtype, method: str) -> None:
    x = randn(2, 16, 40, seed=5).to(dtype)
    for scaled in (x, x * 1e-4, x * 500):
        assert polar_error(polar(scaled, method), scaled) < 0.2
    half = polar(x, "newton_schulz", dtype=dtype)
    assert polar_error(half, x) < 0.2


@pytest.mark.parametrize("method", [*EXACT, *ITERATIVE])
def test_rank_deficiency_gives_a_partial_isometry(method: str) -> None:
    x = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 10, 6)
    q = polar(x, method, steps=15)
    assert torch.allclose(q, polar(x, "svd"), atol=1e-6)
    assert torch.linalg.matrix_rank(q, atol=1e-4) == 3
    one = torch.outer(randn(10), randn(6))
    assert torch.allclose(polar(one, method, steps=15), one / one.norm(), atol=1e-6)


def test_aol_scales_a_random_matrix_to_contraction() -> None:
    x = randn(8, 8)
    q = polar(x, "gram", coefficients="aol", normalize="aol")
    assert float(torch.linalg.matrix_norm(q, 2)) < 1.2


@pytest.mark.parametrize("steps", [3, 5, 8, 12, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.float64, 1e-9)])
def test_gram_form_follows_the_direct_form_on_bad_conditions(steps: int, dtype: torch.dtype, tolerance: float) -> None:
    # Directions below machine epsilon are rounding in either form.
    for condition in (1e2, 1e4, 1e7 if dtype == torch.float64 else 1e5):
        x = with_spectrum(torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64), 24, 96).to(dtype)
        direct, gram = (polar(x, method, steps=steps) for method in ("newton_schulz", "gram"))
        assert gram.isfinite().all()
        assert float((gram - direct).abs().max()) < tolerance


def test_gram_restarts_before_rounding_grows() -> None:
    schedule = coefficient_schedule("polar_express", 12)
    assert _restarts(schedule[:5], torch.float32) == ()
    assert len(_restarts(schedule, torch.float32)) >= 1
    assert len(_restarts(schedule[:5], torch.float16)) >= 1


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_memory_layout(layout: str) -> None:
    x = randn(3, 5, 7, dtype=torch.float32)
    view = {
        "transposed": x.mT.contiguous().mT,
        "strided": randn(3, 10, 7).float()[:, ::2],
        "expanded": x[:1].expand(3, 5, 7),
    }
    given = view[layout]
    kept = given.clone()
    for method in [*EXACT, *ITERATIVE]:
        assert torch.allclose(polar(given, method), polar(given.contiguous(), method), atol=1e-4)
    assert torch.equal(given, kept)


def test_orthogonality_is_no_worse_than_five_jordan_steps_in_bfloat16() -> None:
    x = randn(4, 48, 48, seed=9).float()
    jordan = polar(x, "newton_schulz", coefficients="jordan", normalize="frobenius", dtype=torch.bfloat16)
    assert polar_error(polar(x), x) <= polar_error(jordan, x)


def test_polar_error_measures_the_worst_direction() -> None:
    x = with_spectrum(torch.tensor([2.0, 1.0, 1e-6], dtype=torch.float64), 3, 5)
    q = polar(x, "svd")
    assert polar_error(q, x) < 1e-12
    assert polar_error(0.9 * q, x) == pytest.approx(0.1)
    assert polar_error(-q, x) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: polar(torch.ones(3)), ValueError, "batch of matrices"),
        (lambda: polar(torch.ones(3, 3, dtype=torch.int32)), TypeError, "floating-point"),
        (lambda: polar(torch.ones(3, 3, dtype=torch.complex64)), TypeError, "floating-point"),
        (lambda: polar([[1.0]]), TypeError, "list"),
        (lambda: polar(torch.ones(3, 3), "qr"), ValueError, "method must be one of"),
        (lambda: polar(torch.ones(3, 3), normalize="l2"), ValueError, "normalize must be one of"),
        (lambda: polar(torch.ones(3, 3), coefficients="mine"), ValueError, "coefficients must be one of"),
        (lambda: polar(torch.ones(3, 3), coefficients=(1.0, 2.0)), ValueError, "coefficients"),
        (lambda: polar(torch.ones(3, 3), coefficients=()), ValueError, "coefficients"),
        (lambda: polar(torch.ones(3, 3), coefficients=(1.0, float("nan"), 0.0)), ValueError, "finite"),
        (lambda: polar(torch.ones(3, 3), steps=0), ValueError, "steps"),
        (lambda: polar(torch.ones(3, 3), steps=2.5), ValueError, "steps"),
        (lambda: polar(torch.ones(3, 3), steps=100), ValueError, "steps"),
    ],
)
def test_wrong_use_says_what_would_be_right(call, error, word) -> None:
    with pytest.raises(error, match=word):
        call()


def test_given_coefficients() -> None:
    x = randn(4, 6)
    table = COEFFICIENTS["jordan"].triples[0]
    assert torch.equal(polar(x, "gram", coefficients=table), polar(x, "gram", coefficients="jordan"))
    assert torch.equal(polar(x, "gram", coefficients=[table] * 5), polar(x, "gram", coefficients="jordan"))
    assert len(coefficient_schedule([table, (2.0, -1.5, 0.5)])) == 2
    assert coefficient_schedule([table, (2.0, -1.5, 0.5)], 4)[-1] == (2.0, -1.5, 0.5)
