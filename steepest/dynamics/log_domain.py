r"""Gradients of classification losses when the margins are so large that floats underflow.

All losses here have the gradient $\sum_{i, c \ne y_i} p_{ic}\,(e_c - e_{y_i})$ with respect to the logits, with
positive weights $p_{ic}$. Beyond margins of about 40 a float64 softmax cannot tell $1 - p$ from one, and beyond 745 $p$
itself is zero. Here $\log p_{ic}$ is computed, the largest is taken out as one scalar, and what remains is exact to
rounding.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

Loss = Literal["cross_entropy", "exponential", "pair_log"]


@dataclass(frozen=True)
class ScaledTensor:
    r"""Tensors (*batch, m, n) of any size: $e^{\text{log\_scale}} \cdot \text{mantissa}$, one scale per matrix.

    Attributes:
        mantissa: (*batch, m, n).
        log_scale: (*batch,); anything where the mantissa is zero.
    """

    mantissa: Float[Tensor, "*batch m n"]
    log_scale: Float[Tensor, "*batch"]

    @classmethod
    def zeros_like(cls, x: Float[Tensor, "*batch m n"]) -> "ScaledTensor":
        """The zero of this shape."""
        return cls(torch.zeros_like(x), x.new_full(x.shape[:-2], -math.inf))

    def blend(self, other: "ScaledTensor", weight: float) -> "ScaledTensor":
        """`weight * self + (1 - weight) * other`, the largest entry of each mantissa brought to one."""
        mine = self.log_scale + (math.log(weight) if weight > 0 else -math.inf)
        its = other.log_scale + (math.log1p(-weight) if weight < 1 else -math.inf)
        scale = torch.maximum(mine, its)
        base = torch.where(scale.isfinite(), scale, 0.0)
        mixed = (mine - base).exp()[..., None, None] * self.mantissa
        mixed = mixed + (its - base).exp()[..., None, None] * other.mantissa
        largest = mixed.abs().amax((-2, -1))
        empty = largest == 0
        mantissa = mixed / torch.where(empty, 1.0, largest)[..., None, None]
        return ScaledTensor(mantissa, torch.where(empty, -math.inf, base + largest.log()))

    def to_tensor(self) -> Float[Tensor, "*batch m n"]:
        """The plain tensor, as far as the dtype reaches."""
        return self.mantissa * self.log_scale.exp()[..., None, None]


@dataclass(frozen=True)
class LogitTerms:
    r"""What a loss says about logits, for n samples of k classes.

    Attributes:
        weights: (*batch, n, k), the gradient of $n L$ with respect to the logits, over $e^{\text{log\_scale}}$; the
            largest entry off the label is one.
        log_scale: (*batch,).
        log_proxy: (*batch,), log of the proxy $\mathcal{G} = \frac1n \sum_{i, c \ne y_i} p_{ic}$; for the cross-entropy
            $p_{ic}$ is the softmax, and the proxy $\frac1n \sum_i (1 - S_{i y_i})$.
        log_loss: (*batch,).
        margin: (*batch,), $\min_{i, c \ne y_i} z_{i y_i} - z_{ic}$.
    """

    weights: Float[Tensor, "*batch n k"]
    log_scale: Float[Tensor, "*batch"]
    log_proxy: Float[Tensor, "*batch"]
    log_loss: Float[Tensor, "*batch"]
    margin: Float[Tensor, "*batch"]


def label_mask(labels: Int[Tensor, "*batch n"], classes: int) -> Bool[Tensor, "*batch n k"]:
    """True at each sample's own class."""
    return torch.nn.functional.one_hot(labels, classes).bool()


