"""Drop-Muon: what rests stays bit for bit, what moves moves as without dropping, and nothing more is differentiated."""

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steepest.geometry import Spectral, polar
from steepest.models import GPT, MLP, GPTConfig, ResNet
from steepest.optim import (
    DropMuon,
    Full,
    LayerSampler,
    Muon,
    RandomLayers,
    Scion,
    Sharp,
    SteepestDescent,
    Subsets,
    Unit,
    build,
    find_layers,
)
from steepest.optim.layer_smoothness import layer_smoothness


class Script(LayerSampler):
    """Given sets, one after the other."""

    def __init__(self, *sets: tuple[int, ...]) -> None:
        self.sets = sets

    def draw(self, layers: int, step: int, generator: torch.Generator) -> tuple[int, ...]:
        return self.sets[step % len(self.sets)]

    def update_probabilities(self, layers: int, step: int = 0) -> Tensor:
        return torch.ones(layers)


class Vector(nn.Module):
    """A layer that is one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.x[0]


class Quadratic(nn.Module):
    """f = 1/2 sum L_i x_i^2."""

    def __init__(self, values: list[float], constants: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Vector(value) for value in values)
        self.constants = constants

    def forward(self) -> Tensor:
        pairs = zip(self.constants, self.layers, strict=True)
        return torch.stack([constant * layer().square() / 2 for constant, layer in pairs]).sum()

    @property
    def point(self) -> list[float]:
        return [float(layer.x.detach()) for layer in self.layers]


def mlp(*sizes: int, dtype: torch.dtype = torch.float64) -> MLP:
    return MLP(sizes or (6, 8, 8, 8, 3), "tanh", generator=torch.Generator().manual_seed(0), dtype=dtype)


def data(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, GPT):
        return torch.randint(64, (2, 8), generator=generator)
    if isinstance(model, ResNet):
        return torch.randn(4, 1, 8, 8, generator=generator)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x = data(model, seed)
    return model(x, x) if isinstance(model, GPT) else model(x).square().mean()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def gpt(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=64, context=8, layers=3, heads=4, width=32, **options))


# The method


def test_two_scalar_layers() -> None:
    model = Quadratic([2.0, 3.0], [1.0, 4.0])
    script = Script((1,), (0, 1), (1,))
    optimizer = DropMuon(model, [1.0, 0.25], sampler=script, momentum=0.0, step_rule=Sharp(), layers=list(model.layers))
    seen = []
    for _ in range(3):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(model.point)
    assert seen == [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_full_updates_end_a_separable_quadratic_in_one_step() -> None:
    generator = torch.Generator().manual_seed(0)
    constants = (torch.rand(6, generator=generator, dtype=torch.float64) * 4 + 0.5).tolist()
    start = torch.randn(6, generator=generator, dtype=torch.float64).mul(3).tolist()
    model = Quadratic(start, constants)
    optimizer = DropMuon(model, [1 / each for each in constants], sampler="full", momentum=0.0, step_rule=Sharp())
    total, initial = 0.0, float(model().detach())
    for _ in range(3):
        model().backward()
        gradients = [float(layer.x.grad) for layer in model.layers]
        total += sum(g * g / constant for g, constant in zip(gradients, constants, strict=True))
        optimizer.step()
        optimizer.zero_grad()
        assert max(map(abs, model.point)) < 1e-15
    assert total == pytest.approx(2 * initial, rel=1e-14)


@pytest.mark.parametrize("layers", ["one", "many"])
def test_full_updates_are_muon_bit_for_bit(layers: str) -> None:
    one, two = (MLP((6, 8, 8, 3), "tanh", bias=False, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    spec, sampler = ([one], "uniform") if layers == "one" else (None, [1.0, 0.0, 0.0])
    dropping = DropMuon(one, 0.05, layers=spec, sampler=sampler, nesterov=True, momentum=0.95, weight_decay=0.1)
    muon = Muon(two.parameters(), 0.05, momentum=0.95, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(5, 6, generator=generator)
        for model, optimizer in ((one, dropping), (two, muon)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_the_sharp_direction_of_a_diagonal_matrix() -> None:
    matrix = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    for rule, expected in ((Sharp(), 7.0), (Unit(), 1.0)):
        nn.init.zeros_(matrix.weight)
        optimizer = DropMuon(matrix, 1.0, momentum=0.0, step_rule=rule, norm=Spectral(), adjust_lr_fn="none")
        matrix.weight.grad = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
        gradient = matrix.weight.grad.clone()
        optimizer.step()
        torch.testing.assert_close(-matrix.weight.detach(), expected * torch.eye(2).double(), rtol=0, atol=1e-14)
    g = gradient
    sharp = Spectral().sharp(g)
    assert float(Spectral().norm(sharp)) == pytest.approx(7) == float(Spectral().dual(g))
    assert float((g * sharp).sum()) == pytest.approx(49)


def test_euclidean_norms_are_layerwise_gradient_descent() -> None:
    model = mlp()
    rates = [0.1, 0.2, 0.3, 0.4]
    start, names = values(model), [name for name, _ in model.named_parameters()]
    optimizer = DropMuon(
        model, rates, sampler="full", norm="euclidean", momentum=0.0, step_rule=Sharp(), adjust_lr_fn="none"
    )
    loss_of(model).backward()
    wanted = [
        x - rates[int(n.split(".")[1])] * p.grad for x, n, p in zip(start, names, model.parameters(), strict=True)
    ]
    optimizer.step()
    for parameter, expected in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-13, atol=1e-15)


def test_a_step_is_the_formula_on_the_suffix_only() -> None:
    """Convolutions flattened, shape factor, biases along their direction, EMA of the past 0.9."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 9)).double()
    optimizer = DropMuon(model, 0.1, sampler=Script((1, 2), (0, 1, 2)), norm=Spectral())
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    expected = values(model)
    for step in range(2):
        model(x).square().mean().backward()
        for index, parameter in enumerate(model.parameters()):
            if parameter.grad is None:
                continue
            m = momenta[index] = 0.9 * momenta[index] + 0.1 * parameter.grad
            if m.ndim == 1:
                move = m / m.norm()
            else:
                flat = m.flatten(1)
                move = (max(1, flat.shape[0] / flat.shape[1]) ** 0.5 * polar(flat, "svd")).view_as(m)
            expected[index] = expected[index] - 0.1 * move
        assert [p.grad is None for p in model.parameters()] == [step == 0] * 2 + [False] * 4
        optimizer.step()
        optimizer.zero_grad()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-14)


