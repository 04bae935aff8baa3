import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.inference import (
    DiagonalVI,
    FullCovarianceVI,
    GaussianMixture,
    IsotropicMixture,
    MeanFieldMixture,
    MeanFieldVI,
    MixtureVI,
    RootDecay,
    gauss_hermite,
    variational,
)
from steepest.inference.estimators import check_generator
from steepest.inference.variances import VARIANCES

F64 = torch.float64
PRECISION = torch.tensor([1.0, 0.25], dtype=F64)
TARGET = GaussianMixture(
    torch.tensor([[0.0, 0.0], [3.0, 1.0], [-2.0, 2.5]], dtype=F64),
    torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[0.6, -0.2], [-0.2, 0.9]], [[0.4, 0.0], [0.0, 1.2]]], dtype=F64),
    torch.tensor([0.5, 0.3, 0.2], dtype=F64),
)
START = IsotropicMixture(
    torch.tensor([[0.5, -0.5], [2.0, 1.0], [-1.0, 2.0]], dtype=F64), torch.tensor([0.8, 1.1, 0.6], dtype=F64)
)
STEPS = {  # after one step with lr 0.1
    "bures": (0.714267, 1.060462, 0.740166),
    "bures_implicit": (0.718624, 1.061160, 0.758639),
    "mirror": (0.757112, 1.080230, 0.670223),
    "natural": (0.766224, 1.078484, 0.642679),
}
MEANS = ((0.417250, -0.387211), (2.054243, 0.995864), (-1.132971, 1.964808))
NATURAL_MEANS = ((0.436595, -0.413578), (2.058501, 0.995539), (-1.085458, 1.977383))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pull(x: Tensor) -> Tensor:
    return -x * PRECISION.to(x)


def plain_step(m: Tensor, eps: Tensor, z: Tensor, lr: float) -> tuple[Tensor, Tensor, float]:
    """IBW on TARGET with all differences written out, gradients by autograd."""
    n, b, d = z.shape
    x = (m[:, None] + eps.sqrt()[:, None, None] * z).reshape(-1, d).requires_grad_()
    parts = torch.distributions.Independent(torch.distributions.Normal(m, eps.sqrt()[:, None].expand(n, d)), 1)
    q = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(n, dtype=F64)), parts)
    value = q.log_prob(x) - TARGET.log_prob(x)
    (g,) = torch.autograd.grad(value.sum(), x)
    g = g.view(n, b, d)
    g_eps = ((x.detach().view(n, b, d) - m[:, None]) * g).sum(-1).mean(1) / (2 * eps)
    u = (2 * lr / d * g_eps).clamp(-0.5, 0.5)
    return m - lr * g.mean(1), (1 - u) ** 2 * eps, float(value.detach().mean())


@pytest.mark.parametrize(
    ("variance", "expected"),
    {
        "bures": 0.646953125,
        "bures_implicit": 0.5 / 0.8625**2,
        "mirror": 0.573701,
        "natural": 0.536913,
        "fixed": 0.5,
    }.items(),
)
def test_one_gaussian_by_cubature(variance, expected: float) -> None:
    start = IsotropicMixture(torch.zeros(1, 2, dtype=F64), 0.5)
    vi = MixtureVI(None, start, score=pull, lr=0.1, variance=variance, estimator="cubature")
    vi.step()
    assert float(vi.variances) == pytest.approx(expected, abs=1e-6 if variance != "bures" else 1e-12)


def test_the_fixed_point_of_one_gaussian() -> None:
    target = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), torch.diag(1 / PRECISION))
    for variance in ("bures", "bures_implicit", "mirror", "natural"):
        start = IsotropicMixture(torch.ones(1, 2, dtype=F64), 0.5)
        vi = MixtureVI(target.log_prob, start, lr=0.5, variance=variance, estimator="cubature")
        for _ in range(300):
            metrics = vi.step()
        assert float(vi.variances) == pytest.approx(1.6, abs=1e-12)
        torch.testing.assert_close(vi.means, torch.zeros(1, 2, dtype=F64), atol=1e-12, rtol=0)
        assert float(metrics["grad_norm"]) < 1e-12
    assert 0.5 * (1.6 * 1.25 - 2 + math.log(4) - 2 * math.log(1.6)) == pytest.approx(0.2231436, abs=1e-7)


