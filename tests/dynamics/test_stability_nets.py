import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from steepest.dynamics import DiagonalLinearNet, LinearStability, RegressionSGD, TwoLayerReLU, mean_square_threshold
from steepest.loop import run

DTYPE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=generator(seed))


def autograd_jacobian(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    state = {name: value.detach() for name, value in net.named_parameters()}
    found = jacrev(lambda values: functional_call(net, values, (x,)))(state)
    return torch.cat([found[name].flatten(1) for name in state], -1)


def test_the_diagonal_example() -> None:
    net = DiagonalLinearNet.of(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 4.0]))
    found, bounds = net.population_sharpness(1.0), net.norm_bounds(1.0)
    assert found.trace == pytest.approx(22.5, abs=1e-12)
    assert found.frobenius == pytest.approx(17.0477271, abs=1e-7)
    assert found.largest == pytest.approx(16.25, abs=1e-12)
    assert bounds == pytest.approx((9, 5.7445626, 4), abs=1e-7)
    assert net.balance() == pytest.approx(2.5)
    assert net.path_norm() == pytest.approx(4.5)


def test_the_relu_example() -> None:
    weight = torch.tensor([[1, -1], [0.5, 2], [-1, 0.3]], dtype=DTYPE)
    x = torch.tensor([[1, 1], [-2, 0.5], [0.3, -1]], dtype=DTYPE)
    net = TwoLayerReLU.of(weight, torch.tensor([1, -0.5, 2], dtype=DTYPE))
    jacobian = net.jacobian(x)
    assert jacobian.square().sum(1).tolist() == pytest.approx([6.75, 21.6225, 2.78], abs=1e-12)
    for point in (LinearStability(jacobian), LinearStability.of_gram(net.gram(x))):
        assert point.trace == pytest.approx(10.3841667, abs=1e-7)
        assert point.largest == pytest.approx(7.2075, abs=1e-10)
        assert point.frobenius == pytest.approx(7.6071852, abs=1e-7)
    assert net.path_norm() == pytest.approx(4.5330513, abs=1e-7)


@pytest.mark.parametrize("kind", [DiagonalLinearNet, TwoLayerReLU])
def test_closed_forms_are_the_derivatives(kind: type) -> None:
    net = DiagonalLinearNet(4, dtype=DTYPE, generator=generator()) if kind is DiagonalLinearNet else None
    net = net or TwoLayerReLU(4, 6, dtype=DTYPE, generator=generator())
    x = randn(9, 4, seed=1)
    jacobian = net.jacobian(x)
    assert torch.allclose(jacobian, autograd_jacobian(net, x), atol=1e-12)
    assert torch.allclose(net.gram(x), jacobian @ jacobian.mT, atol=1e-12)


