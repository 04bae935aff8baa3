"""Logits of a network as a function of its parameters, and their derivative along one direction."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from steepest.curvature._problem import as_arguments
from steepest.curvature.softmax_radius import check_classes

SlopeMethod = Literal["jvp", "fd"]
Logits = Callable[[nn.Module, Any], Tensor]
Direction = Mapping[str, Tensor] | Sequence[Tensor]
LARGE = 16.0
"""Differences of logits beyond this lose digits, and are taken over longer steps."""


def logit_slopes(
    model: nn.Module,
    inputs: Any,
    direction: Direction,
    *,
    method: SlopeMethod = "jvp",
    logits: Logits | None = None,
    fd_step: float | None = None,
) -> Float[Tensor, "*samples classes"]:
    r"""$a(x; v) = J_z(x) v$: how fast every logit changes along the unit direction v. No labels are needed.

    The model runs in eval mode, without autocast; its mode, parameters and buffers are as before when this returns.

    Args:
        model: gives logits of shape (samples, ..., classes): a tensor, or an output with `.logits`.
        inputs: a tensor; a tuple of positional arguments; or a mapping of keyword arguments.
        direction: v, one tensor for each trainable parameter in the order of `model.parameters()`, or a mapping from
            names of parameters to tensors (0 for those it leaves out). Of Euclidean norm 1 over all of them together;
            it is brought to that, with a warning, if it is not.
        method: "jvp", forward-mode differentiation, exact to rounding; or "fd", a central difference (two forwards; a
            relative error of about 1e-3 in float32 where the logits are smooth along it and at most 1e3). A model
            without forward mode falls back to "fd" with a warning.
        logits: how to get logits, `logits(model, inputs)`; None: `model(inputs)`.
        fd_step: the step of "fd" in units of v; None: chosen so that the logits change well above rounding.

    Returns:
        The slopes, of the shape of the logits.

    Raises:
        ValueError: fewer than two classes, no sample, or a direction that is zero or does not fit the parameters.
        FloatingPointError: the direction, the logits or the slopes hold NaN or infinity.

    Source:
        Sao 2026, arXiv 2603.13552.
    """
    if method not in get_args(SlopeMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(SlopeMethod))}; got {method!r}")
    check_nonempty(inputs)
    function = LogitFunction(model, logits)
    tangents = named_direction(function.model, direction)
    length = euclidean(tangents.values())
    if not math.isfinite(length):
        raise FloatingPointError("direction must be finite, got NaN or infinity")
    if length == 0:
        raise ValueError("direction must not be zero")
    if abs(length - 1) > 1e-3:
        warnings.warn(f"direction has norm {length:.6g} and is divided by it; it must be a unit vector", stacklevel=2)
    tangents = {name: tangent / length for name, tangent in tangents.items()}
    parameters = {name: value.detach() for name, value in function.model.named_parameters()}
    if method == "jvp":
        return function.slopes(parameters, tangents, inputs, fd_step)
    return function.difference(parameters, tangents, inputs, fd_step)


@dataclass(frozen=True)
class Call:
    """Inputs of a model that are both positional and keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LogitFunction:
    """The map from parameters to logits.

    Args:
        model: the network; under DistributedDataParallel or `torch.compile`, the module within is used.
        logits: how to get logits, `logits(model, inputs)`; None: `model(inputs)`.
    """

    def __init__(self, model: nn.Module, logits: Logits | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if logits is not None and not callable(logits):
            raise TypeError(f"logits must be a function of (model, inputs), got {type(logits).__name__}")
        self.model = inner_module(model)
        self.custom = logits
        self.warned = False
        self._through = None if logits is None else _Through(self.model, logits)

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Any) -> Float[Tensor, "*samples classes"]:
        """Logits at parameters (those not given: as they are), in eval mode; buffers are copies, nothing is changed."""
        values = dict(parameters)
        wide = next((value.dtype for value in values.values()), None)
        if self._widened(parameters):  # then all is to be float32
            rest = {name: p.detach() for name, p in self.model.named_parameters() if name not in values}
            values |= {name: _at_least_float32(value) for name, value in rest.items()}
            inputs = _cast(inputs, torch.float32)
        values |= {name: _like(buffer, wide) for name, buffer in self.model.named_buffers()}
        target, prefix = (self.model, "") if self._through is None else (self._through, "model.")
        arguments, keywords = ((inputs,), {}) if self._through is not None else as_call(inputs)
        with evaluation(self.model), _without_autocast(values.values()), _same_random_numbers(values.values()):
            output = functional_call(
                target, {prefix + name: value for name, value in values.items()}, arguments, keywords
            )
        return logits_of(output)

    def _widened(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether parameters of low precision are replaced by wider ones."""
        name = next(iter(parameters), None)
        return name is not None and parameters[name].itemsize > self.model.get_parameter(name).itemsize

    def slopes(
        self,
        parameters: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor],
        inputs: Any,
        fd_step: float | None = None,
    ) -> Float[Tensor, "*samples classes"]:
        """Derivative of the logits along `tangents`, by forward mode, or else by `difference`."""
        try:
            _, found = self.forward_mode(parameters, tangents, inputs)
        except (RuntimeError, NotImplementedError) as error:
            found = self.difference(parameters, tangents, inputs, fd_step)  # the user's own errors come up here, too
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"{type(self.model).__name__} has no forward-mode derivative, so finite differences are used "
                    f"(method='fd'): {str(error).strip().splitlines()[0]}",
                    stacklevel=3,
                )
            return found
        return check_finite("slopes", found)

    def forward_mode(
        self, parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor], inputs: Any
    ) -> tuple[Float[Tensor, "*samples classes"], Float[Tensor, "*samples classes"]]:
        """Logits and their derivative, in one pass."""
        with torch.no_grad(), forward_ad.dual_level(), _forward_mode_kernels():
            duals = {
                name: forward_ad.make_dual(value, tangents[name].to(value.dtype)) if name in tangents else value
                for name, value in parameters.items()
            }
            primal, tangent = forward_ad.unpack_dual(self(duals, inputs))
        check_finite("logits", primal)
        return primal.detach(), torch.zeros_like(primal) if tangent is None else tangent.detach()

    def difference(
        self, parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor], inputs: Any, step: float | None = None
    ) -> Float[Tensor, "*samples classes"]:
        """Derivative of the logits along `tangents`, by a central difference; in float32 at least."""
        parameters = {name: _at_least_float32(value) for name, value in parameters.items()}
        tangents = {name: tangent.to(parameters[name].dtype) for name, tangent in tangents.items()}
        length, own = euclidean(tangents.values()), euclidean(parameters[name] for name in tangents)
        epsilon = max(torch.finfo(value.dtype).eps for value in parameters.values())
        wanted = wanted_change(epsilon, 0.0)  # of a gap: far above rounding, far below the radius
        alpha = step if step is not None else 1e-4 * max(1.0, own) / length
        most = 0.1 * max(1.0, own) / length
        change = torch.zeros(0)
        with torch.no_grad():
            for _ in range(8):
                ahead, behind = (
                    self({**parameters, **{n: parameters[n] + sign * alpha * t for n, t in tangents.items()}}, inputs)
                    for sign in (1, -1)
                )
                change = check_finite("logits", ahead - behind)
                wanted = wanted_change(epsilon, float(ahead.abs().max()))
                gap = float((change.amax(-1) - change.amin(-1)).max()) / 2
                if step is not None or wanted / 10 <= gap <= 10 * wanted or (gap < wanted and alpha >= most):
                    break
                alpha = min(most, alpha * min(1e3, max(1e-3, wanted / max(gap, 1e-30))))
        return check_finite("slopes", change.div(2 * alpha))


def wanted_change(epsilon: float, size: float, central: bool = True) -> float:
    """The change of logits of this size at which rounding and curvature weigh about the same in a difference."""
    relative = epsilon * max(1.0, size / LARGE)
    return min(1.0, 3 * relative ** (1 / 3) if central else 15 * math.sqrt(relative))


class _Through(nn.Module):
    """The user's function of the model, as a module, so that its parameters can be replaced in the call."""

    def __init__(self, model: nn.Module, logits: Logits) -> None:
        super().__init__()
        self.model = model
        self.logits = logits

    def forward(self, inputs: Any) -> Tensor:
        return self.logits(self.model, inputs)


def inner_module(model: nn.Module) -> nn.Module:
    """The module within DistributedDataParallel and `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, or `.logits`.

    Raises:
        TypeError: it holds no tensor of real numbers.
        ValueError: fewer than two classes, or no sample.
    """
    if not isinstance(output, Tensor):
        output = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model must return logits, or an output with .logits; got {type(output).__name__}. Pass "
            "logits=function(model, inputs) to say where they are"
        )
    if not output.is_floating_point():
        raise TypeError(f"logits must be real floating-point numbers, got {output.dtype}")
    if output.ndim < 2:
        raise ValueError(
            f"logits must have the shape (samples, ..., classes), got {tuple(output.shape)}; pass "
            "logits=function(model, inputs) if the model returns something else"
        )
    check_classes("logits", output)
    if not output.numel():
        raise ValueError(f"inputs must hold at least one sample, got logits of shape {tuple(output.shape)}")
    return output


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model."""
    return (inputs.args, inputs.kwargs) if isinstance(inputs, Call) else as_arguments(inputs)


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Call):
        yield from tensors_in((inputs.args, inputs.kwargs))
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from tensors_in(value)
    elif isinstance(inputs, list | tuple):
        for value in inputs:
            yield from tensors_in(value)


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """The same structure, with `function` of every tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(function, value) for key, value in inputs.items()}
    if isinstance(inputs, Call):
        return Call(map_tensors(function, inputs.args), map_tensors(function, inputs.kwargs))
    if isinstance(inputs, list | tuple):
        return type(inputs)(map_tensors(function, value) for value in inputs)
    return inputs