def test_a_resting_momentum_comes_back_at_full_weight() -> None:
    model = Quadratic([2.0, 3.0], [1.0, 4.0])
    optimizer = DropMuon(model, [0.1, 0.1], sampler=Script((0, 1), (1,), (1,), (0, 1)), layers=list(model.layers))
    buffers = []
    for _ in range(4):
        model().backward()
        gradient = model.layers[0].x.grad
        optimizer.step()
        buffers.append((float(optimizer.state[model.layers[0].x]["momentum_buffer"]), gradient))
        optimizer.zero_grad()
    assert buffers[0][0] == buffers[1][0] == buffers[2][0] == pytest.approx(0.2)
    assert buffers[1][1] is None and buffers[2][1] is None
    assert buffers[3][0] == pytest.approx(0.9 * 0.2 + 0.1 * 1.9)


# What rests


OPTIMIZERS: dict[str, Callable[[nn.Module], RandomLayers]] = {
    "drop": lambda model: DropMuon(model, 0.02, weight_decay=0.1),
    "sharp": lambda model: DropMuon(model, 0.02, step_rule=Sharp(), weight_decay=0.1),
    "build": lambda model: build(model, "drop_muon", lr=0.02),  # pyright: ignore[reportReturnType]
    "adamw": lambda model: RandomLayers(torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1), model),
    "sgd": lambda model: RandomLayers(torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=0.1), model),
    "scion": lambda model: RandomLayers(build(model, "scion", lr=0.02), model),
    "descent": lambda model: RandomLayers(
        SteepestDescent(model.parameters(), 0.02, norm="max", momentum=0.9, momentum_form="lion", weight_decay=0.1),
        model,
    ),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "gpt": gpt,
    "tied": lambda: gpt(tied=True),
    "resnet": lambda: ResNet(width=4, norm="batch", generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_layers_are_bit_identical_and_get_no_gradient(kind: str, name: str) -> None:
    model = MODELS[kind]()
    optimizer = OPTIMIZERS[name](model)
    optimizer.sampler = Subsets([range(s, len(optimizer.layers)) for s in range(len(optimizer.layers))])  # pyright: ignore
    computed: list[str] = []
    for parameter_name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=parameter_name: computed.append(name))
    for step in range(8):
        if step in (2, 5):
            optimizer.draw([len(optimizer.layers) - 1])
        active = {name for index in optimizer.active for name in optimizer.layers[index].parameters}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        states = {
            n: copy.deepcopy(dict(optimizer.state[p])) for n, p in model.named_parameters() if p in optimizer.state
        }
        computed.clear()
        loss_of(model, step).backward()
        assert set(computed) == active == {n for n, p in model.named_parameters() if p.grad is not None}
        assert all(parameter.requires_grad for parameter in model.parameters())
        optimizer.step()
        for parameter_name, parameter in model.named_parameters():
            state = dict(optimizer.state[parameter]) if parameter in optimizer.state else {}
            if parameter_name in active:
                assert not torch.equal(parameter, before[parameter_name])
            else:
                assert torch.equal(parameter, before[parameter_name])
                torch.testing.assert_close(state, states.get(parameter_name, {}), rtol=0, atol=0)
        optimizer.zero_grad()


