"""The loss, its gradient and its proxy against plain formulas, autograd and fifty-digit arithmetic."""

import decimal
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.dynamics import LogDomainLoss, ScaledTensor, logit_terms
from steepest.dynamics.log_domain import label_mask, log_softplus

LOSSES = ("cross_entropy", "exponential", "pair_log")
seeds = st.integers(0, 2**31 - 1)


def problem(seed: int, n: int = 12, k: int = 4, d: int = 5, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64)
    labels = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=generator)])
    return features, labels, size * torch.randn(k, d, generator=generator, dtype=torch.float64)


def plain_loss(weight: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, loss: str) -> torch.Tensor:
    logits = features @ weight.mT
    if loss == "cross_entropy":
        return torch.nn.functional.cross_entropy(logits, labels)
    gaps = logits - logits.gather(-1, labels[:, None])
    terms = gaps.exp() if loss == "exponential" else gaps.exp().log1p()
    return terms[~label_mask(labels, weight.shape[0])].sum() / len(labels)


@pytest.mark.parametrize("loss", LOSSES)
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_loss_and_gradient_are_those_of_autograd_while_nothing_underflows(loss: str, seed: int) -> None:
    features, labels, weight = problem(seed)
    found = LogDomainLoss(features, labels, 4, loss).evaluate(weight)  # type: ignore[arg-type]
    assert abs(float(found.margin)) < 20
    leaf = weight.clone().requires_grad_()
    value = plain_loss(leaf, features, labels, loss)
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(found.log_loss.exp(), value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gradient.to_tensor(), expected, rtol=1e-12, atol=1e-12)
    plain = LogDomainLoss(features, labels, 4, loss).plain_gradient(weight)  # type: ignore[arg-type]
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_at_zero_the_proxy_is_one_minus_one_over_k_and_the_loss_log_k(k: int) -> None:
    features, labels, weight = problem(0, k=k, n=20, size=0.0)
    found = LogDomainLoss(features, labels, k).evaluate(weight)
    assert float(found.log_proxy.exp()) == pytest.approx(1 - 1 / k, rel=1e-14)
    assert float(found.log_loss.exp()) == pytest.approx(math.log(k), rel=1e-14)
    assert float(found.margin) == 0


def exact_gradient(
    weight: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, loss: str
) -> list[list[Decimal]]:
    """n times the gradient, in fifty digits."""
    wide = [[Decimal(x) for x in row] for row in weight.tolist()]
    gradient = [[Decimal(0)] * len(wide[0]) for _ in wide]
    for sample, label in zip(features.tolist(), labels.tolist(), strict=True):
        h = [Decimal(x) for x in sample]
        logits = [sum(a * b for a, b in zip(row, h, strict=True)) for row in wide]
        gaps = [z - logits[label] for z in logits]
        rest = sum((gap.exp() for c, gap in enumerate(gaps) if c != label), Decimal(0))
        for c, gap in enumerate(gaps):
            if c == label:
                continue
            bottom = {"cross_entropy": 1 + rest, "exponential": Decimal(1), "pair_log": 1 + gap.exp()}[loss]
            p = gap.exp() / bottom
            for j, value in enumerate(h):
                gradient[c][j] += p * value
                gradient[label][j] -= p * value
    return gradient


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_right_at_any_margin(loss: str, size: float) -> None:
    features, labels, weight = problem(3, n=5, k=3, d=2)
    features[:, 0] += 4 * labels
    weight = size * weight
    found = LogDomainLoss(features, labels, 3, loss).evaluate(weight)  # type: ignore[arg-type]
    with decimal.localcontext() as context:
        context.prec = 50
        exact = exact_gradient(weight, features, labels, loss)
        largest = max(abs(x) for row in exact for x in row)
        expected = torch.tensor([[float(x / largest) for x in row] for row in exact], dtype=torch.float64)
        log_largest = float((largest / 5).ln())
    mantissa = found.gradient.mantissa
    torch.testing.assert_close(mantissa / mantissa.abs().max(), expected, rtol=1e-9, atol=1e-9 * size / 100)
    assert float(mantissa.abs().max().log() + found.gradient.log_scale) == pytest.approx(log_largest, rel=1e-10)


