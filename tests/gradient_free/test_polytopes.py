"""Polytopes are centred tight frames; rotations are uniform on SO(p)."""

import warnings
from typing import Any, get_args

import pytest
import torch

from steepest.gradient_free import biased_rotations, polytope, random_rotations
from steepest.gradient_free.polytopes import PolytopeName


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_triangle() -> None:
    expected = [[0.2588190451, -0.9659258263], [-0.9659258263, 0.2588190451], [0.7071067812, 0.7071067812]]
    torch.testing.assert_close(polytope("simplex", 2), torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", get_args(PolytopeName))
@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_centred_tight_frames(name: Any, p: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v = polytope(name, p)
    assert len(v) == {"orthoplex": 2 * p, "simplex": p + 1, "cube": 2**p}[name]
    exact = {"atol": 1e-15 * len(v), "rtol": 0}
    torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v), dtype=torch.float64), **exact)
    torch.testing.assert_close(v.mean(0), torch.zeros(p, dtype=torch.float64), **exact)
    torch.testing.assert_close(v.mT @ v, torch.eye(p, dtype=torch.float64) * (len(v) / p), **exact)
    if name != "simplex":
        assert torch.equal(v[: len(v) // 2], -v[len(v) // 2 :])
    assert polytope(name, p, dtype=torch.float32).dtype == torch.float32 if p < 5 else True


@pytest.mark.parametrize(("name", "p", "error"), [
    ("sphere", 2, "polytope must be one of"), ("orthoplex", 0, "p must be at least 1"),
    ("cube", 13, "at most 12"), ("simplex", -1, "at least 1"),
])  # fmt: skip
def test_what_no_polytope_is(name: Any, p: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        polytope(name, p)


def test_a_large_cube_warns() -> None:
    with pytest.warns(UserWarning, match="cube of p = 5 has 32 vertices"):
        polytope("cube", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        polytope("cube", 4)


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_rotations_are_rotations_without_preferred_direction(p: int) -> None:
    r = random_rotations(4000, p=p, generator=seeded())
    torch.testing.assert_close(r.mT @ r, torch.eye(p, dtype=torch.float64).expand_as(r), atol=1e-13, rtol=0)
    if p > 1:
        torch.testing.assert_close(torch.linalg.det(r), torch.ones(4000, dtype=torch.float64), atol=1e-12, rtol=0)
    else:
        assert set(r.flatten().tolist()) == {1.0, -1.0}
    # Haar: E R = 0, and E R_ij R_kl = 1/p where (i, j) = (k, l).
    spread = 5 / 4000**0.5
    assert float(r.mean(0).abs().max()) < spread
    assert float((r.square().mean(0) - 1 / p).abs().max()) < spread
    if p > 2:  # fourth moment of a uniform unit vector
        assert float((r.pow(4).mean(0) - 3 / (p * (p + 2))).abs().max()) < spread
    assert torch.equal(r[:10], random_rotations(4000, p=p, generator=seeded())[:10])
    assert random_rotations(2, 3, p=p, dtype=torch.float32).shape == (2, 3, p, p)


@pytest.mark.parametrize("p", [1, 2, 3, 6])
def test_biased_rotations_begin_with_the_direction(p: int) -> None:
    r = random_rotations(5, 3, p=p, generator=seeded())
    d = 1e-8 * torch.randn(5, 3, p, generator=seeded(1), dtype=torch.float64)
    d[0, 0] = 0
    d[1, 0] = -r[1, 0, :, min(1, p - 1)]  # along the next column
    q = biased_rotations(r, d)
    torch.testing.assert_close(q.mT @ q, torch.eye(p, dtype=torch.float64).expand_as(q), atol=1e-12, rtol=0)
    assert torch.equal(q[0, 0], r[0, 0])
    length = d.norm(dim=-1, keepdim=True)
    unit = d / torch.where(length > 0, length, 1.0)
    torch.testing.assert_close(q[..., 0][length[..., 0] > 0], unit[length[..., 0] > 0], atol=1e-12, rtol=0)
    if p > 1:
        torch.testing.assert_close(torch.linalg.det(q), torch.ones(5, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    # A direction that is the first column already changes nothing.
    torch.testing.assert_close(biased_rotations(r, 3 * r[..., 0]), r, atol=1e-12, rtol=0)
