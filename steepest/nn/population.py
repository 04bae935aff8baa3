"""Many candidate weights of one network, evaluated together: what gradient-free training of networks stands on."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest.nn._population_forward import Forward, Tables
from steepest.nn._population_random import same_numbers as _same_numbers
from steepest.nn.population_changes import Entries, Span

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
Changes = Mapping[str, Tensor | Entries | Span]


class Population:
    """A network whose weights come as a batch: row b of `weights` is one candidate, all parameters in one vector.

    `outputs(w, x)[b] = f(x; w_b)` and `losses(w, ℓ, x, y)[b] = ℓ(f(x; w_b), y)`, with the same minibatch and the same
    random numbers for all candidates. The model's parameters and buffers are read and never written, but by `write`.
    There is no gradient.

    How the forward pass is batched follows the module tree. `nn.Sequential` is walked. The layers of `torch.nn` and
    `steepest.nn` that are known have batched forms (one matrix product for a stack of weights, grouped convolutions);
    a module of yours can bring its own, `population_forward(weights, x)`. Everything else
    goes through `torch.func.vmap`, and what that cannot batch through a loop over candidates.
    `fallbacks` says which modules those were.

    Args:
        model: The network. Its mode is as it was after each call.
        parameters: Names, or patterns with `*` and `?`, of the parameters to search; all if None. Frozen parameters
            (`requires_grad=False`) are left out, and tied ones count once.
        chunk_size: Candidates evaluated at once: bounds the memory. None chooses by the size of the layers.
        train: Evaluate in training mode (dropout with one mask for all candidates, batch statistics for each), without
            changing any buffer; in evaluation mode otherwise.

    Attributes:
        names: The parameters searched, in the order of the model.
        shapes: Their shapes.
        size: d, the number of weights.
        fallbacks: Modules without a batched form, with "vmap" or "loop"; filled by the evaluations.

    Raises:
        ValueError: there is no parameter to search, a name is unknown or frozen, or `chunk_size` is below 1.
        TypeError: a parameter is not real floating point, or `model` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: str | Iterable[str] | None = None,
        chunk_size: int | None = None,
        train: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if chunk_size is not None:
            check_int("chunk_size", chunk_size)
        self.model = model
        self.chunk_size = chunk_size
        self.train = train
        self._parameters = _chosen(model, parameters)
        self.names = tuple(self._parameters)
        self.shapes = tuple(p.shape for p in self._parameters.values())
        self._sizes = [p.numel() for p in self._parameters.values()]
        self.size = sum(self._sizes)
        self.fallbacks: dict[str, str] = {}
        self._forward = Forward(model, self.fallbacks)

    def __repr__(self) -> str:
        return f"Population({type(self.model).__name__}, parameters={len(self.names)}, size={self.size})"

    def vector(self) -> Float[Tensor, " d"]:
        """The present weights, flattened in the order of `names`: a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters.values()])

    @torch.no_grad()
    def write(self, vector: Float[Tensor, " d"]) -> None:
        """Put a vector into the model, in place.

        Raises:
            ValueError: it does not have the shape (d,). Nothing was changed.
        """
        if not isinstance(vector, Tensor) or vector.shape != (self.size,):
            shape = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(f"vector must have shape ({self.size},), one weight for each entry, got {shape}")
        for p, part in zip(self._parameters.values(), vector.detach().split(self._sizes), strict=True):
            p.copy_(part.reshape(p.shape))

    def outputs(self, weights: Float[Tensor, "*b d"] | Changes, inputs: Inputs, *, shared: bool = True) -> Tensor:
        """The network's output for every candidate, shape (b, ...).

        Args:
            weights: The candidates, shape (b, d); more leading dimensions, or none, as they come. Or how candidates
                differ from the present weights: a mapping from names of parameters to their values, shape
                (b, *shape), or to `Entries` or a `Span`. Parameters that are not named stay as they are, and layers
                before the first named one are evaluated once.
            inputs: What the model is called with: a tensor, a tuple of arguments, or a mapping of named arguments. The
                same for all candidates.
            shared: If False, `inputs` is a tensor (b, ...): each candidate has its own.

        Raises:
            ValueError: `weights` does not end in d, or changes do not fit the parameters or each other.
            TypeError: the model's output is not a tensor.
        """
        count = self._checked(weights)
        parts = self._in_chunks(weights, count, inputs, shared, lambda part: part)
        if not isinstance(parts[0], Tensor):
            raise TypeError(
                f"the model's output must be a tensor, got {type(parts[0]).__name__}; `losses` takes others"
            )
        found = torch.cat(parts)[:count]
        return found.reshape(*weights.shape[:-1], *found.shape[1:]) if isinstance(weights, Tensor) else found

    def losses(
        self,
        weights: Float[Tensor, "*b d"] | Changes,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Inputs,
        targets: Any = None,
    ) -> Float[Tensor, "*b"]:
        """The loss of every candidate on one minibatch.

        Args:
            weights: The candidates, see `outputs`.
            loss_fn: `loss_fn(output, targets)` gives one number for one candidate's output.
            inputs: See `outputs`.
            targets: Passed on to `loss_fn`.

        Raises:
            ValueError: `weights` does not end in d, or `loss_fn` does not give one number.
        """
        count = self._checked(weights)
        parts = self._in_chunks(weights, count, inputs, True, lambda part: self._forward.losses(loss_fn, part, targets))
        found = torch.cat(parts)[:count]
        return found.reshape(weights.shape[:-1]) if isinstance(weights, Tensor) else found

    def objective(
        self, loss_fn: Callable[[Any, Any], Tensor], inputs: Inputs, targets: Any = None
    ) -> Callable[[Tensor], Tensor]:
        """`losses` as a function of the weights alone, (..., N, d) to (..., N): what a search minimises."""
        return lambda weights: self.losses(weights, loss_fn, inputs, targets)

    def bind(self, weights: Float[Tensor, "b d"]) -> Callable[[Tensor], Tensor]:
        """The network with these candidates for many calls, such as a rollout: inputs (b, ...) to outputs (b, ...).

        Each candidate has its own input. The candidates are cut into parameters once, and are not worked through in
        chunks.

        Raises:
            ValueError: `weights` does not end in d; in a call, the input does not lead with b.
        """
        count = self._checked(weights)
        tables = self._tables(weights, 0, count)

        def call(inputs: Tensor) -> Tensor:
            if inputs.ndim < 1 or len(inputs) != count:
                raise ValueError(f"inputs must lead with {count}, one for each candidate, got {tuple(inputs.shape)}")
            with torch.no_grad(), _mode(self.model, self.train):
                return self._forward(tables, inputs, False)

        return call

    def _checked(self, weights: Tensor | Changes) -> int:
        """The number of candidates."""
        if isinstance(weights, Mapping):
            return self._checked_changes(weights)
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights must be a tensor of real floating point numbers, or a mapping, got {kind}")
        if weights.ndim < 1 or weights.shape[-1] != self.size:
            raise ValueError(
                f"weights must have shape (b, {self.size}), one candidate a row, got {tuple(weights.shape)}"
            )
        return weights.numel() // self.size

    def _checked_changes(self, changes: Changes) -> int:
        if not changes:
            raise ValueError("weights must name at least one parameter, got an empty mapping")
        for name, each in changes.items():
            if name not in self._parameters:
                raise ValueError(f"weights: {name!r} is not one of the parameters searched: {', '.join(self.names)}")
            shape = self._parameters[name].shape
            fits = each.shape[1:] == shape if isinstance(each, Tensor) else each.check(shape)
            if not fits:
                raise ValueError(f"weights: {name!r} must have candidates of shape {tuple(shape)}, got {each}")
        counts = {name: len(each) for name, each in changes.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"weights must have as many candidates for every parameter, got {counts}")
        return next(iter(counts.values()))

    def _in_chunks(
        self, weights: Tensor | Changes, count: int, inputs: Inputs, shared: bool, take: Callable[[Any], Any]
    ) -> list[Any]:
        """`take` of the outputs, some candidates at a time; at least one, so that empty input keeps its shape."""
        own = inputs if isinstance(inputs, Tensor) and not shared else None
        if not shared and (own is None or own.ndim < 1 or len(own) != count):
            found = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"inputs must be a tensor with {count} rows, one for each candidate, got {found}")
        if not count:
            weights = self.vector().unsqueeze(0)
            own = None if own is None else own.new_zeros(1, *own.shape[1:])
        group = 1 if isinstance(weights, Tensor) else _common(weights)
        chunk = max(self.chunk_size or self._automatic(inputs), group) // group * group
        like = next(iter(self._parameters.values()))
        found = []
        with torch.no_grad(), _mode(self.model, self.train), _same_numbers(like) as again:
            for start in range(0, max(count, 1), chunk):
                stop = min(start + chunk, max(count, 1))
                again()
                tables = self._tables(weights, start, stop)
                found.append(take(self._forward(tables, inputs if own is None else own[start:stop], own is None)))
        return found

    def _tables(self, weights: Tensor | Changes, start: int, stop: int) -> Tables:
        """Candidates cut into parameters, by the identity of the parameter."""
        if not isinstance(weights, Tensor):
            found = {}
            for name, each in weights.items():
                p = self._parameters[name]
                rows = each[start:stop] if isinstance(each, Tensor) else each.rows(start, stop)
                found[id(p)] = rows.detach().to(p) if isinstance(rows, Tensor) else rows.to(p)
            return found
        rows = weights.detach().reshape(-1, self.size)[start:stop]
        parts = rows.split(self._sizes, dim=1)
        return {
            id(p): (part.unflatten(1, p.shape) if p.ndim else part.squeeze(1)).to(p)
            for p, part in zip(self._parameters.values(), parts, strict=True)
        }

    def _automatic(self, inputs: Inputs) -> int:
        """As many candidates as keep the larger activations in a processor's cache, or a part of a GPU's memory."""
        units = _places(inputs) if isinstance(inputs, Tensor) else 1
        units *= math.prod(getattr(module, "expansion", 1) for module in self.model.modules())
        widest = max((shape[0] for shape in self.shapes if shape), default=1)
        on_cpu = next(iter(self._parameters.values())).device.type == "cpu"
        return max(1, (2**21 if on_cpu else 2**28) // (self.size + units * widest))


def _places(inputs: Tensor) -> int:
    """How often a layer's weights are used for these inputs: samples, times positions of a sequence or image."""
    shape = inputs.shape if inputs.ndim else (1,)
    if not inputs.is_floating_point():
        return inputs.numel()
    if len(shape) == 3:
        return shape[0] * max(shape[1:])
    return shape[0] * math.prod(shape[2:])


