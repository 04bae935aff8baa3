"""The measured sharpness beside the threshold that learning rate, preconditioner and weight noise set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, RMSprop

from steepest.curvature import FunctionOperator, Hessian, LinearOperator, top_eigenpairs
from steepest.dynamics.step_size import step_lr, unwrapped
from steepest.dynamics.variational_edge import vgd_threshold
from steepest.optim import DAL, IVON, RadiusSGD, VariationalSGD

_PLAIN = (torch.optim.SGD, VariationalSGD, DAL, RadiusSGD)  # without a preconditioner
_KNOWN = "SGD, Adam, AdamW, RMSprop, VariationalSGD, IVON, DAL or RadiusSGD, or a wrapper of one"


@dataclass(frozen=True)
class EdgeMeasurement:
    r"""Largest eigenvalues of a Hessian, and what they may be at most.

    Attributes:
        eigenvalues: (k,), the largest first; of $P^{-1/2} H P^{-1/2}$ if there is a preconditioner P.
        vectors: (n, k), the eigenvectors.
        projections: (k,), $(v_i^T g)^2$ with the gradient at the mean (preconditioned: $P^{-1/2} g$).
        factors: (k,), VF of each mode; 1 without noise.
        edge: the threshold without noise: 2/lr, times (1 + beta)/(1 - beta) with momentum.
        products: how many products with the Hessian it took.
        converged: whether the eigenpairs are within the tolerance.
    """

    eigenvalues: Float[Tensor, "k"]
    vectors: Float[Tensor, "n k"]
    projections: Float[Tensor, "k"]
    factors: Float[Tensor, "k"]
    edge: float
    products: int
    converged: bool

    @property
    def sharpness(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def projection(self) -> float:
        """The squared projection of the gradient on the first eigenvector."""
        return float(self.projections[0])

    @property
    def factor(self) -> float:
        """VF of the first mode."""
        return float(self.factors[0])

    @property
    def thresholds(self) -> Float[Tensor, "k"]:
        """(k,), the predicted threshold of each mode."""
        return self.edge * self.factors

    @property
    def threshold(self) -> float:
        """The predicted threshold of the first mode."""
        return self.edge * self.factor

    @property
    def relative_sharpness(self) -> float:
        """The sharpness over the threshold without noise; with noise it hovers around `factor`."""
        return self.sharpness / self.edge


def edge_threshold(lr: float, momentum: float = 0.0) -> float:
    r"""The curvature $(2/\rho)(1 + \beta)/(1 - \beta)$ at which descent along an average gradient becomes unstable.

    Args:
        lr: the learning rate $\rho$, above 0.
        momentum: $\beta$ of the average $b \leftarrow \beta b + (1 - \beta) g$, in [0, 1).

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    return 2 / lr * (1 + momentum) / (1 - momentum)


def measure_edge(
    A: LinearOperator,
    lr: float,
    variance: float | Float[Tensor, "n"] = 0.0,
    samples: int = 1,
    *,
    gradient: Float[Tensor, "n"] | None = None,
    momentum: float = 0.0,
    k: int = 1,
    tol: float = 1e-3,
    max_products: int | None = None,
    start: Float[Tensor, "n"] | None = None,
    pairs: Any = None,
) -> EdgeMeasurement:
    r"""Measure the top of a Hessian's spectrum, and the thresholds $(2/\rho)\,\mathrm{VF}(S (v_i^Tg)^2/\sigma_i^2)$.

    VF is derived without momentum; with it, `edge` has the factor of the momentum, and VF is an approximation.

    Args:
        A: the Hessian at the mean of the weights, over the data that one step sees, or all data.
        lr: the learning rate.
        variance: of the noise on the weights: a number, or one per coordinate; along an eigenvector it is
            $v^T\mathrm{diag}(\text{variance})\,v$.
        samples: S, gradients averaged in a step.
        gradient: g at the mean; `A.gradient()` if None.
        momentum: of an average gradient.
        k: eigenpairs.
        tol: largest residual of an eigenpair, relative to the largest eigenvalue.
        max_products: products to spend at most.
        start: first vector, such as the last top eigenvector: while the Hessian changes slowly, few products do.
        pairs: the eigenpairs (`steepest.curvature.Eigenpairs`), if they are known; nothing is computed then.

    Raises:
        TypeError: A has no gradient, and none is given.
        ValueError: an argument out of its range.

    Source:
        Ghosh et al. 2025, arXiv 2506.12903, theorem 3.1.
    """
    edge = edge_threshold(lr, momentum)
    if gradient is None:
        source: Any = A
        if not hasattr(source, "gradient"):
            raise TypeError(f"gradient must be given: {type(A).__name__} has none")
        gradient = source.gradient()
    if pairs is None:
        pairs = top_eigenpairs(A, k, tol=tol, max_products=max_products, start=start)
    vectors = pairs.vectors
    assert gradient is not None
    projections = (gradient.to(vectors) @ vectors).square()
    if isinstance(variance, Tensor) and variance.ndim:
        if variance.shape != gradient.shape:
            raise ValueError(f"variance must be a number or {tuple(gradient.shape)}, got {tuple(variance.shape)}")
        variance = variance.to(vectors) @ vectors.square()
    factors = vgd_threshold(lr, projections.double(), variance, samples) * (lr / 2)
    return EdgeMeasurement(
        pairs.values, vectors, projections, factors.to(vectors), edge, pairs.products, bool(pairs.converged)
    )


