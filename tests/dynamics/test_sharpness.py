from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.curvature import Eigenpairs, Hessian, MatrixOperator
from steepest.dynamics import (
    SharpnessMonitor,
    edge_threshold,
    measure_edge,
    preconditioned,
    preconditioner,
    variational_factor,
)
from steepest.optim import IVON, Muon, VariationalSGD

X = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
T = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (output - targets).square().sum(-1).mean()


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return model


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(X), T)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def exact(model: nn.Module) -> tuple[Tensor, Tensor]:
    hessian = Hessian(model, loss_fn, (X, T))
    return hessian.dense(), hessian.gradient()


def test_the_edge_of_variational_descent() -> None:
    model = net()
    optimizer = VariationalSGD(model.parameters(), lr=0.2, sigma=0.1, samples=3)
    monitor = SharpnessMonitor(model, loss_fn, (X, T), optimizer=optimizer, k=2, tol=1e-8)
    train(model, optimizer, 3)
    before = [p.detach().clone() for p in model.parameters()]
    found = monitor.measure()
    H, g = exact(model)
    values, vectors = torch.linalg.eigh(H)
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, values[[-1, -2]], rtol=1e-10, atol=0)
    projections = (g @ vectors).square()[[-1, -2]]
    torch.testing.assert_close(found.projections, projections, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.factors, variational_factor(3 * projections / 0.01, 0.2), rtol=1e-5, atol=0)
    assert found.edge == pytest.approx(10.0)
    assert found.threshold == pytest.approx(10 * found.factor)
    assert found.thresholds.shape == (2,)
    assert found.relative_sharpness == pytest.approx(found.sharpness / 10)
    assert found.projection == pytest.approx(float(projections[0]), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    monitor = SharpnessMonitor(model, loss_fn, (X, T), optimizer=optimizer)
    first, again = monitor.measure(), monitor.measure()
    assert again.products < first.products
    assert again.sharpness == pytest.approx(found.sharpness)


def test_batches_are_one_data_set() -> None:
    model = net()
    optimizer = VariationalSGD(model.parameters(), lr=0.2, sigma=0.1)
    whole = SharpnessMonitor(model, loss_fn, (X, T), optimizer=optimizer, tol=1e-8).measure()
    parts = [(X[:12], T[:12]), (X[12:], T[12:])]
    cut = SharpnessMonitor(model, loss_fn, parts, optimizer=optimizer, tol=1e-8).measure()
    assert cut.sharpness == pytest.approx(whole.sharpness, rel=1e-10)
    assert cut.factor == pytest.approx(whole.factor, rel=1e-6)


@pytest.mark.parametrize("rescale_lr", [True, False])
def test_ivon_is_variational_descent_in_its_own_coordinates(rescale_lr: bool) -> None:
    model = net()
    optimizer = IVON(
        model.parameters(),
        0.1,
        200.0,
        hess_init=0.3,
        betas=(0.0, 0.99),
        weight_decay=0.01,
        samples=2,
        rescale_lr=rescale_lr,
    )
    train(model, optimizer, 4)
    found = SharpnessMonitor(model, loss_fn, (X, T), optimizer=optimizer, tol=1e-9).measure()
    H, g = exact(model)
    scale = 0.31 if rescale_lr else 1.0
    p = torch.cat([(optimizer.state[w]["hess"] + 0.01).flatten() for w in model.parameters()]) / scale
    values, vectors = torch.linalg.eigh(H / p.sqrt() / p.sqrt()[:, None])
    assert found.sharpness == pytest.approx(float(values[-1]), rel=1e-9)
    projection = float(vectors[:, -1] @ (g / p.sqrt())) ** 2
    assert found.projection == pytest.approx(projection, rel=1e-5)
    noise = torch.cat([s.flatten() for s in optimizer.posterior_std()]) * p.sqrt()
    assert float(noise.std() / noise.mean()) < 1e-12
    assert found.factor == pytest.approx(variational_factor(2 * projection / float(noise[0]) ** 2, 0.1), rel=1e-5)


def test_preconditioners() -> None:
    for make in (
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9), eps=1e-3),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.9), amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    ):
        model = net()
        optimizer = make(model.parameters())
        with pytest.raises(ValueError, match="no state"):
            preconditioner(optimizer)
        train(model, optimizer, 3)
        before = [w.detach().clone() for w in model.parameters()]
        found = preconditioner(optimizer, list(model.parameters()))
        momentum = [s.get("exp_avg") for s in optimizer.state.values()]
        if isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW):
            optimizer.zero_grad()
            loss_fn(model(X), T).backward()
            gradients = [w.grad.clone() for w in model.parameters()]  # type: ignore[union-attr]
            optimizer.step()
            for w, old, gradient, p in zip(
                model.parameters(), before, gradients, preconditioner(optimizer), strict=True
            ):
                torch.testing.assert_close(old - w, 0.01 * gradient / p, rtol=1e-9, atol=1e-14)
        assert all(p.shape == w.shape and bool((p > 0).all()) for p, w in zip(found, before, strict=True))
        assert len(momentum) == 4
    model = net()
    assert all(bool((p == 1).all()) for p in preconditioner(torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(TypeError, match="Muon"):
        preconditioner(Muon([nn.Parameter(torch.zeros(2, 2))]))
    with pytest.raises(ValueError, match="does not hold"):
        preconditioner(torch.optim.SGD(model.parameters(), lr=0.1), [nn.Parameter(torch.zeros(2))])


def test_thresholds_with_momentum() -> None:
    assert edge_threshold(0.1) == pytest.approx(20.0)
    assert edge_threshold(0.1, 0.9) == pytest.approx(380.0)
    for lr, momentum in ((0.0, 0.0), (0.1, 1.0), (0.1, -0.1)):
        with pytest.raises(ValueError, match=r"lr|momentum"):
            edge_threshold(lr, momentum)
    model = net()
    heavy = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = SharpnessMonitor(model, loss_fn, (X, T), optimizer=heavy).measure()
    assert found.edge == pytest.approx(2 * 1.9 / 0.1)
    assert found.factor == 1.0


def test_the_momentum_threshold_is_where_a_quadratic_diverges() -> None:
    for factor, stable in ((0.98, True), (1.02, False)):
        w = torch.ones(1, dtype=torch.float64)
        average, curvature = torch.zeros(1, dtype=torch.float64), factor * edge_threshold(0.1, 0.6)
        for _ in range(4000):
            average = 0.6 * average + 0.4 * curvature * w
            w = w - 0.1 * average
        assert (float(w.abs()) < 1) == stable


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.8, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.3, "nesterov": True},
    ],
)
def test_the_threshold_of_torch_sgd_is_where_a_quadratic_diverges(options: dict[str, Any]) -> None:
    def optimizer_of(layer: nn.Linear) -> torch.optim.SGD:
        return torch.optim.SGD(layer.parameters(), lr=0.1, **options)

    def one() -> nn.Linear:
        layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(layer.weight)
        return layer

    layer, data = one(), (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    edge = SharpnessMonitor(layer, loss_fn, data, optimizer=optimizer_of(layer)).measure().edge
    for factor, stable in ((0.98, True), (1.02, False)):
        layer = one()
        optimizer = optimizer_of(layer)
        for _ in range(2000):
            layer.weight.grad = factor * edge * layer.weight.detach()
            optimizer.step()
        assert (float(layer.weight.detach().abs()) < 1) == stable


def test_known_pairs_and_anisotropic_noise() -> None:
    A = MatrixOperator(torch.diag(torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)))
    g = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    variance = torch.tensor([0.5, 0.1, 0.1], dtype=torch.float64)
    found = measure_edge(A, 0.1, variance, gradient=g, k=2, tol=1e-8)
    assert found.factors.tolist() == pytest.approx([variational_factor(2.0, 0.1), variational_factor(10.0, 0.1)])
    pairs = Eigenpairs(torch.tensor([5.0]).double(), torch.eye(3).double()[:, :1], torch.zeros(1), 7, True)
    known = measure_edge(A, 0.1, 0.5, gradient=g, pairs=pairs)
    assert known.products == 7
    assert known.factor == pytest.approx(found.factor)
    with pytest.raises(TypeError, match="gradient must be given"):
        measure_edge(A, 0.1)
    with pytest.raises(ValueError, match="variance"):
        measure_edge(A, 0.1, torch.ones(2), gradient=g)


