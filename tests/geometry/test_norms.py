"""Identities that define a norm, its dual and its oracle, for every norm of the package."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.geometry import (
    L1,
    NORMS,
    Euclidean,
    Lp,
    Max,
    MaxColumn,
    MaxRow,
    Norm,
    Nuclear,
    Scaled,
    Schatten,
    Spectral,
    SumColumn,
    SumRow,
    get_norm,
    one_to_max,
    one_to_rms,
    polar,
    rms_to_max,
    rms_to_rms,
    vector_rms,
)

NORM_OBJECTS: list[Norm] = [
    Euclidean(),
    Max(),
    L1(),
    Lp(1.5),
    Lp(4.0),
    Spectral(),
    Nuclear(),
    Schatten(1.3),
    Schatten(2.0),
    Schatten(7.0),
    Schatten(0.5),
    MaxRow(),
    SumRow(),
    MaxColumn(),
    SumColumn(),
    Scaled(Spectral(), 3.0),
    Scaled(Scaled(Max(), 0.5), 0.25),
    rms_to_rms(2.0),
    rms_to_rms(at_least_one=True),
    one_to_rms(),
    rms_to_max(0.1),
    one_to_max(),
]
CONVEX = [norm for norm in NORM_OBJECTS if norm != Schatten(0.5)]
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 2**31 - 1)


def matrices(seed: int, *shape: int) -> torch.Tensor:
    """Gaussian matrices, some of low rank or with zero rows, as the seed has it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        x = x[..., :1] * torch.randn(*shape[:-2], 1, shape[-1], generator=generator, dtype=torch.float64)
    if seed % 5 == 0:
        x[..., 0, :] = 0
    return x * 10.0 ** (seed % 7 - 3)


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((-2, -1))


@pytest.mark.parametrize("norm", NORM_OBJECTS, ids=repr)
@settings(deadline=None, max_examples=15)
@given(seed=seeds, shape=shapes)
def test_the_oracle_attains_the_dual_norm_on_the_unit_ball(norm: Norm, seed: int, shape: tuple[int, int]) -> None:
    g = matrices(seed, *shape)
    x = norm.lmo(g)
    scale = norm.dual(g)
    assert torch.allclose(inner(g, x), -scale, rtol=1e-9, atol=1e-12 * (1 + float(scale)))
    # Below p = 1 a rounding error e in a zero singular value counts as e^p.
    rounding = 1e-6 if norm == Schatten(0.5) else 1e-9
    assert float(norm.norm(x)) <= 1 + rounding
    assert torch.equal(norm.direction(g), -x)


@pytest.mark.parametrize("norm", NORM_OBJECTS, ids=repr)
@settings(deadline=None, max_examples=15)
@given(seed=seeds, shape=shapes)
def test_no_point_of_the_ball_does_better(norm: Norm, seed: int, shape: tuple[int, int]) -> None:
    g, other = matrices(seed, *shape), matrices(seed + 1, 20, *shape)
    length = norm.norm(other)
    other = other[length > 0] / length[length > 0][:, None, None]
    assert bool((inner(g, other) <= norm.dual(g) * (1 + 1e-9) + 1e-12).all())


@pytest.mark.parametrize("norm", NORM_OBJECTS, ids=repr)
@settings(deadline=None, max_examples=10)
@given(seed=seeds, shape=shapes)
def test_sharp_is_the_steepest_step(norm: Norm, seed: int, shape: tuple[int, int]) -> None:
    g = matrices(seed, *shape)
    step, dual = norm.sharp(g), norm.dual(g)
    assert torch.allclose(inner(g, step), dual.square(), rtol=1e-9)
    assert float(norm.norm(step)) <= float(dual) * (1 + (1e-6 if norm == Schatten(0.5) else 1e-9))
    best = inner(g, step) - norm.norm(step).square() / 2
    for seed_of_other in range(5):
        other = matrices(seed + 7 + seed_of_other, *shape)
        assert float(inner(g, other) - norm.norm(other).square() / 2) <= float(best) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("norm", CONVEX, ids=repr)
