"""Variational gradient descent: gradients averaged over weights with noise of a fixed size."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.optim.checks import NonFinite, check_number
from steepest.optim.noisy_descent import NoisyDescent
from steepest.optim.pieces import Row

Noise = Literal["gaussian", "student_t"]


class VariationalSGD(NoisyDescent):
    r"""Gradient descent on the loss smoothed by noise on the weights.

    $$\hat g = \frac{1}{S} \sum_{s=1}^{S} \nabla\ell(m + \varepsilon_s), \quad m \leftarrow m - lr\,\hat g$$

    The noise lowers the largest curvature at which training is stable from 2/lr to 2/lr times a factor below one
    (`steepest.dynamics.vgd_threshold`): larger `sigma` or fewer `samples` end in flatter regions. With sigma = 0 it is
    gradient descent.

    Each step needs `samples` evaluations: ``step(closure)`` makes them, or the loop does, in
    ``with optimizer.sampled_params(train=True):`` blocks before ``step()``. Parameters that do not require gradients
    get no noise. Under DistributedDataParallel all ranks draw the same noise, since their seeds are equal.

    Args:
        params: parameters, float32 or float64, or groups of them.
        lr: learning rate, the paper's $\rho$.
        sigma: standard deviation of the noise, in the units of the weights.
        samples: S, evaluations per step.
        noise: ``"gaussian"``: $\varepsilon = \sigma n$; ``"student_t"``: $\varepsilon = \sigma n / \sqrt u$ with u from
            Gamma(dof/2, rate dof/2) for each coordinate, of variance $\sigma^2\,dof/(dof - 2)$ if dof > 2.
        dof: degrees of freedom of the Student-t noise.
        match_variance: scale Student-t noise to the variance $\sigma^2$; needs dof > 2.
        antithetic: samples in pairs of opposite noise; `samples` must be even. On a quadratic the noise of a pair
            cancels, and with it the lower threshold.
        momentum: $\mu$ of the average $b \leftarrow \mu b + (1 - \mu) \hat g$ that is stepped along; 0: none.
        weight_decay: $\lambda$, decoupled: $m \leftarrow (1 - lr\,\lambda) m$.
        generator: source of the seed of the noise, drawn once; None: seed 0. The seed is in the parameter groups.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        maximize: ascend instead.
        foreach: False treats one piece of a parameter at a time.

    Raises:
        TypeError: an argument of another type, or parameters of half precision, complex or sharded ones.
        ValueError: a setting out of its range; the message has the value.
        RuntimeError: see `step` and `sampled_params`.

    Source:
        Ghosh et al. 2025, arXiv 2506.12903.

    Examples:
        >>> import torch
        >>> from steepest.optim import VariationalSGD
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = VariationalSGD(layer.parameters(), lr=0.1, sigma=0.01, samples=2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = layer(torch.ones(4, 16)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        sigma: float,
        *,
        samples: int = 1,
        noise: Noise = "gaussian",
        dof: float = 10.0,
        match_variance: bool = False,
        antithetic: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
        nonfinite: NonFinite = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "sigma": sigma,
            "noise": noise,
            "dof": dof,
            "match_variance": match_variance,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(
            params,
            defaults,
            samples=samples,
            antithetic=antithetic,
            generator=generator,
            nonfinite=nonfinite,
            maximize=maximize,
            foreach=foreach,
        )

    def _check(self, group: dict[str, Any], where: str) -> None:
        check_lr(group["lr"], where)
        check_number(group["sigma"], "sigma", where)
        check_number(group["momentum"], "momentum", where, 1.0)
        check_number(group["weight_decay"], "weight_decay", where)
        if group["noise"] not in get_args(Noise):
            raise ValueError(f"noise {where}must be one of {', '.join(get_args(Noise))}; got {group['noise']!r}")
        if not isinstance(group["match_variance"], bool):
            raise TypeError(f"match_variance {where}must be True or False, got {group['match_variance']!r}")
        check_number(group["dof"], "dof", where)
        if group["dof"] == 0:
            raise ValueError(f"dof {where}must be above 0, got {group['dof']!r}")
        if group["match_variance"] and group["noise"] == "student_t" and group["dof"] <= 2:
            raise ValueError(
                f"dof {where}must be above 2 when match_variance=True, since the variance is infinite otherwise; got "
                f"{group['dof']!r}"
            )

    def _draw(self, group: dict[str, Any], like: Tensor, generator: torch.Generator) -> Tensor:
        if group["sigma"] == 0:
            return torch.zeros_like(like)
        noise = super()._draw(group, like, generator)
        if group["noise"] == "student_t":
            half = group["dof"] / 2
            gamma = torch._standard_gamma(torch.full_like(noise, half), generator=generator)
            noise.div_(gamma.div_(half).clamp_min_(torch.finfo(noise.dtype).tiny).sqrt_())
        return noise

    def _perturb(
        self, group: dict[str, Any], parameters: list[Tensor], noise: list[Tensor], *state: list[Tensor]
    ) -> None:
        if group["sigma"]:
            torch._foreach_add_(parameters, noise, alpha=_scale(group))

    @staticmethod
    def variance(group: dict[str, Any]) -> float:
        """The variance of the noise of a parameter group; infinite for Student-t noise with dof <= 2."""
        if group["noise"] == "gaussian" or not group["sigma"]:
            return group["sigma"] ** 2
        return _scale(group) ** 2 * (group["dof"] / (group["dof"] - 2) if group["dof"] > 2 else math.inf)

    def posterior_std(self) -> list[Tensor]:
        """Standard deviation of the noise of each parameter, in their order; see `variance`."""
        return [
            torch.full_like(parameter, math.sqrt(self.variance(group)), requires_grad=False)
            for group in self.param_groups
            for parameter in group["params"]
        ]

    def _update_state(self, group: dict[str, Any], parameter: Tensor) -> Row:
        if not group["momentum"]:
            return ()
        return (self._buffer(parameter, "momentum_buffer", 0.0),)

    def _update(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        noise: list[Tensor],
        *state: list[Tensor],
    ) -> None:
        lr = float(group["lr"])
        if state:
            torch._foreach_lerp_(state[0], gradients, 1 - group["momentum"])
            gradients = state[0]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, gradients, alpha=lr if group["maximize"] else -lr)


def _scale(group: dict[str, Any]) -> float:
    matched = group["noise"] == "student_t" and group["match_variance"]
    return group["sigma"] * (math.sqrt((group["dof"] - 2) / group["dof"]) if matched else 1.0)


def check_lr(lr: Any, where: str) -> None:
    """Raise unless `lr` is one finite number of at least 0."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr {where}must hold one number, got a tensor of shape {tuple(lr.shape)}")
        lr = lr.item()
    check_number(lr, "lr", where)
