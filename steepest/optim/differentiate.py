"""Pieces of a step that differentiates a closure's loss: gradients, products with the Hessian, norms, random states."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


def evaluate(closure: Callable[[], Any], params: list[Tensor]) -> Any:
    """The loss; afterwards a parameter has a gradient if and only if the closure called backward."""
    for p in params:
        p.grad = None
    with torch.enable_grad():
        return closure()


def gradients_of(loss: Any, params: list[Tensor], called_backward: bool, graph: bool) -> list[Tensor | None]:
    """The gradients of the loss, or those that the closure has left."""
    if called_backward:
        found: list[Tensor | None] = [p.grad for p in params]
    else:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise RuntimeError(
                "the closure must return the loss, a tensor of one element, got "
                f"{f'shape {tuple(loss.shape)}' if isinstance(loss, Tensor) else type(loss).__name__}"
            )
        if not loss.requires_grad:
            raise RuntimeError(
                "the closure must return the loss with its graph, and this one is detached from all parameters "
                "(computed under no_grad, by detach() or item(), or used in an earlier step)"
            )
        with torch.enable_grad():
            found = list(torch.autograd.grad(loss.sum(), params, create_graph=graph, allow_unused=True))
    for gradient in found:
        if gradient is not None and gradient.layout != torch.strided:
            raise TypeError(f"gradients must be dense, got layout {gradient.layout}; use sparse=False")
    return found


def hessian_product(pairs: list[tuple[Tensor, Tensor]], g: list[Tensor]) -> list[Tensor]:
    """H g, by differentiating the gradients again."""
    live = [(gradient, constant) for (_, gradient), constant in zip(pairs, g, strict=True) if gradient.requires_grad]
    if not live:  # a linear loss
        return [torch.zeros_like(constant) for constant in g]
    with torch.enable_grad():
        found = torch.autograd.grad(
            [gradient for gradient, _ in live], [p for p, _ in pairs], [c for _, c in live], allow_unused=True
        )
    return [x for x in found if x is not None] or [torch.zeros_like(constant) for constant in g]


def refuse_dead_ends(gradients: list[Tensor]) -> None:
    """Raise where the graph ends in an operation that has no derivative, which autograd would take for a zero."""
    waiting, seen = [g.grad_fn for g in gradients if g.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().rpartition("::")[2] in ("Error", "NotImplemented"):
            raise RuntimeError("the backward of an operation is marked as differentiable once")
        waiting += [following for following, _ in node.next_functions if following is not None]


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, at least in float32."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), device=tensors[0].device)
    wide = [tensor.float() if tensor.itemsize < 4 else tensor for tensor in filled]
    norms = torch._foreach_norm(wide)
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in wide) else torch.float32
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]))


def scaled(tensors: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Each tensor times a number that stays on its device; tensors of one device and dtype at once."""
    found: list[Tensor] = list(tensors)
    kinds: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        kinds[tensor.device, tensor.dtype].append(index)
    for (device, _), indices in kinds.items():
        chosen = [tensors[index] for index in indices]
        for index, product in zip(indices, torch._foreach_mul(chosen, scale.to(device)), strict=True):
            found[index] = product
    return found


def add_scaled_(tensors: Sequence[Tensor], terms: Sequence[Tensor], scale: Tensor, sign: float = 1.0) -> None:
    """`tensors += sign * scale * terms`. On a CPU in one pass over memory; elsewhere few calls count for more."""
    if all(tensor.device.type == "cpu" and tensor.itemsize >= 4 for tensor in tensors):
        for tensor, term in zip(tensors, terms, strict=True):
            tensor.addcmul_(term, scale.to(tensor), value=sign)
    else:
        torch._foreach_add_(list(tensors), scaled(terms, sign * scale))


def random_state(params: list[Tensor]) -> list[tuple[torch.device, Tensor]]:
    """The states of torch's generators on the CPU and on the parameters' devices."""
    devices = {p.device for p in params if p.device.type == "cuda"}
    states = [(torch.device("cpu"), torch.get_rng_state())]
    return states + [(device, torch.cuda.get_rng_state(device)) for device in sorted(devices, key=str)]


def set_random_state(states: "list[tuple[torch.device, Tensor]] | None") -> None:
    """Put back what `random_state` gave."""
    for device, state in states or []:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, cast(Any, device))
