"""Hessians and Jacobians against explicit ones, in every situation a model can be in."""

import pytest
import torch
import torch.nn.functional as F
from curvature_models import (
    classifier,
    explicit_hessian,
    flat_function,
    generator,
    language_model,
    snapshot,
    token_loss,
    unchanged,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steepest.curvature import Hessian, Jacobian

TIGHT = {"rtol": 1e-10, "atol": 1e-13}


def test_hessian_is_the_explicit_one() -> None:
    model, batch = classifier()
    H = Hessian(model, F.cross_entropy, batch)
    torch.testing.assert_close(H.dense(), explicit_hessian(model, F.cross_entropy, batch), **TIGHT)
    assert H.shape == (51, 51) and H.symmetric and H.dtype == torch.float64


def test_loss_and_gradient_come_along() -> None:
    model, (x, y) = classifier()
    H = Hessian(model, F.cross_entropy, (x, y))
    loss = F.cross_entropy(model(x), y)
    torch.testing.assert_close(H.loss(), loss.detach(), **TIGHT)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(H.gradient(), H.flatten(expected), **TIGHT)
    for part, gradient in zip(H.unflatten(H.gradient()), expected, strict=True):
        torch.testing.assert_close(part, gradient, **TIGHT)


@given(st.integers(1, 10), st.sampled_from([None, 1, 2, 5]))
@settings(max_examples=8, deadline=None)
def test_unequal_batches_are_the_whole(cut: int, chunk: int | None) -> None:
    model, (x, y) = classifier()
    whole = Hessian(model, F.cross_entropy, (x, y))
    parts = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    V = torch.randn(51, 4, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(Hessian(model, F.cross_entropy, parts, chunk=chunk) @ V, whole @ V, **TIGHT)
    torch.testing.assert_close(Hessian(model, F.cross_entropy, iter(parts)).gradient(), whole.gradient(), **TIGHT)


def test_many_batches_from_a_loader_are_read_again() -> None:
    model, (x, y) = classifier(30)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2, shuffle=True)
    V = torch.randn(51, 3, dtype=torch.float64, generator=generator())
    H = Hessian(model, F.cross_entropy, loader)
    torch.testing.assert_close(H @ V, Hessian(model, F.cross_entropy, (x, y)) @ V, **TIGHT)
    torch.testing.assert_close(H @ V, H @ V, **TIGHT)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"kv_heads": 1}])
def test_attention_and_embeddings(options: dict) -> None:
    model, batch = language_model(**options)
    H = Hessian(model, token_loss, batch)
    V = torch.randn(H.shape[1], 3, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(H @ V, explicit_hessian(model, token_loss, batch) @ V, **TIGHT)
    torch.testing.assert_close(torch.stack([H @ v for v in V.T], 1), H @ V, **TIGHT)


def test_frozen_and_chosen_parameters() -> None:
    model, batch = classifier()
    names = ["layers.1.weight", "layers.1.bias"]
    expected = explicit_hessian(model, F.cross_entropy, batch, names)
    chosen = dict(model.named_parameters())
    torch.testing.assert_close(Hessian(model, F.cross_entropy, batch, params=names).dense(), expected, **TIGHT)
    by_tensor = Hessian(model, F.cross_entropy, batch, params=[chosen[name] for name in names])
    torch.testing.assert_close(by_tensor.dense(), expected, **TIGHT)
    model.layers[0].requires_grad_(False)
    torch.testing.assert_close(Hessian(model, F.cross_entropy, batch).dense(), expected, **TIGHT)


def test_shared_parameters_count_once() -> None:
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator())
    H = Hessian(model, F.mse_loss, (x, x))
    assert H.shape == (12, 12)
    torch.testing.assert_close(H.dense(), explicit_hessian(model, F.mse_loss, (x, x)), **TIGHT)


def test_one_parameter_and_none() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.a**3 * x

    H = Hessian(Scale(), lambda output, _: output.sum(), (torch.ones(1), None))
    assert H.shape == (1, 1) and (H @ torch.ones(1)).item() == 18.0
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        Hessian(nn.ReLU(), F.mse_loss, (torch.ones(1), torch.ones(1)))


