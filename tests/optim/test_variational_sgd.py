"""Variational gradient descent, and what PyTorch expects of the optimizers that sample their parameters."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from steepest.optim import IVON, VariationalSGD
from steepest.optim.noisy_descent import NoisyDescent

X = torch.randn(20, 5, generator=torch.Generator().manual_seed(5))
Y = torch.arange(20) % 3
Make = Callable[..., NoisyDescent]

OPTIMIZERS: dict[str, Make] = {
    "vgd": lambda p, **o: VariationalSGD(p, **{"lr": 0.2, "sigma": 0.05, **o}),
    "vgd momentum t": lambda p, **o: VariationalSGD(
        p, **{"lr": 0.2, "sigma": 0.05, "momentum": 0.8, "noise": "student_t", "dof": 3.0, "weight_decay": 0.1, **o}
    ),
    "vgd antithetic": lambda p, **o: VariationalSGD(
        p, **{"lr": 0.2, "sigma": 0.05, "antithetic": True, "samples": 4, **o}
    ),
    "ivon": lambda p, **o: IVON(p, **{"lr": 0.2, "ess": 100.0, "betas": (0.8, 0.95), **o}),
    "ivon gradsq": lambda p, **o: IVON(
        p, **{"lr": 0.2, "ess": 100.0, "betas": (0.8, 0.95), "hessian": "gradsq", "clip": 0.1, "samples": 2, **o}
    ),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
    return model


def collect(optimizer: NoisyDescent, model: nn.Module, factor: float = 1.0) -> None:
    for _ in range(optimizer.samples):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (cross_entropy(model(X.to(next(model.parameters()).dtype)), Y) * factor).backward()


def train(optimizer: NoisyDescent, model: nn.Module, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        collect(optimizer, model)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def snapshot(optimizer: NoisyDescent) -> Any:
    parameters = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(optimizer.state_dict()), parameters


def test_without_noise_it_is_gradient_descent() -> None:
    first, second = net(), net()
    a = VariationalSGD(first.parameters(), lr=0.3, sigma=0.0)
    b = torch.optim.SGD(second.parameters(), lr=0.3)
    for _ in range(4):
        train(a, first, 1)
        b.zero_grad()
        cross_entropy(second(X), Y).backward()
        b.step()
    assert same(values(first), values(second))


def test_on_a_linear_loss_it_is_gradient_descent_exactly() -> None:
    w, slope = vector(1.0, 2.0), torch.tensor([3.0, -1.0], dtype=torch.float64)
    optimizer = VariationalSGD([w], lr=0.1, sigma=0.7, samples=3)
    optimizer.step(lambda: (optimizer.zero_grad(), (w @ slope).backward()))
    assert torch.equal(w.detach(), torch.tensor([0.7, 2.1], dtype=torch.float64))


def test_more_samples_approach_the_smoothed_gradient() -> None:
    # E sin(w + sigma n) = sin(w) exp(-sigma^2 / 2)
    w = vector(*([0.9] * 20_000))
    optimizer = VariationalSGD([w], lr=1.0, sigma=0.8, samples=10)
    optimizer.step(lambda: (optimizer.zero_grad(), w.sin().sum().backward()))
    moved = 0.9 - w.detach()
    error = float(moved.std()) / 20_000**0.5
    assert float(moved.mean()) == pytest.approx(math.cos(0.9) * math.exp(-0.32), abs=4 * error)


@pytest.mark.parametrize("match", [False, True])
def test_student_t_noise(match: bool) -> None:
    w = vector(*([0.0] * 400_000))
    optimizer = VariationalSGD([w], 0.1, sigma=0.3, noise="student_t", dof=5.0, match_variance=match)
    draw = optimizer.sample()[0]
    wanted = 0.09 * (1 if match else 5 / 3)
    assert float(draw.square().mean()) == pytest.approx(wanted, rel=0.05)
    assert float(optimizer.posterior_std()[0][0]) == pytest.approx(wanted**0.5)
    scale = 0.3 * (math.sqrt(3 / 5) if match else 1.0)
    # quantiles of Student's t with 5 degrees of freedom
    for probability, quantile in ((0.75, 0.7267), (0.9, 1.4759), (0.99, 3.3649)):
        assert float((draw <= scale * quantile).double().mean()) == pytest.approx(probability, abs=0.003)
    heavy = VariationalSGD([w], 0.1, sigma=0.3, noise="student_t", dof=1.5)
    assert math.isinf(float(heavy.posterior_std()[0][0]))
    assert bool(heavy.sample()[0].isfinite().all())


def test_antithetic_noise_cancels_on_a_quadratic() -> None:
    w, other = vector(1.0, -2.0), vector(1.0, -2.0)
    a = VariationalSGD([w], 0.1, sigma=0.5, samples=2, antithetic=True)
    b = VariationalSGD([other], 0.1, sigma=0.0)
    for optimizer, x in ((a, w), (b, other)):
        for _ in range(3):
            optimizer.step(lambda o=optimizer, x=x: (o.zero_grad(), (x @ x).backward()))
    torch.testing.assert_close(w, other, rtol=0, atol=1e-14)


def test_momentum_and_decay() -> None:
    w = vector(1.0)
    optimizer = VariationalSGD([w], 0.1, sigma=0.2, momentum=0.5, weight_decay=0.3)
    average, mean = 0.0, 1.0
    for gradient in (2.0, -1.0, 0.5):
        with optimizer.sampled_params(train=True):
            w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        average = 0.5 * average + 0.5 * gradient
        mean = (1 - 0.03) * mean - 0.1 * average
        assert float(w.detach()) == pytest.approx(mean, rel=1e-14)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sigma": -0.1}, ValueError, r"sigma .*-0\.1"),
        ({"sigma": math.nan}, ValueError, "sigma .*nan"),
        ({"samples": 0}, ValueError, r"samples .*0"),
        ({"noise": "cauchy"}, ValueError, "noise .*cauchy"),
        ({"noise": "student_t", "dof": 2.0, "match_variance": True}, ValueError, r"dof .*2\.0"),
        ({"noise": "student_t", "dof": 0.0}, ValueError, r"dof .*0\.0"),
        ({"dof": -1.0}, ValueError, r"dof .*-1"),
        ({"match_variance": 1}, TypeError, "match_variance .*1"),
        ({"momentum": 1.0}, ValueError, r"momentum .*1\.0"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay .*-1"),
        ({"lr": torch.zeros(2)}, ValueError, r"lr .*\(2,\)"),
        ({"samples": 3, "antithetic": True}, ValueError, r"even .*3"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        VariationalSGD([vector(1.0)], **{"lr": 0.1, "sigma": 0.1, **options})


@every
@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_continues_bit_for_bit(make: Make, through_file: bool) -> None:
    whole, first, second = net(), net(), net(3)
    train(make(whole.parameters(), generator=torch.Generator().manual_seed(7)), whole, 6)
    optimizer = make(first.parameters(), generator=torch.Generator().manual_seed(7))
    train(optimizer, first, 3)
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = make(second.parameters(), lr=0.7)
    resumed.load_state_dict(saved["optimizer"])
    assert same(snapshot(resumed), snapshot(optimizer))
    train(resumed, second, 3)
    assert same(values(second), values(whole))


@every
def test_a_resume_in_the_middle_of_a_step_begins_the_step_anew(make: Make) -> None:
    first, second = net(), net()
    optimizer = make(first.parameters())
    train(optimizer, first, 2)
    with optimizer.sampled_params(train=True):
        cross_entropy(first(X), Y).backward()
    assert optimizer.collected == 1
    second.load_state_dict(first.state_dict())
    resumed = make(second.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.collected == 0
    train(resumed, second, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.collected == 0


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_alike(make: Make, how: str) -> None:
    model = net()
    optimizer = make(model.parameters())
    train(optimizer, model, 2)
    collect(optimizer, model)
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert other.collected == 0  # as torch copies no gradients
    optimizer.discard()
    train(optimizer, model, 2)
    assert not same(values(model), values(twin))
    train(other, twin, 2)
    assert same(values(twin), values(model))


@every
def test_foreach_settings_agree(make: Make) -> None:
    found = []
    for foreach in (None, True, False):
        model = net()
        optimizer = make(model.parameters(), foreach=foreach)
        train(optimizer, model, 3)
        other = make(model.parameters(), foreach=not foreach)
        other.load_state_dict(optimizer.state_dict())
        train(other, model, 3)
        found.append(values(model))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@every
def test_state_dict_moves_between_dtypes(make: Make) -> None:
    first, second = net(), net(dtype=torch.float64)
    optimizer = make(first.parameters())
    train(optimizer, first, 2)
    second.load_state_dict(first.state_dict())
    resumed = make(second.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert all(v.dtype == torch.float64 for s in resumed.state.values() for v in s.values())
    train(resumed, second, 2)
    first.double()
    train(optimizer, first, 2)
    assert all(bool(parameter.isfinite().all()) for parameter in values(first))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@every
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_set_what_the_step_uses(make: Make, schedule: Any, tensor_lr: bool) -> None:
    model, other = net(), net()
    lr: Any = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    optimizer, manual = make(model.parameters(), lr=lr), make(other.parameters(), lr=0.5)
    scheduler = schedule(optimizer)
    for _ in range(5):
        manual.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        train(optimizer, model, 1, scheduler)
        train(manual, other, 1)
    assert same(values(model), values(other))


def test_one_cycle_moves_beta1() -> None:
    model = net()
    optimizer = OPTIMIZERS["ivon"](model.parameters())
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["betas"][0])
        train(optimizer, model, 1, scheduler)
    assert min(seen) < 0.6 < max(seen)


@every
def test_hooks_and_names(make: Make) -> None:
    model, other = net(), net()
    optimizer = make(model.named_parameters())
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    train(optimizer, model, 1)
    assert order == ["pre", "post"]
    train(make(other.parameters()), other, 1)
    assert same(values(model), values(other))
    optimizer.register_state_dict_post_hook(lambda own, state: {"packed": state})
    resumed = make(other.named_parameters())
    resumed.register_load_state_dict_pre_hook(lambda own, state: state["packed"])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    train(optimizer, model, 2)
    train(resumed, other, 2)
    assert same(values(other), values(model))


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_nonfinite_gradients(make: Make, value: float, policy: str) -> None:
    model = net()
    optimizer = make(model.named_parameters(), nonfinite=policy)
    train(optimizer, model, 2)
    collect(optimizer, model)
    before = snapshot(optimizer)
    model[2].weight.grad[1, 1] = value  # type: ignore[index]
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"gradient of parameter 2\.weight .*nothing was changed"):
            optimizer.step()
        assert same(snapshot(optimizer), before)
    elif policy == "skip":
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert same(snapshot(optimizer)[1:], before[1:])
        assert same(snapshot(optimizer)[0]["state"], before[0]["state"])
    else:
        optimizer.step()
        return
    assert optimizer.collected == 0
    train(optimizer, model, 1)
    assert all(bool(p.isfinite().all()) for p in values(model))


@every
def test_sparse_gradients_are_refused_before_anything_changes(make: Make) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = make(table.parameters())
    before = values(table)
    with pytest.raises(TypeError, match="dense"), optimizer.sampled_params(train=True):
        table(torch.arange(3)).sum().backward()
    assert same(values(table), before)
    assert optimizer.collected == 0


@every
@pytest.mark.parametrize("how", ["groups", "count", "lr", "setting", "shape", "keys"])
def test_a_wrong_state_dict_changes_nothing(make: Make, how: str) -> None:
    model = net()
    optimizer = make(model.parameters())
    train(optimizer, model, 2)
    before, saved = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
    group = saved["param_groups"][0]
    if how == "groups":
        saved["param_groups"].append(copy.deepcopy(group))
    elif how == "count":
        group["params"] = group["params"][:-1]
    elif how == "lr":
        group["lr"] = float("nan")
    elif how == "setting":
        group["nonfinite"] = "sometimes"
    elif how == "shape":
        saved["state"][0] = {"momentum_buffer": torch.zeros(3, 3)}
    else:
        saved = {"weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"group|shape|param_groups|lr|nonfinite"):
        optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer), before)


@every
def test_late_groups_and_refused_groups(make: Make) -> None:
    model = net()
    parameters = list(model.parameters())
    optimizer = make(parameters[:2])
    train(optimizer, model, 1)
    for group in (
        {"params": [vector(1.0)], "lr": -1.0},
        {"params": [torch.zeros(2, dtype=torch.int64)]},
        {"params": [torch.zeros(2, dtype=torch.complex64)]},
        {"params": [torch.eye(2).to_sparse()]},
        {"params": [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]},
        {"params": [parameters[0]]},
    ):
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(dict(group))
        assert len(optimizer.param_groups) == 1
        assert same(snapshot(optimizer), before)
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.0})
    held = values(model)
    train(optimizer, model, 2)
    moved = [not torch.equal(a, b) for a, b in zip(values(model), held, strict=True)]
    assert moved[:2] == [True, True]
    if "weight_decay" not in optimizer.param_groups[1]:
        assert moved[2:] == [False, False]
    other = net()
    resumed = make([{"params": list(other.parameters())[:2]}, {"params": list(other.parameters())[2:]}])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, 2)
    train(resumed, other, 2)
    assert same(values(other), values(model))


@every
def test_autocast(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    for _ in range(optimizer.samples):
        with optimizer.sampled_params(train=True), torch.autocast("cpu", dtype=torch.bfloat16):
            cross_entropy(model(X).float(), Y).backward()
    optimizer.step()
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in values(model))


@every
def test_the_noise_follows_from_the_seed_alone(make: Make) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        model = net()
        state = torch.get_rng_state()
        train(make(model.parameters(), generator=torch.Generator().manual_seed(seed)), model, 2)
        assert torch.equal(state, torch.get_rng_state())
        found.append(values(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