def keep(saved: list[Tensor], tensor: Tensor) -> Tensor:
    saved.append(tensor)
    return tensor


def test_the_graph_ends_at_the_first_active_layer() -> None:
    model = mlp(6, 8, 8, 8, 8, 3)
    optimizer = DropMuon(model)
    matmuls = []
    for start in range(5):
        optimizer.draw(range(start, 5))
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, saved), lambda t: t):
            loss = loss_of(model)
        nodes, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting += [following for following, _ in node.next_functions]
        matmuls.append((sum("Addmm" in node.name() for node in nodes), len(saved)))
        optimizer.zero_grad()
    assert [count for count, _ in matmuls] == [5, 4, 3, 2, 1]
    assert all(one > two for (_, one), (_, two) in pairwise(matmuls))


def test_buffers_move_in_all_layers() -> None:
    model = ResNet(width=4, norm="batch")
    optimizer = DropMuon(model)
    optimizer.draw([len(optimizer.layers) - 1])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    advance(model, optimizer, 1)
    assert all(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_gradient_that_is_there_all_the_same_is_dropped() -> None:
    model = mlp()
    optimizer = DropMuon(model, sampler=Script((3,), (0, 1, 2, 3)))
    before = values(model)
    loss = loss_of(model)
    loss.backward()
    first = next(model.parameters())
    first.grad = torch.full_like(first, torch.nan)
    optimizer.step()
    assert first.grad is None and torch.equal(first, before[0])


def test_gradients_set_to_zero_are_no_step() -> None:
    model = mlp()
    optimizer = DropMuon(model, weight_decay=0.5, sampler=Script((0, 1, 2, 3), (3,)))
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = values(model)
    loss_of(model).backward()
    optimizer.step()
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert same == [True] * 6 + [False] * 2


# The loop


def test_evaluation_and_inference_see_the_whole_model() -> None:
    model = mlp()
    optimizer = DropMuon(model, sampler=Script((3,)))
    model.eval()
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.zero_grad()
    model.train()
    with torch.no_grad():
        loss_of(model)
    optimizer.draw()  # neither opened a step
    with optimizer.frozen():
        x = torch.nn.functional.linear(data(model), model.layers[0].weight)
        assert not x.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_requires_grad_is_restored_after_an_error() -> None:
    model = mlp()
    optimizer = DropMuon(model, sampler=Script((3,)))
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, dtype=torch.float64))
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer.zero_grad()
    loss_of(model).backward()
    assert [p.grad is not None for p in model.parameters()] == [False] * 6 + [True] * 2