def _common(changes: Changes) -> int:
    """Candidates come in multiples of this."""
    return max(1, math.lcm(*(each.group for each in changes.values() if isinstance(each, Span))))


def _chosen(model: nn.Module, parameters: str | Iterable[str] | None) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters())
    if not known:
        raise ValueError(f"model {type(model).__name__} has no parameters to search")
    free = {name: p for name, p in known.items() if p.requires_grad}
    if parameters is not None:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        every = dict(model.named_parameters(remove_duplicate=False))
        asked = set()
        for pattern in patterns:
            hits = {id(p) for name, p in every.items() if fnmatchcase(name, pattern)}
            if not hits:
                raise ValueError(f"parameters: {pattern!r} matches none of {', '.join(known)}")
            if not hits & {id(p) for p in free.values()}:
                raise ValueError(f"parameters: {pattern!r} is frozen (requires_grad=False); set it free to search it")
            asked |= hits
        free = {name: p for name, p in free.items() if id(p) in asked}
    if not free:
        raise ValueError(f"model {type(model).__name__} has only frozen parameters: there is nothing to search")
    for name, p in free.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameters: {name!r} is not initialised; run the model once first")
        if not p.is_floating_point():
            raise TypeError(f"parameters: {name!r} must be real floating point, got {p.dtype}")
    return free


@contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = train
        yield
    finally:
        for module, training in before:
            module.training = training
