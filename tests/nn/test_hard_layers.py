"""The layers without a useful gradient: their formulas, their surrogates, and many weights at once."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steepest.nn import (
    ArgmaxAttention,
    HardLayer,
    HardLIF,
    HardMoE,
    HardTree,
    Population,
    QuantizedLinear,
    RepeatInput,
    SignLinear,
    SpikeCount,
    Staircase,
    spiking_mlp,
    surrogate_twin,
)

D = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=generator(seed))


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 3))


# One network around each layer: 6 inputs, 3 outputs.
NETS: dict[str, Callable[[], nn.Module]] = {
    "staircase": lambda: net(Staircase()),
    "quantized": lambda: net(QuantizedLinear(6, 6, generator=generator())),
    "quantized without bias": lambda: net(QuantizedLinear(6, 6, False, step=0.1, bits=3, generator=generator())),
    "sign": lambda: net(SignLinear(6, 6, generator=generator())),
    "binary bias": lambda: net(SignLinear(6, 6, binary_bias=True, generator=generator())),
    "attention": lambda: net(ArgmaxAttention(6, 4, generator=generator())),
    "moe": lambda: net(HardMoE(6, 6, 3, generator=generator())),
    "tree": lambda: net(HardTree(6, 6, 3, generator=generator())),
    "spiking": lambda: spiking_mlp([6, 8, 3], 7, generator=generator()),
    "spiking by subtraction": lambda: net(RepeatInput(5), HardLIF(reset="subtract", threshold=0.4), SpikeCount()),
    "first": lambda: nn.Sequential(HardMoE(6, 6, generator=generator()), ArgmaxAttention(6, generator=generator())),
    "tree first": lambda: HardTree(6, 3, 2, generator=generator()),
}


class Around(nn.Module):
    """Hides the module tree, so that vmap has to batch the layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("surrogate", [None, "smooth", "straight-through"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_many_weights_at_once(name: str, surrogate: str | None, shape: tuple[int, ...]) -> None:
    model = surrogate_twin(NETS[name]().to(D), surrogate)  # type: ignore[arg-type]
    x = normal(*shape, seed=3)
    population = Population(model)
    present = population.vector()
    weights = present + 0.6 * normal(4, population.size, seed=4)
    found = population.outputs(weights, x)
    assert population.fallbacks == {}
    hidden = Population(Around(model))
    torch.testing.assert_close(hidden.outputs(weights, x), found, rtol=1e-9, atol=1e-12)
    assert hidden.fallbacks == {"Around": "vmap"}
    for row, each in zip(weights, found, strict=True):
        population.write(row)
        torch.testing.assert_close(model(x).detach(), each, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_only_the_layer_is_searched(name: str) -> None:
    model = NETS[name]().to(D)
    hard = {id(p) for m in model.modules() if isinstance(m, HardLayer) for p in m.parameters()}
    names = [key for key, p in model.named_parameters() if id(p) in hard][1:2]
    if not names:
        return
    population, x = Population(model, parameters=names), normal(5, 6)
    weights = population.vector() + normal(3, population.size, seed=4)
    for row, each in zip(weights, population.outputs(weights, x), strict=True):
        population.write(row)
        torch.testing.assert_close(model(x).detach(), each)


@pytest.mark.parametrize("name", NETS)
def test_twins_share_their_parameters_and_only_the_surrogate_has_all_gradients(name: str) -> None:
    hard = NETS[name]().to(D)
    x = normal(5, 6, seed=3)
    smooth, through = surrogate_twin(hard), surrogate_twin(hard, "straight-through")
    assert torch.equal(through(x).detach().round(decimals=9), hard(x).detach().round(decimals=9))
    for twin in (smooth, through):
        twin(x).square().sum().backward()
        missing = [key for key, p in twin.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert not missing
    with torch.no_grad():
        for p in smooth.parameters():
            p.add_(0.3)
    hard.load_state_dict(smooth.state_dict())
    again = surrogate_twin(smooth, None)
    assert torch.equal(hard(x), again(x))
    gradients = torch.autograd.grad(smooth(x).square().sum(), list(smooth.parameters()), allow_unused=False)
    assert all(bool(each.isfinite().all()) for each in gradients)


def test_staircase() -> None:
    x = torch.tensor([-50.0, -1.5, -1.3, 0.0, 0.4, 0.41, 3.0, 50.0], dtype=D)
    expected = torch.tensor([0, 0, 0.2, 0.4, 0.4, 0.6, 0.8, 1.0], dtype=D)  # steps at log(k / (5 - k))
    torch.testing.assert_close(Staircase()(x), expected)
    torch.testing.assert_close(Staircase(surrogate="smooth")(x), torch.sigmoid(x))
    torch.testing.assert_close(Staircase(10**6)(x), torch.sigmoid(x), rtol=0, atol=1e-6)


@given(st.integers(0, 1000), st.integers(2, 16), st.floats(1e-3, 1.0))
@settings(max_examples=30, deadline=None)
def test_quantized_linear(seed: int, bits: int, step: float) -> None:
    layer = QuantizedLinear(5, 4, step=step, bits=bits, generator=generator(seed), dtype=D)
    with torch.no_grad():
        layer.weight.mul_(20)
    weight, bias = layer.integers()
    assert weight.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert int(weight.min()) >= -(2 ** (bits - 1))
    assert int(weight.max()) < 2 ** (bits - 1)
    x = normal(3, 5, seed=seed)
    assert bias is not None
    torch.testing.assert_close(layer(x).detach(), F.linear(x, weight.to(D) * step, bias.to(D) * step))
    inside = (layer.weight.abs() < step * (2 ** (bits - 1) - 1)).detach()
    assert bool(((weight.to(D) * step - layer.weight).abs()[inside] <= step / 2 * (1 + 1e-9)).all())


def test_less_than_half_a_step_changes_nothing() -> None:
    layer = QuantizedLinear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0351)
    one = torch.ones(1, 1)
    before = layer(one)
    with torch.no_grad():
        layer.weight.add_(0.009)
    assert torch.equal(layer(one), before)
    torch.testing.assert_close(before.detach(), torch.tensor([[0.04]]))


def test_sign_linear() -> None:
    layer = SignLinear(3, 1, dtype=D)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -0.2, 3.0]]))
        layer.bias.fill_(-0.25)
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=D)
    assert float(layer(x)) == 1 - 2 + 4 - 0.25
    layer.binary_bias = True
    assert float(layer(x)) == 1 - 2 + 4 - 1
    layer.binary_bias, layer.surrogate = False, "smooth"
    torch.testing.assert_close(layer(x).detach(), torch.tensor([[-0.4 + 4 - 0.25]], dtype=D))