def test_preconditioned_operators() -> None:
    A = MatrixOperator(torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    p = torch.tensor([4.0, 0.25], dtype=torch.float64)
    wanted = torch.tensor([[0.75, 1.0], [1.0, 8.0]], dtype=torch.float64)
    torch.testing.assert_close(preconditioned(A, p).dense(), wanted)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        preconditioned(A, torch.ones(3))
    with pytest.raises(ValueError, match=r"got -1"):
        preconditioned(A, torch.tensor([1.0, -1.0]))


def test_what_the_monitor_refuses_and_reads() -> None:
    model = net()
    with pytest.raises(TypeError, match="Muon"):
        SharpnessMonitor(model, loss_fn, (X, T), optimizer=Muon([nn.Parameter(torch.zeros(2, 2))]))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}]
    two = VariationalSGD(groups, lr=0.2, sigma=0.1)
    with pytest.raises(ValueError, match="same lr"):
        SharpnessMonitor(model, loss_fn, (X, T), optimizer=two).measure()
    pairs = VariationalSGD(model.parameters(), lr=0.2, sigma=0.1, samples=2, antithetic=True)
    assert SharpnessMonitor(model, loss_fn, (X, T), optimizer=pairs).measure().factor == 1.0
    model[0].weight.requires_grad_(False)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    train(model, adam, 2)
    found = SharpnessMonitor(model, loss_fn, (X, T), optimizer=adam).measure()
    assert found.vectors.shape[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    named = SharpnessMonitor(model, loss_fn, (X, T), optimizer=adam, params=["2.weight"]).measure()
    assert named.vectors.shape[0] == 12


def test_batch_norm_is_measured_as_it_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    buffers = [buffer.clone() for buffer in model.buffers()]

    def measured(train: bool | None) -> float:
        monitor = SharpnessMonitor(model, nn.functional.cross_entropy, (x, y), optimizer=optimizer, train=train)
        return monitor.measure().relative_sharpness

    assert measured(None) == measured(True) < 0.1 < 10 < measured(False)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    model.eval()
    assert measured(None) == measured(False)
