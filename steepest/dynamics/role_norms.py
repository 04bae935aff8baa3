"""What each kind of parameter does during training: norms of weights, updates and gradients, by role."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RoleNorms:
    """Weight norm, update norm, their ratio and the gradient norm of each role, at chosen steps.

    All norms are Euclidean over all parameters of the role: a role of two matrices A and B has the weight norm
    sqrt(|A|_F^2 + |B|_F^2). The update is the change of the parameters by one optimizer step.

    Args:
        model: Its trainable parameters are observed; a parameter that several modules share counts once.
    """

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        kinds = _role_names(model, [name for name, _ in named], self.parameters)
        self.roles: dict[str, list[int]] = {}
        for index, role in enumerate(kinds):
            self.roles.setdefault(role, []).append(index)
        self.curves: dict[str, dict[str, list[float]]] = {
            role: {"step": [], "update_to_weight": [], "weight_norm": [], "update_norm": [], "grad_norm": []}
            for role in self.roles
        }

    @torch.no_grad()
    def before(self) -> list[Tensor]:
        """Copies of the parameters, taken before the optimizer's step."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def after(self, step: int, copies: Sequence[Tensor]) -> None:
        """Record one point of every curve, after the optimizer's step."""
        weights = torch._foreach_norm(list(copies))
        updates = torch._foreach_norm([p.detach() - old for p, old in zip(self.parameters, copies, strict=True)])
        grads = [p.grad for p in self.parameters]
        gradients = [
            torch.zeros_like(w) if g is None else torch.linalg.vector_norm(g)
            for g, w in zip(grads, weights, strict=True)
        ]
        columns = [torch.stack([v.double().cpu() for v in values]) for values in (weights, updates, gradients)]
        for role, indices in self.roles.items():
            weight, update, gradient = (float(column[indices].norm()) for column in columns)
            curve = self.curves[role]
            curve["step"].append(step)
            curve["weight_norm"].append(weight)
            curve["update_norm"].append(update)
            curve["update_to_weight"].append(update / weight if weight > 0 else float("nan"))
            curve["grad_norm"].append(gradient)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {role: {name: list(values) for name, values in curve.items()} for role, curve in self.curves.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with saved curves."""
        self.curves = {role: {name: list(values) for name, values in curve.items()} for role, curve in state.items()}


def grad_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar tensor."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _role_names(model: nn.Module, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> list[str]:
    """The role of each parameter; by its number of dimensions where roles cannot be found for this model."""
    from steepest.optim.roles import roles

    try:
        found = roles(model)
        return [str(found[name].role) for name in names]
    except (ValueError, TypeError, KeyError) as error:
        logging.getLogger(__name__).warning("parameter roles could not be found (%s); grouped by shape instead", error)
        return ["matrix" if p.ndim >= 2 else "vector" for p in parameters]
