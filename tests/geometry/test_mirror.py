"""Mirror maps: inverses, convexity, special cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.geometry import EntropyMap, EuclideanMap, LogBarrierMap, MirrorMap, NegentropyMap, PNormMap, PowerMap

MAPS: list[MirrorMap] = [
    EuclideanMap(),
    EntropyMap(),
    EntropyMap(simplex=False),
    PNormMap(1.3),
    PNormMap(2.0),
    PNormMap(5.0),
    NegentropyMap(),
    PowerMap(1.5),
    PowerMap(3.0),
    LogBarrierMap(),
]


def point(mirror: MirrorMap, seed: int, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if isinstance(mirror, EntropyMap):
        return x.softmax(-1) if mirror.simplex else x.exp()
    if isinstance(mirror, NegentropyMap | PowerMap | LogBarrierMap):
        return x.softmax(-1)
    return x


@pytest.mark.parametrize("mirror", MAPS, ids=repr)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 9))
def test_to_primal_inverts_to_dual_and_the_divergence_is_non_negative(mirror: MirrorMap, seed: int, size: int) -> None:
    x, y = point(mirror, seed, 3, size), point(mirror, seed + 1, 3, size)
    assert torch.allclose(mirror.to_primal(mirror.to_dual(x)), x, rtol=1e-8, atol=1e-10)
    assert bool((mirror.divergence(x, y) >= -1e-10).all())
    assert torch.allclose(mirror.divergence(x, x), torch.zeros(3, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("mirror", MAPS, ids=repr)
def test_to_dual_is_the_gradient_of_the_potential(mirror: MirrorMap) -> None:
    x = point(mirror, 3, 4, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(mirror.potential(x).sum(), x)
    assert torch.allclose(gradient, mirror.to_dual(x.detach()), rtol=1e-8)


@pytest.mark.parametrize("mirror", MAPS, ids=repr)
def test_the_step_minimises_its_model(mirror: MirrorMap) -> None:
    x, g = point(mirror, 1, 6), torch.linspace(-1, 1, 6, dtype=torch.float64)
    y = mirror.step(x, g, 0.3)

    def model(z: torch.Tensor) -> torch.Tensor:
        return (g * z).sum() + mirror.divergence(z, x) / 0.3

    for seed in range(5):
        other = point(mirror, seed + 10, 6)
        nearby = y + 0.01 * (other - y)
        assert float(model(nearby)) >= float(model(y)) - 1e-12


def test_special_cases() -> None:
    x, g = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 0.0, -1.0])
    assert torch.allclose(EuclideanMap().step(x, g, 0.1), x - 0.1 * g)
    weights = x * (-0.1 * g).exp()
    assert torch.allclose(EntropyMap().step(x, g, 0.1), weights / weights.sum())
    assert torch.allclose(PNormMap(2.0).step(x, g, 0.1), x - 0.1 * g)
    assert float(EntropyMap().potential(torch.tensor([0.0, 1.0]))) == -1.0
    assert float(EntropyMap().divergence(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]))) == pytest.approx(
        0.6931, abs=1e-4
    )
    assert torch.equal(PNormMap(3.0).to_dual(torch.zeros(4)), torch.zeros(4))


@pytest.mark.parametrize("p", [1.0, 0.5, float("inf"), float("nan")])
def test_p_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match="p must be above 1"):
        PNormMap(p)


@pytest.mark.parametrize("mirror", MAPS, ids=repr)
def test_the_conjugate_is_the_largest_pairing(mirror: MirrorMap) -> None:
    """Equality in Fenchel's inequality at the gradient, and the inequality everywhere else."""
    x = point(mirror, 3, 50, 5)
    y = mirror.to_dual(x[:1])
    gap = mirror.conjugate(y) + mirror.potential(x) - (x * y).sum(-1)
    assert abs(float(gap[0])) < 1e-12
    assert bool((gap[1:] > 0).all())


def test_relations_between_the_maps() -> None:
    x = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert torch.equal(PowerMap(2.0).to_dual(x), EuclideanMap().to_dual(x))
    assert torch.allclose(PowerMap(2.0).potential(x), EuclideanMap().potential(x), rtol=1e-15)
    near = PowerMap(1 + 1e-9).to_dual(x)
    assert torch.allclose(near - near.mean(), NegentropyMap().to_dual(x) - NegentropyMap().to_dual(x).mean(), atol=1e-6)
    assert float(NegentropyMap().potential(x) - EntropyMap().potential(x)) == pytest.approx(1)
    with pytest.raises(ValueError, match="alpha"):
        PowerMap(1.0)