def test_population_formulas_are_limits_of_many_samples() -> None:
    net = DiagonalLinearNet(3, dtype=DTYPE, generator=generator())
    x = torch.rand(400_000, 3, dtype=DTYPE, generator=generator(1)) * 2 - 1
    point = LinearStability(net.jacobian(x))
    assert (point.trace, point.frobenius, point.largest) == pytest.approx(net.population_sharpness(1 / 3), rel=0.02)
    relu = TwoLayerReLU(3, 5, dtype=DTYPE, generator=generator())
    x = math.sqrt(3) * nn.functional.normalize(randn(400_000, 3, seed=2), dim=-1)
    assert LinearStability(relu.jacobian(x)).trace == pytest.approx(relu.population_trace(), rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_norms_bound_the_sharpness_and_balance_attains_it(seed: int) -> None:
    net = DiagonalLinearNet(6, dtype=DTYPE, generator=generator(seed))
    found, bounds = net.population_sharpness(0.3), net.norm_bounds(0.3)
    assert all(a >= b for a, b in zip(found, bounds, strict=True))
    even = DiagonalLinearNet.balanced(net.beta)
    assert torch.allclose(even.beta, net.beta)
    assert even.population_sharpness(0.3) == pytest.approx(bounds, rel=1e-12)
    assert even.balance() == pytest.approx(1, rel=1e-12)
    uneven = DiagonalLinearNet.balanced(net.beta, balance=4.0)
    assert torch.allclose(uneven.beta, net.beta)
    assert uneven.balance() == pytest.approx(4, rel=1e-12)
    assert DiagonalLinearNet.unbalanced(6, 8.0, generator=generator(seed)).balance() == pytest.approx(8, rel=1e-5)
    relu = TwoLayerReLU(6, 9, dtype=DTYPE, generator=generator(seed))
    assert relu.population_trace() >= math.sqrt(6) * relu.path_norm()
    scale = relu.weight.norm(dim=-1) / math.sqrt(6)
    even = TwoLayerReLU.of(relu.weight, relu.a.sign() * scale)
    assert even.balance() == pytest.approx(1, rel=1e-12)


def test_rescaling_units_changes_the_trace_only() -> None:
    net, x = TwoLayerReLU(4, 6, dtype=DTYPE, generator=generator()), randn(9, 4, seed=1)
    other = TwoLayerReLU.of(3 * net.weight, net.a / 3)
    assert torch.allclose(net(x), other(x), atol=1e-12)
    assert net.path_norm() == pytest.approx(other.path_norm(), rel=1e-12)
    assert LinearStability(other.jacobian(x)).trace != pytest.approx(LinearStability(net.jacobian(x)).trace, rel=0.1)


def test_a_unit_at_zero_has_no_slope() -> None:
    net = TwoLayerReLU.of(torch.tensor([[1.0, -1.0]]), torch.tensor([2.0]))
    assert net.jacobian(torch.ones(1, 2)).tolist() == [[0.0, 0.0, 0.0]]
    assert torch.equal(net.jacobian(torch.ones(1, 2)), autograd_jacobian(net, torch.ones(1, 2)))


def test_nets_of_zero() -> None:
    assert DiagonalLinearNet.of([0.0], [0.0]).balance() == 1
    assert DiagonalLinearNet.of([1.0], [0.0]).balance() == math.inf
    assert TwoLayerReLU(3, 2, output_std=0.0, hidden_std=0.0).balance() == 1


def make(kind: str, count: int = 1) -> list:
    if kind == "diagonal":
        return [DiagonalLinearNet(5, dtype=DTYPE, generator=generator(i)) for i in range(count)]
    return [TwoLayerReLU(5, 4, dtype=DTYPE, generator=generator(i)) for i in range(count)]


@pytest.mark.parametrize("kind", ["diagonal", "relu"])
@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_path_is_that_of_torch(kind: str, batch_size: int | None, clip: float | None) -> None:
    x, y, net = randn(8, 5, seed=3), randn(8, seed=4), make(kind)[0]
    ours = RegressionSGD(net, x, y, [0.02, 0.05], seeds=[5, 6], batch_size=batch_size, clip=clip)
    draws = [generator(5), generator(6)]
    blocks = [torch.randint(8, (512, batch_size or 1), generator=each) for each in draws]
    for _ in range(4):
        ours.step()
    for i, lr in enumerate((0.02, 0.05)):
        peer = make(kind)[0]
        optimizer = torch.optim.SGD(peer.parameters(), lr=lr)
        for t in range(4):
            batch = blocks[i][t] if batch_size else torch.arange(8)
            optimizer.zero_grad()
            ((peer(x[batch]) - y[batch]).square().mean() / 2).backward()
            if clip:
                nn.utils.clip_grad_norm_(peer.parameters(), clip)
            optimizer.step()
        for a, b in zip(ours.models()[i].parameters(), peer.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0.0, atol=1e-5 if clip else 1e-12)
        assert float(ours.loss()[i]) == pytest.approx(float((peer(x) - y).square().mean().detach()) / 2, rel=1e-4)


@pytest.mark.parametrize("replacement", [True, False])
def test_resume_in_the_middle_is_exact(replacement: bool) -> None:
    x, y = randn(8, 5, seed=3), randn(8, seed=4)

    def start() -> RegressionSGD:
        return RegressionSGD(make("relu", 2), x, y, 0.01, seeds=[1, 2], batch_size=2, replacement=replacement)

    one = start()
    run(one, steps=515, progress=False)
    other = start()
    other.load_state_dict(one.state_dict())
    for _ in range(600):
        one.step()
        other.step()
    for a, b in zip(one.models(), other.models(), strict=True):
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.a, b.a)
    with pytest.raises(ValueError, match="must have the shape"):
        other.load_state_dict(RegressionSGD(make("diagonal"), x, y, 0.01).state_dict())