@settings(deadline=None, max_examples=10)
@given(seed=seeds, shape=shapes)
def test_the_dual_of_the_dual_is_the_norm(norm: Norm, seed: int, shape: tuple[int, int]) -> None:
    x = matrices(seed, *shape)
    assert torch.allclose(norm.dual_norm.norm(x), norm.dual(x), rtol=1e-9)
    assert torch.allclose(norm.dual_norm.dual(x), norm.norm(x), rtol=1e-9)
    assert torch.allclose(norm.dual_norm.dual_norm.norm(x), norm.norm(x), rtol=1e-9)


def test_below_one_the_bidual_of_a_schatten_quasi_norm_is_nuclear() -> None:
    x = matrices(1, 4, 5)
    assert torch.allclose(Schatten(0.5).dual_norm.dual(x), Nuclear().norm(x))
    assert float(Schatten(0.5).norm(x)) > float(Nuclear().norm(x))
    values = torch.linalg.svdvals(x)
    assert torch.allclose(Schatten(0.5).norm(x), values.sqrt().sum() ** 2)


@pytest.mark.parametrize("norm", CONVEX, ids=repr)
@settings(deadline=None, max_examples=10)
@given(seed=seeds, shape=shapes)
def test_norm_axioms(norm: Norm, seed: int, shape: tuple[int, int]) -> None:
    x, y = matrices(seed, *shape), matrices(seed + 1, *shape)
    assert float(norm.norm(x + y)) <= float(norm.norm(x) + norm.norm(y)) * (1 + 1e-9)
    assert torch.allclose(norm.norm(-2.5 * x), 2.5 * norm.norm(x), rtol=1e-9)
    assert float(norm.norm(torch.zeros(shape))) == 0.0


@pytest.mark.parametrize("norm", NORM_OBJECTS, ids=repr)
@settings(deadline=None, max_examples=10)
@given(seed=seeds, scale=st.floats(1e-30, 1e30))
def test_directions_do_not_depend_on_the_scale(norm: Norm, seed: int, scale: float) -> None:
    g = matrices(seed, 4, 3)
    assert torch.allclose(norm.lmo(scale * g), norm.lmo(g), atol=1e-9)


@pytest.mark.parametrize("norm", NORM_OBJECTS, ids=repr)
@pytest.mark.parametrize("shape", [(5, 3, 4), (2, 3, 4, 3), (1, 1, 1), (3, 6, 1)])
def test_batched_is_looped(norm: Norm, shape: tuple[int, ...]) -> None:
    g = matrices(11, *shape)
    flat = g.reshape(-1, *shape[-2:])
    for function in (norm.norm, norm.dual):
        looped = torch.stack([function(matrix) for matrix in flat]).reshape(shape[:-2])
        assert torch.allclose(function(g), looped, rtol=1e-12)
    for function in (norm.lmo, norm.sharp):
        looped = torch.stack([function(matrix) for matrix in flat]).reshape(shape)
        assert torch.allclose(function(g), looped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", NORM_OBJECTS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_zero_and_emptiness(norm: Norm, dtype: torch.dtype) -> None:
    g = matrices(2, 3, 5, 4).to(dtype)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-9}[dtype]
    exact = norm.lmo(g.double())
    assert norm.lmo(g).dtype == dtype and norm.sharp(g).dtype == dtype
    assert float((norm.lmo(g).double() - exact).abs().max()) <= tolerance * (1 + float(exact.abs().max()))
    assert torch.allclose(norm.dual(g).double(), norm.dual(g.double()), rtol=1e-4)
    assert norm.norm(g).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    zero = torch.zeros(2, 3, 4, dtype=dtype)
    assert not norm.lmo(zero).any() and not norm.sharp(zero).any() and not norm.dual(zero).any()
    for empty in (
        torch.zeros(0, 3, 4, dtype=dtype),
        torch.zeros(2, 0, 4, dtype=dtype),
        torch.zeros(2, 3, 0, dtype=dtype),
    ):
        assert norm.lmo(empty).shape == empty.shape
        assert norm.norm(empty).shape == empty.shape[:1] and not norm.norm(empty).any()
        assert norm.dual(empty).shape == empty.shape[:1]


