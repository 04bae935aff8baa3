"""What PyTorch expects of any optimizer, asked of all of ours. A new optimizer joins by a line in OPTIMIZERS."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from steepest.geometry import L1, MaxRow, Scaled, Spectral
from steepest.optim import WSDS, Joint, Muon, NormalizedDescent, Scion, Sharp, SignDescent, SteepestDescent

Make = Callable[..., Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "muon": Muon,
    "muon svd heavy ball": lambda p, **o: Muon(p, method="svd", momentum_form="heavy_ball", nesterov=False, **o),
    "scion": lambda p, **o: Scion(p, **{"lr": 1e-3, **o}),
    "scion constrained": lambda p, **o: Scion(p, radius=10.0, constrained=True, **{"lr": 1e-3, **o}),
    "lion": lambda p, **o: SignDescent(p, weight_decay=0.1, **o),
    "signum": lambda p, **o: SignDescent(p, interpolation=None, **o),
    "normalized": NormalizedDescent,
    "normalized over all": lambda p, **o: NormalizedDescent(p, scope="all", nesterov=True, **o),
    "steepest": SteepestDescent,
    "steepest sharp rows": lambda p, **o: SteepestDescent(
        p, norm=MaxRow(), step_rule=Sharp(), momentum=0.5, nesterov=True, **o
    ),
    "steepest joint l1": lambda p, **o: SteepestDescent(p, norm=L1(), step_rule=Joint(), momentum=0.5, **o),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
MATRICES_ONLY = {"muon", "muon svd heavy ball", "steepest sharp rows"}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A convolution and two linear layers of equal shape, no biases: every optimizer takes every parameter."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 8, bias=False), nn.Tanh())
    model.extend([nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False)])
    for index, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=index, dtype=dtype) / 4
    return model


def backward(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    loss = (model(randn(16, 2, 4, 4, seed=step, dtype=dtype)) - randn(16, 8, seed=step + 99, dtype=dtype)).square()
    loss.mean().backward()
    return loss.mean().detach()


def train(model: nn.Module, optimizer: Optimizer, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def snapshot(optimizer: Optimizer) -> Any:
    """Everything a step may change, copied."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    parameters = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
    state = [
        {k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else None
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return copy.deepcopy(groups), parameters, state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@every
def test_training_lowers_the_loss(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters(), lr=3e-3)
    first = backward(model, 0)
    for _ in range(20):
        backward(model, 0)
        optimizer.step()
    assert float(backward(model, 0)) < float(first)


@every
def test_zero_learning_rate_moves_nothing(make: Make) -> None:
    model = net()
    before = values(model)
    train(model, make(model.parameters(), lr=0.0), range(2))
    assert same(values(model), before)


@every
@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_continues_bit_for_bit(make: Make, through_file: bool) -> None:
    whole = net()
    train(whole, make(whole.parameters()), range(6))
    first, second = net(), net()
    optimizer = make(first.parameters())
    train(first, optimizer, range(3))
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = make(second.parameters(), lr=0.7)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert same(snapshot(resumed), snapshot(optimizer))
    train(second, resumed, range(3, 6))
    assert same(values(second), values(whole))


@every
@pytest.mark.parametrize(("saved", "loaded"), [(False, True), (True, False), (None, False)])
def test_state_dict_moves_between_foreach_settings(make: Make, saved: Any, loaded: Any) -> None:
    whole, first = net(torch.float64), net(torch.float64)
    optimizer = make(first.parameters(), foreach=saved)
    train(first, optimizer, range(3))
    resumed = make(first.parameters(), foreach=loaded)
    resumed.load_state_dict(optimizer.state_dict())
    train(first, resumed, range(3, 6))
    train(whole, make(whole.parameters()), range(6))
    for a, b in zip(values(first), values(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@every
def test_state_dict_moves_between_dtypes(make: Make) -> None:
    first, second = net(), net(torch.float64)
    optimizer = make(first.parameters())
    train(first, optimizer, range(3))
    second.load_state_dict(first.state_dict())
    resumed = make(second.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        if "momentum_buffer" in optimizer.state[a]:
            assert resumed.state[b]["momentum_buffer"].dtype == torch.float64
            assert torch.equal(resumed.state[b]["momentum_buffer"].float(), optimizer.state[a]["momentum_buffer"])
    train(second, resumed, range(3, 5))


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_state_dict_moves_between_devices(make: Make) -> None:
    whole, first = net(torch.float64), net(torch.float64)
    optimizer = make(first.parameters())
    train(first, optimizer, range(3))
    second = net(torch.float64).cuda()
    second.load_state_dict(first.state_dict())
    resumed = make(second.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        backward(first, step)
        for theirs, mine in zip(second.parameters(), first.parameters(), strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.cuda()
        optimizer.step()
        resumed.step()
        for theirs, mine in zip(second.parameters(), first.parameters(), strict=True):
            torch.testing.assert_close(theirs.detach().cpu(), mine.detach(), rtol=0, atol=1e-8)
    train(whole, make(whole.parameters()), range(6))


@every
def test_state_dict_is_a_copy_free_view_that_plain_tools_read(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert state["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert isinstance(state["param_groups"][0]["norm"], str)
    assert not isinstance(optimizer.param_groups[0]["norm"], Tensor)
    assert "norm" in repr(optimizer)


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_alike(make: Make, how: str) -> None:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    train(model, optimizer, range(3, 6))
    assert not same(values(twin), values(model))
    train(twin, other, range(3, 6))
    assert same(values(twin), values(model))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 2),
    "WSDS": lambda o: WSDS(o, (3, 6), decay=0.7),
}


@every
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_set_what_the_step_uses(make: Make, schedule: Any, tensor_lr: bool) -> None:
    """A scheduled run is the run whose groups are set by hand to the scheduler's numbers."""
    model, other = net(), net()
    lr: Any = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    optimizer, manual = make(model.parameters(), lr=lr), make(other.parameters(), lr=0.5)
    scheduler = schedule(optimizer)
    seen = set()
    for step in range(6):
        for key in ("lr", "momentum"):
            manual.param_groups[0][key] = float(optimizer.param_groups[0][key])
        seen.add(float(optimizer.param_groups[0]["lr"]))
        train(model, optimizer, range(step, step + 1), scheduler)
        train(other, manual, range(step, step + 1))
    assert len(seen) > 1
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@every
def test_one_cycle_moves_the_momentum(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    momenta = []
    for step in range(8):
        momenta.append(optimizer.param_groups[0]["momentum"])
        train(model, optimizer, range(step, step + 1), scheduler)
    assert max(momenta) == pytest.approx(0.9)
    assert min(momenta) < 0.6


@every
def test_reduce_on_plateau(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters(), lr=0.01)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@every
def test_closures_are_evaluated_with_gradients_and_returned(make: Make) -> None:
    model, other = net(), net()
    optimizer = make(model.parameters())
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(backward(model, 0))
        return calls[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    train(other, make(other.parameters()), range(1))
    assert same(values(model), values(other))
    backward(model, 1)
    assert optimizer.step() is None


@every
def test_groups_added_late_train_with_their_own_settings(make: Make) -> None:
    model, other = net(), net()
    parameters = list(model.parameters())
    optimizer = make(parameters[:2])
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.0, "momentum": 0.0})
    before = values(model)
    train(model, optimizer, range(2))
    assert not same(values(model)[:2], before[:2])
    assert same(values(model)[2:], before[2:])
    optimizer.param_groups[1]["lr"] = 0.1
    train(model, optimizer, range(2, 4))
    assert not same(values(model)[2:], before[2:])
    resumed = make([{"params": list(other.parameters())[:2]}, {"params": list(other.parameters())[2:]}])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as in torch, loading copies no tensor
    train(model, optimizer, range(4, 6))
    train(other, resumed, range(4, 6))
    assert same(values(other), values(model))


@every
@pytest.mark.parametrize(
    "group",
    [
        {"params": [Parameter(torch.zeros(2, 2))], "lr": -1.0},
        {"params": [Parameter(torch.zeros(2, 2))], "momentum": 1.0},
        {"params": [Parameter(torch.zeros(2, 2))], "norm": "nothing"},
        {"params": [Parameter(torch.zeros(2, 2)), torch.zeros(2, dtype=torch.int64)]},
        {"params": [torch.zeros(2, 2, dtype=torch.complex64)]},
        {"params": [torch.eye(2).to_sparse()]},
        {"params": [Parameter(torch.zeros(4, 2))], "split": (1, 1)},
        {"params": [Parameter(torch.zeros(2, 2)), 3.0]},
        {"params": [Parameter(torch.zeros(2, 2)) * 2]},
        {"params": {Parameter(torch.zeros(2, 2))}},
    ],
    ids=lambda group: str({k: v for k, v in group.items() if k != "params"} or type(group["params"]).__name__),
)
def test_a_refused_group_changes_nothing(make: Make, group: dict[str, Any]) -> None:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(1))
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1
    assert same(snapshot(optimizer), before)
    train(model, optimizer, range(1, 2))


@every
def test_a_parameter_joins_once(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [next(model.parameters())]})
    assert len(optimizer.param_groups) == 1


@every
def test_constructors_refuse_what_torch_refuses(make: Make) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        make(Parameter(torch.zeros(2, 2)))
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        make([1.0])
    with pytest.raises(ValueError, match="non-leaf"):
        make([Parameter(torch.zeros(2, 2)) * 2])


@every
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -0.1}, ValueError, r"lr .*-0\.1"),
        ({"lr": float("nan")}, ValueError, "lr .*nan"),
        ({"lr": "fast"}, TypeError, "lr .*'fast'"),
        ({"lr": True}, TypeError, "lr .*True"),
        ({"momentum": 1.5}, ValueError, r"momentum .*1\.5"),
        ({"momentum": -0.5}, ValueError, r"momentum .*-0\.5"),
        ({"nonfinite": "warn"}, ValueError, "nonfinite .*skip.*'warn'"),
        ({"maximize": "yes"}, TypeError, "maximize .*'yes'"),
        ({"foreach": 3}, TypeError, "foreach .*3"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(make: Make, options: Any, error: type[Exception], words: str) -> None:
    given = dict(options)
    momentum = given.pop("momentum", None)
    group: dict[str, Any] = {"params": [Parameter(torch.zeros(2, 2))]}
    if momentum is not None:
        group["momentum"] = momentum
    with pytest.raises(error, match=words):
        make([group], **given)


@every
def test_unused_frozen_and_empty_parameters(make: Make) -> None:
    unused, empty = (
        Parameter(torch.ones(3, 2)),
        [Parameter(torch.zeros(shape)) for shape in ((0, 3), (3, 0), (0, 2, 3))],
    )
    frozen, used = torch.ones(3, 2), Parameter(torch.ones(3, 2))
    optimizer = make([unused, *empty, frozen, used])
    optimizer.step()  # nothing has a gradient
    assert torch.equal(used.detach(), torch.ones(3, 2))
    used.grad = randn(3, 2)
    for parameter in empty:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3, 2))
    assert torch.equal(frozen, torch.ones(3, 2))
    assert not torch.equal(used.detach(), torch.ones(3, 2))
    assert unused not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    assert used.grad is None


@every
def test_a_parameter_may_start_late_and_pause(make: Make) -> None:
    a, b = Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2))
    optimizer = make([a, b])
    a.grad = randn(3, 2)
    optimizer.step()
    b.grad, a.grad = randn(3, 2, seed=1), None
    before = a.detach().clone()
    optimizer.step()
    assert torch.equal(a.detach(), before)
    assert not torch.equal(b.detach(), torch.ones(3, 2))


