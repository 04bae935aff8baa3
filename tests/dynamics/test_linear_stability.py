import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.dynamics import (
    LinearisedSGD,
    LinearStability,
    SecondMoment,
    frobenius_threshold,
    mean_square_threshold,
    noise_factor,
    trace_threshold,
)
from steepest.loop import run

SMALL = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
THRESHOLDS = {(1, True): 0.5760394922, (2, True): 0.7815076586, (2, False): 0.9381644904, (3, True): 0.8810199721}
THRESHOLDS |= {(1, False): 0.5760394922, (3, False): 1.1314829082, (None, True): 1.1314829082}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def brute_force(jacobian: torch.Tensor, p: float) -> float:
    """The generalised eigenproblem on all p x p matrices, with Kronecker products, restricted to the range of G."""
    if jacobian.ndim == 2:
        jacobian = jacobian[:, None]
    blocks = [j.mT @ j for j in jacobian]
    g = sum(blocks) / len(blocks)
    values, vectors = torch.linalg.eigh(g)
    v = vectors[:, values > 1e-10 * values[-1]]
    blocks, g = [v.mT @ h @ v for h in blocks], v.mT @ g @ v
    eye = torch.eye(len(g), dtype=torch.float64)
    c = (torch.kron(g, eye) + torch.kron(eye, g)) / 2
    d = (1 - p) * torch.kron(g, g) + p * sum(torch.kron(h, h) for h in blocks) / len(blocks)
    return 2 / float(torch.linalg.eigvals(torch.linalg.solve(c, d)).real.max())


def test_the_small_example() -> None:
    point = LinearStability(SMALL)
    assert point.trace == pytest.approx(2.3333333, abs=1e-7)
    assert point.frobenius == pytest.approx(1.8559215, abs=1e-7)
    assert point.largest == pytest.approx(1.7675918, abs=1e-7)
    assert 2 / point.trace == pytest.approx(0.8571429, abs=1e-7)
    assert 2 * point.trace / point.fourth_moment == pytest.approx(0.6666667, abs=1e-7)
    assert point.trace_bound(1) == pytest.approx(0.6666667, abs=1e-7)
    assert torch.allclose(SMALL.mT @ SMALL / 3, torch.tensor([[2 / 3, 1 / 3], [1 / 3, 5 / 3]], dtype=torch.float64))


@pytest.mark.parametrize("method", ["auto", "kron", "gram"])
@pytest.mark.parametrize(("batch", "expected"), THRESHOLDS.items())
def test_the_thresholds_of_the_small_example(batch: tuple, expected: float, method: str) -> None:
    assert LinearStability(SMALL).threshold(*batch, method=method) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("batch", "expected"), THRESHOLDS.items())
def test_the_power_iteration_agrees(batch: tuple, expected: float) -> None:
    assert LinearStability(SMALL).threshold(*batch, method="power") == pytest.approx(expected, rel=1e-5)


def test_the_form_for_single_examples_agrees_with_the_kronecker_form() -> None:
    assert LinearStability(SMALL).threshold(1, method="diag") == pytest.approx(0.5760394922, abs=1e-10)
    for seed, shape in enumerate([(6, 9), (12, 5), (8, 8), (30, 7)]):
        point = LinearStability(randn(*shape, seed=seed))
        assert point.threshold(1, method="diag") == pytest.approx(point.threshold(1, method="kron"), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 6), k=st.integers(1, 3), p=st.integers(1, 5), scale=st.booleans())
def test_all_methods_agree_with_brute_force(seed: int, n: int, k: int, p: int, scale: bool) -> None:
    jacobian = randn(n, k, p, seed=seed)
    if scale:
        jacobian = jacobian * randn(n, 1, 1, seed=seed + 1).exp()
    point = LinearStability(jacobian)
    for batch_size in range(1, n + 1):
        for replacement in (True, False):
            wanted = brute_force(jacobian, noise_factor(n, batch_size, replacement))
            for method in ("kron", "gram"):
                found = point.threshold(batch_size, replacement, method=method)
                assert found == pytest.approx(wanted, rel=1e-8)
            assert point.sufficient(batch_size, replacement) <= wanted * (1 + 1e-9)
            assert wanted <= point.trace_bound(batch_size, replacement) * (1 + 1e-9)
            assert wanted <= 2 / point.largest * (1 + 1e-9)
            limit = trace_threshold(wanted, noise_factor(n, batch_size, replacement), k)
            assert point.trace <= limit * (1 + 1e-9)


