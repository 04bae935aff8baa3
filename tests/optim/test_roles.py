import re

import pytest
import torch
from torch import nn

from steepest.models import GPT, MLP, GPTConfig, ResNet
from steepest.optim.roles import Role, Roles, roles


def plain(found: Roles) -> dict[str, str]:
    """Names without ".weight" -> role, without the rows that every test would repeat."""
    return {
        row.name.removesuffix(".weight"): row.role.value
        for row in found.values()
        if row.role not in (Role.NORM, Role.BIAS)
    }


def block(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": role for name, role in names.items()}


QKVO = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention_out"}
SWIGLU = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def gpt(**options) -> GPT:
    return GPT(GPTConfig(vocab_size=64, context=8, layers=2, heads=4, width=32, **options))


def test_own_gpt():
    found = roles(gpt(kv_heads=2))
    expected = {"embedding": "embedding", "head": "head"}
    for layer in range(2):
        expected |= block(f"blocks.{layer}.attention", QKVO) | block(f"blocks.{layer}.mlp", SWIGLU)
    assert plain(found) == expected
    assert found["blocks.0.attention.k_proj.weight"].head_dim == 8
    assert found["blocks.1.attention_norm.weight"].role is Role.NORM


def test_own_gpt_with_experts_and_tied_head():
    found = roles(gpt(experts=4, tied=True))
    assert found["embedding.weight"].role is Role.EMBEDDING
    assert found["embedding.weight"].shared_with == ("head.weight",)
    assert "head.weight" not in found
    assert found["blocks.0.mlp.router.weight"].role is Role.ROUTER
    for name, role in (("gate_proj", "expert_gate"), ("up_proj", "expert_up"), ("down_proj", "expert_down")):
        row = found[f"blocks.0.mlp.experts.{name}"]
        assert (row.role, row.layout, row.transposed, row.split) == (role, "batch", False, None)


def test_own_mlp_and_resnet():
    assert plain(roles(MLP([8, 16, 16, 3]))) == {"layers.0": "input", "layers.1": "linear", "layers.2": "head"}
    found = roles(ResNet())
    assert found["head.weight"].role is Role.HEAD
    assert {row.role for row in found.values() if len(row.shape) == 4} == {Role.CONV}


def test_sequential_mlp_says_that_order_is_the_evidence():
    found = roles(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
    assert plain(found) == {"0": "input", "2": "linear", "4": "head"}
    assert (
        found["4.weight"].reason
        == "nn.Linear: the last dense layer in the order of the Sequential, outside every block"
    )
    assert found["4.bias"].role is Role.BIAS


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))


class TorchvisionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Bottleneck(8, 4), Bottleneck(16, 4))
        self.layer2 = nn.Sequential(Bottleneck(16, 8, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)


def test_torchvision_resnet():
    found = roles(TorchvisionResNet())
    assert found["fc.weight"].role is Role.HEAD
    kinds = {row.role for name, row in found.items() if len(row.shape) == 4}
    assert kinds == {Role.CONV} and found["conv1.weight"].layout == "conv"
    assert found["layer1.0.bn1.weight"].role is Role.NORM and found["layer1.0.bn1.bias"].role is Role.BIAS
    assert found["layer2.0.downsample.0.weight"].role is Role.CONV


class EncoderBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class TorchvisionViT(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 5, width))
        self.layers = nn.Sequential(EncoderBlock(width), EncoderBlock(width))
        self.ln = nn.LayerNorm(width)
        self.heads = nn.Sequential(nn.Linear(width, 7))


def test_torchvision_vit():
    found = roles(TorchvisionViT())
    expected = {"conv_proj": "conv", "class_token": "embedding", "pos_embedding": "position", "heads.0": "head"}
    for layer in range(2):
        expected |= block(
            f"layers.{layer}",
            {
                "self_attention.in_proj_weight": "qkv",
                "self_attention.out_proj": "attention_out",
                "mlp.0": "up",
                "mlp.2": "down",
            },
        )
    assert plain(found) == expected
    row = found["layers.0.self_attention.in_proj_weight"]
    assert (row.split, row.blocks, row.head_dim) == ((16, 16, 16), ("query", "key", "value"), 4)