def logit_terms(
    logits: Float[Tensor, "*batch n k"], own: Bool[Tensor, "*#batch n k"], loss: Loss = "cross_entropy"
) -> LogitTerms:
    r"""The loss, its gradient, its proxy and the margin at these logits, in the log domain.

    With $u_{ic} = z_{ic} - z_{i y_i}$ over $c \ne y_i$:
    cross-entropy $\frac1n \sum_i \log(1 + \sum_c e^{u_{ic}})$, where
    $\log p_{ic} = u_{ic} - \log(1 + \sum_{c'} e^{u_{ic'}})$; exponential $\frac1n \sum_{i,c} e^{u_{ic}}$, where
    $\log p_{ic} = u_{ic}$; pair-log $\frac1n \sum_{i,c} \log(1 + e^{u_{ic}})$, where
    $\log p_{ic} = \log \mathrm{sigmoid}(u_{ic})$.

    Args:
        logits: z, of any size as long as it is finite.
        own: see `label_mask`.
        loss: "cross_entropy", "exponential" or "pair_log".

    """
    gaps = (logits - logits.masked_fill(~own, 0.0).sum(-1, keepdim=True)).masked_fill(own, -math.inf)
    margin = -gaps.amax((-2, -1))
    if loss == "exponential":
        log_weights = log_losses = gaps
    elif loss == "pair_log":
        log_weights, log_losses = logsigmoid(gaps), log_softplus(gaps)
    else:
        largest = gaps.logsumexp(-1, keepdim=True)
        log_weights, log_losses = gaps - softplus(largest), log_softplus(largest)
    log_scale = log_weights.amax((-2, -1))
    weights = (log_weights - log_scale[..., None, None]).exp()
    sums = weights.sum(-1, keepdim=True)
    samples = math.log(logits.shape[-2])
    return LogitTerms(
        weights=torch.where(own, -sums, weights),
        log_scale=log_scale,
        log_proxy=log_scale + sums.sum((-2, -1)).log() - samples,
        log_loss=log_losses.flatten(-2).logsumexp(-1) - samples,
        margin=margin,
    )


def log_softplus(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""$\log \log(1 + e^x)$, which is $x$ to rounding where $e^x$ is below it."""
    small = math.log(torch.finfo(x.dtype).eps)
    return torch.where(x < small, x, softplus(x.clamp_min(small)).log())


@dataclass(frozen=True)
class Evaluation:
    r"""A loss at weights $W$.

    Attributes:
        gradient: of the loss, (*batch, k, d).
        log_proxy: (*batch,), see `LogitTerms`.
        log_loss: (*batch,).
        margin: (*batch,), the raw margin of the weights.
    """

    gradient: ScaledTensor
    log_proxy: Float[Tensor, "*batch"]
    log_loss: Float[Tensor, "*batch"]
    margin: Float[Tensor, "*batch"]


class LogDomainLoss:
    r"""A loss of linear classifiers $z_i = W h_i$ with its gradient, exact at any margin.

    The gradient is $G = \frac1n \sum_{i, c \ne y_i} p_{ic}\,(e_c - e_{y_i}) h_i^\top$, with $\log p_{ic}$ from
    `logit_terms`; $e^{\log p_{ic} - m}$ with $m = \max \log p_{ic}$ is what is summed, and $m$ stays a scalar.
    Weights below $e^{-745}$ of the largest count as zero in float64.

    Args:
        features: (*batch, n, d), real and finite; leading dimensions are independent problems.
        labels: (*batch, n), or (n,) for all problems, integers 0 .. k - 1.
        classes: k; None: the largest label plus one.
        loss: "cross_entropy", "exponential" or "pair_log".

    Raises:
        TypeError, ValueError: see `check_data`, and an unknown loss.

    Source:
        Fan, Schmidt and Thrampoulidis 2025, arXiv 2502.04664, section 2 and appendix (other losses); the log-domain
        form is ours.

    Examples:
        >>> features, labels = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])
        >>> found = LogDomainLoss(features, labels).evaluate(1000 * torch.eye(2, dtype=torch.float64))
        >>> float(found.margin), round(float(found.log_loss), 6)
        (1000.0, -1000.0)
        >>> found.gradient.mantissa.sign().tolist()
        [[-1.0, 1.0], [1.0, -1.0]]
    """

    def __init__(
        self,
        features: Float[Tensor, "*batch n d"],
        labels: Int[Tensor, "*#batch n"],
        classes: int | None = None,
        loss: Loss = "cross_entropy",
    ):
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}, got {loss!r}")
        self.classes = check_data(features, labels, classes)
        self.features = features
        self.labels = labels.to(torch.int64)
        self.loss: Loss = loss
        self.own = label_mask(self.labels, self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights, (*batch, k, d)."""
        return (*self.features.shape[:-2], self.classes, self.features.shape[-1])

    def evaluate(self, weight: Float[Tensor, "*batch k d"]) -> Evaluation:
        """The loss, gradient, proxy and margin at `weight`."""
        terms = logit_terms(self.features @ weight.mT, self.own, self.loss)
        gradient = terms.weights.mT @ self.features / self.features.shape[-2]
        return Evaluation(ScaledTensor(gradient, terms.log_scale), terms.log_proxy, terms.log_loss, terms.margin)

    def plain_gradient(self, weight: Float[Tensor, "*batch k d"]) -> Float[Tensor, "*batch k d"]:
        """The gradient as it is usually computed, (softmax - one-hot)' H / n: wrong at large margins, see above."""
        logits = self.features @ weight.mT
        if self.loss == "cross_entropy":
            weights = logits.softmax(-1) - self.own.to(logits.dtype)
        else:
            gaps = (logits - logits.masked_fill(~self.own, 0.0).sum(-1, keepdim=True)).masked_fill(self.own, -math.inf)
            pairs = gaps.exp() if self.loss == "exponential" else gaps.sigmoid()
            weights = torch.where(self.own, -pairs.sum(-1, keepdim=True), pairs)
        return weights.mT @ self.features / self.features.shape[-2]