def test_finished_and_broken_runs_are_taken_out() -> None:
    x, net = randn(8, 5, seed=3), make("diagonal")[0]
    y = 1.1 * net(x).detach()
    descent = RegressionSGD(net, x, y, [0.1, 1e3, 1e-5], batch_size=None, tol=1e-9)
    for _ in range(1500):
        descent.step()
        descent.retire()
    assert descent.live == [2]
    loss = descent.loss()
    assert float(loss[0]) < 1e-9
    assert not bool(loss[1].isfinite())
    before = [value.clone() for value in descent.models()[0].parameters()]
    descent.step()
    assert all(torch.equal(a, b) for a, b in zip(before, descent.models()[0].parameters(), strict=True))


def test_runs_do_not_depend_on_each_other() -> None:
    x, y, net = randn(8, 5, seed=3), randn(8, seed=4), make("relu")[0]
    many = RegressionSGD(net, x, y, [0.01, 0.02, 0.03], seeds=7)
    alone = RegressionSGD(net, x, y, 0.02, seeds=7)
    for _ in range(50):
        many.step()
        alone.step()
    assert torch.allclose(many.models()[1].weight, alone.models()[0].weight, atol=1e-12)


def test_sgd_leaves_minima_beyond_the_threshold_and_stays_below_it() -> None:
    x = torch.rand(12, 8, dtype=DTYPE, generator=generator(1)) * 2 - 1
    beta = torch.tensor([1.0, -1.0, 0.5, 0, 0, 0, 0, 0], dtype=DTYPE)
    net = DiagonalLinearNet.balanced(beta + 0.1)
    threshold = mean_square_threshold(net.jacobian(x))
    with torch.no_grad():
        near = DiagonalLinearNet.of(net.a + 1e-8, net.b)
    ends = {}
    for share in (0.5, 4.0):
        descent = RegressionSGD(near, x, x @ net.beta.detach(), share * threshold)
        start = float(descent.loss())
        losses = [float(descent.step()["loss"]) for _ in range(400)]
        end = float(descent.loss()) if share < 1 else max(filter(math.isfinite, losses))
        ends[share] = end / start
    assert ends[0.5] < 1e-2
    assert ends[4.0] > 1e3


def test_bad_input() -> None:
    x, y, net = randn(8, 5, seed=3), randn(8, seed=4), make("diagonal")[0]
    with pytest.raises(ValueError, match="lr must be a positive"):
        RegressionSGD(net, x, y, [0.1, -0.1])
    with pytest.raises(ValueError, match="batch_size must lie in 1"):
        RegressionSGD(net, x, y, 0.1, batch_size=9)
    with pytest.raises(ValueError, match="at least 2 examples"):
        RegressionSGD(net, x[:1], y[:1], 0.1, replacement=False)
    with pytest.raises(ValueError, match=r"inputs \(n, 5\) and targets"):
        RegressionSGD(net, x[:, :4], y, 0.1)
    with pytest.raises(ValueError, match="do not fit"):
        RegressionSGD(net, x[:0], y[:0], 0.1)
    with pytest.raises(ValueError, match="inputs must be finite"):
        RegressionSGD(net, x / 0, y, 0.1)
    with pytest.raises(TypeError, match="real floating-point"):
        RegressionSGD(net, x.to(torch.complex64), y, 0.1)
    with pytest.raises(ValueError, match="seeds must hold one entry"):
        RegressionSGD(net, x, y, [0.1, 0.2, 0.3], seeds=[1, 2])
    with pytest.raises(ValueError, match="clip must be"):
        RegressionSGD(net, x, y, 0.1, clip=0.0)
    with pytest.raises(TypeError, match="all DiagonalLinearNet or all TwoLayerReLU"):
        RegressionSGD([net, make("relu")[0]], x, y, 0.1)
    with pytest.raises(TypeError, match="got Linear"):
        RegressionSGD(nn.Linear(5, 1), x, y, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="balance must be"):
        DiagonalLinearNet.balanced(torch.ones(2), balance=0.5)
    with pytest.raises(ValueError, match="vectors of one length"):
        DiagonalLinearNet.of([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="do not fit"):
        TwoLayerReLU.of(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="features must be at least 1"):
        DiagonalLinearNet(0)
    with pytest.raises(ValueError, match="output_std"):
        TwoLayerReLU(3, 3, output_std=math.nan)
