"""Radii of attention and activations, against formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.dynamics import activation_radius, logit_slopes, network_radius, radius
from steepest.models import GPT, MLP, GPTConfig


def unit(model: nn.Module) -> list[Tensor]:
    raw = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i))
           for i, p in enumerate(model.parameters())]  # fmt: skip
    length = torch.cat([v.flatten() for v in raw]).norm()
    return [v / length for v in raw]


def test_activation_radius() -> None:
    h, s = torch.tensor([3.0, -4.0, 1.0]).double(), torch.tensor([-2.0, 1.0, 0.0]).double()
    assert activation_radius("relu", h, s).tolist() == [1.5, 4.0, math.inf]
    expected = [math.hypot(3, math.pi / 2) / 2, math.hypot(4, math.pi / 2), math.inf]
    assert activation_radius("tanh", h, s).tolist() == pytest.approx(expected)
    assert activation_radius("silu", h, s).tolist()[0] == pytest.approx(math.hypot(3, math.pi) / 2)
    assert activation_radius("gelu", h, s).tolist() == [math.inf] * 3
    with pytest.raises(ValueError, match="name"):
        activation_radius("swish", h, s)


def test_a_network_of_two_layers() -> None:
    model = MLP([5, 50, 4], "relu", dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, v = torch.randn(6, 5, dtype=torch.float64), unit(model)
    found = network_radius(model, x, v, quantile=0.1)
    h, slope = model.layers[0](x), x @ v[0].T + v[1]
    ratios = (h.abs() / slope.abs()).flatten().sort().values
    assert found.kink == found.activation == pytest.approx(float(ratios[29]))
    assert found.output == pytest.approx(float(radius(logit_slopes(model, x, v))))
    assert found.attention == math.inf
    assert found.network == min(found.output, found.kink)


class Attention(nn.Module):
    """One head, either fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qk, self.head = nn.Linear(4, 8, bias=False).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        if self.fused:
            return self.head(F.scaled_dot_product_attention(q, k, x, is_causal=True))
        scores = q @ k.mT / 2
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        return self.head(scores.masked_fill(hidden, -math.inf).softmax(-1) @ x)


def test_attention() -> None:
    torch.manual_seed(0)
    model, other = Attention(True), Attention(False)
    other.load_state_dict(model.state_dict())
    x, v = torch.randn(2, 5, 4, dtype=torch.float64), unit(model)
    (q, k), (dq, dk) = model.qk(x).chunk(2, -1), (x @ v[0].T).chunk(2, -1)
    slopes = (dq @ k.mT + q @ dk.mT) / 2
    spreads = [float(row[: t + 1].amax() - row[: t + 1].amin()) for part in slopes for t, row in enumerate(part)]
    for each in (model, other):
        found = network_radius(each, x, v)
        assert found.attention == pytest.approx(math.pi / max(spreads))
        assert found.kink == math.inf


class Attends(nn.Module):
    """The same self-attention by `nn.MultiheadAttention`, and by its parts."""

    def __init__(self, parts: bool, masked: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(8, 3, dtype=torch.float64)
        self.parts = parts
        self.mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.parts:
            return self.head(self.inner(x, x, x, attn_mask=self.mask, need_weights=False)[0])
        projected = nn.functional.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in projected.chunk(3, -1))
        scores = q @ k.mT / 2
        scores = scores if self.mask is None else scores.masked_fill(self.mask, -math.inf)
        return self.head(self.inner.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention_of_torch(masked: bool) -> None:
    whole, parts = Attends(False, masked), Attends(True, masked)
    parts.load_state_dict(whole.state_dict())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 8, dtype=torch.float64, generator=generator)
    v = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in whole.parameters()]
    one, other = network_radius(whole, x, v), network_radius(parts, x, v)
    assert math.isfinite(one.attention)
    assert (one.attention, one.output) == pytest.approx((other.attention, other.output), rel=1e-9)


def test_a_gpt_has_all_three() -> None:
    model = GPT(GPTConfig(vocab_size=11, context=6, layers=2, heads=4, kv_heads=2, width=16)).double()
    found = network_radius(model, torch.randint(11, (2, 6)), unit(model))
    assert all(math.isfinite(value) and value > 0 for value in vars(found).values())
    assert model.training
    assert found.activation > found.kink  # SiLU is smooth on the real axis


def test_bad_input() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="quantile"):
        network_radius(model, torch.ones(1, 3), unit(model), quantile=0.0)
    with pytest.raises(ValueError, match="direction"):
        network_radius(model, torch.ones(1, 3), [torch.zeros(2, 3), torch.zeros(2)])
