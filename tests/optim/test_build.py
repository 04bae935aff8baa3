import copy
import io
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from steepest.geometry import polar
from steepest.models import GPT, MLP, GPTConfig, ResNet
from steepest.optim.build import build, methods, recipe
from steepest.optim.dal import DAL
from steepest.optim.engine import SteepestDescent
from steepest.optim.ivon import IVON
from steepest.optim.mixed import Mixed
from steepest.optim.roles import Role, roles
from steepest.optim.scion_presets import SCION_RADII


def gpt(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=64, context=8, layers=2, heads=4, width=32, **options))


def loss_of(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, GPT):
        tokens = torch.randint(64, (2, 8), generator=generator)
        return model(tokens, tokens)
    shape = (4, 1, 8, 8) if isinstance(model, ResNet) else (4, 8)
    return model(torch.randn(shape, generator=generator)).square().mean()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(optimizer, DAL):
            loss = optimizer.step(lambda: loss_of(model))
            continue
        with optimizer.sampled_params(train=True) if isinstance(optimizer, IVON) else nullcontext():
            loss = loss_of(model)
            loss.backward()
        optimizer.step()
    return loss.item()


def names_in(optimizer: torch.optim.Optimizer) -> set[str]:
    return {name for group in optimizer.param_groups for name in group["param_names"]}


