import contextlib
import copy
import gc
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler

import steepest
from steepest.optim import DAL

SPECTRUM = torch.tensor([10, 5, 2, 1, 0.5, 0.1], dtype=torch.float64)
HVP = pytest.mark.parametrize("hvp", ["exact", "fd"])


def quadratic(steps: int, scale: float = 1.0, **options: Any) -> tuple[list[float], list[Tensor], float]:
    """Learning rates, iterates and the last loss on a sum of scale * lambda x^2 / 2."""
    x = Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = DAL([x], **options)
    rates, iterates = [], []
    for _ in range(steps):
        optimizer.step(lambda: scale / 2 * (SPECTRUM * x * x).sum())
        assert optimizer.last_lr is not None
        rates.append(float(optimizer.last_lr))
        iterates.append(x.detach().clone())
    return rates, iterates, float((SPECTRUM * x.detach().square()).sum() / 2)


@HVP
def test_first_steps_on_a_quadratic(hvp: str) -> None:
    rates = quadratic(3, hvp=hvp)[0]
    assert rates == pytest.approx([0.22127005, 0.20149758, 0.20064362], abs=5e-9)
    assert quadratic(1, p=0.5, hvp=hvp)[0][0] == pytest.approx(0.66523687, abs=5e-9)


def test_where_it_goes_on_a_quadratic() -> None:
    rates, iterates, loss = quadratic(2000)
    assert rates[-1] == pytest.approx(0.2, abs=1e-9) and loss == pytest.approx(7.8548, abs=5e-5)
    torch.testing.assert_close(iterates[-1], iterates[-3])
    assert float((iterates[-1] - iterates[-2]).norm()) > 1
    rates, _, loss = quadratic(3000, factor=1.0)
    assert rates[-1] == pytest.approx(2 / 10.1, abs=1e-9) and loss < 1e-30
    assert quadratic(200, p=0.5)[2] > 1e100


def test_only_p_one_is_invariant_to_the_scale_of_the_loss() -> None:
    for scale, p, same in ((7.0, 1.0, True), (7.0, 0.5, False), (0.01, 1.0, False)):  # 0.01: the cap is active
        one, other = quadratic(20, p=p), quadratic(20, scale, p=p)
        equal = torch.allclose(torch.stack(one[1]), torch.stack(other[1]), rtol=1e-9)
        assert equal is same
        if same:
            assert [rate / scale for rate in one[0]] == pytest.approx(other[0])


def test_attributes_of_the_last_step() -> None:
    x = Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = DAL([x])
    optimizer.step(lambda: (SPECTRUM * x * x).sum() / 2)
    g = SPECTRUM.norm()
    Hg = SPECTRUM.square().norm()
    assert optimizer.last_curvature is not None and optimizer.last_drift is not None and optimizer.last_lr is not None
    torch.testing.assert_close(optimizer.last_curvature, Hg / g)
    torch.testing.assert_close(optimizer.last_lr, 2 * g / Hg)
    torch.testing.assert_close(optimizer.last_drift, optimizer.last_lr**2 / 2 * Hg)
    torch.testing.assert_close(optimizer.last_drift, optimizer.last_lr * g)  # as long as the step
    torch.testing.assert_close(x.grad, SPECTRUM)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    for index, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=index, dtype=dtype) / 4
    return model


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    x, y = randn(16, 2, 4, 4, seed=step, dtype=dtype), randn(16, 4, seed=step + 99, dtype=dtype)
    return (model(x) - y).square().mean()