def check_nonempty(inputs: Any) -> None:
    """Raise ValueError for a tensor without samples."""
    first = next(tensors_in(inputs), None)
    if first is not None and first.ndim and not first.shape[0]:
        raise ValueError(f"inputs must hold at least one sample, got a tensor of shape {tuple(first.shape)}")


def check_finite(name: str, values: Tensor) -> Tensor:
    """`values`, or FloatingPointError if they hold NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"{name} hold NaN or infinity")
    return values


def named_direction(model: nn.Module, direction: Direction) -> dict[str, Tensor]:
    """The direction by names of parameters; a parameter used under several names counts once.

    Raises:
        ValueError: a name, a count or a shape that does not fit the model's parameters.
    """
    parameters = dict(model.named_parameters())
    if isinstance(direction, Mapping):
        aliases = {id(value): name for name, value in parameters.items()}
        every = dict(model.named_parameters(remove_duplicate=False))
        if unknown := [name for name in direction if name not in every]:
            raise ValueError(f"direction: the model has no parameter {unknown[0]!r}")
        found = {aliases[id(every[name])]: tangent for name, tangent in direction.items()}
    else:
        trainable = [name for name, value in parameters.items() if value.requires_grad]
        given = list(direction)
        if len(given) != len(trainable):
            raise ValueError(
                f"direction must hold one tensor for each of the model's {len(trainable)} trainable parameters, got "
                f"{len(given)}"
            )
        found = dict(zip(trainable, given, strict=True))
    if not found:
        raise ValueError("direction must hold at least one tensor")
    for name, tangent in found.items():
        if tangent.shape != parameters[name].shape:
            raise ValueError(
                f"direction must follow the order of the parameters: {name} has shape {tuple(parameters[name].shape)}, "
                f"got {tuple(tangent.shape)}"
            )
        if tangent.is_complex() or parameters[name].is_complex():
            raise TypeError(f"direction and parameters must be real, got {tangent.dtype} for {name}")
    return {name: tangent.detach() for name, tangent in found.items()}


def euclidean(tensors: Any) -> float:
    """Euclidean norm over all tensors together."""
    values = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not values:
        return 0.0
    return float(torch.stack([torch.linalg.vector_norm(v.float() if v.itemsize < 4 else v).double().cpu()
                              for v in values]).norm())  # fmt: skip


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, each set back to what it was."""
    switched = [module for module in model.modules() if module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def _forward_mode_kernels() -> Iterator[None]:
    """Attention by kernels that have forward-mode derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _without_autocast(values: Any) -> Any:
    device = next((value.device.type for value in values), "cpu")
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@contextmanager
def _same_random_numbers(values: Any) -> Iterator[None]:
    """A model that draws in eval mode draws the same at every call, and the user's stream stays where it is."""
    devices = {value.device for value in values if value.device.type == "cuda"}
    states = [(torch.cuda.default_generators[d.index or 0], torch.cuda.get_rng_state(d)) for d in devices]
    states.append((torch.default_generator, torch.get_rng_state()))
    for generator, _ in states:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _like(buffer: Tensor, dtype: torch.dtype | None) -> Tensor:
    wide = dtype is not None and dtype.itemsize >= 4 and buffer.is_floating_point() and buffer.dtype.itemsize < 4
    return buffer.detach().to(dtype) if wide else buffer.detach().clone()


def _at_least_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() and x.dtype.itemsize < 4 else x, inputs)
