from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.models import GPT, GPTConfig, MoE, SwiGLU
from steepest.nn import Balancer, PhiBalancer, SwitchBalancer

D = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(experts=4, top_k=2, **options):
    return MoE(8, 12, experts, top_k, dtype=D, generator=generator(), **options)


def reference(moe, x):
    """The definition, one token at a time."""
    out = torch.zeros_like(x)
    for row, token in enumerate(x):
        p = (moe.router.weight @ token).softmax(0)
        best = p.sort(descending=True).indices[: moe.router.top_k]
        total = p[best].sum() if moe.router.top_k > 1 else 1.0
        for e in best:
            hidden = F.silu(moe.experts.gate_proj[e] @ token) * (moe.experts.up_proj[e] @ token)
            out[row] += p[e] / total * (moe.experts.down_proj[e] @ hidden)
    return out


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 6), data=st.data(), tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_output_is_the_weighted_sum_of_the_chosen_experts(experts, data, tokens, seed):
    moe = make(experts, data.draw(st.integers(1, experts)))
    x = torch.randn(tokens, 8, dtype=D, generator=generator(seed))
    y, _ = moe(x)
    torch.testing.assert_close(y, reference(moe, x), rtol=1e-10, atol=1e-12)
    assert moe.router.load.sum().item() == pytest.approx(1)
    folded, _ = moe(x.view(1, tokens, 8))
    assert torch.equal(folded[0], y)


def test_all_experts_equal_the_dense_sum():
    moe = make(4, 4)
    x = torch.randn(5, 3, 8, dtype=D, generator=generator(1))
    hidden = F.silu(torch.einsum("btd,efd->btef", x, moe.experts.gate_proj))
    hidden = hidden * torch.einsum("btd,efd->btef", x, moe.experts.up_proj)
    each = torch.einsum("btef,edf->bted", hidden, moe.experts.down_proj)
    expected = (F.linear(x, moe.router.weight).softmax(-1).unsqueeze(-1) * each).sum(2)
    torch.testing.assert_close(moe(x)[0], expected, rtol=1e-10, atol=1e-12)
    assert moe.router.load.tolist() == [0.25] * 4


def test_one_expert_equals_the_dense_block():
    moe, dense = make(1, 1), SwiGLU(8, 12, dtype=D)
    dense.load_state_dict(
        {f"{name}.weight": getattr(moe.experts, name)[0] for name in ("gate_proj", "up_proj", "down_proj")}
    )
    x = torch.randn(7, 8, dtype=D, generator=generator(1))
    torch.testing.assert_close(moe(x)[0], dense(x), rtol=0, atol=1e-14)


def test_permuting_experts_changes_nothing():
    moe, permuted = make(), make()
    order = torch.tensor([2, 0, 3, 1])
    permuted.load_state_dict({name: value[order] for name, value in moe.state_dict().items()})
    x = torch.randn(9, 8, dtype=D, generator=generator(1))
    torch.testing.assert_close(moe(x)[0], permuted(x)[0], rtol=0, atol=1e-14)
    assert torch.equal(moe.router.load[order], permuted.router.load)


def test_gradients_reach_router_and_used_experts_only():
    moe = make(6, 1)
    x = torch.randn(3, 8, dtype=D, generator=generator(1))
    moe(x)[0].square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 0
    used = moe.router.load > 0
    assert torch.equal(moe.experts.gate_proj.grad.flatten(1).abs().amax(1) > 0, used)


def test_no_tokens():
    y, loss = make()(torch.zeros(0, 8, dtype=D))
    assert y.shape == (0, 8)
    assert loss.item() == 0


