"""How fast each layer's gradient changes when that layer moves: the constants that layer sampling is tuned by."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest.geometry import Norm, get_norm
from steepest.geometry.norms import Euclidean
from steepest.optim.layers import ModelLayer


def layer_smoothness(
    loss: Callable[[], Tensor],
    layers: Sequence[ModelLayer],
    *,
    norm: str | Norm = "spectral",
    length: float = 1e-2,
    samples: int = 2,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "layers"]:
    r"""Secant estimates of the layer-wise smoothness, $L_i = \max_D \|g_i(x + D) - g_i(x)\|_* / \|D\|$.

    D moves layer i alone: first down the steepest direction of its gradient, as training does, then along Gaussian
    directions. A layer's norm is the l2 product of its parameters' norms. A secant is a lower bound of the constant of
    the theory, near the point and on the batch that `loss` has.

    Args:
        loss: evaluates the model on one fixed batch and returns a scalar; without dropout or other chance. It is called
            `samples` + 1 times per layer. Parameters, gradients and buffers are as before afterwards, if the model is
            in eval mode.
        layers: what `find_layers` returned.
        norm: the norm of matrices and flattened convolutions; vectors have the Euclidean norm.
        length: length of D relative to the layer's own norm.
        samples: how many directions.
        generator: source of the Gaussian directions; None: seed 0.

    Returns:
        One constant per layer, in float64.

    Raises:
        ValueError: `length` or `samples` is not positive, or there is no layer.
        TypeError: `norm` is not a norm.

    Examples:
        >>> import torch
        >>> from steepest.optim import Optimal, find_layers, layer_smoothness
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()
        >>> x = torch.randn(16, 4)
        >>> sampler = Optimal(layer_smoothness(lambda: model(x).square().mean(), find_layers(model)))
    """
    if not (math.isfinite(length) and length > 0) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"length and samples must be positive, got {length!r} and {samples!r}")
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    matrix = get_norm(norm)
    if not isinstance(matrix, Norm):
        raise TypeError(f"norm must be a Norm, which has a dual; got {type(norm).__name__}")
    source = torch.Generator().manual_seed(0) if generator is None else generator
    found = [_secant(loss, layer, matrix, length, samples, source) for layer in layers]
    return torch.tensor(found, dtype=torch.float64)


def _secant(
    loss: Callable[[], Tensor], layer: ModelLayer, norm: Norm, length: float, samples: int, source: torch.Generator
) -> float:
    parameters = list(layer.parameters.values())
    norms = [norm.at(_matrix(p).shape) if p.ndim > 1 else Euclidean() for p in parameters]
    start = [parameter.detach().clone() for parameter in parameters]
    before = _gradients(loss, parameters)
    size = _product(parameters, norms, "norm") or 1.0
    largest = 0.0
    try:
        for sample in range(samples):
            if sample:
                steps = [torch.randn(p.shape, generator=source, dtype=torch.float64).to(p) for p in parameters]
            else:
                steps = [n.sharp(_matrix(g)).view_as(g).neg() for n, g in zip(norms, before, strict=True)]
            own = _product(steps, norms, "norm")
            if own == 0:
                continue
            with torch.no_grad():
                for parameter, step, value in zip(parameters, steps, start, strict=True):
                    parameter.copy_(value + step * (length * size / own))
                moved = [p.detach() - value for p, value in zip(parameters, start, strict=True)]
            change = [new - old for new, old in zip(_gradients(loss, parameters), before, strict=True)]
            distance = _product(moved, norms, "norm")
            if distance > 0:
                largest = max(largest, _product(change, norms, "dual") / distance)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return largest


def _gradients(loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _product(tensors: Sequence[Tensor], norms: Sequence[Norm], which: str) -> float:
    values = [getattr(norm, which)(_matrix(each.detach())) for each, norm in zip(tensors, norms, strict=True)]
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
