r"""Radii of a network beyond its last softmax: attention, and the singularities and kinks of its activations.

Along a step every inner softmax and every activation has a distance to its nearest singularity, linearised. The least
of all is the network's.

Source: Sao 2026, arXiv 2603.13552, its study of transformers and its table of activations.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from steepest.curvature.logit_slopes import Direction, LogitFunction, Logits, check_nonempty, euclidean, named_direction
from steepest.curvature.softmax_radius import radius

# Points where an activation is not analytic: on the real axis, and at +- i times these.
_REAL: dict[str, float] = {"relu": 0.0, "leaky_relu": 0.0, "elu": 0.0}
_IMAGINARY = {"tanh": math.pi / 2, "sigmoid": math.pi, "silu": math.pi, "softplus": math.pi}
_ENTIRE = ("gelu", "identity", "sin")


def activation_radius(
    name: str, values: Float[Tensor, "*neurons"], slopes: Float[Tensor, "*neurons"]
) -> Float[Tensor, "*neurons"]:
    r"""$\rho_j = \min_s |s - h_j| / |\dot h_j|$: how far a step may go before a neuron meets a singularity s.

    ReLU: its kink at 0; tanh: $\pm i\pi/2$; sigmoid, SiLU and softplus: $\pm i\pi$; exact GELU and sine: none.

    Args:
        name: "relu", "leaky_relu", "elu", "tanh", "sigmoid", "silu", "softplus", "gelu", "sin" or "identity".
        values: h, before the activation.
        slopes: its derivative along the unit direction.

    Raises:
        ValueError: an unknown name, or shapes that differ.
    """
    if values.shape != slopes.shape:
        raise ValueError(f"slopes must have the shape {tuple(values.shape)} of values, got {tuple(slopes.shape)}")
    if name in _ENTIRE:
        return torch.full_like(values, math.inf)
    if name in _REAL:
        distance = values.abs()
    elif name in _IMAGINARY:
        distance = torch.hypot(values, torch.full_like(values, _IMAGINARY[name]))
    else:
        raise ValueError(f"name must be one of {', '.join([*_REAL, *_IMAGINARY, *_ENTIRE])}; got {name!r}")
    still = slopes == 0
    return torch.where(still, math.inf, distance / torch.where(still, torch.ones_like(slopes), slopes.abs()))


@dataclass(frozen=True)
class NetworkRadius:
    r"""Radii along one direction, in units of the parameters; infinite where there is nothing of the kind.

    Attributes:
        output: $\rho_a$ of the logits.
        attention: $\pi$ over the largest spread of the slopes of scores over keys, of all inner softmaxes.
        kink: the quantile of $|h| / |\dot h|$ over all neurons of all activations, the paper's proxy for the
            feed-forward blocks (it counts smooth activations, too).
        activation: the same quantile of the distances to the true singularities.
    """

    output: float
    attention: float
    kink: float
    activation: float

    @property
    def network(self) -> float:
        """The least of output, attention and kink, as in the paper."""
        return min(self.output, self.attention, self.kink)


def network_radius(
    model: nn.Module,
    inputs: Any,
    direction: Direction,
    *,
    quantile: float = 0.01,
    logits: Logits | None = None,
) -> NetworkRadius:
    """All radii of a network along one direction, by forward-mode differentiation in eval mode.

    It sees softmaxes and activations that are computed by torch's functions, fused attention included.

    Args:
        model: see `steepest.curvature.logit_slopes`.
        inputs: see there.
        direction: see there; it is divided by its norm.
        quantile: of the neurons, for `kink` and `activation`.
        logits: see there.

    Raises:
        ValueError: see there; or a quantile outside of (0, 1].
        RuntimeError: a part of the model has no forward-mode derivative.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {quantile!r}")
    check_nonempty(inputs)
    function = LogitFunction(model, logits)
    moved = named_direction(function.model, direction)
    length = euclidean(moved.values())
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"direction must have a positive finite norm, got {length}")
    tangents = {name: value / length for name, value in moved.items()}
    parameters = {name: value.detach() for name, value in function.model.named_parameters()}
    with _Watch() as seen:
        _, slopes = function.forward_mode(parameters, tangents, inputs)
    return NetworkRadius(
        output=float(radius(slopes)),
        attention=math.pi / max(seen.spreads) if any(seen.spreads) else math.inf,
        kink=_quantile(seen.kinks, quantile),
        activation=_quantile(seen.distances, quantile),
    )


class _Watch(TorchFunctionMode):
    """Notes the inputs of every softmax and activation, and their tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.spreads: list[float] = []
        self.kinks: list[Tensor] = []
        self.distances: list[Tensor] = []
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside:
            self._inside = True
            try:
                self._note(func, args, kwargs)
            finally:
                self._inside = False
        return func(*args, **kwargs)

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is F.scaled_dot_product_attention:
            self._scores(_attention_scores(*args, **kwargs), -1)
        elif func is F.multi_head_attention_forward:  # what it calls is not seen from here
            self._scores(_log_weights(*args, **kwargs), -1)
        elif func in _SOFTMAX:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self._scores(args[0] if args else kwargs["input"], -1 if dim is None else dim)
        elif (name := _ACTIVATIONS.get(func)) is not None:
            h = args[0] if args else kwargs["input"]
            values, slopes = _parts(h)
            self.kinks.append(activation_radius("relu", values, slopes).flatten())
            self.distances.append(activation_radius(name, values, slopes).flatten())

    def _scores(self, scores: Tensor, dim: int) -> None:
        values, slopes = (part.movedim(dim, -1) for part in _parts(scores))
        if values.shape[-1] < 2:
            return
        hidden = values == -math.inf
        some = slopes.masked_fill(hidden, -math.inf).amax(-1), slopes.masked_fill(hidden, math.inf).amin(-1)
        widths = (some[0] - some[1]).masked_fill(hidden.all(-1), 0.0)
        self.spreads.append(float(widths.max()))


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(x)
    return primal.detach(), torch.zeros_like(primal) if tangent is None else tangent.detach()


def _attention_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What the softmax of fused attention is taken of; hidden keys are at -infinity."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask


def _log_weights(*args: Any, **kwargs: Any) -> Tensor:
    """The logarithms of the weights of `nn.MultiheadAttention`: its scores, up to what a softmax does not see."""
    named = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    named |= {"need_weights": True, "average_attn_weights": False}
    weights = F.multi_head_attention_forward(**named)[1]
    assert weights is not None
    return weights.log()


def _quantile(parts: list[Tensor], quantile: float) -> float:
    if not parts:
        return math.inf
    found, _ = torch.cat(parts).sort()
    return float(found[max(0, math.ceil(quantile * len(found)) - 1)])


_SOFTMAX: set[Callable[..., Any]] = {F.softmax, torch.softmax, Tensor.softmax}
_ACTIVATIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    Tensor.relu: "relu",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.softplus: "softplus",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
}