@pytest.mark.parametrize(("variance", "expected"), STEPS.items())
def test_the_worked_example(variance, expected: tuple[float, ...]) -> None:
    vi = MixtureVI(TARGET.log_prob, START, lr=0.1, variance=variance, estimator="gauss_hermite", samples=200)
    metrics = vi.step()
    assert float(metrics["kl"]) == pytest.approx(0.734391, abs=1e-6)
    torch.testing.assert_close(vi.variances, torch.tensor(expected, dtype=F64), atol=1.1e-6, rtol=0)
    means = torch.tensor(NATURAL_MEANS if variance == "natural" else MEANS, dtype=F64)
    torch.testing.assert_close(vi.means, means, atol=1.1e-6, rtol=0)


def test_gradients_are_those_of_the_divergence() -> None:
    """Finite differences of F on the same frozen nodes would differ; by quadrature they agree."""
    z, w = gauss_hermite(100, 2)

    def divergence(m: Tensor, eps: Tensor) -> float:
        q = IsotropicMixture(m, eps)
        x = m[:, None] + eps.sqrt()[:, None, None] * z
        return float(((q.log_prob(x) - TARGET.log_prob(x)) @ w).mean())

    lr, h, n = 1e-3, 1e-4, 3
    vi = MixtureVI(TARGET.log_prob, START, lr=lr, variance="mirror", estimator="gauss_hermite", samples=100)
    vi.step()
    grad_m = (START.means - vi.means) / lr / n
    grad_eps = -(vi.variances / START.variances).log() / lr / n  # = 2 / d dF/deps
    for i in range(n):
        for j in range(2):
            change = torch.zeros(n, 2, dtype=F64)
            change[i, j] = h
            slope = divergence(START.means + change, START.variances) - divergence(
                START.means - change, START.variances
            )
            assert float(grad_m[i, j]) == pytest.approx(slope / (2 * h), abs=1e-5)
        change = torch.zeros(n, dtype=F64)
        change[i] = h
        slope = divergence(START.means, START.variances + change) - divergence(START.means, START.variances - change)
        assert float(grad_eps[i]) == pytest.approx(slope / (2 * h), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 5), b=st.integers(1, 4), block=st.integers(1, 200))
