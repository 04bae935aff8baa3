"""IVON: an optimizer that learns a Gaussian posterior of the weights at about the price of Adam."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steepest.optim.checks import NonFinite, check_number
from steepest.optim.noisy_descent import NoisyDescent
from steepest.optim.pieces import Row
from steepest.optim.variational_sgd import check_lr

HessianEstimate = Literal["price", "gradsq"]


class IVON(NoisyDescent):
    r"""Variational learning of a Gaussian $N(m, \mathrm{diag}(\sigma^2))$ of the weights, by natural gradients.

    With $\sigma^2 = 1/(\lambda(h + \delta))$, $\varepsilon_s = \sigma n_s$ and
    $\hat g_s = \nabla\ell(m + \varepsilon_s)$, $\ell$ the mean loss of a batch:

    $$\hat g = \tfrac1S\sum_s \hat g_s, \quad
    \hat h = \lambda(h + \delta)\,\tfrac1S\sum_s \hat g_s \varepsilon_s, \quad
    g \leftarrow \beta_1 g + (1 - \beta_1)\hat g$$

    $$h \leftarrow \beta_2 h + (1 - \beta_2)\hat h + \tfrac12 (1 - \beta_2)^2 \frac{(h - \hat h)^2}{h + \delta}, \quad
    m \leftarrow m - \alpha\,\mathrm{clip}\Big(\frac{g/(1 - \beta_1^t) + \delta m}{h + \delta}, \pm\xi\Big)$$

    where $\alpha = lr\,(h_0 + \delta)$ with `rescale_lr`. h + delta never falls below half of its previous value, so
    the noise is always defined. The loss must be the mean over the batch, without weight decay.

    Each step needs `samples` evaluations: ``step(closure)`` makes them, or the loop does, in
    ``with optimizer.sampled_params(train=True):`` blocks before ``step()``. Outside of blocks the parameters are the
    mean: evaluate as usual, or average predictions over the posterior with `predict`. A parameter without gradient in
    a block has gradient 0; one that does not require gradients is left alone. Several backward passes in a block add
    up to one sample. `clip_grad_norm_` and a GradScaler work between block and step; with several samples, the first
    does not reach the curvature, and the second must not be asked to `unscale_`.

    Under DistributedDataParallel all ranks draw the same noise, since their seeds are equal: a step is that of one
    process with the whole batch. BatchNorm keeps the statistics of the noisy weights; see `update_bn`.

    Args:
        params: parameters, float32 or float64, or groups of them.
        lr: learning rate $lr$.
        ess: effective sample size $\lambda$: the number of training examples, divided by the temperature if that is
            not 1. Larger is narrower.
        hess_init: $h_0$, the first h, above 0.
        betas: $\beta_1$ of the gradient and $\beta_2$ of the curvature, each in [0, 1].
        weight_decay: $\delta$; the prior has precision $\lambda\delta$.
        samples: S, evaluations per step.
        hessian: how $\hat h$ is estimated: ``"price"`` as above, or ``"gradsq"``: $\lambda\,\frac1S\sum_s\hat g_s^2$.
        clip: $\xi$, the largest change of a coordinate before it is multiplied by $\alpha$.
        rescale_lr: multiply the learning rate by $h_0 + \delta$, so that the first step is that of SGD.
        debias: divide g by $1 - \beta_1^t$.
        antithetic: samples in pairs of opposite noise; `samples` must be even.
        generator: source of the seed of the noise, drawn once; None: seed 0. The seed is in the parameter groups.
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"`` gradients with NaN or infinity.
        maximize: ascend the given objective (the prior still pulls to zero).
        foreach: False treats one piece of a parameter at a time.

    Raises:
        TypeError: an argument of another type, or parameters of half precision, complex or sharded ones.
        ValueError: a setting out of its range; the message has the value.
        RuntimeError: see `step` and `sampled_params`.

    Source:
        Shen et al. 2024, arXiv 2402.17641 (IVON), as restated by Ghosh et al. 2025, arXiv 2506.12903; Lin, Schmidt and
        Khan 2020, arXiv 2002.10060 (the correction that keeps h + delta positive).

    Examples:
        >>> import torch
        >>> from steepest.optim import IVON
        >>> layer, x, y = torch.nn.Linear(16, 4), torch.randn(32, 16), torch.arange(32) % 4
        >>> optimizer = IVON(layer.parameters(), lr=0.1, ess=32)
        >>> for _ in range(3):
        ...     with optimizer.sampled_params(train=True):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(layer(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.predict(lambda: layer(x), samples=8).shape
        torch.Size([32, 4])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        ess: float,
        *,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        samples: int = 1,
        hessian: HessianEstimate = "price",
        clip: float = math.inf,
        rescale_lr: bool = True,
        debias: bool = True,
        antithetic: bool = False,
        generator: torch.Generator | None = None,
        nonfinite: NonFinite = "raise",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "betas": betas,
            "weight_decay": weight_decay,
            "hessian": hessian,
            "clip": clip,
            "rescale_lr": rescale_lr,
            "debias": debias,
            "step": 0,
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
        for name in ("ess", "hess_init"):
            check_number(group[name], name, where)
            if group[name] == 0:
                raise ValueError(f"{name} {where}must be above 0, got {group[name]!r}")
        check_number(group["weight_decay"], "weight_decay", where)
        if not isinstance(group["betas"], tuple | list) or len(group["betas"]) != 2:
            raise TypeError(f"betas {where}must be two numbers, got {group['betas']!r}")
        for beta in group["betas"]:
            check_number(beta, "betas", where)
            if beta > 1:
                raise ValueError(f"betas {where}must be in [0, 1], got {group['betas']!r}")
        if group["clip"] != math.inf:
            check_number(group["clip"], "clip", where)
        if group["clip"] == 0:
            raise ValueError(f"clip {where}must be above 0, got {group['clip']!r}")
        if group["hessian"] not in get_args(HessianEstimate):
            raise ValueError(
                f"hessian {where}must be one of {', '.join(get_args(HessianEstimate))}; got {group['hessian']!r}"
            )
        for name in ("rescale_lr", "debias"):
            if not isinstance(group[name], bool):
                raise TypeError(f"{name} {where}must be True or False, got {group[name]!r}")

    def _noise_state(self, group: dict[str, Any], parameter: Tensor, create: bool) -> Row:
        if create or parameter in self.state:
            return (self._buffer(parameter, "hess", float(group["hess_init"])),)
        return (parameter.new_tensor(float(group["hess_init"])).expand_as(parameter),)

    def _perturb(
        self, group: dict[str, Any], parameters: list[Tensor], noise: list[Tensor], *state: list[Tensor]
    ) -> None:
        scale = torch._foreach_add(state[0], group["weight_decay"])
        torch._foreach_rsqrt_(scale)
        torch._foreach_addcmul_(parameters, noise, scale, value=group["ess"] ** -0.5)

    @property
    def collects(self) -> bool:
        """The products of gradient and noise, or the squares of the gradients."""
        return True

    def _collect(self, group: dict[str, Any], sums: list[Tensor], gradients: list[Tensor], noise: list[Tensor]) -> None:
        torch._foreach_addcmul_(sums, gradients, noise if group["hessian"] == "price" else gradients)

    def _unscale(self, factor: float) -> None:
        for group in self.param_groups:
            sums = [self._sums[parameter] for parameter in group["params"] if parameter in self._sums]
            if sums:
                torch._foreach_mul_(sums, factor if group["hessian"] == "price" else factor**2)

    def _update_state(self, group: dict[str, Any], parameter: Tensor) -> Row:
        return self._buffer(parameter, "momentum_buffer", 0.0), self._buffer(parameter, "hess", group["hess_init"])

    def _before_update(self, group: dict[str, Any]) -> None:
        group["step"] += 1

    def _update(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        noise: list[Tensor],
        *state: list[Tensor],
    ) -> None:
        momenta, hess = state
        (beta1, beta2), delta = group["betas"], group["weight_decay"]
        if group["maximize"]:
            gradients = list(torch._foreach_neg(gradients))
        damped = torch._foreach_add(hess, delta)
        if group["hessian"] == "price":
            # With x = (1 - beta2)(h^ - h) / (h + delta), the new h is h + (h + delta) x (1 + x/2).
            if self.samples == 1:
                change = torch._foreach_mul(gradients, noise)
            else:  # what was collected over several samples has not turned yet
                change = torch._foreach_mul(noise, -1.0 if group["maximize"] else 1.0)
            torch._foreach_mul_(change, group["ess"] * (1 - beta2))
            ratio = torch._foreach_div(hess, damped)
            torch._foreach_sub_(change, ratio, alpha=1 - beta2)
            torch._foreach_addcmul_(damped, damped, change, value=0.5)
            torch._foreach_addcmul_(hess, damped, change)
        else:
            squares = torch._foreach_mul(gradients, gradients) if self.samples == 1 else torch._foreach_clone(noise)
            torch._foreach_mul_(squares, group["ess"])
            gap = torch._foreach_sub(squares, hess)
            torch._foreach_mul_(hess, beta2)
            torch._foreach_add_(hess, squares, alpha=1 - beta2)
            torch._foreach_mul_(gap, gap)
            torch._foreach_addcdiv_(hess, gap, damped, value=0.5 * (1 - beta2) ** 2)
        torch._foreach_clamp_max_(hess, torch.finfo(hess[0].dtype).max / 4)
        torch._foreach_lerp_(momenta, gradients, 1 - beta1)
        bias = 1 - beta1 ** group["step"] if group["debias"] and beta1 < 1 else 1.0
        direction = torch._foreach_mul(parameters, delta)
        torch._foreach_add_(direction, momenta, alpha=1 / bias)
        torch._foreach_div_(direction, torch._foreach_add(hess, delta))
        if group["clip"] != math.inf:
            torch._foreach_clamp_max_(direction, group["clip"])
            torch._foreach_clamp_min_(direction, -group["clip"])
        lr = float(group["lr"]) * (group["hess_init"] + delta if group["rescale_lr"] else 1.0)
        torch._foreach_add_(parameters, direction, alpha=-lr)

    def posterior_std(self) -> list[Tensor]:
        r"""$\sigma = 1/\sqrt{\lambda(h + \delta)}$ of each parameter, in their order, as new tensors."""
        return [
            (self._noise_state(group, parameter, create=False)[0] + group["weight_decay"]).mul_(group["ess"]).rsqrt_()
            for group in self.param_groups
            for parameter in group["params"]
        ]
