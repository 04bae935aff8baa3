import math

import pytest
import torch

from steepest.studies import spectral_bias


def test_the_data_are_those_of_a_seeded_numpy_generator() -> None:
    features, labels = spectral_bias.clusters([0, 1])
    assert features.shape == (2, 500, 25)
    assert labels.tolist() == [c for c in range(10) for _ in range(50)]
    # numpy.random.default_rng(0).normal() begins with 0.12573022; the samples of class 0 lie around it.
    assert float(features[0, :50, 0].mean()) == pytest.approx(0.12573022, abs=0.05)
    assert torch.equal(spectral_bias.clusters([1])[0][0], features[1])


def test_images_are_balanced_and_centred() -> None:
    images, labels = spectral_bias.digit_images(100)
    assert images.shape == (1000, 64)
    assert labels.bincount().tolist() == [100] * 10
    assert float(images.mean(0).abs().max()) < 1e-14
    assert float(images.max() - images.min()) <= 2


def test_values_at_a_margin_are_interpolated_and_never_extrapolated() -> None:
    points = [(50.0, 2.0), (30.0, 1.0), (44.0, 1.8)]
    assert spectral_bias.at_margin(points, 37.0) == pytest.approx(1.4)
    assert spectral_bias.at_margin(points, 47.0) == pytest.approx(1.9)
    assert math.isnan(spectral_bias.at_margin(points, 29.9))


def test_a_margin_that_was_not_reached_fails_the_claim() -> None:
    claim = next(claim for claim in spectral_bias.CLAIMS if claim.id == "C8")
    good = {"spectral": [1.5] * 3, "max": [1.3] * 3, "euclidean": [1.2] * 3}
    assert claim.verdict({"over output": good, "over both": good}) == "holds"
    missing = {**good, "spectral": [1.5, 1.5, math.nan]}
    assert claim.verdict({"over output": missing, "over both": good}) == "partly"
