import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from steepest.models import GPT, GPTConfig, rotary_table, rotate

TINY = GPTConfig(vocab_size=11, context=12, layers=2, heads=4, width=16, dtype=torch.float64)


def make(config=TINY, seed=0, **options):
    return GPT(config, generator=torch.Generator().manual_seed(seed), **options)


def tokens(batch=3, time=12, vocab=11, seed=1):
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


VARIANTS = {
    "dense": {},
    "grouped": {"kv_heads": 2},
    "one_kv_head": {"kv_heads": 1},
    "tied": {"tied": True},
    "no_qk_norm": {"qk_norm": False},
    "experts": {"experts": 4, "top_k": 2},
    "switch": {"experts": 4, "top_k": 1, "z_loss": 1e-3},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@variants
def test_the_past_does_not_see_the_future(options):
    model = make(replace(TINY, **options)).eval()
    x = tokens()
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax() > 1e-6


@variants
def test_logits_do_not_depend_on_the_rest_of_the_batch_or_on_a_longer_sequence(options):
    model = make(replace(TINY, **options)).eval()
    x = tokens()
    torch.testing.assert_close(model(x)[1:2, :5], model(x[1:2, :5]), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    start=st.integers(0, 20),
    gap=st.integers(0, 20),
    shift=st.integers(0, 20),
    half=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_rotated_products_depend_on_the_distance_alone(start, gap, shift, half, seed):
    cos, sin = rotary_table(64, 2 * half, dtype=torch.float64)
    q, k = torch.randn(2, 1, 2 * half, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def product(s, t):
        return rotate(q, cos[s : s + 1], sin[s : s + 1]) @ rotate(k, cos[t : t + 1], sin[t : t + 1]).T

    torch.testing.assert_close(product(start, start + gap), product(start + shift, start + shift + gap))
    torch.testing.assert_close(rotate(q, cos[start : start + 1], sin[start : start + 1]).norm(), q.norm())


def test_rotary_angles():
    cos, sin = rotary_table(3, 4, base=100.0, dtype=torch.float64)
    torch.testing.assert_close(cos[2], torch.tensor([math.cos(2), math.cos(0.2)], dtype=torch.float64))
    torch.testing.assert_close(sin[2], torch.tensor([math.sin(2), math.sin(0.2)], dtype=torch.float64))


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    grouped, full = make(replace(TINY, kv_heads=2)), make()
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()), full(tokens()), rtol=0, atol=1e-12)


def test_a_block_equals_its_formula():
    model = make(replace(TINY, layers=1, kv_heads=2))
    x, block = tokens(), model.blocks[0]

    def norm(z, weight):
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    h = model.embedding.weight[x]
    a, z = block.attention, norm(h, block.attention_norm.weight)
    out = torch.zeros_like(h)
    for head in range(4):
        rows, kv_rows = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        q = norm(z @ a.q_proj.weight[rows].T, a.q_norm.weight)
        k = norm(z @ a.k_proj.weight[kv_rows].T, a.k_norm.weight)
        q, k = rotate(q, model.cos, model.sin), rotate(k, model.cos, model.sin)
        scores = q @ k.mT / 2 + torch.full((12, 12), -torch.inf, dtype=h.dtype).triu(1)
        out = out + scores.softmax(-1) @ (z @ a.v_proj.weight[kv_rows].T) @ a.o_proj.weight[:, rows].T
    h = h + out
    m, z = block.mlp, norm(h, block.mlp_norm.weight)
    h = h + (F.silu(z @ m.gate_proj.weight.T) * (z @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    torch.testing.assert_close(model(x), norm(h, model.norm.weight) @ model.head.weight.T, rtol=0, atol=1e-12)


def test_a_tied_head_is_the_embedding():
    model = make(replace(TINY, tied=True))
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    assert make().head.weight.data_ptr() != make().embedding.weight.data_ptr()


@variants
def test_the_loss_is_the_cross_entropy_of_the_logits(options):
    model = make(replace(TINY, **options)).eval()
    x, y = tokens(), tokens(seed=2)
    torch.testing.assert_close(model(x, y), F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    y[:, ::2] = -100
    kept = model(x)[:, 1::2].flatten(0, 1)
    torch.testing.assert_close(model(x, y), F.cross_entropy(kept, y[:, 1::2].flatten()))


@variants
def test_the_first_loss_is_near_log_vocab(options):
    model = make(GPTConfig(vocab_size=256, context=32, width=64, **options))
    x, y = tokens(8, 32, 256), tokens(8, 32, 256, seed=2)
    assert abs(model(x, y).item() - math.log(256)) < (0.5 if options.get("tied") else 0.1)


@variants
def test_a_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(options):
    config = replace(TINY, **options)
    before = torch.get_rng_state()
    first, same, other = make(config), make(config), make(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, p), q, r in zip(first.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.dim() == 1 or not torch.equal(p, r), name
    single = make(replace(config, dtype=torch.float32))
    assert all(torch.equal(p.float(), q) for p, q in zip(first.parameters(), single.parameters(), strict=True))


def test_without_a_generator_torch_seeds_it():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = GPT(TINY)
        torch.manual_seed(3)
        second = GPT(TINY)
    assert torch.equal(first.head.weight, second.head.weight)


def test_initial_scale():
    model = make(GPTConfig(vocab_size=500, context=8, layers=8, heads=4, width=256))
    block = model.blocks[3]
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attention.q_proj.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert block.attention.o_proj.weight.std().item() == pytest.approx(1 / 64, rel=0.02)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(model.config.hidden**-0.5 / 4, rel=0.02)


@pytest.mark.parametrize("options", [VARIANTS["grouped"], VARIANTS["experts"]], ids=["grouped", "experts"])
def test_gradients(options):
    config = replace(TINY, vocab_size=5, context=4, layers=1, heads=2, width=4, **{**options, "kv_heads": 1})
    model = make(config)
    x, y = tokens(2, 4, 5), tokens(2, 4, 5, seed=2)
    names = [name for name, _ in model.named_parameters()]

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x, y))

    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(loss, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, values, fast_mode=True)


@variants
def test_every_parameter_gets_a_gradient(options):
    model = make(replace(TINY, **options))
    model(tokens(), tokens(seed=2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@variants
def test_bf16_autocast(options):
    model = make(replace(TINY, dtype=torch.float32, **options))
    x, y = tokens(), tokens(seed=2)
    exact = model(x, y)
    with warnings.catch_warnings(action="error"), torch.autocast("cpu", torch.bfloat16):
        loss = model(x, y)
        assert model(x).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    loss.backward()


def test_compiled():
    model = make(replace(TINY, layers=1, kv_heads=2, experts=4))
    x, y = tokens(), tokens(seed=2)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, y), model(x, y))


def test_a_bf16_model_runs():
    model = make(replace(TINY, dtype=torch.bfloat16))
    assert model(tokens()).dtype == torch.bfloat16
    assert model(tokens(), tokens(seed=2)).dtype == torch.float32


def test_meta_device():
    model = GPT(TINY, device="meta")
    assert all(p.is_meta for p in model.parameters())


def test_it_learns_a_repeated_sequence():
    model = make(replace(TINY, dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = (torch.arange(13) % 11).expand(4, -1)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    assert model.generate(x[:1, :3], 9, temperature=0.0)[0].tolist() == [i % 11 for i in range(12)]


def test_generate():
    model = make().train()
    start = tokens(2, 3)
    first = model.generate(start, 15, generator=torch.Generator().manual_seed(5))
    second = model.generate(start, 15, generator=torch.Generator().manual_seed(5))
    assert first.shape == (2, 18)
    assert torch.equal(first, second)
    assert torch.equal(first[:, :3], start)
    assert model.training
    greedy = model.generate(start, 4, temperature=0.0)
    assert torch.equal(greedy[:, 3], model(start)[:, -1].argmax(-1))
    assert torch.equal(model.generate(start, 0), start)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"context": 0}, "context"),
        ({"layers": -1}, "layers"),
        ({"heads": 3}, "width"),
        ({"width": 12}, "width"),  # heads of odd size
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv_heads": 8}, "kv_heads"),
        ({"experts": 2, "top_k": 3}, "top_k"),
        ({"experts": 2, "top_k": 0}, "top_k"),
        ({"experts": -1}, "experts"),
        ({"ffn_mult": 0.0}, "ffn_mult"),
        ({"ffn_mult": float("nan")}, "ffn_mult"),
        ({"rope_base": -1.0}, "rope_base"),
        ({"balance": "even"}, "balance"),
        ({"balance_strength": -0.1}, "balance_strength"),
    ],
)
def test_wrong_configuration(options, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        replace(TINY, **options)


@pytest.mark.parametrize(
    ("options", "name"), [({"width": 16.0}, "width"), ({"layers": True}, "layers"), ({"dtype": torch.int64}, "dtype")]
)
def test_wrong_type_in_configuration(options, name):
    with pytest.raises(TypeError, match=f"^{name} must"):
        replace(TINY, **options)


def test_wrong_input():
    model = make()
    with pytest.raises(ValueError, match="context = 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(batch, time\)"):
        model(torch.zeros(4, dtype=torch.long))
    with pytest.raises(TypeError, match="integers"):
        model(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="from 0 to 10"):
        model(torch.full((1, 4), 11))
    with pytest.raises(ValueError, match="targets"):
        model(tokens(), tokens()[:, 1:])
    with pytest.raises(TypeError, match="GPTConfig"):
        GPT(256)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="balancer"):
        make(balancer=lambda experts: None)
    with pytest.raises(ValueError, match="experts"):
        model.expert_load()
    with pytest.raises(ValueError, match="temperature"):
        model.generate(tokens(), 1, temperature=-1.0)
    with pytest.raises(ValueError, match="length"):
        model.generate(tokens(), -1)