@pytest.mark.parametrize("norm", NORM_OBJECTS, ids=repr)
@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e30])
def test_float32_from_the_smallest_to_the_largest(norm: Norm, scale: float) -> None:
    g = matrices(1, 2, 6, 5).float()
    # Each matrix has its own scale: no matrix may spoil its neighbour.
    mixed = torch.stack([g[0] * scale, g[1]])
    assert torch.allclose(norm.lmo(mixed), norm.lmo(g), rtol=1e-3, atol=1e-5)


def orthogonal(seed: int, n: int) -> torch.Tensor:
    return torch.linalg.qr(matrices(3 * seed + 1, n, n))[0]


@pytest.mark.parametrize("norm", [Euclidean(), Spectral(), Nuclear(), Schatten(1.5), rms_to_rms()], ids=repr)
def test_unitarily_invariant_norms_follow_rotations(norm: Norm) -> None:
    g, u, v = matrices(4, 5, 3), orthogonal(1, 5), orthogonal(2, 3)
    assert torch.allclose(norm.norm(u @ g @ v), norm.norm(g))
    assert torch.allclose(norm.lmo(u @ g @ v), u @ norm.lmo(g) @ v, atol=1e-10)


@pytest.mark.parametrize("norm", [MaxRow(), SumRow(), rms_to_max()], ids=repr)
def test_row_norms_follow_row_permutations_and_rotations_of_the_inputs(norm: Norm) -> None:
    g, v, order = matrices(4, 5, 3), orthogonal(2, 3), torch.tensor([2, 0, 4, 1, 3])
    assert torch.allclose(norm.lmo(g[order] @ v), norm.lmo(g)[order] @ v, atol=1e-12)


@pytest.mark.parametrize("norm", [MaxColumn(), SumColumn(), one_to_rms()], ids=repr)
def test_column_norms_follow_rotations_of_the_outputs(norm: Norm) -> None:
    g, u, order = matrices(4, 5, 3), orthogonal(2, 5), torch.tensor([2, 0, 1])
    assert torch.allclose(norm.lmo(u @ g[:, order]), u @ norm.lmo(g)[:, order], atol=1e-12)


@pytest.mark.parametrize("norm", [Max(), L1(), Lp(3.0), Euclidean()], ids=repr)
def test_entrywise_norms_follow_signed_permutations(norm: Norm) -> None:
    g, order = matrices(4, 4, 3), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    moved = (g.reshape(-1)[order] * signs).reshape(4, 3)
    assert torch.allclose(norm.lmo(moved).reshape(-1), norm.lmo(g).reshape(-1)[order] * signs, atol=1e-12)


def test_special_cases_coincide() -> None:
    x = matrices(1, 4, 6)
    for schatten, named in ((Schatten(2.0), Euclidean()), (Schatten(math.inf), Spectral()), (Schatten(1.0), Nuclear())):
        assert torch.allclose(schatten.norm(x), named.norm(x)) and torch.allclose(schatten.lmo(x), named.lmo(x))
    assert torch.allclose(Spectral().lmo(x), -polar(x, "svd"))
    assert torch.allclose(Spectral().norm(x), torch.linalg.matrix_norm(x, 2))
    assert torch.allclose(Nuclear().norm(x), torch.linalg.matrix_norm(x, "nuc"))
    assert torch.equal(Max().lmo(x), -x.sign())
    row = x[:1]
    for norm in (MaxRow(), SumRow(), Spectral(), Nuclear()):
        assert torch.allclose(norm.norm(row), Euclidean().norm(row)) and torch.allclose(
            norm.lmo(row), Euclidean().lmo(row)
        )