@every
def test_named_parameters(make: Make) -> None:
    model = net()
    optimizer = make(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    train(model, optimizer, range(2))
    other = net()
    train(other, make(other.parameters()), range(2))
    assert same(values(model), values(other))
    resumed = make(model.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert same(snapshot(resumed), snapshot(optimizer))


@every
def test_step_hooks(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    handle = optimizer.register_step_post_hook(lambda *_: order.append("post"))
    train(model, optimizer, range(1))
    handle.remove()
    train(model, optimizer, range(1))
    assert order == ["pre", "post", "pre"]


@every
def test_state_dict_hooks(make: Make) -> None:
    model, other = net(), net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    optimizer.register_state_dict_pre_hook(lambda own: own.param_groups[0].__setitem__("note", "kept"))

    def wrap(own: Optimizer, state: dict[str, Any]) -> None:
        state["extra"] = 3

    optimizer.register_state_dict_post_hook(wrap)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["note"] == "kept"
    assert saved["extra"] == 3
    loaded: list[str] = []
    resumed = make(other.parameters())
    resumed.register_load_state_dict_pre_hook(lambda own, state: {k: state["packed"][k] for k in state["packed"]})
    resumed.register_load_state_dict_post_hook(lambda own: loaded.append("done"))
    resumed.load_state_dict({"packed": copy.deepcopy(saved)})
    assert loaded == ["done"]
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    assert same(values(other), values(model))


@every
def test_profiler_sees_the_step(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    backward(model, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    assert any(event.key == name for event in profile.key_averages())


def broken(saved: dict[str, Any], how: str) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    group = saved["param_groups"][0]
    if how == "norm":
        group["norm"] = "Nuclear()"
    elif how == "no norm":
        del group["norm"]
    elif how == "groups":
        saved["param_groups"].append(copy.deepcopy(group))
    elif how == "count":
        group["params"] = group["params"][:-1]
    elif how == "lr":
        group["lr"] = float("nan")
    elif how == "setting":
        group["nonfinite"] = "sometimes"
    elif how == "split":
        group["split"] = (1, 2)
    elif how == "shape":
        saved["state"][0] = {"momentum_buffer": torch.zeros(3, 3)}
    elif how == "keys":
        saved = {"weight": torch.zeros(2)}
    return saved


@every
@pytest.mark.parametrize("how", ["norm", "no norm", "groups", "count", "lr", "setting", "split", "shape", "keys"])
def test_a_wrong_state_dict_changes_nothing(make: Make, how: str) -> None:
    model, other = net(), net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"norm|group|shape|param_groups|lr|nonfinite|split"):
        optimizer.load_state_dict(broken(optimizer.state_dict(), how))
    assert same(snapshot(optimizer), before)
    twin = make(other.parameters())
    train(other, twin, range(2))
    train(other, twin, range(2, 3))
    train(model, optimizer, range(2, 3))
    assert same(values(other), values(model))


@every
def test_state_of_contiguous_kernels_loads_into_channels_last(make: Make) -> None:
    whole, model = net(torch.float64), net(torch.float64)
    train(whole, make(whole.parameters()), range(5))
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    model.to(memory_format=torch.channels_last)
    resumed = make(model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed, range(2, 5))
    for a, b in zip(values(model), values(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_nonfinite_gradients(make: Make, value: float, policy: str) -> None:
    model = net()
    optimizer: Any = make(model.named_parameters(), nonfinite=policy)
    train(model, optimizer, range(2))
    backward(model, 2)
    list(model.parameters())[2].grad[3, 1] = value  # type: ignore[index]
    before = snapshot(optimizer)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"gradient of parameter 4\.weight .*nothing was changed"):
            optimizer.step()
        assert same(snapshot(optimizer), before)
    elif policy == "skip":
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert same(snapshot(optimizer)[1:], before[1:])
        resumed: Any = make(model.named_parameters())
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.skipped_steps == 1
    else:
        with contextlib.suppress(torch.linalg.LinAlgError):  # the SVD itself refuses such matrices
            optimizer.step()
        assert optimizer.skipped_steps == 0
        return
    train(model, optimizer, range(3, 4))
    assert all(bool(p.isfinite().all()) for p in values(model))


@every
def test_unnamed_parameters_are_numbered_in_errors(make: Make) -> None:
    parameters = [Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2))]
    parameters[1].grad = torch.full((3, 2), float("nan"))
    with pytest.raises(FloatingPointError, match=r"number 1 .*\(3, 2\)"):
        make(parameters).step()


@every
def test_huge_finite_gradients_are_not_called_nonfinite(make: Make) -> None:
    for dtype, size in ((torch.float16, 6e4), (torch.float32, 1e37), (torch.bfloat16, 1e37)):
        parameter = Parameter(torch.ones(6, 5, dtype=dtype))
        parameter.grad = torch.full((6, 5), size, dtype=dtype)
        make([parameter], lr=0.0).step()
        assert bool(parameter.isfinite().all())


@every
def test_sparse_gradients_are_refused_before_anything_is_changed(make: Make) -> None:
    dense, table = Parameter(torch.ones(5, 3)), Parameter(torch.ones(5, 3))
    optimizer = make([dense, table])
    dense.grad = randn(5, 3)
    table.grad = torch.eye(5, 3).to_sparse()
    with pytest.raises(TypeError, match=r"dense.*sparse"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(5, 3))
    assert not optimizer.state


@every
def test_a_setting_made_wrong_between_steps_is_named(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    backward(model, 0)
    optimizer.param_groups[0]["lr"] = -1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"lr .*-1"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(make: Make, dtype: torch.dtype) -> None:
    model = net(dtype)
    train(model, make(model.parameters()), range(3))
    assert all(parameter.dtype == dtype and bool(parameter.isfinite().all()) for parameter in values(model))


@every
def test_autocast_and_grad_scaler(make: Make) -> None:
    model, other = net(), net()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = make(other.parameters())
    for step in range(3):
        for module, own in ((model, optimizer), (other, plain)):
            own.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = module(randn(16, 2, 4, 4, seed=step)).float().square().mean()
            if module is model:
                scaler.scale(loss).backward()
                scaler.step(own)
                scaler.update()
            else:
                loss.backward()
                own.step()
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    before = values(model)
    scaler.scale(model(randn(16, 2, 4, 4)).square().mean()).backward()
    next(model.parameters()).grad[0] = float("inf")  # type: ignore[index]
    scaler.step(optimizer)
    scaler.update()
    assert same(values(model), before)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "eager") for name in OPTIMIZERS), ("muon", "aot_eager"), ("lion", "aot_eager")],
)
def test_compiled_steps_are_the_eager_ones(name: str, backend: str) -> None:
    torch._dynamo.reset()
    model, other = net(torch.float64), net(torch.float64)
    optimizer, eager = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    step = torch.compile(optimizer.step, backend=backend)
    for index in range(3):
        backward(model, index)
        step()
        backward(other, index)
        eager.step()
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_functions_in_a_norm_do_not_stop_a_new_process() -> None:
    """A function's address is no part of a saved norm."""
    parameters = [Parameter(torch.ones(3, 2))]
    first, second = (SteepestDescent(parameters, norm=Scaled(Spectral(), lambda shape: 2.0)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert "0x" not in first.state_dict()["param_groups"][0]["norm"]


@pytest.mark.parametrize("name", sorted(MATRICES_ONLY))
def test_matrix_norms_refuse_vectors_by_shape(name: str) -> None:
    with pytest.raises(ValueError, match=r"matrices.*\(7,\)"):
        OPTIMIZERS[name](nn.Linear(3, 7).parameters())


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - MATRICES_ONLY))
def test_entrywise_norms_take_vectors_and_scalars(name: str) -> None:
    parameters = [Parameter(torch.ones(shape)) for shape in ((7,), (), (3, 7), (7,))]
    optimizer = OPTIMIZERS[name](parameters)
    for step in range(2):
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(*parameter.shape, seed=10 * step + index)
        optimizer.step()
    assert all(bool(p.isfinite().all()) and not torch.equal(p, torch.ones_like(p)) for p in parameters)
