"""The symmetry-compatible stack: which rule each parameter gets, what a step does, families by their configs."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from steepest.geometry import Hybrid, MaxRow, OneSided, RowNorm, centered, polar
from steepest.models import GPT, GPTConfig
from steepest.optim import SymmetryStack, build, roles, symmetry_groups
from steepest.optim.symmetry import RULES


def gpt(seed: int = 0, **options) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=32, context=8, layers=1, heads=4, width=16, kv_heads=2, **options))


def fill_gradients(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def rules_of(model: nn.Module, *arguments, **options) -> dict[str, str]:
    groups = symmetry_groups(model, *arguments, **options)
    return {name: group["rule"] for group in groups for name, _ in group["params"]}


def group_of(groups, name: str) -> dict:
    return next(group for group in groups if any(name == own for own, _ in group["params"]))


def expected_rule(role: str, tied: bool = False) -> str:
    if role in ("norm", "bias", "scalar", "position"):
        return "adamw"
    return {"embedding": "row", "head": "centered_row", "router": "centered_left"}.get(role, "muon")


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"experts": 4}])
def test_our_gpt(options):
    model = gpt(**options)
    found = roles(model)
    assert rules_of(model) == {name: expected_rule(row.role.value) for name, row in found.items()}
    groups = symmetry_groups(model)
    tables = [row.name for row in found.values() if row.role.value == "embedding"]
    group = group_of(groups, tables[0])
    ratio = {"{}": 25.0, "{'tied': True}": 0.25, "{'experts': 4}": 100.0}[str(options)]
    assert group["lr"] == pytest.approx(ratio * (0.005 if options.get("experts") else 0.02))
    assert group["weight_decay"] == 0
    assert group["kind"] == ("tied" if options.get("tied") else "embedding")


SIZE = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GQA = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GQA),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", GQA),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GQA),
    "GPT2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 4},
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    "Olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**SIZE, "num_experts": 4, "num_experts_per_tok": 2}),
    "GptOss": ("GptOssForCausalLM", "GptOssConfig", {**GQA, "num_local_experts": 4}),
}


def family(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kind, config, options = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**options))


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_families(name):
    model = family(name)
    found = roles(model)
    assert not found.ambiguous
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = build(model, "symmetry_stack", lr=1e-3)
    assert isinstance(optimizer, SymmetryStack)
    assert rules_of(model) == {name: expected_rule(row.role.value) for name, row in found.items()}
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    model.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_attention_is_cut_into_heads_everywhere():
    groups = symmetry_groups(family("Llama"))
    prefix = "model.layers.0.self_attn"
    assert group_of(groups, f"{prefix}.q_proj.weight")["split"] == (8,) * 4
    assert group_of(groups, f"{prefix}.k_proj.weight")["split"] == (8,) * 2
    assert group_of(groups, f"{prefix}.o_proj.weight")["input_split"] == (8,) * 4
    fused = group_of(symmetry_groups(family("GPT2")), "transformer.h.0.attn.c_attn.weight")
    assert (fused["split"], fused["transposed"]) == ((8,) * 12, True)
    whole = symmetry_groups(family("GPT2"), per_head=False)
    assert group_of(whole, "transformer.h.0.attn.c_attn.weight")["split"] == (32,) * 3
    assert group_of(whole, "transformer.h.0.attn.c_proj.weight")["input_split"] is None


def test_one_step_is_the_formula():
    model = gpt().double()
    found = roles(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = symmetry_groups(model, lr=0.01, polar="svd", weight_decay=0.1)
    rates = {name: (g["lr"], g["weight_decay"]) for g in groups for name, _ in g["params"]}
    fill_gradients(model)
    SymmetryStack(groups, momentum=0.9).step()
    for name, parameter in model.named_parameters():
        row, gradient = found[name], parameter.grad
        assert gradient is not None
        rate, decay = rates[name]
        match row.role.value:
            case "embedding":
                step = gradient / gradient.norm(dim=1, keepdim=True)
            case "head":
                rows = centered(gradient)
                step = centered(rows / rows.norm(dim=1, keepdim=True))
            case "attention_out":
                step = torch.cat([polar(b, "svd") * (16 / 4) ** 0.5 for b in gradient.split(4, 1)], 1)
            case "query" | "key" | "value" | "qkv":
                step = torch.cat([polar(block, "svd") for block in gradient.split(4)])
            case "norm":
                continue
            case _:
                blocks = [gradient] if row.split is None else gradient.split(row.split)
                factors = [polar(b, "svd") * max(1, b.shape[0] / b.shape[1]) ** 0.5 for b in blocks]
                step = torch.cat(factors)
        expected = before[name] * (1 - rate * decay) - rate * step
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", [{}, {"experts": 4}, {"tied": True}])
def test_resumes_bit_exactly(options, tmp_path):
    start = gpt(**options)

    def steps(model: nn.Module, optimizer: SymmetryStack, seeds: range) -> None:
        for seed in seeds:
            fill_gradients(model, seed)
            optimizer.step()

    through, stopped = deepcopy(start), deepcopy(start)
    steps(through, SymmetryStack(symmetry_groups(through)), range(6))
    optimizer = SymmetryStack(symmetry_groups(stopped))
    steps(stopped, optimizer, range(3))
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    resumed, saved = deepcopy(start), torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer = SymmetryStack(symmetry_groups(resumed))
    optimizer.load_state_dict(saved["optimizer"])
    steps(resumed, optimizer, range(3, 6))
    for a, b in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rules_and_rates_of_the_user():
    model = family("GptOss")
    prefix = "model.layers.0.mlp.experts"
    rules = {
        "embedding": "hybrid",
        "head": "centered_hybrid",
        "experts": "row",
        "expert_gate_up": "pair_hybrid",
        "expert_down": "column_hybrid",
        "attention": OneSided(alpha=0.0),
    }
    groups = symmetry_groups(model, rules=rules, lrs={"embedding": 0.3, "matrix": 0.1}, alpha=1.0, polar="eigh")
    assert group_of(groups, "model.embed_tokens.weight")["norm"] == Hybrid(method="eigh")
    assert group_of(groups, "model.embed_tokens.weight")["lr"] == 0.3
    assert group_of(groups, "lm_head.weight")["norm"] == Hybrid(method="eigh", center=True)
    pair = group_of(groups, f"{prefix}.gate_up_proj")
    assert pair["norm"] == Hybrid(method="eigh", orientation="pair_interleaved", per_matrix_scale=False)
    assert (pair["lr"], pair["interleaved"], pair["split"], pair["transposed"]) == (0.1, 1, None, True)
    down = group_of(groups, f"{prefix}.down_proj")["norm"]
    assert down == Hybrid(method="eigh", orientation="columns", per_matrix_scale=False)
    assert group_of(groups, "model.layers.0.self_attn.q_proj.weight")["rule"] == str(OneSided(alpha=0.0))
    own = symmetry_groups(model, rules={"experts": "hybrid"}, per_expert_scale=True)
    assert group_of(own, f"{prefix}.down_proj")["norm"].per_matrix_scale
    fill_gradients(model)
    SymmetryStack(groups).step()


def test_gate_and_up_of_gpt_oss_are_two_matrices_under_muon():
    model = family("GptOss").double()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before = model.get_parameter(name).detach().clone()
    fill_gradients(model)
    groups = symmetry_groups(model, lr=0.1, polar="svd", weight_decay=0.0)
    SymmetryStack(groups, momentum=0.0).step()
    gradient = model.get_parameter(name).grad
    assert gradient is not None and before.shape == (4, 32, 96)
    step = torch.empty_like(before)
    for start in (0, 1):
        block = gradient[:, :, start::2].mT
        step[:, :, start::2] = polar(block, "svd").mT * (48 / 32) ** 0.5
    torch.testing.assert_close(model.get_parameter(name).detach(), before - 0.1 * step, rtol=0, atol=1e-12)


def test_one_row_has_only_the_shift_and_is_not_centered():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 1, bias=False))
    overrides = {"2.weight": "head"}
    assert group_of(symmetry_groups(model, overrides=overrides), "2.weight")["norm"] == RowNorm()


def test_row_norm_is_the_norm_of_the_longest_row():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(RowNorm().direction(x), MaxRow().direction(x))


def test_centring_an_embedding_warns():
    with pytest.warns(UserWarning, match="centres embed.*an embedding"):
        symmetry_groups(gpt(), rules={"embedding": "centered_row"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "encoder"}, "preset must be one of"),
        ({"preset": "moe"}, "needs a router"),
        ({"rules": {"embeddings": "row"}}, "no role or kind 'embeddings'"),
        ({"rules": {"router": "row"}}, "no trainable parameter is of 'router'"),
        ({"lrs": {"router": 0.1}}, "no trainable parameter is of 'router'"),
        ({"rules": {"embedding": "magic"}}, "rule must be a Direction or one of"),
        ({"rules": {"down": "pair"}}, "needs gate and up in one parameter, and .*down"),
        ({"alpha": -1.0, "rules": {"embedding": "hybrid"}}, "alpha must be"),
        ({"steps": 0, "rules": {"embedding": "hybrid"}}, "steps must be"),
        ({"min_row_norm": 2.0}, "min_row_norm must be"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        symmetry_groups(gpt(), **options)


def test_bad_groups_are_refused():
    model = gpt()
    groups = symmetry_groups(model)
    with pytest.raises(ValueError, match="there is none"):
        SymmetryStack([])
    with pytest.raises(ValueError, match="stand in more than one group"):
        SymmetryStack([*groups, {**groups[0]}])
    with pytest.raises(ValueError, match="it has no rule"):
        SymmetryStack([{"params": list(model.parameters())}])
    with pytest.raises(ValueError, match="rule must be one of"):
        SymmetryStack([{"params": list(model.parameters()), "rule": "magic"}])
    with pytest.raises(ValueError, match="momentum"):
        SymmetryStack(groups, momentum=1.0)
    norm = next((name, p) for name, p in model.named_parameters() if p.ndim == 1)
    with pytest.raises(ValueError, match=f"{norm[0]}"):
        SymmetryStack([{"params": [norm], "rule": "row"}])
    with pytest.raises(ValueError, match=r"even number of outputs.*\(5, 4\)"):
        pair = {"norm": RowNorm(orientation="pair_concatenated"), "rule": "pair"}
        SymmetryStack([{"params": [("fused", nn.Parameter(torch.zeros(5, 4)))], **pair}])


def test_sparse_gradients_are_refused_with_advice():
    table = nn.Embedding(5, 4, sparse=True)
    optimizer = SymmetryStack([{"params": [("table", table.weight)], "rule": "row", "lr": 0.1}])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="must be dense"):
        optimizer.step()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("adamw", "pair", "pair_hybrid")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_rule_steps_on_every_size_and_dtype(rule, dtype):
    for size in (0.0, 1e-20, 1e-4, 6e4):
        weight = nn.Parameter(torch.zeros(12, 8, dtype=dtype))
        optimizer = SymmetryStack([{"params": [("w", weight)], "rule": rule, "lr": 1e-6}])
        gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * size
        for _ in range(3):
            weight.grad = gradient.to(dtype)
            optimizer.step()
            assert weight.isfinite().all()
        if size == 0:
            assert not weight.any()


def test_a_token_that_is_not_touched_does_not_move():
    table = nn.Embedding(6, 4)
    before = table.weight.detach().clone()
    optimizer = SymmetryStack([{"params": [("table", table.weight)], "rule": "row", "lr": 0.1}], momentum=0.95)
    table(torch.tensor([2])).sum().backward()
    for _ in range(100):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    moved = (table.weight.detach() - before).norm(dim=1)
    assert not moved[[0, 1, 3, 4, 5]].any()
    torch.testing.assert_close(moved[2], torch.tensor(10.0))


def test_pairs_joined_in_one_parameter_train_as_under_a_relabelling():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 10, 4, dtype=torch.float64, generator=generator)
    gradient = torch.randn(2, 10, 4, dtype=torch.float64, generator=generator)
    order = torch.randperm(5, generator=generator)
    both = torch.cat([order, order + 5])
    for norm in (RowNorm(orientation="pair_concatenated"), Hybrid(orientation="pair_concatenated", method="svd")):
        plain, turned = nn.Parameter(weight.clone()), nn.Parameter(weight[:, both].clone())
        plain.grad, turned.grad = gradient, gradient[:, both]
        group = {"rule": "pair", "norm": norm, "lr": 0.1}
        SymmetryStack([{"params": [("a", plain)], **group}]).step()
        SymmetryStack([{"params": [("b", turned)], **group}]).step()
        torch.testing.assert_close(turned.detach(), plain.detach()[:, both], rtol=0, atol=1e-12)
