"""Spectral normalisation and its schedulers."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steepest.nn.power_iteration import LinearMap
from steepest.nn.spectral_norm import SpectralNorm, spectral_norm

MATRIX = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


def linear(weight: Tensor = MATRIX) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    return layer


def mlp(seed: int = 0, bias: bool = True, scale: float = 2.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8, bias), nn.ReLU(), nn.Linear(8, 8, bias), nn.ReLU(), nn.Linear(8, 3, bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.double()


def inputs(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (6, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight, 2)


def test_sigma_and_gradient_of_the_sheet() -> None:
    layer = linear()
    norm = spectral_norm(layer)
    assert float(norm.sigmas()[""]) == pytest.approx(5.4649857042, abs=1e-10)
    layer.weight.backward(torch.eye(2, dtype=torch.float64))
    raw = layer.parametrizations["weight"].original  # type: ignore[index, union-attr, operator]
    expected = [[0.14396851, -0.05536189], [-0.08819449, 0.05783468]]
    torch.testing.assert_close(raw.grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)
    layer = linear()
    spectral_norm(layer, differentiate=False)
    layer.weight.backward(torch.eye(2, dtype=torch.float64))
    raw = layer.parametrizations["weight"].original  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(raw.grad, 0.1829831 * torch.eye(2, dtype=torch.float64), rtol=0, atol=5e-8)


def test_gradient_through_sigma_against_finite_differences() -> None:
    layer = linear(inputs(0, 3, 4) * 3)
    spectral_norm(layer).refresh()
    layer.eval()
    raw = layer.parametrizations["weight"].original  # type: ignore[index, union-attr, operator]
    assert torch.autograd.gradcheck(lambda w: w / exact(w), raw)
    upstream = inputs(1, 3, 4)
    layer.weight.backward(upstream)
    fresh = raw.detach().clone().requires_grad_()
    (fresh / exact(fresh)).backward(upstream)
    torch.testing.assert_close(raw.grad, fresh.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("target", [1.0, 3.0, 100.0])
def test_target_and_leave_smaller(target: float, leave: bool) -> None:
    layer = linear()
    spectral_norm(layer, lipschitz=target, leave_smaller=leave).refresh()
    divisor = max(5.4649857042 / target, 1.0 if leave else 0.0)
    torch.testing.assert_close(layer.weight.detach(), MATRIX / divisor, rtol=1e-9, atol=0)


def test_a_relu_network_without_biases_is_scaled_by_the_product() -> None:
    plain, model = mlp(bias=False), mlp(bias=False)
    norm = spectral_norm(model, layers=[0, -1], leave_smaller=False)
    sigmas = [exact(plain[0].weight), exact(plain[4].weight)]  # type: ignore[arg-type]
    model.eval()
    torch.testing.assert_close(model(inputs()), plain(inputs()) / (sigmas[0] * sigmas[1]), rtol=1e-6, atol=1e-9)
    found = norm.sigmas().values()
    product = torch.stack(list(found)).prod()
    torch.testing.assert_close(model(inputs()) * product, plain(inputs()), rtol=1e-13, atol=1e-13)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3, padding=1), (2, 7)),
    "2d stride": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 7)),
    "2d groups dilation": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), (4, 6, 5)),
    "2d same even": (nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 5, 6)),
    "2d valid": (nn.Conv2d(2, 3, 2, padding="valid"), (2, 5, 6)),
    "3d": (nn.Conv3d(1, 2, 2), (1, 3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
    "transposed groups": (nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2), (4, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_the_norm_of_a_convolution_is_that_of_its_map(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer).double()
    plain = copy.deepcopy(layer)
    assert isinstance(plain.bias, Tensor)
    bias = plain.bias.detach().view(1, -1, *[1] * (len(shape) - 1))
    columns = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64).view(-1, *shape)
    matrix = (plain(columns) - bias).flatten(1).T
    norm = spectral_norm(layer, leave_smaller=False, iterations=3)
    x = inputs(0, 2, *shape)
    layer.eval()
    out = layer(x)
    assert float(norm.sigmas()[""]) == pytest.approx(float(exact(matrix).detach()), rel=1e-9)
    torch.testing.assert_close(out - bias, (plain(x) - bias) / exact(matrix), rtol=1e-8, atol=1e-9)
    for y in (out[:1].detach(), inputs(3, *out[:1].shape)):
        found = LinearMap.of("layer", plain).adjoint(plain.weight, y, (1, *shape))  # type: ignore[arg-type]
        torch.testing.assert_close(found.flatten(), matrix.T @ y.flatten())
    layer.train()
    layer(x).square().mean().backward()


def test_the_default_gradient_goes_through_sigma_of_linear_layers_only() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 2)).double()
    spectral_norm(model, leave_smaller=False)
    x = inputs(0, 4, 1, 5, 5)
    model.eval()
    with torch.no_grad():
        model(x)
    for layer, through in ((model[0], False), (model[2], True)):
        raw: Any = layer.parametrizations["weight"].original  # type: ignore[index, union-attr, operator]
        weight = layer.weight
        (gradient,) = torch.autograd.grad(weight.square().sum(), raw)  # type: ignore[union-attr, operator]
        slope = float((gradient * raw).sum() / raw.norm() / gradient.norm())
        # ||W / sigma(W)||^2 does not change with the scale of W, unless sigma is held fixed.
        assert abs(slope) < 1e-6 if through else slope > 0.99


def test_evaluation_first_is_right_and_changes_nothing() -> None:
    model = mlp()
    norm = spectral_norm(model, layers=[-2])
    model.eval()
    out = model(inputs())
    state = copy.deepcopy(model.state_dict())
    assert float(norm.sigmas()["2"]) == pytest.approx(float(exact(mlp()[2].weight)), rel=1e-7)  # type: ignore[arg-type]
    torch.testing.assert_close(model(inputs()), out, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_new_weights_before_training_are_seen() -> None:
    model = mlp()
    norm = spectral_norm(model, leave_smaller=False)
    norm.sigmas()
    model.eval()(inputs())
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.parametrizations["weight"].original.copy_(inputs(5, *layer.weight.shape))  # type: ignore[index, union-attr, operator]
    model(inputs())
    model[2].weight = inputs(6, 8, 8)  # type: ignore[assignment]
    model(inputs())
    assert float(exact(model[0].weight)) == pytest.approx(1, rel=1e-6)  # type: ignore[arg-type]
    assert float(exact(model[2].weight)) == pytest.approx(1, rel=1e-6)  # type: ignore[arg-type]


def test_training_forwards_iterate_and_follow_the_weights() -> None:
    model = mlp()
    norm = spectral_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(30):
        loss = (model(inputs(step)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights: list[Any] = [layer.parametrizations["weight"].original for layer in norm.layers.values()]  # type: ignore[index, union-attr, operator]
    for sigma, weight in zip(norm.sigmas().values(), weights, strict=True):
        assert float(sigma) == pytest.approx(float(exact(weight)), rel=1e-2)
    norm.refresh()
    for sigma, weight in zip(norm.sigmas().values(), weights, strict=True):
        assert float(sigma) == pytest.approx(float(exact(weight)), rel=1e-7)


def test_two_forwards_before_a_backward() -> None:
    model = mlp()
    spectral_norm(model)
    (model(inputs(0)) + model(inputs(1))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checkpointed_activations_iterate_once() -> None:
    plain, model = mlp(), mlp()
    spectral_norm(plain)
    spectral_norm(model)
    for step in range(3):
        plain(inputs(step)).square().mean().backward()
        out = checkpoint(model, inputs(step), use_reentrant=False)
        assert isinstance(out, Tensor)
        out.square().mean().backward()
    for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_a_zero_weight_is_left_and_recovers() -> None:
    layer = linear(torch.zeros(2, 2, dtype=torch.float64))
    norm = spectral_norm(layer, leave_smaller=False)
    assert torch.equal(layer(inputs(0, 3, 2)), torch.zeros(3, 2, dtype=torch.float64))
    with torch.no_grad():
        layer.parametrizations["weight"].original.copy_(MATRIX)  # type: ignore[index, union-attr, operator]
    for _ in range(20):
        layer(inputs(0, 3, 2))
    assert float(norm.sigmas()[""]) == pytest.approx(5.4649857042, rel=1e-9)


def build(mode: Any, **options: Any) -> tuple[nn.Module, SpectralNorm]:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.double()
    return model, spectral_norm(model, mode, **options)


def fit(model: nn.Module, norm: SpectralNorm, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        (model(inputs(step, 4, 1, 5, 5)) - 1).square().mean().backward()
        optimizer.step()


MODES = ["sn", "divout", "divgrad", "muleps", "divlr"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("example", [True, False])
def test_training_resumes_bit_for_bit(mode: Any, example: bool) -> None:
    options: Any = {"example_input": inputs(0, 1, 1, 5, 5)} if example else {}

    def start() -> tuple[nn.Module, SpectralNorm, Any]:
        model, norm = build(mode, **options)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        if mode in ("muleps", "divlr"):
            norm.attach(optimizer)
        return model, norm, optimizer

    whole, first, second = start(), start(), start()
    fit(*whole, range(6))
    fit(*first, range(3))
    file = io.BytesIO()
    torch.save([first[0].state_dict(), first[2].state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second[0].load_state_dict(saved[0])
    second[2].load_state_dict(saved[1])
    fit(*second, range(3, 6))
    for a, b in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_work_by_themselves(mode: Any) -> None:
    model, norm = build(mode)
    x = inputs(0, 4, 1, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x)
        for twin in (copy.deepcopy(model), *([] if mode == "sn" else [pickle.loads(pickle.dumps(model))])):
            before = {key: value.clone() for key, value in model.state_dict().items()}
            torch.testing.assert_close(twin.eval()(x), copy.deepcopy(model).eval()(x), rtol=0, atol=0)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.mul_(2)
            twin.train()(x).square().mean().backward()
            twin_gradients = [p.grad for p in twin.parameters()]
            assert all(g is not None for g in twin_gradients)
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
            if mode == "divgrad":
                own: Any = next(iter(twin._forward_pre_hooks.values())).__self__  # type: ignore[attr-defined]
                assert own is not norm
                plain = nn.Sequential(*[m for name, m in copy.deepcopy(twin).named_children()])
                plain.zero_grad()
                plain(x).square().mean().backward()
                for g, p in zip(twin_gradients, plain.parameters(), strict=True):
                    torch.testing.assert_close(g * own.rho, p.grad, rtol=1e-6, atol=1e-9)


def test_divout_divides_the_output_without_gradient_through_rho() -> None:
    plain, model = mlp(), mlp()
    norm = spectral_norm(model, "divout", layers=[0, 1])
    out = model(inputs())
    rho = norm.rho
    assert not rho.requires_grad
    expected = exact(plain[0].weight).clamp_min(1) * exact(plain[2].weight).clamp_min(1)  # type: ignore[arg-type]
    torch.testing.assert_close(rho, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out, plain(inputs()) / rho)
    out.square().mean().backward()
    (plain(inputs()) / rho).square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("per_layer", [False, True])
def test_divgrad_divides_gradients_once_in_each_backward(per_layer: bool) -> None:
    plain, model = mlp(), mlp()
    norm = spectral_norm(model, "divgrad", layers=[0, 1], per_layer=per_layer)
    for step in range(2):
        model(inputs(step)).square().mean().backward()
        plain(inputs(step)).square().mean().backward()
    sigmas = [float(sigma.clamp_min(1)) for sigma in norm.sigmas().values()]
    rho = sigmas[0] * sigmas[1]
    assert rho > 1.5
    torch.testing.assert_close(model(inputs()), plain(inputs()), rtol=0, atol=0)
    factors = [sigmas[0], 1, sigmas[1], 1, 1, 1] if per_layer else [rho] * 6
    for a, b, divisor in zip(model.parameters(), plain.parameters(), factors, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad * divisor, b.grad, rtol=1e-6, atol=1e-9)


def test_muleps_is_adam_with_all_gradients_divided() -> None:
    """With a frozen middle layer rho is constant, and the two agree after any number of steps."""
    models = [mlp(), mlp()]
    for model in models:
        model[2].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    norms = [spectral_norm(m, mode, layers=[1]) for m, mode in zip(models, ("muleps", "divgrad"), strict=True)]  # type: ignore[arg-type]
    optimizers = [torch.optim.Adam(model.parameters(), 1e-2, eps=1e-3) for model in models]
    norms[0].attach(optimizers[0])
    for step in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(inputs(step)) - 1).square().mean().backward()
            optimizer.step()
    assert float(norms[0].rho) > 1.2
    assert optimizers[0].param_groups[0]["eps"] == 1e-3
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_divlr_is_a_learning_rate_of_the_layer(kind: Any) -> None:
    models = [mlp(), mlp()]
    norm = spectral_norm(models[0], "divlr", layers=[-2])
    optimizer = kind(models[0].parameters(), lr=1e-2)
    norm.attach(optimizer)
    weight = models[1][2].weight
    others = [p for p in models[1].parameters() if p is not weight]
    plain = kind([{"params": others}, {"params": [weight]}], lr=1e-2)
    for step in range(5):
        for model, own in ((models[0], optimizer), (models[1], plain)):
            own.zero_grad()
            (model(inputs(step)) - 1).square().mean().backward()
            if own is plain:
                plain.param_groups[1]["lr"] = 1e-2 / max(1.0, float(norm.sigmas()["2"]))
        plain.step()
        optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_removal_leaves_a_plain_model(mode: Any) -> None:
    model = mlp()
    norm = spectral_norm(model, mode)
    names = [name for name, _ in mlp().named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(inputs()).sum().backward()
    model.eval()
    before = model(inputs())
    norm.remove()
    assert sorted(model.state_dict()) == sorted(names)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    if mode != "divout":
        torch.testing.assert_close(model(inputs()), before)
    spectral_norm(model)


def test_half_precision_and_autocast() -> None:
    model = mlp().to(torch.bfloat16)
    norm = spectral_norm(model, leave_smaller=False)
    out = model(inputs().bfloat16())
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    exact_norm = exact(mlp()[0].weight.bfloat16().float())  # type: ignore[union-attr, operator]
    assert float(norm.sigmas()["0"]) == pytest.approx(float(exact_norm), rel=1e-5)
    model = mlp().float()
    norm = spectral_norm(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(inputs().float())
    assert float(norm.sigmas()["0"]) == pytest.approx(float(exact(mlp()[0].weight)), rel=1e-5)  # type: ignore[arg-type]


def test_inference_mode_first() -> None:
    model, _ = build("sn")
    with torch.inference_mode():
        model.eval()(inputs(0, 2, 1, 5, 5))
    model.train()(inputs(0, 2, 1, 5, 5)).sum().backward()


def test_other_input_sizes_start_anew() -> None:
    layer = nn.Conv2d(1, 2, 3).double()
    norm = spectral_norm(layer, example_input=inputs(0, 1, 1, 5, 5))
    small = float(norm.sigmas()[""])
    layer.eval()(inputs(0, 1, 1, 9, 9))
    assert float(norm.sigmas()[""]) > small
    layer(inputs(0, 1, 9, 9))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "batch"}, ValueError, "mode must be one of sn, divout"),
        ({"layers": []}, ValueError, "layers must be a list"),
        ({"layers": "0"}, ValueError, "layers must be a list"),
        ({"layers": [3]}, ValueError, "no number 3; the model has 3: 0, 2, 4"),
        ({"layers": [-4]}, ValueError, "no number -4"),
        ({"layers": [0, -3]}, ValueError, "'0' is named twice"),
        ({"layers": ["1"]}, TypeError, "'1' is a ReLU"),
        ({"layers": ["nine"]}, ValueError, "there is no 'nine'"),
        ({"layers": [1.5]}, TypeError, "numbers, names or modules"),
        ({"layers": [nn.Linear(2, 2)]}, ValueError, "is not in the model"),
        ({"lipschitz": 0.0}, ValueError, "lipschitz must be a positive"),
        ({"lipschitz": "one"}, TypeError, "lipschitz must be a positive"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1"),
        ({"per_layer": True}, ValueError, "per_layer is for mode='divgrad'"),
        ({"mode": "divout", "differentiate": True}, ValueError, "differentiate is for mode='sn'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_and_change_nothing(options: Any, error: Any, words: str) -> None:
    model = mlp()
    with pytest.raises(error, match=words):
        spectral_norm(model, **options)
    assert sorted(model.state_dict()) == sorted(mlp().state_dict())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_wrong_models_are_named() -> None:
    with pytest.raises(ValueError, match="no linear or convolution"):
        spectral_norm(nn.ReLU())
    model = mlp()
    spectral_norm(model, layers=[0])
    with pytest.raises(ValueError, match="already"):
        spectral_norm(model, "divgrad", layers=[0])
    tied = mlp()
    tied[2].weight = tied[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.float64))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"shared \(0.weight, 2.weight\)"):
        spectral_norm(tied)
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        spectral_norm(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="not initialised"):
        spectral_norm(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="must be real"):
        spectral_norm(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="size of its input"):
        spectral_norm(nn.Conv2d(1, 1, 3)).sigmas()
    norm = spectral_norm(mlp(), "muleps")
    with pytest.raises(ValueError, match="SGD has none"):
        norm.attach(torch.optim.SGD(mlp().parameters(), 0.1))
    with pytest.raises(ValueError, match="does not hold the weight of layer '0'"):
        spectral_norm(mlp(), "divlr").attach(torch.optim.SGD(mlp().parameters(), 0.1))
    with pytest.raises(ValueError, match="attach is for"):
        spectral_norm(mlp(), "divout").attach(torch.optim.SGD(mlp().parameters(), 0.1))
    lstm = nn.Sequential(nn.Linear(2, 2))
    norm = spectral_norm(lstm, "muleps")
    with pytest.warns(UserWarning, match="before attach"):
        lstm(torch.ones(1, 2))


def test_attention_projections_without_forward_are_left_out() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    assert list(spectral_norm(model).layers) == ["0.linear1", "0.linear2"]
    with pytest.raises(TypeError, match="forward pass of its own"):
        spectral_norm(nn.MultiheadAttention(8, 2), layers=["out_proj"])


def test_agrees_with_torch() -> None:
    """The same weight as torch's parametrization, once both have converged."""
    ours, theirs = linear(inputs(0, 6, 4)), linear(inputs(0, 6, 4))
    spectral_norm(ours, leave_smaller=False)
    nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=200)
    torch.testing.assert_close(ours(F.relu(inputs(1, 3, 4))), theirs(F.relu(inputs(1, 3, 4))), rtol=1e-8, atol=1e-9)
