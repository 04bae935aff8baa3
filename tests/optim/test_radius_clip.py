"""RadiusClip around any optimizer: the radius is kept, and the optimizer stays what it is."""

import copy
import io
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from steepest.curvature.step_radius import step_radius
from steepest.loop import branch
from steepest.models import GPT, MLP, GPTConfig
from steepest.optim import Mixed, Muon, RadiusClip, RadiusSGD, RandomLayers, build


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(dtype: torch.dtype = torch.float64) -> MLP:
    return MLP([6, 12, 12, 4], activation="gelu", generator=rng(), dtype=dtype)


X = torch.randn(32, 6, dtype=torch.float64, generator=rng(1))
Y = torch.randint(4, (32,), generator=rng(2))


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rows = torch.randperm(32, generator=rng(step))[:8]
    return X[rows].to(dtype), Y[rows]


def backward(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def true_ratio(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    old = dict(before.named_parameters())
    update = {name: value.detach() - old[name].detach() for name, value in after.named_parameters()}
    return step_radius(before, x, update).ratio


INNER: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "sgd": lambda m, lr: SGD(m.parameters(), lr=lr, momentum=0.9),
    "adam": lambda m, lr: Adam(m.parameters(), lr=lr),
    "adamw fused": lambda m, lr: AdamW(m.parameters(), lr=lr, fused=True),
    "muon": lambda m, lr: Mixed({
        "matrices": Muon([p for p in m.parameters() if p.ndim == 2], lr=lr),
        "rest": SGD([p for p in m.parameters() if p.ndim < 2], lr=lr),
    }),
    "build muon": lambda m, lr: build(m, "muon", lr=lr),
    "random layers": lambda m, lr: RandomLayers(SGD(m.parameters(), lr=lr), m),
}  # fmt: skip
every_inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER.keys())


@every_inner
@pytest.mark.parametrize("lr", [1e-3, 3.0, 1e4])
@pytest.mark.parametrize("r_max", [0.5, 1.0])
def test_the_step_stays_within_the_radius(make: Any, lr: float, r_max: float) -> None:
    model = net()
    optimizer = RadiusClip(make(model, lr), model, r_max)
    for step in range(4):
        before = copy.deepcopy(model)
        backward(model, step)
        optimizer.step()
        r = true_ratio(before, model, batch(step)[0])
        assert r <= r_max * (1 + 1e-9)
        assert optimizer.last_r == pytest.approx(r, rel=1e-6)
        if optimizer.last_scale < 1:
            assert r == pytest.approx(r_max, rel=1e-9)


@every_inner
def test_a_short_step_is_the_optimizers_own_bit_for_bit(make: Any) -> None:
    model, other = net(), net()
    optimizer, plain = RadiusClip(make(model, 1e-4), model, 1e6), make(other, 1e-4)
    train(model, optimizer, range(3))
    train(other, plain, range(3))
    assert optimizer.clipped_steps == 0
    for a, b in zip(values(model), values(other), strict=True):
        assert torch.equal(a, b)


def test_no_logit_gap_changes_by_more_than_pi() -> None:
    """With logits linear in the parameters, the bottleneck's changes by just that."""
    model = nn.Linear(6, 4).double()
    optimizer = RadiusClip(SGD(model.parameters(), lr=100.0), model)
    before = model(X).detach()
    cross_entropy(model(X), Y).backward()
    optimizer.step()
    change = model(X).detach() - before
    assert float((change.amax(-1) - change.amin(-1)).max()) == pytest.approx(math.pi, rel=1e-9)


def test_sgd_direction_does_not_depend_on_the_scale_of_the_loss() -> None:
    ends = []
    for scale in (1.0, 1e3):
        model = net()
        optimizer = RadiusClip(SGD(model.parameters(), lr=1e3), model)
        (scale * cross_entropy(model(X), Y)).backward()
        optimizer.step()
        ends.append(torch.cat([p.flatten() for p in values(model)]))
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("known", [True, False])
def test_differences_agree_with_jvp_in_float32(known: bool) -> None:
    x, y = X.float(), Y
    for lr in (1e-3, 10.0):
        model, other = net(torch.float32), net(torch.float32)
        fd = RadiusClip(Adam(model.parameters(), lr=lr), model, method="fd", samples=None if known else x.clone())
        jvp = RadiusClip(Adam(other.parameters(), lr=lr), other, method="jvp", samples=x)
        for _ in range(5):
            other.load_state_dict(model.state_dict())
            for m, o in ((model, fd), (other, jvp)):
                o.zero_grad()
                cross_entropy(m(x), y).backward()
                o.step()
            assert fd.last_proposed_r == pytest.approx(jvp.last_proposed_r, rel=3e-3)
            assert jvp.last_r <= 1 + 1e-6
        assert fd.meter.base_known is (True if known else None)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.3, self.training))


