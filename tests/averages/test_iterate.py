"""Averages of iterates against sums written out."""

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steepest.averages import IterateAverage


def path(steps: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(steps, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def averaged(values: Any, *args: Any, **options: Any) -> IterateAverage:
    average = IterateAverage(*args, **options)
    for value in values:
        average.update(value)
    return average


def counted(values: Tensor, burn_in: int, every: int) -> Tensor:
    return torch.stack([x for t, x in enumerate(values, 1) if t > burn_in and (t - burn_in) % every == 0])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 6),
    st.floats(0, 0.99),
    st.sampled_from(["float64", "compensated"]),
)
def test_every_kind_is_its_weighted_sum(
    steps: int, burn_in: int, every: int, latest: int, decay: float, precision: Any
) -> None:
    steps += burn_in + every
    values = path(steps, 3)
    chosen = counted(values, burn_in, every)
    n = len(chosen)
    weights = {
        "mean": torch.ones(n),
        "ema": torch.tensor([(1 - decay) * decay ** (n - 1 - i) for i in range(n)], dtype=torch.float64),
        "latest": torch.tensor([float(i >= n - latest) for i in range(n)]).double(),
    }
    options: dict[str, dict[str, Any]] = {"mean": {}, "ema": {"decay": decay}, "latest": {"latest": latest}}
    for kind, each in weights.items():
        w = (each / each.sum()).double()
        found = averaged(
            values, kind, burn_in=burn_in, every=every, second_moment=True, precision=precision, **options[kind]
        )
        assert torch.allclose(found.value(), w @ chosen, atol=1e-12)
        moment = torch.einsum("t,ti,tj->ij", w, chosen, chosen)
        assert torch.allclose(found.moment(), moment, atol=1e-12)
        top, vectors = found.top(2)
        assert torch.allclose(moment @ vectors, vectors * top, atol=1e-10)
        assert found.seen == steps
        assert found.count == (min(n, latest) if kind == "latest" else n)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_ema_with_a_changing_decay(bias_correction: bool) -> None:
    values, schedule = path(7, 2), lambda count: count / (count + 3)
    found = averaged(values, "ema", decay=schedule, bias_correction=bias_correction)
    s, w = values[0] * 0, 0.0
    for i, x in enumerate(values):
        beta = 0.0 if i == 0 and not bias_correction else schedule(i)
        s, w = beta * s + (1 - beta) * x, beta * w + (1 - beta)
    assert torch.allclose(found.value(), s / w, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.floats(0.05, 1))
def test_a_suffix_is_the_mean_of_about_the_last_part(steps: int, fraction: float) -> None:
    values = path(steps, 2)
    found = averaged(values, "suffix", fraction=fraction)
    least = math.ceil(fraction * steps - 1e-9)
    assert least <= found.count <= min(steps, least + max(2, least / 8))
    assert torch.allclose(found.value(), values[-found.count :].mean(0), atol=1e-12)
    assert len(found.state_dict()["blocks"]) <= 33