def train(model: nn.Module, optimizer: DAL, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        optimizer.step(lambda step=step: loss_of(model, step))
        if scheduler is not None:
            scheduler.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for a, b in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_hand(model: nn.Module, steps: int, p: float, momentum: float, decay: float) -> None:
    """The formulas of the method, with a dense Hessian."""
    parameters = list(model.parameters())
    names, shapes = [n for n, _ in model.named_parameters()], [q.shape for q in parameters]

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        named = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        return (torch.func.functional_call(model, named, (x,)) - y).square().mean()

    flat = torch.cat([q.detach().flatten() for q in parameters])
    buffer = torch.zeros_like(flat)
    for step in range(steps):
        x, y = randn(16, 2, 4, 4, seed=step).double(), randn(16, 4, seed=step + 99).double()
        g = torch.func.grad(loss)(flat, x, y)
        v = (torch.func.hessian(loss)(flat, x, y) @ g).norm() / g.norm()
        h = min(2 / v**p, 0.3)
        buffer = momentum * buffer + h * g
        flat = flat * (1 - h * decay) - buffer
    for q, piece in zip(parameters, flat.split([s.numel() for s in shapes]), strict=True):
        q.data.copy_(piece.view_as(q))


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(("p", "momentum", "decay"), [(1.0, 0.0, 0.0), (0.5, 0.8, 0.05)])
def test_agrees_with_the_formulas_on_a_network(foreach: Any, p: float, momentum: float, decay: float) -> None:
    model, other = net(torch.float64), net(torch.float64)
    optimizer = DAL(
        model.parameters(), p=p, momentum=momentum, weight_decay=decay, max_lr=0.3, foreach=foreach, factor=2.0
    )
    for step in range(4):
        x, y = randn(16, 2, 4, 4, seed=step).double(), randn(16, 4, seed=step + 99).double()
        optimizer.step(lambda x=x, y=y: (model(x) - y).square().mean())
    by_hand(other, 4, p, momentum, decay)
    close(model, other)


def test_finite_differences_are_the_product_up_to_their_error() -> None:
    model, other = net(torch.float64), net(torch.float64)
    exact, differences = DAL(model.parameters()), DAL(other.parameters(), hvp="fd")
    exact.step(lambda: loss_of(model))
    differences.step(lambda: loss_of(other))
    assert exact.last_curvature is not None and differences.last_curvature is not None
    assert float(differences.last_curvature) == pytest.approx(float(exact.last_curvature), rel=0.02)


def test_differences_take_a_closure_with_backward_too_and_accumulate() -> None:
    model, other = net(torch.float64), net(torch.float64)
    optimizer, plain = DAL(model.parameters(), hvp="fd"), DAL(other.parameters(), hvp="fd")

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        total = torch.zeros(())
        for part in (0, 1):
            loss = loss_of(model, part) / 2
            loss.backward()
            total = total + loss.detach()
        return total

    for _ in range(3):
        optimizer.step(closure)
        plain.step(lambda: (loss_of(other, 0) + loss_of(other, 1)) / 2)
    close(model, other)
    assert next(model.parameters()).grad is not None


def test_run_drives_it() -> None:
    model = net()
    optimizer = DAL(model.parameters(), p=0.5, factor=1.0)
    result = steepest.run(optimizer, steps=15, closure=lambda: loss_of(model), progress=False)
    assert result.history["loss"][-1] < result.history["loss"][0] / 2


@HVP
def test_wrong_closures_are_named_and_change_nothing(hvp: Any) -> None:
    model = net()
    optimizer = DAL(model.parameters(), hvp=hvp)
    before = values(model)

    def backward() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    wrong: list[tuple[Any, str]] = [
        (None, "closure"),
        (loss_of(model), "closure"),
        (lambda: loss_of(model).detach(), "closure.*graph"),
        (lambda: loss_of(model).item(), "closure.*loss"),
        (lambda: None, "closure.*loss"),
        (lambda: model(randn(3, 2, 4, 4)), "closure.*one element"),
    ]
    if hvp == "exact":
        wrong.append((backward, r"closure called backward.*hvp='fd'"))
    else:
        once = loss_of(model)
        wrong.append((lambda: once, "closure again.*same loss"))
    for closure, words in wrong:
        with pytest.raises(RuntimeError, match=words):
            optimizer.step(closure)
        assert same(values(model), before)
    train(model, optimizer, range(1))
    assert not same(values(model), before)


def test_an_error_inside_the_shifted_closure_restores_the_parameters() -> None:
    model = net()
    optimizer = DAL(model.parameters(), hvp="fd")
    before, calls = values(model), itertools.count()

    def closure() -> Tensor:
        if next(calls):
            raise KeyError("no batch")
        return loss_of(model)

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert same(values(model), before)


@HVP
@pytest.mark.parametrize("p", [1.0, 0.0])
def test_zero_gradients_move_nothing(hvp: Any, p: float) -> None:
    w = Parameter(torch.zeros(3))
    optimizer = DAL([w], p=p, hvp=hvp, momentum=0.9)
    for _ in range(2):
        optimizer.step(lambda: w.square().sum())
    assert torch.equal(w.detach(), torch.zeros(3))


@HVP
def test_a_linear_loss_takes_the_largest_step(hvp: Any) -> None:
    w = Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = DAL([w], max_lr=0.25, hvp=hvp)
    optimizer.step(w.sum)
    torch.testing.assert_close(w.detach(), torch.full((3,), -0.25, dtype=torch.float64))


@HVP
def test_parameters_without_gradient_and_frozen_ones_stay(hvp: Any) -> None:
    used, unused, frozen, empty = (Parameter(torch.ones(n)) for n in (3, 2, 2, 0))
    frozen.requires_grad_(False)
    optimizer = DAL([unused, frozen, used, empty], hvp=hvp, weight_decay=0.1)
    optimizer.step(lambda: (used**4).sum() + empty.sum() + frozen.sum())
    assert torch.equal(unused.detach(), torch.ones(2)) and torch.equal(frozen, torch.ones(2))
    assert unused.grad is None and not torch.equal(used.detach(), torch.ones(3))
    alone = Parameter(torch.ones(3))
    other = DAL([alone], hvp=hvp, weight_decay=0.1)
    other.step(lambda: alone.pow(4).sum() + 0)
    assert torch.equal(alone, used)
    optimizer = DAL([unused], hvp=hvp)
    optimizer.step(used.sum)  # the loss depends on nothing here
    assert torch.equal(unused.detach(), torch.ones(2))
    DAL([frozen], hvp=hvp).step(used.sum)


@HVP
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_nonfinite_curvature_raises_with_the_iteration(hvp: Any, wrong: float) -> None:
    model = net()
    optimizer = DAL(model.parameters(), hvp=hvp, momentum=0.5)
    train(model, optimizer, range(2))
    before = values(model)
    buffers = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    with pytest.raises(FloatingPointError, match=r"iteration 3.*no parameter was changed"):
        optimizer.step(lambda: loss_of(model) * wrong)
    assert same(values(model), before)
    assert same([state["momentum_buffer"] for state in optimizer.state.values()], buffers)
    train(model, optimizer, range(2, 3))
    assert optimizer.param_groups[0]["iteration"] == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"p": -1.0}, ValueError, "p .*-1"),
        ({"p": float("nan")}, ValueError, "p .*nan"),
        ({"factor": 0.0}, ValueError, "factor .*positive"),
        ({"factor": -2.0}, ValueError, "factor .*-2"),
        ({"max_lr": 0.0}, ValueError, "max_lr .*positive"),
        ({"max_lr": -1.0}, ValueError, "max_lr .*-1"),
        ({"lr": -0.1}, ValueError, "lr .*-0.1"),
        ({"lr": torch.ones(2)}, ValueError, "lr .*one number"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"start": -1}, ValueError, "start"),
        ({"stop": 2.5}, TypeError, "stop"),
        ({"hvp": "approximate"}, ValueError, "hvp .*exact, fd"),
        ({"nonfinite": "warn"}, ValueError, "nonfinite"),
        ({"maximize": "yes"}, TypeError, "maximize"),
        ({"foreach": 3}, TypeError, "foreach"),
        ({"params": [torch.zeros(2, dtype=torch.complex64)]}, TypeError, "real"),
        ({"params": [torch.zeros(2, dtype=torch.int64)]}, TypeError, "real floating"),
        ({"params": [torch.zeros(2, dtype=torch.bfloat16)], "hvp": "fd"}, TypeError, "bfloat16.*exact"),
        ({"params": []}, ValueError, "empty"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options: Any, error: type[Exception], words: str) -> None:
    given = {"params": [Parameter(torch.zeros(2))], **options}
    with pytest.raises(error, match=words):
        DAL(**given)


