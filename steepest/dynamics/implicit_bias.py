r"""Which classifier an optimizer selects: steepest descent and Adam on linear classifiers, at any margin.

On separable data the losses have no minimiser. The weights grow without bound, and the direction they take is the
optimizer's implicit bias: normalised steepest descent in a norm goes to the classifier of largest margin in that norm.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest._checks import check_int
from steepest.dynamics.conic import is_separable
from steepest.dynamics.log_domain import Evaluation, LogDomainLoss, Loss, ScaledTensor
from steepest.dynamics.margins import MarginBounds, NotSeparableError, check_weight, dual_over_proxy, exact_norm
from steepest.geometry import Norm
from steepest.loop import matching_state

WhenNotSeparable = Literal["raise", "warn", "ignore"]
# Beyond this many weights the exact test of separability, whose cost grows with their cube, is not made.
_EXACT_TEST_WEIGHTS = 3000


def check_schedule(lr: float, lr_power: float) -> None:
    """Raise unless lr / (t + 1)^lr_power are positive steps with an infinite sum; warn of steps that shrink fast."""
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    if not isinstance(lr_power, int | float) or not 0 <= lr_power <= 1:
        raise ValueError(
            f"lr_power must lie in 0 .. 1, got {lr_power!r}: above 1 the steps have a finite sum and the weights "
            "freeze, below 0 they grow"
        )
    if lr_power > 0.5:
        grow = f"t^{1 - lr_power:.2g}" if lr_power < 1 else "log t"
        warnings.warn(
            f"lr_power {lr_power} is above 1/2: the weights grow like {grow} only, so the direction settles very late",
            stacklevel=4,
        )


class _LinearDescent(ABC):
    """A linear classifier under descent: what all update rules share."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        lr: float,
        norm: str | Norm,
        lr_power: float,
        loss: Loss,
        weight: Tensor | None,
        classes: int | None,
        not_separable: WhenNotSeparable,
        check_after: int,
    ):
        check_schedule(lr, lr_power)
        if not_separable not in ("raise", "warn", "ignore"):
            raise ValueError(f"not_separable must be 'raise', 'warn' or 'ignore', got {not_separable!r}")
        check_int("check_after", check_after)
        self.problem = LogDomainLoss(features, labels, classes, loss)
        self.norm = exact_norm(norm)
        self.lr, self.lr_power = float(lr), float(lr_power)
        self.not_separable, self.check_after = not_separable, check_after
        if weight is not None:
            check_weight(weight, features, self.problem.classes)
        self.weight: Tensor = features.new_zeros(self.problem.shape) if weight is None else weight.detach().clone()
        self.steps = 0
        self._found = self.problem.evaluate(self.weight)
        self._lower = torch.zeros_like(self._found.margin)
        self._upper = torch.full_like(self._found.margin, math.inf)
        self._update_bounds()

    @abstractmethod
    def _direction(self, found: Evaluation) -> Tensor:
        """What is subtracted from the weights, times the step size."""

    @torch.no_grad()
    def step(self) -> Mapping[str, Any]:
        """One step.

        Returns:
            Of the new weights: "loss" (which underflows), "log_loss", "log_proxy", "margin" (raw),
            "normalized_margin" (in the norm), the best bounds so far "lower_bound" and "upper_bound" of the largest
            margin; and "lr", the step size that was used. With leading dimensions, one number per problem: "loss[0]".

        Raises:
            NotSeparableError: no margin was positive in `check_after` steps, and an exact test says that none can be.
        """
        size = self.lr / (self.steps + 1) ** self.lr_power
        self.weight = self.weight - size * self._direction(self._found)
        self._found = self.problem.evaluate(self.weight)
        self.steps += 1
        own = self._update_bounds()
        if self.steps == self.check_after and self.not_separable != "ignore":
            self._check_separable()
        metrics: dict[str, Any] = {
            "loss": self._found.log_loss.exp(),
            "log_loss": self._found.log_loss,
            "log_proxy": self._found.log_proxy,
            "margin": self._found.margin,
            "normalized_margin": own,
            "lower_bound": self._lower,
            "upper_bound": self._upper,
        }
        return {**_by_problem(metrics), "lr": size}

    def normalized_margin(self, norm: str | Norm | None = None) -> Float[Tensor, "*batch"]:
        """The raw margin of the weights over their length in any norm; by default that of the descent."""
        length = (self.norm if norm is None else exact_norm(norm)).norm(self.weight)
        return torch.where(length > 0, self._found.margin / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)

    @property
    def margin(self) -> Float[Tensor, "*batch"]:
        """The raw margin of the weights, in units of logits."""
        return self._found.margin

    @property
    def evaluation(self) -> Evaluation:
        """Loss, proxy and gradient at the weights."""
        return self._found

    @property
    def bounds(self) -> MarginBounds:
        """The best bracket around the largest margin that all iterates together give."""
        return MarginBounds(self._lower, self._upper)

    def _update_bounds(self) -> Tensor:
        found, own = self._found, self.normalized_margin()
        upper = dual_over_proxy(self.norm, found.gradient.mantissa, found.gradient.log_scale, found.log_proxy)
        self._lower, self._upper = torch.maximum(self._lower, own), torch.minimum(self._upper, upper)
        return own

    def _check_separable(self) -> None:
        # A loss below log(2) / n forces a positive margin, so these are the problems that may have none.
        suspects = (self._lower <= 0).reshape(-1).nonzero()[:, 0].tolist()
        if not suspects:
            return
        features, labels = self.problem.features, self.problem.labels
        flat = features.reshape(-1, *features.shape[-2:])
        every = labels.expand(features.shape[:-1]).reshape(len(flat), -1)
        if math.prod(self.problem.shape[-2:]) <= _EXACT_TEST_WEIGHTS:
            suspects = [i for i in suspects if not is_separable(flat[i], every[i], self.problem.classes)]
            verdict = "the data are not linearly separable"
        else:
            verdict = "the data do not seem to be linearly separable (too many weights for the exact test)"
        if not suspects:
            return
        which = f" in problem {', '.join(map(str, suspects))}" if self.weight.ndim > 2 else ""
        worst = float(self._found.margin.reshape(-1)[suspects].min())
        message = f"{verdict}{which}: no positive margin after {self.steps} steps, now {worst:.4g}"
        if self.not_separable == "raise" and "not seem" not in verdict:
            raise NotSeparableError(message)
        warnings.warn(message, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Weights, bounds and the number of steps."""
        return {"weight": self.weight, "lower": self._lower, "upper": self._upper, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; raises before anything is changed if it does not fit."""
        self._take(matching_state(state, self.state_dict()))

    def _take(self, state: Mapping[str, Any]) -> None:
        self.weight, self.steps = state["weight"], int(state["steps"])
        self._lower, self._upper = state["lower"], state["upper"]
        self._found = self.problem.evaluate(self.weight)


class LinearSteepestDescent(_LinearDescent):
    r"""Normalised steepest descent (NSD), or momentum steepest descent (NMD), of a linear classifier.

    $M_t = \beta M_{t-1} + (1 - \beta) G_t$, $D_t = \arg\max_{N(D) \le 1} \langle M_t, D \rangle$,
    $W_{t+1} = W_t - \eta_t D_t$, $\eta_t = \text{lr} / (t + 1)^a$. On separable data $W_t$ goes to the classifier of
    largest margin in the norm $N$: the largest entry for sign descent and Signum, Frobenius for normalised gradient
    descent, spectral for spectral descent and Muon. A stepper; drive it with `steepest.run`.

    Args:
        features: (*batch, n, d); leading dimensions are independent problems, solved together.
        labels: (*batch, n) or (n,), integers 0 .. k - 1.
        lr: step size at the first step, in units of the weights; larger is faster.
        norm: N: "max", "euclidean", "spectral" (exact), another name of `steepest.geometry.NORMS`, or any `Norm`, such
            as `Lp(3)` and `Schatten(4)`.
        momentum: the weight of the past, $\beta$ (b1).
        lr_power: a.
        loss: "cross_entropy", "exponential" or "pair_log"; the limit is the same.
        weight: where to start, (*batch, k, d); zero by default.
        classes: k; None: the largest label plus one.
        log_domain: False takes the gradient in plain floating point, as a naive program would: its direction is noise
            beyond margins of about 40, and an error comes when it is all zero.
        not_separable: what to do if after `check_after` steps no margin was positive, and an exact test says that
            none can be: "raise", "warn" or "ignore".
        check_after: when to test.

    Raises:
        TypeError, ValueError: data, weights or settings that are wrong; see also `log_domain.check_data`.
        NotSeparableError: from `step`, see `not_separable`; or the gradient is exactly zero, which separable data
            exclude.
        FloatingPointError: from `step`: the plain gradient has underflowed to zero.

    Source:
        Fan, Schmidt and Thrampoulidis 2025, arXiv 2502.04664, equations (NSD) and (NMD). The log-domain form, with
        the scale of the momentum renormalised at every step, is ours.

    Examples:
        >>> from steepest.loop import run
        >>> features = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.arange(20) % 2
        >>> features[:, 0] += 8 * labels - 4
        >>> descent = LinearSteepestDescent(features, labels, lr=1.0, norm="spectral")
        >>> result = run(descent, steps=1000, progress=False)
        >>> float(descent.bounds.gap) < 0.1
        True
    """

    def __init__(
        self,
        features: Float[Tensor, "*batch n d"],
        labels: Int[Tensor, "*#batch n"],
        lr: float = 0.1,
        *,
        norm: str | Norm = "spectral",
        momentum: float = 0.0,
        lr_power: float = 0.5,
        loss: Loss = "cross_entropy",
        weight: Float[Tensor, "*batch k d"] | None = None,
        classes: int | None = None,
        log_domain: bool = True,
        not_separable: WhenNotSeparable = "raise",
        check_after: int = 1000,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
        super().__init__(features, labels, lr, norm, lr_power, loss, weight, classes, not_separable, check_after)
        self.momentum, self.log_domain = float(momentum), log_domain
        self.momentum_buffer = ScaledTensor.zeros_like(self.weight)

    def _direction(self, found: Evaluation) -> Tensor:
        _check_gradient(found)
        gradient = found.gradient
        if not self.log_domain:
            plain = self.problem.plain_gradient(self.weight)
            if not bool(plain.flatten(-2).any(-1).all()):
                raise FloatingPointError(
                    f"the gradient is zero at margin {float(found.margin.max()):.4g}: it has underflowed in "
                    f"{plain.dtype}; use log_domain=True"
                )
            gradient = ScaledTensor(plain, torch.zeros_like(found.log_proxy))
        if self.momentum:
            gradient = self.momentum_buffer = self.momentum_buffer.blend(gradient, self.momentum)
        return self.norm.direction(gradient.mantissa)

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum, bounds and the number of steps."""
        buffer = self.momentum_buffer
        return {**super().state_dict(), "momentum": buffer.mantissa, "momentum_log_scale": buffer.log_scale}

    def _take(self, state: Mapping[str, Any]) -> None:
        super()._take(state)
        self.momentum_buffer = ScaledTensor(state["momentum"], state["momentum_log_scale"])


class LinearAdam(_LinearDescent):
    r"""Adam without epsilon on a linear classifier: its limit is the largest margin in the max-norm.

    $M_t = \beta_1 M_{t-1} + (1 - \beta_1) G_t$, $V_t = \beta_2 V_{t-1} + (1 - \beta_2) G_t^2$, both with bias
    correction, $W_{t+1} = W_t - \eta_t M_t / \sqrt{V_t}$, $\eta_t = \text{lr} / (t + 1)^a$. Coordinates with $V = 0$
    stay. M is kept with one scale per matrix, and V as its logarithm, entry by entry.

    Args:
        features: see `LinearSteepestDescent`.
        labels: see `LinearSteepestDescent`.
        lr: see `LinearSteepestDescent`.
        lr_power: see `LinearSteepestDescent`.
        loss: see `LinearSteepestDescent`.
        weight: see `LinearSteepestDescent`.
        classes: see `LinearSteepestDescent`.
        not_separable: see `LinearSteepestDescent`.
        check_after: see `LinearSteepestDescent`.
        betas: (b1, b2), the weights of the past of M and V. The limit is reached soon only with a small b2: with 0.999
            V remembers gradients that were larger by orders of magnitude.
        norm: of the normalised margin and its bounds; the update does not depend on it.

    Raises:
        TypeError, ValueError, NotSeparableError: see `LinearSteepestDescent`.

    Warns:
        UserWarning: b1 > b2, which the theory excludes.

    Source:
        Fan, Schmidt and Thrampoulidis 2025, arXiv 2502.04664, section on Adam; Zhang, Zou and Cao 2024 (two classes).
    """

    def __init__(
        self,
        features: Float[Tensor, "*batch n d"],
        labels: Int[Tensor, "*#batch n"],
        lr: float = 0.1,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        norm: str | Norm = "max",
        lr_power: float = 0.5,
        loss: Loss = "cross_entropy",
        weight: Float[Tensor, "*batch k d"] | None = None,
        classes: int | None = None,
        not_separable: WhenNotSeparable = "raise",
        check_after: int = 1000,
    ):
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        if betas[0] > betas[1]:
            warnings.warn(f"betas {betas}: the theory needs b1 <= b2, and the steps may be long without", stacklevel=2)
        super().__init__(features, labels, lr, norm, lr_power, loss, weight, classes, not_separable, check_after)
        self.betas = (float(betas[0]), float(betas[1]))
        self.first = ScaledTensor.zeros_like(self.weight)
        self.log_second = torch.full_like(self.weight, -math.inf)

    def _direction(self, found: Evaluation) -> Tensor:
        _check_gradient(found)
        beta1, beta2 = self.betas
        gradient = found.gradient
        self.first = self.first.blend(gradient, beta1)
        square = 2 * (gradient.mantissa.abs().log() + gradient.log_scale[..., None, None]) + math.log1p(-beta2)
        past = self.log_second + (math.log(beta2) if beta2 else -math.inf)
        self.log_second = torch.logaddexp(past, square)
        mantissa, scale = self.first.mantissa, self.first.log_scale[..., None, None]
        bias1, bias2 = (math.log(1 - beta ** (self.steps + 1)) for beta in self.betas)
        size = (mantissa.abs().log() + scale - bias1 - (self.log_second - bias2) / 2).exp()
        return torch.where(mantissa == 0, 0.0, mantissa.sign() * size)

    def state_dict(self) -> dict[str, Any]:
        """Weights, both moments, bounds and the number of steps."""
        moments = {"first": self.first.mantissa, "first_log_scale": self.first.log_scale, "log_second": self.log_second}
        return {**super().state_dict(), **moments}

    def _take(self, state: Mapping[str, Any]) -> None:
        super()._take(state)
        self.first = ScaledTensor(state["first"], state["first_log_scale"])
        self.log_second = state["log_second"]


def _check_gradient(found: Evaluation) -> None:
    # On separable data <G, -V> >= gamma * proxy > 0 for the best classifier V.
    if not bool(found.gradient.mantissa.flatten(-2).any(-1).all()):
        raise NotSeparableError("the gradient is exactly zero, so the data are not linearly separable")


def _by_problem(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, values in metrics.items():
        if values.ndim == 0:
            found[name] = values
        else:
            found |= {f"{name}[{i}]": value for i, value in enumerate(values.reshape(-1).unbind())}
    return found
