"""Planted problems: gradients, closed forms of their averages over the sphere, oracles."""

import math

import pytest
import torch
from torch import Tensor

from steepest.geometry import sphere
from steepest.geometry.hermite import HermiteSeries, hermite
from steepest.inference import SingleIndex, TensorPCA, estimate_from_trace, overlap, symmetrise

DTYPE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 9) -> Tensor:
    return sphere.uniform(*shape, generator=seeded(seed), dtype=DTYPE)


def gradient(loss, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(theta).sum(), theta)
    return -found


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_the_tensor_has_its_drift_and_euler_identity(k: int) -> None:
    problem = TensorPCA(5, k, 3, seeded(k), dtype=DTYPE)
    theta = uniform(2, 4, 5)
    b = problem.neg_grad(theta)
    assert torch.allclose(b, gradient(problem.loss, theta), atol=1e-12)
    assert torch.allclose((theta * b).sum(-1), -k * problem.loss(theta), atol=1e-12)
    assert float((theta * sphere.tangent(theta, b)).sum(-1).abs().max()) < 1e-13
    letters = "ijklm"[:k]
    inner = torch.einsum(
        letters + "," + ",".join("b" + each for each in letters) + "->b", problem.tensor, *[theta[0]] * k
    )
    assert torch.allclose(problem.loss(theta[0]), -inner, atol=1e-12)


def test_points_of_any_layout_and_none_at_all() -> None:
    for problem in (TensorPCA(5, 3, 10, seeded()), SingleIndex(5, 3, 10, generator=seeded())):
        theta = torch.randn(5, 4, generator=seeded()).mT
        assert torch.allclose(problem.neg_grad(theta), problem.neg_grad(theta.contiguous()), atol=1e-5)
        assert problem.neg_grad(theta[0]).shape == (5,) and problem.loss(theta[0]).shape == ()
        assert problem.neg_grad(theta[:0]).shape == (0, 5) and problem.loss(theta[:0]).shape == (0,)


def test_only_the_symmetric_part_matters() -> None:
    raw = torch.randn(4, 4, 4, 4, dtype=DTYPE, generator=seeded())
    found = symmetrise(raw)
    for order in ((1, 0, 2, 3), (3, 1, 2, 0), (2, 3, 0, 1)):
        assert torch.allclose(found, found.permute(order), atol=1e-14)
    theta = uniform(3, 4)
    inner = torch.einsum("ijkl,bi,bj,bk,bl->b", raw, *[theta] * 4)
    assert torch.allclose(TensorPCA.of(raw).loss(theta), -inner, atol=1e-13)


def test_uniform_moments() -> None:
    d, n = 4, 400_000
    theta = sphere.uniform(n, d, generator=seeded(), dtype=DTYPE)
    three, four = (TensorPCA(d, k, 1, seeded(k), dtype=DTYPE, signal=0.0) for k in (3, 4))
    first = -(theta * three.loss(theta).unsqueeze(-1)).mean(0)
    assert torch.allclose(first, 3 * three.partial_trace() / (d * (d + 2)), atol=4e-3)
    second = -(theta.mT * four.loss(theta)) @ theta / n
    traced = four.partial_trace()
    exact = (3 * torch.eye(d).double() * traced.trace() + 12 * traced) / (d * (d + 2) * (d + 4))
    assert torch.allclose(second, exact, atol=4e-3)
    assert torch.allclose(traced, torch.einsum("abii->ab", four.tensor))
    assert torch.allclose(three.partial_trace(), torch.einsum("iia->a", three.tensor))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_averages_to_first_order_in_eps_of_tensors(k: int) -> None:
    # A rotation-symmetric law has the exact answer: T = v^k, for which theta.v alone matters.
    d, eps = 5, 1e-3
    problem = TensorPCA(d, k, math.inf, theta_star=uniform(d), dtype=DTYPE)
    u, w = sphere.coordinate_rule(d, 40)
    v = problem.theta_star
    found = problem.small_eps_average(eps)
    if k % 2:
        assert torch.allclose(found, 2 * eps * float(w @ u ** (k + 1)) * v, rtol=1e-12)
        return
    tilt = 2 * eps * (u**k - w @ u**k)
    along = float(w @ (u**2 * (1 + tilt)))
    across = float(w @ ((1 - u**2) * (1 + tilt))) / (d - 1)
    exact = across * torch.eye(d).double() + (along - across) * torch.outer(v, v)
    assert torch.allclose(found, exact, rtol=1e-10, atol=1e-14)


LINKS = {
    "h2": 2,
    "h3": 3,
    "h4": 4,
    "h5": 5,
    "mixed": HermiteSeries((0.3, 0.0, 0.0, 1.0, -0.5)),
    "tanh": torch.tanh,
    "softplus": torch.nn.functional.softplus,
}


@pytest.mark.parametrize("name", LINKS)
def test_the_single_index_drift(name: str) -> None:
    problem = SingleIndex(6, LINKS[name], 300, 0.1, seeded(), dtype=DTYPE)
    theta = uniform(2, 3, 6)
    b = problem.neg_grad(theta)
    assert torch.allclose(b, gradient(problem.loss, theta), atol=1e-11)
    index = torch.arange(300)
    one = theta[0, 0].expand(300, -1)
    by_hand = (problem.multiplier(one, index).unsqueeze(-1) * problem.x).mean(0)
    assert torch.allclose(by_hand, b[0, 0], atol=1e-12)