def test_equal_gradients_of_one_parameter() -> None:
    jacobian = torch.full((5, 1), 3.0)
    for batch_size in (1, 2, 5):
        assert mean_square_threshold(jacobian, batch_size) == pytest.approx(2 / 9, rel=1e-12)
    other = randn(5, 3)
    found = mean_square_threshold(other, 5, replacement=False)
    assert found == mean_square_threshold(other, None) == pytest.approx(2 / LinearStability(other).largest, rel=1e-12)


def test_orthogonal_gradients_of_equal_length_attain_the_trace_bound() -> None:
    point = LinearStability(2 * torch.eye(4))
    assert point.threshold(1) == pytest.approx(0.5, rel=1e-12)
    assert 2 / point.trace == pytest.approx(0.5, rel=1e-12)
    assert point.threshold(None) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("batch", [(1, True), (3, True), (3, False)])
def test_invariances(batch: tuple) -> None:
    jacobian = randn(7, 4)
    wanted = mean_square_threshold(jacobian, *batch)
    rotation = torch.linalg.qr(randn(4, 4, seed=1))[0]
    assert mean_square_threshold(3 * jacobian, *batch) == pytest.approx(wanted / 9, rel=1e-10)
    assert mean_square_threshold(jacobian @ rotation, *batch) == pytest.approx(wanted, rel=1e-10)
    for size in (1e-150, 1e150):
        assert mean_square_threshold(size * jacobian, *batch) * size**2 == pytest.approx(wanted, rel=1e-10)


def test_twice_the_data_leave_single_examples_as_they_are() -> None:
    jacobian = randn(6, 9)
    twice = torch.cat([jacobian, jacobian])
    for method in ("kron", "diag", "gram", "power"):
        wanted = mean_square_threshold(jacobian, 1, method=method)
        assert mean_square_threshold(twice, 1, method=method) == pytest.approx(wanted, rel=1e-5)


def test_the_gram_matrix_is_enough_and_its_null_space_does_not_count() -> None:
    for shape in [(9, 4), (4, 9), (5, 2, 3), (3, 2, 20)]:
        jacobian = randn(*shape)
        rows = jacobian.flatten(0, -2)
        point, other = (
            LinearStability(jacobian),
            LinearStability.of_gram(rows @ rows.mT, shape[1] if len(shape) > 2 else 1),
        )
        assert point.rank == other.rank
        for name in ("trace", "frobenius", "largest", "fourth_moment", "non_uniformity"):
            assert getattr(point, name) == pytest.approx(getattr(other, name), rel=1e-9)
        for batch_size in (1, 2):
            for method in ("kron", "gram", "power"):
                found = other.threshold(batch_size, method=method)
                assert found == pytest.approx(point.threshold(batch_size), rel=1e-5)
    with pytest.raises(ValueError, match="need the Jacobian"):
        _ = other.basis


