import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from steepest.optim.mixed import Mixed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def mixed(model: nn.Sequential, **options) -> Mixed:
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return Mixed(
        {
            "weights": torch.optim.SGD(weights, lr=0.1, momentum=0.9),
            "biases": torch.optim.AdamW([{"params": biases[:1], "lr": 0.02}, {"params": biases[1:]}], lr=0.01),
        },
        **options,
    )


def batches(steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(5, 4, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data, scheduler=None) -> None:
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_steps_equal_those_of_the_parts_alone():
    one, two = network(), network()
    train(one, mixed(one), batches(5))
    parts = list(mixed(two).parts.values())
    for x in batches(5):
        for part in parts:
            part.zero_grad()
        two(x).square().mean().backward()
        for part in parts:
            part.step()
    assert same(one, two)


def test_is_an_optimizer_with_the_parts_own_groups():
    optimizer = mixed(network())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert len(optimizer.param_groups) == 3
    assert optimizer.param_groups[0] is optimizer.parts["weights"].param_groups[0]
    optimizer.param_groups[2]["lr"] = 7.0
    assert optimizer.parts["biases"].param_groups[1]["lr"] == 7.0
    with pytest.raises(TypeError):
        optimizer.parts["new"] = optimizer  # type: ignore[index]
    with pytest.raises(AttributeError, match="add_param_group"):
        optimizer.param_groups = [{"params": []}]
    with pytest.raises(AttributeError, match="load_state_dict"):
        optimizer.state = {1: 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.02, 0.01], total_steps=8),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    ],
)
def test_schedulers_reach_every_part(make):
    model = network()
    optimizer = mixed(model)
    scheduler = make(optimizer)
    seen = []
    for x in batches(6):
        train(model, optimizer, [x], scheduler)
        seen.append([group["lr"] for part in optimizer.parts.values() for group in part.param_groups])
    assert seen[-1] == [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
    assert all(len({row[i] for row in seen}) > 1 for i in range(3))


def test_plateau_scheduler():
    optimizer = mixed(network())
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.005, 0.0025])


def test_one_cycle_cycles_the_momentum_of_the_parts_that_have_it():
    optimizer = mixed(network())
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8, max_momentum=0.8)
    assert optimizer.parts["weights"].param_groups[0]["momentum"] == 0.8
    both = Mixed({name: torch.optim.AdamW(network().parameters()) for name in "ab"})
    lr_scheduler.OneCycleLR(both, max_lr=0.1, total_steps=8, max_momentum=0.8)
    assert [group["betas"] for group in both.param_groups] == [(0.8, 0.999)] * 2


def test_resumes_bit_exactly_through_a_safe_file():
    reference = network()
    train(reference, mixed(reference), batches(8))

    model = network()
    optimizer = mixed(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    data = list(batches(8))
    train(model, optimizer, data[:3], scheduler)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = network()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(saved["model"])
    resumed = mixed(fresh)
    scheduler = lr_scheduler.LambdaLR(resumed, lambda step: 1.0)
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, data[3:], scheduler)
    assert same(fresh, reference)
    assert resumed.param_groups[0] is resumed.parts["weights"].param_groups[0]


def test_state_dict_is_in_the_format_of_torch():
    model = network()
    optimizer = mixed(model)
    train(model, optimizer, batches(1))
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2], [3]]
    assert {number: sorted(values) for number, values in state["state"].items()} == {
        0: ["momentum_buffer"],
        1: ["momentum_buffer"],
        2: ["exp_avg", "exp_avg_sq", "step"],
        3: ["exp_avg", "exp_avg_sq", "step"],
    }