def test_operator_norms_between_rms_one_and_max() -> None:
    x = matrices(1, 6, 4)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 2000, generator=generator, dtype=torch.float64)
    rms_in, outputs = inputs.square().mean(0).sqrt(), x @ inputs
    ratio = outputs.square().mean(0).sqrt() / rms_in
    assert float(ratio.max()) <= float(rms_to_rms().norm(x)) * (1 + 1e-12)
    assert float(ratio.max()) >= 0.98 * float(rms_to_rms().norm(x))
    assert float((outputs.abs().amax(0) / rms_in).max()) <= float(rms_to_max().norm(x)) * (1 + 1e-12)
    columns_rms = x.square().mean(0).sqrt()
    assert torch.allclose(one_to_rms().norm(x), columns_rms.max())


def test_radius_reads_the_whole_kernel_shape() -> None:
    bound = rms_to_rms(2.0).at((8, 4, 3, 3))
    assert bound.radius == pytest.approx(2.0 * math.sqrt(8 / 4) / 9)
    assert vector_rms().at((16,)).radius == pytest.approx(4.0)
    assert one_to_max().at((5, 10)).radius == pytest.approx(0.1)
    assert rms_to_rms(at_least_one=True).at((2, 8)).radius == pytest.approx(1.0)


def test_vectors_are_one_element_and_batches_of_vectors_are_said() -> None:
    v = torch.tensor([3.0, -4.0])
    assert float(Euclidean().norm(v)) == 5.0 and torch.allclose(Euclidean().lmo(v), torch.tensor([-0.6, 0.8]))
    assert Euclidean(event_ndim=1).norm(torch.ones(7, 4)).shape == (7,)
    assert float(Max().norm(torch.tensor(-2.0))) == 2.0 and float(L1().lmo(torch.tensor(-2.0))) == 1.0
    assert torch.allclose(Lp(3.0).lmo(torch.tensor(-2.0)), torch.tensor(1.0))
    assert torch.allclose(L1().lmo(torch.tensor([1.0, -3.0, 3.0])), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("name", sorted(NORMS))
def test_every_name_is_a_norm(name: str) -> None:
    norm = get_norm(name)
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert float((g * norm.direction(g)).sum()) > 0
    assert get_norm(norm) is norm


def test_approximate_spectral_direction_reports_what_it_attains() -> None:
    norm, g = Spectral(method="newton_schulz"), matrices(1, 6, 9)
    direction, dual = norm.direction_and_dual(g)
    assert torch.allclose(dual, inner(g, direction))
    assert float(dual) == pytest.approx(float(norm.dual(g)), rel=0.15)


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: Lp(0.5), ValueError, "p must be at least 1"),
        (lambda: Lp(float("nan")), ValueError, "p must be"),
        (lambda: Schatten(0.0), ValueError, "p must be positive"),
        (lambda: Euclidean(event_ndim=0), ValueError, "event_ndim"),
        (lambda: Scaled(Max(), 0.0), ValueError, "radius"),
        (lambda: Scaled(Max(), float("inf")), ValueError, "radius"),
        (lambda: Scaled("max", 1.0), TypeError, "base"),
        (lambda: Spectral(method="magic"), ValueError, "method must be one of"),
        (lambda: Spectral(coefficients="magic"), ValueError, "coefficients must be one of"),
        (lambda: Spectral(steps=0), ValueError, "steps"),
        (lambda: Spectral(normalize="magic"), ValueError, "normalize"),
        (lambda: get_norm("magic"), ValueError, "norm must be one of"),
        (lambda: get_norm(3), TypeError, "norm must be a Norm"),
        (lambda: Spectral().norm(torch.ones(3)), ValueError, "batch of matrices"),
        (lambda: MaxRow().lmo(torch.ones(3)), ValueError, "batch of matrices"),
        (lambda: Max().lmo(torch.ones(3, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: Max().lmo(torch.ones(3, dtype=torch.complex64)), TypeError, "floating-point"),
        (lambda: Max().lmo(torch.ones(3, 3).to_sparse()), TypeError, "dense"),
        (lambda: Max().lmo([1.0]), TypeError, "list"),
    ],
)
def test_wrong_use_says_what_would_be_right(make, error, word) -> None:
    with pytest.raises(error, match=word):
        make()
