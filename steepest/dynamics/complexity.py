"""How steep a function is on the data: its geometric complexity."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int

_OUTPUTS_AT_ONCE = 64


def geometric_complexity(
    function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "n *shape"],
    *,
    chunk: int | None = None,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    train: bool = False,
) -> Float[Tensor, ""]:
    r"""$GC(f, X) = \frac1n \sum_{x \in X} \|\partial f(x)/\partial x\|_F^2$, without units beyond those of f and x.

    It can be differentiated by the parameters of f where gradients are enabled, so that
    `loss + strength * geometric_complexity(model, x, train=True)` regularises; put measurements under
    `torch.no_grad()`, which saves the graph. Give logits, not probabilities, to measure a classifier.

    Args:
        function: maps a batch (n, *shape) to outputs (n, *outputs), each row by itself; a module or a callable.
        inputs: X.
        chunk: samples at a time; None: all. Saves memory only without gradient.
        probes: None: exact, one backward pass per output. A number: Hutchinson's unbiased estimate with so many
            random sign vectors, for functions with many outputs.
        generator: source of the signs, on the CPU; needed with `probes`.
        train: False: a module is evaluated in eval mode, and no buffer changes. True: in the mode that it is in;
            with batch normalisation in training mode rows are not independent, and the result is another one.

    Raises:
        TypeError: inputs that are not real floating-point numbers; other arguments of a wrong kind.
        ValueError: no samples, outputs without one row for each sample, settings out of range.

    Source:
        Dherin, Munn, Rosca and Barrett 2022, arXiv 2209.13083.

    Examples:
        >>> weight = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
        >>> geometric_complexity(lambda x: x @ weight.T, torch.randn(7, 3))
        tensor(55.)
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a tensor of real floating-point numbers, got {kind}")
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ValueError(f"inputs must hold at least one sample, got shape {tuple(inputs.shape)}")
    if chunk is not None:
        check_int("chunk", chunk)
    if probes is not None:
        check_int("probes", probes)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator with probes, got {type(generator).__name__}")
    graph = torch.is_grad_enabled()
    total: Any = 0.0
    with _mode(function, train), torch.enable_grad():
        for rows in inputs.detach().split(chunk or len(inputs)):
            x = rows.detach().requires_grad_()
            outputs = function(x)
            if not isinstance(outputs, Tensor) or outputs.is_complex():
                raise TypeError(f"function must return a real tensor, got {getattr(outputs, 'dtype', type(outputs))}")
            if outputs.ndim == 0 or len(outputs) != len(rows):
                raise ValueError(
                    f"function must return one row for each of {len(rows)} samples, got shape {tuple(outputs.shape)}"
                )
            flat = outputs.reshape(len(rows), -1)
            if flat.requires_grad:
                part = _exact(flat, x, graph) if probes is None else _estimate(flat, x, graph, probes, generator)
                total = total + (part if graph else part.detach())
    return total / len(inputs) if isinstance(total, Tensor) else inputs.new_zeros(())


def _exact(outputs: Tensor, x: Tensor, graph: bool) -> Tensor:
    """The sum over the samples of the squared Jacobian."""
    count = outputs.shape[1]
    total = x.new_zeros(())
    for start in range(0, count, _OUTPUTS_AT_ONCE):
        stop = min(start + _OUTPUTS_AT_ONCE, count)
        chosen = torch.eye(count, dtype=outputs.dtype, device=outputs.device)[start:stop, None].expand(
            -1, len(outputs), -1
        )
        total = total + _squares(outputs, x, chosen, graph)
    return total


def _estimate(outputs: Tensor, x: Tensor, graph: bool, probes: int, generator: torch.Generator | None) -> Tensor:
    total = x.new_zeros(())
    for start in range(0, probes, _OUTPUTS_AT_ONCE):
        shape = (min(_OUTPUTS_AT_ONCE, probes - start), *outputs.shape)
        signs = torch.randint(2, shape, generator=generator).to(outputs.device, outputs.dtype) * 2 - 1
        total = total + _squares(outputs, x, signs, graph)
    return total / probes


def _squares(outputs: Tensor, x: Tensor, vectors: Tensor, graph: bool) -> Tensor:
    found = torch.autograd.grad(
        outputs, x, vectors, is_grads_batched=True, retain_graph=True, create_graph=graph, allow_unused=True
    )[0]
    return x.new_zeros(()) if found is None else found.square().sum()


@contextmanager
def _mode(function: Any, train: bool) -> Iterator[None]:
    """Eval mode, put back afterwards."""
    if train or not isinstance(function, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in function.modules()]
    try:
        function.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
