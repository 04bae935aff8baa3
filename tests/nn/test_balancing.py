"""The baselines, the router, activation checkpointing and several ranks."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from steepest.nn import (
    BALANCERS,
    Balancer,
    CombinedBalancer,
    GlobalSwitchBalancer,
    LossFreeBalancer,
    PhiBalancer,
    Router,
    SwitchBalancer,
    dead_experts,
    load_cv,
    load_entropy,
    load_metrics,
    make_balancer,
    max_violation,
)

D = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=generator(seed))


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=D)


def test_switch_loss() -> None:
    p = values(2, 1, 0, -1, 0, 0, 3, 1, 1, 1, 1, 1).view(3, 4).softmax(-1)
    load = values(1 / 3, 0, 2 / 3, 0)
    assert float(SwitchBalancer(0.5)(p, load)) == pytest.approx(0.5 * 1.434698, abs=1e-6)
    even = torch.full((3, 4), 0.25, dtype=D)
    assert float(SwitchBalancer(0.5)(even, even[0])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="load must be given"):
        SwitchBalancer()(p)
    with pytest.raises(ValueError, match="load must have shape"):
        SwitchBalancer()(p, load[:3])
    with pytest.raises(ValueError, match="coefficient must be at least 0, got -1"):
        SwitchBalancer(-1.0)


def test_global_switch_sees_the_whole_step() -> None:
    balancer = GlobalSwitchBalancer(2, 1.0, accumulation=2).double()
    a, b = torch.tensor([[0.9, 0.1]], dtype=D), torch.tensor([[0.2, 0.8]] * 3, dtype=D)
    for _ in range(2):  # the second step starts afresh
        assert float(balancer(a, values(1, 0))) == pytest.approx(2 * 0.9)
        # one token to expert 0, then three to expert 1
        assert float(balancer(b, values(0, 1))) == pytest.approx(2 * (0.25 * 0.2 + 0.75 * 0.8))
    assert float(balancer.eval()(a, values(1, 0))) == pytest.approx(2 * 0.9)
    torch.testing.assert_close(balancer.counts, values(1, 3))
    single = GlobalSwitchBalancer(2, 1.0).double()
    assert float(single(b, values(0, 1))) == pytest.approx(float(SwitchBalancer(1.0)(b, values(0, 1))))


def test_loss_free_bias() -> None:
    balancer = LossFreeBalancer(4, 0.01).double()
    p = torch.full((8, 4), 0.25, dtype=D)
    assert float(balancer(p, values(0.5, 0.25, 0.25, 0))) == 0
    torch.testing.assert_close(balancer.bias, values(-0.01, 0, 0, 0.01))
    torch.testing.assert_close(balancer.scores(p)[0], values(0.24, 0.25, 0.25, 0.26))
    balancer.eval()(p, values(1, 0, 0, 0))
    torch.testing.assert_close(balancer.bias, values(-0.01, 0, 0, 0.01))
    balancer.train()(p, values(1, 0, 0, 0), torch.zeros(8, dtype=torch.bool))
    torch.testing.assert_close(balancer.bias, values(-0.01, 0, 0, 0.01))


def test_loss_free_bias_moves_once_a_step() -> None:
    balancer = LossFreeBalancer(2, 0.01, accumulation=2).double()
    p = torch.full((8, 2), 0.5, dtype=D)
    balancer(p, values(1, 0))
    assert not balancer.bias.any()
    balancer(torch.cat([p, p]), values(0, 1))
    torch.testing.assert_close(balancer.bias, values(0.01, -0.01))
    balancer(p, values(0, 1)), balancer(p, values(0, 1))
    torch.testing.assert_close(balancer.bias, values(0.02, -0.02))


def test_two_controllers_warn() -> None:
    with pytest.warns(UserWarning, match="PhiBalancer and SwitchBalancer .* may fight"):
        CombinedBalancer([PhiBalancer(4), SwitchBalancer()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = CombinedBalancer([SwitchBalancer(0.1), LossFreeBalancer(4, 0.5)])
        CombinedBalancer([PhiBalancer(4), SwitchBalancer(0.0), Balancer()])
    p, load = tokens(5, 4).softmax(-1), values(1, 0, 0, 0)
    assert float(both(p, load)) == pytest.approx(float(SwitchBalancer(0.1)(p, load)))
    torch.testing.assert_close(both.scores(p), p + 0.5 * values(-1, 1, 1, 1))
    with pytest.raises(ValueError, match="at least one"):
        CombinedBalancer([])
    router = Router(6, 4, balancer=both)
    assert not router(torch.full((2, 6), torch.nan)).loss.isfinite(), "the loss says it, not an error"
    assert "step=0.5" in str(router)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", list(BALANCERS))
def test_router(name: str, top_k: int) -> None:
    strength = None if name == "none" else 0.1
    router = Router(6, 4, top_k, balancer=make_balancer(name, 4, strength), z_loss=0.01, dtype=D, generator=generator())
    x = tokens(9, 6)
    logits = x @ router.weight.T
    chosen, weights, loss = router(x)
    assert torch.equal(chosen, logits.softmax(-1).topk(top_k).indices), "state at the start does not move the choice"
    total = weights.sum(-1)
    expected = torch.ones(9, dtype=D) if top_k > 1 else logits.softmax(-1).amax(-1)
    torch.testing.assert_close(total, expected)
    z_loss = 0.01 * logits.logsumexp(-1).square().mean()
    p = logits.softmax(-1).mean(0)
    load = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
    torch.testing.assert_close(router.load, load)
    torch.testing.assert_close(router.soft_load, p.float())
    price = p.log()
    balance = {
        "switch": 0.1 * 4 * (load * p).sum(),
        "global_switch": 0.1 * 4 * (load * p).sum(),
        "phi": 0.1 * (p * (price - price.mean())).sum(),
    }.get(name, 0)
    assert loss.item() == pytest.approx((z_loss + balance).item(), rel=1e-5)
    assert float(router.eval()(x).loss) == 0
    if top_k == 4:
        assert router.load.tolist() == [0.25] * 4


def test_the_loss_of_phi_does_not_depend_on_top_k() -> None:
    losses = []
    for top_k in (1, 2, 4):
        router = Router(6, 4, top_k, balancer=PhiBalancer(4, coefficient=1.0), dtype=D, generator=generator())
        losses.append(router(tokens(9, 6)).loss.item())
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("name", ["phi", "selection", "hard", "loss_free", "global_switch"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_make_the_same_choices(name: str, reentrant: bool) -> None:
    """The second forward pass, in the backward, must not update state, nor choose with the updated one."""

    def make() -> Router:
        balancer = {
            "phi": lambda: PhiBalancer(4, 0.5, coefficient=1.0),
            "selection": lambda: PhiBalancer(4, 0.5, coefficient=1.0, selection=2.0),
            "hard": lambda: PhiBalancer(4, 0.5, coefficient=1.0, selection=2.0, hard=True),
            "loss_free": lambda: LossFreeBalancer(4, 0.5, accumulation=2),
            "global_switch": lambda: GlobalSwitchBalancer(4, 1.0, accumulation=2),
        }[name]()
        return Router(6, 4, 2, balancer=balancer, dtype=D, generator=generator())

    plain, again = make(), make()
    choices: list[torch.Tensor] = []

    def layer(x, router):
        chosen, weights, loss = router(x)
        if router is again:
            choices.append(chosen)
        return loss + (weights * torch.arange(2.0)).sum()

    for step in range(4):
        x, y = (tokens(9, 6, seed=step).requires_grad_() for _ in range(2))
        layer(x, plain).backward()
        checkpoint(layer, y, again, use_reentrant=reentrant).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)
    assert len(choices) == 8
    assert all(torch.equal(first, second) for first, second in zip(choices[::2], choices[1::2], strict=True))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in plain.state_dict().items())


RANKS = """
import os, sys, torch, torch.distributed as dist
from steepest.nn import GlobalSwitchBalancer, LossFreeBalancer, PhiBalancer, Router

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
MADE = {
    "phi": lambda: PhiBalancer(4, 0.9, coefficient=1.0, selection=0.1),
    "hard": lambda: PhiBalancer(4, 0.9, "euclidean", coefficient=1.0, hard=True),
    "switch": lambda: GlobalSwitchBalancer(4, 1.0),
    "free": lambda: LossFreeBalancer(4, 0.1),
}
D, found = torch.float64, {}
for name, make in MADE.items():
    router = Router(6, 4, 2, balancer=make(), dtype=D, generator=torch.Generator().manual_seed(0)).double()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    for step in range(5):
        x = torch.randn(12, 6, dtype=D, generator=torch.Generator().manual_seed(step))
        mask = torch.arange(12) % 7 != 3
        if ranks > 1:  # unequal shares; in one step all tokens of the second rank are padding
            cut = 9 if step != 2 else 12
            x, mask = (x[:cut], mask[:cut]) if rank == 0 else (x[cut:], mask[cut:])
            if not len(x):
                x, mask = torch.randn(3, 6, dtype=D), torch.zeros(3, dtype=torch.bool)
        optimizer.zero_grad()
        loss = router(x, mask).loss
        if loss.requires_grad:
            loss.backward()
            gradient = router.weight.grad
            if ranks > 1:
                dist.all_reduce(gradient)
                gradient /= ranks
            optimizer.step()
    found[name] = router.state_dict()
