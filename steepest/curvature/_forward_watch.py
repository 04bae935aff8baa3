"""What a model was last trained on, and the logits it gave, seen through hooks."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest.curvature.logit_slopes import Call

_MOST = 64  # forward passes between two steps that are kept


@dataclass
class Seen:
    """One forward pass.

    Attributes:
        inputs: a tensor, a tuple of arguments, a mapping of keywords, or a `Call`.
        versions: of the parameters, when it ran.
        logits: what came out, if it was kept; not for differentiation.
        logits_version: of the tensor that came out: it changes when the user writes into it.
        gives_loss: the model returned no logits, as one does that takes the targets, too.
        positions: samples per row of the logits.
    """

    inputs: Any
    versions: tuple[int, ...] = ()
    logits: Tensor | None = None
    logits_version: int = 0
    gives_loss: bool = False
    positions: int | None = None

    def base(self, versions: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The logits, if they are those of parameters of these versions, and as exact as `dtype`."""
        logits = self.logits
        if logits is None or versions != self.versions or logits.dtype != dtype:
            return None
        return logits if logits._version == self.logits_version else None

    def without_targets(self) -> Any:
        """The first argument alone."""
        inputs = self.inputs
        args, kwargs = (inputs.args, inputs.kwargs) if isinstance(inputs, Call) else ((), {})
        if isinstance(inputs, tuple):
            args = inputs
        elif isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        if args:
            return args[0]
        return dict([next(iter(kwargs.items()))]) if kwargs else inputs


class ForwardWatch:
    """Remembers the forward passes in train mode since the last step.

    Args:
        model: the model, without wrappers.
        outer: what the user calls: the model, or a wrapper around it.
        most: keep the logits of so many samples at most; None: of all.
    """

    def __init__(self, model: nn.Module, outer: nn.Module, most: int | None) -> None:
        self.model, self.outer, self.most = model, outer, most
        self.parameters = list(model.parameters())
        self.logits_module: str = ""  # where the logits come from; the model itself, or one within it
        self.active = True
        self.seen: list[Seen] = []
        self.versions_before: tuple[int, ...] = ()
        self._watch()

    def versions(self) -> tuple[int, ...]:
        """Counts of the changes in place of every parameter."""
        return tuple(parameter._version for parameter in self.parameters)

    def before_step(self) -> None:
        """The parameters are about to move."""
        self.versions_before = self.versions()

    def forget(self) -> None:
        """Forget the forward passes."""
        self.seen = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in here is not remembered."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model begins to run."""
        if not (self.active and module.training and torch.is_grad_enabled()):
            return
        inputs: Any = Call(args, kwargs)
        if not kwargs:
            inputs = args[0] if len(args) == 1 and not isinstance(args[0], tuple | Mapping) else args
        elif not args:
            inputs = kwargs
        self.seen = [*self.seen[1 - _MOST :], Seen(inputs, self.versions())]

    def leaving(self, module: nn.Module, output: Any, root: bool) -> None:
        """The model, or the module that gives its logits, has run."""
        if not (self.active and module.training and torch.is_grad_enabled() and self.seen):
            return
        seen = self.seen[-1]
        logits = getattr(output, "logits", output)
        is_logits = isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim >= 2
        if root:
            seen.gives_loss = isinstance(output, Tensor) and output.ndim == 0
        if not is_logits or seen.logits is not None or root == bool(self.logits_module):
            return
        positions = logits[0, ..., 0].numel() if len(logits) else 1
        keep = len(logits) if self.most is None else max(1, self.most // max(1, positions))
        kept = logits.detach()
        kept = kept if keep >= len(kept) else kept[:keep].clone()
        seen.positions, seen.logits, seen.logits_version = positions, kept, kept._version

    def find_logits(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """`evaluate()`; on the way, which module of a model that returned no logits gives them."""
        found: list[tuple[str, int, torch.Size]] = []

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    found.append((name, output.data_ptr(), output.shape))

            return hook

        handles = [m.register_forward_hook(note(name)) for name, m in self.model.named_modules() if name]
        try:
            logits = evaluate()
        finally:
            for handle in handles:
                handle.remove()
        same = [name for name, pointer, shape in found if pointer == logits.data_ptr() and shape == logits.shape]
        if same and any(seen.gives_loss for seen in self.seen):
            self.look_at(same[-1])
        return logits

    def look_at(self, name: str) -> None:
        """Take the logits from the module of that name."""
        if name != self.logits_module:
            self.logits_module = name
            self._watch()

    def _watch(self) -> None:
        if "_handles" in self.__dict__:
            _remove(self._handles)
        self._handles: list[Any] = [
            self.outer.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            self.outer.register_forward_hook(_Leave(self, True)),
        ]
        if self.logits_module:
            module = self.model.get_submodule(self.logits_module)
            self._handles.append(module.register_forward_hook(_Leave(self, False)))
        weakref.finalize(self, _remove, self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {**{k: v for k, v in self.__dict__.items() if k != "_handles"}, "seen": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()


class _Hook:
    """A module's hook. It does not keep the watch alive, and in a copy of the module it does nothing."""

    def __init__(self, watch: ForwardWatch | None = None, root: bool = True) -> None:
        self.watch = None if watch is None else weakref.ref(watch)
        self.root = root

    def get(self) -> ForwardWatch | None:
        return None if self.watch is None or torch.compiler.is_compiling() else self.watch()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self.get()
        if watch is not None:
            watch.entering(module, args, kwargs)


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        watch = self.get()
        if watch is not None:
            watch.leaving(module, output, self.root)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
