"""Hugging Face families, built tiny from their configs; the expected roles are written by hand from their sources."""

import pytest
import torch

from steepest.optim.roles import Role, Roles, roles

transformers = pytest.importorskip("transformers")

QKVO = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention_out"}
SWIGLU = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def plain(result: Roles) -> dict[str, str]:
    """Names without ".weight" -> role; norms and biases left out."""
    rows = [row for row in result.values() if row.role not in (Role.NORM, Role.BIAS)]
    return {row.name.removesuffix(".weight"): row.role.value for row in rows}


def block(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": role for name, role in names.items()}


SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GQA = {**SIZE, **NO_TOKENS, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
MHA = {**SIZE, **NO_TOKENS, "intermediate_size": 48}


def found(kind: str, config: str, **options) -> Roles:
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    result = roles(model)
    assert not result.ambiguous
    return result


def layers(prefix: str, names: dict[str, str], count: int = 2) -> dict[str, str]:
    merged = {}
    for layer in range(count):
        merged |= block(f"{prefix}.{layer}", names)
    return merged


DENSE = block("self_attn", QKVO) | block("mlp", SWIGLU)


@pytest.mark.parametrize(
    ("family", "tied"),
    [("Llama", False), ("Qwen2", False), ("Qwen3", False), ("Mistral", False), ("Gemma", True), ("Gemma2", True)],
)
def test_dense_llama_like(family, tied):
    result = found(f"{family}ForCausalLM", f"{family}Config", **GQA, tie_word_embeddings=tied)
    expected = {"model.embed_tokens": "embedding"} | layers("model.layers", DENSE)
    if tied:
        assert result["model.embed_tokens.weight"].shared_with == ("lm_head.weight",)
    else:
        expected["lm_head"] = "head"
    assert plain(result) == expected
    assert result["model.layers.0.self_attn.k_proj.weight"].head_dim == 8


def test_gemma3():
    result = found("Gemma3ForCausalLM", "Gemma3TextConfig", **GQA)
    assert plain(result) == {"model.embed_tokens": "embedding"} | layers("model.layers", DENSE)
    assert result["model.layers.0.self_attn.q_norm.weight"].role is Role.NORM


def test_gpt2():
    options = {"vocab_size": 97, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, **NO_TOKENS}
    result = found("GPT2LMHeadModel", "GPT2Config", **options)
    names = {"attn.c_attn": "qkv", "attn.c_proj": "attention_out", "mlp.c_fc": "up", "mlp.c_proj": "down"}
    assert plain(result) == {"transformer.wte": "embedding", "transformer.wpe": "position"} | layers(
        "transformer.h", names
    )
    assert all(result[f"transformer.h.0.{name}.weight"].transposed for name in names)
    row = result["transformer.h.1.attn.c_attn.weight"]
    assert (row.shape, row.split, row.blocks) == ((32, 96), (32, 32, 32), ("query", "key", "value"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Mixtral", {**GQA, "num_local_experts": 4}),
        ("Olmoe", {**MHA, "num_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen3Moe", {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    ],
)
def test_mixtures_of_experts(family, options):
    result = found(f"{family}ForCausalLM", f"{family}Config", **options)
    moe = {"gate": "router", "experts.gate_up_proj": "expert_gate_up", "experts.down_proj": "expert_down"}
    names = block("self_attn", QKVO) | block("mlp", moe)
    assert plain(result) == {"model.embed_tokens": "embedding", "lm_head": "head"} | layers("model.layers", names)
    row = result["model.layers.0.mlp.experts.gate_up_proj"]
    assert (row.shape, row.layout, row.split, row.transposed, row.interleaved) == (
        (4, 96, 32),
        "batch",
        (48, 48),
        False,
        False,
    )
    assert result["model.layers.0.mlp.experts.down_proj"].split is None


def test_gpt_oss_stores_experts_transposed_and_interleaved():
    result = found("GptOssForCausalLM", "GptOssConfig", **GQA, num_local_experts=4)
    moe = {"router": "router", "experts.gate_up_proj": "expert_gate_up", "experts.down_proj": "expert_down"}
    names = block("self_attn", {**QKVO, "sinks": "scalar"}) | block("mlp", moe)
    assert plain(result) == {"model.embed_tokens": "embedding", "lm_head": "head"} | layers("model.layers", names)
    row = result["model.layers.0.mlp.experts.gate_up_proj"]
    assert (row.shape, row.transposed, row.interleaved, row.split) == ((4, 32, 96), True, True, None)
    down = result["model.layers.0.mlp.experts.down_proj"]
    assert (down.transposed, down.interleaved) == (True, False)
    assert result["model.layers.0.mlp.experts.down_proj_bias"].role is Role.BIAS


def test_gpt_oss_of_square_experts_is_told_by_its_flag():
    result = found("GptOssForCausalLM", "GptOssConfig", **{**GQA, "intermediate_size": 32}, num_local_experts=4)
    assert result["model.layers.0.mlp.experts.down_proj"].transposed


def test_shared_expert_and_its_gate():
    options = {**GQA, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    options.pop("head_dim")
    result = found("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **options)
    prefix = "model.layers.0.mlp"
    assert result[f"{prefix}.shared_expert_gate.weight"].role is Role.ROUTER
    assert result[f"{prefix}.shared_expert.gate_proj.weight"].role is Role.GATE
    assert result[f"{prefix}.experts.gate_up_proj"].role is Role.EXPERT_GATE_UP


def test_deepseek_latent_attention():
    result = found(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", **MHA, num_key_value_heads=4, moe_intermediate_size=24,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=0, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    )  # fmt: skip
    prefix = "model.layers.0.self_attn"
    assert {name: str(result[f"{prefix}.{name}.weight"].role) for name in ("q_a_proj", "q_b_proj", "o_proj")} == {
        "q_a_proj": "linear",
        "q_b_proj": "query",
        "o_proj": "attention_out",
    }
    row = result[f"{prefix}.kv_b_proj.weight"]
    assert row.role is Role.KEY_VALUE and row.split == (6, 8) * 4 and row.interleaved


def test_phi3_fuses_by_blocks():
    result = found("Phi3ForCausalLM", "Phi3Config", **{**MHA, "pad_token_id": 0}, num_key_value_heads=2)
    names = {"self_attn.qkv_proj": "qkv", "self_attn.o_proj": "attention_out", "mlp.gate_up_proj": "gate_up"}
    names["mlp.down_proj"] = "down"
    assert plain(result) == {"model.embed_tokens": "embedding", "lm_head": "head"} | layers("model.layers", names)
    row = result["model.layers.0.self_attn.qkv_proj.weight"]
    assert (row.split, row.interleaved, row.head_dim) == ((32, 16, 16), False, 8)
    assert result["model.layers.0.mlp.gate_up_proj.weight"].split == (48, 48)


@pytest.mark.parametrize(
    ("kind", "config", "options", "name"),
    [
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", MHA, "gpt_neox.layers.1.attention"),
        (
            "BloomForCausalLM",
            "BloomConfig",
            {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, **NO_TOKENS},
            "transformer.h.1.self_attention",
        ),
    ],
)
def test_query_key_value_alternates_head_by_head(kind, config, options, name):
    result = found(kind, config, **options)
    row = result[f"{name}.query_key_value.weight"]
    assert row.role is Role.QKV and row.interleaved
    assert row.split == (8,) * 12 and row.blocks == ("query", "key", "value") * 4
    assert result[f"{name}.dense.weight"].role is Role.ATTENTION_OUT
    assert result[name.rpartition(".")[0] + ".mlp.dense_h_to_4h.weight"].role is Role.UP


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"multi_query": True, "new_decoder_architecture": False}, (32, 8, 8)),
        ({"num_kv_heads": 2, "new_decoder_architecture": True}, (8,) * 8),
    ],
)
def test_falcon(options, split):
    result = found("FalconForCausalLM", "FalconConfig", **SIZE, **NO_TOKENS, **options)
    assert result["transformer.h.0.self_attention.query_key_value.weight"].split == split


def test_bert():
    result = found("BertForMaskedLM", "BertConfig", **{**MHA, "pad_token_id": 0}, max_position_embeddings=16)
    names = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "attention_out",
        "intermediate.dense": "up",
        "output.dense": "down",
    }
    assert plain(result) == {
        "bert.embeddings.word_embeddings": "embedding",
        "bert.embeddings.position_embeddings": "position",
        "bert.embeddings.token_type_embeddings": "embedding",
        "cls.predictions.transform.dense": "linear",
    } | layers("bert.encoder.layer", names)
    classifier = found("BertForSequenceClassification", "BertConfig", **{**MHA, "pad_token_id": 0})
    assert classifier["classifier.weight"].role is Role.HEAD
    assert classifier["bert.pooler.dense.weight"].role is Role.LINEAR


def test_t5():
    result = found(
        "T5ForConditionalGeneration", "T5Config", vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    attention = {"q": "query", "k": "key", "v": "value", "o": "attention_out"}
    feed = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
    position = {"relative_attention_bias": "position"}
    assert plain(result) == (
        {"shared": "embedding"}
        | block("encoder.block.0.layer.0.SelfAttention", attention | position)
        | block("encoder.block.0.layer.1.DenseReluDense", feed)
        | block("decoder.block.0.layer.0.SelfAttention", attention | position)
        | block("decoder.block.0.layer.1.EncDecAttention", attention)
        | block("decoder.block.0.layer.2.DenseReluDense", feed)
    )


def test_vit():
    result = found(
        "ViTForImageClassification", "ViTConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, image_size=16, patch_size=8,
    )  # fmt: skip
    names = block("attention", QKVO) | {"mlp.fc1": "up", "mlp.fc2": "down"}
    assert plain(result) == {
        "vit.embeddings.cls_token": "embedding",
        "vit.embeddings.position_embeddings": "position",
        "vit.embeddings.patch_embeddings.projection": "conv",
        "classifier": "head",
    } | layers("vit.layers", names)


def test_mamba_has_no_attention():
    result = found(
        "MambaForCausalLM", "MambaConfig", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4, **NO_TOKENS
    )
    mixer = dict.fromkeys(("in_proj", "x_proj", "dt_proj", "out_proj"), "linear")
    mixer |= {"A_log": "scalar", "D": "scalar", "conv1d": "depthwise"}
    assert plain(result) == {"backbone.embeddings": "embedding"} | block("backbone.layers.0.mixer", mixer)


@pytest.mark.parametrize(
    ("kind", "config", "options", "out"),
    [
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", MHA, "dense"),
        ("BloomForCausalLM", "BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "dense"),
        (
            "FalconForCausalLM",
            "FalconConfig",
            {**SIZE, "multi_query": True, "new_decoder_architecture": False},
            "dense",
        ),
        ("Phi3ForCausalLM", "Phi3Config", {**MHA, "pad_token_id": 0, "num_key_value_heads": 2}, "o_proj"),
        ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4}, "c_proj"),
    ],
)
def test_the_blocks_named_value_are_the_values(kind, config, options, out):
    """Without values attention gives zero, whatever queries and keys are; one other block more and it would not."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**options, **NO_TOKENS}))
    seen = []
    for row in roles(model).by_role()[Role.QKV]:
        module = model.get_submodule(row.name.removesuffix(".weight"))
        parent = model.get_submodule(row.name.removesuffix(".weight").rpartition(".")[0])
        getattr(parent, out).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        with torch.no_grad():
            module.weight.normal_()
            blocks = module.weight.split(row.split, dim=1 if row.transposed else 0)
            for name, values in zip(row.blocks, blocks, strict=True):
                values.mul_(name == "value")
            if module.bias is not None:
                module.bias.zero_()
    tokens = torch.arange(6)[None]
    model(tokens)
    assert all(hidden.abs().max() > 0.1 for hidden in seen)
    for row in roles(model).by_role()[Role.QKV]:
        model.get_parameter(row.name).data.normal_()
        for name, block in zip(
            row.blocks, model.get_parameter(row.name).data.split(row.split, dim=1 if row.transposed else 0), strict=True
        ):
            block.mul_(name != "value")
    seen.clear()
    model(tokens)
    assert seen and all(not hidden.any() for hidden in seen)
