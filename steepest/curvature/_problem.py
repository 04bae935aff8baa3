"""A scalar or tensor function of flat parameters at a fixed point: what the products differentiate."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

Loss = Callable[[Any, Any], Tensor]


class Point:
    """Where a curvature is taken: copies of some tensors, in one order, and their flat form.

    Args:
        tensors: The tensors; copied.
        dtype: Type to compute in; if None that of the tensors, and float32 for narrower ones.
        names: For messages.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None, names: Sequence[str]) -> None:
        if not tensors:
            raise ValueError("there is nothing to differentiate: no parameter requires a gradient")
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.is_complex():
                raise TypeError(f"{name} is {tensor.dtype}: curvature is of real parameters only")
            if not tensor.is_floating_point():
                raise TypeError(f"{name} must be floating, got {tensor.dtype}")
        if len({tensor.device for tensor in tensors}) > 1:
            raise ValueError("all parameters must be on one device")
        self.device = tensors[0].device
        self.cast = dtype
        self.tensors = [self.convert(t.detach()).clone().requires_grad_(True) for t in tensors]
        self.dtype = self.tensors[0].dtype
        for tensor in self.tensors:
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        self.shapes = [t.shape for t in self.tensors]
        self.sizes = [t.numel() for t in self.tensors]
        self.size = sum(self.sizes)
        if self.size == 0:
            raise ValueError("there is nothing to differentiate: the parameters have no entries")

    def convert(self, tensor: Tensor) -> Tensor:
        """`tensor` in the type of the computation; integers stay."""
        if not tensor.is_floating_point():
            return tensor
        if self.cast is not None:
            return tensor.to(self.cast)
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector of tensors in the order of the parameters; None counts as zeros."""
        if len(tensors) != len(self.shapes):
            raise ValueError(f"expected {len(self.shapes)} tensors, got {len(tensors)}")
        parts = []
        for tensor, shape in zip(tensors, self.shapes, strict=True):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"expected a tensor of shape {tuple(shape)}, got {tuple(tensor.shape)}")
            part = torch.zeros(shape, device=self.device) if tensor is None else tensor.detach()
            parts.append(part.reshape(-1).to(self.device, self.dtype))
        return torch.cat(parts)

    def flatten_rows(self, tensors: Sequence[Tensor | None], k: int) -> Tensor:
        """(k, n) of tensors (k, *shape)."""
        parts = []
        for tensor, size in zip(tensors, self.sizes, strict=True):
            if tensor is None:
                parts.append(torch.zeros(k, size, dtype=self.dtype, device=self.device))
            else:
                parts.append(tensor.detach().reshape(k, size).to(self.dtype))
        return torch.cat(parts, 1)

    def unflatten_rows(self, rows: Tensor) -> list[Tensor]:
        """Tensors (k, *shape) of (k, n)."""
        pieces = rows.split(self.sizes, 1)
        return [piece.reshape(len(rows), *t.shape).to(t.dtype) for piece, t in zip(pieces, self.tensors, strict=True)]


class ModelPoint(Point):
    """The trainable parameters of a module. Reading it runs the module on copies: nothing of it changes.

    Args:
        model: The module.
        params: Which parameters: names, or the parameters themselves; all that require a gradient if None.
        train: Whether the module runs in train mode (batch statistics, dropout) instead of eval mode.
        seed: Of the random numbers that the module draws; every product sees the same.
        dtype: See `Point`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[str] | Iterable[Tensor] | None,
        *,
        train: bool,
        seed: int,
        dtype: torch.dtype | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.train, self.seed = _bare(model), train, seed
        self.names = _select(self.model, params)
        known = dict(self.model.named_parameters())
        super().__init__([known[name] for name in self.names], dtype, self.names)
        chosen = set(self.names)
        fixed = {name: p for name, p in known.items() if name not in chosen}
        self.fixed = {name: self.convert(p.detach()).clone() for name, p in fixed.items()}
        self.buffers = {name: self.convert(b.detach()).clone() for name, b in self.model.named_buffers()}

    def call(self, tensors: Sequence[Tensor], inputs: Any, run: Callable[..., Any] | None = None) -> Any:
        """What the module gives at `tensors`, or `run(module, inputs)` with them in the module's place."""
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        values = {**self.fixed, **buffers, **dict(zip(self.names, tensors, strict=True))}
        with self._mode():
            if run is not None:
                return functional_call(
                    _Runner(self.model, run), {f"model.{k}": v for k, v in values.items()}, (self.cast_inputs(inputs),)
                )
            args, kwargs = as_arguments(self.cast_inputs(inputs))
            return functional_call(self.model, values, args, kwargs)

    def cast_inputs(self, inputs: Any) -> Any:
        """Inputs on the device of the parameters, in the type of the computation if it was converted."""

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.to(self.device)
            if leaf.is_floating_point() and (self.cast is not None or leaf.dtype in (torch.bfloat16, torch.float16)):
                return self.convert(leaf)
            return leaf

        return tree_map(place, inputs)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivatives
            torch.manual_seed(self.seed)
            try:
                for module, _ in modes:
                    module.training = self.train
                yield
            finally:
                for module, mode in modes:
                    module.training = mode