def test_a_step_is_that_of_the_formula(seed: int, n: int, b: int, block: int) -> None:
    m, eps, z = 2 * randn(n, 2, seed=seed), randn(n, seed=seed + 1).exp(), randn(n, b, 2, seed=seed + 2)
    wanted = plain_step(m, eps, z, 0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variational, "BLOCK", block)
        vi = MixtureVI(TARGET.log_prob, IsotropicMixture(m, eps), lr=0.05, estimator=z)
        metrics = vi.step()
    torch.testing.assert_close(vi.means, wanted[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(vi.variances, wanted[1], rtol=1e-7, atol=1e-9)
    assert float(metrics["kl"]) == pytest.approx(wanted[2], rel=1e-7, abs=1e-8)


def test_identical_components_move_as_one() -> None:
    for variance in VARIANCES:
        one = MixtureVI(
            TARGET.log_prob, IsotropicMixture(torch.ones(1, 2, dtype=F64), 0.5), lr=0.05, variance=variance,
            estimator="common", generator=seeded(),
        )  # fmt: skip
        many = MixtureVI(
            TARGET.log_prob, IsotropicMixture(torch.ones(4, 2, dtype=F64), 0.5), lr=0.05, variance=variance,
            estimator="common", generator=seeded(),
        )  # fmt: skip
        for _ in range(20):
            one.step()
            many.step()
        torch.testing.assert_close(many.means, one.means.expand(4, 2))
        torch.testing.assert_close(many.variances, one.variances.expand(4))


@pytest.mark.parametrize("make", [MixtureVI, DiagonalVI, FullCovarianceVI])
def test_the_target_itself_is_a_fixed_point_for_any_draw(make) -> None:
    for score in (None, START.score):
        vi = make(START.log_prob, START, score=score, lr=0.1, samples=1, generator=seeded())
        metrics = vi.step()
        torch.testing.assert_close(vi.means, START.means, atol=1e-12, rtol=0)
        q = vi.mixture
        found = q.variances if isinstance(q, IsotropicMixture) else q.covariances
        wanted = GaussianMixture(START.means, START.variances).covariances
        torch.testing.assert_close(found, START.variances if found.ndim == 1 else wanted, atol=1e-12, rtol=0)
        assert float(metrics["grad_norm"]) < 1e-10
        assert abs(float(metrics["kl"])) < 1e-12


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-1e3, 1e3))
def test_permutation_translation_and_rotation(seed: int, shift: float) -> None:
    z, order = randn(3, 5, 2, seed=seed), torch.randperm(3, generator=seeded(seed))
    base = MixtureVI(TARGET.log_prob, START, lr=0.1, estimator=z)
    base.step()

    permuted = MixtureVI(
        TARGET.log_prob, IsotropicMixture(START.means[order], START.variances[order]), lr=0.1, estimator=z[order]
    )
    permuted.step()
    torch.testing.assert_close(permuted.means, base.means[order])
    torch.testing.assert_close(permuted.variances, base.variances[order])

    moved = MixtureVI(
        lambda x: TARGET.log_prob(x - shift), IsotropicMixture(START.means + shift, START.variances), lr=0.1,
        estimator=z,
    )  # fmt: skip
    moved.step()
    torch.testing.assert_close(moved.means - shift, base.means, atol=1e-9, rtol=0)
    torch.testing.assert_close(moved.variances, base.variances, atol=1e-9, rtol=0)

    turn = torch.linalg.qr(randn(2, 2, seed=seed + 1)).Q
    turned = MixtureVI(
        lambda x: TARGET.log_prob(x @ turn), IsotropicMixture(START.means @ turn.mT, START.variances), lr=0.1,
        estimator=z @ turn.mT,
    )  # fmt: skip
    turned.step()
    torch.testing.assert_close(turned.means, base.means @ turn.mT)
    torch.testing.assert_close(turned.variances, base.variances)


def test_full_covariances_restricted_to_multiples_of_the_identity_are_the_bures_step() -> None:
    start = IsotropicMixture(torch.ones(1, 3, dtype=F64), 0.5)
    options: dict[str, Any] = {"score": lambda x: -2 * x, "lr": 0.05, "estimator": "cubature"}
    iso, full = MixtureVI(None, start, **options), FullCovarianceVI(None, start, **options)
    for _ in range(10):
        iso.step()
        full.step()
    torch.testing.assert_close(full.means, iso.means)
    torch.testing.assert_close(full.covariances, iso.variances * torch.eye(3, dtype=F64)[None])
    # For any target, tr H / d = 2 / d dF/deps.
    z = randn(3, 6, 2)
    iso = MixtureVI(TARGET.log_prob, START, lr=1e-3, estimator=z)
    full = FullCovarianceVI(TARGET.log_prob, START, lr=1e-3, estimator=z)
    iso.step()
    full.step()
    torch.testing.assert_close(full.means, iso.means)
    wanted = iso.variances - START.variances
    found = full.covariances.diagonal(dim1=1, dim2=2).mean(1) - START.variances
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-5)


def test_full_and_diagonal_covariances_reach_a_gaussian_target() -> None:
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=F64)
    target = GaussianMixture(torch.ones(1, 2, dtype=F64), covariance[None])
    start = IsotropicMixture(torch.zeros(1, 2, dtype=F64), 0.5)
    full = FullCovarianceVI(target.log_prob, start, lr=0.3, estimator="gauss_hermite", samples=4)
    diagonal = DiagonalVI(target.log_prob, start, lr=0.3, estimator="gauss_hermite", samples=4)
    for _ in range(300):
        metrics = full.step()
        diagonal.step()
    torch.testing.assert_close(full.covariances[0], covariance)
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(diagonal.variances[0], 1 / torch.linalg.inv(covariance).diagonal())
    torch.testing.assert_close(diagonal.means, torch.ones(1, 2, dtype=F64))