def test_unused_and_linear_parameters_have_no_curvature() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["used"](x)

    x = torch.randn(4, 2, generator=generator())
    assert not Hessian(Both(), lambda output, _: output.mean(), (x, x)).dense().any()
    dense = Hessian(Both(), F.mse_loss, (x, x[:, :1])).dense()
    assert dense[:3, :3].any() and not dense[3:].any()


@pytest.mark.parametrize("train", [False, True])
def test_nothing_of_the_model_changes(train: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    model.train()
    x = torch.randn(7, 3, dtype=torch.float64, generator=generator())
    y = torch.arange(7) % 2
    before, state = snapshot(model), torch.get_rng_state()
    model[1].eval()
    H = Hessian(model, F.cross_entropy, (x, y), train=train)
    V = torch.randn(H.shape[0], 2, dtype=torch.float64, generator=generator())
    first = H @ V
    torch.testing.assert_close(H @ V, first, rtol=0, atol=0)
    again = Hessian(model, F.cross_entropy, [(x, y)] * 9, train=train, chunk=1)  # too many batches to keep
    torch.testing.assert_close(again @ V, first, **TIGHT)
    assert unchanged(model, before) and torch.equal(torch.get_rng_state(), state)
    assert model.training and not model[1].training and all(p.grad is None for p in model.parameters())


def test_batch_statistics_are_differentiated_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)).double()
    x = torch.randn(7, 3, dtype=torch.float64, generator=generator())
    y = torch.arange(7) % 2
    expected = explicit_hessian(model, F.cross_entropy, (x, y))
    torch.testing.assert_close(Hessian(model, F.cross_entropy, (x, y), train=True).dense(), expected, **TIGHT)


def test_the_point_stays_when_training_goes_on() -> None:
    model, batch = classifier()
    H = Hessian(model, F.cross_entropy, batch)
    v = torch.ones(51, dtype=torch.float64)
    expected = explicit_hessian(model, F.cross_entropy, batch) @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(H @ v, expected, **TIGHT)


def test_functions_of_tensors() -> None:
    g = generator()
    x = {"a": torch.randn(2, 3, generator=g).double(), "b": torch.randn(3, generator=g).double()}
    H = Hessian.of(lambda t: (t["a"] @ t["b"]).square().sum() + t["b"].exp().sum(), x)
    flat = H.flatten(list(x.values()))

    def plain(v: Tensor) -> Tensor:
        return (v[:6].view(2, 3) @ v[6:]).square().sum() + v[6:].exp().sum()

    torch.testing.assert_close(H.dense(), torch.autograd.functional.hessian(plain, flat), **TIGHT)
    assert Hessian.of(lambda t: t[0] * t[1].sum(), [torch.tensor(2.0), torch.ones(2)]).dense()[0].tolist() == [0, 1, 1]
    J = Jacobian.of(lambda t: t.square(), torch.tensor([1.0, 2.0]))
    assert J.dense().tolist() == [[2.0, 0.0], [0.0, 4.0]] and J.value.tolist() == [1.0, 4.0]


def test_of_loss_takes_the_form_of_a_task() -> None:
    model, (x, y) = classifier()
    H = Hessian.of_loss(model, lambda m, batch: F.cross_entropy(m(batch["x"]), batch["y"]), [{"x": x, "y": y}])
    torch.testing.assert_close(H.dense(), explicit_hessian(model, F.cross_entropy, (x, y)), **TIGHT)


