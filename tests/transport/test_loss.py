"""The differentiable loss."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.transport import entropic_ot, ot_loss

DOUBLE = torch.float64
OPTIONS: dict[str, Any] = {"tol": 1e-13}


def inputs(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    C = torch.rand(shape, generator=g, dtype=DOUBLE, requires_grad=True)
    s = torch.randn(*shape[:-1], generator=g, dtype=DOUBLE, requires_grad=True)
    t = torch.randn(*shape[:-2], shape[-1], generator=g, dtype=DOUBLE, requires_grad=True)
    return C, s, t


def loss(C: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return ot_loss(C, s.softmax(-1), t.softmax(-1), 6.0, **OPTIONS)


@pytest.mark.parametrize("shape", [(5, 4), (3, 6), (1, 4), (2, 4, 3)])
def test_first_and_second_derivatives(shape: tuple[int, ...]) -> None:
    arguments = inputs(0, *shape)
    assert torch.autograd.gradcheck(loss, arguments, atol=1e-7)
    assert torch.autograd.gradgradcheck(loss, arguments, atol=1e-6)


def test_derivatives_are_the_plan_and_the_potentials() -> None:
    C, s, t = inputs(1, 7, 5)
    r, c = (each.detach().softmax(-1).requires_grad_() for each in (s, t))
    value = ot_loss(C, r, c, 10.0, **OPTIONS)
    gC, gr, gc = torch.autograd.grad(value, (C, r, c))
    result = entropic_ot(C, r, c, 10.0, **OPTIONS)
    assert torch.allclose(value, result.value, rtol=0, atol=1e-14)
    assert torch.allclose(gC, result.plan(), rtol=0, atol=1e-12)
    x, y = result.potentials
    assert torch.allclose(gr, x - x.mean(), rtol=0, atol=1e-12)
    assert torch.allclose(gc - gc.mean(), y - y.mean(), rtol=0, atol=1e-12)
    # Also where the mass itself grows.
    eps = 1e-6
    ends = [ot_loss(C, (1 + e) * r, (1 + e) * c, 10.0, **OPTIONS).item() for e in (eps, -eps)]
    assert (ends[0] - ends[1]) / (2 * eps) == pytest.approx(
        float((gr * r).detach().sum() + (gc * c).detach().sum()), abs=1e-8
    )


def test_a_shared_cost_gathers_the_gradients_of_its_batch() -> None:
    C, _, _ = inputs(2, 4, 5)
    _, s, t = inputs(3, 3, 4, 5)
    ot_loss(C, s.softmax(-1), t.softmax(-1), 8.0, **OPTIONS).sum().backward()
    plans = entropic_ot(C, s.softmax(-1), t.softmax(-1), 8.0, **OPTIONS).plan()
    assert C.grad is not None and torch.allclose(C.grad, plans.sum(0), rtol=0, atol=1e-12)
    assert s.grad is not None and s.grad.shape == s.shape


def test_a_point_cloud_moves_onto_another() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.randn(6, 2, generator=g, dtype=DOUBLE)
    points = torch.randn(6, 2, generator=g, dtype=DOUBLE).requires_grad_()
    optimizer = torch.optim.SGD([points], lr=2.0)
    uniform = torch.full((6,), 1 / 6, dtype=DOUBLE)
    for _ in range(25):
        optimizer.zero_grad()
        ot_loss((points[:, None] - target).square().sum(-1), uniform, uniform, 50.0, tol=1e-8).backward()
        optimizer.step()
    assert float((points.detach()[:, None] - target).square().sum(-1).amin(0).max()) < 1e-2


def test_uniform_marginals_by_default() -> None:
    C = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    r, c = torch.full((4,), 1 / 4, dtype=C.dtype), torch.full((6,), 1 / 6, dtype=C.dtype)
    loss = ot_loss(C, None, None, 20.0)
    assert float(loss) == pytest.approx(float(ot_loss(C, r, c, 20.0)), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, C)
    assert float(gradient.sum()) == pytest.approx(1.0)