def test_float64_and_kahan_sums_hold_where_float32_does_not() -> None:
    steps, value = 50_000, torch.tensor([1000.0001, 1e-3])
    plain = torch.zeros(2)
    averages = [IterateAverage("mean"), IterateAverage("mean", precision="compensated")]
    emas = [IterateAverage("ema", decay=0.9999), IterateAverage("ema", decay=0.9999, precision="compensated")]
    for _ in range(steps):
        plain += value
    for _ in range(steps // 10):
        for average in averages + emas:
            average.update(value)
    assert float((plain / steps / value - 1).abs().max()) > 1e-4
    for average in (*averages, *emas):
        assert average.value().dtype == torch.float32
        assert torch.allclose(average.value(torch.float64), value.double(), rtol=1e-7, atol=0)


def test_half_precision_is_summed_in_more() -> None:
    for precision in ("float64", "compensated"):
        values = (1 + path(300, 2) / 64).bfloat16()
        found = averaged(values, "ema", decay=0.999, precision=precision)
        weights = 0.999 ** torch.arange(299, -1, -1).double()
        exact = weights @ values.double() / weights.sum()
        assert found.value().dtype == torch.bfloat16
        assert torch.allclose(found.value(torch.float64), exact, rtol=1e-6)


def test_samples_are_points_and_chains_commute_with_time() -> None:
    values = path(5, 7, 4)  # steps, chains, d
    one = averaged(values, second_moment=True, sample_dims=1)
    pooled = averaged([values.reshape(35, 4)], second_moment=True, sample_dims=1)
    assert one.samples == pooled.samples == 35
    assert torch.allclose(one.value(), pooled.value(), atol=1e-15)
    assert torch.allclose(one.moment(), pooled.moment(), atol=1e-15)
    assert torch.allclose(one.value(), values.mean((0, 1)), atol=1e-15)
    for kind in ("ema", "latest", "suffix"):
        assert averaged(values, kind, sample_dims=1).value().shape == (4,)


def test_problems_of_a_batch_are_separate() -> None:
    values = path(6, 2, 3, 5, 4)  # steps, problems (2, 3), chains, d
    found = averaged(values, second_moment=True, batch_dims=2, sample_dims=1)
    assert found.value().shape == (2, 3, 4) and found.moment().shape == (2, 3, 4, 4)
    alone = averaged(values[:, 1, 2], second_moment=True, sample_dims=1)
    assert torch.allclose(found.moment()[1, 2], alone.moment(), atol=1e-15)
    assert found.top(1)[1].shape == (2, 3, 4, 1)
    for sketch in ("oja", "frequent_directions"):
        low = averaged(values, second_moment=True, batch_dims=2, sample_dims=1, rank=2, sketch=sketch)
        single = averaged(values[:, 1, 2], second_moment=True, sample_dims=1, rank=4, sketch=sketch)
        assert low.top(2)[1].shape == (2, 3, 4, 2) and single.top(4)[0].shape == (4,)


@pytest.mark.parametrize("make", [dict, tuple, list])
def test_containers_of_tensors(make: Any) -> None:
    tensors = path(6, 2, 3), path(6, 4, seed=1)
    names = "ab"

    def value(t: int) -> Any:
        parts = [each[t] for each in tensors]
        return dict(zip(names, parts, strict=True)) if make is dict else make(parts)

    found = averaged([value(t) for t in range(6)], second_moment=True)
    mean = found.value()
    assert type(mean) is make
    parts = list(mean.values()) if make is dict else list(mean)
    assert all(torch.allclose(part, each.mean(0), atol=1e-14) for part, each in zip(parts, tensors, strict=True))
    flat = torch.cat([each.reshape(6, -1) for each in tensors], dim=1)
    assert torch.allclose(found.moment(), flat.mT @ flat / 6, atol=1e-14)
    back = found.unflatten(flat[0])
    parts = list(back.values()) if make is dict else list(back)
    assert all(torch.equal(part, each[0]) for part, each in zip(parts, tensors, strict=True))


def test_a_mapping_may_change_its_order_and_its_tensors_afterwards() -> None:
    average = IterateAverage("latest", latest=2)
    x, y = torch.ones(2), torch.zeros(3)
    average.update({"x": x, "y": y})
    x.zero_()
    average.update({"y": y, "x": 3 * torch.ones(2)})
    assert torch.equal(average.value()["x"], torch.full((2,), 2.0))
    assert torch.ones(2).expand(2) is not None
    average.update({"x": torch.ones(4)[::2], "y": torch.ones(1).expand(3)})
    assert torch.equal(average.value()["x"], torch.full((2,), 2.0))


@pytest.mark.parametrize(("keep", "scale"), [("mean", 1e-150), ("mean", 1e150), ("ema", 1.0)])
def test_sketches_find_the_top_direction(keep: Any, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    spike = torch.nn.functional.normalize(torch.randn(30, generator=generator, dtype=torch.float64), dim=0)
    values = path(1200, 30) / 3 + spike * path(1200, 1, seed=1) * 2
    options: dict[str, Any] = {"decay": 0.998} if keep == "ema" else {}
    exact = averaged(values, keep, second_moment=True, **options)
    for sketch in ("oja", "frequent_directions"):
        low = averaged(scale**0.5 * values, keep, second_moment=True, rank=4, sketch=sketch, **options)
        value, vector = low.top(1)
        top, true = exact.top(1)
        assert float((vector * true).sum().abs()) > 0.995
        assert float(value / scale) == pytest.approx(float(top), rel=0.02 if sketch == "oja" else 0.2)


def test_frequent_directions_hold_their_bound() -> None:
    values = path(200, 12) * torch.linspace(3, 0.1, 12).double()
    found = averaged(values, second_moment=True, rank=5, sketch="frequent_directions")
    sketch: Any = found._sketch
    exact = values.mT @ values
    gap = torch.linalg.eigvalsh(exact - sketch.rows.mT @ sketch.rows)
    assert float(gap[0]) > -1e-9 and float(gap[-1]) <= float(sketch.shrinkage) + 1e-9
    tail = torch.linalg.eigvalsh(exact).flip(0)
    assert float(sketch.shrinkage) <= min(float(tail[k:].sum()) / (6 - k) for k in range(6)) + 1e-9


def test_a_sketch_of_few_iterates_is_exact() -> None:
    values = path(3, 8)
    for sketch in ("oja", "frequent_directions"):
        found = averaged(values, second_moment=True, rank=8, sketch=sketch)
        if sketch == "frequent_directions":
            assert torch.allclose(found.moment(), values.mT @ values / 3, atol=1e-12)
        assert found.top(8)[1].shape == (8, 8)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {"kind": "mean", "second_moment": True},
    "compensated": {"kind": "mean", "precision": "compensated"},
    "ema": {"kind": "ema", "decay": 0.9},
    "suffix": {"kind": "suffix", "fraction": 0.3},
    "latest": {"kind": "latest", "latest": 3, "second_moment": True},
    "oja": {"kind": "mean", "second_moment": True, "rank": 2},
    "frequent": {"kind": "ema", "second_moment": True, "rank": 2, "sketch": "frequent_directions"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_saved_average_goes_on_with_the_same_bits(name: str) -> None:
    values = [{"w": x[:3].float(), "v": x[3:]} for x in path(90, 5)]
    whole = averaged(values, **OPTIONS[name])
    first = averaged(values[:41], **OPTIONS[name])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = IterateAverage(**OPTIONS[name])
    second.load_state_dict(torch.load(buffer, weights_only=True))
    snapshot = second.state_dict()
    for value in values[41:]:
        second.update(value)
    assert all(torch.equal(a, b) for a, b in zip(second.value().values(), whole.value().values(), strict=True))
    if whole.second_moment:
        assert torch.equal(second.moment(), whole.moment())
    assert snapshot["seen"] == 41 and second.seen == 90
    second.load_state_dict(snapshot)
    assert torch.equal(second.value()["w"], first.value()["w"])


def test_wrong_states_are_refused_and_change_nothing() -> None:
    average = averaged(path(5, 3))
    before = average.value()
    good = average.state_dict()
    other = averaged(path(5, 4)).state_dict()
    for state in ({}, {**good, "kind": "ema"}, other, averaged(path(5, 3), "ema").state_dict()):
        with pytest.raises(ValueError, match="state"):
            average.load_state_dict(state)
    with pytest.raises(ValueError, match="sums"):
        average.load_state_dict(averaged(path(5, 3), second_moment=True).state_dict())
    assert torch.equal(average.value(), before)


def test_iterates_that_are_not_finite() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    strict = averaged([good])
    with pytest.raises(FloatingPointError, match="not changed"):
        strict.update(bad)
    assert strict.seen == 1
    skipping = averaged([good, bad, 3 * good, torch.tensor([math.inf, 0])], nonfinite="skip")
    assert skipping.skipped == 2 and skipping.count == 2 and torch.equal(skipping.value(), 2 * good)
    assert averaged([good, bad], nonfinite="ignore").value().isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "median"}, "kind"),
        ({"decay": 0.9}, "decay is for kind='ema'"),
        ({"latest": 3}, "latest is for"),
        ({"fraction": 0.5}, "fraction is for"),
        ({"kind": "ema", "decay": 1.0}, "decay"),
        ({"kind": "ema", "decay": -0.1}, "decay"),
        ({"kind": "suffix", "fraction": 0}, "fraction"),
        ({"kind": "latest", "latest": 0}, "latest"),
        ({"every": 0}, "every"),
        ({"burn_in": -1}, "burn_in"),
        ({"rank": 2}, "second_moment"),
        ({"kind": "latest", "rank": 2, "second_moment": True}, "rank"),
        ({"rank": 0, "second_moment": True}, "rank"),
        ({"sketch": "pca"}, "sketch"),
        ({"precision": "float16"}, "precision"),
        ({"nonfinite": "hide"}, "nonfinite"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IterateAverage(**options)


def test_wrong_values() -> None:
    average = averaged([torch.ones(2)])
    with pytest.raises(ValueError, match="shapes"):
        average.update(torch.ones(3))
    with pytest.raises(ValueError, match="made like the first"):
        average.update({"w": torch.ones(2)})
    with pytest.raises(TypeError, match="floating"):
        IterateAverage().update(torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="tensor"):
        IterateAverage().update([1.0, 2.0])
    with pytest.raises(TypeError, match="text"):
        IterateAverage().update({1: torch.ones(2)})
    with pytest.raises(ValueError, match="no tensor"):
        IterateAverage().update([])
    with pytest.raises(ValueError, match="sample dimensions"):
        IterateAverage(sample_dims=2).update(torch.ones(2))
    with pytest.raises(ValueError, match="no sample"):
        IterateAverage(sample_dims=1).update(torch.ones(0, 2))
    with pytest.raises(ValueError, match="rank"):
        IterateAverage(second_moment=True, rank=3).update(torch.ones(2))
    with pytest.raises(TypeError, match="real"):
        IterateAverage(second_moment=True).update(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="no iterate"):
        averaged([torch.ones(2)], burn_in=3).value()
    with pytest.raises(RuntimeError, match="second moment is not kept"):
        average.moment()
    with pytest.raises(ValueError, match="k must be"):
        averaged([torch.ones(2)], second_moment=True).top(3)


def test_complex_iterates_have_a_mean() -> None:
    values = torch.view_as_complex(path(5, 3, 2))
    assert torch.allclose(averaged(values).value(), values.mean(0), atol=1e-15)
    assert averaged(values.to(torch.complex64)).value().dtype == torch.complex64


def test_scalars_and_empty_tensors() -> None:
    assert float(averaged(path(4), second_moment=True).moment()) == pytest.approx(float(path(4).square().mean()))
    assert averaged([torch.ones(0)]).value().shape == (0,)