@pytest.mark.parametrize("method", ["jvp", "fd"])
def test_train_mode_and_buffers_survive(method: Any) -> None:
    ends = []
    for clip in (True, False):
        torch.manual_seed(0)
        model = Dropping()
        optimizer: Optimizer = SGD(model.parameters(), lr=0.01)
        if clip:
            optimizer = RadiusClip(optimizer, model, 1e6, method=method)
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(model(X.float()), Y).backward()
            optimizer.step()
        assert all(module.training for module in model.modules())
        ends.append(model.state_dict())
        if clip:
            assert optimizer.meter.base_known is not True  # type: ignore[attr-defined]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def gpt() -> GPT:
    return GPT(GPTConfig(vocab_size=17, context=8, layers=1, heads=2, width=16), generator=rng())


@pytest.mark.parametrize("targets", [True, False])
def test_sequences_and_models_that_return_their_loss(targets: bool) -> None:
    tokens = torch.randint(17, (6, 9), generator=rng(3))
    x, y = tokens[:, :-1], tokens[:, 1:]
    for options in ({}, {"samples": lambda: x}, {"samples": (x, y)}, {"method": "jvp"}):
        model = gpt()
        optimizer = RadiusClip(Adam(model.parameters(), lr=1.0), model, **options)  # type: ignore[arg-type]
        for _ in range(3):
            optimizer.zero_grad()
            before = copy.deepcopy(model)
            loss = model(x, y) if targets else cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            assert true_ratio(before, model, x) == pytest.approx(1.0, rel=5e-3)
        if options == {}:
            assert optimizer.meter.base_known is True
            assert optimizer.meter.watch.logits_module == ("head" if targets else "")


def test_part_of_the_batch() -> None:
    model = gpt()
    x = torch.randint(17, (6, 8), generator=rng(3))
    optimizer = RadiusClip(SGD(model.parameters(), lr=1e3), model, max_samples=20)
    before = copy.deepcopy(model)
    model(x).logsumexp(-1).sum().backward()
    optimizer.step()
    assert true_ratio(before, model, x[:2]) == pytest.approx(1.0, rel=5e-3)  # 2 sequences of 8 are at most 20


def test_accumulated_batches_are_all_measured() -> None:
    model = net()
    optimizer = RadiusClip(SGD(model.parameters(), lr=1e3), model)
    before = copy.deepcopy(model)
    for part, labels in zip(X.split(8), Y.split(8), strict=True):
        cross_entropy(model(part), labels).backward()
    with torch.no_grad():
        model(100 * X)  # looking at the model is not training it
    optimizer.step()
    assert true_ratio(before, model, X) == pytest.approx(1.0, rel=1e-9)


def test_zero_grad_between_forward_and_backward() -> None:
    model = net()
    optimizer = RadiusClip(SGD(model.parameters(), lr=1e3), model)
    loss = cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert optimizer.clipped_steps == 1


def test_logits_changed_after_the_forward_are_not_taken_for_the_base() -> None:
    """Written into, or of parameters that have moved since."""
    x = X.float()
    for meddle in ("logits", "parameters"):
        model, other = net(torch.float32), net(torch.float32)
        optimizer = RadiusClip(SGD(model.parameters(), lr=1e-2), model)
        jvp = RadiusClip(SGD(other.parameters(), lr=1e-2), other, method="jvp")
        for _ in range(3):
            for m, o in ((model, optimizer), (other, jvp)):
                o.zero_grad()
                z = m(x)
                if meddle == "logits":
                    z = z.mul_(0.5)
                cross_entropy(z, Y).backward()
                if meddle == "parameters":
                    with torch.no_grad():
                        m.layers[0].weight.mul_(1.01)
                o.step()
            assert optimizer.last_r == pytest.approx(jvp.last_r, rel=5e-3)