class TimmAttention(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.num_heads = 4
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


def test_timm_attention_and_layer_scale():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = TimmAttention()
            self.ls1 = nn.Parameter(torch.ones(16))

    found = roles(nn.Sequential(Block(), Block()))
    assert plain(found) == {
        f"{i}.{name}": role
        for i in range(2)
        for name, role in (("ls1", "scalar"), ("attn.qkv", "qkv"), ("attn.proj", "attention_out"))
    }


def test_nn_transformer():
    found = roles(nn.Transformer(16, 4, 1, 1, 32))
    assert found["decoder.layers.0.multihead_attn.in_proj_weight"].split == (16, 16, 16)
    assert found["encoder.layers.0.linear1.weight"].role is Role.UP
    assert found["encoder.layers.0.linear2.weight"].role is Role.DOWN
    assert Role.HEAD not in found.by_role() and not found.ambiguous


def test_multihead_attention_with_other_widths_and_extra_bias():
    found = roles(nn.MultiheadAttention(16, 4, kdim=8, vdim=12, add_bias_kv=True))
    assert plain(found) == {
        "q_proj_weight": "query",
        "k_proj_weight": "key",
        "v_proj_weight": "value",
        "out_proj": "attention_out",
    }
    assert found["bias_k"].role is Role.BIAS


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_recurrent_gates_come_apart(kind, gates):
    found = roles(kind(8, 16))
    rows = [row for row in found.values() if len(row.shape) == 2]
    assert len(rows) == 2
    for row in rows:
        assert row.role is Role.LINEAR and row.split == (16,) * gates and len(row.blocks) == gates


def test_recurrent_net_with_projection_and_head():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(30, 8)
            self.rnn = nn.LSTM(8, 16, proj_size=4, bidirectional=True)
            self.tags = nn.Linear(8, 5)

    found = roles(Tagger())
    assert found["words.weight"].role is Role.EMBEDDING and found["tags.weight"].role is Role.HEAD
    assert found["rnn.weight_hr_l0_reverse"].split is None
    assert roles(nn.RNN(3, 4))["weight_hh_l0"].split is None


def test_convolutions():
    found = roles(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 16, 3, groups=2),
            nn.ConvTranspose2d(16, 8, 3),
            nn.Conv1d(4, 4, 3),
        )
    )
    assert [str(found[f"{i}.weight"].role) for i in range(5)] == ["conv", "depthwise", "conv", "conv", "conv"]
    assert found["2.weight"].split == (8, 8)
    assert not found["3.weight"].transposed and "adjoint" in found["3.weight"].reason
    assert found["4.weight"].layout == "conv"


class SwiGLUExpert(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, hidden)


class MixtureOfModules(nn.Module):
    def __init__(self, rows: int = 4):
        super().__init__()
        self.gate = nn.Linear(16, rows, bias=False)
        self.experts = nn.ModuleList(SwiGLUExpert(16, 24) for _ in range(4))


def test_router_gate_and_swiglu_gate_are_told_apart():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    found = roles(nn.ModuleDict({"moe": MixtureOfModules(), "ffn": Gated()}))
    assert found["moe.gate.weight"].role is Role.ROUTER
    assert "one row for each of 4 experts" in found["moe.gate.weight"].reason
    assert found["ffn.gate.weight"].role is Role.GATE
    assert [str(found[f"moe.experts.3.w{i}.weight"].role) for i in (1, 2, 3)] == [
        "expert_gate",
        "expert_down",
        "expert_up",
    ]
    odd = roles(nn.ModuleDict({"moe": MixtureOfModules(rows=5)}))["moe.gate.weight"]
    assert odd.role is Role.AMBIGUOUS and "beside 4 experts but it has 5 rows" in odd.reason