def test_argmax_attention_against_a_loop() -> None:
    layer = ArgmaxAttention(4, 3, generator=generator(), dtype=D)
    x = normal(7, 4)
    for h, y in zip(x, layer(x).detach(), strict=True):
        scores = [float(h @ key) for key in layer.keys]
        key = layer.keys[scores.index(max(scores))]
        torch.testing.assert_close(y, ((layer.weight @ h + layer.bias) * torch.sigmoid(key)).detach())
    with torch.no_grad():
        layer.keys.mul_(1e6)  # the softmax of far apart scores is the arg max
    twin = surrogate_twin(layer)
    torch.testing.assert_close(twin(x), layer(x))


def test_hard_moe_against_a_loop() -> None:
    layer = HardMoE(4, 2, 3, generator=generator(), dtype=D)
    x = normal(9, 4)
    assert len(set(layer.chosen(x).tolist())) > 1
    for sample, y, expert in zip(x, layer(x).detach(), layer.chosen(x), strict=True):
        torch.testing.assert_close(y, (layer.weight[expert] @ sample + layer.bias[expert]).detach())
    with torch.no_grad():
        layer.gate.mul_(1e6)
        layer.gate_bias.mul_(1e6)
    torch.testing.assert_close(surrogate_twin(layer)(x), layer(x))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_hard_tree_against_a_walk(depth: int) -> None:
    tree = HardTree(2, 3, depth, generator=generator(), dtype=D)
    x = normal(20, 2)
    for sample, y, leaf in zip(x, tree(x).detach(), tree.leaf(x), strict=True):
        node = 0
        for _ in range(depth):
            node = 2 * node + (2 if float(tree.weight[node] @ sample + tree.bias[node]) > 0 else 1)
        assert node - (2**depth - 1) == int(leaf)
        torch.testing.assert_close(y, tree.leaves[int(leaf)].detach())
    soft = surrogate_twin(tree)
    torch.testing.assert_close(soft._shares(normal(5, 2**depth - 1)).sum(-1), torch.ones(5, dtype=D))
    soft.sharpness = 1e9
    torch.testing.assert_close(soft(x), tree(x))
    flat = HardTree(2, 3, depth)
    with torch.no_grad():
        flat.weight.zero_()
        flat.bias.zero_()
    assert not flat.leaf(torch.ones(2)).any(), "0 goes left"


