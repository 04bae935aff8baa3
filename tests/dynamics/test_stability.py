import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from steepest.dynamics import (
    DiagonalLinearNet,
    LinearStability,
    TwoLayerReLU,
    mean_square_threshold,
    stability_report,
    trace_stability,
)

DTYPE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:the loss is")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=generator(seed))


def seeded(*layers: nn.Module, dtype: torch.dtype = DTYPE) -> nn.Sequential:
    net = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for i, value in enumerate(net.parameters()):
            value.copy_(randn(*value.shape, seed=100 + i) / 2)
    return net


def gauss_newton(net: nn.Module, loss_fn, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The Hessian of the loss, the network replaced by its first-order expansion."""
    names = [name for name, value in net.named_parameters() if value.requires_grad]
    shapes = {name: value.shape for name, value in net.named_parameters()}
    here = torch.cat([net.get_parameter(name).detach().flatten() for name in names])

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shapes[name].numel() for name in names])
        values = {name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)}
        return functional_call(net, values, (x,))

    base, slope = outputs(here), torch.func.jacrev(outputs)(here)
    return hessian(lambda flat: loss_fn(base.detach() + slope.detach() @ (flat - here), y))(here.clone())


LOSSES = {
    "half": (lambda f, y: (f - y).square().sum() / (2 * len(f)), lambda: randn(7, 3, seed=9)),
    "mse": (F.mse_loss, lambda: randn(7, 3, seed=9)),
    "cross entropy": (F.cross_entropy, lambda: torch.arange(7) % 3),
    "logistic": (F.binary_cross_entropy_with_logits, lambda: (randn(7, 3, seed=9) > 0).to(DTYPE)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_numbers_are_those_of_the_gauss_newton_matrix(name: str) -> None:
    loss_fn, targets = LOSSES[name]
    net, x, y = seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), randn(7, 4), targets()
    found = stability_report(net, loss_fn, (x, y), 0.1, 2)
    g = gauss_newton(net, loss_fn, x, y)
    assert found.trace == pytest.approx(float(g.trace()), rel=1e-9)
    assert found.frobenius == pytest.approx(float(g.norm()), rel=1e-9)
    assert found.sharpness == pytest.approx(float(torch.linalg.eigvalsh(g)[-1]), rel=1e-9)
    assert found.loss == pytest.approx(float(loss_fn(net(x), y).detach()), rel=1e-12)
    assert found.lr_sufficient <= found.lr_exact <= min(found.lr_trace, found.lr_gd)
    exact = trace_stability(net, loss_fn, (x, y), 0.1, 2, probes=0)
    assert (exact.trace, exact.threshold) == pytest.approx((found.trace, found.trace_threshold), rel=1e-9)
    rough = trace_stability(net, loss_fn, (x, y), 0.1, 2, probes=400, generator=generator())
    assert abs(rough.trace - found.trace) <= 5 * rough.standard_error
    assert rough.standard_error < 0.1 * found.trace


@pytest.mark.parametrize("name", LOSSES)
def test_the_alignment_is_that_of_the_gradients(name: str) -> None:
    loss_fn, targets = LOSSES[name]
    net, x, y = seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), randn(7, 4), targets()
    gradients = []
    for i in range(7):
        parts = torch.autograd.grad(loss_fn(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    rows = torch.stack(gradients)
    noise = rows.mT @ rows / 7 - torch.outer(rows.mean(0), rows.mean(0))
    g, found = gauss_newton(net, loss_fn, x, y), stability_report(net, loss_fn, (x, y), 0.1)
    # 2 R is the mean of |e|^2 with the residuals e that give these gradients.
    if name in ("half", "mse"):
        wanted = float((noise @ g).trace()) / (2 * found.loss * float(g.norm()) ** 2)
        assert found.alignment == pytest.approx(wanted, rel=1e-8)
    assert found.alignment is not None
    assert found.frobenius_threshold == pytest.approx(1 / (0.1 * math.sqrt(found.alignment)))


def test_the_report_of_a_test_bed_is_that_of_its_closed_forms() -> None:
    x = randn(9, 5)
    for net in (DiagonalLinearNet(5, dtype=DTYPE, generator=generator()), TwoLayerReLU(5, 4, dtype=DTYPE)):
        point = LinearStability(net.jacobian(x))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = stability_report(net, None, (x, net(x).detach()), 0.2, 3, replacement=False)
        assert found.trace == pytest.approx(point.trace, rel=1e-10)
        assert found.lr_exact == pytest.approx(point.threshold(3, False), rel=1e-9)
        assert found.lr_gd == pytest.approx(2 / point.largest, rel=1e-10)
        assert found.sharpness_threshold == 10
        assert found.trace_threshold == pytest.approx(2 / 0.2 / (6 / 24))
        assert found.path_norm == pytest.approx(net.path_norm())
        assert found.balance == pytest.approx(net.balance())
        assert found.alignment is None
        assert found.stable == (found.lr <= found.lr_exact)


def test_chunks_batches_and_memory_change_nothing() -> None:
    net, x, y = seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), randn(11, 4), randn(11, 2, seed=1)
    wanted = stability_report(net, None, (x, y), 0.1)
    pieces = [(x[:3], y[:3]), (x[3:], y[3:])]
    for data, options in (((x, y), {"chunk": 2}), ((x, y), {"memory": 1000}), (pieces, {}), (pieces, {"memory": 1})):
        found = stability_report(net, None, data, 0.1, **options)
        for name in ("loss", "trace", "frobenius", "sharpness", "lr_exact", "alignment"):
            assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-8)
    assert trace_stability(net, None, iter(pieces), 0.1, probes=0).trace == pytest.approx(wanted.trace, rel=1e-12)


def test_verdicts() -> None:
    x = torch.eye(4, dtype=DTYPE)
    net = nn.Linear(4, 1, bias=False).double()
    data = (2 * x, net(2 * x).detach())
    for lr, batch_size, stable in ((0.49, 1, True), (0.51, 1, False), (1.9, None, True), (2.1, None, False)):
        found = stability_report(net, None, data, lr, batch_size)
        assert found.stable is stable
        assert ("not linearly stable" in str(found)) is not stable
        cheap = stability_report(net, None, data, lr, batch_size, exact=False)
        assert cheap.lr_exact is None
        assert cheap.stable is stable
    uneven = stability_report(net, None, (torch.diag(randn(4)), torch.zeros(4, 1, dtype=DTYPE)), 0.1, exact=False)
    assert uneven.lr_sufficient <= uneven.lr_trace


def test_one_output_of_several() -> None:
    net, x = seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), randn(7, 4)
    y = net(x).detach()
    traces = [stability_report(net, None, (x, y[:, i]), 0.1, output=i).trace for i in range(3)]
    assert sum(traces) == pytest.approx(stability_report(net, None, (x, y), 0.1).trace, rel=1e-10)
    assert stability_report(net, None, (x, y[:, 2]), 0.1, output=-1).trace == pytest.approx(traces[2])
    with pytest.raises(ValueError, match="output must index one of the 3 outputs, got 3"):
        stability_report(net, None, (x, y[:, 0]), 0.1, output=3)


def test_nothing_of_the_model_changes() -> None:
    net = seeded(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 1))
    net[3].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    found = stability_report(net, None, (randn(6, 4), randn(6, 1, seed=1)), 0.1)
    trace_stability(net, None, (randn(6, 4), randn(6, 1, seed=1)), 0.1, generator=generator())
    assert torch.equal(random, torch.get_rng_state())
    assert net.training and not net[3].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(value.grad is None for value in net.parameters())
    assert found.trace == stability_report(net.eval(), None, (randn(6, 4), randn(6, 1, seed=1)), 0.1).trace


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh()).sum(-1)


def test_shared_frozen_and_strided_parameters() -> None:
    net = Tied().double()
    x, y = randn(5, 3), randn(5, seed=1)
    jacobian = []
    for each in x:
        jacobian.append(torch.autograd.grad(net(each[None])[0], net.one.weight)[0].flatten())
    wanted = LinearStability(torch.stack(jacobian))
    assert stability_report(net, None, (x, y), 0.1).trace == pytest.approx(wanted.trace, rel=1e-10)
    net = seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    y = y[:, None]
    whole = stability_report(net, None, (x, y), 0.1).trace
    first = stability_report(net, None, (x, y), 0.1, params=["0.weight", "0.bias"]).trace
    assert first == stability_report(net, None, (x, y), 0.1, params=net[0].parameters()).trace
    net[0].requires_grad_(False)
    assert first + stability_report(net, None, (x, y), 0.1).trace == pytest.approx(whole, rel=1e-10)
    net[2].weight = nn.Parameter(net[2].weight.detach().mT.contiguous().mT)
    assert first + stability_report(net, None, (x, y), 0.1).trace == pytest.approx(whole, rel=1e-10)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        stability_report(net, None, (x, y), 0.1)


def test_a_parameter_that_is_not_used() -> None:
    net = seeded(nn.Linear(3, 1))
    net.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=DTYPE)))
    x, y = randn(5, 3), randn(5, 1, seed=1)
    assert stability_report(net, None, (x, y), 0.1).trace == pytest.approx(float(x.square().sum(1).mean()) + 1)
    assert math.isfinite(trace_stability(net, None, (x, y), 0.1).trace)


def test_bfloat16_parameters() -> None:
    net = seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), dtype=torch.bfloat16)
    x, y = randn(5, 3).bfloat16(), randn(5, 1, seed=1).bfloat16()
    found = stability_report(net, None, (x, y), 0.1).trace
    wide = stability_report(net, None, (x, y), 0.1, dtype=DTYPE).trace
    assert found == pytest.approx(wide, rel=1e-4)
    assert net[0].weight.dtype == torch.bfloat16


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if float(x.sum()) > 1e9 else 2 * self.linear(x)


def test_a_model_that_vmap_cannot_run() -> None:
    net = Branching().double()
    x = randn(5, 3)
    found = stability_report(net, None, (x, torch.zeros(5, 1, dtype=DTYPE)), 0.1)
    assert found.trace == pytest.approx(4 * (float(x.square().sum(1).mean()) + 1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (self.embedding(index) * x).sum(-1)


def test_several_inputs_and_integers() -> None:
    net, index, x = TwoInputs().double(), torch.tensor([0, 1, 1, 3]), randn(4, 3)
    found = stability_report(net, None, ((index, x), torch.zeros(4, dtype=DTYPE)), 0.1)
    jacobian = torch.zeros(4, 4, 3, dtype=DTYPE)
    jacobian[torch.arange(4), index] = x
    assert found.lr_exact == pytest.approx(mean_square_threshold(jacobian.flatten(1)), rel=1e-9)


def test_a_point_that_is_not_fitted_is_warned_of() -> None:
    net, x = seeded(nn.Linear(3, 1)), randn(5, 3)
    with pytest.warns(UserWarning, match=r"the loss is 2, above tol = 0.001"):
        stability_report(net, None, (x, net(x).detach() + 2), 0.1)


def test_no_gradient_at_all() -> None:
    net = nn.Linear(3, 1, bias=False).double()
    found = stability_report(net, None, (torch.zeros(1, 3).double(), torch.zeros(1, 1).double()), 0.1)
    assert found.trace == 0
    assert found.lr_exact == found.lr_gd == found.lr_trace == found.lr_sufficient == math.inf
    assert found.stable
    assert "nan" not in str(found)


def test_bad_input() -> None:
    net, x, y = seeded(nn.Linear(3, 2)), randn(5, 3), randn(5, 2, seed=1)
    for lr in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="lr must be"):
            stability_report(net, None, (x, y), lr)
        with pytest.raises(ValueError, match="lr must be"):
            trace_stability(net, None, (x, y), lr)
    for batch_size in (0, 6):
        with pytest.raises(ValueError, match="batch_size"):
            stability_report(net, None, (x, y), 0.1, batch_size)
    with pytest.raises(ValueError, match="at least 2 examples"):
        stability_report(net, None, (x[:1], y[:1]), 0.1, replacement=False)
    with pytest.raises(ValueError, match="targets must have the shape of the outputs"):
        stability_report(net, None, (x, y[:, 0]), 0.1)
    with pytest.raises(ValueError, match="one length, got"):
        stability_report(net, None, (x, y[:4]), 0.1)
    with pytest.raises(ValueError, match="empty"):
        stability_report(net, None, [], 0.1)
    with pytest.raises(ValueError, match="empty"):
        stability_report(net, None, (x[:0], y[:0]), 0.1)
    with pytest.raises(ValueError, match=r"must be the mean over the examples .*reduction='mean'"):
        stability_report(net, nn.MSELoss(reduction="sum"), (x, y), 0.1)
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        stability_report(net, nn.MSELoss(reduction="none"), (x, y), 0.1)
    with pytest.raises(ValueError, match="convex in the outputs"):
        stability_report(net, lambda f, t: -F.mse_loss(f, t), (x, y), 0.1)
    with pytest.raises(ValueError, match="not finite"):
        stability_report(net, None, (torch.full_like(x, math.inf), y), 0.1)
    with pytest.raises(TypeError, match="complex"):
        stability_report(net, None, (x.to(torch.complex64), y), 0.1)
    with pytest.raises(TypeError, match="one real tensor"):
        stability_report(nn.LSTM(3, 2).double(), None, (x, y), 0.1)
    with pytest.raises(ValueError, match="one output for each of"):
        stability_report(Mean(), None, (x, y), 0.1)
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        stability_report(net, None, (x, y), 0.1, params=["nothing"])
    with pytest.raises(ValueError, match="more than 12000"):
        stability_report(net, None, (torch.zeros(7000, 3).double(), torch.zeros(7000, 2).double()), 0.1)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mean(0)
