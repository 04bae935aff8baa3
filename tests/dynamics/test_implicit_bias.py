"""Trajectories on Gaussian clusters to the digits, invariances, and what bad input says."""

import decimal
import math
import warnings
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from steepest import run
from steepest.dynamics import LinearAdam, LinearSteepestDescent, NotSeparableError, max_margin
from steepest.geometry import L1, Euclidean, Lp, Max, Norm, Nuclear, Schatten, Spectral
from steepest.studies.spectral_bias import clusters

FEATURES, LABELS = clusters([0])
FEATURES = FEATURES[0]
GAMMA = {"max": 15.4189610931, "euclidean": 1.3376724653, "spectral": 3.4937805800}


def small(seed: int = 0, n: int = 12, k: int = 3, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(k, d, generator=generator, dtype=torch.float64) + 3 * torch.eye(k, d, dtype=torch.float64)
    labels = torch.arange(n) % k
    return centres[labels] + 0.1 * torch.randn(n, d, generator=generator, dtype=torch.float64), labels


def relative(descent: LinearSteepestDescent, norm: str, marks: list[int]) -> list[float]:
    found = []
    for t in range(1, max(marks) + 1):
        descent.step()
        if t in marks:
            found.append(float(descent.normalized_margin(norm)) / GAMMA[norm])
    return found


@pytest.mark.parametrize(
    ("norm", "lr", "expected"),
    [
        ("max", 0.1, {10: 0.85813, 100: 0.92915, 1000: 0.98229, 3000: 0.99105}),
        ("spectral", 0.05, {10: 0.8221, 100: 0.8925, 1000: 0.9584, 3000: 0.9606}),
        ("spectral", 0.5, {1000: 0.98745, 3000: 0.99358}),
        ("euclidean", 0.1, {1000: 0.884, 3000: 0.924}),
        ("euclidean", 1.0, {1000: 0.985}),
    ],
)
def test_relative_margins_of_gaussian_clusters(norm: str, lr: float, expected: dict[int, float]) -> None:
    descent = LinearSteepestDescent(FEATURES, LABELS, lr, norm=norm)
    found = relative(descent, norm, list(expected))
    for value, (t, wanted) in zip(found, expected.items(), strict=True):
        assert abs(value - wanted) <= (2e-5 if len(f"{wanted}") == 7 else 6e-4), t
    upper = float(descent.bounds.upper) / GAMMA[norm]
    assert upper >= 1
    if (norm, lr) == ("max", 0.1):
        assert upper == pytest.approx(1.00222, abs=2e-5)
    if (norm, lr) == ("euclidean", 0.1):
        assert upper == pytest.approx(1.0665, abs=1e-4)


@pytest.mark.parametrize(("norm", "lr", "expected"), [("max", 0.1, 0.963), ("spectral", 0.05, 0.9604)])
def test_momentum_does_not_change_the_limit(norm: str, lr: float, expected: float) -> None:
    descent = LinearSteepestDescent(FEATURES, LABELS, lr, norm=norm, momentum=0.9)
    assert relative(descent, norm, [3000])[0] == pytest.approx(expected, abs=6e-4)


def test_plain_floating_point_goes_astray_as_it_is_known_to() -> None:
    descent = LinearSteepestDescent(FEATURES, LABELS, 0.1, norm="max", log_domain=False)
    early, late = relative(descent, "max", [100, 3000])
    assert early == pytest.approx(0.93, abs=5e-3)
    assert late == pytest.approx(0.22, abs=5e-3)


@pytest.mark.parametrize("norm", [Max(), Euclidean(), Spectral(), Lp(3.0), Lp(1.5), Schatten(4.0), L1(), Nuclear()])
@pytest.mark.parametrize("loss", ["cross_entropy", "exponential", "pair_log"])
def test_every_norm_and_loss_goes_to_its_own_largest_margin(norm: Norm, loss: str) -> None:
    features, labels = small()
    lr = 0.3 if norm == Max() else 1.0
    descent = LinearSteepestDescent(features, labels, lr, norm=norm, loss=loss)  # type: ignore[arg-type]
    for _ in range(600):
        descent.step()
    assert 0 < float(descent.bounds.lower) <= float(descent.bounds.upper)
    assert float(descent.bounds.gap) < 0.12
    if not isinstance(norm, Nuclear) and getattr(norm, "p", 2) not in (1.5, 4.0):
        best = max_margin(features, labels, norm)
        assert float(descent.bounds.lower) <= float(best.upper) * (1 + 1e-9)
        assert float(descent.bounds.upper) >= float(best.margin) * (1 - 1e-9)


def test_only_sign_descent_leaves_the_zero_column_sums() -> None:
    features, labels = small(1, k=4)
    for norm, stays in (("euclidean", True), ("spectral", True), ("max", False)):
        descent = LinearSteepestDescent(features, labels, 0.3, norm=norm)
        for _ in range(50):
            assert float(descent.evaluation.gradient.mantissa.sum(-2).abs().max()) < 1e-14
            descent.step()
        assert (float(descent.weight.sum(-2).abs().max()) < 1e-12) == stays


@pytest.mark.parametrize("norm", ["euclidean", "spectral"])
def test_two_classes_have_opposite_rows_and_reach_the_support_vector_machine(norm: str) -> None:
    features, labels = small(2, k=2)
    descent = LinearSteepestDescent(features, labels, 2.0, norm=norm)
    for _ in range(500):
        descent.step()
    torch.testing.assert_close(descent.weight[0], -descent.weight[1], rtol=1e-10, atol=1e-10)
    best = max_margin(features, labels, "euclidean").weight
    cosine = torch.cosine_similarity(descent.weight.flatten(), best.flatten(), dim=0)
    assert float(cosine) > 0.999


def test_rotated_features_rotate_the_weights_where_the_norm_does_not_see_it() -> None:
    features, labels = small(3)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    for norm, commutes in (("euclidean", True), ("spectral", True), ("max", False)):
        straight = LinearSteepestDescent(features, labels, 0.2, norm=norm)
        turned = LinearSteepestDescent(features @ rotation, labels, 0.2, norm=norm)
        for _ in range(30):
            straight.step()
            turned.step()
        difference = float((straight.weight @ rotation - turned.weight).abs().max())
        assert (difference < 1e-10) == commutes


@pytest.mark.parametrize("norm", ["max", "euclidean", "spectral"])
def test_a_batch_of_problems_is_each_problem_alone(norm: str) -> None:
    features = torch.stack([small(seed)[0] for seed in range(4)]).reshape(2, 2, 12, 5)
    labels = small()[1]
    together = LinearSteepestDescent(features, labels, 0.5, norm=norm, momentum=0.5)
    metrics = {}
    for _ in range(40):
        metrics = together.step()
    alone = LinearSteepestDescent(features[1, 0], labels, 0.5, norm=norm, momentum=0.5)
    for _ in range(40):
        one = alone.step()
    torch.testing.assert_close(together.weight[1, 0], alone.weight, rtol=1e-9, atol=1e-11)
    assert float(metrics["margin[2]"]) == pytest.approx(float(one["margin"]), rel=1e-9)


def reference(features, labels, start, steps, lr, update):
    """Sign-like descent in fifty digits: `update(gradient, t)` is subtracted."""
    with decimal.localcontext() as context:
        context.prec = 50
        h = [[Decimal(x) for x in row] for row in features.tolist()]
        weight = [[Decimal(x) for x in row] for row in start.tolist()]
        for t in range(steps):
            gradient = [[Decimal(0)] * len(h[0]) for _ in weight]
            for row, label in zip(h, labels.tolist(), strict=True):
                gaps = [sum((a - b) * x for a, b, x in zip(w, weight[label], row, strict=True)) for w in weight]
                bottom = sum(gap.exp() for gap in gaps)
                for c, gap in enumerate(gaps):
                    if c != label:
                        p = gap.exp() / bottom / len(h)
                        for j, x in enumerate(row):
                            gradient[c][j] += p * x
                            gradient[label][j] -= p * x
            size = Decimal(lr) / Decimal(t + 1).sqrt()
            moved = update(gradient, t)
            weight = [
                [w - size * u for w, u in zip(row, step, strict=True)] for row, step in zip(weight, moved, strict=True)
            ]
        return torch.tensor([[float(w) for w in row] for row in weight], dtype=torch.float64)


def test_adam_is_right_where_its_moments_are_far_below_the_smallest_float() -> None:
    features, labels = small(4, n=6, k=3, d=3)
    beta1, beta2 = Decimal("0.5"), Decimal("0.8")
    first, second = [[[Decimal(0)] * 3 for _ in range(3)] for _ in range(2)]

    def update(gradient, t):
        for c in range(3):
            for j in range(3):
                first[c][j] = beta1 * first[c][j] + (1 - beta1) * gradient[c][j]
                second[c][j] = beta2 * second[c][j] + (1 - beta2) * gradient[c][j] ** 2
        bias = (1 - beta2 ** (t + 1)).sqrt() / (1 - beta1 ** (t + 1))
        return [[bias * first[c][j] / second[c][j].sqrt() for j in range(3)] for c in range(3)]

    start = 800 * max_margin(features, labels, "euclidean").weight
    expected = reference(features, labels, start, 25, 0.5, update)
    descent = LinearAdam(features, labels, 0.5, betas=(0.5, 0.8), weight=start)
    for _ in range(25):
        descent.step()
    assert float(descent.margin) > 800  # exp(-800) is no float64
    torch.testing.assert_close(descent.weight - start, expected - start, rtol=1e-8, atol=1e-8)


def test_momentum_is_right_far_below_the_smallest_float() -> None:
    features, labels = small(4, n=6, k=3, d=3)
    beta, buffer = Decimal("0.3"), [[Decimal(0)] * 3 for _ in range(3)]

    def update(gradient, _):
        for c in range(3):
            for j in range(3):
                buffer[c][j] = beta * buffer[c][j] + (1 - beta) * gradient[c][j]
        length = sum(x * x for row in buffer for x in row).sqrt()
        return [[x / length for x in row] for row in buffer]

    start = 1000 * max_margin(features, labels, "euclidean").weight
    expected = reference(features, labels, start, 25, 0.5, update)
    descent = LinearSteepestDescent(features, labels, 0.5, norm="euclidean", momentum=0.3, weight=start)
    for _ in range(25):
        descent.step()
    assert float(descent.margin) > 1000
    torch.testing.assert_close(descent.weight - start, expected - start, rtol=1e-8, atol=1e-8)


def test_the_momentum_does_not_fade_away_over_many_steps() -> None:
    # A scale that never falls would let 0.1^400 and the gradients at margins in the thousands underflow together.
    features, labels = small()
    descent = LinearSteepestDescent(features, labels, 100.0, norm="max", momentum=0.1)
    for _ in range(400):
        descent.step()
    assert float(descent.margin) > 5000
    assert float(descent.momentum_buffer.mantissa.abs().max()) == 1
    assert float(descent.momentum_buffer.log_scale) < -800


def test_coordinates_that_no_gradient_reaches_stay() -> None:
    features, labels = small(d=5)
    features[:, 4] = 0
    descent = LinearAdam(features, labels)
    for _ in range(20):
        descent.step()
    assert torch.equal(descent.weight[:, 4], torch.zeros(3, dtype=torch.float64))
    assert bool(descent.weight[:, :4].all())


def test_adam_steps_are_signs_without_memory() -> None:
    features, labels = small()
    adam = LinearAdam(features, labels, 0.3, betas=(0.0, 0.0))
    sign = LinearSteepestDescent(features, labels, 0.3, norm="max")
    for _ in range(100):
        adam.step()
        sign.step()
    torch.testing.assert_close(adam.weight, sign.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_features_is_kept(dtype: torch.dtype) -> None:
    features, labels = small()
    for descent in (
        LinearSteepestDescent(features.to(dtype), labels, 1.0, norm="spectral", momentum=0.9),
        LinearAdam(features.to(dtype), labels.to(torch.int32), 1.0),
    ):
        for _ in range(50):
            metrics = descent.step()
        assert descent.weight.dtype == dtype
        assert metrics["margin"].dtype == dtype
        assert float(descent.margin) > 5


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: LinearSteepestDescent(x, y, 0.3, norm="spectral", momentum=0.9),
        lambda x, y: LinearAdam(x, y, 0.3),
    ],
)
def test_a_run_resumes_with_the_same_bits(make, tmp_path: Path) -> None:
    features, labels = small()
    whole = make(features, labels)
    expected = run(whole, 30, progress=False)
    path = tmp_path / "run.ckpt"
    run(make(features, labels), 12, checkpoint=path, progress=False)
    other = make(features, labels)
    found = run(other, 30, checkpoint=path, progress=False)
    assert found.resumed_from == 12
    assert torch.equal(other.weight, whole.weight)
    assert found.history == expected.history
    assert set(found.history) >= {"loss", "log_loss", "log_proxy", "margin", "normalized_margin", "upper_bound", "lr"}