def preconditioned(A: LinearOperator, preconditioner: Float[Tensor, "n"]) -> LinearOperator:
    """The operator $P^{-1/2} A P^{-1/2}$, of which a step $P^{-1} g$ sees the eigenvalues.

    Args:
        A: symmetric (n, n).
        preconditioner: the diagonal of P, positive.

    Raises:
        ValueError: the shape does not fit, or an entry is not positive.
    """
    if preconditioner.shape != (A.shape[0],):
        raise ValueError(f"preconditioner must be ({A.shape[0]},), got {tuple(preconditioner.shape)}")
    p = preconditioner.detach().to(A.device, A.dtype)
    bad = ~((p > 0) & p.isfinite())
    if bool(bad.any()):
        raise ValueError(f"preconditioner must be positive and finite, got {float(p[bad][0])}")
    root = p.rsqrt()[:, None]
    return FunctionOperator(lambda v: root * (A @ (root * v)), A.shape, dtype=A.dtype, device=A.device, symmetric=True)


def preconditioner(optimizer: Optimizer, params: Iterable[Tensor] | None = None) -> list[Tensor]:
    r"""The diagonal P of the matrix by whose inverse an optimizer multiplies its (average) gradient.

    Adam, AdamW: $\sqrt{v/(1 - \beta_2^t)} + \epsilon$. RMSprop: $\sqrt v + \epsilon$. IVON:
    $(h + \delta)/(h_0 + \delta)$, without `rescale_lr` $h + \delta$. SGD, VariationalSGD, DAL, RadiusSGD: 1.

    Args:
        optimizer: after its first step.
        params: the parameters, in the order that is wanted; those of the groups that require a gradient if None.

    Returns:
        Tensors like the parameters.

    Raises:
        TypeError: another optimizer.
        ValueError: the optimizer does not hold a parameter, or has no state of it yet.
    """
    optimizer = unwrapped(optimizer)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    wanted = [p for p in groups if p.requires_grad] if params is None else list(params)
    found = []
    for parameter in wanted:
        if parameter not in groups:
            raise ValueError(f"params: the optimizer does not hold a parameter of shape {tuple(parameter.shape)}")
        found.append(_diagonal(optimizer, groups[parameter], parameter))
    return found


