"""The phi balancer: its exact values, its gradient, duality, and what it must not do."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from steepest.geometry import MirrorMap, NegentropyMap, PowerMap
from steepest.nn import POTENTIALS, PhiBalancer, SwitchBalancer

D = torch.float64
LOGITS = [[2, 1, 0, -1], [0, 0, 3, 1], [1, 1, 1, 1]]
SMALL = [[1, 0, -1], [0, 2, 0.5]]
NAMES = list(POTENTIALS)


def make(experts: int = 4, momentum: float = 0.99, potential="neg_entropy", **options) -> PhiBalancer:
    return PhiBalancer(experts, momentum, potential, **{"coefficient": 1.0, **options}).double()


def seen(balancer: PhiBalancer, average) -> PhiBalancer:
    """The balancer as if it had seen a long stream with this average."""
    balancer.average.copy_(torch.as_tensor(average, dtype=D))
    balancer.weight.fill_(1)
    return balancer


def logits(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=D, requires_grad=True)


def gradient(balancer, rows, **inputs) -> torch.Tensor:
    x = rows if isinstance(rows, torch.Tensor) else logits(rows)
    (found,) = torch.autograd.grad(balancer(x.softmax(-1), **inputs), x)
    return found


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=D)


@pytest.mark.parametrize("potential", [*NAMES, torch.sin])
def test_a_balanced_average_pulls_nowhere(potential) -> None:
    balancer = seen(make(potential=potential), [0.25] * 4).eval()
    assert float(gradient(balancer, LOGITS).abs().max()) <= 1e-16


@pytest.mark.parametrize("name", NAMES)
def test_without_memory_the_gradient_is_that_of_the_potential(name: str) -> None:
    x = logits(LOGITS)
    (envelope,) = torch.autograd.grad(POTENTIALS[name].potential(x.softmax(-1).mean(0)), x)
    torch.testing.assert_close(gradient(make(momentum=0.0, potential=name), LOGITS), envelope, rtol=1e-14, atol=1e-16)


def test_worked_gradient() -> None:
    balancer = make(momentum=0.0)
    found = gradient(balancer, LOGITS)
    p = balancer.average
    torch.testing.assert_close(p, values(0.311410, 0.175733, 0.382307, 0.130550), rtol=0, atol=1e-6)
    assert float(POTENTIALS["neg_entropy"].potential(p)) == pytest.approx(-1.302267, abs=1e-6)
    assert float(POTENTIALS["euclidean"].potential(p)) == pytest.approx(0.145530, abs=1e-6)
    torch.testing.assert_close(found[0], values(0.0312357, -0.0336861, 0.0101854, -0.0077350), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_of_the_gradient(name: str) -> None:
    balancer = make(potential=name)
    for seed in range(3):
        x = tokens(5, 4, seed=seed).requires_grad_()
        found = gradient(balancer, x)
        p, q = x.detach().softmax(-1), balancer.price()
        torch.testing.assert_close(found, p * (q - (p * q).sum(-1, keepdim=True)) / 5, rtol=1e-12, atol=1e-14)


def test_the_dual_value_is_the_potential() -> None:
    p = logits(LOGITS).detach().softmax(-1).mean(0)
    q = 1 + p.log()
    assert float((p * q).sum() - (q - 1).exp().sum()) == pytest.approx(-1.302267, abs=1e-6)
    assert float((p * q).sum() - NegentropyMap().conjugate(q)) == pytest.approx(-1.302267, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**31 - 1), rate=st.floats(0.001, 1.0))
def test_mirror_ascent_on_the_price_is_the_moving_average(name: str, seed: int, rate: float) -> None:
    mirror: MirrorMap = POTENTIALS[name]
    m, p = tokens(2, 6, seed=seed).softmax(-1)
    balancer = seen(make(6, 1 - rate, name), m)
    q = mirror.to_dual(m)
    stepped = mirror.to_dual(mirror.to_primal(q) + rate * (p - mirror.to_primal(q)))
    balancer(p)
    torch.testing.assert_close(mirror.to_primal(stepped), balancer.average, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stepped, balancer.price(), rtol=1e-11, atol=1e-12)


def test_the_zero_start_is_invisible_to_the_entropy() -> None:
    row = values(0.0127316, 0.0351186, -0.0478502)
    for debias in (True, False):
        found = gradient(make(3, debias=debias), SMALL)[0]
        torch.testing.assert_close(found, row, rtol=0, atol=1e-7)
    with_, without = (gradient(make(3, potential="euclidean", debias=debias), SMALL)[0] for debias in (True, False))
    torch.testing.assert_close(with_, 100 * without, rtol=1e-12, atol=0)
    assert float(with_[0]) == pytest.approx(-1.1460e-3, abs=1e-7)


def test_one_price() -> None:
    m, p = [0.5, 0.3, 0.2], values(0.2, 0.2, 0.6)
    entropy = seen(make(3), m).eval()
    assert float(entropy(p)) == pytest.approx(-0.3450867, abs=1e-7)
    assert float(seen(make(3, potential="euclidean"), m).eval()(p)) == pytest.approx(0.28, abs=1e-12)
    torch.testing.assert_close(entropy.price(centred=True), values(0.475706, -0.035120, -0.440585), rtol=0, atol=1e-6)
    entropy.train()(p)
    torch.testing.assert_close(entropy.price(), values(0.300835, -0.207312, -0.589635), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**31 - 1))
def test_symmetries(name: str, seed: int) -> None:
    x, order = tokens(4, 5, seed=seed), torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    shift = tokens(4, 1, seed=seed + 1)
    plain = gradient(make(5, potential=name), x.clone().requires_grad_())
    for other, expected in ((x[:, order], plain[:, order]), (x + shift, plain)):
        found = gradient(make(5, potential=name), other.clone().requires_grad_())
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_switch_loss_is_the_case_without_memory_on_hard_loads() -> None:
    load, p = values(1 / 3, 0, 2 / 3, 0), logits(LOGITS).detach().softmax(-1)
    switch = SwitchBalancer(1.0)(p, load)
    assert float(switch) == pytest.approx(1.434698, abs=1e-6)
    for scale, factor in (("none", 4), ("E", 1)):
        phi = make(momentum=0.0, potential="euclidean", hard=True, scale=scale)(p, load)
        assert float(phi) * factor == pytest.approx(float(switch), rel=1e-11)


def test_near_balance_the_entropy_pulls_as_the_switch_loss_does() -> None:
    excess = values(1e-4, -2e-4, 3e-4, -2e-4)
    balancer = seen(make(), (1 + excess) / 4)
    torch.testing.assert_close(balancer.price(centred=True), excess, rtol=0, atol=1e-7)
    scaled = seen(make(potential="euclidean", scale="E"), (1 + excess) / 4)
    torch.testing.assert_close(scaled.price(centred=True) * 4, excess, rtol=0, atol=1e-12)


def test_centring_changes_the_value_only() -> None:
    for name in NAMES:
        plain, centred = (make(potential=name, centred=centred) for centred in (False, True))
        torch.testing.assert_close(gradient(plain, LOGITS), gradient(centred, LOGITS), rtol=1e-12, atol=1e-15)
        even = torch.full((3, 4), 0.25, dtype=D)
        assert float(make(potential=name, centred=True)(even)) == pytest.approx(0, abs=1e-12)


def test_selection_bias() -> None:
    balancer = seen(PhiBalancer(3, selection=0.5).double(), [0.5, 0.3, 0.2])
    assert balancer.coefficient == 0
    expected = -0.5 * values(0.475706, -0.035120, -0.440585)
    torch.testing.assert_close(balancer.selection_bias(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(balancer.selection_bias(1.0), 2 * balancer.selection_bias(), rtol=1e-14, atol=0)
    p = tokens(4, 3).softmax(-1)
    torch.testing.assert_close(balancer.scores(p), p + balancer.selection_bias())
    assert not balancer(p.requires_grad_()).requires_grad
    assert make().selection_bias() is None


def test_hard_loads_set_the_price_and_the_gradient_stays_soft() -> None:
    load = values(0.5, 0.5, 0, 0)
    balancer = make(hard=True, momentum=0.5)
    x = logits(LOGITS)
    found = gradient(balancer, x, load=load)
    torch.testing.assert_close(balancer.mean_routing(), load)
    p, q = x.detach().softmax(-1), balancer.price()
    torch.testing.assert_close(found, p * (q - (p * q).sum(-1, keepdim=True)) / 3, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="load must be given"):
        balancer(x.softmax(-1))


def test_a_function_of_ones_own() -> None:
    own = make(potential=lambda m: 1 + m.log())
    torch.testing.assert_close(gradient(own, LOGITS), gradient(make(), LOGITS), rtol=0, atol=0)
    assert torch.equal(gradient(make(potential=PowerMap(1.5)), LOGITS), gradient(make(potential="power"), LOGITS))


def test_padding() -> None:
    balancer, other = make(), make()
    p = tokens(2, 3, 4).softmax(-1)
    garbage = torch.cat([p, torch.full((2, 2, 4), torch.nan, dtype=D)], dim=1).requires_grad_()
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    loss = balancer(garbage, mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx(other(p).item(), rel=1e-14)
    torch.testing.assert_close(balancer.average, other.average)
    assert torch.isfinite(garbage.grad).all() and not garbage.grad[:, 3:].any()


def test_no_token_counts() -> None:
    balancer = seen(make(), [0.4, 0.3, 0.2, 0.1])
    before = copy.deepcopy(balancer.state_dict())
    p = tokens(3, 4).softmax(-1).requires_grad_()
    loss = balancer(p, mask=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not p.grad.any()
    assert float(balancer(p[:0])) == 0
    assert all(torch.equal(before[name], value) for name, value in balancer.state_dict().items())


def test_micro_batches_keep_the_memory_in_steps() -> None:
    p = tokens(8, 4).softmax(-1)
    whole, parts = make(momentum=0.9), make(momentum=0.9, accumulation=4)
    for _ in range(5):
        whole(p)
        for _ in range(4):
            parts(p)
    torch.testing.assert_close(whole.average, parts.average, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-12, atol=0)
    assert float(whole.weight) == pytest.approx(1 - 0.9**5, rel=1e-12)


def test_evaluation_changes_nothing() -> None:
    balancer = seen(make(), [0.4, 0.3, 0.2, 0.1])
    before = copy.deepcopy(balancer.state_dict())
    loss = balancer.eval()(tokens(3, 4).softmax(-1))
    assert torch.isfinite(loss)
    assert all(torch.equal(before[name], value) for name, value in balancer.state_dict().items())
    assert torch.isfinite(make().eval()(tokens(3, 4).softmax(-1))), "also before anything was seen"


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_seen(reentrant: bool) -> None:
    def loss(x, balancer):
        return balancer(x.softmax(-1))

    plain, again = make(), make()
    x, y = (tokens(5, 4).requires_grad_() for _ in range(2))
    for _ in range(3):
        loss(x, plain).backward()
        checkpoint(loss, y, again, use_reentrant=reentrant).backward()
    assert torch.equal(plain.average, again.average)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)


def test_resume_is_exact() -> None:
    straight, first = (PhiBalancer(4, coefficient=1.0) for _ in range(2))
    batches = [tokens(5, 4, seed=seed).float().softmax(-1) for seed in range(6)]
    for p in batches[:3]:
        straight(p), first(p)
    resumed = PhiBalancer(4, coefficient=1.0)
    resumed.load_state_dict(first.state_dict())
    for p in batches[3:]:
        assert torch.equal(straight(p), resumed(p))
    assert torch.equal(straight.average, resumed.average)
    assert set(resumed.state_dict()) == {"average", "weight"}


def test_the_state_keeps_its_precision() -> None:
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.float):
        balancer = PhiBalancer(3)
        balancer(torch.tensor([[0.2, 0.3, 0.5]]))
        before = balancer.average.clone()
        cast(balancer)
        assert balancer.average.dtype == torch.float32
        assert torch.equal(balancer.average, before)
    low = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.bfloat16)
    assert balancer(low).dtype == torch.float32


def test_a_diverged_router_does_not_spoil_the_state() -> None:
    balancer = seen(make(), [0.4, 0.3, 0.2, 0.1])
    balancer.validate = False
    assert not torch.isfinite(balancer(torch.full((2, 4), torch.nan, dtype=D)))
    assert balancer.average.tolist() == [0.4, 0.3, 0.2, 0.1]


def test_it_compiles_to_one_graph() -> None:
    balancer, eager = make(), make()
    balancer.validate = eager.validate = False
    compiled = torch.compile(balancer, backend="aot_eager", fullgraph=True)
    x, y = (tokens(5, 4).requires_grad_() for _ in range(2))
    mask = torch.tensor([True, True, False, True, True])
    for _ in range(2):
        compiled(x.softmax(-1), mask=mask).backward()
        eager(y.softmax(-1), mask=mask).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(balancer.average, eager.average)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts must be at least 2 .* got 1"),
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": -0.1}, "momentum .* got -0.1"),
        ({"momentum": float("nan")}, "momentum .* got nan"),
        ({"coefficient": -0.5}, "coefficient must be at least 0, got -0.5"),
        ({"selection": -1.0}, "selection .* got -1.0"),
        ({"potential": "entropy"}, "potential must be one of neg_entropy.* got 'entropy'"),
        ({"potential": lambda m: m.sum()}, "potential must give one price for each expert"),
        ({"potential": lambda m: torch.arange(4.0)}, "equal ones for equal use"),
        ({"scale": "F"}, 'scale must be "none" or "E", got \'F\''),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
    ],
)
def test_wrong_options(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhiBalancer(**{"experts": 4, **options})


@pytest.mark.parametrize(("name", "value"), [("potential", 3), ("momentum", "0.9"), ("experts", 2.5)])
def test_wrong_types(name: str, value) -> None:
    with pytest.raises(TypeError, match=name):
        PhiBalancer(**{"experts": 4, name: value})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.5, 0.5, 0.1, -0.1]], "probabilities must be a softmax"),
        ([[0.5, 0.5, float("nan"), 0.0]], "probabilities must be a softmax .* nan"),
        ([[0.5, float("inf"), 0.0, 0.0]], "probabilities must be a softmax .* inf"),
        (LOGITS, "not logits"),
        ([[0.25, 0.25, 0.25, 0.252]], "sum 1"),
        ([[0.5, 0.25, 0.25]], r"experts = 4 as the last dimension, got shape \(1, 3\)"),
    ],
)
def test_wrong_probabilities_change_nothing(rows, message: str) -> None:
    balancer = make()
    with pytest.raises(ValueError, match=message):
        balancer(torch.tensor(rows, dtype=D))
    assert not balancer.weight


def test_wrong_masks_and_states() -> None:
    balancer, p = make(), torch.full((3, 4), 0.25)
    with pytest.raises(TypeError, match="mask must be of type bool"):
        balancer(p, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"mask must have shape \(3,\)"):
        balancer(p, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"experts is 4, but average .* shape \(8,\)"):
        balancer.load_state_dict(PhiBalancer(8).state_dict())