def test_a_state_of_other_shape_changes_nothing() -> None:
    features, labels = small()
    descent, other = LinearSteepestDescent(features, labels), LinearSteepestDescent(features[:, :4], labels)
    descent.step()
    before = descent.weight
    with pytest.raises(ValueError, match="weight must have the shape"):
        descent.load_state_dict(other.state_dict())
    assert descent.weight is before
    assert descent.steps == 1


def test_a_start_is_taken_and_left_alone() -> None:
    features, labels = small()
    start = torch.ones(3, 5, dtype=torch.float64)
    descent = LinearSteepestDescent(features, labels, weight=start)
    descent.step()
    assert torch.equal(start, torch.ones(3, 5, dtype=torch.float64))
    assert float((descent.weight - start).abs().max()) > 0


def overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 3, generator=generator, dtype=torch.float64), torch.arange(30) % 3


def test_data_that_are_not_separable_are_noticed() -> None:
    features, labels = overlapping()
    descent = LinearSteepestDescent(features, labels, check_after=50)
    with pytest.raises(NotSeparableError, match="not linearly separable: no positive margin after 50 steps, now -"):
        for _ in range(50):
            descent.step()
    assert float(descent.evaluation.log_loss.exp()) > math.log(2) / 30
    with pytest.warns(UserWarning, match="not linearly separable"):
        run(LinearAdam(features, labels, check_after=50, not_separable="warn"), 60, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(LinearSteepestDescent(features, labels, check_after=50, not_separable="ignore"), 60, progress=False)


def test_slow_progress_on_separable_data_is_not_mistaken() -> None:
    features, labels = small(0)
    features = features - 0.999 * features[0]  # the first sample is nearly zero, so its margin grows last
    descent = LinearSteepestDescent(features, labels, 1e-3, check_after=3)
    for _ in range(5):
        descent.step()
    assert float(descent.bounds.lower) == 0


def test_the_problem_that_is_not_separable_is_named() -> None:
    features, labels = overlapping()
    easy = torch.eye(3, dtype=torch.float64)[labels]
    with pytest.raises(NotSeparableError, match="in problem 1:"):
        run(LinearSteepestDescent(torch.stack([easy, features]), labels, check_after=40), 40, progress=False)


def test_a_zero_gradient_is_explained() -> None:
    features = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    for descent in (LinearSteepestDescent(features, labels), LinearAdam(features, labels)):
        with pytest.raises(NotSeparableError, match="the gradient is exactly zero"):
            descent.step()
        assert descent.steps == 0
    features, labels = small()
    plain = LinearSteepestDescent(features, labels, 500.0, norm="max", loss="exponential", log_domain=False)
    with pytest.raises(FloatingPointError, match=r"underflowed in torch.float64; use log_domain=True"):
        for _ in range(50):
            plain.step()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lr": 0.0}, ValueError, "lr must be a positive number, got 0.0"),
        ({"lr": -1.0}, ValueError, "lr must be a positive number"),
        ({"lr": math.nan}, ValueError, "lr must be a positive number"),
        ({"lr": math.inf}, ValueError, "lr must be a positive number"),
        ({"lr_power": 1.1}, ValueError, "finite sum and the weights freeze"),
        ({"lr_power": -0.1}, ValueError, r"lr_power must lie in 0 .. 1"),
        ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\)"),
        ({"momentum": -0.1}, ValueError, r"momentum must lie in \[0, 1\)"),
        ({"norm": "spectrall"}, ValueError, "norm must be one of"),
        ({"norm": 3}, TypeError, "norm must be a Norm"),
        ({"norm": Schatten(0.5)}, ValueError, "below p = 1"),
        ({"not_separable": "stop"}, ValueError, "not_separable must be"),
        ({"check_after": 0}, ValueError, "check_after must be at least 1"),
        ({"classes": 2}, ValueError, r"labels must lie in 0 .. 1"),
        ({"weight": torch.zeros(3, 4, dtype=torch.float64)}, ValueError, r"weight must have shape \(3, 5\)"),
        ({"weight": torch.zeros(3, 5)}, TypeError, "dtype of the features"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
    ],
)
def test_bad_settings_are_named(options, error, says) -> None:
    features, labels = small()
    with pytest.raises(error, match=says):
        LinearSteepestDescent(features, labels, **options)


def test_adam_checks_its_betas() -> None:
    features, labels = small()
    with pytest.raises(ValueError, match="betas must be two numbers"):
        LinearAdam(features, labels, betas=(0.9, 1.0))
    with pytest.warns(UserWarning, match="the theory needs b1 <= b2"):
        LinearAdam(features, labels, betas=(0.9, 0.5))


def test_steps_that_shrink_fast_are_warned_of() -> None:
    features, labels = small()
    with pytest.warns(UserWarning, match="settles very late"):
        LinearSteepestDescent(features, labels, lr_power=0.75)
    with pytest.warns(UserWarning, match="log t"):
        LinearAdam(features, labels, lr_power=1.0)