def test_refresh_limits_the_steps_between() -> None:
    model = net()
    inner = SGD(model.parameters(), lr=1e-2)
    optimizer = RadiusClip(inner, model, every=5, safety=0.5)
    train(model, optimizer, range(1))
    rho = optimizer.last_rho
    train(model, optimizer, range(1, 3))
    assert optimizer.last_rho == rho
    assert optimizer.clipped_steps == optimizer.late_steps == 0
    inner.param_groups[0]["lr"] = 1e4  # a spike between measurements
    before = values(model)
    train(model, optimizer, range(3, 4))
    length = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(values(model), before, strict=True)))
    assert length == pytest.approx(0.5 * rho, rel=1e-6)
    assert optimizer.clipped_steps == 1
    inner.param_groups[0]["lr"] = 1e-2
    train(model, optimizer, range(4, 6))
    assert optimizer.last_rho != rho


def test_refresh_catches_a_gradient_that_jumps() -> None:
    model = net()
    optimizer = RadiusClip(SGD(model.parameters(), lr=1e-2), model, every=100)
    train(model, optimizer, range(3))
    rho, before = optimizer.last_rho, values(model)
    backward(model, 3)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= 1e6
    optimizer.step()
    length = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(values(model), before, strict=True)))
    assert length == pytest.approx(0.5 * rho, rel=1e-6)
    assert optimizer.late_steps == 0


class Jumping(SGD):
    """Takes one step that nothing announces."""

    jump = 1.0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad *= self.jump
        return super().step(closure)


def test_a_late_step_is_counted_and_followed_by_a_measurement() -> None:
    model = net()
    inner = Jumping(model.parameters(), lr=1e-3)
    optimizer = RadiusClip(inner, model, every=100)
    train(model, optimizer, range(3))
    rho, inner.jump = optimizer.last_rho, 1e6
    train(model, optimizer, range(3, 4))
    assert optimizer.late_steps == 1
    inner.jump = 1.0
    train(model, optimizer, range(4, 5))
    assert optimizer.last_rho != rho


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("at", [2, 4])
def test_resume_is_bit_exact(every: int, dtype: torch.dtype, at: int) -> None:
    def make(model: nn.Module) -> RadiusClip:
        return RadiusClip(Adam(model.parameters(), lr=0.3), model, every=every)

    whole, first, second = net(dtype), net(dtype), net(dtype)
    optimizer = make(whole)
    train(whole, optimizer, range(8))
    early = make(first)
    train(first, early, range(at))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": early.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    late = make(second)
    late.load_state_dict(saved["optimizer"])
    train(second, late, range(at, 8))
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(second), strict=True))
    assert late.state_dict()["radius_clip"] == optimizer.state_dict()["radius_clip"]


def test_state_dicts_move_between_the_optimizer_and_its_clip() -> None:
    model = net()
    plain = Adam(model.parameters(), lr=0.1)
    train(model, plain, range(2))
    clip = RadiusClip(Adam(model.parameters()), model)
    clip.load_state_dict(plain.state_dict())
    assert clip.param_groups[0]["lr"] == 0.1
    train(model, clip, range(2, 4))
    other = Adam(model.parameters())
    other.load_state_dict(clip.state_dict())
    train(model, other, range(4, 5))
    with pytest.raises(ValueError, match="group"):
        clip.load_state_dict({**clip.state_dict(), "param_groups": []})


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how: str) -> None:
    model = net()
    optimizer = RadiusClip(Adam(model.parameters(), lr=1.0), model)
    train(model, optimizer, range(2))
    both = (model, optimizer)
    twin, other = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert other.meter.function.model is twin
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(twin), strict=True))


def test_schedulers_see_the_optimizers_groups() -> None:
    model, other = net(), net()
    optimizer = RadiusClip(SGD(model.parameters(), lr=0.1, momentum=0.9), model, 1e6)
    plain = SGD(other.parameters(), lr=0.1, momentum=0.9)
    one, two = (lr_scheduler.OneCycleLR(o, 0.2, total_steps=8) for o in (optimizer, plain))
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        train(other, plain, range(step, step + 1))
        one.step()
        two.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))


def test_closures_hooks_and_lbfgs() -> None:
    model = net()
    optimizer = RadiusClip(torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4), model)
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))

    def closure() -> Tensor:
        model.zero_grad()
        loss = cross_entropy(model(X), Y)
        loss.backward()
        return loss

    first = float(closure())
    before = copy.deepcopy(model)
    assert float(optimizer.step(closure)) == pytest.approx(first)
    assert true_ratio(before, model, X) <= 1 + 1e-9
    assert order == ["pre", "post"]