def test_a_margin_of_a_million_is_nothing_special() -> None:
    features, labels = torch.eye(3, dtype=torch.float64), torch.arange(3)
    found = LogDomainLoss(features, labels).evaluate(1e6 * torch.eye(3, dtype=torch.float64))
    assert float(found.margin) == 1e6
    assert float(found.log_loss) == pytest.approx(-1e6 + math.log(2), rel=1e-12)
    assert float(found.log_proxy) == pytest.approx(-1e6 + math.log(2), rel=1e-12)
    torch.testing.assert_close(found.gradient.mantissa * 3, 1 - 3 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_badly_wrong_classifiers_do_not_overflow(loss: str) -> None:
    own = label_mask(torch.tensor([0, 1]), 2)
    terms = logit_terms(torch.tensor([[-1e5, 1e5], [0.0, 0.0]], dtype=torch.float64), own, loss)  # type: ignore[arg-type]
    assert float(terms.margin) == -2e5
    assert bool(terms.weights.isfinite().all())
    assert float(terms.log_loss) == pytest.approx(
        2e5 - math.log(2) if loss == "exponential" else math.log(1e5), rel=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_softplus_is_smooth_where_it_changes_form(dtype: torch.dtype) -> None:
    x = torch.linspace(-60, 5, 2001, dtype=torch.float64).to(dtype)
    wide = x.double()
    expected = torch.where(wide < -30, wide - wide.exp() / 2, wide.exp().log1p().log())
    torch.testing.assert_close(log_softplus(x).double(), expected, rtol=0, atol=10 * torch.finfo(dtype).eps * 10)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, shift=st.floats(-5000, 5000), weight=st.sampled_from([0.0, 0.1, 0.9, 0.999]))
def test_blends_of_scaled_tensors(seed: int, shift: float, weight: float) -> None:
    _, _, a = problem(seed)
    _, _, b = problem(seed + 1)
    x = ScaledTensor(a, torch.tensor(shift, dtype=torch.float64))
    y = ScaledTensor(b, torch.tensor(shift - 3.0, dtype=torch.float64))
    found = x.blend(y, weight)
    expected = weight * a + (1 - weight) * b * math.exp(-3)
    assert float(found.mantissa.abs().max()) == 1
    torch.testing.assert_close(found.mantissa * (found.log_scale - shift).exp(), expected, rtol=1e-9, atol=1e-12)


def test_a_zero_blends_as_zero() -> None:
    zero = ScaledTensor.zeros_like(torch.zeros(2, 3, 2, dtype=torch.float64))
    one = ScaledTensor(torch.ones(2, 3, 2, dtype=torch.float64), torch.tensor([-2000.0, 5.0], dtype=torch.float64))
    assert torch.equal(zero.blend(zero, 0.9).mantissa, zero.mantissa)
    found = zero.blend(one, 0.9)
    assert torch.equal(found.mantissa, one.mantissa)
    torch.testing.assert_close(found.log_scale, one.log_scale + math.log(0.1))
    assert torch.equal(one.blend(zero, 0.5).mantissa, one.mantissa)


GOOD = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("features", "labels", "classes", "error", "says"),
    [
        (GOOD.where(GOOD < 1, torch.nan), LABELS, None, ValueError, "features must be finite"),
        (GOOD.where(GOOD < 1, torch.inf), LABELS, None, ValueError, "features must be finite"),
        (GOOD.long(), LABELS, None, TypeError, "features must be a real floating-point"),
        (GOOD.to(torch.complex128), LABELS, None, TypeError, "features must be a real floating-point"),
        (GOOD.half(), LABELS, None, TypeError, "float32 or float64"),
        (GOOD[0], LABELS, None, ValueError, "features must have shape"),
        (GOOD[:0], LABELS[:0], None, ValueError, "none of them zero"),
        (GOOD, LABELS.double(), None, TypeError, "labels must be a tensor of integers"),
        (GOOD, LABELS > 0, None, TypeError, "labels must be a tensor of integers"),
        (GOOD, LABELS[:5], None, ValueError, "labels must have shape"),
        (GOOD, LABELS - 1, None, ValueError, r"labels must lie in 0 .. 1, got -1 .. 1"),
        (GOOD, LABELS, 2, ValueError, r"labels must lie in 0 .. 1, got 0 .. 2"),
        (GOOD, LABELS, 1, ValueError, "at least 2 classes"),
        (GOOD, LABELS, 3.0, TypeError, "classes must be an integer"),
        (GOOD, LABELS * 0, None, ValueError, "at least 2 classes"),
        (GOOD, LABELS * 0, 3, ValueError, "fewer than 2 classes have samples"),
    ],
)
def test_bad_data_is_named(features, labels, classes, error, says) -> None:
    with pytest.raises(error, match=says):
        LogDomainLoss(features, labels, classes)


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ValueError, match="loss must be one of cross_entropy"):
        LogDomainLoss(GOOD, LABELS, loss="hinge")  # type: ignore[arg-type]


def test_a_class_without_samples_is_warned_of_and_has_a_margin() -> None:
    with pytest.warns(UserWarning, match="no samples of class 3"):
        loss = LogDomainLoss(GOOD, LABELS, 4)
    weight = torch.zeros(4, 3, dtype=torch.float64)
    assert float(loss.evaluate(weight).log_proxy.exp()) == pytest.approx(0.75)