def test_fused_up_projection_is_seen_by_its_shape():
    class Feed(nn.Module):
        def __init__(self, rows: int):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, rows), nn.Linear(32, 16)

    fused = roles(nn.ModuleDict({"mlp": Feed(64)}))["mlp.fc1.weight"]
    assert (fused.role, fused.split, fused.blocks) == (Role.GATE_UP, (32, 32), ("gate", "up"))
    assert roles(nn.ModuleDict({"mlp": Feed(32)}))["mlp.fc1.weight"].role is Role.UP


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_orientation_from_shapes(transposed):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            up, down = (4, 48, 16), (4, 16, 24)
            if transposed:
                up, down = (4, 16, 48), (4, 24, 16)
            self.gate_up_proj = nn.Parameter(torch.zeros(up))
            self.down_proj = nn.Parameter(torch.zeros(down))
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 48))

    found = roles(nn.ModuleDict({"experts": Experts()}))
    assert found["experts.gate_up_proj"].role is Role.EXPERT_GATE_UP
    assert found["experts.gate_up_proj"].transposed is transposed and found["experts.gate_up_proj"].split == (24, 24)
    assert found["experts.down_proj"].transposed is transposed and found["experts.down_proj"].split is None
    assert found["experts.gate_up_proj_bias"].role is Role.BIAS


def test_fused_qkv_that_does_not_come_apart_is_ambiguous():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj, self.o_proj = nn.Linear(16, 40), nn.Linear(16, 16)

    model = nn.ModuleDict({"attn": Attention()})
    row = roles(model)["attn.qkv_proj.weight"]
    assert row.role is Role.AMBIGUOUS and "40 rows do not come apart" in row.reason
    told = roles(model, {"attn.qkv_proj.weight": {"role": "qkv", "split": (16, 12, 12)}})["attn.qkv_proj.weight"]
    assert (told.role, told.split, told.layout) == (Role.QKV, (16, 12, 12), "matrix")
    model["attn"].num_heads, model["attn"].num_key_value_heads, model["attn"].head_dim = 4, 3, 4
    assert roles(model)["attn.qkv_proj.weight"].split == (16, 12, 12)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.thing = nn.Parameter(torch.zeros(4, 6))
        self.stack = nn.Parameter(torch.zeros(2, 4, 6))
        self.temperature = nn.Parameter(torch.ones(()))
        self.q_proj = nn.Parameter(torch.zeros(4, 4))
        self.form = nn.Bilinear(2, 3, 4)


def test_unknown_matrices_are_ambiguous_not_guessed():
    found = roles(Unknown())
    assert {row.name for row in found.ambiguous} == {"thing", "stack", "form.weight"}
    assert all("overrides={pattern: role}" in row.reason for row in found.ambiguous)
    assert found["temperature"].role is Role.SCALAR and found["q_proj"].role is Role.QUERY