class _Runner(nn.Module):
    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, batch: Any) -> Any:
        return self.run(self.model, batch)


class Batches:
    """Data that can be walked through again and again, with the weight of each batch.

    Args:
        data: One (inputs, targets) batch, or an iterable of them. What can be walked through only once is kept.
        size: Number of examples of a batch; the first dimension of its first tensor if None.
        pairs: Whether a batch is a pair, so that `data` may be a single one.
    """

    def __init__(self, data: Any, size: Callable[[Any], float] | None = None, *, pairs: bool = True) -> None:
        if pairs and is_batch(data):
            data = [data]
        elif isinstance(data, Iterator):
            data = list(data)
        elif not isinstance(data, Iterable):
            raise TypeError(f"data must be (inputs, targets) or an iterable of such batches, got {type(data).__name__}")
        self.data: Iterable[Any] = data
        self.size = size or batch_size
        self.total = 0.0
        self.count = 0
        for batch in self.data:
            weight = float(self.size(batch))
            if not weight > 0:
                raise ValueError(f"batch {self.count} of data is empty")
            self.total += weight
            self.count += 1
        if self.count == 0:
            raise ValueError("data is empty: at least one batch is needed")

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        for batch in self.data:
            yield batch, float(self.size(batch)) / self.total


def is_batch(data: Any) -> bool:
    """Whether `data` is one (inputs, targets) pair and not a sequence of pairs."""
    if isinstance(data, Tensor | Mapping):
        return True
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    return not all(isinstance(part, tuple | list) and len(part) == 2 for part in data)


def batch_size(batch: Any) -> float:
    """The first dimension of the first tensor in a batch; 1 without one."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return float(leaf.shape[0])
    return 1.0


def split_batch(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch must be (inputs, targets), got {type(batch).__name__}")
    return batch[0], batch[1]


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple of inputs is several arguments, a mapping is keywords, anything else one argument."""
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        return (), dict(inputs)
    return (inputs,), {}


def scalar(value: Any, what: str) -> Tensor:
    """`value`, which must be a real scalar tensor that depends on the parameters."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must give a scalar tensor, got {found}")
    if value.is_complex():
        raise TypeError(f"{what} must be real, got {value.dtype}")
    return value.reshape(())


def _bare(model: nn.Module) -> nn.Module:
    """The module within a compiled or a DDP one: neither can be differentiated twice."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _select(model: nn.Module, params: Iterable[Any] | None) -> list[str]:
    known = dict(model.named_parameters())
    if params is None:
        return [name for name, p in known.items() if p.requires_grad]
    if isinstance(params, str | Tensor):
        params = [params]
    chosen = []
    by_id = {id(p): name for name, p in known.items()}
    aliases = {name: by_id[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for param in params:
        if isinstance(param, str):
            if param not in aliases:
                raise ValueError(f"params: the model has no parameter {param!r}")
            name = aliases[param]
        elif id(param) in by_id:
            name = by_id[id(param)]
        else:
            raise ValueError("params: a tensor that is no parameter of the model")
        if name not in chosen:
            chosen.append(name)
    return chosen