def test_a_parameter_frozen_by_the_user_stays_frozen() -> None:
    model = mlp()
    model.layers[1].weight.requires_grad_(False)
    optimizer = DropMuon(model)
    before = model.layers[1].weight.detach().clone()
    advance(model, optimizer, 6)
    assert not model.layers[1].weight.requires_grad and torch.equal(model.layers[1].weight, before)
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "layers.1.weight")


def test_accumulated_gradients_are_the_sum_over_one_set() -> None:
    one, two = mlp(), mlp()
    dropping = DropMuon(one, sampler=Script((2, 3)))
    for seed in range(3):
        loss_of(one, seed).backward()
        with pytest.raises(RuntimeError, match="between the first forward pass and step"):
            dropping.draw()
    sum(loss_of(two, seed) for seed in range(3)).backward()  # pyright: ignore
    for p, q in list(zip(one.parameters(), two.parameters(), strict=True))[4:]:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    dropping.step()
    dropping.draw()
    with pytest.raises(ValueError, match="at least one of the layers 0 to 3"):
        dropping.draw([4])
    with pytest.raises(ValueError, match="at least one of the layers 0 to 3"):
        dropping.draw([])


def test_a_closure_is_evaluated_once_on_the_set() -> None:
    one, two = mlp(), mlp()
    first, second = DropMuon(one), DropMuon(two)
    calls = []

    def closure() -> Tensor:
        calls.append(first.active)
        first.zero_grad()
        loss = loss_of(one)
        loss.backward()
        return loss

    for _ in range(4):
        first.step(closure)
        second.zero_grad()
        loss_of(two).backward()
        second.step()
    assert len(calls) == 4
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_hooks_of_a_step_run_once_and_schedulers_count_every_step() -> None:
    model = mlp()
    optimizer = DropMuon(model, 1.0)
    build(mlp(), "muon")  # a plain Mixed beside it
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    sets = set()
    for step in range(6):
        sets.add(optimizer.active)
        assert all(group["lr"] == 1 / (1 + step) for group in optimizer.param_groups)
        loss_of(model).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert calls == ["before", "after"] * 6 and optimizer.iteration == 6 and len(sets) > 1


def test_a_skipped_step_counts_and_a_raised_one_changes_nothing() -> None:
    model = mlp()
    skipping = build(model, "drop_muon", nonfinite="skip")
    before = values(model)
    assert isinstance(skipping, RandomLayers)
    skipping.draw(range(len(skipping.layers)))
    loss_of(model).backward()
    list(model.parameters())[-1].grad.fill_(torch.inf)  # pyright: ignore
    skipping.step()
    assert skipping.skipped_steps == 1 and skipping.iteration == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    raising = DropMuon(model)
    active = raising.active
    raising.zero_grad()
    loss_of(model).backward()
    list(model.parameters())[-1].grad.fill_(torch.nan)  # pyright: ignore
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        raising.step()
    assert raising.active == active and raising.iteration == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["mlp", "tied", "resnet"])