MODELS = {
    "gpt": gpt,
    "moe": lambda: gpt(experts=4, tied=True, kv_heads=2),
    "mlp": lambda: MLP([8, 16, 16, 3]),
    "resnet": lambda: ResNet(in_channels=1, width=4),
}


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("kind", MODELS)
def test_every_method_owns_every_parameter_once_and_resumes_bit_exactly(kind, method):
    torch.manual_seed(0)
    model = MODELS[kind]()
    twin = copy.deepcopy(model)
    optimizer = build(model, method)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) and {id(p) for p in owned} == {id(p) for p in model.parameters()}
    assert names_in(optimizer) == {name for name, _ in model.named_parameters()}
    before = loss_of(model).item()
    advance(model, optimizer, 2)
    assert all(p.isfinite().all() for p in model.parameters()) and loss_of(model).item() != before

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin.load_state_dict(saved["model"])
    resumed = build(twin, method)
    resumed.load_state_dict(saved["optimizer"])
    advance(model, optimizer, 2)
    advance(twin, resumed, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("method", methods())
def test_every_method_lowers_the_loss(method):
    model = gpt()
    optimizer = build(model, method)
    first = loss_of(model).item()
    assert advance(model, optimizer, 20) < first - 0.02


def test_muon_sorts_by_role():
    model = gpt(experts=4)
    optimizer = build(model, "muon", lr=1e-3)
    assert isinstance(optimizer, Mixed) and list(optimizer.parts) == ["muon", "adamw"]
    found = roles(model)
    for name, row in found.items():
        hidden = row.role in (
            Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUT, Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN,
        )  # fmt: skip
        assert name in names_in(optimizer.parts["muon" if hidden else "adamw"]), row
    experts = next(g for g in optimizer.param_groups if "blocks.0.mlp.experts.up_proj" in g["param_names"])
    assert experts["layout"] == "batch"
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    for name, row in found.items():
        assert decay[name] == (0.0 if row.role in (Role.NORM, Role.BIAS) else 0.1)


class Fused(nn.Module):
    """A fused QKV, a gate and up in one, a transposed convolution, a depthwise one, and what nobody knows."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv_proj": nn.Linear(8, 16, bias=False), "o_proj": nn.Linear(8, 8, bias=False)})
        self.attn.num_heads, self.attn.num_key_value_heads, self.attn.head_dim = 4, 2, 2
        self.mlp = nn.ModuleDict({"gate_up_proj": nn.Linear(8, 24, bias=False), "down_proj": nn.Linear(12, 8)})
        self.deconv = nn.ConvTranspose2d(4, 6, 3)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.thing = nn.Parameter(torch.randn(3, 5))


def set_gradients(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_fused_blocks_are_matrices_of_their_own():
    model = Fused().double()
    optimizer = build(
        model, "muon", lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="none", polar="svd",
        on_ambiguous="adamw",
    )  # fmt: skip
    set_gradients(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, sizes in (("attn.qkv_proj.weight", (8, 4, 4)), ("mlp.gate_up_proj.weight", (12, 12))):
        parameter = model.get_parameter(name)
        expected = torch.cat([polar(g, "svd") for g in parameter.grad.split(sizes)])
        torch.testing.assert_close(before[name] - parameter, expected)
    deconv = model.deconv.weight
    expected = polar(deconv.grad.flatten(1), "svd").view_as(deconv)
    torch.testing.assert_close(before["deconv.weight"] - deconv, expected)
    assert {"depthwise.weight", "thing"} <= names_in(optimizer.parts["adamw"])


def test_query_key_value_in_turns_is_split_per_head():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            self.query_key_value, self.dense = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)

    model = nn.ModuleDict({"attention": Attention()}).double()
    optimizer = build(model, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="none", polar="svd")
    set_gradients(model)
    weight = model["attention"].query_key_value.weight
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - weight, torch.cat([polar(g, "svd") for g in weight.grad.split(2)]))


def test_transposed_storage_gives_the_same_step():
    transformers = pytest.importorskip("transformers")
    conv1d = transformers.pytorch_utils.Conv1D(6, 4)
    dense = nn.Linear(4, 6)
    with torch.no_grad():
        dense.weight.copy_(conv1d.weight.T)
    for module in (conv1d, dense):
        optimizer = build(module, "muon", lr=0.1, overrides={"weight": "linear"}, adjust_lr_fn="spectral")
        generator = torch.Generator().manual_seed(3)
        gradient = torch.randn(6, 4, generator=generator)
        module.weight.grad = gradient if module is dense else gradient.T.contiguous()
        optimizer.step()
    torch.testing.assert_close(conv1d.weight.T, dense.weight)


def test_ambiguous_parameters():
    with pytest.warns(UserWarning, match=r"the role of 1 parameters cannot be told; AdamW updates them") as caught:
        optimizer = build(Fused(), "muon")
    assert len(caught) == 1 and "thing" in str(caught[0].message) and "3x5" in str(caught[0].message)
    assert "thing" in names_in(optimizer.parts["adamw"])
    with pytest.raises(ValueError, match="the role of 1 parameters cannot be told"):
        build(Fused(), "muon", on_ambiguous="raise")
    with pytest.warns(UserWarning, match="cannot be told"):
        scion = build(Fused(), "scion")
    assert names_in(scion.parts["adamw"]) == {"thing"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(Fused(), "muon", on_ambiguous="adamw")
        build(Fused(), "adamw")
        told = build(Fused(), "muon", overrides={"thing": "linear"})
    assert "thing" in names_in(told.parts["muon"])


def test_frozen_parameters_are_left_out():
    model = gpt()
    model.embedding.requires_grad_(False)
    assert "embedding.weight" not in names_in(build(model, "muon"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(model, "muon")
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(nn.ReLU())


def test_one_learning_rate_or_two():
    rates = lambda optimizer: {name: part.param_groups[0]["lr"] for name, part in optimizer.parts.items()}  # noqa: E731
    assert rates(build(gpt(), "muon", lr=0.01)) == {"muon": 0.01, "adamw": 0.01}
    original = rates(build(gpt(), "muon", lr=0.02, adjust_lr_fn="original"))
    assert original == {"muon": 0.02, "adamw": pytest.approx(0.003)}
    assert rates(build(gpt(), "muon", lr=0.02, other_lr=0.5)) == {"muon": 0.02, "adamw": 0.5}
    other = build(gpt(), "muon", other={"betas": (0.8, 0.9), "weight_decay": 0.0}).parts["adamw"]
    assert other.param_groups[0]["betas"] == (0.8, 0.9) and other.param_groups[0]["weight_decay"] == 0.0


def test_default_updates_of_muon_have_the_size_of_adamws():
    """match_rms_adamw: the RMS of an update of a full-rank matrix is 0.2 lr."""
    model = gpt()
    optimizer = build(model, "muon", lr=1.0, weight_decay=0.0, polar="svd")
    set_gradients(model)
    weight = model.blocks[0].mlp.gate_proj.weight
    before = weight.detach().clone()
    optimizer.step()
    assert (before - weight).square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-3)


def test_scion_recipe():
    groups = {
        name: (group["norm"], group["radius"])
        for group in build(gpt(experts=4), "scion").param_groups
        for name in group["param_names"]
    }
    entry, hidden, end = SCION_RADII["language"]
    assert groups["embedding.weight"] == ("sign", entry) and groups["head.weight"] == ("sign", end)
    assert groups["blocks.0.attention.q_proj.weight"] == ("spectral", hidden)
    assert groups["norm.weight"] == ("vector", hidden) and groups["blocks.0.mlp.router.weight"] == ("spectral", hidden)
    groups = {
        name: (group["norm"], group["radius"])
        for group in build(MLP([8, 16, 3]), "scion", radii=(2, 3, 4)).param_groups
        for name in group["param_names"]
    }
    assert groups["layers.0.weight"] == ("spectral_input", 2) and groups["layers.1.weight"] == ("sign", 4)
    images = build(ResNet(), "scion").param_groups
    assert {group["radius"] for group in images} == set(SCION_RADII["images"])
    with pytest.raises(ValueError, match="preset: expected auto, language, images, dense; got 'sound'"):
        build(gpt(), "scion", preset="sound")
    with pytest.raises(ValueError, match="radii: expected three positive numbers"):
        build(gpt(), "scion", radii=(1, 2))


def test_scion_scales_vectors_and_stacks_of_vectors_alike():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(16))
            self.expert_bias = nn.Parameter(torch.zeros(4, 16))
            self.layer_scale = nn.Parameter(torch.zeros(16, 1, 1))

    model = Model()
    optimizer = build(model, "scion", lr=0.5, momentum=0.0)
    set_gradients(model)
    optimizer.step()
    assert model.gain.square().mean().sqrt().item() == pytest.approx(0.5)
    torch.testing.assert_close(model.expert_bias.square().mean(1).sqrt(), torch.full((4,), 0.5))
    assert model.layer_scale.square().mean().sqrt().item() == pytest.approx(0.5)


def test_normalized_takes_matrix_norms_too():
    model = gpt()
    optimizer = build(model, "normalized", norm="spectral", lr=1e-3)
    norms = {name: str(group["norm"]) for group in optimizer.param_groups for name in group["param_names"]}
    assert "Spectral" in norms["blocks.0.mlp.up_proj.weight"] and "Euclidean" in norms["norm.weight"]
    advance(model, optimizer)


@pytest.mark.parametrize("method", ["muon", "scion"])
def test_bad_gradients_stop_every_part(method):
    model = gpt()
    optimizer = build(model, method)
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model)
    model.norm.weight.grad[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the gradient of parameter norm.weight"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    skipping = build(model, method, nonfinite="skip")
    skipping.step()
    assert skipping.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_schedulers_and_late_groups():
    model = gpt()
    optimizer = build(model, "muon", lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    advance(model, optimizer)
    scheduler.step()
    assert len(set(scheduler.get_last_lr())) == 1
    late = nn.Parameter(torch.zeros(4, 4))
    optimizer.add_param_group({"params": [late], "layout": "matrix"}, part="muon")
    set_gradients(model)
    late.grad = torch.eye(4)
    optimizer.step()
    assert late.diagonal().lt(0).all()


def test_given_roles():
    model = gpt()
    found = roles(model, {"head.*": "linear"})
    assert "head.weight" in names_in(build(model, "muon", roles=found).parts["muon"])
    with pytest.raises(ValueError, match=r"roles: they are of another model; they differ at layers.0.weight"):
        build(MLP([8, 4]), "muon", roles=found)
    with pytest.raises(ValueError, match="either roles, or overrides"):
        build(model, "muon", roles=found, overrides={"*": "linear"})
    with pytest.raises(TypeError, match="roles: expected the result of"):
        build(model, "muon", roles=dict(found))  # type: ignore[arg-type]


def test_torch_optimizers_come_plain():
    optimizer = build(gpt(), "adamw", lr=3e-4, betas=(0.9, 0.99))
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["fused"] is True and optimizer.param_groups[0]["lr"] == 3e-4
    assert type(build(gpt(), "sgd", momentum=0.0)) is torch.optim.SGD
    assert isinstance(build(gpt(), "sign"), SteepestDescent)


def test_recipes_are_open():
    expected = "adamw sgd sign muon drop_muon freon kaon scion clipped_scion symmetry_stack normalized ivon dal"
    assert methods() == tuple(expected.split())
    mine = replace(recipe("sgd"), name="mine", lr=0.25)
    assert build(gpt(), mine).param_groups[0]["lr"] == 0.25
    for name in methods():
        low, high = recipe(name).lr_range
        assert 0 < low < recipe(name).lr < high and recipe(name).description.endswith(".")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "moun"}, ValueError, "no method 'moun'; the methods are adamw, sgd, sign, muon"),
        ({"method": None}, ValueError, "no method None"),
        ({"lr": -1.0}, ValueError, "lr: must be a finite number, at least 0; got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr: must be a finite number"),
        ({"lr": "0.1"}, TypeError, "lr: expected a number, got str"),
        ({"other_lr": -1.0}, ValueError, "other_lr: must be"),
        ({"beta": 0.9}, ValueError, "beta: not an option of 'muon'; its options are momentum, "),
        ({"method": "sgd", "other_lr": 0.1}, ValueError, "other_lr: not an option of 'sgd'"),
        ({"on_ambiguous": "guess"}, ValueError, "on_ambiguous: expected 'warn', 'adamw' or 'raise', got 'guess'"),
        ({"nonfinite": "maybe"}, ValueError, "nonfinite must be one of"),
        ({"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn"),
        ({"momentum": 1.5}, ValueError, "momentum"),
    ],
)
def test_wrong_use(options, error, message):
    with pytest.raises(error, match=message):
        build(gpt(), **options)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        build({}, "muon")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["GPT2", "GptOss", "Phi3"])
def test_hugging_face_models_train(family):
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 97, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "pad_token_id": 0}
    size |= {"bos_token_id": None, "eos_token_id": None}
    extra = {
        "GPT2": {"n_positions": 16},
        "GptOss": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4},
        "Phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
    }[family]
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, head)(getattr(transformers, f"{family}Config")(**size, **extra))
    optimizer = build(model, "muon", lr=5e-3)
    tokens = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
