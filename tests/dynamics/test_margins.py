"""Margins, their certificates and the largest margin: closed forms, bounds, and the numbers of other solvers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from steepest.dynamics import LogDomainLoss, is_separable, margin, margin_certificate, max_margin, normalized_margin
from steepest.geometry import L1, Euclidean, Lp, Max, MaxRow, Nuclear, Scaled, Schatten, Spectral
from steepest.studies.spectral_bias import clusters

NORMS = [Max(), Euclidean(), Spectral(), L1(), Lp(3.0), Lp(1.5), Nuclear(), Schatten(4.0), Schatten(1.5)]
SOLVED = [Max(), Euclidean(), Spectral(), L1(), Lp(2.5), Lp(3.0), Schatten(2.0)]
seeds = st.integers(0, 2**31 - 1)


def separable(seed: int, n: int = 15, k: int = 3, d: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(k, d, generator=generator, dtype=torch.float64) + 4 * torch.eye(k, d, dtype=torch.float64)
    labels = torch.arange(n) % k
    return centres[labels] + 0.05 * torch.randn(n, d, generator=generator, dtype=torch.float64), labels


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_margin_is_the_least_difference_of_logits() -> None:
    features, labels = separable(0)
    weight = weights(1, 3, 6)
    logits = features @ weight.mT
    expected = min(
        float(logits[i, y] - logits[i, c]) for i, y in enumerate(labels.tolist()) for c in range(3) if c != y
    )
    assert float(margin(weight, features, labels)) == pytest.approx(expected, rel=1e-13)
    for norm in NORMS:
        found = float(normalized_margin(weight, features, labels, norm))
        assert found == pytest.approx(expected / float(norm.norm(weight)), rel=1e-12)
    assert float(normalized_margin(0 * weight, features, labels, "max")) == 0


def test_leading_dimensions_are_problems() -> None:
    features = torch.stack([separable(seed)[0] for seed in range(4)]).reshape(2, 2, 15, 6)
    labels, weight = separable(0)[1], weights(1, 2, 2, 3, 6)
    found = margin(weight, features, labels)
    bounds = margin_certificate(weight, features, labels, "spectral")
    largest = max_margin(features, labels, "euclidean")
    assert found.shape == bounds.lower.shape == bounds.upper.shape == largest.margin.shape == (2, 2)
    assert largest.weight.shape == (2, 2, 3, 6)
    for i, j in ((0, 1), (1, 0)):
        one = features[i, j], labels
        assert float(found[i, j]) == pytest.approx(float(margin(weight[i, j], *one)), rel=1e-13)
        alone = margin_certificate(weight[i, j], *one, "spectral")
        assert float(bounds.upper[i, j]) == pytest.approx(float(alone.upper), rel=1e-12)
        assert float(largest.margin[i, j]) == pytest.approx(float(max_margin(*one, "euclidean").margin), rel=1e-9)


@pytest.mark.parametrize("norm", SOLVED, ids=repr)
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_the_certificate_brackets_the_largest_margin(norm, seed: int) -> None:
    features, labels = separable(seed % 50)
    best = max_margin(features, labels, norm)
    assert float(best.margin) * (1 - 1e-12) <= float(best.upper) <= float(best.margin) * (1 + 1e-5)
    assert float(norm.norm(best.weight)) == pytest.approx(1, rel=1e-9)
    assert float(normalized_margin(best.weight, features, labels, norm)) == pytest.approx(float(best.margin), rel=1e-9)
    weight = weights(seed, 3, 6)
    for loss in ("cross_entropy", "exponential", "pair_log"):
        bounds = margin_certificate(weight, features, labels, norm, loss=loss)
        assert float(bounds.upper) >= float(best.margin) * (1 - 1e-9)
        assert 0 <= float(bounds.lower) <= float(best.upper) * (1 + 1e-9)
    near = margin_certificate(best.weight + 1e-7 * weight, features, labels, norm, scales=[10.0**p for p in range(6)])
    assert float(near.lower) == pytest.approx(float(best.margin), rel=1e-4)
    assert near.gap < 2


@pytest.mark.parametrize("norm", NORMS, ids=repr)
@settings(deadline=None, max_examples=10)
@given(seed=seeds, eta=st.floats(1e-3, 1.0))
def test_the_lemmas_of_the_paper(norm, seed: int, eta: float) -> None:
    features, labels = separable(seed % 50)
    n, bound = len(labels), float(features.abs().sum(-1).max())
    loss = LogDomainLoss(features, labels)
    weight = weights(seed, 3, 6) * 10.0 ** (seed % 3 - 1)
    found = loss.evaluate(weight)
    proxy, value = float(found.log_proxy.exp()), float(found.log_loss.exp())
    gradient = found.gradient.to_tensor()
    dual = float(norm.dual(gradient))
    assert dual <= 2 * bound * proxy * (1 + 1e-9)
    assert proxy <= value * (1 + 1e-12)
    assert proxy >= value * (1 - n * value / 2) - 1e-15
    if value <= math.log(2) / n or proxy <= 1 / (2 * n):
        assert value <= 2 * proxy
    step = norm.direction(weights(seed + 1, 3, 6))
    after = loss.evaluate(weight - eta * step)
    assert float(after.log_proxy - found.log_proxy) <= 2 * bound * eta * (1 + 1e-9)
    second = torch.autograd.functional.hvp(
        lambda w: torch.nn.functional.cross_entropy(features @ w.mT, labels), weight, step
    )[1]
    assert float((second * step).sum()) <= 2 * bound**2 * proxy * (1 + 1e-9)
    # Descent, with the constant that the two lemmas give.
    own = loss.evaluate(weight - eta * norm.direction(gradient))
    gamma = float(max_margin(features, labels, "euclidean").margin) * _least_ratio(norm)
    excess = (eta * bound) ** 2 * math.exp(2 * bound * eta)
    assert float(own.log_loss.exp()) <= value + (excess - eta * gamma) * proxy + 1e-12
    assert dual >= gamma * proxy * (1 - 1e-6)


def _least_ratio(norm) -> float:
    """A lower bound of ||x||_F / norm(x) for 3 x 6 matrices: so much of the Frobenius margin is left in the norm."""
    dual = norm.dual_norm
    identity = torch.eye(18, dtype=torch.float64).reshape(18, 3, 6)
    if isinstance(norm, Lp):
        return 18.0 ** -max(0.0, 1 / norm.p - 0.5)
    assert float(dual.norm(identity).min()) == pytest.approx(1)
    return 3.0 ** -max(0.0, 1 / norm.p - 0.5)


# From conic programs (an interior-point solver of semidefinite programs, and one of linear ones).
GAMMAS = {
    0: {"max": 15.418961, "euclidean": 1.3376724653, "spectral": 3.4937801882},
    1: {"max": 12.88946, "euclidean": 1.11425, "spectral": 3.00189},
    2: {"max": 13.84035, "euclidean": 1.23487, "spectral": 3.07931},
}


@pytest.mark.parametrize("seed", GAMMAS)
def test_the_largest_margins_of_gaussian_clusters(seed: int) -> None:
    features, labels = clusters([seed])
    for norm, expected in GAMMAS[seed].items():
        best = max_margin(features[0], labels, norm)
        tolerance = {"max": 5e-7, "euclidean": 1e-9, "spectral": 1e-6}[norm] if seed == 0 else 5e-6
        assert abs(float(best.margin) - expected) <= tolerance
        assert float(best.margin) * (1 - 1e-12) <= float(best.upper) <= float(best.margin) * (1 + 1e-5)


@pytest.mark.parametrize("norm", ["euclidean", "spectral"])
def test_of_all_best_classifiers_the_centred_one_is_returned(norm: str) -> None:
    features, labels = clusters([0])
    found = max_margin(features[0], labels, norm).weight
    assert float(found.sum(0).abs().max()) < 1e-6
    shifted = found + 0.01 * torch.ones(10, 1, dtype=torch.float64)
    assert float(margin(shifted, features[0], labels)) == pytest.approx(float(margin(found, features[0], labels)))


def test_largest_margins_in_closed_form() -> None:
    features, labels = torch.eye(4, dtype=torch.float64), torch.arange(4)
    # The best classifier is the centred identity, or 2 I - 1 where only entries count.
    assert float(max_margin(features, labels, "euclidean").margin) == pytest.approx(1 / math.sqrt(3), rel=1e-9)
    assert float(max_margin(features, labels, "max").margin) == pytest.approx(2, rel=1e-9)
    assert float(max_margin(features, labels, "l1").margin) == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize("norm", SOLVED, ids=repr)
def test_scaled_features_scale_the_margin(norm) -> None:
    features, labels = separable(5)
    one, scaled = max_margin(features, labels, norm), max_margin(1e-6 * features, labels, norm)
    assert float(scaled.margin) == pytest.approx(1e-6 * float(one.margin), rel=1e-6)


def test_a_radius_scales_the_margin() -> None:
    features, labels = separable(5)
    for norm in (Max(), Euclidean(), Spectral()):
        inner, outer = max_margin(features, labels, norm), max_margin(features, labels, Scaled(norm, 2.5))
        assert float(outer.margin) == pytest.approx(2.5 * float(inner.margin), rel=1e-6)
        assert float(Scaled(norm, 2.5).norm(outer.weight)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("norm", ["euclidean", "spectral"])
def test_two_classes_are_the_classical_support_vector_machine(norm: str) -> None:
    features, labels = separable(7, k=2)
    signed = (features * (1 - 2 * labels)[:, None]).numpy()
    # The shortest point of the convex hull of the signed samples is the normal of the widest street.
    system = np.vstack([signed.T, 1e3 * np.ones(len(signed))])
    weight_of, _ = nnls(system, np.append(np.zeros(signed.shape[1]), 1e3))
    normal = torch.from_numpy(signed.T @ (weight_of / weight_of.sum()))
    found = max_margin(features, labels, norm)
    difference = found.weight[0] - found.weight[1]
    torch.testing.assert_close(found.weight[0], -found.weight[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(difference / difference.norm(), normal / normal.norm(), rtol=1e-4, atol=1e-4)
    # ||(w, -w)|| is sqrt(2) ||w|| in both norms, and the difference of logits 2 <w, h>.
    assert float(found.margin) == pytest.approx(math.sqrt(2) * float(normal.norm()), rel=1e-5)


def test_data_that_no_classifier_separates_have_margin_zero() -> None:
    features = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    assert not is_separable(features, labels)
    for norm in (Max(), Euclidean(), Spectral()):
        found = max_margin(features, labels, norm)
        assert float(found.margin) == pytest.approx(0, abs=1e-9)
        assert float(found.upper) <= 1e-6
    constant = torch.cat([features, torch.ones(4, 1, dtype=torch.float64), features[:, :1] * features[:, 1:]], 1)
    assert is_separable(constant, labels)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_separability_agrees_with_the_linear_program(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    labels = torch.cat([torch.arange(3), torch.randint(3, (9,), generator=generator)])
    truth = float(max_margin(features, labels, "max").margin) > 1e-9
    assert is_separable(features, labels) == truth
    labels = (features @ torch.randn(3, 3, generator=generator, dtype=torch.float64)).argmax(-1)
    if len(labels.unique()) > 1 and int(labels.max()) == 2:
        with pytest.warns(UserWarning) if len(labels.unique()) < 3 else _nothing():
            assert is_separable(features, labels)


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_bad_arguments_are_named() -> None:
    features, labels = separable(0)
    weight = weights(0, 3, 6)
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 6\), got \(3, 5\)"):
        margin(weight[:, :5], features, labels)
    with pytest.raises(TypeError, match="dtype of the features"):
        margin(weight.float(), features, labels)
    with pytest.raises(ValueError, match="weight must be finite"):
        margin(weight * torch.nan, features, labels)
    with pytest.raises(ValueError, match="below p = 1"):
        normalized_margin(weight, features, labels, Schatten(0.5))
    with pytest.raises(ValueError, match="p must be at least 1"):
        normalized_margin(weight, features, labels, Lp(0.5))
    with pytest.raises(ValueError, match="LinearSteepestDescent brackets"):
        max_margin(features, labels, MaxRow())
    with pytest.raises(ValueError, match="tolerance must lie"):
        max_margin(features, labels, "max", tolerance=0.0)
    with pytest.raises(ValueError, match="scales must be positive"):
        margin_certificate(weight, features, labels, "max", scales=[])
