"""Subspaces: sizes, bases, and that a candidate is the map of its coordinates."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.gradient_free import Adaptive, Full, Hybrid, Linear, LowRank, SparseProjection
from steepest.gradient_free.bases import Dense, Factors, Identity, Sparse
from steepest.gradient_free.subspaces import Block, Subspace, make_subspace

DOUBLE = torch.float64
SHAPES = [torch.Size(s) for s in ((6, 5), (6,), (4, 2, 3), (), (1, 7))]
TOTAL = sum(shape.numel() for shape in SHAPES)
LIKE = torch.empty(0, dtype=DOUBLE)
ALL: dict[str, Subspace] = {
    "full": Full(), "hybrid": Hybrid(rank=1), "hybrid sparse": Hybrid(rank=1, sparse=0), "low rank": LowRank(rank=2),
    "linear": Linear(9), "sparse": SparseProjection(9), "adaptive": Adaptive(9),
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(subspace: Subspace, seed: int = 0, **options: Any) -> list[Block]:
    return subspace.blocks(SHAPES, seeded(seed), LIKE, **options)


def dim(blocks: list[Block]) -> int:
    return max(block.stop for block in blocks)


def moved(blocks: list[Block], delta: Tensor) -> Tensor:
    return torch.cat([block.basis.move(delta[block.start : block.stop]).flatten() for block in blocks])


@pytest.mark.parametrize("name", ALL)
def test_a_candidate_is_the_map_of_its_coordinates(name: str) -> None:
    """`changes` on windows that begin before a block, end after it, or cover it, agrees with `move`."""
    total = dim(draw(ALL[name]))
    for p in (1, 3, 50):
        count = math.ceil(total / p)
        steps = torch.randn(count, 2, p, dtype=DOUBLE, generator=seeded(1))
        blocks = draw(ALL[name])
        assert {block.parameter for block in blocks} == set(range(len(SHAPES)))
        found = torch.cat([block.basis.changes(-block.start, steps) for block in blocks], -1)
        assert found.shape == (count, 2, TOTAL)
        for i in range(count):
            for m in range(2):
                delta = torch.zeros(count * p, dtype=DOUBLE)
                delta[i * p : (i + 1) * p] = steps[i, m]
                fresh = draw(ALL[name])
                torch.testing.assert_close(found[i, m], moved(fresh, delta[:total]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_draws(name: str) -> None:
    subspace = ALL[name]
    delta = torch.randn(dim(draw(subspace)), dtype=DOUBLE, generator=seeded(2))
    assert torch.equal(moved(draw(subspace), delta), moved(draw(subspace), delta))
    if name != "full":
        assert not torch.equal(moved(draw(subspace), delta), moved(draw(subspace, 1), delta))
    half = subspace.blocks(SHAPES, seeded(), torch.empty(0))
    assert moved(half, delta.float()).dtype == torch.float32
    # The change is linear, but for a product of factors.
    blocks = draw(subspace)
    if all(block.basis.linear for block in blocks):
        torch.testing.assert_close(moved(blocks, 3 * delta), 3 * moved(blocks, delta))


def test_sizes_of_the_hybrid_subspace() -> None:
    assert Hybrid(rank=1).sizes(SHAPES) == [11, 6, 10, 1, 7]
    assert Hybrid(rank=2).sizes(SHAPES) == [22, 6, 20, 1, 7]
    assert Hybrid(rank=100).sizes(SHAPES) == [55, 6, 40, 1, 7]
    wide = [torch.Size((256, 4096)), torch.Size((32, 32)), torch.Size((4096, 4096))]
    assert Hybrid().sizes(wide) == [(256 + 4096) * 16, 64 * 4, 8192 * 64]
    digits = [torch.Size(s) for s in ((32, 64), (32,), (32, 32), (32,), (10, 32), (10,))]
    assert sum(Hybrid(rank=4).sizes(digits)) == 882
    capped = Hybrid(rank=2, limit=40).sizes(SHAPES)
    assert sum(capped) <= 40 and capped[1:2] == [6] and capped[0] > capped[2] > 0
    with pytest.raises(ValueError, match="leaves no coordinate for the matrices"):
        Hybrid(rank=2, limit=14).sizes(SHAPES)


def test_bases_of_the_hybrid_subspace() -> None:
    blocks = draw(Hybrid(rank=1))
    kinds = [type(block.basis) for block in blocks]
    assert kinds == [Dense, Identity, Dense, Identity, Identity]
    for block in blocks:
        if isinstance(block.basis, Dense):
            q = block.basis.q
            torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[1], dtype=DOUBLE), atol=1e-13, rtol=0)
    wide = draw(Hybrid(rank=5))[0].basis  # 55 coordinates of 30 weights
    assert isinstance(wide, Dense) and wide.q.shape == (30, 55)
    assert float(wide.q.square().sum(1).mean()) == pytest.approx(1, abs=0.2)


def test_global_subspaces() -> None:
    q = torch.cat([block.basis.q for block in draw(Linear(30)) if isinstance(block.basis, Dense)])
    assert q.shape == (TOTAL, 30) and float(q.square().sum(1).mean()) == pytest.approx(1, abs=0.15)
    q = torch.cat([block.basis.q for block in draw(Adaptive(12)) if isinstance(block.basis, Dense)])
    torch.testing.assert_close(q.mT @ q, torch.eye(12, dtype=DOUBLE), atol=1e-13, rtol=0)
    assert dim(draw(Linear(10_000))) == TOTAL == dim(draw(Adaptive(10_000)))
    columns = moved(draw(SparseProjection(4, entries=3)), torch.eye(4, dtype=DOUBLE)[0])
    assert 1 <= int(columns.count_nonzero()) <= 3


def test_the_adaptive_subspace_keeps_the_directions_of_recent_moves() -> None:
    moves = torch.randn(3, TOTAL, dtype=DOUBLE, generator=seeded(3))
    blocks = draw(Adaptive(10, share=0.5), moves=moves)
    q = torch.cat([block.basis.q for block in blocks if isinstance(block.basis, Dense)])
    torch.testing.assert_close(q @ (q.mT @ moves.mT), moves.mT, atol=1e-12, rtol=0)
    torch.testing.assert_close(q.mT @ q, torch.eye(10, dtype=DOUBLE), atol=1e-12, rtol=0)
    for lost in (torch.zeros(2, TOTAL, dtype=DOUBLE), moves / 0):
        fresh = torch.cat(
            [b.basis.q for b in draw(Adaptive(10), moves=lost) if isinstance(b.basis, Dense)]
        )  # nothing to keep
        torch.testing.assert_close(fresh.mT @ fresh, torch.eye(10, dtype=DOUBLE), atol=1e-12, rtol=0)


def test_factors_move_along_the_product() -> None:
    basis = draw(LowRank(rank=2))[0].basis
    assert isinstance(basis, Factors) and basis.columns == 2 * (6 + 5)
    first, second = (torch.randn(22, dtype=DOUBLE, generator=seeded(s)) for s in (1, 2))
    whole = draw(LowRank(rank=2))[0].basis
    torch.testing.assert_close(basis.move(first) + basis.move(second), whole.move(first + second))
    other = draw(LowRank(rank=2))[0].basis
    other.restore(basis.state())
    torch.testing.assert_close(other.move(first), basis.move(first))
    with pytest.raises(ValueError, match="factors of the shapes"):
        other.restore({})


def test_a_sparse_basis_is_its_matrix() -> None:
    basis = Sparse.draw(20, 5, seeded(), LIKE)
    q = torch.stack([basis.move(column) for column in torch.eye(5, dtype=DOUBLE)], 1)
    delta = torch.randn(5, dtype=DOUBLE, generator=seeded(1))
    torch.testing.assert_close(basis.move(delta), q @ delta)


@pytest.mark.parametrize("make", [
    lambda: Hybrid(rank=0), lambda: Hybrid(limit=0), lambda: LowRank(rank=0), lambda: Linear(0), lambda: Adaptive(0),
    lambda: Adaptive(3, share=2.0), lambda: Adaptive(3, history=0), lambda: SparseProjection(0),
    lambda: SparseProjection(2, entries=0), lambda: make_subspace("random"),
])  # fmt: skip
def test_bad_settings(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|at least"):
        make()


def test_names() -> None:
    assert make_subspace(None) == Full() == make_subspace("full") and make_subspace("hybrid") == Hybrid()
    with pytest.raises(TypeError, match="a name or a Subspace"):
        make_subspace(3)  # pyright: ignore[reportArgumentType]