def test_the_single_index_over_many_samples_is_the_sum_over_its_parts() -> None:
    problem = SingleIndex(4, 3, 5000, generator=seeded(), dtype=DTYPE)
    theta = uniform(1000, 4)
    u = theta @ problem.x.mT
    assert torch.allclose(problem.loss(theta), -(hermite(3)(u) @ problem.y) / 5000, atol=1e-12)
    assert torch.allclose(problem.neg_grad(theta), 3**0.5 * (hermite(2)(u) * problem.y) @ problem.x / 5000, atol=1e-12)


def test_oracles_are_the_closed_forms() -> None:
    d = 7
    three, four = (SingleIndex(d, k, 200, generator=seeded(k), dtype=DTYPE) for k in (3, 4))
    weight = three.y * (three.x.square().sum(-1) / (d + 2) - 1)
    vector = weight @ three.x
    assert float(overlap(three.partial_trace(), vector)) == pytest.approx(1, abs=1e-12)
    weight = four.y * (four.x.square().sum(-1) / (d + 4) - 1)
    matrix = (four.x.mT * weight) @ four.x
    traced = four.partial_trace()
    assert torch.allclose(traced / traced.norm(), matrix / matrix.norm(), atol=1e-12)


@pytest.mark.parametrize("name", ["h3", "h4", "tanh", "softplus"])
def test_averages_to_first_order_in_eps_of_samples(name: str) -> None:
    problem = SingleIndex(4, LINKS[name], 20, 0.5, seeded(3), dtype=DTYPE)
    theta, eps = uniform(400_000, 4), 0.05
    tilt = 2 * eps * (-problem.loss(theta) + problem.loss(theta).mean())
    assert problem.exponent is not None
    first, second = (theta * tilt.unsqueeze(-1)).mean(0), (theta.mT * (1 + tilt)) @ theta / len(theta)
    exact = first if problem.exponent % 2 else second
    assert torch.allclose(problem.small_eps_average(eps), exact, atol=2e-3)


def test_oracles_find_the_direction() -> None:
    for problem in (
        TensorPCA(30, 3, 5 * 900, seeded()),
        TensorPCA(16, 4, 20 * 256, seeded()),
        SingleIndex(30, 3, 10 * 900, generator=seeded()),
        SingleIndex(12, 4, 60 * 144, generator=seeded()),
        SingleIndex(16, torch.relu, 2000, generator=seeded()),
    ):
        found = overlap(estimate_from_trace(problem.partial_trace()), problem.theta_star)
        assert float(found if problem.exponent in (1, 3) else found.abs()) > 0.8


def test_fresh_samples_and_other_labels() -> None:
    problem = SingleIndex(5, 3, 40, 0.2, seeded(), dtype=DTYPE)
    other = problem.fresh(70, seeded(1))
    assert torch.allclose(other.theta_star, problem.theta_star, atol=1e-15) and other.x.shape == (70, 5)
    silent = problem.relabelled(torch.zeros(40))
    assert torch.equal(silent.neg_grad(uniform(2, 5)), torch.zeros(2, 5).double())
    assert float(problem.y.abs().sum()) > 0
    with pytest.raises(ValueError, match="shape"):
        problem.relabelled(torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TensorPCA(5, 0, 10), ValueError, "k must"),
        (lambda: TensorPCA(5, 2.5, 10), ValueError, "k must"),  # type: ignore[arg-type]
        (lambda: TensorPCA(1, 3, 10), ValueError, "d must"),
        (lambda: TensorPCA(5, 3, 0), ValueError, "n must"),
        (lambda: TensorPCA(5, 3, math.nan), ValueError, "n must"),
        (lambda: TensorPCA(5, 3, 10, theta_star=torch.ones(4)), ValueError, "theta_star"),
        (lambda: TensorPCA(5, 3, 10, theta_star=torch.zeros(5)), ValueError, "not zero"),
        (lambda: TensorPCA.of(torch.ones(3, 4)), ValueError, "tensor must"),
        (lambda: SingleIndex(5, 0, 10), ValueError, "link"),
        (lambda: SingleIndex(5, 1.5, 10), ValueError, "link"),
        (lambda: SingleIndex(5, "h3", 10), TypeError, "link"),  # type: ignore[arg-type]
        (lambda: SingleIndex(5, 3, 0), ValueError, "n must"),
        (lambda: SingleIndex(1, 3, 5), ValueError, "d must"),
        (lambda: SingleIndex(5, 3, 5, noise=-1.0), ValueError, "noise"),
        (lambda: TensorPCA(5, 3, 10).neg_grad(torch.ones(4)), ValueError, "theta must"),
        (lambda: SingleIndex(5, 3, 10).loss(torch.ones(2, 4)), ValueError, "theta must"),
        (lambda: SingleIndex(5, torch.ones_like, 10).partial_trace(), ValueError, "depend"),
    ],
)
def test_wrong_input(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
