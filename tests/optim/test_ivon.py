"""IVON: its equations, and the blocks in which weights are sampled."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steepest.optim import IVON, VariationalSGD

A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0], dtype=torch.float64)
X = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
Y = torch.arange(20) % 3


def vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
    return model


def collect(optimizer: Any, model: nn.Module, noise: Any = None) -> None:
    with optimizer.sampled_params(train=True, noise=noise):
        optimizer.zero_grad()
        cross_entropy(model(X.to(next(model.parameters()).dtype)), Y).backward()


def train(optimizer: Any, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        for _ in range(optimizer.samples):
            collect(optimizer, model)
        optimizer.step()


def ivon(model: nn.Module, **options: Any) -> IVON:
    return IVON(model.parameters(), **{"lr": 0.2, "ess": 50.0, "hess_init": 0.5, "betas": (0.8, 0.95), **options})


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_worked_example() -> None:
    w = vector(1.0, -0.5)
    optimizer = IVON([w], lr=0.1, ess=100, hess_init=0.5, betas=(0.9, 0.99), weight_decay=0.01, samples=2)
    expected = {
        ((0.5, -1.0), (-0.3, 0.8)): ((0.8483292931, -0.5979923362), (0.5071617334, 0.5005588775)),
        ((1.2, 0.1), (-0.7, -0.4)): ((0.7326396331, -0.6792779752), (0.5518592893, 0.4923162755)),
    }
    for draws, (mean, hess) in expected.items():
        for draw in draws:
            with optimizer.sampled_params(train=True, noise=[torch.tensor(draw, dtype=torch.float64)]):
                optimizer.zero_grad()
                (0.5 * w @ A @ w - B @ w).backward()
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor(mean, dtype=torch.float64), rtol=0, atol=5e-11)
        torch.testing.assert_close(
            optimizer.state[w]["hess"], torch.tensor(hess, dtype=torch.float64), rtol=0, atol=5e-11
        )


def reference(
    w: Tensor, draws: list[list[Tensor]], gradient: Callable[[Tensor], Tensor], o: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The equations, one line each."""
    h, g, m = torch.full_like(w, o["hess_init"]), torch.zeros_like(w), w.clone()
    (b1, b2), delta, ess = o["betas"], o["weight_decay"], o["ess"]
    sign = -1 if o["maximize"] else 1
    for t, step in enumerate(draws, 1):
        noise = [n / (ess * (h + delta)).sqrt() for n in step]
        each = [sign * gradient(m + e) for e in noise]
        mean = torch.stack(each).mean(0)
        if o["hessian"] == "price":
            estimate = torch.stack([a * e for a, e in zip(each, noise, strict=True)]).mean(0) * ess * (h + delta)
        else:
            estimate = ess * torch.stack([a * a for a in each]).mean(0)
        g = b1 * g + (1 - b1) * mean
        average = g / (1 - b1**t) if o["debias"] else g
        h = b2 * h + (1 - b2) * estimate + 0.5 * (1 - b2) ** 2 * (h - estimate) ** 2 / (h + delta)
        rate = o["lr"] * (o["hess_init"] + delta) if o["rescale_lr"] else o["lr"]
        m = m - rate * ((average + delta * m) / (h + delta)).clamp(-o["clip"], o["clip"])
    return m, h


