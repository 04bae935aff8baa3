"""Alignment and descent potential, and the random-feature quadratic, against autograd."""

import pytest
import torch
from torch import Tensor

from steepest.dynamics.alignment import alignment, decrease, descent_potential, exact_step
from steepest.dynamics.random_features import Features, RandomFeatureQuadratic
from steepest.geometry import polar


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(kind: Features = "gaussian") -> RandomFeatureQuadratic:
    return RandomFeatureQuadratic.draw(5, 8, kind=kind, samples=300, generator=generator())


@pytest.mark.parametrize("kind", ["gaussian", "centered_relu", "relu"])
def test_the_quadratic_is_its_own_taylor_series(kind) -> None:
    f = problem(kind)
    weight = torch.randn(5, 8, generator=generator(1), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(f.loss(weight), weight)
    torch.testing.assert_close(f.gradient(weight).detach(), gradient)
    d = torch.randn(5, 8, generator=generator(2), dtype=torch.float64)
    _, product = torch.autograd.functional.hvp(f.loss, weight.detach(), d)
    torch.testing.assert_close(f.hvp(d), product)
    torch.testing.assert_close(f.hvp(d), d @ f.covariance)
    everything = torch.arange(300)
    torch.testing.assert_close(f.gradient(weight, everything).detach(), gradient)
    assert float(f.loss(f.target)) == 0
    again = problem(kind)
    torch.testing.assert_close(again.samples, f.samples, rtol=0, atol=0)


@pytest.mark.parametrize("t", [0.2, 1.0, 1.7])
@pytest.mark.parametrize("rule", [lambda g: g, lambda g: polar(g, "svd")])
def test_the_decrease_of_a_quadratic(t: float, rule) -> None:
    f = problem()
    weight = torch.randn(5, 8, generator=generator(1), dtype=torch.float64)
    batch = f.draw_batch(16, generator(3))
    full, g = f.gradient(weight), f.gradient(weight, batch)
    d = rule(g)
    gamma, potential = alignment(full, g, d), descent_potential(g, d, f.hvp)
    eta = t * (g * d).sum() / (d * f.hvp(d)).sum()
    torch.testing.assert_close(
        f.loss(weight) - f.loss(weight - eta * d), decrease(potential, gamma, t), rtol=1e-10, atol=1e-10
    )
    best = exact_step(full, d, f.hvp)
    torch.testing.assert_close(
        f.loss(weight) - f.loss(weight - best * d), potential * gamma**2 / 2, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(alignment(full, full, d), torch.ones((), dtype=torch.float64))


def test_batches_zeros_and_bad_shapes() -> None:
    g = torch.randn(3, 4, 5, generator=generator())

    def hvp(d: Tensor) -> Tensor:
        return 2 * d

    assert alignment(g, g, g).shape == (3,)
    zero = torch.zeros_like(g)
    assert not alignment(g, g, zero).any()
    assert not descent_potential(g, zero, hvp).any()
    with pytest.raises(ValueError, match="one shape"):
        alignment(g, g[0], g)
    with pytest.raises(ValueError, match="one shape"):
        alignment(g[0, 0], g[0, 0], g[0, 0])
    with pytest.raises(ValueError, match="one shape"):
        descent_potential(g, g, lambda d: d[0])
    with pytest.raises(ValueError, match="kind"):
        RandomFeatureQuadratic.draw(2, 3, kind="cosine", generator=generator())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="outputs"):
        RandomFeatureQuadratic.draw(0, 3, generator=generator())
    with pytest.raises(ValueError, match="do not fit"):
        RandomFeatureQuadratic(torch.zeros(2, 3), torch.zeros(5, 4))
