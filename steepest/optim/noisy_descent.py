"""Steps along the mean of gradients that were taken at noisy weights."""

from abc import abstractmethod
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from steepest.optim.checks import first_nonfinite
from steepest.optim.pieces import Row, blocks
from steepest.optim.weight_noise import WeightNoise


class NoisyDescent(WeightNoise):
    """An optimizer that averages the gradients of `samples` draws of the weights for one step of the mean.

    A subclass says what else it sums over the samples (`_collect`) and how it moves (`_update`).
    """

    collects = False  # whether `_collect` has a sum of its own beside that of the gradients
    _step_supports_amp_scaling = True  # what is summed over samples is unscaled here, together with the gradients

    def _collect(self, group: dict[str, Any], sums: list[Tensor], gradients: list[Tensor], noise: list[Tensor]) -> None:
        """Add what belongs to one sample to `sums`."""

    def _update_state(self, group: dict[str, Any], parameter: Tensor) -> Row:
        """The tensors of the state that `_update` needs."""
        return ()

    @abstractmethod
    def _update(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        noise: list[Tensor],
        *state: list[Tensor],
    ) -> None:
        """Move the parameters. `noise`: of the one sample, or the mean of what was collected over several."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model, calls backward, and returns the loss; it is called once per sample, at noisy
                parameters. Without it, the samples come from `sampled_params(train=True)` blocks.

        Returns:
            The mean of the numbers that `closure` returned, what else it returned last, or None.

        Raises:
            RuntimeError: not `samples` samples were collected, none has a gradient, or this is inside a block.
            FloatingPointError: a gradient holds NaN or infinity and nonfinite="raise"; nothing was changed.
            TypeError: a gradient is sparse.
        """
        if self._where is not None:
            raise RuntimeError("step() inside a sampled_params block; leave the block first")
        for index, group in enumerate(self.param_groups):
            self._check_group(group, index)
        loss = None if closure is None else self._evaluate(closure)
        if self._count == 0:
            raise RuntimeError(
                "no sample was collected: compute gradients in `with optimizer.sampled_params(train=True):`, or pass a "
                "closure to step()"
            )
        if self._count < self.samples:
            raise RuntimeError(f"{self._count} of {self.samples} samples were collected; step() needs all of them")
        if all(parameter.grad is None for parameter in self._active):
            self._forget()
            raise RuntimeError("no parameter has a gradient; call backward() inside the sampled_params block")
        if not self._usable():
            self._forget()
            return loss
        active = {id(parameter) for parameter in self._active}
        for group in self.param_groups:
            chosen = [p for p in group["params"] if id(p) in active and p.numel()]
            self._before_update(group)
            rows = []
            for parameter in chosen:
                gradient = parameter.grad
                if gradient is None:  # unused in every sample
                    gradient = parameter.new_zeros(()).expand_as(parameter)
                noise = self._buffers[parameter] if self.samples == 1 else self._sums.get(parameter, gradient)
                rows.append((parameter.detach(), gradient, noise, *self._update_state(group, parameter)))
            for block in blocks(rows, self.foreach):
                self._update(group, *block)
        self._forget()
        return loss

    def _before_update(self, group: dict[str, Any]) -> None:
        """Called once per group and step."""

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        if self._count:
            raise RuntimeError(
                f"step() got a closure, but {self._count} samples are collected; call step() without one, or discard()"
            )
        losses = []
        try:
            for _ in range(self.samples):
                with self.sampled_params(train=True), torch.enable_grad():
                    loss = closure()
                losses.append(loss.detach() if isinstance(loss, Tensor) and self.samples > 1 else loss)
        except BaseException:
            self._forget()
            raise
        if len(losses) > 1 and all(isinstance(loss, Tensor | Real) for loss in losses):
            return sum(losses) / len(losses)
        return losses[-1]

    def _usable(self) -> bool:
        """Whether the gradients can be stepped on; scaled gradients are unscaled."""
        for parameter in self._active:
            _check_gradient(parameter)
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and float(found) > 0:
            return False
        gradients = [parameter.grad for parameter in self._active if parameter.grad is not None]
        if scale is not None:
            torch._foreach_mul_(gradients, 1 / float(scale))
            self._unscale(1 / float(scale))
        elif found is not None and self.samples > 1 and self.collects:
            self._forget()
            raise RuntimeError("with samples > 1, call scaler.step(optimizer) without scaler.unscale_(optimizer)")
        active = {id(parameter) for parameter in self._active}
        checked = [
            (group, position, parameter.grad)
            for group in self.param_groups
            if group["nonfinite"] != "ignore"
            for position, parameter in enumerate(group["params"])
            if parameter.grad is not None and id(parameter) in active
        ]
        bad = first_nonfinite([gradient for *_, gradient in checked])
        if bad is None:
            return True
        group, position, gradient = checked[bad]
        if group["nonfinite"] == "skip":
            for each in self.param_groups:
                each["skipped_steps"] += 1
            return False
        name = group["param_names"][position] if "param_names" in group else f"number {position} of its group"
        self._forget()
        raise FloatingPointError(
            f"the gradient of parameter {name} (shape {tuple(gradient.shape)}) holds NaN or infinity; nothing was "
            "changed. Lower lr, look for the cause, or pass nonfinite='skip' to leave such steps out"
        )

    def _unscale(self, factor: float) -> None:
        """Multiply what was collected over samples, as the gradients were by `factor`."""

    def _gather(self, noise: dict[Tensor, Tensor]) -> None:
        """Add a sample to the sums. The gradient of a single sample stays in `.grad`, where others may work on it."""
        for parameter in self._active:
            _check_gradient(parameter)
        self._count += 1
        if self.samples == 1:
            return
        if self.collects:
            for group in self.param_groups:
                rows = []
                for parameter in group["params"]:
                    if parameter.grad is None or parameter not in noise or not parameter.requires_grad:
                        continue
                    if parameter not in self._sums:
                        self._sums[parameter] = torch.zeros_like(parameter, requires_grad=False)
                    rows.append((self._sums[parameter], parameter.grad, noise[parameter]))
                for sums, gradients, values in blocks(rows, self.foreach):
                    self._collect(group, sums, gradients, values)
        for parameter in self._active:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and parameter in self._gradients:
                self._gradients[parameter].add_(gradient)
            elif gradient is not None:  # it may be a view of a bucket of DDP, or the user's own
                self._gradients[parameter] = gradient.detach().clone()
        if self._count == self.samples:
            for tensors in (self._gradients, self._sums):
                if tensors:
                    torch._foreach_mul_(list(tensors.values()), 1 / self.samples)
            for parameter, gradient in self._gradients.items():
                parameter.grad = gradient
            self._gradients = {}


def _check_gradient(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.layout != torch.strided:
        raise TypeError(
            f"gradients must be dense, got layout {gradient.layout} for a parameter of shape {tuple(parameter.shape)}"
        )