def test_one_coordinate_makes_diagonal_and_isotropic_the_same() -> None:
    target, z = GaussianMixture(randn(3, 1), torch.ones(3, dtype=F64)), randn(4, 5, 1, seed=1)
    start = IsotropicMixture(randn(4, 1, seed=2), 0.3)
    for variance in VARIANCES:
        one = MixtureVI(target.log_prob, start, lr=0.1, variance=variance, estimator=z)
        other = DiagonalVI(target.log_prob, start, lr=0.1, variance=variance, estimator=z)
        first, second = one.step(), other.step()
        torch.testing.assert_close(one.means, other.means)
        torch.testing.assert_close(one.variances[:, None], other.variances)
        assert float(first["grad_norm"]) == pytest.approx(float(second["grad_norm"]))


def test_single_precision_agrees() -> None:
    vi = MixtureVI(TARGET.log_prob, START, lr=0.1, estimator="gauss_hermite", samples=30)
    small_target = GaussianMixture(TARGET.means.float(), TARGET.covariances.float(), TARGET.weights.float())
    small = MixtureVI(small_target.log_prob, START.to(torch.float32), lr=0.1, estimator="gauss_hermite", samples=30)
    vi.step()
    small.step()
    torch.testing.assert_close(small.means.double(), vi.means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.variances.double(), vi.variances, rtol=1e-4, atol=0)


def test_shared_variances_move_by_the_mean() -> None:
    start = IsotropicMixture(START.means, 0.5)
    z = randn(3, 7, 2)
    own = MixtureVI(TARGET.log_prob, start, lr=0.01, variance="mirror", estimator=z)
    shared = MixtureVI(TARGET.log_prob, start, lr=0.01, variance="mirror", estimator=z, shared=True)
    own.step()
    shared.step()
    torch.testing.assert_close(shared.variances.log(), own.variances.log().mean().expand(3))
    with pytest.raises(ValueError, match="equal"):
        MixtureVI(TARGET.log_prob, START, shared=True)


def test_mirror_moves_at_half_the_speed() -> None:
    z = randn(3, 7, 2)
    moves = {}
    for variance in ("bures", "bures_implicit", "mirror"):
        vi = MixtureVI(TARGET.log_prob, START, lr=1e-6, variance=variance, estimator=z)
        vi.step()
        moves[variance] = vi.variances - START.variances
    torch.testing.assert_close(moves["bures"], 2 * moves["mirror"], rtol=1e-4, atol=0)
    torch.testing.assert_close(moves["bures"], moves["bures_implicit"], rtol=1e-4, atol=0)


def test_caps() -> None:
    """The score -x / s of a narrow Gaussian makes u large and positive, that of a wide one negative."""
    start = IsotropicMixture(torch.zeros(1, 2, dtype=F64), 1.0)
    after = {}
    for variance in ("bures", "bures_implicit", "mirror", "natural"):
        for sign, score in (("narrow", lambda x: -100 * x), ("wide", lambda x: 0 * x)):
            vi = MixtureVI(None, start, score=score, lr=2.0, variance=variance, estimator="cubature", max_step=0.5)
            assert float(vi.step()["capped"]) == (1 if (variance, sign) != ("bures_implicit", "narrow") else 0)
            after[variance, sign] = float(vi.variances)
    assert after["bures", "narrow"] == pytest.approx(0.25)
    assert after["bures", "wide"] == pytest.approx(2.25)
    assert after["bures_implicit", "narrow"] == pytest.approx(1 / 199**2)
    assert after["bures_implicit", "wide"] == pytest.approx(4)
    assert after["mirror", "narrow"] == pytest.approx(math.exp(-0.5))
    assert after["natural", "narrow"] == pytest.approx(1 / 1.5)
    assert after["natural", "wide"] == pytest.approx(2)