def test_a_refused_group_changes_nothing_and_settings_are_checked_at_each_step() -> None:
    model = net()
    optimizer = DAL(model.parameters())
    with pytest.raises(ValueError, match="max_lr of parameter group 1"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "max_lr": -1.0})
    assert len(optimizer.param_groups) == 1
    before = values(model)
    optimizer.param_groups[0]["factor"] = -1.0
    with pytest.raises(ValueError, match="factor"):
        train(model, optimizer, range(1))
    assert same(values(model), before)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    before = table.weight.detach().clone()
    with pytest.raises((TypeError, RuntimeError)):
        DAL(table.parameters(), hvp="fd").step(lambda: table(torch.tensor([1, 2])).square().sum())
    assert torch.equal(table.weight.detach(), before)


@HVP
@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_continues_bit_for_bit(hvp: Any, through_file: bool) -> None:
    options: Any = {"p": 0.5, "momentum": 0.9, "factor": 0.5, "weight_decay": 0.01, "start": 1, "stop": 5, "hvp": hvp}
    whole, first, second = net(), net(), net()
    train(whole, DAL(whole.parameters(), **options), range(8))
    optimizer = DAL(first.parameters(), **options)
    train(first, optimizer, range(3))
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = DAL(second.parameters(), lr=0.7, hvp=hvp)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(3, 8))
    assert same(values(second), values(whole))