def test_auxiliary_losses():
    moe = make(balancer=SwitchBalancer(0.1), z_loss=0.01)
    x = torch.randn(9, 8, dtype=D, generator=generator(1))
    logits = x @ moe.router.weight.T
    _, loss = moe(x)
    expected = (
        0.1 * 4 * (moe.router.load * logits.softmax(-1).mean(0)).sum() + 0.01 * logits.logsumexp(-1).square().mean()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert moe.eval()(x)[1].item() == 0


def test_the_model_adds_the_auxiliary_loss_in_training_only():
    config = GPTConfig(11, context=8, layers=2, heads=2, width=8, experts=4, dtype=D, balance_strength=0.3)
    model = GPT(config, generator=generator())
    without = GPT(replace(config, balance_strength=0.0), generator=generator())
    x, y = torch.randint(11, (2, 3, 8), generator=generator(1))
    terms = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: terms.append(out[1]))
    extra = model(x, y) - without(x, y)
    assert len(terms) == 2
    torch.testing.assert_close(extra, terms[0] + terms[1])
    assert torch.equal(model.eval()(x, y), without.eval()(x, y))
    assert model.expert_load().shape == (2, 4)


class Forced(Balancer):
    """Sends every token to the last experts, and remembers how often it was asked."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def scores(self, probabilities):
        self.calls += 1
        return torch.arange(probabilities.shape[-1], dtype=probabilities.dtype).expand_as(probabilities)


def test_a_balancer_of_ones_own():
    config = GPTConfig(11, context=8, layers=2, heads=2, width=8, experts=4, dtype=D)
    model = GPT(config, generator=generator(), balancer=lambda experts: Forced())
    x = torch.randint(11, (3, 8), generator=generator(1))
    model(x)
    assert model.expert_load().tolist() == [[0, 0, 0.5, 0.5]] * 2
    assert model.state_dict()["blocks.1.mlp.router.balancer.calls"].item() == 1


@pytest.mark.parametrize("name", ["none", "switch", "global_switch", "loss_free", "phi"])
def test_the_balancers_by_name(name):
    """Strength 0 is, to the bit, no balancing; and the default of each trains."""
    config = GPTConfig(11, context=8, layers=2, heads=2, width=8, experts=4, dtype=D, balance="none")
    x, y = torch.randint(11, (2, 3, 8), generator=generator(1))

    def train(config):
        model = GPT(config, generator=generator())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x, y).backward()
            optimizer.step()
        return list(model.parameters())

    off = train(replace(config, balance=name, balance_strength=0.0))
    assert all(map(torch.equal, train(config), off))
    if name != "none":
        on = train(replace(config, balance=name, balance_strength=0.1))
        assert not all(map(torch.equal, off, on))


def test_padding_does_not_count():
    config = GPTConfig(11, context=8, layers=1, heads=2, width=8, experts=4, dtype=D, balance="phi", z_loss=0.1)
    short, long = GPT(config, generator=generator()), GPT(config, generator=generator())
    x, y = torch.randint(11, (2, 3, 6), generator=generator(1))
    padded = F.pad(x, (0, 2), value=7), F.pad(y, (0, 2), value=-100)
    mask = torch.arange(8).expand(3, 8) < 6
    assert short(x, y).item() == pytest.approx(long(*padded, mask).item(), rel=1e-12)
    for soft in (False, True):
        torch.testing.assert_close(short.expert_load(soft), long.expert_load(soft))
    name = "blocks.0.mlp.router.balancer.average"
    torch.testing.assert_close(short.state_dict()[name], long.state_dict()[name])


def test_expert_size():
    dense = GPTConfig(11, width=96, heads=2)
    assert dense.hidden == 256
    assert replace(dense, experts=8).hidden == 128
    assert replace(dense, experts=8, expert_mult=1.0).hidden == 96


def test_wrong_use():
    with pytest.raises(ValueError, match="top_k"):
        make(2, 3)
    with pytest.raises(ValueError, match="experts"):
        make(0, 1)
    with pytest.raises(ValueError, match="balancer must be for experts = 4, got one for 8"):
        make(balancer=PhiBalancer(8))
    with pytest.raises(ValueError, match="mask must"):
        model = GPT(GPTConfig(11, context=8, layers=1, heads=2, width=8, experts=4))
        model(torch.zeros(1, 4, dtype=torch.int64), mask=torch.ones(1, 3, dtype=torch.bool))