def test_a_variance_never_becomes_zero() -> None:
    start = IsotropicMixture(torch.zeros(1, 4, dtype=F64), 1.0)
    options: dict[str, Any] = {"score": lambda x: -2 * x, "lr": 1.0, "estimator": "cubature"}  # u = 1 exactly
    vi = MixtureVI(None, start, **options)
    vi.step()
    assert float(vi.variances) == pytest.approx(0.25)
    vi = MixtureVI(None, start, **options, max_step=math.inf)
    with pytest.raises(RuntimeError, match="variance zero"):
        vi.step()
    assert float(vi.variances) == 1
    assert vi.steps == 0


def test_natural_gradients_can_leave_the_domain() -> None:
    vi = MixtureVI(
        None, IsotropicMixture(torch.zeros(1, 2, dtype=F64), 0.5), score=lambda x: x, lr=2.0, variance="natural",
        estimator="cubature",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"smaller lr.*mirror"):
        vi.step()
    assert float(vi.variances) == 0.5


def test_frozen_noise_descends_a_fixed_objective_and_schedules_count_steps() -> None:
    vi = MixtureVI(TARGET.log_prob, START, lr=RootDecay(0.05, 100), estimator="frozen", samples=50, generator=seeded())
    kl = vi.run(100, progress=False).history["kl"]
    assert all(after < before + 1e-4 for before, after in pairwise(kl))
    assert kl[-1] < 0.5 * kl[0]


def test_the_run_finds_both_modes_and_the_bound() -> None:
    modes = torch.tensor([[-4.0, 0.0], [4.0, 0.0]], dtype=F64)
    target = IsotropicMixture(modes, 0.5)
    log_z = 3.0
    start = IsotropicMixture(torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=F64), 2.0)
    vi = MixtureVI(lambda x: target.log_prob(x) + log_z, start, lr=0.1, generator=seeded())
    vi.run(600, progress=False)
    torch.testing.assert_close(vi.means[vi.means[:, 0].argsort()], modes, atol=0.3, rtol=0)
    value, error = vi.elbo(4000)
    assert value <= log_z + 3 * error
    assert value > log_z - 0.05
    before = vi.state_dict()["generator"]
    vi.elbo(100)
    assert torch.equal(before, vi.state_dict()["generator"])


def test_score_alone_takes_the_same_steps() -> None:
    runs = [
        MixtureVI(log_prob, START, score=score, generator=seeded())
        for log_prob, score in ((TARGET.log_prob, None), (None, TARGET.score), (TARGET.log_prob, TARGET.score))
    ]
    metrics = [run.step() for run in runs]
    for other in runs[1:]:
        torch.testing.assert_close(other.means, runs[0].means)
    assert "kl" not in metrics[1]
    assert float(metrics[0]["kl"]) == pytest.approx(float(metrics[2]["kl"]))
    with pytest.raises(ValueError, match="score alone"):
        runs[1].elbo()


def test_check_score() -> None:
    MixtureVI(TARGET.log_prob, START, score=TARGET.score, check_score=True)
    small = IsotropicMixture(START.means.float(), START.variances.float())
    target = GaussianMixture(TARGET.means.float(), TARGET.covariances.float(), TARGET.weights.float())
    MixtureVI(target.log_prob, small, score=target.score, check_score=True)
    with pytest.raises(ValueError, match="sign is wrong"):
        MixtureVI(target.log_prob, small, score=lambda x: -target.score(x), check_score=True)
    with pytest.raises(ValueError, match="sign is wrong"):
        MixtureVI(TARGET.log_prob, START, score=lambda x: -TARGET.score(x), check_score=True)
    with pytest.raises(ValueError, match="disagrees with log_prob"):
        MixtureVI(TARGET.log_prob, START, score=lambda x: TARGET.score(x) + 1, check_score=True)
    with pytest.raises(ValueError, match="give both"):
        MixtureVI(TARGET.log_prob, START, check_score=True)


