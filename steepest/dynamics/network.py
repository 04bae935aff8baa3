"""Steepest descent of a network's weight matrices, layer by layer, at margins where floats underflow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest.dynamics.implicit_bias import _by_problem, check_schedule
from steepest.dynamics.log_domain import Loss, ScaledTensor, check_data, label_mask, logit_terms
from steepest.dynamics.margins import exact_norm
from steepest.geometry import Norm
from steepest.loop import matching_state

Forward = Callable[[Sequence[Tensor], Tensor], Tensor]


def two_layer(
    weights: Sequence[Float[Tensor, "*batch rows columns"]], features: Float[Tensor, "*features n d"]
) -> Float[Tensor, "*batch n k"]:
    r"""Logits $z_i = V\,\mathrm{sigmoid}(W h_i)$ of a network without biases, for `weights` = (W, V).

    Args:
        weights: W (*batch, hidden, d) and V (*batch, k, hidden).
        features: (*batch, n, d) or (n, d).
    """
    hidden, output = weights
    return (features @ hidden.mT).sigmoid() @ output.mT


def spectral_margins(
    margin: Float[Tensor, "*batch"], weights: Sequence[Float[Tensor, "*batch rows columns"]]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    r"""The raw margin over $\|V\|_2$ of the last matrix, and over the largest $\|\cdot\|_2$ of all matrices.

    Source:
        Fan, Schmidt and Thrampoulidis 2025, arXiv 2502.04664, experiments with a two-layer network.
    """
    lengths = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights])
    return margin / lengths[-1], margin / lengths.amax(0)


class NetworkSteepestDescent:
    r"""Normalised steepest descent of the weight matrices of a network, full batch, each in its own norm.

    $M \leftarrow \beta M + (1 - \beta) G$ and $W \leftarrow W - \eta_t \arg\max_{N(D) \le 1} \langle M, D \rangle$
    for each matrix $W$, with $\eta_t = \text{lr} / (t + 1)^a$. The loss is differentiated at the logits in the log
    domain, and its common factor stays a scalar, so training goes on when the loss itself has underflowed. A stepper.

    Args:
        forward: `forward(weights, features)` gives the logits (*batch, n, k), by differentiable operations.
        weights: the matrices to start from, (*batch, m, n) each; leading dimensions are independent networks.
        features: what `forward` takes, (*batch, n, d), or (n, d) for all.
        labels: (*batch, n) or (n,), integers 0 .. k - 1.
        lr: step size at the first step.
        norm: of all matrices, or one for each. See `LinearSteepestDescent`.
        momentum: the weight of the past.
        lr_power: a.
        loss: "cross_entropy", "exponential" or "pair_log".

    Raises:
        TypeError, ValueError: data, weights or settings that are wrong.
        FloatingPointError: from `step`: a gradient is not finite, or zero; nothing has been changed then.

    Source:
        Fan, Schmidt and Thrampoulidis 2025, arXiv 2502.04664, experiments with a two-layer network.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> sizes = [(8, 5), (3, 8)]
        >>> weights = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
        >>> features = torch.randn(9, 5, dtype=torch.float64, generator=generator)
        >>> descent = NetworkSteepestDescent(two_layer, weights, features, torch.arange(9) % 3, lr=0.3)
        >>> margins = [float(descent.step()["margin"]) for _ in range(200)]
        >>> margins[0] < 0 < margins[-1]
        True
    """

    def __init__(
        self,
        forward: Forward,
        weights: Sequence[Float[Tensor, "*batch rows columns"]],
        features: Float[Tensor, "*features n d"],
        labels: Int[Tensor, "*labels n"],
        lr: float = 0.1,
        *,
        norm: str | Norm | Sequence[str | Norm] = "spectral",
        momentum: float = 0.0,
        lr_power: float = 0.5,
        loss: Loss = "cross_entropy",
    ):
        check_schedule(lr, lr_power)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}, got {loss!r}")
        if not weights or any(not isinstance(weight, Tensor) or weight.ndim < 2 for weight in weights):
            raise ValueError("weights must be matrices (*batch, m, n), at least one")
        norms = [norm] * len(weights) if isinstance(norm, str | Norm) else list(norm)
        if len(norms) != len(weights):
            raise ValueError(f"norm must be one norm, or one for each of the {len(weights)} weights, got {len(norms)}")
        self.forward = forward
        self.weights = [weight.detach().clone().requires_grad_() for weight in weights]
        self.features = features
        self.loss: Loss = loss
        self.norms = [exact_norm(each) for each in norms]
        self.lr, self.lr_power, self.momentum = float(lr), float(lr_power), float(momentum)
        self.buffers = [ScaledTensor.zeros_like(weight.detach()) for weight in self.weights]
        self.steps = 0
        with torch.no_grad():
            logits = forward(self.weights, features)
        check_data(features, labels, logits.shape[-1])
        self.own = label_mask(labels.to(torch.int64), logits.shape[-1])
        self._evaluate()

    def _evaluate(self) -> None:
        with torch.enable_grad():
            logits = self.forward(self.weights, self.features)
        with torch.no_grad():
            self._terms = logit_terms(logits, self.own, self.loss)
        self._gradients = torch.autograd.grad(logits, self.weights, self._terms.weights / logits.shape[-2])

    def step(self) -> Mapping[str, Any]:
        """One step.

        Returns:
            Of the new weights: "loss" (which underflows), "log_loss" and "margin" (raw); and "lr", the step size that
            was used. With leading dimensions, one number per network: "loss[0]".
        """
        for index, gradient in enumerate(self._gradients):
            flat = gradient.flatten(-2)
            if not bool((flat.isfinite().all(-1) & flat.any(-1)).all()):
                raise FloatingPointError(
                    f"the gradient of weight {index} is zero or not finite at margin {float(self.margin.max()):.4g}: "
                    "the network is saturated, or its logits have overflowed"
                )
        size = self.lr / (self.steps + 1) ** self.lr_power
        scaled = [ScaledTensor(gradient, self._terms.log_scale) for gradient in self._gradients]
        with torch.no_grad():
            if self.momentum:
                self.buffers = [old.blend(new, self.momentum) for old, new in zip(self.buffers, scaled, strict=True)]
                scaled = self.buffers
            moves = [norm.direction(each.mantissa) for norm, each in zip(self.norms, scaled, strict=True)]
            self.weights = [weight - size * move for weight, move in zip(self.weights, moves, strict=True)]
        self.weights = [weight.requires_grad_() for weight in self.weights]
        self.steps += 1
        self._evaluate()
        terms = self._terms
        found = {"loss": terms.log_loss.exp(), "log_loss": terms.log_loss, "margin": terms.margin}
        return {**_by_problem(found), "lr": size}

    @property
    def margin(self) -> Float[Tensor, "*batch"]:
        """The raw margin of the network, in units of logits."""
        return self._terms.margin

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum and the number of steps."""
        return {
            "weights": [weight.detach() for weight in self.weights],
            "momentum": [buffer.mantissa for buffer in self.buffers],
            "momentum_log_scale": [buffer.log_scale for buffer in self.buffers],
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; raises before anything is changed if it does not fit."""
        state = matching_state(state, self.state_dict())
        pairs = zip(state["momentum"], state["momentum_log_scale"], strict=True)
        self.buffers = [ScaledTensor(mantissa, scale) for mantissa, scale in pairs]
        self.weights, self.steps = [weight.requires_grad_() for weight in state["weights"]], int(state["steps"])
        self._evaluate()
