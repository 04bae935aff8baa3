import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.inference import (
    Funnel,
    GaussianMixture,
    IsotropicMixture,
    LogisticRegression,
    MeanFieldMixture,
    Nodes,
    gauss_hermite,
    mixture,
    random_gaussian_mixture,
)

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mixtures(seed: int, n: int, d: int) -> tuple[IsotropicMixture, torch.distributions.Distribution]:
    """Ours, and torch's."""
    means, variances = 2 * randn(n, d, seed=seed), randn(n, seed=seed + 1).exp()
    parts = torch.distributions.Independent(torch.distributions.Normal(means, variances.sqrt()[:, None]), 1)
    shares = torch.distributions.Categorical(torch.ones(n, dtype=F64))
    return IsotropicMixture(means, variances), torch.distributions.MixtureSameFamily(shares, parts)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 5), d=st.integers(1, 4))
def test_density_score_and_moments_are_those_of_torch(seed: int, n: int, d: int) -> None:
    ours, peer = mixtures(seed, n, d)
    x = (3 * randn(2, 7, d, seed=seed + 2)).requires_grad_()
    torch.testing.assert_close(ours.log_prob(x), peer.log_prob(x))
    torch.testing.assert_close(ours.log_prob(x.detach()), peer.log_prob(x).detach())
    (gradient,) = torch.autograd.grad(peer.log_prob(x).sum(), x)
    torch.testing.assert_close(ours.score(x.detach()), gradient)
    (own,) = torch.autograd.grad(ours.log_prob(x).sum(), x)
    torch.testing.assert_close(own, gradient)
    torch.testing.assert_close(ours.mean, peer.mean)
    torch.testing.assert_close(ours.covariance.diagonal(), peer.variance)
    torch.testing.assert_close(ours.responsibilities(x.detach()).sum(-1), torch.ones(2, 7, dtype=F64))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = mixtures(0, 3, 2)
    full = random_gaussian_mixture(3, 2, 2.0, 1.0, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = randn(50, 2)
    wanted = [q.log_prob(x) for q in (ours, full)] + [q.score(x) for q in (ours, full)]
    monkeypatch.setattr(mixture, "BLOCK", 20)
    monkeypatch.setattr("steepest.inference.gaussian_mixture.BLOCK", 20)
    found = [q.log_prob(x) for q in (ours, full)] + [q.score(x) for q in (ours, full)]
    torch.testing.assert_close(found, wanted)


def test_far_from_all_components_the_score_is_that_of_the_nearest() -> None:
    q = IsotropicMixture(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64), 1e-3)
    x = torch.tensor([[-10.0, 1.0]], dtype=F64)  # |x - m|^2 / eps = 1e5
    assert torch.isfinite(q.log_prob(x)).all()
    torch.testing.assert_close(q.score(x), -x / 1e-3)


def test_narrow_components_far_from_zero_keep_their_digits() -> None:
    q = IsotropicMixture(torch.tensor([[1000.0], [1001.0]]), 1e-4)
    x = torch.tensor([[1000.03125]])
    torch.testing.assert_close(q.score(x), torch.tensor([[-312.5]]), rtol=1e-3, atol=0.0)
    assert float(q.log_prob(x)) == pytest.approx(-4.8828 - math.log(2) - 0.5 * math.log(2e-4 * math.pi), abs=1e-3)


def test_the_second_derivative_exists() -> None:
    q = IsotropicMixture(torch.zeros(1, 2, dtype=F64), 0.5)
    hessian = torch.autograd.functional.hessian(q.log_prob, torch.ones(2, dtype=F64))
    torch.testing.assert_close(hessian, -2 * torch.eye(2, dtype=F64))


