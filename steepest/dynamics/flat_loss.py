"""The loss of a network as a function of one flat vector, for everything that works on functions."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest.curvature._problem import Batches, ModelPoint, scalar, split_batch


class FlatLoss:
    """The mean loss of `model` on fixed data, as a function of its trainable parameters in one vector.

    Nothing of the module changes, neither parameters nor buffers nor modes, and training may go on: what does not stand
    in the vector keeps its present value here.

    Args:
        model: the network.
        loss_fn: `loss_fn(model(inputs), targets)`, the mean over the batch.
        data: one batch (inputs, targets), or a sequence of batches, each weighted by its number of examples.
        params: names of parameters, or the parameters; None: all that require gradients.
        train: run in train mode (BatchNorm uses the batch, Dropout the masks of `seed`) instead of eval mode.
        seed: of the module's random numbers, the same at each call.
        dtype: type to compute in; None: that of the parameters, float32 for bfloat16 and float16.

    Raises:
        TypeError, ValueError: a wrong argument, no data, or nothing to differentiate.

    Examples:
        >>> import torch
        >>> from steepest.dynamics import FlatLoss, stability_coefficients
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> loss = FlatLoss(model, torch.nn.functional.mse_loss, (torch.randn(8, 3), torch.randn(8, 1)))
        >>> stability_coefficients(loss, loss.theta, h=0.1, k=2).eigenvalues.shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Iterable[Any] | None = None,
        train: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of outputs and targets, got {type(loss_fn).__name__}")
        self._point = ModelPoint(model, params, train=train, seed=seed, dtype=dtype)
        self._batches, self._loss_fn = Batches(data), loss_fn

    @property
    def theta(self) -> Float[Tensor, " d"]:
        """The parameters as they were at construction, a copy."""
        return self._point.flatten(self._point.tensors)

    def __call__(self, theta: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        """The mean loss with these parameters."""
        point = self._point
        if theta.shape != (point.size,):
            raise ValueError(f"theta must be of shape ({point.size},), got {tuple(theta.shape)}")
        tensors = []
        for piece, old in zip(theta.split(point.sizes), point.tensors, strict=True):
            tensors.append(piece.view(old.shape).to(theta.dtype if theta.is_complex() else old.dtype))
        total = torch.zeros((), dtype=theta.dtype, device=theta.device)
        for batch, weight in self._batches:
            inputs, targets = split_batch(batch)
            outputs = point.call(tensors, inputs)
            total = total + weight * scalar(self._loss_fn(outputs, point.cast_inputs(targets)), "the loss")
        return total
