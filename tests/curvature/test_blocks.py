"""Norms taken in pieces, or from a part."""

import pytest
import torch

from steepest.curvature._blocks import blocks, distance, joined, part


def test_pieces_make_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(700, 401, dtype=torch.float64, generator=generator) for _ in range(2))
    pieces = blocks(a, b)
    assert len(pieces) > 1
    assert joined([distance(x, y) for x, y in pieces]) == pytest.approx(float((a - b).norm()))
    assert len(blocks(a.T, b.T)) == 1
    assert joined([torch.tensor(3.0), torch.tensor(4.0, dtype=torch.float64)]) == pytest.approx(5.0)


def test_a_part_estimates_the_whole() -> None:
    x = torch.randn(1000, 300, generator=torch.Generator().manual_seed(0))
    piece, scale = part(x)
    assert piece.numel() < x.numel() / 25
    assert scale * float(piece.norm()) == pytest.approx(float(x.norm()), rel=0.05)
    small, one = part(x[:10])
    assert one == 1 and small.shape == (10, 300)