def check_data(features: Tensor, labels: Tensor, classes: int | None = None) -> int:
    """The number of classes, or a clear error.

    Raises:
        TypeError: features are not a real floating-point tensor, or labels not one of integers.
        ValueError: shapes that do not fit, values that are not finite, labels outside 0 .. k - 1, or fewer than two
            classes with samples in some problem.

    Warns:
        UserWarning: a class without samples.
    """
    import warnings

    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"features must be a real floating-point tensor (*batch, n, d), got {kind}")
    if features.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"features must be float32 or float64, got {features.dtype}: half precision rounds margins away"
        )
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        raise TypeError(f"labels must be a tensor of integers, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if features.ndim < 2 or 0 in features.shape:
        raise ValueError(f"features must have shape (*batch, n, d), none of them zero, got {tuple(features.shape)}")
    if labels.shape != features.shape[-2:-1] and labels.shape != features.shape[:-1]:
        wanted = f"{tuple(features.shape[-2:-1])} or {tuple(features.shape[:-1])}"
        raise ValueError(f"labels must have shape {wanted} for these features, got {tuple(labels.shape)}")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got nan or infinity")
    low, high = int(labels.min()), int(labels.max())
    count = high + 1 if classes is None else classes
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"classes must be an integer or None, got {classes!r}")
    if count < 2:
        raise ValueError(f"there must be at least 2 classes, got {count}: with one, every classifier is right")
    if low < 0 or high >= count:
        raise ValueError(f"labels must lie in 0 .. {count - 1}, got {low} .. {high}")
    present = label_mask(labels.to(torch.int64), count).any(-2)
    if int(present.sum(-1).min()) < 2:
        raise ValueError("fewer than 2 classes have samples: a margin needs two")
    if not bool(present.all()):
        missing = (~present.reshape(-1, count)).any(0).nonzero()[:, 0].tolist()
        warnings.warn(
            f"no samples of class {', '.join(map(str, missing))}: its logit only has to stay below the others",
            stacklevel=3,
        )
    return count
