"""`PolyStepTrainer`: PolyStep on a network and its batches as a stepper, for `steepest.run`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steepest.gradient_free.network_loss import NetworkLoss
from steepest.gradient_free.polystep import PolyStep
from steepest.loop import Resumable


class PolyStepTrainer(Resumable):
    """Trains a network by `PolyStep`, a minibatch a step; `run` adds progress, records, checkpoints and resume.

    The metrics of a step are those of `PolyStep`, and ``evaluations`` so far.

    Args:
        model: the network. Frozen parameters and buffers stay as they are.
        loss_fn: ``loss_fn(output, targets)``, one number.
        batches: pairs of inputs and targets: a list, which is cycled through; an endless iterator, such as
            `steepest.data.Epochs`; or anything that can be iterated again (a DataLoader). A list resumes exactly where
            it was, and so does what has a `state_dict`; anything else begins anew.
        train: evaluate in training mode; see `NetworkLoss`.
        options: those of `PolyStep`.

    Attributes:
        optimizer: the `PolyStep`.
        steps: how many steps were made.

    Raises:
        TypeError, ValueError: an argument that is not as described.

    Examples:
        >>> x = torch.randn(96, 3)
        >>> y = (x[:, 0] > 0).long()
        >>> model = nn.Linear(3, 2)
        >>> batches = list(zip(x.split(32), y.split(32)))
        >>> trainer = PolyStepTrainer(model, nn.functional.cross_entropy, batches, step_radius=0.5, subspace="full")
        >>> result = trainer.run(30, progress=False)
        >>> result.history["loss"][-1] < result.history["loss"][0]
        True
    """

    _state: ClassVar[tuple[str, ...]] = ("optimizer", "weights", "steps")

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[tuple[Any, Any]],
        *,
        train: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of pairs (inputs, targets), got {type(batches).__name__}")
        if isinstance(batches, Sequence) and not batches:
            raise ValueError("batches must hold at least one pair (inputs, targets), got an empty list")
        self.loss = NetworkLoss(model, loss_fn, train=train)
        self.optimizer = PolyStep(model, **options)
        self.batches = batches
        self.steps = 0
        self._iterator: Iterator[tuple[Any, Any]] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters of the model, by name."""
        return {name: p.detach() for name, p in self.loss.population.model.named_parameters()}

    @weights.setter
    def weights(self, saved: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.loss.population.model.named_parameters():
                p.copy_(saved[name])

    def _names(self) -> tuple[str, ...]:
        return (*super()._names(), "batches") if hasattr(self.batches, "state_dict") else super()._names()

    def step(self) -> Mapping[str, Any]:
        """One step of the optimizer on the next minibatch.

        Raises:
            ValueError: the batches are empty.
        """
        inputs, targets = self._next()
        self.optimizer.step(self.loss.on(inputs, targets))
        self.steps += 1
        return {**self.optimizer.metrics, "evaluations": self.optimizer.evaluations}

    def _next(self) -> tuple[Any, Any]:
        if isinstance(self.batches, Sequence):
            return self.batches[self.steps % len(self.batches)]
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self.batches)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
        raise ValueError("batches gave no pair (inputs, targets): it is empty, or an iterator that has ended")