def test_targets_that_fail_are_named_and_change_nothing() -> None:
    def poisoned(x: Tensor) -> Tensor:
        found = TARGET.score(x)
        found[13] = torch.nan  # with 10 draws, component 1
        return found

    vi = MixtureVI(None, START, score=poisoned, generator=seeded())
    state = vi.state_dict()
    with pytest.raises(RuntimeError, match="step 0, at draws of component 1;"):
        vi.step()
    assert all(torch.equal(state[name], vi.state_dict()[name]) for name in ("means", "variances", "generator"))

    vi = MixtureVI(None, START, score=poisoned, generator=seeded(), nonfinite="skip")
    metrics = vi.step()
    assert vi.skipped == 1
    assert torch.equal(vi.means[1], START.means[1])
    assert not torch.equal(vi.means[0], START.means[0])
    assert math.isfinite(metrics["grad_norm"])

    vi = MixtureVI(None, START, score=lambda x: x * torch.nan, nonfinite="skip")
    with pytest.raises(RuntimeError, match="components 0, 1, 2"):
        vi.step()
    bounded = MixtureVI(lambda x: x.log().sum(-1), START, generator=seeded())
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        bounded.step()
    for wrong in (lambda x: x[:, :1], lambda x: x[0]):
        with pytest.raises(RuntimeError, match="at step 0: score must return shape"):
            MixtureVI(None, START, score=wrong).step()
    with pytest.raises(RuntimeError, match="vmap"):
        MixtureVI(lambda x: -(x**2).sum(), START).step()
    with pytest.raises(RuntimeError, match="does not depend on x"):
        MixtureVI(lambda x: torch.zeros(len(x), dtype=F64), START).step()
    with pytest.raises(TypeError, match="complex64"):
        MixtureVI(None, START, score=lambda x: x.to(torch.complex64)).step()
    with pytest.raises(TypeError, match="score must return"):
        MixtureVI(None, START, score=lambda x: x.numpy()).step()  # type: ignore[arg-type]


def test_it_works_inside_inference_mode_and_with_tensors_that_are_not_contiguous() -> None:
    plain = MixtureVI(TARGET.log_prob, START, generator=seeded())
    plain.step()
    with torch.inference_mode():
        inside = MixtureVI(TARGET.log_prob, IsotropicMixture(START.means * 1, START.variances), generator=seeded())
        inside.step()
    assert torch.equal(plain.means, inside.means)
    wide = torch.zeros(2, 6, dtype=F64)
    wide[:, ::2] = START.means.mT
    strided = MixtureVI(TARGET.log_prob, IsotropicMixture(wide[:, ::2].mT, START.variances), generator=seeded())
    strided.step()
    assert torch.equal(plain.means, strided.means)


def test_parameters_of_the_target_get_no_gradient() -> None:
    scale = torch.nn.Parameter(torch.ones((), dtype=F64))
    MixtureVI(lambda x: -scale * (x**2).sum(-1), START).step()
    assert scale.grad is None


def test_memory_grows_with_blocks_and_not_with_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    n, b, d = 50, 10, 100
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.untyped_storage().nbytes() // found.element_size())
            return found

    vi = MixtureVI(None, IsotropicMixture(randn(n, d), 1.0), score=lambda x: -x, generator=seeded())
    with Watch():
        vi.step()
    assert 0 < largest <= n * n * d < n * b * n * d
    monkeypatch.setattr(variational, "BLOCK", 50_000)
    largest = 0
    with Watch():
        vi.step()
    assert largest <= 50_000


def test_mean_fields_on_one_coordinate_are_mixtures() -> None:
    """Both are unbiased estimates of one gradient: the averages over many draws agree."""
    target = GaussianMixture(torch.tensor([[-2.0], [1.0]], dtype=F64), torch.tensor([0.5, 1.0], dtype=F64))
    m, eps = torch.tensor([[-1.0], [0.0], [2.0]], dtype=F64), torch.tensor([0.5, 1.0, 0.7], dtype=F64)
    exact = MixtureVI(target.log_prob, IsotropicMixture(m, eps), lr=0.1, estimator="gauss_hermite", samples=60)
    table = MeanFieldMixture(m, eps[:, None])
    field = MeanFieldVI(target.log_prob, table, lr=0.1, samples=40_000, generator=seeded())
    wanted, found = exact.step(), field.step()
    torch.testing.assert_close(field.means, exact.means, atol=2e-3, rtol=0)
    torch.testing.assert_close(field.variances[:, 0], exact.variances, atol=2e-3, rtol=0)
    assert float(found["kl"]) == pytest.approx(float(wanted["kl"]), abs=0.02)
    assert float(found["grad_norm"]) == pytest.approx(float(wanted["grad_norm"]), abs=0.02)