def test_autocast_and_grad_scaler() -> None:
    model = net(torch.float32)
    optimizer = RadiusClip(AdamW(model.parameters(), lr=10.0, fused=True), model, method="jvp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(X.float()).float(), Y)
            scaler.scale(loss).backward()
            if step == 2:
                next(model.parameters()).grad[0] = math.inf  # type: ignore[index]
            scaler.step(optimizer)
        scaler.update()
        r = true_ratio(before, model, X.float())
        assert r == 0 if step == 2 else r == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = RadiusClip(SGD(model.parameters(), lr=30.0), model)
    for step in range(3):
        before = copy.deepcopy(model).float()
        backward(model, step)
        optimizer.step()
        assert optimizer.last_scale < 1
        wide = copy.deepcopy(model).float()
        assert true_ratio(before, wide, batch(step)[0].float()) == pytest.approx(1, rel=0.05)


def test_unusual_parameters() -> None:
    """Frozen, unused, not contiguous, shared, outside of the model."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6).double() for _ in range(3))
            self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.b.weight = self.a.weight
            self.c.weight.data = self.c.weight.data.t()
            self.a.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).tanh()).tanh())

    model, outside = Odd(), nn.Parameter(torch.ones((), dtype=torch.float64))
    frozen = model.a.bias.clone()
    optimizer = RadiusClip(SGD([*model.parameters(), outside], lr=1e3), model)
    before = copy.deepcopy(model)
    (cross_entropy(model(X), Y) * outside).backward()
    optimizer.step()
    assert torch.equal(model.a.bias, frozen)
    assert not model.c.weight.is_contiguous()
    assert model.b.weight is model.a.weight
    assert float(outside) != 1
    assert true_ratio(before, model, X) == pytest.approx(1, rel=1e-9)


def test_groups_added_late_are_measured() -> None:
    model = net()
    optimizer = RadiusClip(SGD(model.layers[0].parameters(), lr=1e3), model)
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": list(model.layers[2].parameters())})
    before = copy.deepcopy(model)
    train(model, optimizer, range(1, 2))
    assert true_ratio(before, model, batch(1)[0]) == pytest.approx(1, rel=1e-9)


def test_a_step_that_moves_no_logit_passes() -> None:
    model = nn.Linear(3, 4).double()
    nn.init.zeros_(model.weight)
    optimizer = RadiusClip(SGD(model.parameters(), lr=1e6), model)
    z = model(torch.ones(2, 3, dtype=torch.float64))
    z.sum().backward()
    model.weight.grad = None  # only the biases move, all alike
    optimizer.step()
    assert optimizer.last_scale == 1
    assert optimizer.last_r == pytest.approx(0, abs=1e-6)
    assert float(model.bias.abs().max()) > 1e5
    optimizer.zero_grad()
    model(torch.ones(2, 3, dtype=torch.float64))
    optimizer.step()  # nothing has a gradient
    assert optimizer.last_r == 0


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_gradients(every: int, closure: bool, value: float) -> None:
    for policy in ("raise", "skip"):
        model = net()
        inner = Adam(model.parameters())
        optimizer = RadiusClip(inner, model, every=every, nonfinite=policy)  # type: ignore[arg-type]
        train(model, optimizer, range(2))
        before, steps = values(model), float(inner.state[next(model.parameters())]["step"])

        def spoiled(model: nn.Module = model) -> Tensor:
            loss = backward(model, 2)
            list(model.parameters())[2].grad[1, 1] = value  # type: ignore[index]
            return loss

        def go(optimizer: RadiusClip = optimizer, spoiled: Any = spoiled) -> None:
            if closure:
                optimizer.step(spoiled)
            else:
                spoiled()
                optimizer.step()

        if policy == "raise":
            with pytest.raises(FloatingPointError, match=r"layers\.1\.weight"):
                go()
        else:
            go()
            assert optimizer.skipped_steps == 1
        assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
        assert float(inner.state[next(model.parameters())]["step"]) == steps
        train(model, optimizer, range(3, 5))


def test_a_step_that_is_not_finite_is_taken_back() -> None:
    model = net()
    optimizer = RadiusClip(SGD(model.parameters(), lr=math.inf), model)
    before = values(model)
    with pytest.raises(FloatingPointError, match="as they were"):
        train(model, optimizer, range(1))
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_no_samples_known() -> None:
    model = net()
    optimizer = RadiusClip(SGD(model.parameters(), lr=0.1), model)
    model.eval()
    cross_entropy(model(X), Y).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match="samples"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r_max": 0.0}, ValueError, "r_max"),
        ({"r_max": "one"}, TypeError, "r_max"),
        ({"every": 0}, ValueError, "every"),
        ({"every": 1.5}, TypeError, "every"),
        ({"safety": 1.5}, ValueError, "safety"),
        ({"method": "exact"}, ValueError, "method"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"reduce": "none"}, ValueError, "reduce"),
        ({"max_samples": 0}, ValueError, "max_samples"),
        ({"nonfinite": "warn"}, ValueError, "nonfinite"),
        ({"samples": X[:0]}, ValueError, "at least one sample"),
        ({"logits": 3}, TypeError, "logits"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = net()
    with pytest.raises(error, match=words):
        RadiusClip(SGD(model.parameters(), lr=0.1), model, **options)


def test_wrong_models_and_optimizers() -> None:
    model, other = net(), net()
    inner = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        RadiusClip(inner, other)
    with pytest.raises(TypeError, match="Optimizer"):
        RadiusClip(model, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already"):
        RadiusClip(RadiusClip(inner, model), model)
    with pytest.raises(TypeError, match="complex"):
        weight = nn.Linear(2, 2, dtype=torch.complex64)
        RadiusClip(SGD(weight.parameters(), lr=0.1), weight)
    one = nn.Linear(6, 1).double()
    optimizer = RadiusClip(SGD(one.parameters(), lr=0.1), one)
    one(X).sum().backward()
    with pytest.raises(ValueError, match="two classes"):
        optimizer.step()


def test_quantile_and_temperature_lengthen_the_step() -> None:
    found = {}
    for name, options in {"max": {}, "quantile": {"reduce": 0.5}, "temperature": {"temperature": 3.0}}.items():
        model = net()
        optimizer = RadiusClip(SGD(model.parameters(), lr=1e3), model, **options)
        train(model, optimizer, range(1))
        found[name] = optimizer.last_rho
    assert found["quantile"] > found["max"]
    assert found["temperature"] == pytest.approx(3 * found["max"])


def test_hooks_leave_with_the_optimizer() -> None:
    model = net()
    optimizer = RadiusClip(SGD(model.parameters(), lr=0.1), model)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    del optimizer
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_compiled_models() -> None:
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = RadiusClip(SGD(model.parameters(), lr=1e3), compiled)  # pyright: ignore[reportArgumentType]
    for step in range(2):
        before = copy.deepcopy(model)
        x, y = batch(step)
        optimizer.zero_grad()
        cross_entropy(compiled(x), y).backward()
        optimizer.step()
        assert true_ratio(before, model, x) == pytest.approx(1, rel=1e-9)


def ddp_worker(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = RadiusClip(SGD(model.parameters(), lr=1e3), wrapped, nonfinite="skip")
    ratios = []
    for step in range(3):
        before = copy.deepcopy(model)
        x, y = batch(10 * step + rank)
        optimizer.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        if step == 2 and rank == 0:
            x.fill_(math.nan)  # only this rank meets NaN when it measures
        optimizer.step()
        ratios.append(true_ratio(before, model, x) if step < 2 else 0.0)
    torch.save((values(model), ratios, optimizer.skipped_steps), f"{path}.{rank}")
    torch.distributed.destroy_process_group()
    os._exit(0)


def test_all_ranks_take_the_same_step(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=ddp_worker, args=(rank, str(tmp_path / "ddp"))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    (a, one, skipped), (b, two, also) = (torch.load(tmp_path / f"ddp.{rank}", weights_only=True) for rank in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert skipped == also == 1
    for pair in zip(one[:2], two[:2], strict=True):
        assert max(pair) == pytest.approx(1, rel=1e-9)


# RadiusSGD


@pytest.mark.parametrize("r", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_radius_sgd_steps_are_r_radii_long(r: float, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = RadiusSGD(model.parameters(), model, r=r, weight_decay=5e-4)
    for step in range(4):
        before = copy.deepcopy(model)
        backward(model, step)
        optimizer.step()
        tolerance = 1e-6 if dtype == torch.float64 else 5e-3
        assert true_ratio(before, model, batch(step, dtype)[0]) == pytest.approx(r, rel=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.5, "dampening": 0.5},
        {"momentum": 0.9, "maximize": True},
    ],
)
def test_radius_sgd_follows_sgd(options: dict[str, Any]) -> None:
    """The same steps as torch's SGD whose learning rate is set to each step's."""
    model, other = net(), net()
    optimizer = RadiusSGD(model.parameters(), model, r=0.7, **options)
    plain = SGD(other.parameters(), lr=1.0, **options)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        plain.param_groups[0]["lr"] = optimizer.last_lr
        train(other, plain, range(step, step + 1))
        for a, b in zip(values(model), values(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_radius_sgd_resumes_and_is_scheduled() -> None:
    whole, part = net(torch.float32), net(torch.float32)
    first = RadiusSGD(whole.parameters(), whole)
    train(whole, first, range(2))
    part.load_state_dict(whole.state_dict())
    second = RadiusSGD(part.parameters(), part, r=3.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(whole, first, range(2, 5))
    train(part, second, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(part), strict=True))
    scheduler = lr_scheduler.LinearLR(first, 0.1, total_iters=3)
    train(whole, first, range(5, 6))
    scheduler.step()
    assert first.last_r == pytest.approx(0.1)


def test_radius_sgd_refuses_and_skips() -> None:
    model = net()
    for options, error in (({"r": -1.0}, ValueError), ({"momentum": 1.0}, ValueError), ({"nesterov": 1}, TypeError)):
        with pytest.raises(error):
            RadiusSGD(model.parameters(), model, **options)
    with pytest.raises(ValueError, match="none of"):
        RadiusSGD(net().parameters(), model)
    optimizer = RadiusSGD(model.parameters(), model)
    backward(model, 0)
    next(model.parameters()).grad[0, 0] = math.nan  # type: ignore[index]
    before = values(model)
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    skipping = RadiusSGD(model.parameters(), model, nonfinite="skip")
    skipping.step()
    assert skipping.skipped_steps == 1


def test_radius_sgd_learns() -> None:
    model = net()
    optimizer = RadiusSGD(model.parameters(), model, r=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert float(cross_entropy(model(X), Y)) < 0.3


def test_the_state_of_sgd_gives_momentum_and_leaves_the_ratio() -> None:
    plain, model = net(), net()
    sgd = SGD(plain.parameters(), lr=0.03, momentum=0.8)
    for step in range(2):
        sgd.zero_grad()
        backward(plain, step)
        sgd.step()
    radius = RadiusSGD(model.parameters(), model, r=0.5)
    radius.load_state_dict(sgd.state_dict())
    assert radius.param_groups[0]["lr"] == 0.5 and radius.param_groups[0]["momentum"] == 0.8
    first = next(iter(model.parameters()))
    torch.testing.assert_close(
        radius.state[first]["momentum_buffer"], next(iter(sgd.state.values()))["momentum_buffer"]
    )
    again = RadiusSGD(model.parameters(), model, r=2.0)
    again.load_state_dict(radius.state_dict())
    assert again.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("on_wrapper", [True, False])
def test_a_run_under_the_controller_can_branch(on_wrapper: bool) -> None:
    model = net()
    inner = Adam(model.parameters(), lr=0.3)
    clip = RadiusClip(inner, model, every=2)
    scheduler = lr_scheduler.StepLR(clip if on_wrapper else inner, 2, gamma=0.5)
    run: dict[str, Any] = {"model": model, "optimizer": clip, "scheduler": scheduler}

    def train(state: dict[str, Any], steps: range) -> list[Tensor]:
        for step in steps:
            state["optimizer"].zero_grad()
            backward(state["model"], step)
            state["optimizer"].step()
            state["scheduler"].step()
        return [p.detach().clone() for p in state["model"].parameters()]

    here = train(run, range(3))
    ends = train(branch(run), range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(here, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ends, train(run, range(3, 7)), strict=True))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("given", [False, True])
def test_large_logits_in_float32_are_measured_right(scale: float, given: bool) -> None:
    model, x = net(torch.float32), X.float()
    with torch.no_grad():
        list(model.parameters())[-2].mul_(scale)
    clip = RadiusClip(SGD(model.parameters(), lr=1e3), model, samples=x.clone() if given else None)
    for _ in range(2):
        before = copy.deepcopy(model).double()
        clip.zero_grad()
        cross_entropy(model(x), Y).backward()
        clip.step()
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    step = [new.detach().double() - old.detach() for new, old in pairs]
    assert step_radius(before, X, step).ratio == pytest.approx(clip.last_r, rel=0.01)
    assert clip.clipped_steps == 2