@pytest.mark.parametrize("forward", [True, False])
def test_jacobian_and_its_transpose(forward: bool) -> None:
    model, (tokens, _) = language_model()
    J = Jacobian(model, tokens)
    J._forward = forward
    of, at = flat_function(model, lambda output: output.flatten(), tokens)
    explicit = torch.func.jacrev(of)(at)
    V = torch.randn(J.shape[1], 3, dtype=torch.float64, generator=generator())
    U = torch.randn(J.shape[0], 2, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(J @ V, explicit @ V, **TIGHT)
    torch.testing.assert_close(J @ V[:, 0], explicit @ V[:, 0], **TIGHT)
    torch.testing.assert_close(J.T @ U, explicit.T @ U, **TIGHT)
    assert J._forward == forward and J.T.T is J


def test_narrow_parameters_are_computed_wide() -> None:
    model, (x, y) = classifier()
    H = Hessian(model.bfloat16(), F.cross_entropy, (x.bfloat16(), y))
    assert H.dtype == torch.float32 and (H @ torch.ones(51)).dtype == torch.float32
    wide = Hessian(model, F.cross_entropy, (x.bfloat16(), y), dtype=torch.float64)
    torch.testing.assert_close(wide.dense().float(), H.dense(), rtol=1e-4, atol=1e-6)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_strided_parameters() -> None:
    model = nn.Linear(3, 2).double()
    expected = torch.eye(2, dtype=torch.float64)
    model.weight = nn.Parameter(model.weight.detach().T.contiguous().T)
    x = torch.eye(3, dtype=torch.float64)
    H = Hessian(model, lambda output, _: output.square().sum() / 2, (x, None), params=["weight"])
    torch.testing.assert_close(H.dense(), torch.kron(expected, torch.eye(3, dtype=torch.float64)), **TIGHT)


def test_a_custom_function_without_a_batched_backward() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x**2 * grad if bool((x > 0).all()) else grad * 0

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    H = Hessian.of(lambda t: Cube.apply(t).sum(), x)
    assert torch.equal(H.dense(), torch.diag(6 * x))
    J = Jacobian.of(Cube.apply, x)
    assert torch.equal(J.dense(), torch.diag(3 * x**2))


def test_a_part_that_is_differentiable_once_is_an_error_and_no_wrong_number() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * 2

    model, (x, y) = classifier()
    H = Hessian(model, lambda o, t: F.cross_entropy(Once.apply(o), t), (x, y))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        H @ torch.ones(51)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, x, y: Hessian(m, F.cross_entropy, []), ValueError, "data is empty"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, 3), TypeError, "data must be"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, (x[:0], y[:0])), ValueError, "empty"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, (x, y), params=["nope"]), ValueError, "no parameter 'nope'"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, (x, y), params=[x]), ValueError, "no parameter of the model"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, (x, y), chunk=0), ValueError, "chunk"),
        (lambda m, x, y: Hessian(lambda x: x, F.cross_entropy, (x, y)), TypeError, "torch.nn.Module"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, x) @ torch.ones(51), ValueError, "must be"),
        (lambda m, x, y: Hessian(m, lambda o, t: o, (x, y)) @ torch.ones(51), ValueError, "scalar"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, (x, y)) @ torch.ones(50), ValueError, "multiplies"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, (x, y)) @ torch.ones(51).cfloat(), TypeError, "real"),
        (lambda m, x, y: Hessian(m, F.cross_entropy, (x * torch.nan, y)) @ torch.ones(51), FloatingPointError, "nan"),
        (lambda m, x, y: Hessian(m.to(torch.complex64), F.cross_entropy, (x, y)), TypeError, "complex64"),
        (lambda m, x, y: Hessian.of(torch.sum, torch.ones(2).cfloat()), TypeError, "complex64"),
        (lambda m, x, y: Hessian.of(torch.sum, torch.ones(2).long()), TypeError, "floating"),
        (lambda m, x, y: Hessian.of(torch.sum, torch.ones(0)), ValueError, "nothing to differentiate"),
        (lambda m, x, y: Hessian.of(torch.sum, 3.0), TypeError, "x must be"),
        (lambda m, x, y: Hessian.of(torch.sum, [1.0]), TypeError, "tensors"),
        (lambda m, x, y: Jacobian.of(lambda t: t.cfloat(), torch.ones(2)), TypeError, "real"),
        (lambda m, x, y: Jacobian(m, x).T @ torch.ones(4), ValueError, "multiplies"),
    ],
)
def test_bad_input(make, error: type[Exception], message: str) -> None:
    model, (x, y) = classifier()
    with pytest.raises(error, match=message):
        make(model, x, y)
