r"""Losses whose gradient flow is nearer to gradient descent, of one step or of several on different batches.

Each is a function of one tensor, to be differentiated by autograd: follow it with `NGF`, or train on it.

Source: Barrett and Dherin 2021, arXiv 2009.11162 (one step); Smith, Dherin, Barrett and De 2021, arXiv 2101.12176
(random order); Rosca, Wu, Qin and Dherin 2023, arXiv 2307.05789 (several steps in a given order).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Inexact
from torch import Tensor

from steepest.dynamics._derivatives import Loss, check_point
from steepest.dynamics.flows import check_loss, check_step


class ImplicitlyRegularizedLoss:
    r"""$E + \frac h4 \|\nabla E\|^2$: its gradient flow is the `IGR` flow.

    Args:
        loss: E, a function of one tensor.
        h: the step of gradient descent.
    """

    def __init__(self, loss: Loss, h: float) -> None:
        self.loss, self.h = check_loss(loss), check_step(h)

    def __call__(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, ""]:
        """The modified loss at `theta`, with its graph if `theta` requires gradients."""
        ((value, gradient),) = _with_gradients([self.loss], theta)
        return _finish(value + self.h / 4 * _dot(gradient, gradient), theta)


class RandomOrderLoss:
    r"""$\bar E + \frac h4 \mathrm{mean}_i \|\nabla E_i\|^2$: an epoch of SGD with step h, averaged over the order.

    Args:
        losses: $E_i$, the loss of each batch, functions of one tensor.
        h: the step of SGD.
    """

    def __init__(self, losses: Sequence[Loss], h: float) -> None:
        self.losses, self.h = _check_losses(losses), check_step(h)

    def __call__(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, ""]:
        """The modified loss at `theta`, with its graph if `theta` requires gradients."""
        terms = [value + self.h / 4 * _dot(g, g) for value, g in _with_gradients(self.losses, theta)]
        return _finish(torch.stack(terms).mean(), theta)


class MultiStepLoss:
    r"""The loss whose gradient flow, for time nh, follows n SGD steps of size h to $O(h^3)$.

    $$\bar E + \frac{nh}4 \|\nabla \bar E\|^2 - \frac hn \sum_{m=1}^{n-1} \nabla E_m^\top \sum_{k<m} \nabla
    E_k(\theta_0),$$ where the gradients at the start $\theta_0$ are constants. The last term is the only difference
    from one step of size nh on all batches together.

    Args:
        losses: $E_0, \ldots, E_{n-1}$, the loss of each batch in the order of the steps.
        h: the step of SGD.
        start: $\theta_0$; it is read now.
        cross_term: False leaves the last term out: the one big step.

    Raises:
        TypeError, ValueError: a wrong argument, or no losses.

    Examples:
        >>> import torch
        >>> from steepest.dynamics import NGF, MultiStepLoss, integrate
        >>> losses = [lambda x: x.square().sum(), lambda x: 2.5 * x.square().sum()]
        >>> start = torch.ones(1, dtype=torch.float64)
        >>> flow = NGF(MultiStepLoss(losses, 0.01, start), 0.01)
        >>> round(float(integrate(flow, start, 0.02)), 6), 0.98 * 0.95
        (0.931077, 0.9309999999999999)
    """

    def __init__(
        self, losses: Sequence[Loss], h: float, start: Inexact[Tensor, "*shape"], cross_term: bool = True
    ) -> None:
        self.losses, self.h = _check_losses(losses), check_step(h)
        check_point(start)
        self._before: list[Tensor] = []
        if cross_term:
            gradients = [gradient.detach() for _, gradient in _with_gradients(self.losses, start.detach())]
            self._before = list(torch.stack(gradients).cumsum(0)[:-1])

    def __call__(self, theta: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, ""]:
        """The modified loss at `theta`, with its graph if `theta` requires gradients."""
        found = _with_gradients(self.losses, theta)
        n = len(found)
        mean = torch.stack([gradient for _, gradient in found]).mean(0)
        loss = torch.stack([value for value, _ in found]).mean() + n * self.h / 4 * _dot(mean, mean)
        for (_, gradient), before in zip(found[1:], self._before, strict=False):
            loss = loss - self.h / n * _dot(gradient, before.to(gradient.dtype))
        return _finish(loss, theta)


def _check_losses(losses: Sequence[Loss]) -> list[Loss]:
    if callable(losses) or not losses:
        raise ValueError("losses must be a sequence of functions of one tensor, one per step, and not be empty")
    return [check_loss(loss) for loss in losses]


def _with_gradients(losses: Sequence[Loss], theta: Tensor) -> list[tuple[Tensor, Tensor]]:
    check_point(theta)
    with torch.enable_grad():
        point = theta if theta.requires_grad else theta.detach().requires_grad_()
        found = []
        for loss in losses:
            value = loss(point)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError("each loss must return a tensor with one element")
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(
                    value, point, torch.ones_like(value), create_graph=True, materialize_grads=True
                )
            else:
                gradient = torch.zeros_like(point)
            found.append((value.reshape(()), gradient.conj()))
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Without conjugation, so that it continues to complex points."""
    return (a * b).sum()


def _finish(value: Tensor, theta: Tensor) -> Tensor:
    return value if theta.requires_grad else value.detach()