@pytest.mark.parametrize("how", ["lr", "shape", "foreign", "groups"])
def test_a_wrong_state_dict_changes_nothing(how: str) -> None:
    model = net()
    optimizer = DAL(model.parameters(), momentum=0.5)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    if how == "lr":
        saved["param_groups"][0]["lr"] = -1.0
    elif how == "shape":
        saved["state"][0]["momentum_buffer"] = torch.zeros(3)
    elif how == "foreign":
        saved = torch.optim.SGD(model.parameters()).state_dict()
    else:
        saved["param_groups"].append(saved["param_groups"][0])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"lr|shape|group"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how: str) -> None:
    model = net()
    optimizer = DAL(model.parameters(), p=0.5, momentum=0.5, nonfinite="ignore", foreach=False)
    train(model, optimizer, range(2))
    copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
    twin, other = copied((model, optimizer))
    assert (other.nonfinite, other.foreach, other.hvp) == ("ignore", False, "exact")
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert same(values(model), values(twin))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_scale_the_adapted_rate(name: str, tensor_lr: bool) -> None:
    x = Parameter(torch.ones(6, dtype=torch.float64))
    lr: Any = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    optimizer = DAL([x], lr, max_lr=1.0)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(6):
        factor = float(optimizer.param_groups[0]["lr"]) / 0.1
        optimizer.step(lambda: (SPECTRUM * x * x).sum() / 2)
        assert optimizer.last_lr is not None and optimizer.last_curvature is not None
        assert float(optimizer.last_lr) == pytest.approx(factor * min(2 / float(optimizer.last_curvature), 1.0))
        scheduler.step()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_zero_learning_rate_moves_nothing(lr: Any, p: float) -> None:
    model = net()
    before = values(model)
    train(model, DAL(model.parameters(), lr, p=p, momentum=0.5, weight_decay=0.1), range(2))
    assert same(values(model), before)


@HVP
def test_p_zero_is_plain_gradient_descent_without_second_derivatives(hvp: Any) -> None:
    model, other = net(torch.float64), net(torch.float64)
    calls: list[int] = []
    optimizer, sgd = DAL(model.parameters(), 0.2, p=0.0, hvp=hvp), torch.optim.SGD(other.parameters(), 0.2)
    for step in range(3):
        optimizer.step(lambda step=step: calls.append(step) or loss_of(model, step))
        sgd.zero_grad()
        loss_of(other, step).backward()
        sgd.step()
    assert calls == [0, 1, 2] and optimizer.last_curvature is None
    close(model, other)


