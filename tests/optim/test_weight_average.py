"""Averages of a model's weights, beside torch's AveragedModel."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.optim.swa_utils import update_bn as torch_update_bn

import steepest
from steepest.optim import WeightAverage

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(-1, keepdim=True)


def net(*, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(6))
    if dropout:
        layers.insert(1, nn.Dropout(dropout))
    return nn.Sequential(*layers)


def train(model: nn.Module, steps: int, *averages: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(model(X), Y).backward()
        optimizer.step()
        for each in averages:
            each.update() if isinstance(each, WeightAverage) else each.update_parameters(model)


def close(one: Any, other: Any, tol: float = 1e-6) -> None:
    for (name, a), b in zip(one.items(), other.values() if isinstance(other, dict) else other, strict=True):
        assert torch.allclose(a, b, atol=tol), name


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_the_same_as_torch(kind: Any) -> None:
    model = net()
    if kind == "mean":
        ours, theirs = WeightAverage(model), AveragedModel(model)
    else:
        ours = WeightAverage(model, "ema", decay=0.9, bias_correction=False)
        theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, 12, ours, theirs)
    close(ours.average.value(), list(theirs.module.parameters()))
    with ours.applied():
        assert torch.allclose(model(X), theirs(X), atol=1e-6)


def test_latest_and_tail() -> None:
    model = net()
    lawa = WeightAverage(model, "latest", latest=3, every=2)
    tail = WeightAverage(model, burn_in=4)
    kept: list[Tensor] = []
    for _ in range(10):
        train(model, 1, lawa, tail)
        kept.append(model[0].weight.detach().clone())
    assert torch.allclose(lawa.average.value()["0.weight"], torch.stack(kept)[[5, 7, 9]].mean(0), atol=1e-7)
    assert torch.allclose(tail.average.value()["0.weight"], torch.stack(kept)[4:].mean(0), atol=1e-7)


def test_a_swap_costs_nothing() -> None:
    model = net()
    average = WeightAverage(model, "ema", decay=0.5)
    train(model, 5, average)
    before, ids = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), average.applied() as inside:
        assert inside is model
        assert not torch.equal(model[0].weight, before["0.weight"])
        with torch.no_grad():
            model[0].weight.zero_()
        _ = 1 / 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert ids == [p.data_ptr() for p in model.parameters()]
    assert all(p.requires_grad for p in model.parameters())


def test_training_goes_on_as_if_nothing_was_averaged() -> None:
    alone, watched = net(), net()
    train(alone, 8)
    average = WeightAverage(watched)
    for _ in range(8):
        train(watched, 1, average)
        with average.applied():
            watched(X)
    close(alone.state_dict(), watched.state_dict(), tol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


def test_tied_and_frozen_parameters_and_buffers() -> None:
    model: Any = Tied()
    average, whole = WeightAverage(model), WeightAverage(model, buffers="average")
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            model.embed.weight.fill_(value)
            model.scale.fill_(value)
            model.calls += 1
        average.update()
        whole.update()
    assert list(average.average.value()) == ["embed.weight"]
    with average.applied():
        assert model.head.weight is model.embed.weight
        assert float(model.head.weight[0, 0].detach()) == 3 and float(model.scale) == 6
    with whole.applied():
        assert float(model.scale) == 3 and int(model.calls) == 3
    frozen = net()
    frozen[0].requires_grad_(False)
    kept = frozen[0].weight.clone()
    average = WeightAverage(frozen)
    train(frozen, 5, average)
    assert torch.equal(average.average.value()["0.weight"], kept)


def test_chosen_parameters() -> None:
    model = net()
    average = WeightAverage(model, parameters=["2.*"])
    train(model, 4, average)
    assert set(average.average.value()) == {"2.weight", "2.bias"}
    first = model[0].weight.detach().clone()
    with average.applied():
        assert torch.equal(model[0].weight, first)
    with pytest.raises(ValueError, match="matches '9"):
        WeightAverage(model, parameters=["2.*", "9.*"])
    with pytest.raises(ValueError, match="match"):
        WeightAverage(model, parameters="nothing")
    with pytest.raises(TypeError, match="names"):
        WeightAverage(model, parameters=[model[0].weight])  # type: ignore[list-item]


def test_statistics_of_batch_norm() -> None:
    model = net(norm=True)
    ours, theirs = WeightAverage(model), AveragedModel(model)
    train(model, 6, ours, theirs)
    batches = [(X[:32], Y[:32]), (X[32:], Y[32:])]
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="update_bn"), ours.applied():
        pass
    ours.update_bn(batches)
    torch_update_bn(batches, theirs)
    close(before, model.state_dict(), tol=0)
    model.eval()
    theirs.eval()
    with ours.applied():
        assert torch.allclose(model(X), theirs(X), atol=1e-5)
    assert torch.allclose(ours.averaged_model()(X), theirs(X), atol=1e-5)
    close(before, model.state_dict(), tol=0)
    model.train()
    train(model, 1, ours)
    with pytest.warns(UserWarning, match="update_bn"), ours.applied():
        pass


def test_statistics_are_collected_without_dropout_and_modes_come_back() -> None:
    model = net(norm=True, dropout=0.5)
    average = WeightAverage(model)
    train(model, 3, average)
    model[1].eval()
    modes = [each.training for each in model.modules()]
    state = torch.get_rng_state()
    average.update_bn([X])
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [each.training for each in model.modules()]
    assert [each.momentum for each in model.modules() if isinstance(each, nn.BatchNorm1d)] == [0.1]
    plain = average.averaged_model()
    linear: Any = plain[0]  # type: ignore[index]
    norm = next(each for each in plain.modules() if isinstance(each, nn.BatchNorm1d))
    assert norm.running_mean is not None
    assert torch.allclose(norm.running_mean, linear(X).mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="one batch"):
        average.update_bn([])
    WeightAverage(net()).update_bn([])  # nothing to collect


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, *, inputs: Tensor) -> Tensor:
        return self.norm(inputs)


def test_batches_may_be_mappings() -> None:
    model = Keywords()
    average = WeightAverage(model)
    average.update()
    average.update_bn([{"inputs": X}])
    norm: Any = average.averaged_model().norm
    assert torch.allclose(norm.running_mean, X.mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "ema", "suffix", "latest"])
def test_a_saved_average_goes_on_with_the_same_bits(kind: Any) -> None:
    model = net(norm=True)
    whole = WeightAverage(model, kind)
    train(model, 5, whole)
    whole.update_bn([X])
    buffer = io.BytesIO()
    torch.save(whole.state_dict(), buffer)
    buffer.seek(0)
    fresh = WeightAverage(model, kind)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    a, b = whole.averaged_model(), fresh.averaged_model()
    close(a.state_dict(), b.state_dict(), tol=0)
    train(model, 5, whole, fresh)
    close(whole.average.value(), fresh.average.value(), tol=0)


def test_as_a_callback_with_checkpoints(tmp_path: Any) -> None:
    def start() -> tuple[Any, Any, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(model(X), Y)
            loss.backward()
            return loss

        return optimizer, closure, WeightAverage(model, "ema", decay=0.9)

    def go(steps: int, path: Any) -> Any:
        optimizer, closure, average = start()
        steepest.run(
            optimizer,
            steps,
            closure=closure,
            callbacks=average,
            state={"model": average.model, "average": average},
            checkpoint=path,
            progress=False,
        )
        return average

    whole = go(10, tmp_path / "whole.ckpt")
    go(4, tmp_path / "parts.ckpt")
    resumed = go(10, tmp_path / "parts.ckpt")
    assert resumed.count == 10
    close(whole.average.value(), resumed.average.value(), tol=0)


def test_copies() -> None:
    model = net()
    average = WeightAverage(model)
    train(model, 4, average)
    other = net()
    average.copy_to(other)
    close(average.average.value(), list(other.parameters()), tol=0)
    with pytest.raises(ValueError, match="model must have"):
        average.copy_to(nn.Linear(4, 6))
    average.copy_to(model)
    close(average.average.value(), list(model.parameters()), tol=0)


def test_low_precision_weights_do_not_stall() -> None:
    model = nn.Linear(3, 1, bias=False).bfloat16()
    average = WeightAverage(model, "ema", decay=0.999)
    for value in [1.0] * 50 + [1.1] * 300:
        nn.init.constant_(model.weight, value)
        average.update()
    assert average.average.value()["weight"].dtype == torch.bfloat16
    w = 0.999 ** torch.arange(349, -1, -1).double()
    values = torch.tensor([1.0] * 50 + [1.1] * 300).bfloat16().double()
    found = average.average.value(torch.float64)["weight"]
    assert float(found[0, 0]) == pytest.approx(float(w @ values / w.sum()), rel=1e-9)


def test_errors() -> None:
    model = net()
    average = WeightAverage(model)
    with pytest.raises(RuntimeError, match="no iterate"), average.applied():
        pass
    average.update()
    with average.applied():
        for action in (average.update, average.averaged_model, lambda: average.copy_to(model)):
            with pytest.raises(RuntimeError, match="inside applied"):
                action()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not changed"):
        average.update()
    with pytest.raises(ValueError, match="other parameters"):
        average.load_state_dict(_trained(nn.Linear(4, 1)).state_dict())
    with pytest.raises(ValueError, match="entries"):
        average.load_state_dict({})
    with pytest.raises(TypeError, match="model"):
        WeightAverage(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameters"):
        WeightAverage(nn.Tanh())
    with pytest.raises(ValueError, match="buffers"):
        WeightAverage(model, buffers="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="call it once"):
        WeightAverage(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(model, decay=0.9)


def _trained(model: nn.Module) -> WeightAverage:
    average = WeightAverage(model)
    average.update()
    return average