def test_lenet_order_is_weak_evidence_and_example_input_is_strong():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.third, self.second, self.first = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(4, 8)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.third(self.norm(self.second(self.first(x)))).view(-1, 3)

    model = Shuffled()
    assert "weak evidence" in roles(model)["first.weight"].reason
    before = torch.random.get_rng_state()
    found = roles(model, example_input=torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert plain(found) == {"third": "head", "second": "linear", "first": "input"}
    assert model.training and model.norm.num_batches_tracked == 0
    assert torch.equal(before, torch.random.get_rng_state())
    assert roles(model, example_input={"x": torch.zeros(2, 4)})["third.weight"].role is Role.HEAD
    with pytest.raises(ValueError, match="example_input: the model does not run on it"):
        roles(model, example_input=(torch.zeros(2, 5),))


def test_heads_by_name_by_table_and_by_container():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
            self.body = nn.Conv2d(3, 8, 3)

    assert plain(roles(Classifier())) == {"classifier.0": "linear", "classifier.2": "head", "body": "conv"}

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.to_words, self.last = nn.Embedding(30, 8), nn.Linear(8, 30), nn.Linear(8, 8)

    found = roles(Odd())
    assert found["to_words.weight"].role is Role.HEAD and "shape of the token table" in found["to_words.weight"].reason
    assert found["last.weight"].role is Role.LINEAR


class Wrapped(nn.Module):
    """What torch's DistributedDataParallel looks like from outside."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def test_wrappers_are_looked_through():
    bare = plain(roles(TorchvisionViT()))
    for wrap, prefix in ((Wrapped, "module."), (torch.compile, "_orig_mod.")):
        found = roles(wrap(TorchvisionViT()))
        assert plain(found) == {prefix + name: role for name, role in bare.items()}
    both = Wrapped(torch.compile(TorchvisionViT()))
    found = roles(both, {"heads.0.weight": "linear"})
    assert found["module._orig_mod.heads.0.weight"].role is Role.LINEAR


def test_lora_adapters_and_frozen_base():
    class LoraLinear(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 16, bias=False)})

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = LoraLinear(nn.Linear(16, 16))
            self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(3))

    found = roles(nn.ModuleDict({"attn": Attention()}))
    base = found["attn.q_proj.base_layer.weight"]
    assert base.role is Role.QUERY and base.frozen and "frozen" in base.notes
    assert [row.name for row in found.frozen] == ["attn.q_proj.base_layer.weight", "attn.q_proj.base_layer.bias"]
    for side in "AB":
        row = found[f"attn.q_proj.lora_{side}.default.weight"]
        assert row.role is Role.LINEAR and "low-rank adapter" in row.reason


def test_parametrizations():
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(8, 8))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    found = roles(nn.Sequential(new, old, nn.utils.parametrizations.spectral_norm(nn.Linear(8, 2))))
    assert plain(found) == {
        "0.parametrizations.weight.original0": "scalar",
        "0.parametrizations.weight.original1": "input",
        "1.weight_g": "scalar",
        "1.weight_v": "linear",
        "2.parametrizations.weight.original": "head",
    }


def test_shared_memory_of_two_parameters_is_said():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert "shares memory with 0.weight" in roles(model)["1.weight"].reason


def test_overrides():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = roles(model, {"0.*": Role.EMBEDDING, "*.weight": "LINEAR"})
    assert found["0.weight"].role is Role.EMBEDDING and found["2.weight"].role is Role.LINEAR
    assert found["0.weight"].reason == "override '0.*' of the user"
    with pytest.raises(ValueError, match=re.escape("pattern 'nothing.*' matches no parameter; the model has 0.weight")):
        roles(model, {"nothing.*": "linear"})
    with pytest.raises(ValueError, match="no role 'matrix'; the roles are embedding, position, head"):
        roles(model, {"0.*": "matrix"})
    with pytest.raises(ValueError, match=r"split \(3, 3\) must be positive sizes that add up to the 8 outputs"):
        roles(model, {"0.weight": {"role": "qkv", "split": (3, 3)}})
    with pytest.raises(ValueError, match="a mapping needs 'role'"):
        roles(model, {"0.weight": {"rolle": "qkv"}})
    with pytest.raises(ValueError, match="layout must be"):
        roles(model, {"0.weight": {"role": "linear", "layout": "row"}})
    with pytest.raises(TypeError, match="expected a mapping from name pattern"):
        roles(model, ["0.weight"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a pattern must be a string"):
        roles(model, {0: "linear"})  # type: ignore[dict-item]


def test_wrong_models():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        roles([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0.weight, 0.bias have no shape yet"):
        roles(nn.Sequential(nn.LazyLinear(3)))
    assert len(roles(nn.ReLU())) == 0


def test_meta_and_double_models():
    with torch.device("meta"):
        model = gpt()
    assert plain(roles(model)) == plain(roles(gpt().double()))


class TestTables:
    def hostile(self) -> Roles:
        model = nn.Module()
        model.register_parameter("[red]<script>alert(1)</script>\n\x1b[31m", nn.Parameter(torch.zeros(2, 2)))
        return roles(model)

    def test_plain_text_escapes_control_characters(self):
        text = str(self.hostile())
        assert len(text.splitlines()) == 3 and "\x1b" not in text and "\\x1b[31m" in text

    def test_html_escapes(self):
        page = self.hostile()._repr_html_()
        assert "<script>" not in page and "&lt;script&gt;" in page

    def test_rich_shows_markup_literally(self):
        from rich.console import Console

        console = Console(width=300, force_terminal=False)
        with console.capture() as capture:
            console.print(self.hostile().table())
        assert "[red]<script>" in capture.get() and "\x1b" not in capture.get()

    def test_mapping(self):
        found = roles(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"] and len(found) == 4
        assert repr(found) == "Roles(4 parameters; input: 1, bias: 2, head: 1)"
        assert {role.value: len(rows) for role, rows in found.by_role().items()} == {"head": 1, "input": 1, "bias": 2}
        assert found.to_dicts()[0]["role"] == "input"
        with pytest.raises(KeyError, match=r"no parameter is named '1.weight'; the model has 0.weight"):
            found["1.weight"]
        assert str(found).splitlines()[0] == "4 parameters"
