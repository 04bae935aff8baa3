"""Roles of all parameters of fourteen model families, built small, against patterns written by hand; and a trap.

In a pattern `*` stands for a number. Every parameter must match one pattern, and every pattern a parameter. How the
storage of fused and stacked blocks is read is tested in test_roles_transformers.py.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from steepest.models import GPT, GPTConfig, ResNet
from steepest.optim import build
from steepest.optim.roles import Role, roles

Patterns = dict[str, str]


def inside(prefix: str, patterns: Patterns) -> Patterns:
    return {f"{prefix}.{name}": role for name, role in patterns.items()}


def weights(**roles_of: str) -> Patterns:
    return {f"{name}.weight": role for name, role in roles_of.items()}


def with_biases(patterns: Patterns) -> Patterns:
    """Beside every weight there is a bias."""
    return patterns | {name.removesuffix("weight") + "bias": "bias" for name in patterns if name.endswith("weight")}


ATTENTION = inside("self_attn", weights(q_proj="query", k_proj="key", v_proj="value", o_proj="attention_out"))
MLP = inside("mlp", weights(gate_proj="gate", up_proj="up", down_proj="down"))
NORMS = weights(input_layernorm="norm", post_attention_layernorm="norm")
QK_NORMS = inside("self_attn", weights(q_norm="norm", k_norm="norm"))
ENDS = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm"}
HEAD = {"lm_head.weight": "head"}
EXPERTS = {"experts.gate_up_proj": "expert_gate_up", "experts.down_proj": "expert_down"}
MIXTURE = inside("mlp", {"gate.weight": "router", **EXPERTS})


def decoder(*parts: Patterns, tied: bool = False) -> Patterns:
    merged = {name: role for part in parts for name, role in part.items()}
    return ENDS | inside("model.layers.*", merged) | ({} if tied else HEAD)


def seq2seq(side: str, cross: Patterns) -> Patterns:
    attention = with_biases(weights(q_proj="query", v_proj="value", out_proj="attention_out"))
    attention |= {"k_proj.weight": "key"}  # Whisper's keys have no bias
    layer = inside("self_attn", attention) | (inside("encoder_attn", attention) if cross else {}) | cross
    layer |= with_biases(weights(self_attn_layer_norm="norm", final_layer_norm="norm", fc1="up", fc2="down"))
    return {
        **inside(f"model.{side}.layers.*", layer),
        f"model.{side}.embed_positions.weight": "position",
        **inside(f"model.{side}", with_biases(weights(layer_norm="norm"))),
    }


def t5(side: str) -> Patterns:
    attention = weights(q="query", k="key", v="value", o="attention_out")
    feed = inside("DenseReluDense", weights(wi_0="gate", wi_1="up", wo="down")) | weights(layer_norm="norm")
    last = "2" if side == "decoder" else "1"
    layers = inside("layer.0", inside("SelfAttention", attention) | weights(layer_norm="norm"))
    if side == "decoder":
        layers |= inside("layer.1", inside("EncDecAttention", attention) | weights(layer_norm="norm"))
    return {
        **inside(f"{side}.block.*", layers | inside(f"layer.{last}", feed)),
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "position",
        f"{side}.final_layer_norm.weight": "norm",
    }


BERT_LAYER = with_biases(
    {
        "attention.self.query.weight": "query",
        "attention.self.key.weight": "key",
        "attention.self.value.weight": "value",
        "attention.output.dense.weight": "attention_out",
        "attention.output.LayerNorm.weight": "norm",
        "intermediate.dense.weight": "up",
        "output.dense.weight": "down",
        "output.LayerNorm.weight": "norm",
    }
)
GPT2_LAYER = with_biases(
    {
        "attn.c_attn.weight": "qkv",
        "attn.c_proj.weight": "attention_out",
        "mlp.c_fc.weight": "up",
        "mlp.c_proj.weight": "down",
        "ln_1.weight": "norm",
        "ln_2.weight": "norm",
    }
)
VIT_LAYER = with_biases(
    inside("attention", weights(q_proj="query", k_proj="key", v_proj="value", o_proj="attention_out"))
    | inside("mlp", weights(fc1="up", fc2="down"))
    | weights(layernorm_before="norm", layernorm_after="norm")
)
CONV = {"convolution.weight": "conv", "normalization.weight": "norm", "normalization.bias": "bias"}
OUR_BLOCK = weights(attention_norm="norm", mlp_norm="norm") | inside(
    "attention",
    weights(q_proj="query", k_proj="key", v_proj="value", o_proj="attention_out", q_norm="norm", k_norm="norm"),
)
OUR_EXPERTS = {
    "router.weight": "router",
    **inside("experts", {"gate_proj": "expert_gate", "up_proj": "expert_up", "down_proj": "expert_down"}),
}

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZE |= NO_TOKENS
GQA = {**SIZE, "num_key_value_heads": 2}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**GQA, "tie_word_embeddings": False}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8}),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "head_dim": 8}),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, **NO_TOKENS},
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4}),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", {**SIZE, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**GQA, "head_dim": 8, "num_local_experts": 4}),
    "BERT": ("BertForMaskedLM", "BertConfig", {**SIZE, "pad_token_id": 0, "max_position_embeddings": 16}),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **{"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
            **{"image_size": 16, "patch_size": 8},
        },
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48},
            **{"decoder_ffn_dim": 48, "max_source_positions": 10, "max_target_positions": 12, "pad_token_id": 0},
            **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        },
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "bottleneck", "num_labels": 5},
    ),
}
EXPECTED: dict[str, Patterns] = {
    "Llama": decoder(ATTENTION, MLP, NORMS),
    "Qwen2": decoder(ATTENTION, inside("self_attn", {f"{name}_proj.bias": "bias" for name in "qkv"}), MLP, NORMS),
    "Qwen3": decoder(ATTENTION, QK_NORMS, MLP, NORMS),
    "Gemma3": decoder(
        ATTENTION,
        QK_NORMS,
        MLP,
        NORMS,
        weights(pre_feedforward_layernorm="norm", post_feedforward_layernorm="norm"),
        tied=True,
    ),
    "GPT-2": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "position",
        **inside("transformer.h.*", GPT2_LAYER),
        **inside("transformer", with_biases(weights(ln_f="norm"))),
    },
    "Mixtral": decoder(ATTENTION, MIXTURE, NORMS),
    "OLMoE": decoder(ATTENTION, QK_NORMS, MIXTURE, NORMS),
    "gpt-oss": decoder(
        with_biases(ATTENTION),
        {"self_attn.sinks": "scalar"},
        inside("mlp", with_biases({"router.weight": "router"}) | EXPERTS),
        inside("mlp.experts", {"gate_up_proj_bias": "bias", "down_proj_bias": "bias"}),
        NORMS,
    ),
    "BERT": {
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.embeddings.position_embeddings.weight": "position",
        "bert.embeddings.token_type_embeddings.weight": "embedding",
        **inside("bert.embeddings", with_biases(weights(LayerNorm="norm"))),
        **inside("bert.encoder.layer.*", BERT_LAYER),
        **inside("cls.predictions.transform", with_biases(weights(dense="linear", LayerNorm="norm"))),
        "cls.predictions.bias": "bias",
    },
    "T5": {"shared.weight": "embedding", **t5("encoder"), **t5("decoder")},
    "ViT": {
        "vit.embeddings.cls_token": "embedding",
        "vit.embeddings.position_embeddings": "position",
        **with_biases({"vit.embeddings.patch_embeddings.projection.weight": "conv"}),
        **inside("vit.layers.*", VIT_LAYER),
        **with_biases({"vit.layernorm.weight": "norm", "classifier.weight": "head"}),
    },
    "Whisper": {
        **inside("model.encoder", with_biases(weights(conv1="conv", conv2="conv"))),
        **seq2seq("encoder", {}),
        "model.decoder.embed_tokens.weight": "embedding",
        **seq2seq("decoder", with_biases(weights(encoder_attn_layer_norm="norm"))),
    },
    "ResNet": {
        **inside("resnet.embedder.embedder", CONV),
        **inside("resnet.encoder.stages.*.layers.*.layer.*", CONV),
        **inside("resnet.encoder.stages.*.layers.*.shortcut", CONV),
        **with_biases({"classifier.*.weight": "head"}),
    },
    "our GPT": {
        **{"embedding.weight": "embedding", "norm.weight": "norm", "head.weight": "head"},
        **inside("blocks.*", OUR_BLOCK | MLP),
    },
    "our GPT with experts": {
        **{"embedding.weight": "embedding", "norm.weight": "norm", "head.weight": "head"},
        **inside("blocks.*", OUR_BLOCK | inside("mlp", OUR_EXPERTS)),
    },
    "our ResNet": {
        **{"conv.weight": "conv", "blocks.*.conv*.weight": "conv", "blocks.*.shortcut.weight": "conv"},
        **with_biases({"head.weight": "head", "norm.weight": "norm"}),
        **{f"blocks.*.norm*.{leaf}": role for leaf, role in (("weight", "norm"), ("bias", "bias"))},
    },
}


def hugging_face(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kind, config, options = CONFIGS[family]
    return getattr(transformers, kind)(getattr(transformers, config)(**options))


def our_gpt(**options: Any) -> GPT:
    return GPT(GPTConfig(vocab_size=64, context=8, layers=2, heads=4, width=32, kv_heads=2, **options))


OURS: dict[str, Callable[[], nn.Module]] = {
    "our GPT": our_gpt,
    "our GPT with experts": lambda: our_gpt(experts=4),
    "our ResNet": ResNet,
}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_parameter_of_a_family_has_its_role(family: str) -> None:
    model = OURS[family]() if family in OURS else hugging_face(family)
    patterns = {re.compile(re.escape(name).replace(r"\*", r"\d+")): role for name, role in EXPECTED[family].items()}
    found, used = roles(model), set()
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, row in found.items():
        matching = [pattern for pattern in patterns if pattern.fullmatch(name)]
        assert len({patterns[pattern] for pattern in matching}) == 1, f"{name} matches {len(matching)} patterns"
        assert row.role.value == patterns[matching[0]], f"{name}: {row.reason}"
        used.update(matching)
    assert not [pattern.pattern for pattern in patterns if pattern not in used]


class Trap(nn.Module):
    """Matrices that look like something: names without company, company without names, shapes that say both."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = Parameter(torch.randn(8, 8))  # a linear map, or a table of eight tokens?
        self.core = Parameter(torch.randn(3, 8, 8))  # three experts, or a tensor of third order?
        self.form = nn.Bilinear(8, 8, 8, bias=False)
        self.moe = nn.ModuleDict(
            {"gate": nn.Linear(8, 5, bias=False), "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))}
        )
        self.attn = nn.ModuleDict({"qkv_proj": nn.Linear(8, 20, bias=False), "o_proj": nn.Linear(8, 8, bias=False)})
        self.mlp = nn.ModuleDict(
            {"gate_up_proj": nn.Linear(8, 15, bias=False), "down_proj": nn.Linear(8, 8, bias=False)}
        )


def test_a_trap_is_ambiguous_and_goes_to_no_matrix_method() -> None:
    model = Trap()
    found = roles(model)
    unclear = {"mixing", "core", "form.weight", "moe.gate.weight", "attn.qkv_proj.weight", "mlp.gate_up_proj.weight"}
    assert {row.name for row in found.ambiguous} == unclear
    assert all("overrides" in row.reason for row in found.ambiguous)
    with pytest.raises(ValueError, match="the role of 6 parameters cannot be told"):
        build(model, "muon", on_ambiguous="raise")
    with pytest.warns(UserWarning, match="the role of 6 parameters cannot be told"):
        parts = build(model, "muon").parts  # type: ignore[attr-defined]
    matrices = {id(p) for group in parts["muon"].param_groups for p in group["params"]}
    assert not matrices & {id(model.get_parameter(name)) for name in unclear}
    told = roles(model, {"mixing": "linear", "core": Role.EXPERT_UP})
    assert {row.name for row in told.ambiguous} == unclear - {"mixing", "core"}


def test_a_dense_layer_that_prepares_a_tied_head_is_none() -> None:
    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.decoder = nn.Embedding(30, 8), nn.Linear(8, 30)
            self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))
            self.decoder.weight = self.words.weight

    assert roles(Prepared())["head.0.weight"].role is Role.LINEAR


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_magnitudes_of_a_weight_normalised_convolution_are_scalars(norm: Any) -> None:
    for dim, groups in ((0, 1), (2, 2)):
        found = roles(norm(nn.Conv1d(4, 6, 3, groups=groups), dim=dim))
        assert sorted(row.role.value for row in found.values()) == ["bias", "conv", "scalar"]