def test_the_trace_from_lengths_is_the_sum_of_eigenvalues() -> None:
    jacobian = randn(20, 30)
    point = LinearStability(jacobian)
    assert point.trace == pytest.approx(float(jacobian.square().sum(1).mean()), rel=1e-12)
    assert point.trace == pytest.approx(float(torch.linalg.eigvalsh(jacobian @ jacobian.mT).sum()) / 20, rel=1e-10)
    assert point.trace == pytest.approx(float(point.eigenvalues.sum()), rel=1e-10)
    basis = point.basis
    assert torch.allclose(basis.mT @ basis, torch.eye(20, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(point.coordinates()[:, 0] @ basis.mT, jacobian, atol=1e-10)


@pytest.mark.parametrize("jacobian", [torch.zeros(1, 3), torch.zeros(4, 2), torch.zeros(2, 3, 4)])
def test_without_gradients_everything_is_stable(jacobian: torch.Tensor) -> None:
    point = LinearStability(jacobian)
    assert point.trace == point.frobenius == point.largest == point.non_uniformity == 0
    assert point.threshold(1) == point.threshold(None) == point.trace_bound(1) == point.sufficient(1) == math.inf
    assert point.frobenius_bound(1) == math.inf


def test_one_example() -> None:
    assert mean_square_threshold(torch.tensor([[3.0, 4.0]])) == pytest.approx(2 / 25, rel=1e-12)


def test_non_uniformity_is_the_spread_of_the_examples() -> None:
    jacobian = randn(6, 2, 4)
    blocks = torch.stack([j.mT @ j for j in jacobian])
    spread = (blocks @ blocks).mean(0) - blocks.mean(0) @ blocks.mean(0)
    wanted = float(torch.linalg.eigvalsh(spread)[-1]) ** 0.5
    assert LinearStability(jacobian).non_uniformity == pytest.approx(wanted, rel=1e-10)
    assert LinearStability(torch.ones(4, 3)).non_uniformity == pytest.approx(0, abs=1e-6)


def test_larger_batches_allow_more() -> None:
    point = LinearStability(randn(12, 20))
    found = [point.threshold(b) for b in (1, 2, 4, 8, 12)] + [point.threshold(None)]
    assert found == sorted(found)
    assert all(point.threshold(b, False) >= point.threshold(b) for b in (1, 2, 4, 8, 12))


def test_the_alignment_says_how_the_loss_grows() -> None:
    jacobian, e = randn(5, 8), randn(5, seed=3)
    point, lr = LinearStability(jacobian), 0.02
    g = jacobian.mT @ jacobian / 5
    gradient = jacobian.mT @ e / 5

    def loss(residuals: torch.Tensor) -> float:
        return float(residuals.square().mean()) / 2

    # With one example at a time the expected loss after a step is the mean over the examples.
    found = sum(loss(e - lr * e[i] * jacobian @ jacobian[i]) for i in range(5)) / 5
    noise = lr**2 * point.alignment(e) * float(g.norm()) ** 2 * loss(e)
    assert found == pytest.approx(loss(e - lr * jacobian @ gradient) + noise, rel=1e-12)
    assert found >= noise
    assert point.frobenius_bound(1, alignment=point.alignment(e)) == pytest.approx(
        1 / (math.sqrt(point.alignment(e)) * point.frobenius), rel=1e-12
    )


def test_thresholds_of_a_learning_rate() -> None:
    assert trace_threshold(0.1, 1.0) == pytest.approx(20)
    assert trace_threshold(0.1, noise_factor(10, 5), outputs=3) == pytest.approx(300)
    assert trace_threshold(0.1, 0.0) == frobenius_threshold(0.1, 0.0) == math.inf
    assert frobenius_threshold(0.1, 1 / 4, 0.5) == pytest.approx(math.sqrt(4 / 0.5) / 0.1)


def test_the_second_moment_is_the_map_of_the_definition() -> None:
    jacobian, lr, p = randn(4, 2, 5), 0.05, 1 / 3
    blocks = [j.mT @ j for j in jacobian]
    g = sum(blocks) / 4
    moment = SecondMoment(jacobian, lr, 3, start=torch.eye(5, dtype=torch.float64))
    m, eye = torch.eye(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    for _ in range(3):
        noise = sum(h @ m @ h for h in blocks) / 4 - g @ m @ g
        m = (eye - lr * g) @ m @ (eye - lr * g) + lr * lr * p * noise
        metrics = moment.step()
        assert torch.allclose(moment.moment, m, atol=1e-10)
        assert metrics["mean_square"] == pytest.approx(float(m.trace()), rel=1e-10)
        assert metrics["loss"] == pytest.approx(float((g @ m).trace()) / 2, rel=1e-10)


def test_growth_on_both_sides_of_the_threshold() -> None:
    point = LinearStability(torch.tensor([[1.0, 0, 0], [0, 2, 1], [1, 1, 0], [0.5, 0.2, 2]]))
    ends = {}
    for share in (0.98, 1.02):
        moment = SecondMoment(point, share * point.threshold())
        ends[share] = run(moment, steps=400, progress=False).last["mean_square"]
    assert point.rank == 3
    assert ends[0.98] < 1e-3
    assert ends[1.02] > 1e4


def test_second_moments_neither_overflow_nor_underflow() -> None:
    for lr, sign in ((0.1, -1), (5.0, 1)):
        moment = SecondMoment(2 * torch.eye(4), lr)
        for _ in range(2000):
            metrics = moment.step()
        assert math.isfinite(metrics["log_mean_square"])
        assert metrics["log_mean_square"] * sign > 100


def test_trajectories_have_the_second_moment() -> None:
    start = torch.tensor([1.0, -0.5], dtype=torch.float64)
    for batch in ((2, True), (2, False), (None, True)):
        walk = LinearisedSGD(
            SMALL, 0.3, batch[0], replacement=batch[1], trajectories=20_000, start=start, generator=torch.Generator()
        )
        moment = SecondMoment(SMALL, 0.3, batch[0], replacement=batch[1], start=start[:, None] * start)
        for _ in range(5):
            sampled, exact = walk.step(), moment.step()
        assert sampled["mean_square"] == pytest.approx(exact["mean_square"], rel=0.05)
        assert sampled["loss"] == pytest.approx(exact["loss"], rel=0.05)


def test_one_trajectory_by_hand() -> None:
    jacobian, start = randn(6, 2, 5), randn(5, seed=4)
    walk = LinearisedSGD(jacobian, 0.01, 3, start=start, generator=torch.Generator().manual_seed(5))
    index = torch.randint(6, (1, 3), generator=torch.Generator().manual_seed(5))[0]
    walk.step()
    wanted = start - 0.01 / 3 * sum(jacobian[i].mT @ (jacobian[i] @ start) for i in index)
    assert torch.allclose(walk.parameters()[0], wanted, atol=1e-12)


@pytest.mark.parametrize("kind", ["moment", "walk"])
def test_resume_is_exact(kind: str) -> None:
    def make() -> SecondMoment | LinearisedSGD:
        if kind == "moment":
            return SecondMoment(SMALL, 0.4, 2)
        return LinearisedSGD(SMALL, 0.4, 2, trajectories=3, generator=torch.Generator().manual_seed(1))

    one, other = make(), make()
    for _ in range(4):
        one.step()
    other.load_state_dict(one.state_dict())
    assert one.step() == other.step()
    with pytest.raises(ValueError, match="state must have the entries"):
        other.load_state_dict({**one.state_dict(), "mantissa": torch.eye(5), "deltas": torch.eye(5)})


@pytest.mark.parametrize("lr", [0, -1.0, math.nan, math.inf, True, "0.1"])
def test_a_bad_lr(lr: object) -> None:
    with pytest.raises(ValueError, match="lr must be a positive finite number"):
        SecondMoment(SMALL, lr)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [0, -1, 4])
@pytest.mark.parametrize("replacement", [True, False])
def test_a_bad_batch_size(batch_size: int, replacement: bool) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        mean_square_threshold(SMALL, batch_size, replacement)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        mean_square_threshold(SMALL[:1], 1, replacement=False)
    with pytest.raises(TypeError, match="batch_size must be an integer"):
        mean_square_threshold(SMALL, 1.5)  # type: ignore[arg-type]
    for empty in (torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="not empty"):
            LinearStability(empty)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="1 of its 4 entries"):
            LinearStability(torch.tensor([[1.0, bad], [0.0, 1.0]]))
    with pytest.raises(TypeError, match="complex"):
        LinearStability(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="got list"):
        LinearStability([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method must be one of"):
        mean_square_threshold(SMALL, method="lanczos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"diag" is for batch_size 1'):
        mean_square_threshold(SMALL, 2, method="diag")
    with pytest.raises(ValueError, match="rank up to 60, here it is 70"):
        mean_square_threshold(randn(70, 80), method="kron")
    with pytest.raises(RuntimeError, match="after 2 steps"):
        LinearStability(randn(30, 40)).threshold(1, method="gram", max_steps=2)
    with pytest.raises(ValueError, match="gram must be"):
        LinearStability.of_gram(torch.tensor([[1.0, 2.0], [-2.0, 1.0]]))
    with pytest.raises(ValueError, match="multiple of outputs = 2"):
        LinearStability.of_gram(torch.eye(3), outputs=2)
    for indefinite in ([[1.0, 2.0], [2.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]):
        with pytest.raises(ValueError, match="inner products"):
            LinearStability.of_gram(torch.tensor(indefinite))
    with pytest.raises(ValueError, match="residuals must be of shape"):
        LinearStability(SMALL).alignment(torch.ones(2))
    with pytest.raises(ValueError, match="not all zero"):
        LinearStability(SMALL).alignment(torch.zeros(3))
    with pytest.raises(ValueError, match="alignment must be"):
        LinearStability(SMALL).frobenius_bound(alignment=-1.0)
    with pytest.raises(ValueError, match="nothing moves"):
        SecondMoment(torch.zeros(2, 2), 0.1)
    with pytest.raises(ValueError, match="positive semidefinite"):
        SecondMoment(SMALL, 0.1, start=-torch.eye(2))


def test_half_precision_and_strided_input() -> None:
    jacobian = randn(5, 8).bfloat16()
    assert mean_square_threshold(jacobian) == pytest.approx(mean_square_threshold(jacobian.double()), rel=1e-12)
    assert mean_square_threshold(jacobian.double().mT.contiguous().mT) == mean_square_threshold(jacobian.double())