torch.save(found, f"{folder}/rank{rank}of{ranks}.pt")
if ranks > 1:
    dist.barrier()
os._exit(0)  # threads of gloo that meet the end of the interpreter abort the process
"""


def test_ranks_balance_as_one(tmp_path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    runs = [
        subprocess.Popen([sys.executable, script, str(rank), str(ranks), tmp_path], stderr=subprocess.PIPE, text=True)
        for ranks in (1, 2)
        for rank in range(ranks)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    one, first, second = (torch.load(tmp_path / f"rank{name}.pt") for name in ("0of1", "0of2", "1of2"))
    for name, state in one.items():
        for key, value in state.items():
            assert torch.equal(first[name][key], second[name][key]), f"{name} {key} differs between ranks"
            torch.testing.assert_close(first[name][key], value, rtol=1e-6, atol=1e-7)  # loads are in float32


def test_by_name() -> None:
    made = {name: make_balancer(name, 4) for name in BALANCERS}
    assert type(made["none"]) is Balancer and not made["none"].active
    assert all(balancer.active for name, balancer in made.items() if name != "none")
    assert not any(make_balancer(name, 4, 0.0).active for name in BALANCERS)
    assert make_balancer("loss_free", 4, 0.5).step == 0.5
    assert make_balancer("phi", 4, accumulation=3).accumulation == 3
    with pytest.raises(ValueError, match=r"balance must be one of none, switch.* got 'even'"):
        make_balancer("even", 4)
    with pytest.raises(ValueError, match="strength must be left out"):
        make_balancer("none", 4, 0.1)
    for name in ("switch", "global_switch", "loss_free", "phi"):
        with pytest.raises(ValueError, match="-1"):
            make_balancer(name, 4, -1.0)


def test_wrong_routers() -> None:
    with pytest.raises(ValueError, match="top_k must be at most experts = 2, got 3"):
        Router(6, 2, 3)
    with pytest.raises(ValueError, match="balancer must be for experts = 4, got one for 8"):
        Router(6, 4, balancer=PhiBalancer(8))
    with pytest.raises(ValueError, match="z_loss"):
        Router(6, 4, z_loss=-1.0)


def test_metrics() -> None:
    even, one = torch.full((2, 4), 0.25), torch.tensor([1.0, 0, 0, 0])
    assert load_metrics(even) == {
        "max_violation": 0,
        "load_cv": 0,
        "load_entropy": pytest.approx(1),
        "dead_experts": 0,
    }
    assert load_metrics(one) == {
        "max_violation": 3,
        "load_cv": pytest.approx(3**0.5),
        "load_entropy": pytest.approx(0),
        "dead_experts": 0.75,
    }
    assert max_violation(torch.stack([one, even[0]])).tolist() == [3, 0]
    assert float(load_cv(torch.tensor([0.75, 0.25]))) == pytest.approx(0.5)
    assert float(load_entropy(torch.tensor([0.5, 0.5, 0, 0]))) == pytest.approx(0.5)
    assert float(load_entropy(torch.ones(1))) == 1
    load = torch.tensor([0.002, 0.03, 0.268, 0.7])
    assert float(dead_experts(load)) == 0.25
    assert float(dead_experts(load, 0.5)) == 0.5
    assert float(dead_experts(load, 0.001)) == 0


def test_loads_are_exact_in_a_low_precision_model() -> None:
    router = Router(6, 4, 1, generator=generator()).bfloat16()
    router(tokens(1001, 6).bfloat16())
    counts = router.load.double() * 1001
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)


def test_reset() -> None:
    balancer = PhiBalancer(4)
    balancer(tokens(5, 4).softmax(-1))
    balancer.reset()
    assert not balancer.average.any() and not balancer.weight
