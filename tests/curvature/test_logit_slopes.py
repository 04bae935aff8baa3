"""Slopes of logits against closed forms and autograd; the model stays as it was."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from steepest.curvature.logit_slopes import logit_slopes
from steepest.curvature.softmax_radius import radius
from steepest.curvature.step_radius import step_radius
from steepest.models import GPT, MLP, GPTConfig


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(model: nn.Module, seed: int = 1) -> list[Tensor]:
    raw = [torch.randn(p.shape, dtype=p.dtype, generator=rng(seed + i)) for i, p in enumerate(model.parameters())]
    length = math.sqrt(sum(float(v.double().square().sum()) for v in raw))
    return [v / length for v in raw]


def net(dtype: torch.dtype = torch.float64) -> MLP:
    return MLP([5, 8, 4], activation="gelu", generator=rng(), dtype=dtype)


X = torch.randn(7, 5, dtype=torch.float64, generator=rng(9))


def test_a_linear_model_has_the_slopes_of_its_direction() -> None:
    model = nn.Linear(5, 3).double()
    v = unit(model)
    for method in ("jvp", "fd"):
        torch.testing.assert_close(logit_slopes(model, X, v, method=method), X @ v[0].T + v[1], rtol=1e-7, atol=1e-9)


def test_jvp_is_the_jacobian_times_the_direction() -> None:
    model, v = net(), unit(net())
    names = [name for name, _ in model.named_parameters()]
    jacobian = torch.autograd.functional.jacobian(
        lambda *p: torch.func.functional_call(model, dict(zip(names, p, strict=True)), (X,)), tuple(model.parameters())
    )
    expected = sum((j * w).flatten(2).sum(-1) for j, w in zip(jacobian, v, strict=True))
    torch.testing.assert_close(logit_slopes(model, X, v), expected)
    torch.testing.assert_close(logit_slopes(model, X, v, method="fd"), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(logit_slopes(model, X, dict(zip(names, v, strict=True))), expected)
    torch.testing.assert_close(logit_slopes(model, X, [-w for w in v]), -expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_in_low_precision(dtype: torch.dtype) -> None:
    model, v = net(dtype), unit(net())
    expected = logit_slopes(net(torch.float64).requires_grad_(True), X, v)
    for parameter, other in zip((wide := net()).parameters(), model.parameters(), strict=True):
        parameter.data = other.detach().double()
    expected = logit_slopes(wide, X.to(dtype).double(), [w.to(dtype).double() for w in v])
    found = logit_slopes(model, X.to(dtype), [w.to(dtype) for w in v], method="fd")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-4)


def test_frozen_parameters_have_no_slope() -> None:
    model = net()
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="2 trainable"):
        logit_slopes(model, X, unit(net()))
    tail = [p for p in model.parameters() if p.requires_grad]
    v = [torch.randn_like(p) for p in tail]
    length = torch.cat([w.flatten() for w in v]).norm()
    v = [w / length for w in v]
    hidden = torch.nn.functional.gelu(model.layers[0](X))
    torch.testing.assert_close(logit_slopes(model, X, v), (hidden @ v[0].T + v[1]).detach())


def test_tied_parameters_count_once() -> None:
    gpt = GPT(GPTConfig(vocab_size=11, context=6, layers=1, heads=2, width=8, tied=True), generator=rng()).double()
    tokens = torch.randint(11, (3, 6), generator=rng())
    v = unit(gpt)
    slopes = logit_slopes(gpt, tokens, v)
    assert slopes.shape == (3, 6, 11)
    torch.testing.assert_close(logit_slopes(gpt, tokens, v, method="fd"), slopes, rtol=1e-6, atol=1e-7)


class Tricky(nn.Module):
    """Dropout, batch norm, a buffer that counts calls, and random numbers in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = nn.functional.dropout(self.norm(self.first(x)), 0.5, self.training)
        return self.last(x + 1e-3 * torch.randn_like(x))


