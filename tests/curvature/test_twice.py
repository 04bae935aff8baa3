"""Operations differentiated by hand against PyTorch's own derivatives, and that they are used."""

import pytest
import torch
import torch.nn.functional as F
from curvature_models import generator
from torch import Tensor, nn

from steepest.curvature import Hessian
from steepest.curvature._twice import Twice


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


W, w, M = numbers(5, 4, seed=1), numbers(4, seed=2), numbers(3, 3, seed=3)
A = numbers(4, 12, seed=4)


def attend(x: Tensor, **options) -> Tensor:
    heads = F.linear(x, A.T).view(2, 3, 2, 6).transpose(1, 2)
    q, k, v = heads.chunk(3, -1)
    if options.get("enable_gqa"):
        k, v = k[:, :1], v[:, :1]
    return F.scaled_dot_product_attention(q, k, v, **options)


CASES = {
    "linear": lambda x: F.linear(x, x[0, :, :].tanh(), x[0, :, 0]),
    "linear without bias": lambda x: F.linear(x.sin(), W),
    "linear of weights": lambda x: F.linear(w.expand(2, 3, 4), x[1]),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: x.tanh() * x.sigmoid(),
    "rms norm": lambda x: F.rms_norm(x, (4,)),
    "rms norm with weights": lambda x: F.rms_norm(x, (4,), x[0, 0].exp(), 0.1),
    "rms norm, fixed weights": lambda x: F.rms_norm(x, (4,), w, 0.1),
    "rms norm of a vector": lambda x: F.rms_norm(x.flatten(), (24,), x.flatten().exp()),
    "rms norm, weights alone": lambda x: F.rms_norm(w.expand(2, 3, 4) * 2, (4,), x[0, 0]),
    "attention": attend,
    "causal": lambda x: attend(x, is_causal=True),
    "masked": lambda x: attend(x, attn_mask=M > -1, scale=0.7),
    "biased": lambda x: attend(x, attn_mask=M),
    "grouped": lambda x: attend(x, enable_gqa=True, is_causal=True),
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    x = numbers(2, 3, 4)
    target = CASES[name](x)

    def loss(t: Tensor) -> Tensor:
        return (CASES[name](t) - target.roll(1)).square().mean() + CASES[name](t).pow(3).sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(loss, x).view(24, 24)
    H = Hessian.of(loss, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(H.dense(), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(torch.stack([H @ e for e in torch.eye(24).double()], 1), expected)
        torch.testing.assert_close(H.gradient(), torch.func.grad(loss)(x).flatten(), rtol=1e-10, atol=1e-12)


def test_values_and_nodes() -> None:
    x = numbers(2, 3, 4).requires_grad_()
    with Twice():
        for name in ("linear without bias", "gelu", "silu", "sigmoid", "rms norm", "causal"):
            found = CASES[name](x)
            assert type(found.grad_fn).__name__.startswith("_"), name
            torch.testing.assert_close(found, CASES[name](x.detach()))
        assert not CASES["gelu"](x.detach()).requires_grad
        torch.testing.assert_close(torch.tanh(x.detach(), out=torch.empty_like(x)), x.detach().tanh())
        assert torch.sigmoid(x.to(torch.complex128)).is_complex()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not type(F.linear(x.float(), W.float()).grad_fn).__name__.startswith("_")


def test_the_batched_backward_is_used() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.RMSNorm(5), nn.Linear(5, 2)).double()
    H = Hessian(model, F.mse_loss, (numbers(3, 4), numbers(3, 2)))
    H @ numbers(H.shape[0], 3)
    assert H._kept is not None and H._kept[0][0].pullback.batched


@pytest.mark.parametrize("count", [1, 3])
def test_large_inputs_in_blocks(count: int) -> None:
    x, weight = numbers(2, 120, 160), numbers(160, seed=1)

    def loss(t: Tensor) -> Tensor:
        heads = F.rms_norm(t, (160,), weight).view(2, 120, 10, 16).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads.sin(), heads.cos(), is_causal=True).pow(3).sum()

    vectors = numbers(x.numel(), count, seed=2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(point), point, create_graph=True)
        rows = [torch.autograd.grad(slope, point, v.view_as(x), retain_graph=True)[0].flatten() for v in vectors.T]
    H = Hessian.of(loss, x)
    torch.testing.assert_close(H @ vectors, torch.stack(rows, 1), rtol=1e-9, atol=1e-9)
    assert H._kept is not None and H._kept[0][0].pullback.batched