@pytest.mark.parametrize(
    ("hessian", "debias", "rescale_lr", "clip", "maximize", "samples"),
    list(itertools.product(["price", "gradsq"], [True, False], [True, False], [math.inf, 0.3], [False, True], [1, 3])),
)
def test_steps_follow_the_equations(
    hessian: Any, debias: bool, rescale_lr: bool, clip: float, maximize: bool, samples: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [[torch.randn(2, generator=generator, dtype=torch.float64) for _ in range(samples)] for _ in range(6)]
    options: dict[str, Any] = {
        "lr": 0.1, "ess": 30.0, "hess_init": 0.7, "betas": (0.8, 0.9), "weight_decay": 0.02, "hessian": hessian,
        "debias": debias, "rescale_lr": rescale_lr, "clip": clip, "maximize": maximize,
    }  # fmt: skip
    w = vector(1.0, -0.5)
    wanted, hess = reference(w.detach(), draws, lambda x: A @ x - B, options)
    optimizer = IVON([w], **options, samples=samples)
    for step in draws:
        for draw in step:
            with optimizer.sampled_params(train=True, noise=[draw]):
                optimizer.zero_grad()
                (0.5 * w @ A @ w - B @ w).backward()
        optimizer.step()
    torch.testing.assert_close(w.detach(), wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(optimizer.state[w]["hess"], hess, rtol=1e-11, atol=1e-12)


@given(
    gradient=st.floats(-1e6, 1e6), hess=st.floats(1e-6, 1e3), delta=st.sampled_from([0.0, 1e-4, 10.0]),
    beta2=st.floats(0, 1), draw=st.floats(-4, 4), hessian=st.sampled_from(["price", "gradsq"]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_precision_never_falls_below_half(
    gradient: float, hess: float, delta: float, beta2: float, draw: float, hessian: Any
) -> None:
    w = vector(0.3)
    optimizer = IVON([w], 0.1, 10.0, hess_init=hess, betas=(0.0, beta2), weight_decay=delta, hessian=hessian)
    noise = torch.tensor([draw])
    with optimizer.sampled_params(train=True, noise=[noise]):
        kept = w.detach().clone()
        w.grad = torch.tensor([gradient], dtype=torch.float64)
    optimizer.step()
    new = float(optimizer.state[w]["hess"]) + delta
    assert new >= 0.5 * (hess + delta) * (1 - 1e-12)
    if hessian == "price":
        x = (1 - beta2) * (10.0 * (hess + delta) * gradient * (float(kept) - 0.3) - hess) / (hess + delta)
        assert new == pytest.approx((hess + delta) * (1 + x + x * x / 2), rel=1e-9)
    else:
        assert float(optimizer.state[w]["hess"]) >= 0


def test_the_hessian_estimate_is_unbiased_on_a_quadratic() -> None:
    w = vector(0.7, -0.2)
    optimizer = IVON([w], 0.0, 20.0, hess_init=1.0, betas=(0.0, 0.0), weight_decay=0.5, samples=1)
    estimates = []
    for _ in range(2000):
        optimizer.state.clear()
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (0.5 * w @ A @ w - B @ w).backward()
            noise = w.detach() - torch.tensor([0.7, -0.2], dtype=torch.float64)
        assert w.grad is not None
        estimates.append(w.grad * noise * 20 * 1.5)
        optimizer.step()
        # beta2 = 0: h' = estimate + (1 - estimate)^2 / (2 * 1.5)
        torch.testing.assert_close(optimizer.state[w]["hess"], estimates[-1] + (1 - estimates[-1]) ** 2 / 3)
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - A.diagonal()).abs() < 4 * error).all())


def test_beta2_of_one_keeps_the_curvature_and_gives_variational_sgd() -> None:
    first, second = net(), net()
    a = ivon(first, betas=(0.0, 1.0), weight_decay=0.0, ess=80.0, generator=torch.Generator().manual_seed(3))
    sigma = 1 / math.sqrt(80 * 0.5)
    b = VariationalSGD(second.parameters(), lr=0.2, sigma=sigma, generator=torch.Generator().manual_seed(3))
    train(a, first, 5)
    train(b, second, 5)
    for mine, theirs in zip(values(first), values(second), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    assert all(bool((state["hess"] == 0.5).all()) for state in a.state.values())


def test_blocks_restore_the_mean_bit_for_bit() -> None:
    model = net(dtype=torch.float32)
    optimizer = ivon(model)
    train(optimizer, model, 2)
    before, saved = values(model), optimizer.state_dict()
    kept = [{k: v.clone() for k, v in s.items()} for s in saved["state"].values()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    for _ in range(3):
        with optimizer.sampled_params():
            assert not any(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
        assert same(values(model), before)
    for name, old in saved["param_groups"][0].items():
        assert name == "params" or old == optimizer.param_groups[0][name]
    assert all(same(list(a.values()), list(s.values())) for a, s in zip(kept, optimizer.state.values(), strict=True))
    assert same(gradients, [parameter.grad for parameter in model.parameters()])  # type: ignore[misc]
    with pytest.raises(KeyError), optimizer.sampled_params(train=True):
        raise KeyError
    assert same(values(model), before)
    assert optimizer.collected == 0


def test_predictions_do_not_change_training() -> None:
    first, second = net(), net()
    a, b = ivon(first), ivon(second)
    for _ in range(3):
        train(a, first, 1)
        train(b, second, 1)
        b.predict(lambda: second(X), 3)
        b.sample()
        collect(b, second)
        with b.sampled_params():
            pass
        b.step()
        train(a, first, 1)
    assert same(values(first), values(second))


def test_predictions_after_a_resume_are_those_of_the_whole_run() -> None:
    model = net()
    optimizer = ivon(model, generator=torch.Generator().manual_seed(1))
    train(optimizer, model, 2)
    other = net(1)
    resumed = ivon(other)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(optimizer.predict(lambda: model(X), 4), resumed.predict(lambda: other(X), 4))


def test_prediction_averages_probabilities_over_the_posterior() -> None:
    model = net()
    optimizer = ivon(model)
    train(optimizer, model, 3)
    found = optimizer.predict(lambda: model(X), 5, generator=torch.Generator().manual_seed(1))
    generator, total = torch.Generator().manual_seed(1), torch.zeros(20, 3, dtype=torch.float64)
    for _ in range(5):
        draw = optimizer.sample(generator)
        named = dict(zip(dict(model.named_parameters()), draw, strict=True))
        total += torch.func.functional_call(model, named, (X,)).softmax(-1) / 5
    torch.testing.assert_close(found, total.detach())
    assert not found.requires_grad
    raw = optimizer.predict(lambda: model(X), 2, softmax=False)
    assert raw.shape == (20, 3)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        optimizer.predict(lambda: model(X), 0)


def test_samples_have_the_posterior_deviation() -> None:
    w = nn.Parameter(torch.linspace(-1, 1, 200_000, dtype=torch.float64))
    optimizer = IVON([w], 0.1, 400.0, hess_init=0.25, weight_decay=0.75)
    (std,) = optimizer.posterior_std()
    assert torch.equal(std, torch.full_like(std, 1 / 20))
    draw = optimizer.sample()[0] - w.detach()
    assert float(draw.std()) == pytest.approx(1 / 20, rel=0.01)
    assert abs(float(draw.mean())) < 5e-4
    other = optimizer.sample()[0] - w.detach()
    assert abs(float(torch.corrcoef(torch.stack([draw, other]))[0, 1])) < 0.01
    assert not optimizer.state


def test_step_with_a_closure_takes_all_samples() -> None:
    first, second = net(), net()
    a, b = ivon(first, samples=3), ivon(second, samples=3)
    train(a, first, 2)
    seen: list[float] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        b.zero_grad()
        loss = cross_entropy(second(X), Y)
        loss.backward()
        seen.append(float(loss.detach()))
        return loss

    with torch.no_grad():
        for _ in range(2):
            loss = b.step(closure)
    assert len(seen) == 6
    assert float(loss) == pytest.approx(sum(seen[3:]) / 3)
    assert same(values(first), values(second))


def test_samples_need_no_zero_grad_between_them() -> None:
    first, second = net(), net()
    a, b = ivon(first, samples=2), ivon(second, samples=2)
    train(a, first, 1)
    for _ in range(2):
        with b.sampled_params(train=True):
            cross_entropy(second(X), Y).backward()
    b.step()
    assert same(values(first), values(second))
    assert all(parameter.grad is not None for parameter in second.parameters())


def test_given_gradients_stay_as_they_are() -> None:
    w, gradient = vector(1.0, 2.0), torch.tensor([3.0, -1.0], dtype=torch.float64)
    optimizer = IVON([w], 0.1, 10.0, samples=3)
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            w.grad = gradient
    assert gradient.tolist() == [3.0, -1.0]
    assert w.grad is not None and w.grad.tolist() == pytest.approx([3.0, -1.0])
    optimizer.step()
    assert gradient.tolist() == [3.0, -1.0]


def test_gradients_accumulate_inside_a_block() -> None:
    first, second = net(), net()
    a, b = ivon(first), ivon(second)
    train(a, first, 1)
    with b.sampled_params(train=True):
        for half in (slice(0, 10), slice(10, 20)):
            (cross_entropy(second(X[half]), Y[half]) / 2).backward()
    b.step()
    for mine, theirs in zip(values(first), values(second), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_antithetic_noise_comes_in_pairs() -> None:
    w = vector(*range(50))
    optimizer = IVON([w], 0.1, 10.0, samples=4, antithetic=True)
    mean, seen = w.detach().clone(), []
    for _ in range(4):
        with optimizer.sampled_params(train=True):
            seen.append(w.detach() - mean)
            (w @ w).backward()
    torch.testing.assert_close(seen[0], -seen[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(seen[2], -seen[3], rtol=0, atol=1e-13)
    assert float((seen[0] - seen[2]).abs().max()) > 0.1
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 2 * mean, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"samples must be even .*3"):
        IVON([w], 0.1, 10.0, samples=3, antithetic=True)


def test_wrong_use_of_blocks_is_named() -> None:
    model = net()
    optimizer = ivon(model)
    before = values(model)
    with pytest.raises(RuntimeError, match="no sample was collected"):
        optimizer.step()
    with optimizer.sampled_params(train=True):
        cross_entropy(model(X), Y).backward()
        for call in (
            optimizer.step,
            optimizer.discard,
            lambda: optimizer.load_state_dict(optimizer.state_dict()),
            lambda: optimizer.add_param_group({"params": [vector(1.0)]}),
            lambda: optimizer.sampled_params().__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"block|sample"):
                call()
    with pytest.raises(RuntimeError, match=r"all samples \(1\)"), optimizer.sampled_params(train=True):
        pass
    with pytest.raises(RuntimeError, match=r"closure.*1 samples"):
        optimizer.step(lambda: 0)
    optimizer.discard()
    with pytest.raises(RuntimeError, match="no sample"):
        optimizer.step()
    optimizer.zero_grad()
    with optimizer.sampled_params(train=True):
        pass
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step()
    assert same(values(model), before)
    two = ivon(model, samples=2)
    collect(two, model)
    with pytest.raises(RuntimeError, match="1 of 2 samples"):
        two.step()
    with pytest.raises(ValueError, match="shapes"), two.sampled_params(train=True, noise=[torch.zeros(2)]):
        pass
    with pytest.raises(ValueError, match="generator"), two.sampled_params(train=True, generator=torch.Generator()):
        pass
    assert same(values(model), before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ess": 0.0}, ValueError, r"ess .*0\.0"),
        ({"ess": -3.0}, ValueError, r"ess .*-3"),
        ({"ess": math.inf}, ValueError, r"ess .*inf"),
        ({"hess_init": 0.0}, ValueError, r"hess_init .*0\.0"),
        ({"hess_init": -1.0}, ValueError, r"hess_init .*-1"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay .*-0\.1"),
        ({"clip": 0.0}, ValueError, r"clip .*0\.0"),
        ({"clip": -1.0}, ValueError, r"clip .*-1"),
        ({"samples": 0}, ValueError, r"samples .*0"),
        ({"samples": 1.5}, TypeError, r"samples .*1\.5"),
        ({"betas": (0.9, 1.1)}, ValueError, r"betas .*1\.1"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"betas .*-0\.1"),
        ({"betas": 0.9}, TypeError, r"betas .*0\.9"),
        ({"lr": -1.0}, ValueError, r"lr .*-1"),
        ({"lr": "fast"}, TypeError, r"lr .*fast"),
        ({"hessian": "exact"}, ValueError, r"hessian .*exact"),
        ({"debias": 1}, TypeError, r"debias .*1"),
        ({"rescale_lr": "no"}, TypeError, r"rescale_lr .*no"),
        ({"nonfinite": "warn"}, ValueError, r"nonfinite .*warn"),
        ({"maximize": 1}, TypeError, r"maximize .*1"),
        ({"foreach": 3}, TypeError, r"foreach .*3"),
        ({"generator": 3}, TypeError, r"generator .*int"),
        ({"antithetic": "yes"}, TypeError, r"antithetic .*yes"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ivon(net(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_parameters_that_noise_does_not_fit_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype).split(".")[1]):
        IVON([nn.Parameter(torch.zeros(3, dtype=dtype))], 0.1, 10.0)


def test_a_model_turned_to_half_precision_is_refused_before_anything_changes() -> None:
    model = net(dtype=torch.float32)
    optimizer = ivon(model)
    train(optimizer, model, 1)
    model.bfloat16()
    before = values(model)
    with pytest.raises(TypeError, match="bfloat16"), optimizer.sampled_params(train=True):
        pass
    assert same(values(model), before)


def test_unused_and_frozen_parameters() -> None:
    used, unused, frozen = vector(1.0, 2.0), vector(3.0, 4.0), vector(5.0, 6.0).requires_grad_(False)
    empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    optimizer = IVON([used, unused, frozen, empty], 0.1, 10.0, weight_decay=0.1, betas=(0.9, 0.9))
    zero = [torch.zeros(2), torch.zeros(2), torch.zeros(0, 3)]
    for _ in range(2):
        with optimizer.sampled_params(train=True, noise=zero):
            optimizer.zero_grad()
            (used @ used).backward()
        optimizer.step()
    same_with_zero = vector(3.0, 4.0)
    other = IVON([same_with_zero], 0.1, 10.0, weight_decay=0.1, betas=(0.9, 0.9))
    for _ in range(2):
        with other.sampled_params(train=True, noise=[torch.zeros(2)]):
            same_with_zero.grad = torch.zeros(2, dtype=torch.float64)
        other.step()
    assert torch.equal(unused.detach(), same_with_zero.detach())
    assert frozen.tolist() == [5.0, 6.0]
    assert frozen not in optimizer.state
    with optimizer.sampled_params():
        assert frozen.tolist() == [5.0, 6.0]
        assert used.tolist() != [1.0, 2.0]
    used.requires_grad_(False)  # a parameter that was trained keeps its posterior
    before = used.tolist()
    with optimizer.sampled_params():
        assert used.tolist() != before
    with pytest.raises(RuntimeError, match="no parameter requires"):
        unused.requires_grad_(False)
        empty.requires_grad_(False)
        with optimizer.sampled_params(train=True):
            pass


def test_unused_parameters_of_several_samples_count_as_zero() -> None:
    w, other = vector(1.0, 2.0), vector(3.0, 4.0)
    optimizer = IVON([w, other], 0.1, 10.0, samples=2, weight_decay=0.0)
    mean = w.detach().clone()
    with optimizer.sampled_params(train=True, noise=[torch.ones(2), torch.zeros(2)]):
        (w @ w).backward()
        noisy = w.detach().clone()
    with optimizer.sampled_params(train=True, noise=[torch.ones(2), torch.zeros(2)]):
        other.sum().backward()
    assert w.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(w.grad, noisy)  # (2 noisy + 0) / 2
    torch.testing.assert_close(other.grad, torch.full((2,), 0.5, dtype=torch.float64))
    optimizer.step()
    assert not torch.equal(w.detach(), mean)


def test_freezing_between_the_samples_of_a_step_is_refused() -> None:
    model = net()
    optimizer = ivon(model, samples=2)
    collect(optimizer, model)
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad"):
        collect(optimizer, model)


def test_tied_transposed_and_channels_last_parameters_step_like_plain_ones() -> None:
    plain = nn.Conv2d(2, 4, 3).double()
    twisted = nn.Conv2d(2, 4, 3).double()
    twisted.load_state_dict(plain.state_dict())
    twisted.weight = nn.Parameter(twisted.weight.detach().clone(memory_format=torch.channels_last))
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) for p in plain.parameters()]
    for model in (plain, twisted):
        optimizer = ivon(model)
        for _ in range(2):
            with optimizer.sampled_params(train=True, noise=noise):
                optimizer.zero_grad()
                model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(values(plain), values(twisted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    tied[1].weight = tied[0].weight
    optimizer = ivon(tied)
    with optimizer.sampled_params(train=True):
        tied(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert tied[1].weight is tied[0].weight


@pytest.mark.parametrize("samples", [1, 2])
def test_large_parameters_are_cut_into_pieces_and_step_alike(samples: int) -> None:
    torch.manual_seed(0)
    big = torch.randn(300, 500, dtype=torch.float64)
    noise = [torch.randn(300, 500, dtype=torch.float64) for _ in range(samples)]
    found = []
    for layout in (big, big.t().contiguous().t()):
        w = nn.Parameter(layout.clone(memory_format=torch.preserve_format))
        optimizer = IVON([w], 0.1, 10.0, samples=samples, betas=(0.9, 0.9))
        for draw in noise:
            with optimizer.sampled_params(train=True, noise=[draw]):
                w.square().mean().backward()
        optimizer.step()
        found.append(w.detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)


def test_parameters_of_mixed_dtypes_go_together() -> None:
    single, double = nn.Parameter(torch.ones(3)), vector(1.0, 2.0)
    alone = vector(1.0, 2.0)
    both, one = IVON([single, double], 0.1, 50.0), IVON([alone], 0.1, 50.0)
    noise = torch.tensor([0.3, -0.7], dtype=torch.float64)
    with both.sampled_params(train=True, noise=[torch.ones(3), noise]):
        (single.square().sum().double() + double.square().sum()).backward()
    with one.sampled_params(train=True, noise=[noise]):
        alone.square().sum().backward()
    both.step()
    one.step()
    assert torch.equal(double.detach(), alone.detach())
    assert (single.dtype, both.state[single]["hess"].dtype) == (torch.float32, torch.float32)
    assert [std.dtype for std in both.posterior_std()] == [torch.float32, torch.float64]


def test_groups_and_a_setting_made_wrong_later() -> None:
    model = net()
    optimizer = IVON(
        [
            {"params": model[0].parameters(), "ess": 10.0, "hess_init": 2.0},
            {"params": model[2].parameters(), "lr": 0.0},
        ],
        lr=0.1,
        ess=1000.0,
        hess_init=0.5,
        weight_decay=0.0,
    )
    std = optimizer.posterior_std()
    assert float(std[0].mean()) == pytest.approx(20**-0.5)
    assert float(std[2].mean()) == pytest.approx(500**-0.5)
    before = values(model)
    train(optimizer, model, 2)
    assert not torch.equal(model[0].weight.detach(), before[0])
    assert torch.equal(model[2].weight.detach(), before[2])
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    optimizer.param_groups[1]["ess"] = -1.0
    with pytest.raises(ValueError, match=r"ess of parameter group 1 .*-1"), optimizer.sampled_params(train=True):
        pass
    optimizer.param_groups[1]["ess"] = 10.0
    with pytest.raises(ValueError, match="hess_init"):
        optimizer.add_param_group({"params": [vector(1.0)], "hess_init": -1.0})
    assert len(optimizer.param_groups) == 2
    train(optimizer, model, 1)


@pytest.mark.parametrize("samples", [1, 3])
def test_clipping_of_one_sample_reaches_gradient_and_curvature(samples: int) -> None:
    first, second = net(), net()
    a, b = ivon(first, samples=samples), ivon(second, samples=samples)
    for _ in range(samples):
        collect(a, first)
        collect(b, second)
    total = nn.utils.clip_grad_norm_(first.parameters(), 1e-3)
    assert float(total) > 1e-3
    a.step()
    b.step()
    assert not same(values(first), values(second))
    unchanged = [torch.equal(s["hess"], t["hess"]) for s, t in zip(a.state.values(), b.state.values(), strict=True)]
    assert all(unchanged) == (samples > 1)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("hessian", ["price", "gradsq"])
def test_gradient_scaler(samples: int, hessian: Any) -> None:
    first, second = net(dtype=torch.float32), net(dtype=torch.float32)
    a, b = ivon(first, samples=samples, hessian=hessian), ivon(second, samples=samples, hessian=hessian)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = X.float()
    for _ in range(3):
        for _ in range(samples):
            with a.sampled_params(train=True):
                a.zero_grad()
                scaler.scale(cross_entropy(first(x), Y)).backward()
            collect(b, second)
        scaler.step(a)
        scaler.update()
        b.step()
    assert same(values(first), values(second))
    before = values(first)
    for _ in range(samples):
        with a.sampled_params(train=True):
            a.zero_grad()
            scaler.scale(cross_entropy(first(x), Y) * math.inf).backward()
    scaler.step(a)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert same(values(first), before)
    assert a.collected == 0
    for _ in range(samples):
        with a.sampled_params(train=True):
            a.zero_grad()
            scaler.scale(cross_entropy(first(x), Y)).backward()
        collect(b, second)
    scaler.unscale_(a)
    if samples == 1:
        scaler.step(a)
    else:
        with pytest.raises(RuntimeError, match="unscale_"):
            scaler.step(a)


def test_huge_gradients_leave_a_finite_state() -> None:
    w = nn.Parameter(torch.ones(4))
    optimizer = IVON([w], 0.1, 1e6, betas=(0.9, 0.5))
    for gradient in (1e30, 1.0):
        with optimizer.sampled_params(train=True):
            w.grad = torch.full((4,), gradient)
        optimizer.step()
        assert bool(optimizer.state[w]["hess"].isfinite().all())
        assert bool(w.isfinite().all())


def test_batch_norm_statistics_can_be_computed_anew() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer = ivon(model, ess=20.0)
    model.train()
    train(optimizer, model, 3)
    optimizer.update_bn(model, [(X, Y)])
    features = model[0](X).detach()
    torch.testing.assert_close(model[1].running_mean, features.mean(0))
    torch.testing.assert_close(model[1].running_var, features.var(0))
    before = values(model)
    optimizer.update_bn(model, [(X, Y)] * 3, sampled=True)
    assert float((model[1].running_mean - features.mean(0)).abs().max()) > 1e-6
    assert same(values(model), before)


def test_autograd_sees_a_backward_after_the_block() -> None:
    model = net()
    optimizer = ivon(model)
    with optimizer.sampled_params(train=True):
        loss = cross_entropy(model(X), Y)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_learning_a_known_posterior() -> None:
    """For a quadratic loss the posterior has the precisions of the diagonal of ess A + prior, and mean A^-1 b."""
    w = vector(0.0, 0.0)
    optimizer = IVON([w], 0.05, 50.0, hess_init=1.0, betas=(0.9, 0.995), weight_decay=0.0, samples=4)
    for _ in range(1500):
        for _ in range(4):
            with optimizer.sampled_params(train=True):
                (0.5 * w @ A @ w - B @ w).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.state[w]["hess"], A.diagonal(), rtol=0.2, atol=0)
    torch.testing.assert_close(w.detach(), torch.linalg.solve(A, B), rtol=0, atol=0.05)
