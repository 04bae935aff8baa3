"""The engine's algebra: every option against a plain float64 loop, every layout against plain matrices."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from steepest.geometry import L1, NORMS, Euclidean, Max, Nuclear, Scaled, Spectral
from steepest.geometry.matrix_norms import MaxColumn, MaxRow, Schatten, SumColumn, SumRow
from steepest.optim import Joint, Layout, Sharp, SteepestDescent, StepRule, Unit, buckets, engine


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def svd_map(g: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    return u @ torch.diag(function(s)) @ vh


def longest(g: Tensor, dim: int) -> Tensor:
    lengths = g.norm(dim=dim, keepdim=True)
    return torch.where(lengths == lengths.max(), g / lengths, 0.0)


# name: (norm, direction, dual norm), written out for one matrix of full rank
REFERENCE: dict[str, tuple[Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "euclidean": (Euclidean(), lambda g: g / g.norm(), lambda g: g.norm()),
    "max": (Max(), lambda g: g.sign(), lambda g: g.abs().sum()),
    "l1": (L1(), lambda g: torch.where(g.abs() == g.abs().max(), g.sign(), 0.0), lambda g: g.abs().max()),
    "spectral": (Spectral(), lambda g: svd_map(g, torch.ones_like), lambda g: torch.linalg.svdvals(g).sum()),
    "nuclear": (
        Nuclear(),
        lambda g: svd_map(g, lambda s: (s == s.max()).to(s.dtype)),
        lambda g: torch.linalg.svdvals(g).max(),
    ),
    "schatten3": (
        Schatten(3.0),
        lambda g: svd_map(g, lambda s: s.sqrt() / s.pow(1.5).sum().pow(1 / 3)),
        lambda g: torch.linalg.svdvals(g).pow(1.5).sum().pow(2 / 3),
    ),
    "max_row": (MaxRow(), lambda g: g / g.norm(dim=1, keepdim=True), lambda g: g.norm(dim=1).sum()),
    "sum_row": (SumRow(), lambda g: longest(g, 1), lambda g: g.norm(dim=1).max()),
    "max_column": (MaxColumn(), lambda g: g / g.norm(dim=0, keepdim=True), lambda g: g.norm(dim=0).sum()),
    "sum_column": (SumColumn(), lambda g: longest(g, 0), lambda g: g.norm(dim=0).max()),
}


def factor_of(name: str, rows: int, columns: int) -> float:
    return {
        "none": 1.0,
        "original": max(1.0, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
    }[name]


class Reference:
    """One matrix in float64, one line per formula of the docstring."""

    def __init__(self, x: Tensor, norm: str, **options: Any) -> None:
        self.x, self.b, self.norm, self.options = x.clone(), torch.zeros_like(x), norm, options

    def momentum(self, g: Tensor) -> Tensor:
        mu, form = self.options["momentum"], self.options["momentum_form"]
        if mu == 0:
            return g
        if form == "lion":
            beta = self.options["interpolation"]
            ahead = beta * self.b + (1 - beta) * g
            self.b = mu * self.b + (1 - mu) * g
            return ahead
        weight = 1 - mu if form == "ema" else 1.0
        self.b = mu * self.b + weight * g
        return mu * self.b + weight * g if self.options["nesterov"] else self.b

    def step(self, g: Tensor) -> None:
        lr = self.options["lr"]
        direction = REFERENCE[self.norm][1](self.momentum(g))
        decay = lr if self.options["constrained"] else lr * self.options["weight_decay"]
        sign = 1.0 if self.options["maximize"] else -1.0
        factor = factor_of(self.options["adjust_lr_fn"], *self.x.shape)
        self.x = (1 - decay) * self.x + sign * lr * factor * direction


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    norm=st.sampled_from(sorted(REFERENCE)),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    form=st.sampled_from(["ema", "heavy_ball", "lion"]),
    nesterov=st.booleans(),
    interpolation=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([(0.0, False), (0.3, False), (0.0, True)]),
    adjust=st.sampled_from(["none", "original", "match_rms_adamw", "spectral"]),
    maximize=st.booleans(),
    foreach=st.sampled_from([None, False]),
    shape=st.sampled_from([(3, 5), (6, 2), (4, 4), (1, 4), (5, 1)]),
    tensor_lr=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_option_is_its_formula(
    norm: str,
    momentum: float,
    form: Any,
    nesterov: bool,
    interpolation: float,
    decay: tuple[float, bool],
    adjust: Any,
    maximize: bool,
    foreach: bool | None,
    shape: tuple[int, int],
    tensor_lr: bool,
    seed: int,
) -> None:
    options: dict[str, Any] = {
        "momentum": momentum,
        "momentum_form": form,
        "nesterov": nesterov,
        "interpolation": interpolation,
        "weight_decay": decay[0],
        "constrained": decay[1],
        "adjust_lr_fn": adjust,
        "maximize": maximize,
    }
    starts = [randn(*shape, seed=seed), randn(*shape, seed=seed + 1), randn(7, 2, seed=seed + 2)]
    references = [Reference(x, norm, lr=0.05, **options) for x in starts]
    parameters = [Parameter(x.clone()) for x in starts]
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    optimizer = SteepestDescent(parameters, lr, norm=REFERENCE[norm][0], foreach=foreach, **options)
    for step in range(4):
        for index, (parameter, reference) in enumerate(zip(parameters, references, strict=True)):
            gradient = randn(*parameter.shape, seed=1000 * step + index + seed)
            parameter.grad = gradient.clone()
            reference.step(gradient)
        optimizer.step()
    for parameter, reference in zip(parameters, references, strict=True):
        torch.testing.assert_close(parameter.detach(), reference.x, rtol=0, atol=1e-10)
        if momentum:
            torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], reference.b, rtol=0, atol=1e-12)
        else:
            assert not optimizer.state


@pytest.mark.parametrize("norm", sorted(REFERENCE))
@pytest.mark.parametrize("rule", [Unit(), Sharp(), Joint()])
@pytest.mark.parametrize("foreach", [None, False])
def test_step_rules_set_the_length(norm: str, rule: StepRule, foreach: bool | None) -> None:
    starts = [randn(4, 3), randn(4, 3, seed=1), randn(2, 5, seed=2)]
    gradients = [randn(*x.shape, seed=9 + index) for index, x in enumerate(starts)]
    space, direction, dual = REFERENCE[norm]
    duals = torch.stack([dual(g) for g in gradients])
    lengths = {Unit: torch.ones_like(duals), Sharp: duals, Joint: duals / duals.norm()}[type(rule)]
    parameters = [Parameter(x.clone()) for x in starts]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    SteepestDescent(parameters, 0.1, norm=space, step_rule=rule, foreach=foreach).step()
    for parameter, x, g, length in zip(parameters, starts, gradients, lengths, strict=True):
        torch.testing.assert_close(parameter.detach(), x - 0.1 * length * direction(g), rtol=0, atol=1e-12)


def trained(make: Callable[..., torch.optim.Optimizer], shapes: list[tuple[int, ...]], steps: int = 5) -> list[Tensor]:
    parameters = [Parameter(randn(*shape, seed=index)) for index, shape in enumerate(shapes)]
    optimizer = make(parameters)
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(*parameter.shape, seed=100 * step + index) + parameter.detach()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("nesterov", [False, True])
def test_euclidean_sharp_descent_with_heavy_ball_is_sgd(nesterov: bool) -> None:
    shapes = [(4, 3), (5,), (), (2, 3, 4), (3, 2, 2, 2)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours = trained(
        lambda p: SteepestDescent(p, norm=Euclidean(), momentum_form="heavy_ball", step_rule=Sharp(), **options), shapes
    )
    theirs = trained(lambda p: torch.optim.SGD(p, **options), shapes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [Euclidean(event_ndim=1), Max(event_ndim=1), Scaled(Euclidean(event_ndim=1), 2.0)])
@pytest.mark.parametrize("foreach", [None, False])
def test_norms_of_vectors_take_every_step_rule(norm: Any, foreach: bool | None) -> None:
    for rule in (Sharp(), Joint()):
        gradients = [randn(5, seed=1), randn(5, seed=2)]
        duals = torch.stack([norm.dual(g) for g in gradients])
        lengths = duals if isinstance(rule, Sharp) else duals / duals.norm()
        parameters = [Parameter(torch.zeros(5, dtype=torch.float64)) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        SteepestDescent(parameters, 0.1, norm=norm, step_rule=rule, foreach=foreach).step()
        for parameter, gradient, length in zip(parameters, gradients, lengths, strict=True):
            torch.testing.assert_close(parameter.detach(), 0.1 * length * norm.lmo(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [Sharp(), Joint()])
def test_zero_gradients_have_zero_length(rule: StepRule) -> None:
    parameter = Parameter(randn(3, 3))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(3, 3, dtype=torch.float64)
    SteepestDescent([parameter], 0.1, step_rule=rule).step()
    assert torch.equal(parameter.detach(), before)


def test_half_precision_lengths_do_not_overflow() -> None:
    parameter = Parameter(torch.zeros(400, 400, dtype=torch.float16))
    parameter.grad = torch.ones_like(parameter)
    SteepestDescent([parameter], 1e-6, norm="max", step_rule=Sharp()).step()  # a dual norm of 160000
    assert torch.allclose(parameter.detach().float(), torch.tensor(-0.16), rtol=1e-3)


@pytest.mark.parametrize("norm", sorted(REFERENCE))
@pytest.mark.parametrize("radius", [1.0, 3.0])
def test_the_constrained_form_stays_in_its_ball(norm: str, radius: float) -> None:
    space = Scaled(REFERENCE[norm][0], radius)
    x = randn(4, 6)
    parameter = Parameter(x / space.norm(x))
    optimizer = SteepestDescent([parameter], 0.3, norm=space, momentum=0.5, constrained=True)
    norms = []
    for step in range(30):
        parameter.grad = randn(4, 6, seed=step)
        optimizer.step()
        norms.append(float(space.norm(parameter.detach())))
    assert max(norms) <= 1 + 1e-9
    for _ in range(60):  # a fixed gradient drives it to the minimiser of the linear function over the ball
        parameter.grad = randn(4, 6, seed=0)
        optimizer.step()
    assert torch.allclose(parameter.detach(), space.lmo(randn(4, 6, seed=0)), atol=1e-6)


@pytest.mark.parametrize("name", ["original", "match_rms_adamw", "spectral"])
@pytest.mark.parametrize(
    ("shape", "layout", "matrix"),
    [
        ((8, 2), {}, (8, 2)),
        ((2, 8), {}, (2, 8)),
        ((2, 8), {"transposed": True}, (8, 2)),
        ((6, 2, 3, 3), {}, (6, 18)),
        ((20, 2, 3), {"layout": "conv"}, (20, 6)),
        ((3, 8, 2), {}, (8, 2)),
        ((3, 2, 8), {"transposed": True}, (8, 2)),
        ((12, 2), {"split": (6, 6)}, (6, 2)),
        ((5,), {}, None),
    ],
)
def test_shape_factors_see_outputs_and_inputs(name: Any, shape: Any, layout: Any, matrix: Any) -> None:
    parameter = Parameter(torch.zeros(shape, dtype=torch.float64))
    parameter.grad = torch.ones_like(parameter)
    SteepestDescent([parameter], 0.1, norm="max", adjust_lr_fn=name, **layout).step()
    factor = 1.0 if matrix is None else factor_of(name, *matrix)
    assert torch.allclose(parameter.detach(), torch.tensor(-0.1 * factor, dtype=torch.float64))


def run(parameter: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    """`parameter` as an optimizer leaves it, in a fresh tensor; its strides are kept while it is trained."""
    parameter = Parameter(parameter.detach().clone(memory_format=torch.preserve_format))
    optimizer = SteepestDescent([parameter], 0.05, momentum=0.8, nesterov=True, weight_decay=0.1, **options)
    for gradient in gradients:
        parameter.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return parameter.detach()


def grads(*shape: int) -> list[Tensor]:
    return [randn(*shape, seed=50 + step) for step in range(3)]


NORMS_OF_MATRICES = [Spectral(), MaxRow(), SumColumn(), Euclidean(), L1()]


@pytest.mark.parametrize("norm", NORMS_OF_MATRICES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (5, 3, 2, 1, 2), (5, 3, 4)])
def test_a_kernel_is_its_flattened_matrix(norm: Any, shape: tuple[int, ...]) -> None:
    x, gradients = randn(*shape), grads(*shape)
    flat = run(x.flatten(1), [g.flatten(1) for g in gradients], norm=norm).reshape(shape)
    torch.testing.assert_close(run(x, gradients, norm=norm, layout="conv"), flat, rtol=0, atol=1e-11)
    if len(shape) > 3:
        torch.testing.assert_close(run(x, gradients, norm=norm), flat, rtol=0, atol=1e-11)


MEMORY = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "outputs second": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "outputs last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "kernel reversed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "a slice": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "a column slice": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("layout", ["conv", "batch"])
@pytest.mark.parametrize("memory", sorted(MEMORY))
@pytest.mark.parametrize("norm", [Spectral(), MaxColumn()], ids=str)
def test_memory_order_changes_nothing(layout: Any, memory: str, norm: Any) -> None:
    x, gradients, stored = randn(5, 3, 2, 4), grads(5, 3, 2, 4), MEMORY[memory]
    want = run(x, gradients, norm=norm, layout=layout)
    for same in ([stored(g) for g in gradients], gradients):
        parameter = Parameter(stored(x))
        strides = parameter.stride()
        optimizer = SteepestDescent(
            [parameter], 0.05, norm=norm, layout=layout, momentum=0.8, nesterov=True, weight_decay=0.1
        )
        for gradient in same:
            parameter.grad = gradient
            optimizer.step()
        assert parameter.stride() == strides
        torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=1e-11)


def test_channels_last_is_updated_without_a_copy() -> None:
    layout = Layout().resolve((5, 3, 2, 4))
    for stored in ("channels_last", "outputs last", "kernel reversed"):
        kernel = MEMORY[stored](randn(5, 3, 2, 4))
        order = engine.memory_order(kernel)
        assert layout.is_view(kernel, order)
        assert layout.blocks(kernel, order)[0].data_ptr() == kernel.data_ptr()
    assert not layout.is_view(MEMORY["outputs second"](randn(5, 3, 2, 4)), (1, 2, 3))


@pytest.mark.parametrize("shape", [(5, 3, 2, 4), (2, 1, 3, 1), (1, 4, 1, 2), (3, 4, 2), (2, 2, 3, 4, 2)])
@pytest.mark.parametrize("kind", ["conv", "batch"])
def test_is_view_tells_whether_memory_is_shared(shape: tuple[int, ...], kind: Any) -> None:
    layout = Layout(kind).resolve(shape)
    for a in range(len(shape)):
        for b in range(a, len(shape)):
            tensor = randn(*shape).transpose(a, b).contiguous().transpose(a, b)
            for order in {engine.memory_order(tensor), tuple(range(1, len(shape)))}:
                shared = layout.blocks(tensor, order)[0].untyped_storage().data_ptr() == (
                    tensor.untyped_storage().data_ptr()
                )
                assert layout.is_view(tensor, order) == shared


def test_momentum_survives_a_change_of_memory_format() -> None:
    x, gradients = randn(4, 3, 2, 2), grads(4, 3, 2, 2)
    want = run(x, gradients, norm=Spectral())
    parameter = Parameter(x.clone())
    optimizer = SteepestDescent([parameter], 0.05, norm=Spectral(), momentum=0.8, nesterov=True, weight_decay=0.1)
    parameter.grad = gradients[0]
    optimizer.step()
    parameter.data = parameter.data.to(memory_format=torch.channels_last)
    for gradient in gradients[1:]:
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=1e-12)


def test_momentum_follows_a_change_of_dtype() -> None:
    parameters = [Parameter(randn(4, 3, seed=s, dtype=torch.float32)) for s in range(2)]
    optimizer = SteepestDescent(parameters, 0.05, norm="max_row", momentum=0.8)
    parameters[0].grad = randn(4, 3, dtype=torch.float32)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
        parameter.data = parameter.data.double()
        parameter.grad = randn(4, 3)
    optimizer.step()
    assert all(state["momentum_buffer"].dtype == torch.float64 for state in optimizer.state.values())


@pytest.mark.parametrize("norm", NORMS_OF_MATRICES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_batch_is_its_matrices(norm: Any, transposed: bool) -> None:
    x, gradients = randn(2, 3, 4, 5), grads(2, 3, 4, 5)
    turn = (lambda t: t.mT) if transposed else (lambda t: t)
    want = torch.stack(
        [
            torch.stack([turn(run(turn(x[i, j]), [turn(g[i, j]) for g in gradients], norm=norm)) for j in range(3)])
            for i in range(2)
        ]
    )
    got = run(x, gradients, norm=norm, layout="batch", transposed=transposed)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    got = run(x[0], [g[0] for g in gradients], norm=norm, transposed=transposed)
    torch.testing.assert_close(got, want[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", NORMS_OF_MATRICES, ids=str)
def test_split_blocks_are_matrices_of_their_own(norm: Any) -> None:
    x, gradients, sizes = randn(9, 4), grads(9, 4), (5, 2, 2)
    parts = zip(x.split(sizes), *(g.split(sizes) for g in gradients), strict=True)
    want = torch.cat([run(part, list(rest), norm=norm) for part, *rest in parts])
    torch.testing.assert_close(run(x, gradients, norm=norm, split=sizes), want, rtol=0, atol=1e-11)
    stored = run(x.mT, [g.mT for g in gradients], norm=norm, split=list(sizes), transposed=True)
    torch.testing.assert_close(stored.mT, want, rtol=0, atol=1e-11)
    kernel = run(x.reshape(9, 2, 2, 1), [g.reshape(9, 2, 2, 1) for g in gradients], norm=norm, split=sizes)
    torch.testing.assert_close(kernel.reshape(9, 4), want, rtol=0, atol=1e-11)
    experts = run(x.expand(3, 9, 4).clone(), [g.expand(3, 9, 4) for g in gradients], norm=norm, split=sizes)
    torch.testing.assert_close(experts, want.expand(3, 9, 4), rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", NORMS_OF_MATRICES, ids=str)
def test_gradients_may_have_any_strides(norm: Any) -> None:
    x, gradients = randn(4, 6), grads(4, 6)
    want = run(x, gradients, norm=norm)
    parameter = Parameter(x.clone())
    other = Parameter(randn(4, 6, seed=3))
    optimizer = SteepestDescent([parameter, other], 0.05, norm=norm, momentum=0.8, nesterov=True, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient.mT.contiguous().mT
        other.grad = torch.ones(1, 1, dtype=torch.float64).expand(4, 6)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=1e-11)


def test_vectors_with_strides_and_scalars_are_single_rows() -> None:
    vector, scalar = Parameter(randn(8)[::2]), Parameter(randn())
    before = vector.detach().clone(), scalar.detach().clone()
    vector.grad, scalar.grad = randn(4, seed=1), randn(seed=2)
    SteepestDescent([vector, scalar], 0.1, norm=Euclidean(), momentum=0.5).step()
    assert torch.allclose(vector.detach(), before[0] - 0.1 * vector.grad / vector.grad.norm())
    assert torch.allclose(scalar.detach(), before[1] - 0.1 * scalar.grad.sign())


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"vector_rms"}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum_form", ["ema", "heavy_ball", "lion"])
def test_batched_is_looped(norm: str, dtype: torch.dtype, momentum_form: Any) -> None:
    """The update of many equal shapes at once, in bounded pieces, is that of one at a time."""
    shapes = [(6, 4)] * 3 + [(4, 6)] * 2 + [(3, 6, 4), (2, 6, 4), (6, 4)]
    results = []
    for foreach in (False, True, None):
        parameters = [Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
        optimizer = SteepestDescent(
            parameters, 0.1, norm=norm, momentum=0.9, momentum_form=momentum_form, weight_decay=0.1, foreach=foreach
        )
        for step in range(2):
            for i, parameter in enumerate(parameters):
                parameter.grad = randn(*parameter.shape, seed=20 * step + i, dtype=dtype)
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    tolerance = 64 * torch.finfo(dtype).eps
    for looped, *batched in zip(*results, strict=True):
        for other in batched:
            torch.testing.assert_close(other, looped, rtol=tolerance, atol=tolerance)
        assert bool(looped.isfinite().all())


def test_pieces_of_a_bucket_cover_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_CHEAP_CHUNK", 30)
    parameters = [Parameter(torch.zeros(shape)) for shape in [(3, 4)] * 5 + [(2, 3, 4), (1, 3, 4), (9, 3, 4)]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    SteepestDescent(parameters, 0.1, norm="max").step()
    for parameter in parameters:
        assert torch.equal(parameter.detach(), torch.full_like(parameter, -0.1))


@pytest.mark.parametrize("norm", sorted(REFERENCE))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [False, True])
def test_gradients_and_momenta_are_only_read(norm: str, dtype: torch.dtype, nesterov: bool) -> None:
    for momentum, rule in ((0.0, Unit()), (0.9, Unit()), (0.9, Sharp())):
        parameter = Parameter(randn(4, 3, dtype=dtype))
        gradient = randn(4, 3, seed=1, dtype=dtype)
        parameter.grad = gradient.clone()
        optimizer = SteepestDescent(
            [parameter], 0.1, norm=REFERENCE[norm][0], momentum=momentum, nesterov=nesterov, step_rule=rule
        )
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
        if momentum:
            buffer = optimizer.state[parameter]["momentum_buffer"]
            assert torch.equal(buffer, torch.zeros_like(gradient).lerp(gradient, 1 - momentum))


@pytest.mark.parametrize("norm", sorted(REFERENCE))
@pytest.mark.parametrize(("size", "dtype"), [(1e-20, torch.float32), (1e30, torch.float32), (1e-40, torch.float64)])
def test_the_size_of_a_gradient_does_not_matter(norm: str, size: float, dtype: torch.dtype) -> None:
    gradient = randn(4, 3, dtype=dtype)
    moved = []
    for scale in (1.0, size):
        parameter = Parameter(torch.zeros(4, 3, dtype=dtype))
        parameter.grad = gradient * scale
        SteepestDescent([parameter], 1.0, norm=REFERENCE[norm][0]).step()
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-5)


def test_learning_rate_tensors_of_any_shape_and_dtype() -> None:
    for lr in (torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]], dtype=torch.float64)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            moved = []
            for value in (lr, 0.1):
                parameter = Parameter(torch.ones(3, 2, dtype=dtype))
                parameter.grad = torch.ones_like(parameter)
                SteepestDescent([parameter], value, norm="max", weight_decay=0.5).step()
                moved.append(parameter.detach())
            torch.testing.assert_close(moved[0], moved[1], rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_numbers_of_numpy_are_numbers() -> None:
    parameter = Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    SteepestDescent([parameter], np.float32(0.5), norm="max", momentum=np.float64(0.0)).step()  # type: ignore[arg-type]
    assert torch.equal(parameter.detach(), torch.full((2, 2), -0.5))


def test_a_zero_gradient_decays_and_no_gradient_does_nothing() -> None:
    still, decayed = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    decayed.grad = torch.zeros(2, 2)
    optimizer = SteepestDescent([still, decayed], 0.1, norm="spectral", momentum=0.9, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2, 2))
    assert still not in optimizer.state
    assert torch.allclose(decayed.detach(), torch.full((2, 2), 0.95))


def test_joint_lengths_span_groups_and_norms() -> None:
    a, b = Parameter(torch.zeros(3, 2, dtype=torch.float64)), Parameter(torch.zeros(4, dtype=torch.float64))
    a.grad, b.grad = randn(3, 2), randn(4)
    SteepestDescent(
        [{"params": [a], "norm": MaxRow()}, {"params": [b], "lr": 0.2}], 0.1, norm="euclidean", step_rule=Joint()
    ).step()
    duals = torch.stack([a.grad.norm(dim=1).sum(), b.grad.norm()])
    eta = duals / duals.norm()
    assert torch.allclose(a.detach(), -0.1 * eta[0] * a.grad / a.grad.norm(dim=1, keepdim=True))
    assert torch.allclose(b.detach(), -0.2 * eta[1] * b.grad / b.grad.norm())


def test_joint_lengths_of_tiny_and_huge_duals() -> None:
    lengths = Joint().lengths(torch.tensor([3e-30, 4e-30]))
    assert torch.allclose(lengths, torch.tensor([0.6, 0.8]))
    lengths = Joint().lengths(torch.tensor([3e30, 4e30]))
    assert torch.allclose(lengths, torch.tensor([0.6, 0.8]))


MATRIX = (4, 3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr .*-1.0"),
        ({"lr": math.nan}, ValueError, "lr .*nan"),
        ({"lr": math.inf}, ValueError, "lr .*inf"),
        ({"lr": "0.1"}, TypeError, "lr .*str"),
        ({"lr": True}, TypeError, "lr .*bool"),
        ({"lr": None}, TypeError, "lr .*NoneType"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "lr .*(2,)"),
        ({"lr": torch.tensor(-0.1)}, ValueError, "lr .*-0.1"),
        ({"lr": torch.tensor(math.nan)}, ValueError, "lr .*nan"),
        ({"lr": torch.tensor(True)}, TypeError, "lr .*bool"),
        ({"momentum": 1.0}, ValueError, "momentum .*below 1.*1.0"),
        ({"momentum": -0.1}, ValueError, "momentum .*-0.1"),
        ({"momentum": "0.9"}, TypeError, "momentum .*str"),
        ({"momentum": False}, TypeError, "momentum .*bool"),
        ({"interpolation": 1.0}, ValueError, "interpolation .*below 1"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay .*-0.1"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay .*nan"),
        ({"weight_decay": None}, TypeError, "weight_decay .*NoneType"),
        ({"constrained": True, "weight_decay": 0.1}, ValueError, "weight_decay .*constrained"),
        ({"constrained": True, "lr": 1.5}, ValueError, "lr .*at most 1.*1.5"),
        ({"constrained": True, "lr": torch.tensor(1.5)}, ValueError, "lr .*at most 1.*1.5"),
        ({"constrained": "yes"}, TypeError, "constrained .*'yes'"),
        ({"nesterov": "no"}, TypeError, "nesterov .*'no'"),
        ({"maximize": 1}, TypeError, "maximize .*1"),
        ({"transposed": 0}, TypeError, "transposed .*0"),
        ({"foreach": "no"}, TypeError, "foreach .*'no'"),
        ({"momentum_form": "polyak"}, ValueError, "momentum_form .*heavy_ball.*'polyak'"),
        ({"nonfinite": "warn"}, ValueError, "nonfinite .*skip.*'warn'"),
        ({"adjust_lr_fn": "moonshot"}, ValueError, "adjust_lr_fn .*match_rms_adamw.*'moonshot'"),
        ({"norm": "spectrum"}, ValueError, "norm .*spectral.*'spectrum'"),
        ({"norm": 2}, TypeError, "norm .*int"),
        ({"norm": Euclidean(event_ndim=3)}, ValueError, "norm .*event_ndim"),
        ({"layout": "dense"}, ValueError, "layout .*matrix.*'dense'"),
        ({"layout": "conv"}, ValueError, "'conv' .*3 dim"),
        ({"layout": "batch"}, ValueError, "'batch' .*3 dim"),
        ({"split": 2}, TypeError, "split .*2"),
        ({"split": "22"}, TypeError, "split .*'22'"),
        ({"split": (2, 1)}, ValueError, "split .*4 outputs.*(2, 1)"),
        ({"split": (5, -1)}, ValueError, "split .*positive"),
        ({"split": (2.0, 2.0)}, ValueError, "split .*2.0"),
        ({"split": ()}, ValueError, "split .*4 outputs"),
        ({"split": (2, 2), "transposed": True}, ValueError, "split .*3 outputs"),
        ({"step_rule": Sharp}, TypeError, "step_rule .*StepRule"),
        ({"step_rule": "sharp"}, TypeError, "step_rule .*str"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SteepestDescent([Parameter(torch.zeros(MATRIX))], **{"lr": 0.1, **options})


@pytest.mark.parametrize(
    ("parameter", "options", "error", "words"),
    [
        (torch.zeros(3, 2, dtype=torch.complex64), {}, TypeError, "complex64"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, TypeError, "int64"),
        (torch.eye(3).to_sparse(), {}, TypeError, "dense.*sparse"),
        (torch.zeros(5), {"norm": "spectral"}, ValueError, r"matrices.*\(5,\)"),
        (torch.zeros(()), {"norm": "max_row"}, ValueError, r"matrices.*\(\)"),
        (torch.zeros(5), {"split": (2, 3)}, ValueError, "split needs a matrix"),
        (torch.zeros(5), {"transposed": True}, ValueError, "transposed"),
        (torch.zeros(4, 3, 2, 2), {"transposed": True}, ValueError, "transposed"),
        (torch.zeros(4, 3, 2), {"layout": "matrix"}, ValueError, "'matrix' .*2 dim"),
    ],
)
def test_wrong_parameters_are_named(parameter: Tensor, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SteepestDescent([parameter], 0.1, **options)
