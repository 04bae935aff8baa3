"""Gauss-Newton and Fisher matrices against explicit sums."""

import pytest
import torch
import torch.nn.functional as F
from curvature_models import (
    classifier,
    explicit_hessian,
    flat_function,
    generator,
    language_model,
    snapshot,
    token_loss,
    unchanged,
)
from torch import Tensor, nn

from steepest.curvature import Fisher, GaussNewton, Hessian

TIGHT = {"rtol": 1e-10, "atol": 1e-13}


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    of, at = flat_function(model, lambda output: output.flatten(), x)
    return torch.autograd.functional.jacobian(of, at)


@pytest.mark.parametrize("chunk", [None, 3])
def test_gauss_newton_and_exact_fisher_of_a_classifier(chunk: int | None) -> None:
    model, (x, y) = classifier()
    J = jacobian(model, x).view(11, 3, -1)
    p = model(x).softmax(-1).detach()
    expected = sum(J[i].T @ (torch.diag(p[i]) - torch.outer(p[i], p[i])) @ J[i] for i in range(11)) / 11
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    G = GaussNewton(model, F.cross_entropy, parts, chunk=chunk)
    torch.testing.assert_close(G.dense(), expected, **TIGHT)
    torch.testing.assert_close(Fisher(model, F.cross_entropy, parts, chunk=chunk).dense(), expected, **TIGHT)
    H = Hessian(model, F.cross_entropy, parts)
    torch.testing.assert_close(G.gradient(), H.gradient(), **TIGHT)
    torch.testing.assert_close(G.loss(), H.loss(), **TIGHT)


def test_gauss_newton_of_a_linear_model_is_the_hessian() -> None:
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 4, generator=generator()).double(), torch.randn(5, 3, generator=generator(1)).double()
    G = GaussNewton(model, F.mse_loss, (x, y))
    torch.testing.assert_close(G.dense(), explicit_hessian(model, F.mse_loss, (x, y)), **TIGHT)
    gaussian = Fisher(model, F.mse_loss, (x, y), likelihood="gaussian").dense()
    torch.testing.assert_close(gaussian * 2 / 3, G.dense(), **TIGHT)


def test_attention_and_several_vectors() -> None:
    model, batch = language_model(tied=True)
    J = jacobian(model, batch[0])
    p = model(batch[0]).flatten(0, 1).softmax(-1).detach()
    middle = torch.block_diag(*[torch.diag(row) - torch.outer(row, row) for row in p]) / len(p)
    V = torch.randn(J.shape[1], 3, dtype=torch.float64, generator=generator())
    for operator in (GaussNewton(model, token_loss, batch), Fisher(model, token_loss, batch)):
        torch.testing.assert_close(operator @ V, J.T @ (middle @ (J @ V)), **TIGHT)
        torch.testing.assert_close(torch.stack([operator @ v for v in V.T], 1), operator @ V, **TIGHT)


def test_empirical_fisher_is_the_second_moment_of_gradients() -> None:
    model, (x, y) = classifier()
    of = [flat_function(model, lambda o, i=i: F.cross_entropy(o, y[i : i + 1]), x[i : i + 1]) for i in range(11)]
    gradients = torch.stack([torch.func.grad(f)(at) for f, at in of])
    found = Fisher(model, F.cross_entropy, [(x[:3], y[:3]), (x[3:], y[3:])], kind="empirical")
    torch.testing.assert_close(found.dense(), gradients.T @ gradients / 11, **TIGHT)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_sampled_fisher_tends_to_the_exact_one(likelihood) -> None:
    model, batch = classifier()
    exact = Fisher(model, F.cross_entropy, batch, likelihood=likelihood).dense()
    options = {"kind": "mc", "likelihood": likelihood}
    errors = []
    for samples in (100, 10_000):
        found = Fisher(model, F.cross_entropy, batch, samples=samples, seed=1, **options)
        V = torch.ones(51, 2, dtype=torch.float64)
        torch.testing.assert_close(found @ V, found @ V, rtol=0, atol=0)
        errors.append(float((found.dense() - exact).norm() / exact.norm()))
    assert errors[1] < 0.05 < 3 * errors[0] and errors[1] < errors[0] / 4


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3, generator=generator()).double(), torch.arange(7) % 2
    before, state = snapshot(model), torch.get_rng_state()
    for train in (False, True):
        G = GaussNewton(model, F.cross_entropy, (x, y), train=train)
        v = torch.ones(G.shape[0], dtype=torch.float64)
        torch.testing.assert_close(G @ v, G @ v, rtol=0, atol=0)
    assert unchanged(model, before) and torch.equal(torch.get_rng_state(), state) and model.training


def test_frozen_and_unused_parameters() -> None:
    model, (x, y) = classifier()
    full = GaussNewton(model, F.cross_entropy, (x, y)).dense()
    model.layers[0].requires_grad_(False)
    part = GaussNewton(model, F.cross_entropy, (x, y)).dense()
    torch.testing.assert_close(part, full[-21:, -21:], **TIGHT)
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    unused = GaussNewton(model, F.cross_entropy, (x, y)).dense()
    rows = [i for name in names for i in [name == "extra"] * dict(model.named_parameters())[name].numel()]
    keep = ~torch.tensor(rows)
    torch.testing.assert_close(unused[keep][:, keep], part, **TIGHT)
    assert not unused[~keep].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "true"}, "kind"), ({"likelihood": "poisson"}, "likelihood"), ({"samples": 0}, "samples")],
)
def test_bad_options(options: dict, message: str) -> None:
    model, batch = classifier()
    with pytest.raises(ValueError, match=message):
        Fisher(model, F.cross_entropy, batch, **options)


def test_bad_points() -> None:
    model, (x, y) = classifier()
    v = torch.ones(51, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="not finite"):
        GaussNewton(model, F.cross_entropy, (x / 0, y)) @ v
    with pytest.raises(ValueError, match="scalar"):
        GaussNewton(model, lambda o, t: o, (x, y)) @ v
    with pytest.raises(ValueError, match="chunk"):
        GaussNewton(model, F.cross_entropy, (x, y), chunk=0)