def test_mean_fields_split_over_independent_coordinates() -> None:
    """On a product target each coordinate fits its own factor."""
    factors = [
        GaussianMixture(torch.tensor([[-3.0], [3.0]], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)),
        GaussianMixture(torch.tensor([[1.0]], dtype=F64), torch.tensor([2.0], dtype=F64)),
    ]

    def log_prob(x: Tensor) -> Tensor:
        return factors[0].log_prob(x[:, :1]) + factors[1].log_prob(x[:, 1:])

    start = MeanFieldMixture(torch.tensor([[-1.0, -1.0], [1.0, 2.0]], dtype=F64), 1.0)
    field = MeanFieldVI(log_prob, start, lr=RootDecay(0.2, 600), samples=20, generator=seeded())
    field.run(600, progress=False)
    torch.testing.assert_close(field.means[:, 0], torch.tensor([-3.0, 3.0], dtype=F64), atol=0.1, rtol=0)
    torch.testing.assert_close(field.mixture.mean[1], torch.tensor(1.0, dtype=F64), atol=0.1, rtol=0)
    assert field.elbo(4000, generator=seeded()).value > -0.05


def test_a_shared_mean_field_moves_by_the_mean_over_coordinates() -> None:
    precision = torch.tensor([1.0, 2.0, 6.0], dtype=F64)
    start = MeanFieldMixture(torch.zeros(1, 1, dtype=F64), 1.0, 3)
    field = MeanFieldVI(
        None, start, score=lambda x: -x * precision, lr=RootDecay(0.1, 800), samples=50, generator=seeded()
    )
    field.run(800, progress=False)
    assert field.means.shape == (1, 1)
    assert float(field.variances) == pytest.approx(1 / 3, rel=0.02)
    with pytest.raises(ValueError, match="score alone"):
        field.elbo()


def test_bad_arguments() -> None:
    f = TARGET.log_prob
    for lr in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr"):
            MixtureVI(f, START, lr=lr)
        with pytest.raises(ValueError, match="lr"):
            MixtureVI(f, START, lr=lambda _, lr=lr: lr).step()
    with pytest.raises(ValueError, match="bures, bures_implicit, mirror, natural, fixed"):
        MixtureVI(f, START, variance="newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples"):
        MixtureVI(f, START, samples=0)
    with pytest.raises(ValueError, match="even"):
        MixtureVI(f, START, samples=3, estimator="antithetic")
    with pytest.raises(ValueError, match="estimator must be one of fresh"):
        MixtureVI(f, START, estimator="sobol")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3, B, 2\), got \(4, 5, 2\)"):
        MixtureVI(f, START, estimator=torch.zeros(4, 5, 2))
    with pytest.raises(ValueError, match="at most 3"):
        MixtureVI(None, IsotropicMixture(torch.zeros(1, 4), 1.0), score=lambda x: -x, estimator="gauss_hermite")
    for cap in (0, -1.0, math.nan, "big"):
        with pytest.raises(ValueError, match="max_step"):
            MixtureVI(f, START, max_step=cap)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonfinite"):
        MixtureVI(f, START, nonfinite="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        MixtureVI(None, START)
    with pytest.raises(TypeError, match="log_prob must be a function"):
        MixtureVI(START, START)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="IsotropicMixture"):
        MixtureVI(f, TARGET)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generator"):
        MixtureVI(f, START, generator=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator must be on meta"):
        check_generator(seeded(), torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="equal weights"):
        FullCovarianceVI(f, TARGET)
    with pytest.raises(ValueError, match="shape of means"):
        DiagonalVI(f, START.means, START.variances)
    with pytest.raises(ValueError, match="steps"):
        RootDecay(0.1, 0)