def test_the_window_counts_from_one_and_leaves_out_both_ends() -> None:
    rates = quadratic(6, lr=0.01, start=2, stop=5)[0]
    assert [rate == pytest.approx(0.01) for rate in rates] == [True, True, False, False, True, True]


def test_groups_have_their_own_rates_from_one_common_curvature() -> None:
    a, b, c = (Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    settings: list[dict[str, Any]] = [
        {"params": [a]},
        {"params": [b], "max_lr": 0.01},
        {"params": [c], "p": 0.0, "lr": 0.3},
    ]
    optimizer = DAL(settings)
    optimizer.step(lambda: (a**2).sum() + 3 * (b**2).sum() + (c**2).sum())
    g, Hg = torch.tensor([2.0, 6, 2]), torch.tensor([4.0, 36, 4])
    assert optimizer.last_lr is not None
    expected = [2 * float(g.norm() / Hg.norm()), 0.01, 0.3]
    assert optimizer.last_lr.tolist() == pytest.approx(expected)
    for parameter, gradient, rate in zip((a, b, c), g.tolist(), expected, strict=True):
        assert float(parameter[0].detach()) == pytest.approx(1 - rate * gradient)


def test_maximize_climbs() -> None:
    model, other = net(torch.float64), net(torch.float64)
    up, down = DAL(model.parameters(), maximize=True), DAL(other.parameters())
    up.step(lambda: -loss_of(model))
    down.step(lambda: loss_of(other))
    close(model, other)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


def test_operations_without_second_derivative_fall_back_with_one_warning() -> None:
    a, b = (Parameter(torch.linspace(0.1, 1, 5, dtype=torch.float64)) for _ in range(2))
    optimizer, differences = DAL([a]), DAL([b], hvp="fd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(lambda: Once.apply(a).square().sum())  # type: ignore[union-attr]
            differences.step(lambda: b.sin().square().sum())
    assert [("twice" in str(w.message)) for w in caught] == [True]
    torch.testing.assert_close(a, b)


def test_dropout_sees_the_same_mask_in_both_evaluations_and_the_generator_goes_on_once() -> None:
    drop, results = nn.Dropout(0.5), {}
    for hvp in ("exact", "fd"):
        w = Parameter(torch.ones(64, dtype=torch.float64))
        optimizer = DAL([w], hvp=hvp)  # type: ignore[arg-type]
        torch.manual_seed(3)
        for _ in range(2):
            optimizer.step(lambda w=w: drop(w).square().sum())
        results[hvp] = (w.detach().clone(), torch.rand(1))
    torch.testing.assert_close(results["fd"][0], results["exact"][0])
    assert torch.equal(results["fd"][1], results["exact"][1])


def test_batch_norm_in_train_mode_counts_a_batch_once_with_exact_products() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    DAL(model.parameters()).step(lambda: model(randn(6, 4, dtype=torch.float64)).square().mean())
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[arg-type]


def test_shared_and_noncontiguous_parameters() -> None:
    first = nn.Linear(4, 4, bias=False).double()
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 4, bias=False).double())
    model[2].weight = first.weight
    shared, clone = randn(4, 4, dtype=torch.float64), randn(4, 4, dtype=torch.float64)
    first.weight.data = shared
    w = Parameter(clone.t().contiguous().t())
    assert not w.is_contiguous()
    x = randn(5, 4, dtype=torch.float64)
    one, other = DAL(model.parameters(), momentum=0.5), DAL([w], momentum=0.5)
    for _ in range(3):
        one.step(lambda: model(x).square().mean())
        other.step(lambda: ((x @ w.T).tanh() @ w.T).square().mean())
    torch.testing.assert_close(first.weight, w)
    assert not w.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    w = Parameter(torch.full((4, 4), 0.5, dtype=dtype))
    optimizer = DAL([w], factor=1.0, momentum=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(lambda: w.float().square().sum())
    assert w.dtype == dtype and bool(w.isfinite().all()) and float(w.detach().float().abs().max()) < 0.1
    assert optimizer.last_lr is not None and optimizer.last_lr.dtype == torch.float32


def test_autocast_in_the_closure_and_a_gradient_scaler() -> None:
    model = net()
    optimizer = DAL(model.parameters(), p=0.5, factor=1.0)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model)

    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert losses[-1] < losses[0]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer)