@torch.no_grad()
def _diagonal(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensor:
    if isinstance(optimizer, _PLAIN):
        return torch.ones_like(parameter, requires_grad=False)
    if not isinstance(optimizer, Adam | RMSprop | IVON):
        raise TypeError(f"optimizer must be {_KNOWN}, got {type(optimizer).__name__}")
    state = optimizer.state.get(parameter)
    if not state:
        raise ValueError(f"optimizer has no state of a parameter of shape {tuple(parameter.shape)} yet; step it first")
    if isinstance(optimizer, IVON):
        scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
        return (state["hess"] + group["weight_decay"]) / scale
    if isinstance(optimizer, RMSprop):
        second = state["square_avg"] - state["grad_avg"].square() if group["centered"] else state["square_avg"]
        return second.clamp_min(0).sqrt() + group["eps"]
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return (second / (1 - float(group["betas"][1]) ** float(state["step"]))).sqrt() + group["eps"]


class SharpnessMonitor:
    r"""Measures the sharpness of a model in training beside its threshold.

    Everything is measured at the mean of the weights, so outside of `sampled_params` blocks. Learning rate, momentum,
    preconditioner, variance and samples come from the optimizer: with `VariationalSGD`, the variance of its noise; with
    `IVON`, in the coordinates in which it is variational gradient descent, where the noise has the variance
    $1/(\lambda(h_0 + \delta))$ (without `rescale_lr`, $1/\lambda$) in every direction; antithetic noise counts as
    none, since it cancels on a quadratic. With SGD, Adam, AdamW or RMSprop there is none.

    Args:
        model: the model.
        loss_fn: `loss_fn(output, targets)`, the mean over the batch, as the optimizer sees it.
        data: one batch (inputs, targets), or an iterable of batches.
        optimizer: of the model, with one learning rate.
        params: names of parameters, or parameters; all that require a gradient if None.
        k: eigenpairs.
        tol: see `measure_edge`.
        max_products: products a measurement may take.
        train: run the model in train mode; None: if it has a BatchNorm in train mode at the time of a measurement. The
            optimizer then sees the statistics of the batch, under which a bias before the norm has no curvature;
            with running statistics it would have, and an adaptive optimizer that never met it would seem unstable.

    Raises:
        TypeError: an optimizer that is not known.
        ValueError: at a measurement, groups with different learning rates or noise.

    Examples:
        >>> import torch
        >>> from steepest.optim import VariationalSGD
        >>> model, x, y = torch.nn.Linear(4, 2), torch.randn(16, 4), torch.randn(16, 2)
        >>> optimizer = VariationalSGD(model.parameters(), lr=0.1, sigma=0.1)
        >>> monitor = SharpnessMonitor(model, torch.nn.functional.mse_loss, (x, y), optimizer=optimizer)
        >>> now = monitor.measure()
        >>> now.threshold < now.edge
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        *,
        optimizer: Optimizer,
        params: Sequence[Any] | None = None,
        k: int = 1,
        tol: float = 1e-3,
        max_products: int | None = None,
        train: bool | None = None,
    ) -> None:
        if not isinstance(unwrapped(optimizer), (*_PLAIN, Adam, RMSprop, IVON)):
            raise TypeError(f"optimizer must be {_KNOWN}, got {type(optimizer).__name__}")
        self.model, self.loss_fn, self.data, self.optimizer = model, loss_fn, data, optimizer
        self.params, self.k, self.tol, self.max_products, self.train = params, k, tol, max_products, train
        self._start: Tensor | None = None

    def measure(self) -> EdgeMeasurement:
        """The sharpness and its threshold now. The last eigenvector is where the next search begins."""
        lr, momentum, variance, samples = step_settings(self.optimizer)
        train = uses_batch_statistics(self.model) if self.train is None else self.train
        hessian = Hessian(self.model, self.loss_fn, self.data, params=self.params, train=train)
        operator, gradient = hessian, hessian.gradient()
        if isinstance(unwrapped(self.optimizer), Adam | RMSprop | IVON):
            p = hessian.flatten(preconditioner(self.optimizer, self._parameters()))
            operator, gradient = preconditioned(hessian, p), gradient * p.to(gradient).rsqrt()
        start = self._start if self._start is not None and self._start.shape == gradient.shape else None
        found = measure_edge(
            operator, lr, variance, samples, gradient=gradient, momentum=momentum, k=self.k, tol=self.tol,
            max_products=self.max_products, start=start,
        )  # fmt: skip
        self._start = found.vectors[:, 0]
        return found

    def _parameters(self) -> list[Tensor]:
        if self.params is None:
            return [p for p in self.model.parameters() if p.requires_grad]
        named = dict(self.model.named_parameters())
        return [named[p] if isinstance(p, str) else p for p in self.params]


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm (or an InstanceNorm with running statistics) of the model is in train mode."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    return any(module.training and module.track_running_stats for module in norms)


def step_settings(optimizer: Optimizer) -> tuple[float, float, float, int]:
    r"""Learning rate and momentum of an average gradient, variance of the weight noise, and its samples.

    The learning rate is that of the last step where it is not the group's (DAL, RadiusSGD, RadiusClip): see `step_lr`.
    SGD with Nesterov momentum $\beta$ is unstable from $2 (1 + \beta) / (lr (1 + 2\beta))$ on. The momentum returned is
    then that one without Nesterov which has this threshold, $\beta^2 / (1 + \beta - \beta^2)$.

    Args:
        optimizer: SGD, Adam, AdamW, RMSprop, VariationalSGD, IVON, DAL or RadiusSGD, or a wrapper of one.

    Raises:
        TypeError: another optimizer.
        ValueError: groups with different settings.
    """
    wrapper, optimizer = optimizer, unwrapped(optimizer)
    if not isinstance(optimizer, (*_PLAIN, Adam, RMSprop, IVON)):
        raise TypeError(f"optimizer must be {_KNOWN}, got {type(optimizer).__name__}")
    found = {_of_group(optimizer, group, step_lr(wrapper, i)) for i, group in enumerate(optimizer.param_groups)}
    if len(found) > 1:
        raise ValueError(f"all parameter groups must have the same lr, momentum and noise, got {sorted(found)}")
    lr, momentum, variance = found.pop()
    if isinstance(optimizer, VariationalSGD | IVON):
        return lr, momentum, 0.0 if optimizer.antithetic else variance, optimizer.samples
    return lr, momentum, variance, 1


def _of_group(optimizer: Any, group: dict[str, Any], lr: float) -> tuple[float, float, float]:
    if isinstance(optimizer, IVON):
        scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
        return lr, float(group["betas"][0]), 1 / (group["ess"] * scale)
    if isinstance(optimizer, VariationalSGD):
        return lr, float(group["momentum"]), optimizer.variance(group)
    if isinstance(optimizer, Adam):
        return lr, float(group["betas"][0]), 0.0
    # torch's momentum sums where an average has weight 1 - momentum: the same as an average at lr / (1 - momentum).
    momentum = float(group["momentum"])
    if momentum:
        lr *= (1 - float(group.get("dampening", 0.0))) / (1 - momentum)
    if group.get("nesterov"):
        momentum = momentum**2 / (1 + momentum - momentum**2)
    return lr, momentum, 0.0