@pytest.mark.parametrize("stratified", [False, True])
def test_samples_have_the_moments(stratified: bool) -> None:
    q, _ = mixtures(3, 3, 2)
    x = q.sample(200_001, generator=torch.Generator().manual_seed(0), stratified=stratified)
    assert x.shape == (200_001, 2)
    torch.testing.assert_close(x.mean(0), q.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(x.mT.cov(), q.covariance, atol=0.05, rtol=0.02)


def test_samples_of_full_covariances_have_the_moments() -> None:
    q = random_gaussian_mixture(3, 2, 2.0, 1.0, generator=torch.Generator().manual_seed(1), dtype=F64)
    x = q.sample(200_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), q.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(x.mT.cov(), q.covariance, atol=0.03, rtol=0.02)


def test_the_entropy_of_one_gaussian() -> None:
    q = IsotropicMixture(randn(1, 3), 0.7)
    value, error = q.entropy(20_000, generator=torch.Generator().manual_seed(0))
    assert abs(value - 1.5 * math.log(2 * math.pi * math.e * 0.7)) < 4 * error
    assert 0 < error < 0.02


def test_the_box() -> None:
    q = IsotropicMixture.from_box(500, 3, 2.0, 0.5, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert q.means.shape == (500, 3)
    assert q.means.dtype == F64
    assert 1.9 < float(q.means.abs().max()) <= 2
    assert abs(float(q.means.mean())) < 0.1
    assert torch.equal(q.variances, torch.full((500,), 0.5, dtype=F64))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 4), d=st.integers(1, 4))
