"""The sphere: steps to the digits, inverses of each other, and means over a coordinate."""

import math

import pytest
import torch
from scipy.special import ive

from steepest.geometry import sphere

DTYPE = torch.float64


def points(*shape: int, seed: int = 0) -> torch.Tensor:
    return sphere.uniform(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def test_tangent_vectors_are_orthogonal() -> None:
    x, v = points(5, 7), torch.randn(5, 7, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
    t = sphere.tangent(x, v)
    assert float((t * x).sum(-1).abs().max()) < 1e-15
    assert torch.allclose(sphere.tangent(x, t), t, atol=1e-15)


def test_the_logarithm_inverts_the_geodesic() -> None:
    x, y = points(20, 6), points(20, 6, seed=1)
    assert torch.allclose(sphere.exponential(x, sphere.logarithm(x, y)), y, atol=1e-13)
    assert torch.allclose(sphere.logarithm(x, y).norm(dim=-1), sphere.distance(x, y), atol=1e-13)
    assert torch.equal(sphere.exponential(x, torch.zeros_like(x)), x / x.norm(dim=-1, keepdim=True))
    assert torch.equal(sphere.logarithm(x, x), torch.zeros_like(x))


def test_retraction_and_geodesic_agree_to_second_order() -> None:
    x = points(10, 5)
    t = sphere.tangent(x, points(10, 5, seed=3))
    gaps = [float((sphere.retract(x, h * t) - sphere.exponential(x, h * t)).norm(dim=-1).max()) for h in (1e-2, 1e-3)]
    assert gaps[0] / gaps[1] == pytest.approx(1000, rel=0.02)


def test_distances_of_tiny_and_of_opposite_angles() -> None:
    x = torch.tensor([1.0, 0.0], dtype=DTYPE)
    for angle in (1e-9, 0.3, math.pi - 1e-9, math.pi):
        y = torch.tensor([math.cos(angle), math.sin(angle)], dtype=DTYPE)
        assert float(sphere.distance(x, y)) == pytest.approx(angle, rel=1e-12)


def test_normalise_at_every_scale() -> None:
    for scale in (1e-200, 1.0, 1e200):
        x = scale * torch.tensor([3.0, 4.0], dtype=DTYPE)
        assert torch.allclose(sphere.normalise(x), torch.tensor([0.6, 0.8], dtype=DTYPE), atol=1e-15)
    for bad in (torch.zeros(3), torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError, match="not zero"):
            sphere.normalise(bad)


@pytest.mark.parametrize("d", [2, 3, 4, 20, 1000])
def test_moments_of_a_coordinate(d: int) -> None:
    u, w = sphere.coordinate_rule(d, 16)
    moments = [float(w @ u**p) for p in range(9)]
    expected = [1.0, 0.0, 1 / d, 0.0, 3 / (d * (d + 2)), 0.0, 15 / (d * (d + 2) * (d + 4)), 0.0]
    assert moments[:8] == pytest.approx(expected, rel=1e-12, abs=1e-17)
    assert moments[8] == pytest.approx(105 / (d * (d + 2) * (d + 4) * (d + 6)), rel=1e-12)


@pytest.mark.parametrize(("d", "kappa", "known"), [(10, 8.0, 0.5681954), (20, 2.0, 0.0991058)])
def test_the_mean_of_the_von_mises_fisher_law(d: int, kappa: float, known: float) -> None:
    u, w = sphere.coordinate_rule(d)
    tilt = w * (kappa * u).exp()
    mean = float((tilt * u).sum() / tilt.sum())
    assert mean == pytest.approx(float(ive(d / 2, kappa) / ive(d / 2 - 1, kappa)), rel=1e-12)
    assert mean == pytest.approx(known, abs=5e-8)


@pytest.mark.parametrize(("d", "twice_eps", "known"), [(10, 5.0, 0.2377415), (20, 10.0, 0.1626630)])
def test_the_second_moment_of_the_bingham_law(d: int, twice_eps: float, known: float) -> None:
    u, w = sphere.coordinate_rule(d)
    tilt = w * (twice_eps * u.square()).exp()
    assert float((tilt * u.square()).sum() / tilt.sum()) == pytest.approx(known, abs=5e-8)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kind"):
        sphere.stepper("walk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="d must"):
        sphere.coordinate_rule(1)
    with pytest.raises(ValueError, match="shape"):
        sphere.uniform()
    with pytest.raises(TypeError, match="shape"):
        sphere.uniform(2.5)  # type: ignore[arg-type]
