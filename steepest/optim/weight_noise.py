"""Weights with noise: the blocks in which an optimizer's parameters are a sample."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from steepest._checks import check_int
from steepest.optim.checks import NonFinite, check_parameter
from steepest.optim.pieces import Row, alike, blocks, mixed_seed, restore
from steepest.optim.placement import is_sharded
from steepest.optim.prediction import Prediction


class WeightNoise(Optimizer, Prediction):
    """An optimizer whose parameters are sampled around their mean m.

    A subclass says how large the noise is (`_perturb`) and what becomes of the gradients of a sample (`_gather`). The
    parameters hold m, but for the inside of a `sampled_params` block.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        samples: int,
        antithetic: bool,
        generator: torch.Generator | None,
        nonfinite: NonFinite,
        maximize: bool,
        foreach: bool | None,
    ) -> None:
        check_int("samples", samples)
        if not isinstance(antithetic, bool):
            raise TypeError(f"antithetic must be True or False, got {antithetic!r}")
        if antithetic and samples % 2:
            raise ValueError(
                f"samples must be even when antithetic=True, since the noise comes in pairs; got {samples}"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if foreach is not None and not isinstance(foreach, bool):
            raise TypeError(f"foreach must be True, False or None, got {foreach!r}")
        self.samples, self.antithetic, self.foreach = samples, antithetic, foreach
        self._forget()
        self._where: str | None = None
        self._buffers: dict[Tensor, Tensor] = {}
        self._predictions = 0
        seed = 0
        if generator is not None:
            seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        own = {"nonfinite": nonfinite, "maximize": maximize, "seed": seed, "draws": 0, "skipped_steps": 0}
        super().__init__(params, {**defaults, **own})

    # What a subclass says.

    @abstractmethod
    def _check(self, group: dict[str, Any], where: str) -> None:
        """Raise unless the settings of a group are right."""

    def _noise_state(self, group: dict[str, Any], parameter: Tensor, create: bool) -> Row:
        """The tensors, shaped like the parameter, that `_perturb` needs; without `create`, nothing is stored."""
        return ()

    @abstractmethod
    def _perturb(
        self, group: dict[str, Any], parameters: list[Tensor], noise: list[Tensor], *state: list[Tensor]
    ) -> None:
        """Add noise to the parameters, given standard noise, which may be overwritten."""

    def _draw(self, group: dict[str, Any], like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard noise."""
        return torch.empty_like(like).normal_(generator=generator)

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; all or nothing: a group that is refused leaves the optimizer as it was."""
        if self._where is not None or self._count:
            raise RuntimeError("a group cannot be added between the first sample of a step and the step")
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            if before:
                group.update({key: self.param_groups[0][key] for key in ("seed", "draws", "skipped_steps")})
            self._check_group(group, before)
            for parameter in group["params"]:
                self._check_one(parameter)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        where = f"of parameter group {index} " if index else ""
        self._check(group, where)
        if group["nonfinite"] not in get_args(NonFinite):
            raise ValueError(
                f"nonfinite {where}must be one of {', '.join(get_args(NonFinite))}; got {group['nonfinite']!r}"
            )
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"maximize {where}must be True or False, got {group['maximize']!r}")

    def _check_one(self, parameter: Tensor) -> None:
        check_parameter(parameter)
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameters must be float32 or float64, got {parameter.dtype}, in which small noise is rounded away; "
                "keep the parameters in float32 and run the model under torch.autocast"
            )
        if is_sharded(parameter):
            raise TypeError("parameters must be ordinary tensors, got a DTensor; use DistributedDataParallel")

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has left out."""
        return self.param_groups[0]["skipped_steps"]

    @property
    def collected(self) -> int:
        """How many samples of the next step are there."""
        return self._count

    # Sampling.

    @contextmanager
    def sampled_params(
        self, train: bool = False, *, noise: Sequence[Tensor] | None = None, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """A block in which the parameters are a sample; after it they are the mean again, bit for bit.

        Args:
            train: whether the block is one of the `samples` of the next step: the gradient that its backward passes
                leave in `.grad` is the gradient of this sample. Else the block is for prediction: no gradient and no
                state changes, and the noise of later steps does not, either.
            noise: standard noise to use instead of a draw: one tensor per sampled parameter, in their order.
            generator: source of the noise of a prediction; None: a function of the seed and of the step.

        Raises:
            RuntimeError: a block in a block, or more training blocks before a step than `samples`.
            ValueError: noise of other shapes than the parameters.
        """
        if self._where is not None:
            raise RuntimeError(f"the parameters are sampled already, in a block of {self._where}")
        if train and self._count == self.samples:
            raise RuntimeError(
                f"all samples ({self.samples}) of this step are collected: call step(), or discard() to leave them "
                "out. Build the optimizer with samples=... to average over more"
            )
        if train and generator is not None:
            raise ValueError("generator is for predictions; the noise of training follows from the optimizer's seed")
        for index, group in enumerate(self.param_groups):
            self._check_group(group, index)
        active = [p for group in self.param_groups for p in group["params"] if p.requires_grad or p in self.state]
        if train:
            active = [parameter for parameter in active if parameter.requires_grad]
            if self._count and [id(p) for p in active] != [id(p) for p in self._active]:
                raise RuntimeError("requires_grad of a parameter changed between the samples of a step")
            if not active:
                raise RuntimeError("no parameter requires a gradient")
            self._active = active
        given = self._given_noise(noise, active)
        seed, sign = self._next_seed(train)
        if generator is not None:
            seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        saved = self._buffers if train else {}
        done: list[tuple[list[Tensor], list[Tensor]]] = []
        self._where = "training" if train else "prediction"
        try:
            with torch.no_grad():
                self._add_noise(active, saved, done, given, seed, sign, train)
            yield
        except BaseException:
            with torch.no_grad():
                restore(done)
            self._where = None
            raise
        with torch.no_grad():
            try:
                if train:
                    self._close(done)
            finally:
                restore(done)
                self._where = None
            if train:
                self._gather(saved)

    def _given_noise(self, noise: Sequence[Tensor] | None, active: list[Tensor]) -> dict[Tensor, Tensor] | None:
        if noise is None:
            return None
        if [tuple(n.shape) for n in noise] != [tuple(p.shape) for p in active]:
            raise ValueError(
                f"noise must have the shapes of the parameters, {[tuple(p.shape) for p in active]}, got "
                f"{[tuple(n.shape) for n in noise]}"
            )
        return {p: n.detach().to(p.device, p.dtype) for p, n in zip(active, noise, strict=True)}

    def _next_seed(self, train: bool) -> tuple[int, float]:
        """Seed and sign of the next noise. Predictions have a stream of their own, which begins anew at each step."""
        first = self.param_groups[0]
        if not train:
            self._predictions += 1
            return mixed_seed(mixed_seed(first["seed"], first["draws"]), -self._predictions), 1.0
        self._predictions = 0
        second = self.antithetic and self._count % 2 == 1
        for group in self.param_groups:
            group["draws"] += not second
        return mixed_seed(first["seed"], first["draws"]), -1.0 if second else 1.0

    def _add_noise(
        self,
        active: list[Tensor],
        saved: dict[Tensor, Tensor],
        done: list[tuple[list[Tensor], list[Tensor]]],
        given: dict[Tensor, Tensor] | None,
        seed: int,
        sign: float,
        train: bool,
    ) -> None:
        wanted = {id(parameter) for parameter in active}
        generators: dict[tuple[torch.device, int], torch.Generator] = {}
        work = []
        for group in self.param_groups:
            rows = []
            for parameter in group["params"]:
                if id(parameter) not in wanted or parameter.numel() == 0:
                    continue
                self._check_one(parameter)
                buffer = saved.get(parameter)
                if buffer is None or not alike(buffer, parameter):
                    buffer = saved[parameter] = torch.empty_like(parameter, requires_grad=False)
                row = (parameter.detach(), buffer, *self._noise_state(group, parameter, train))
                rows.append(row if given is None else (*row, given[parameter]))
            work.append((group, rows))
        for group, rows in work:
            for parameters, means, *state in blocks(rows, self.foreach):
                torch._foreach_copy_(means, parameters)
                done.append((parameters, means))
                if given is None:
                    noise = [self._draw(group, p, self._generator(generators, p, seed)) for p in parameters]
                else:
                    noise = [tensor.clone() for tensor in state.pop()]
                if sign < 0:
                    torch._foreach_neg_(noise)
                self._perturb(group, parameters, noise, *state)

    @staticmethod
    def _generator(known: dict[tuple[torch.device, int], torch.Generator], like: Tensor, seed: int) -> torch.Generator:
        key = (like.device, like.itemsize)
        if key not in known:
            number = 16 * (like.device.index or 0) + like.itemsize
            known[key] = torch.Generator(like.device).manual_seed(mixed_seed(seed, number) >> 1)
        return known[key]

    @staticmethod
    def _close(done: list[tuple[list[Tensor], list[Tensor]]]) -> None:
        """Put the means back, and keep in their place the noise that was there."""
        while done:
            parameters, means = done[-1]
            noise = torch._foreach_sub(parameters, means)
            torch._foreach_copy_(parameters, means)
            done.pop()
            torch._foreach_copy_(means, noise)

    def _buffer(self, parameter: Tensor, name: str, value: float) -> Tensor:
        """A tensor of the state, made full of `value` when it is first asked for."""
        state = self.state[parameter]
        buffer = state.get(name)
        if buffer is None:
            buffer = state[name] = torch.full_like(parameter, value, requires_grad=False)
        elif buffer.dtype != parameter.dtype or buffer.device != parameter.device:  # the model has moved since
            buffer = state[name] = buffer.to(parameter.device, parameter.dtype)
        return buffer

    def _forget(self) -> None:
        self._count = 0
        self._active: list[Tensor] = []
        self._gradients: dict[Tensor, Tensor] = {}
        self._sums: dict[Tensor, Tensor] = {}

    def discard(self) -> None:
        """Leave out the samples that were collected since the last step."""
        if self._where is not None:
            raise RuntimeError("discard() inside a sampled_params block; leave the block first")
        self._forget()

    @abstractmethod
    def _gather(self, noise: dict[Tensor, Tensor]) -> None:
        """Take the gradients of a sample, given its noise."""

    # State.

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: all but the samples of an unfinished step, whose gradients torch does not copy, either."""
        own = ("samples", "antithetic", "foreach", "_predictions")
        fresh = {"_count": 0, "_active": [], "_gradients": {}, "_sums": {}, "_where": None, "_buffers": {}}
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}, **fresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Collected samples are left out.

        Raises:
            ValueError: it comes from other groups or shapes, or holds wrong settings; nothing is changed then.
            RuntimeError: inside a block.
        """
        if self._where is not None:
            raise RuntimeError("load_state_dict() inside a sampled_params block; leave the block first")
        missing = {"state", "param_groups"} - set(state_dict)
        if missing and not self._optimizer_load_state_dict_pre_hooks:
            raise ValueError(
                f"state_dict must hold 'state' and 'param_groups', got {', '.join(map(str, state_dict)) or 'nothing'}"
            )
        super().load_state_dict(state_dict)
        self._forget()
        self._predictions = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" not in state:  # from load_state_dict, after its hooks, before anything is changed
            for index, (group, own) in enumerate(zip(state["param_groups"], self.param_groups, strict=True)):
                group.update({**own, **group})
                self._check_group(group, index)
                for parameter in group["params"]:
                    for name, value in state["state"].get(parameter, {}).items():
                        if isinstance(value, Tensor) and value.shape != parameter.shape:
                            raise ValueError(
                                f"state_dict has a {name} of shape {tuple(value.shape)} for a parameter of shape "
                                f"{tuple(parameter.shape)} in group {index}"
                            )
        super().__setstate__(state)