def test_full_covariances_are_those_of_torch(seed: int, n: int, d: int) -> None:
    means, a, weights = randn(n, d, seed=seed), randn(n, d, d + 1, seed=seed + 1), randn(n, seed=seed + 2).exp()
    ours = GaussianMixture(means, a @ a.mT, weights)
    parts = torch.distributions.MultivariateNormal(means, a @ a.mT)
    peer = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), parts)
    x = randn(6, d, seed=seed + 3).requires_grad_()
    torch.testing.assert_close(ours.log_prob(x), peer.log_prob(x), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(peer.log_prob(x).sum(), x)
    torch.testing.assert_close(ours.score(x.detach()), gradient, rtol=1e-5, atol=1e-6)


def test_isotropic_and_diagonal_covariances_are_full_ones() -> None:
    means, x = randn(2, 3), randn(5, 3, seed=1)
    iso = IsotropicMixture(means, torch.tensor([0.5, 2.0], dtype=F64))
    full = GaussianMixture(means, iso.variances)
    torch.testing.assert_close(full.log_prob(x), iso.log_prob(x))
    diagonal = GaussianMixture(means, iso.variances[:, None].expand(2, 3))
    torch.testing.assert_close(diagonal.covariances, full.covariances)
    wide = randn(2, 3, seed=2).exp()
    diagonal, matrices = GaussianMixture(means, wide), GaussianMixture(means, torch.diag_embed(wide))
    for name in ("log_prob", "score"):
        torch.testing.assert_close(getattr(diagonal, name)(x), getattr(matrices, name)(x))
    for name in ("covariance", "covariances", "roots", "mean"):
        torch.testing.assert_close(getattr(diagonal, name), getattr(matrices, name))
    samples = [q.sample(20, generator=torch.Generator().manual_seed(0)) for q in (diagonal, matrices)]
    torch.testing.assert_close(*samples)


def test_gauss_hermite_is_exact_for_polynomials() -> None:
    for points in (1, 2, 5, 20):
        z, w = gauss_hermite(points)
        assert float(w.sum()) == pytest.approx(1)
        for degree in range(min(2 * points, 12)):
            moment = 0.0 if degree % 2 else math.prod(range(1, degree, 2))
            assert float(w @ z[:, 0] ** degree) == pytest.approx(moment, rel=1e-9, abs=1e-8)
    z, w = gauss_hermite(4, 3)
    assert z.shape == (64, 3)
    torch.testing.assert_close((z.mT * w) @ z, torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match="at most 3"):
        gauss_hermite(3, 4)


@pytest.mark.parametrize("name", ["fresh", "common", "frozen", "antithetic", "cubature", "gauss_hermite"])
def test_nodes_have_the_moments_that_they_promise(name: Any) -> None:
    like = torch.zeros(2, dtype=F64)
    nodes = Nodes(name, 6, 4, 2, torch.Generator().manual_seed(0), like)
    z, again = nodes.draw(like), nodes.draw(like)
    assert z.shape[0] == (4 if name in ("fresh", "frozen", "antithetic") else 1)
    assert torch.equal(z, again) == (name in ("frozen", "cubature", "gauss_hermite"))
    if name in ("antithetic", "cubature", "gauss_hermite"):
        assert float(nodes.average(z).abs().max()) < 1e-14
    if name in ("cubature", "gauss_hermite"):
        torch.testing.assert_close(nodes.average(z[..., None] * z[..., None, :])[0], torch.eye(2, dtype=F64))


def test_the_funnel() -> None:
    x = randn(5, 3).requires_grad_()
    funnel = Funnel(1.5)
    normal = torch.distributions.Normal
    wanted = normal(0, 1.5**0.5).log_prob(x[:, 0])
    wanted = wanted + normal(0, (x[:, :1] / 2).exp()).log_prob(x[:, 1:]).sum(-1)
    torch.testing.assert_close(funnel.log_prob(x), wanted)
    (gradient,) = torch.autograd.grad(wanted.sum(), x)
    torch.testing.assert_close(funnel.score(x.detach()), gradient)


def test_logistic_regression() -> None:
    inputs, labels, w = randn(20, 3), (randn(20, seed=1) > 0).double(), randn(4, 3, seed=2).requires_grad_()
    posterior = LogisticRegression(inputs, labels, 4.0)
    bernoulli = torch.distributions.Bernoulli(logits=w @ inputs.mT)
    wanted = bernoulli.log_prob(labels).sum(-1) - w.square().sum(-1) / 8
    torch.testing.assert_close(posterior.log_prob(w), wanted)
    (gradient,) = torch.autograd.grad(wanted.sum(), w)
    torch.testing.assert_close(posterior.score(w.detach()), gradient)


def test_random_targets() -> None:
    for kind in ("full", "diagonal"):
        target = random_gaussian_mixture(5, 2, 8.0, 5.0, kind=kind, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(target.covariances.abs().amax((1, 2)), torch.full((5,), 5.0), rtol=1e-5, atol=0)
        assert float(target.weights.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="kind"):
        random_gaussian_mixture(5, 2, 8.0, 5.0, kind="round")  # type: ignore[arg-type]


def test_mean_field_mixtures_are_products() -> None:
    means, variances, x = randn(3, 2), randn(3, 2, seed=1).exp(), randn(4, 2, seed=2)
    q = MeanFieldMixture(means, variances)
    columns = [IsotropicMixture(means[:, [j]], variances[:, j]).log_prob(x[:, [j]]) for j in range(2)]
    torch.testing.assert_close(q.log_prob(x), columns[0] + columns[1])
    y = q.sample(200_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.mean(0), q.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(y.var(0), q.variance, atol=0.02, rtol=0.02)
    shared = MeanFieldMixture(means[:, :1], variances[:, :1], 2)
    torch.testing.assert_close(shared.log_prob(x), MeanFieldMixture(means[:, [0, 0]], variances[:, [0, 0]]).log_prob(x))


def test_bad_mixtures() -> None:
    means = torch.zeros(3, 2)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="variances must be positive"):
            IsotropicMixture(means, bad)
    with pytest.raises(ValueError, match=r"\(2,\) beside means of shape|\(2,\) beside \(3, 2\)"):
        IsotropicMixture(means, torch.ones(2))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        IsotropicMixture(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        IsotropicMixture(torch.zeros(0, 2), 1.0)
    with pytest.raises(ValueError, match="finite"):
        IsotropicMixture(means * torch.nan, 1.0)
    for dtype in (torch.int64, torch.complex64, torch.float16):
        with pytest.raises(TypeError, match="means"):
            IsotropicMixture(means.to(dtype), 1.0)
    with pytest.raises(ValueError, match="n must be"):
        IsotropicMixture.from_box(0, 2, 1.0, 1.0)
    with pytest.raises(ValueError, match="half_width"):
        IsotropicMixture.from_box(1, 2, -1.0, 1.0)
    with pytest.raises(ValueError, match=r"\(\.\.\., 2\)"):
        IsotropicMixture(means, 1.0).log_prob(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMixture(means, -torch.ones(3))
    with pytest.raises(ValueError, match="symmetric"):
        GaussianMixture(means, torch.tensor([[1.0, 0.5], [0.0, 1.0]]).expand(3, 2, 2))
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture(means, torch.ones(3), torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="covariances must be of shape"):
        GaussianMixture(means, torch.ones(4))
    with pytest.raises(ValueError, match="one column"):
        MeanFieldMixture(means, 1.0, 5)
