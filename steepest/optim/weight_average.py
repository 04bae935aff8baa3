"""The average of a model's weights over training: SWA, EMA, a tail, or the latest checkpoints."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from steepest.averages import IterateAverage, Kind
from steepest.averages.blocks import Precision

Buffers = Literal["present", "average"]


class WeightAverage:
    r"""Keeps an average of the weights while any optimizer trains the model, and swaps it in on demand.

    Call `update` after each step, or give the object to `steepest.run` as a callback. The kinds are those of
    `IterateAverage`: ``"mean"`` with `burn_in` and `every` is SWA, ``"ema"`` the exponential average, ``"suffix"`` the
    last part of a run of unknown length, ``"latest"`` LAWA. A tied parameter is averaged once. The model is not touched
    but inside `applied`.

    BatchNorm's statistics belong to the weights that they were collected with. `update_bn` collects those of the
    average; they are used by `applied` and `averaged_model` until the next `update`, and without them the statistics of
    the present weights stay, with a warning.

    Args:
        model: whose weights.
        kind: "mean", "ema", "suffix" or "latest".
        decay: of "ema", in [0, 1), or a function of the number of averages before. None: 0.999.
        bias_correction: of "ema": divide by the sum of the weights. False: begin at the first weights, as
            `torch.optim.swa_utils` does.
        fraction: of "suffix": which part of the run. None: 0.5.
        latest: of "latest": how many checkpoints, each stored. None: 5.
        burn_in: how many updates are left out at the start.
        every: average after one update in so many.
        parameters: names of the parameters to average, or patterns with ``*``; the others stay as they are. None: all.
        buffers: "present": buffers are not averaged. "average": floating-point ones are.
        precision: of the sums: "float64", or "compensated", in float32 at least, for devices without float64.
        nonfinite: weights with NaN or infinity: "raise", "skip" and count, or "ignore" (does not look).

    Attributes:
        average: the `IterateAverage`; its values are mappings from names to tensors.

    Raises:
        TypeError, ValueError: an argument is wrong, or no parameter is left.

    Source:
        Izmailov et al. 2018, arXiv 1803.05407 (SWA); Kaddour 2022, arXiv 2209.14981 (LAWA).

    Examples:
        >>> import torch
        >>> from steepest.optim import WeightAverage
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> average = WeightAverage(model, "mean")
        >>> for value in (1.0, 3.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     average.update()
        >>> with average.applied():
        ...     model(torch.ones(1, 2)).item()
        4.0
        >>> model(torch.ones(1, 2)).item()
        6.0
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "mean",
        *,
        decay: float | Callable[[int], float] | None = None,
        bias_correction: bool = True,
        fraction: float | None = None,
        latest: int | None = None,
        burn_in: int = 0,
        every: int = 1,
        parameters: Iterable[str] | None = None,
        buffers: Buffers = "present",
        precision: Precision = "float64",
        nonfinite: Literal["raise", "skip", "ignore"] = "raise",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if buffers not in get_args(Buffers):
            raise ValueError(f"buffers must be one of {', '.join(get_args(Buffers))}; got {buffers!r}")
        if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
            raise ValueError(f"model has parameters without a shape ({lazy[0]}): call it once before averaging")
        self.model, self.buffers = model, buffers
        self.average = IterateAverage(
            kind,
            decay=decay,
            bias_correction=bias_correction,
            fraction=fraction,
            latest=latest,
            burn_in=burn_in,
            every=every,
            precision=precision,
            nonfinite=nonfinite,
        )
        self._patterns = _patterns(parameters)
        self._statistics: dict[str, Tensor] | None = None
        self._inside = False
        if not any(self._wanted(name) for name, _ in model.named_parameters()):
            raise ValueError(
                "model has no parameters" if parameters is None else f"parameters match nothing: {self._patterns}"
            )
        for pattern in self._patterns or ():
            if not any(fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
                raise ValueError(f"parameters: no parameter of the model matches {pattern!r}")

    @property
    def count(self) -> int:
        """How many weights are in the average."""
        return self.average.count

    def update(self) -> None:
        """Look at the present weights.

        Raises:
            RuntimeError: inside `applied`, where the weights are the average.
            ValueError: a parameter was added, removed, or has another shape than before.
            FloatingPointError: the weights are not finite and ``nonfinite="raise"``; nothing was changed.
        """
        if self._inside:
            raise RuntimeError("update inside applied(): the weights are the average now, not those of training")
        before = self.average.counted
        self.average.update(self._tensors())
        if self.average.counted != before:
            self._statistics = None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """`update`, as a callback of `steepest.run`.

        Args:
            step: not looked at.
            metrics: not looked at.
        """
        self.update()

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """A block in which the model has the averaged weights; after it, it has its own again, bit for bit.

        The tensors are overwritten in place, so optimizers, tied weights and compiled models see them. What happens to
        them inside is lost.

        Raises:
            RuntimeError: nothing is averaged yet, or a block in a block.
        """
        if self._inside:
            raise RuntimeError("applied() inside applied(): the averaged weights are in place already")
        if self._statistics is None:
            self._warn_of_statistics()
        with self._swapped(self._statistics or {}):
            yield self.model

    def averaged_model(self) -> nn.Module:
        """A copy of the model that has the averaged weights.

        Raises:
            RuntimeError: nothing is averaged yet.
        """
        with self.applied():
            return copy.deepcopy(self.model)

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model of the same kind, or into the trained model itself, for good.

        Args:
            model: has parameters of the same names and shapes.

        Raises:
            RuntimeError: nothing is averaged yet.
            ValueError: a name is missing, or has another shape; nothing is changed then.
        """
        if self._inside and model is self.model:
            raise RuntimeError("copy_to inside applied(): what is written there is lost at its end")
        if self._statistics is None:
            self._warn_of_statistics()
        _write(model, {**self.average.value(), **(self._statistics or {})})

    @torch.no_grad()
    def update_bn(self, data: Iterable[Any], *, device: torch.device | str | None = None) -> None:
        """Collect BatchNorm's statistics for the averaged weights; the model's own stay as they are.

        The statistics are the plain mean over the batches of `data`. All other modules are in eval mode meanwhile:
        Dropout is off, as when the average is used.

        Args:
            data: batches: a tensor, a tuple or list that begins with the input, or a mapping of keyword arguments.
            device: where inputs are moved; None: to the device of the first parameter.

        Raises:
            RuntimeError: nothing is averaged yet.
            ValueError: there is no batch.
        """
        layers = [each for each in self.model.modules() if isinstance(each, _NormBase) and each.track_running_stats]
        if not layers:
            return
        where = next(self.model.parameters()).device if device is None else torch.device(device)
        modes = {module: module.training for module in self.model.modules()}
        momenta = {layer: layer.momentum for layer in layers}
        names = [name for name, _ in self.model.named_buffers()]
        own = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        batches = 0
        with self._swapped({}):
            try:
                self.model.eval()
                for layer in layers:
                    layer.reset_running_stats()
                    layer.momentum = None
                    layer.training = True
                for batch in data:
                    _forward(self.model, batch, where)
                    batches += 1
                found = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            finally:
                for module, mode in modes.items():
                    module.training = mode
                for layer, momentum in momenta.items():
                    layer.momentum = momentum
                _write(self.model, own)
        if not batches:
            raise ValueError("data must hold at least one batch")
        statistics = {f"{prefix}.{name}".lstrip(".") for prefix, layer in self.model.named_modules()
                      if layer in momenta for name, _ in layer.named_buffers(recurse=False)}  # fmt: skip
        self._statistics = {name: found[name] for name in names if name in statistics}

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sums and of the collected statistics; it can be loaded with ``weights_only=True``."""
        statistics = None if self._statistics is None else {n: each.clone() for n, each in self._statistics.items()}
        return {"average": self.average.state_dict(), "statistics": statistics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: of an average with the same options, over a model with the same names and shapes.

        Raises:
            ValueError: it does not fit; nothing is changed then.
        """
        if not isinstance(state, Mapping) or set(state) != {"average", "statistics"}:
            raise ValueError(f"state must have the entries ['average', 'statistics'], got {state!r:.60}")
        structure = state["average"].get("structure") if isinstance(state["average"], Mapping) else None
        if structure is not None:
            shapes = dict(zip(structure["names"], map(tuple, structure["shapes"]), strict=True))
            own = {name: tuple(each.shape) for name, each in self._tensors().items()}
            if shapes != own:
                odd = sorted(set(shapes.items()) ^ set(own.items()))[:3]
                raise ValueError(f"state is of a model with other parameters; it differs in {odd}")
        statistics = state["statistics"]
        self.average.load_state_dict(state["average"])
        self._statistics = None if statistics is None else {name: each.clone() for name, each in statistics.items()}

    def _wanted(self, name: str) -> bool:
        return self._patterns is None or any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _tensors(self) -> dict[str, Tensor]:
        """What is averaged: a tied parameter has one name."""
        found = {name: p.detach() for name, p in self.model.named_parameters() if self._wanted(name)}
        if self.buffers == "average":
            found |= {name: each for name, each in self.model.named_buffers() if each.is_floating_point()}
        return found

    @contextmanager
    def _swapped(self, buffers: Mapping[str, Tensor]) -> Iterator[None]:
        values = {**self.average.value(), **buffers}
        present = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        own = {name: present[name].detach().clone() for name in values if name in present}
        _write(self.model, values)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            _write(self.model, own)

    def _warn_of_statistics(self) -> None:
        if self.buffers == "average" or not any(
            isinstance(each, _NormBase) and each.track_running_stats for each in self.model.modules()
        ):
            return
        warnings.warn(
            "BatchNorm's statistics are those of the present weights, not of the average: call update_bn(data) before",
            UserWarning,
            stacklevel=4,
        )


def _patterns(parameters: Iterable[str] | None) -> tuple[str, ...] | None:
    if parameters is None:
        return None
    found = (parameters,) if isinstance(parameters, str) else tuple(parameters)
    if wrong := [each for each in found if not isinstance(each, str)]:
        raise TypeError(f"parameters must be names or patterns, got {type(wrong[0]).__name__}")
    return found


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    present: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in values.items():
        if name not in present or present[name].shape != value.shape:
            found = tuple(present[name].shape) if name in present else "nothing"
            raise ValueError(f"model must have {name!r} of the shape {tuple(value.shape)}, it has {found}")
    for name, value in values.items():
        present[name].copy_(value)


def _forward(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{name: each.to(device) if isinstance(each, Tensor) else each for name, each in batch.items()})
        return
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    model(inputs.to(device) if isinstance(inputs, Tensor) else inputs)