@pytest.mark.parametrize("method", ["jvp", "fd"])
def test_nothing_of_the_model_changes(method) -> None:
    model = Tricky().double()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    logit_slopes(model, X, unit(model), method=method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.norm.training and model.last.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return x * 2

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * 2


def test_without_forward_mode_it_warns_and_differences() -> None:
    model = nn.Linear(5, 3).double()
    v = unit(model)

    def logits(inner: nn.Module, x: Tensor) -> Tensor:
        return NoForwardMode.apply(inner(x))  # pyright: ignore[reportReturnType]

    with pytest.warns(UserWarning, match="finite differences"):
        found = logit_slopes(model, X, v, logits=logits)
    torch.testing.assert_close(found, 2 * (X @ v[0].T + v[1]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("module", ["attention", "encoder", "lstm"])
def test_modules_with_fused_kernels(module: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: nn.Module = {
                "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
                "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1),
                "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
            }[module]()
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x, x, x)[0] if module == "attention" else self.inner(x)
            return self.head(out[0] if module == "lstm" else out)

    torch.manual_seed(0)
    model = Model().double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    v = unit(model)
    with warnings.catch_warnings():
        if module == "lstm":
            warnings.simplefilter("ignore")
        else:
            warnings.simplefilter("error")
        found = logit_slopes(model, x, v)
    torch.testing.assert_close(found, logit_slopes(model, x, v, method="fd"), rtol=1e-6, atol=1e-7)


def test_a_direction_that_is_not_unit_is_divided_by_its_norm() -> None:
    model, v = net(), unit(net())
    with pytest.warns(UserWarning, match=r"norm 3"):
        found = logit_slopes(model, X, [3 * w for w in v])
    torch.testing.assert_close(found, logit_slopes(model, X, v))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m, v: logit_slopes(m, X, v[::-1]), ValueError, "order of the parameters"),
        (lambda m, v: logit_slopes(m, X, v[:-1]), ValueError, "4 trainable"),
        (lambda m, v: logit_slopes(m, X, {"nothing": v[0]}), ValueError, "no parameter 'nothing'"),
        (lambda m, v: logit_slopes(m, X, [0 * w for w in v]), ValueError, "zero"),
        (lambda m, v: logit_slopes(m, X, [w / 0 for w in v]), FloatingPointError, "direction"),
        (lambda m, v: logit_slopes(m, X[:0], v), ValueError, "at least one sample"),
        (lambda m, v: logit_slopes(m, X / 0, v), FloatingPointError, "logits"),
        (lambda m, v: logit_slopes(m, X, v, method="hvp"), ValueError, "method"),
        (lambda m, v: logit_slopes(m, X, v, logits=lambda n, x: n(x)[:, :1]), ValueError, "two classes"),
        (lambda m, v: logit_slopes(m, X, v, logits=lambda n, x: n(x).sum()), ValueError, "samples, ..., classes"),
        (lambda m, v: logit_slopes(lambda x: x, X, v), TypeError, "nn.Module"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_bad_input(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(net(), unit(net()))


def test_inputs_of_several_kinds() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3).double()

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.linear(x) * scale}

    model, two = Two(), torch.tensor(2.0, dtype=torch.float64)
    v = unit(model)
    expected = 2 * (X @ v[0].T + v[1])
    torch.testing.assert_close(logit_slopes(model, (X, two), v), expected)
    torch.testing.assert_close(logit_slopes(model, {"x": X, "scale": two}, v), expected)


def test_step_radius_is_the_length_over_the_radius() -> None:
    model, v = net(), unit(net())
    rho = float(radius(logit_slopes(model, X, v)))
    for scale in (0.3, -2.0):
        found = step_radius(model, X, [scale * w for w in v])
        assert found.ratio == pytest.approx(abs(scale) / rho)
        assert found.radius == pytest.approx(rho)
        assert found.length == pytest.approx(abs(scale))
    assert step_radius(model, X, [0 * w for w in v]).ratio == 0
    shift = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    shift["layers.1.bias"] = torch.full_like(shift["layers.1.bias"], 3.0)  # all logits alike
    assert step_radius(model, X, shift).radius > 1e10


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e3])
def test_differences_of_large_logits(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    with torch.no_grad():
        model[2].weight.mul_(scale)
    x = torch.randn(32, 4, generator=generator)
    v = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    length = torch.cat([part.flatten() for part in v]).norm()
    v = [part / length for part in v]
    found = logit_slopes(model, x, v, method="fd")
    exact = logit_slopes(model.double(), x.double(), [part.double() for part in v])
    assert float((found - exact).abs().max() / exact.abs().max()) < 0.01