@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_lif_against_a_loop(reset: str) -> None:
    currents = 0.6 + normal(30, 4)
    layer = HardLIF(0.9, 1.2, reset=reset)  # type: ignore[arg-type]
    spikes = layer(currents)
    for j in range(4):
        potential = 0.0
        for t in range(30):
            potential = 0.9 * potential + float(currents[t, j])
            fired = potential >= 1.2
            assert float(spikes[t, j]) == fired
            if fired:
                potential = 0.0 if reset == "zero" else potential - 1.2
    layer.surrogate = "straight-through"
    assert torch.equal(layer(currents), spikes)
    layer.surrogate, layer.sharpness = "smooth", 1e9
    torch.testing.assert_close(layer(currents), spikes)


def test_lif_closed_forms() -> None:
    def counts(current: float, steps: int) -> float:
        return float(HardLIF()(torch.full((steps,), current, dtype=D)).sum())

    assert counts(1.0, 12) == 12, "a current of the threshold fires at once"
    assert counts(0.049, 1000) == 0, "the steady state I / (1 - 0.95) stays below 1"
    assert counts(0.051, 1000) > 0
    assert counts(0.4, 12) == 4, "0.4, 0.78, 1.141: every third step"
    held = HardLIF(0.0)(torch.tensor([0.9, 0.9, 1.0], dtype=D))
    assert held.tolist() == [0, 0, 1], "without decay there is no memory"


def test_a_dead_spiking_network_is_flat_and_ours_starts_alive() -> None:
    x = torch.rand(50, 64, generator=generator(1))
    alive = spiking_mlp([64, 32, 10], 8, generator=generator())
    assert float(alive(x).sum()) > 0
    dead = spiking_mlp([64, 32, 10], 8, gain=0.1, output_bias=-0.3, generator=generator())
    population = Population(dead)
    near = population.vector() + 0.01 * torch.randn(20, population.size, generator=generator(2))
    targets = torch.arange(50) % 10
    losses = population.losses(near, F.cross_entropy, x, targets)
    assert torch.equal(losses, losses[:1].expand(20))


def test_modules_of_time() -> None:
    x = normal(2, 3)
    assert torch.equal(SpikeCount()(RepeatInput(4)(x)), 4 * x)
    assert repr(nn.Sequential(RepeatInput(4), HardLIF(), Staircase(), HardTree(2, 2), HardMoE(2, 2)))


def test_seeds_and_places() -> None:
    for make in (QuantizedLinear, SignLinear, HardMoE, HardTree):
        one, other = (make(3, 2, generator=generator(1), dtype=D) for _ in range(2))
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == D
    state = torch.get_rng_state()
    spiking_mlp([3, 2], 2, generator=generator())
    ArgmaxAttention(3, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Staircase(0), "levels must be at least 1"),
        (lambda: Staircase(surrogate="soft"), "surrogate must be None, 'smooth' or 'straight-through', got 'soft'"),  # type: ignore[arg-type]
        (lambda: QuantizedLinear(0, 2), "in_features must be at least 1"),
        (lambda: QuantizedLinear(2, 2, step=0), "step must be positive"),
        (lambda: QuantizedLinear(2, 2, step=-0.1), "step must be at least 0"),
        (lambda: QuantizedLinear(2, 2, bits=1), "bits must be at least 2"),
        (lambda: QuantizedLinear(2, 2, bits=17), "bits must be at most 16"),
        (lambda: SignLinear(2, 0), "out_features must be at least 1"),
        (lambda: ArgmaxAttention(2, 0), "keys must be at least 1"),
        (lambda: HardMoE(2, 2, 0), "experts must be at least 1"),
        (lambda: HardTree(2, 2, 0), "depth must be at least 1"),
        (lambda: HardTree(2, 2, sharpness=0), "sharpness must be positive"),
        (lambda: HardLIF(1.5), r"decay must be in \[0, 1\], got 1.5"),
        (lambda: HardLIF(threshold=0), "threshold must be positive"),
        (lambda: HardLIF(reset="half"), "reset must be 'zero' or 'subtract', got 'half'"),  # type: ignore[arg-type]
        (lambda: HardLIF()(torch.ones(())), "must lead with the time steps"),
        (lambda: RepeatInput(0), "steps must be at least 1"),
        (lambda: spiking_mlp([3], 2), "sizes must have at least two entries"),
        (lambda: surrogate_twin(nn.Linear(2, 2)), "Linear has no hard layer"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
