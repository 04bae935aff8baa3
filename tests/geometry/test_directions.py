"""Directions that no norm explains, through the engine."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from steepest.geometry import Direction, MaxRow, Norm, get_norm
from steepest.optim import SteepestDescent


@dataclass(frozen=True)
class Doubled(Direction):
    """T(g) = 2 g: no norm has this direction."""

    def direction(self, g: Tensor) -> Tensor:
        return 2 * g


@dataclass(frozen=True)
class Shared(Direction):
    """g over the Frobenius norm of the whole parameter."""

    @property
    def spans_batch(self) -> bool:
        return True

    def direction(self, g: Tensor) -> Tensor:
        return g / g.square().sum((-3, -2, -1), keepdim=True).sqrt()


def test_a_norm_is_a_direction_and_passes_through_get_norm():
    assert isinstance(MaxRow(), Direction)
    assert not isinstance(Doubled(), Norm)
    assert get_norm(Doubled()) == Doubled()


def test_the_pairing_is_of_the_gradient_and_its_direction():
    g = torch.randn(3, 4, 5, dtype=torch.float64)
    direction, pairing = Doubled().direction_and_dual(g)
    assert torch.equal(direction, 2 * g)
    torch.testing.assert_close(pairing, 2 * g.square().sum((-2, -1)))


def test_the_engine_steps_against_any_direction():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    before, weight.grad = weight.detach().clone(), torch.randn(4, 3)
    optimizer = SteepestDescent([weight], lr=0.1, norm=Doubled())
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.2 * weight.grad)
    assert optimizer.state_dict()["param_groups"][0]["norm"] == "Doubled()"


@pytest.mark.parametrize("foreach", [None, False])
def test_matrices_of_one_parameter_are_coupled_and_those_of_two_are_not(foreach: bool | None):
    experts = [torch.nn.Parameter(torch.zeros(2, 4, 3, dtype=torch.float64)) for _ in range(3)]
    plain = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    for parameter in [*experts, plain]:
        parameter.grad = torch.randn_like(parameter)
    SteepestDescent([*experts, plain], lr=1.0, norm=Shared(), foreach=foreach).step()
    for parameter in [*experts, plain]:
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), -parameter.grad / parameter.grad.norm())


def test_only_a_norm_has_a_ball_to_keep_to_and_only_some_take_vectors():
    with pytest.raises(ValueError, match="constrained=True needs a norm"):
        SteepestDescent([torch.nn.Parameter(torch.zeros(2, 2))], norm=Doubled(), constrained=True)
    with pytest.raises(ValueError, match="norm of matrices"):
        SteepestDescent([torch.nn.Parameter(torch.zeros(2))], norm=Doubled())