def other_shapes() -> Mixed:
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    optimizer = mixed(model)
    train(model, optimizer, batches(1))
    return optimizer


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: {}, "it has no param_groups, parts, state"),
        (lambda: torch.optim.SGD(network().parameters(), lr=1.0).state_dict(), "it has no parts"),
        (lambda: Mixed({"weights": torch.optim.SGD(network().parameters(), lr=1.0)}).state_dict(), "has the parts"),
        (
            lambda: Mixed(
                {
                    "weights": torch.optim.Adam([p for p in network().parameters() if p.ndim == 2]),
                    "biases": torch.optim.AdamW(network()[0].parameters()),
                }
            ).state_dict(),
            "saved by Adam, here it is SGD",
        ),
        (
            lambda: Mixed(
                {
                    "weights": torch.optim.SGD([network()[0].weight], lr=1.0),
                    "biases": torch.optim.AdamW([network()[0].bias]),
                }
            ).state_dict(),
            r"'weights' hold \[1\] parameters, this optimizer's hold \[2\]",
        ),
        (lambda: other_shapes().state_dict(), r"has shape \(9, 4\), the parameter here \(8, 4\)"),
    ],
)
def test_a_wrong_state_dict_changes_nothing(state, message):
    model = network()
    optimizer = mixed(model)
    train(model, optimizer, batches(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, values in before["state"].items():
        for key, value in values.items():
            assert torch.equal(after["state"][number][key], value)


def test_a_part_that_fails_to_load_undoes_the_others():
    model = network()
    optimizer = mixed(model)
    train(model, optimizer, batches(1))
    state = optimizer.state_dict()
    train(model, optimizer, batches(1))

    def refuse(part, loaded):
        raise RuntimeError("no")

    optimizer.parts["biases"].register_load_state_dict_pre_hook(refuse)
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    with pytest.raises(RuntimeError, match="no"):
        optimizer.load_state_dict(state)
    assert optimizer.state[model[0].weight]["momentum_buffer"] is buffer


def test_closure_is_evaluated_once_with_gradients():
    model = network()
    optimizer = mixed(model)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        calls.append(1)
        return loss

    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1 and loss.item() > 0
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_zero_grad():
    model = network()
    optimizer = mixed(model)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_add_param_group():
    optimizer = mixed(network())
    late = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"which part.*'weights', 'biases'"):
        optimizer.add_param_group({"params": [late]})
    with pytest.raises(ValueError, match="no part 'other'"):
        optimizer.add_param_group({"params": [late]}, part="other")
    with pytest.raises(ValueError, match=r"shape \(8, 4\) is already in part 'weights'"):
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"][0]]}, part="biases")
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([late])  # type: ignore[arg-type]
    optimizer.add_param_group({"params": late, "lr": 0.5}, part="biases")
    assert optimizer.param_groups[-1]["lr"] == 0.5 and optimizer.param_groups[-1]["params"] == [late]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "part": "weights"})
    assert [len(part.param_groups) for part in optimizer.parts.values()] == [2, 3]
    named = Mixed({"only": torch.optim.SGD(network().named_parameters(), lr=1.0)})
    named.add_param_group({"params": [late]})
    assert named.param_groups[-1]["param_names"] == ["only.added.4"]


def test_step_hooks_run_once_per_step():
    model = network()
    optimizer = mixed(model)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    train(model, optimizer, batches(1))
    handle.remove()
    train(model, optimizer, batches(1))
    assert seen == ["pre", "post", "pre"]


def test_state_dict_hooks():
    optimizer = mixed(network())
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    loaded = []
    optimizer.register_load_state_dict_pre_hook(lambda o, state: loaded.append(state["note"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert loaded == [1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle(how):
    model = network()
    optimizer = mixed(model, nonfinite="skip")
    train(model, optimizer, batches(2))
    twin, twin_optimizer = how((model, optimizer))
    train(model, optimizer, batches(3))
    train(twin, twin_optimizer, batches(3))
    assert same(model, twin) and twin_optimizer.nonfinite == "skip"
    assert twin_optimizer.param_groups[0]["params"][0] is twin[0].weight


def test_state_is_one_view():
    model = network()
    optimizer = mixed(model)
    assert len(optimizer.state) == 0 and not optimizer.state
    train(model, optimizer, batches(1))
    assert set(optimizer.state) == set(model.parameters())
    assert model[0].bias in optimizer.state and "exp_avg" in optimizer.state[model[0].bias]
    optimizer.state[model[0].bias] = {}
    assert optimizer.parts["biases"].state[model[0].bias] == {}
    del optimizer.state[model[0].bias]
    assert model[0].bias not in optimizer.state
    with pytest.raises(KeyError):
        optimizer.state[torch.ones(1)]


def test_nonfinite_gradients_never_reach_a_part():
    model = network()
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[2].bias.grad[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"shape \(2,\), part 'biases'"):
        mixed(model, nonfinite="raise").step()
    skipping = mixed(model, nonfinite="skip")
    skipping.step()
    assert skipping.skipped_steps == 1 and skipping.state_dict()["skipped_steps"] == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    mixed(model).step()
    assert model[2].bias.isnan().any()
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        mixed(model, nonfinite="maybe")


def test_grad_scaler_skips_and_steps():
    model = network()
    optimizer = mixed(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    twin = network()
    plain = mixed(twin)
    for x in batches(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        train(twin, plain, [x])
    assert same(model, twin)
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 4.0


def test_compiled_step():
    model, twin = network(), network()
    optimizer = mixed(model)
    step = torch.compile(optimizer.step, backend="eager")
    for x in batches(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        step()
    train(twin, mixed(twin), batches(3))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_repr_names_the_parts():
    assert repr(mixed(network())) == (
        "Mixed(\n  weights: SGD(2 tensors in 1 groups, lr 0.1)\n"
        "  biases: AdamW(2 tensors in 2 groups, lr 0.02, 0.01)\n)"
    )


def test_wrong_parts():
    model = network()
    with pytest.raises(ValueError, match="at least one optimizer"):
        Mixed({})
    with pytest.raises(TypeError, match="mapping from name to optimizer"):
        Mixed([torch.optim.SGD(model.parameters(), lr=1.0)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"parts\['a'\]: expected a torch.optim.Optimizer, got int"):
        Mixed({"a": 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="a name must be a string"):
        Mixed({1: torch.optim.SGD(model.parameters(), lr=1.0)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"shape \(8, 4\) is in both 'a' and 'b'"):
        Mixed({name: torch.optim.SGD(model.parameters(), lr=1.0) for name in "ab"})
    with pytest.raises(ValueError, match="LBFGS must evaluate the closure itself"):
        Mixed({"a": torch.optim.LBFGS(model.parameters())})
