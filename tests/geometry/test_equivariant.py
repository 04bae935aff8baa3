"""The symmetry-compatible rules: worked numbers, symmetries, bad rank, every scale and dtype, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.geometry import (
    Direction,
    Hybrid,
    MaxColumn,
    MaxRow,
    OneSided,
    RowNorm,
    Spectral,
    Symmetry,
    centered,
    check_equivariance,
    inverse_sqrt,
    orient,
    polar,
    restore,
)
from steepest.geometry.inverse_root import RootMethod

M = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
R4 = [[1.55837271, 1.31604684], [0.01474419, 1.6340004], [-1.81223317, 1.14498705]]
R4_BARE = [[0.65199131, 0.55060712], [0.00616867, 0.68363239], [-0.75820134, 0.47903919]]
R5 = [[0.72653863, 0.68712562], [-0.49258578, 0.87026389], [-0.80594966, 0.59198407]]
R7 = [[2.9106836, 1.0893164], [-2.39871747, 1.97606774], [-0.51196613, -3.06538414]]
EXACT = ["svd", "eigh"]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: object, atol: float = 6e-9) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def test_row_norm():
    expected = torch.tensor([[0.6, 0.8], [0, 1], [-0.70710678, 0.70710678]], dtype=torch.float64)
    close(RowNorm().direction(M), expected)
    close(MaxRow().direction(M), expected)
    close(RowNorm(orientation="columns").direction(M.mT), expected.mT)


def test_centered_row_norm():
    close(centered(M), [[2 + 1 / 3, 1 + 2 / 3], [-2 / 3, -1 / 3], [-1 - 2 / 3, -1 - 1 / 3]], 1e-14)
    found = RowNorm(center=True, eps=1e-8).direction(M)
    close(found, [[1.10092097, 0.74479501], [-0.60723967, -0.28365678], [-0.4936813, -0.46113823]])
    assert (found.norm(dim=-1) - 1).abs().min() > 0.1


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("side", ["auto", "left", "right"])
def test_one_sided(method, side):
    bare = [[0.71002423, 0.67150709], [-0.33023026, 0.58342624], [-0.62194338, 0.45682825]]
    full = [[5.01399597, 4.74199852], [-2.33199534, 4.11999576], [-4.39199322, 3.22599555]]
    close(OneSided(alpha=0, side=side, method=method).direction(M), bare)
    _, pairing = OneSided(alpha=0, side=side, method=method).direction_and_dual(M)
    assert abs(float(pairing) - 7.061725162) < 1e-9
    close(OneSided(side=side, method=method).direction(M), full)
    close(OneSided(side=side, method=method, center=True).direction(M), R7)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("side", ["auto", "left", "right"])
def test_hybrid(method, side):
    # The numbers were made with 1e-8 added to the length of every row.
    close(Hybrid(side=side, method=method).direction(M), R4, 2e-8)
    close(Hybrid(alpha=0, side=side, method=method).direction(M), R4_BARE, 2e-8)
    for alpha in (0.0, 1.0):
        close(Hybrid(alpha=alpha, side=side, method=method, order="polar_then_row").direction(M), R5)


def test_centered_hybrid_is_its_definition():
    cut = torch.eye(3, dtype=torch.float64) - 1 / 3
    x = cut @ M
    z = cut @ (x / x.norm(dim=1, keepdim=True))
    factor = polar(z, "svd")
    expected = cut @ ((z * factor).sum() * factor)
    close(Hybrid(center=True, method="svd").direction(M), expected, 1e-12)


@pytest.mark.parametrize(
    "rule",
    [RowNorm(center=True), OneSided(center=True, side="left"), OneSided(center=True), Hybrid(center=True)],
    ids=str,
)
def test_a_single_row_is_all_shift(rule: Direction):
    row = M[:1]
    close(RowNorm().direction(row), [[0.6, 0.8]], 1e-15)
    assert torch.equal(rule.direction(row), torch.zeros_like(row))
    equal = torch.tensor([0.1, 0.7, 1 / 3], dtype=torch.float64).expand(3, 3)
    assert torch.equal(rule.direction(equal), torch.zeros_like(equal))


def test_idempotence_and_scale():
    factor = OneSided(alpha=0, method="svd").direction(M)
    close(OneSided(alpha=0, method="svd").direction(factor), factor, 1e-14)
    close(RowNorm().direction(RowNorm().direction(M)), RowNorm().direction(M), 1e-15)
    for rule, power in ((OneSided(method="svd"), 1), (OneSided(alpha=0, method="svd"), 0), (RowNorm(), 0)):
        close(rule.direction(7 * M), 7**power * rule.direction(M), 1e-12)
    for alpha in (0.0, 1.0):
        rule = Hybrid(alpha=alpha, method="svd")
        close(rule.direction(7 * M), rule.direction(M), 1e-12)


ROWS = Symmetry("permutation", "orthogonal")
SHIFTED = Symmetry("permutation", "orthogonal", shift=True)
FULL = Symmetry("orthogonal", "orthogonal")


@pytest.mark.parametrize(
    ("rule", "symmetry"),
    [
        (RowNorm(), ROWS),
        (OneSided(method="svd"), FULL),
        (OneSided(method="eigh", side="right"), FULL),
        (Hybrid(method="svd"), ROWS),
        (Hybrid(method="svd", order="polar_then_row"), ROWS),
        (RowNorm(center=True), SHIFTED),
        (OneSided(method="svd", center=True), SHIFTED),
        (Hybrid(method="svd", center=True), SHIFTED),
        (Hybrid(method="svd", center=True, order="polar_then_row"), SHIFTED),
        (RowNorm(orientation="columns"), Symmetry("orthogonal", "permutation")),
        (Hybrid(method="svd", orientation="columns"), Symmetry("orthogonal", "permutation")),
        (RowNorm(min_row_norm=0.5), ROWS),
    ],
    ids=str,
)
def test_rules_commute_with_their_groups(rule: Direction, symmetry: Symmetry):
    # The eigendecomposition of a Gram matrix, whose condition number is squared, is exact to less.
    assert check_equivariance(rule, symmetry) < 1e-12
    assert check_equivariance(rule, symmetry, (2, 3, 9, 4), trials=1) < 1e-12


@pytest.mark.parametrize(
    ("rule", "symmetry"),
    [
        (RowNorm(), FULL),
        (Hybrid(method="svd"), FULL),
        (RowNorm(), SHIFTED),
        (Hybrid(method="svd"), SHIFTED),
        (torch.sign, Symmetry("none", "orthogonal")),
        (MaxColumn(), Symmetry("none", "orthogonal")),
        (RowNorm(orientation="columns"), ROWS),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rules_do_not_commute_with_more(rule, symmetry: Symmetry):
    assert check_equivariance(rule, symmetry) > 0.1


def test_sign_commutes_with_permutations_and_signs():
    assert check_equivariance(torch.sign, Symmetry("permutation", "permutation")) == 0
    assert check_equivariance(torch.sign, Symmetry("signs", "signs")) == 0


@pytest.mark.parametrize("rule", [RowNorm, Hybrid], ids=str)
@pytest.mark.parametrize("orientation", ["pair_interleaved", "pair_concatenated"])
def test_pairs_share_one_permutation(rule, orientation):
    x, order = matrix(2, 10, 3), torch.randperm(5, generator=torch.Generator().manual_seed(1))
    pairs = x.unflatten(1, (5, 2)) if orientation == "pair_interleaved" else x.unflatten(1, (2, 5)).transpose(1, 2)

    def back(pairs: Tensor) -> Tensor:
        return (pairs if orientation == "pair_interleaved" else pairs.transpose(1, 2)).flatten(1, 2)

    direction = (
        Hybrid(orientation=orientation, method="svd") if rule is Hybrid else rule(orientation=orientation)
    ).direction
    found = direction(back(pairs[:, order]))
    assert torch.equal(back(pairs), x)
    turned = direction(x).unflatten(1, (5, 2) if orientation == "pair_interleaved" else (2, 5))
    turned = turned if orientation == "pair_interleaved" else turned.transpose(1, 2)
    close(found, back(turned[:, order]), 1e-12)
    joined = orient(x, orientation)
    assert joined.shape == (2, 5, 6)
    close(joined[:, :, 0::2], pairs[:, :, 0])
    close(joined[:, :, 1::2], pairs[:, :, 1])
    assert torch.equal(restore(joined, orientation), x)
    if rule is RowNorm:
        close(direction(x).square().sum((1, 2)), torch.full((2,), 5.0), 1e-12)


def test_gpt_oss_pairs_are_those_of_the_reference_layout():
    stored = matrix(3, 4, 10)  # (E, d, 2r), inputs first
    expected = stored.view(3, 4, 5, 2).permute(0, 2, 1, 3).reshape(3, 5, 8)
    assert torch.equal(orient(stored.mT, "pair_interleaved"), expected)


def test_one_scale_for_all_experts_or_one_each():
    x = matrix(3, 5, 4)
    z = x / x.norm(dim=-1, keepdim=True)
    factor = polar(z, "svd")
    each = (z * factor).sum((-2, -1), keepdim=True)
    close(Hybrid(method="svd").direction(x), each * factor, 1e-12)
    shared = Hybrid(method="svd", per_matrix_scale=False)
    close(shared.direction(x), each.sum() * factor, 1e-12)
    close(shared.direction(torch.stack([x, 2 * x]))[1], each.sum() * factor, 1e-12)
    _, pairing = shared.direction_and_dual(x)
    assert pairing.shape == ()
    one = OneSided(method="svd", per_matrix_scale=False)
    close(one.direction(x), torch.linalg.svdvals(x).sum() * polar(x, "svd"), 1e-12)
    assert not Hybrid(alpha=0.0, per_matrix_scale=False).spans_batch


def test_inverse_root_of_a_centered_matrix_is_as_accurate_as_known():
    x = centered(matrix(8, 32))
    exact = polar(x, "svd")
    cases: list[tuple[RootMethod, int | None, torch.dtype, float]] = [
        ("eigh", None, torch.float64, 1e-12),
        ("newton_schulz", 5, torch.float64, 5e-4),
        ("newton_schulz", 12, torch.float64, 2e-10),
        ("newton_schulz", 12, torch.float32, 4.5e-6),
        ("polar_express", 5, torch.float64, 0.15),
        ("polar_express", 8, torch.float64, 3e-10),
        ("polar_express", 8, torch.float32, 1.9e-4),
    ]
    for method, steps, dtype, at_most in cases:
        single = x.to(dtype)
        found = inverse_sqrt(single @ single.mT, method, steps=steps) @ single
        found = found - found.mean(0)
        assert float((found - exact).norm() / exact.norm()) < at_most, (method, steps, dtype)


RULES = [
    RowNorm(),
    RowNorm(center=True),
    RowNorm(orientation="columns"),
    RowNorm(orientation="pair_concatenated"),
    RowNorm(min_row_norm=0.1),
    *(
        rule(method=method, center=center, side=side)
        for rule in (OneSided, Hybrid)
        for method in ("auto", "svd", "eigh", "newton_schulz", "polar_express")
        for center in (False, True)
        for side in ("auto", "left", "right")
    ),
    OneSided(alpha=0.0),
    Hybrid(order="polar_then_row"),
    Hybrid(order="polar_then_row", center=True),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_zero_tiny_huge_low_rank_and_half(rule: Direction):
    for rows, columns in ((8, 5), (4, 16)):
        assert torch.equal(rule.direction(torch.zeros(rows, columns)), torch.zeros(rows, columns))
        x = matrix(rows, columns).float()
        low = torch.outer(x[:, 0], x[0])
        free = rule.direction(x) if not (isinstance(rule, OneSided) and rule.alpha) else None
        for scale in (1e-20, 1e-36, 1e20, 1e36):
            for base in (x, low):
                found = rule.direction(base * scale)
                assert found.isfinite().all() and found.any()
            if free is not None:
                torch.testing.assert_close(rule.direction(x * scale), free, rtol=1e-3, atol=2e-3)
        for dtype, size in ((torch.bfloat16, 1e30), (torch.float16, 6e4), (torch.float16, 1e-5)):
            half = x.div(x.abs().max()).mul(size).to(dtype)
            found, exact = rule.direction(half), rule.direction(half.float())
            assert found.isfinite().all()
            torch.testing.assert_close(found.float(), exact.to(found.dtype).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_zero_rows_and_columns_stay_zero(rule: Direction):
    x = matrix(8, 6)
    x[:, 3] = 0
    assert not rule.direction(x)[:, 3].abs().gt(1e-12).any()
    if not getattr(rule, "center", False):
        x[2] = 0
        if "pair" not in str(rule):
            assert not rule.direction(x)[2].abs().gt(1e-12).any()


@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_centered_rules_ignore_a_shared_shift(rows, columns, seed):
    x, shift = matrix(rows, columns, seed=seed), matrix(1, columns, seed=seed + 1)
    for rule in (RowNorm(center=True), OneSided(center=True, method="svd"), Hybrid(center=True, method="svd")):
        found = rule.direction(x)
        torch.testing.assert_close(rule.direction(x + shift), found, rtol=1e-6, atol=1e-8)
        assert float(found.sum(0).abs().max()) < 1e-12 * max(1.0, float(found.abs().max()))


def test_a_row_seen_once_keeps_a_full_step_unless_bounded():
    momentum = torch.zeros(4, 3, dtype=torch.float64)
    momentum[0], momentum[1] = 1.0, 0.95**200
    assert torch.equal(RowNorm().direction(momentum)[2:], torch.zeros(2, 3, dtype=torch.float64))
    close(RowNorm().direction(momentum)[1].norm(), 1.0, 1e-12)
    bounded = RowNorm(min_row_norm=0.01).direction(momentum)
    close(bounded[0].norm(), 1.0, 1e-12)
    close(bounded[1].norm(), 0.95**200 / 0.01, 1e-9)


def test_the_multiplier_is_the_direction():
    x = matrix(5, 4)
    x[2] = 0
    factor = RowNorm().multiplier(x)
    assert factor is not None and factor.shape == (5, 1)
    close(factor * x, RowNorm().direction(x), 1e-15)
    for rule in (RowNorm(center=True), RowNorm(eps=1e-8), RowNorm(min_row_norm=0.1), RowNorm(orientation="columns")):
        assert rule.multiplier(x) is None


def test_nothing_overwrites_the_gradient():
    for rule in RULES:
        x = matrix(6, 4)
        rule.direction(x)
        assert torch.equal(x, matrix(6, 4))


def test_eps_is_added_to_the_length_of_a_row():
    close(RowNorm(eps=5.0).direction(M)[0], [0.3, 0.4], 1e-15)
    cut = centered(M)
    rows = cut / (cut.norm(dim=-1, keepdim=True) + 0.5)
    close(RowNorm(eps=0.5, center=True).direction(M), rows - rows.mean(0), 1e-14)


def test_a_polar_factor_without_scale_is_the_spectral_direction():
    x = matrix(4, 6, 9)
    close(OneSided(alpha=0.0, method="svd").direction(x), Spectral().direction(x), 1e-12)
    close(OneSided(method="svd").direction(x), Spectral().sharp(x), 1e-11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneSided(alpha=-1), "alpha"),
        (lambda: Hybrid(alpha=math.nan), "alpha"),
        (lambda: OneSided(side="top"), "side"),  # type: ignore[arg-type]
        (lambda: OneSided(method="magic"), "method"),  # type: ignore[arg-type]
        (lambda: OneSided(steps=0), "steps"),
        (lambda: OneSided(eps=0.0), "eps"),
        (lambda: RowNorm(eps=-1e-8), "eps"),
        (lambda: RowNorm(min_row_norm=2.0), "min_row_norm"),
        (lambda: RowNorm(orientation="diagonal"), "orientation"),  # type: ignore[arg-type]
        (lambda: Hybrid(order="polar"), "order"),  # type: ignore[arg-type]
        (lambda: RowNorm(orientation="pair_concatenated").at((5, 4)), r"even number of outputs.*\(5, 4\)"),
        (lambda: RowNorm(orientation="pair_interleaved").direction(torch.zeros(5, 4).fill_(1)), "even number"),
        (lambda: Symmetry("rotation"), "left"),  # type: ignore[arg-type]
        (lambda: check_equivariance(RowNorm(), FULL, (3,)), "shape"),
        (lambda: inverse_sqrt(torch.zeros(2, 3)), "square"),
        (lambda: inverse_sqrt(torch.eye(2), "magic"), "method"),  # type: ignore[arg-type]
        (lambda: inverse_sqrt(torch.eye(2), eps=0.0), "eps"),
    ],
)
def test_bad_settings_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_tensors_are_refused():
    with pytest.raises(TypeError, match="center"):
        RowNorm(center=1)  # type: ignore[arg-type]
    for rule in (RowNorm(), OneSided(), Hybrid(center=True)):
        with pytest.raises(ValueError, match="g must be a matrix"):
            rule.direction(torch.ones(3))
        with pytest.raises(TypeError, match="floating-point"):
            rule.direction(torch.ones(3, 3, dtype=torch.int64))
        assert rule.direction(torch.zeros(0, 3)).shape == (0, 3)