@pytest.mark.parametrize("name", ["drop", "build", "adamw"])
def test_resume_is_bit_exact(kind: str, name: str) -> None:
    model = MODELS[kind]()
    optimizer = OPTIMIZERS[name](model)
    advance(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = MODELS[kind]()
    twin.load_state_dict(saved["model"])
    resumed = OPTIMIZERS[name](twin)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.active == optimizer.active and resumed.iteration == 3
    assert advance(model, optimizer, 6, 3) == advance(twin, resumed, 6, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_every_rank_draws_the_same_sets() -> None:
    def sets(generator: torch.Generator | None) -> list[tuple[int, ...]]:
        torch.manual_seed(int(torch.randint(1000, (1,))))  # the global state plays no part
        optimizer = DropMuon(mlp(), generator=generator)
        return [optimizer.draw() for _ in range(30)]

    assert sets(None) == sets(None) == sets(torch.Generator().manual_seed(0)) != sets(torch.Generator().manual_seed(1))


def test_a_refused_state_changes_nothing() -> None:
    model = mlp()
    optimizer = DropMuon(model)
    advance(model, optimizer, 2)
    active, state = optimizer.active, optimizer.generator.get_state()
    with pytest.raises(ValueError, match="no 'layer_sampling'"):
        optimizer.load_state_dict(build(mlp(), "muon").state_dict())
    with pytest.raises(ValueError, match="its layers are"):
        optimizer.load_state_dict(DropMuon(mlp(6, 8, 8, 3)).state_dict())
    with pytest.raises(ValueError, match="has shape"):
        other = mlp(6, 9, 9, 9, 3)
        wrong = DropMuon(other)
        advance(other, wrong, 4)
        optimizer.load_state_dict(wrong.state_dict())
    assert optimizer.active == active and torch.equal(optimizer.generator.get_state(), state)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_independent(way: Callable[[Any], Any]) -> None:
    model = mlp()
    optimizer = DropMuon(model, 0.02)
    advance(model, optimizer, 2)
    twin, other = way((model, optimizer))
    lonely = copy.deepcopy(model)  # a copy without its optimizer, as for an average of the weights
    assert advance(model, optimizer, 4, 2) == advance(twin, other, 4, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    optimizer.draw([3])
    loss_of(lonely).backward()
    assert all(parameter.grad is not None for parameter in lonely.parameters())


def test_a_forgotten_optimizer_leaves_no_hooks() -> None:
    model = mlp()
    optimizer = DropMuon(model, sampler=Script((3,)))
    assert model._forward_hooks
    del optimizer
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_activation_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    plain_blocks = Checkpointed().double()
    optimizer = DropMuon(plain_blocks)
    assert len(optimizer.layers) == 4
    for start in (3, 1, 0):
        optimizer.draw(range(start, 4))
        loss_of(plain_blocks).backward()
        found = [p.grad for p in plain_blocks.parameters()]
        assert [g is not None for g in found] == [index >= 2 * start for index in range(8)]
        x = data(plain_blocks)
        for block in plain_blocks.blocks:
            x = nn.functional.tanh(nn.functional.linear(x, block[0].weight, block[0].bias))
        wanted = torch.autograd.grad(x.square().mean(), list(plain_blocks.parameters()))
        for g, w in zip(found, wanted, strict=True):
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
        optimizer.zero_grad()


def test_gradient_scaler_and_averages() -> None:
    model = mlp()
    optimizer = DropMuon(model, 0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(3):
        loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        optimizer.zero_grad()
    assert optimizer.iteration == 3


def test_a_compiled_model() -> None:
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    optimizer = DropMuon(compiled)  # pyright: ignore[reportArgumentType]
    assert len(optimizer.layers) == 4
    for start in (3, 1, 3):
        optimizer.draw(range(start, 4))
        compiled(data(model)).square().mean().backward()  # pyright: ignore
        assert [p.grad is not None for p in model.parameters()] == [index >= 2 * start for index in range(8)]
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_compiled_afterwards_still_trains() -> None:
    model = mlp()
    optimizer = DropMuon(model, sampler=Script((3,)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = values(model)
    compiled(data(model)).square().mean().backward()
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)] == [True] * 6 + [False] * 2
    optimizer.zero_grad()
    with optimizer.frozen():
        compiled(data(model)).square().mean().backward()
    assert [p.grad is not None for p in model.parameters()] == [False] * 6 + [True] * 2


def test_any_subset() -> None:
    model = mlp()
    optimizer = DropMuon(model, sampler=Subsets([[1], [0, 2, 3]]))
    for _ in range(6):
        active = optimizer.active
        loss_of(model).backward()
        assert [p.grad is not None for p in model.parameters()] == [i // 2 in active for i in range(8)]
        optimizer.step()
        optimizer.zero_grad()


def test_scion_under_random_layers_keeps_what_scion_does() -> None:
    one, two = mlp(), mlp()
    plain = Scion(one.parameters(), 0.02, norm="auto")
    dropping = RandomLayers(Scion(two.parameters(), 0.02, norm="auto"), two, sampler=Full())
    assert advance(one, plain, 4) == advance(two, dropping, 4)


# The layers


def names(model: nn.Module, **options: Any) -> list[str]:
    return [layer.name for layer in find_layers(model, **options)]


def test_layers_of_known_models() -> None:
    blocks = ["blocks.0", "blocks.1", "blocks.2"]
    assert names(gpt()) == ["embedding", *blocks, "head"]
    assert names(gpt(tied=True)) == ["embedding", *blocks]
    assert names(gpt(experts=4)) == ["embedding", *blocks, "head"]
    assert names(ResNet()) == ["conv", *blocks, "head"]
    assert names(mlp()) == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert names(nn.Linear(2, 3)) == [""]
    assert names(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))) == [
        "0",
        "2",
        "4",
    ]
    mlp_with_token = mlp()
    mlp_with_token.token = nn.Parameter(torch.zeros(1, 4, 6))
    assert list(find_layers(mlp_with_token)[0].parameters) == ["token", "layers.0.weight", "layers.0.bias"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, nn.LayerNorm(16))
    assert names(encoder) == ["layers.0", "layers.1"]
    nested = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2))
    found = find_layers(nested)
    assert [list(layer.parameters) for layer in found] == [
        ["0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"],
        ["2.weight", "2.bias"],
    ]
    wrapped = torch.nn.DataParallel(mlp())
    assert names(wrapped) == [f"module.layers.{i}" for i in range(4)]
    for model in (gpt(), gpt(tied=True), ResNet(), encoder, nested):
        held = [id(p) for layer in find_layers(model) for p in layer.parameters.values()]
        assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}