def test_no_graph_is_left_behind() -> None:
    model = net()
    optimizer = DAL(model.parameters())
    kept = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            kept.append(optimizer.step(lambda: loss_of(model)))
        assert all(loss.grad_fn is None for loss in kept)
        assert gc.collect() == 0 or not any(isinstance(x, Tensor) for x in gc.garbage)
    finally:
        gc.enable()
    assert all(p.grad is not None and not p.grad.requires_grad for p in model.parameters())


def test_hooks_closures_and_names() -> None:
    model, order = net(), []
    optimizer = DAL(model.named_parameters())
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    calls: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(loss_of(model))
        return calls[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert order == ["pre", "post"] and len(calls) == 1
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    optimizer.zero_grad()
    assert next(model.parameters()).grad is None
    with contextlib.suppress(AttributeError):
        repr(optimizer).index("factor")


def test_a_step_without_the_check_reads_nothing_from_the_device() -> None:
    """Tensors on the device "meta" have no numbers to read."""
    w, v = (Parameter(torch.ones(shape, device="meta")) for shape in ((4, 3), (4,)))

    def closure() -> Tensor:
        return (w.sin() @ torch.ones(3, device="meta") * v).square().sum()

    optimizer = DAL([w, v], momentum=0.5, weight_decay=0.1, nonfinite="ignore", factor=1.0)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")  # the constructor reads it once
    for _ in range(2):
        optimizer.step(closure)
    assert optimizer.last_lr is not None and optimizer.last_lr.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        DAL([w, v]).step(closure)


def test_groups_added_late_and_parameters_that_pause() -> None:
    a, b = (Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = DAL([a], momentum=0.5, start=2)
    optimizer.step(lambda: torch.sum(a**2))
    optimizer.add_param_group({"params": [b], "lr": 0.0, "p": 0.0})
    optimizer.step(lambda: (a**2).sum() + (b**2).sum())
    assert torch.equal(b.detach(), torch.ones(2, dtype=torch.float64)) and optimizer.param_groups[1]["iteration"] == 2
    optimizer.param_groups[1]["lr"] = 0.1
    before = a.detach().clone()
    optimizer.step(lambda: torch.sum(b**2))  # a has no gradient: it stays, and so does its momentum
    assert torch.equal(a.detach(), before) and torch.equal(b.detach(), torch.full((2,), 0.8, dtype=torch.float64))


def test_state_moves_to_another_dtype_and_foreach_setting() -> None:
    first, second = net(), net(torch.float64)
    optimizer = DAL(first.parameters(), momentum=0.5, foreach=False)
    train(first, optimizer, range(2))
    second.load_state_dict(first.state_dict())
    resumed = DAL(second.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert all(state["momentum_buffer"].dtype == torch.float64 for state in resumed.state.values())
    train(second, resumed, range(2, 4))
    assert resumed.param_groups[0]["iteration"] == 4


def test_one_cycle_moves_the_momentum_and_leaves_the_cap() -> None:
    x = Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = DAL([x], momentum=0.9, max_lr=0.3)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    momenta = []
    for _ in range(6):
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step(lambda: (SPECTRUM * x * x).sum() / 2)
        scheduler.step()
    assert min(momenta) < 0.6 and optimizer.param_groups[0]["lr_cap"] == 0.3


def test_huge_finite_gradients_are_finite() -> None:
    for dtype, size in ((torch.float16, 3e4), (torch.bfloat16, 1e15), (torch.float32, 1e15)):
        w = Parameter(torch.ones(6, dtype=dtype))
        DAL([w], 0.0).step(lambda w=w, size=size: (w * size).sum())
        assert bool(w.isfinite().all())