def test_layers_of_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    found = find_layers(transformers.GPT2LMHeadModel(config))
    assert [layer.name for layer in found] == ["transformer.wte", "transformer.h.0", "transformer.h.1"]
    assert list(found[0].parameters) == ["transformer.wte.weight", "transformer.wpe.weight"]  # the head is tied
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    assert names(transformers.LlamaForCausalLM(config)) == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head",
    ]  # fmt: skip


class Backwards(nn.Module):
    """Registered in the other order than used."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 6).double()
        self.unused = nn.Linear(2, 2).double()
        self.first = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_the_order_of_use() -> None:
    model = Backwards()
    assert names(model) == ["last", "unused", "first"]
    with pytest.warns(UserWarning, match="last is listed before first but runs after it"):
        loss_of(model).backward()
        optimizer = DropMuon(model, sampler="full")
        loss_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model)  # once
        del optimizer
        ordered = DropMuon(model, example_input=data(model))
        assert [layer.name for layer in ordered.layers] == ["unused", "first", "last"]
        advance(model, ordered, 3)


def test_a_list_of_the_user() -> None:
    model = mlp()
    found = find_layers(model, [model.layers[0], ["layers.1", model.layers[2].weight], "layers.2.bias", "layers.3.*"])
    assert [list(layer.parameters) for layer in found] == [
        ["layers.0.weight", "layers.0.bias"],
        ["layers.1.weight", "layers.1.bias", "layers.2.weight"],
        ["layers.2.bias"],
        ["layers.3.weight", "layers.3.bias"],
    ]
    again = DropMuon(model, layers=found)
    assert [layer.name for layer in again.layers] == ["layers.0", "layers.1", "layers.2.bias", "layers.3.*"]
    assert names(model, layers=model.layers) == names(model)


def test_tied_weights_rest_with_their_first_layer() -> None:
    model = gpt(tied=True)
    optimizer = DropMuon(model, layers=[model.embedding, *model.blocks, [model.norm, model.head]])
    assert [layer.name for layer in optimizer.layers] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm"]
    optimizer.draw([4])
    loss_of(model).backward()
    assert model.head.weight.grad is None and model.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (lambda m: list(m.layers)[:2], ValueError, "leave out layers.2.weight, layers.2.bias, layers.3.weight"),
        (lambda m: [m, m.layers[0]], ValueError, "parameter layers.0.weight is in layer 0 and again in layer 1"),
        (lambda m: ["layers.*", "layers.1.bias"], ValueError, "parameter layers.1.bias is in layer 0 and again"),
        (lambda m: ["layer"], ValueError, "pattern 'layer' matches no parameter"),
        (lambda m: [nn.Linear(2, 2)], ValueError, "Linear has no parameter of the model"),
        (lambda m: [torch.zeros(2)], ValueError, "is no parameter of the model"),
        (lambda m: [3], TypeError, r"layers\[0\] must be a module"),
        (lambda m: "layers", TypeError, "layers must be a sequence"),
    ],
)
def test_bad_layers(layers: Callable[[MLP], Any], error: type[Exception], message: str) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        DropMuon(model, layers=layers(model))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampler": [0.5, 0.5]}, ValueError, "one per layer, got 2 for 4 layers"),
        ({"sampler": [0.5, 0.6, -0.1, 0.0]}, ValueError, "must not be negative"),
        ({"sampler": [0.2, 0.2, 0.2, 0.2]}, ValueError, "must sum to 1"),
        ({"sampler": 3}, TypeError, "sampler must be"),
        ({"lr": [0.1, 0.2]}, ValueError, "one per layer, got 2 for 4 layers"),
        ({"lr": -1.0}, ValueError, "lr must be a finite number"),
        ({"lr": [0.1, 0.1, 0.1, float("nan")]}, ValueError, "lr must be a finite number"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"layers": ["*"], "example_input": 1}, ValueError, "example_input"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DropMuon(mlp(), **options)


def test_more_bad_input() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="model"):
        DropMuon(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no trainable parameter"):
        DropMuon(nn.ReLU())
    with pytest.raises(ValueError, match="drops layers already"):
        RandomLayers(DropMuon(model), model)
    with pytest.raises(ValueError, match="is in no layer"):
        RandomLayers(torch.optim.SGD(mlp().parameters(), 0.1), model)
    with pytest.warns(UserWarning, match="it never moves layers.0, layers.1"):
        DropMuon(model, sampler=[0.0, 0.0, 0.5, 0.5])


# How fast the gradients change


def test_the_secant_of_a_quadratic_is_its_constant() -> None:
    model = Quadratic([2.0, 3.0, -1.0], [1.0, 4.0, 0.5]).eval()
    found = layer_smoothness(model, find_layers(model, list(model.layers)))
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64), rtol=1e-10, atol=0)
    assert model.point == [2.0, 3.0, -1.0] and model.layers[0].x.grad is None


def test_the_secant_in_the_spectral_norm_is_below_the_constant() -> None:
    """For f = c |W|_F^2 / 2 the nuclear norm of c D is at most c * rank * the spectral norm of D."""
    layer = nn.Linear(3, 5, bias=False, dtype=torch.float64)
    found = float(layer_smoothness(lambda: 2 * layer.weight.square().sum() / 2, find_layers(layer), samples=20)[0])
    assert 2 < found <= 2 * 3 * (1 + 1e-9)


def test_bad_input_of_the_estimate() -> None:
    model = mlp()
    layers = find_layers(model)
    with pytest.raises(ValueError, match="length and samples"):
        layer_smoothness(lambda: loss_of(model), layers, length=0.0)
    with pytest.raises(ValueError, match="length and samples"):
        layer_smoothness(lambda: loss_of(model), layers, samples=0)
    with pytest.raises(ValueError, match="at least one layer"):
        layer_smoothness(lambda: loss_of(model), [])
