"""Predictions with noisy weights: averages over draws of the parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from steepest._checks import check_int


class Prediction(ABC):
    """What an optimizer whose parameters can be sampled offers for prediction."""

    param_groups: list[dict[str, Any]]

    @abstractmethod
    def sampled_params(
        self, train: bool = False, *, noise: Any = None, generator: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """A block in which the parameters are a sample."""

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """A draw of all sampled parameters, in their order, as new tensors; the model is not touched at the end."""
        with self.sampled_params(generator=generator):
            return [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def predict(
        self,
        forward: Callable[[], Tensor],
        samples: int = 10,
        *,
        softmax: bool = True,
        dim: int = -1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The mean of a model's predictions over draws of its parameters.

        Args:
            forward: computes the output (logits) at the present parameters, such as ``lambda: model(x)``, without
                gradients. Put the model in eval mode before, or the statistics of a BatchNorm move.
            samples: number of draws.
            softmax: whether probabilities are averaged (softmax over `dim`), or the outputs themselves.
            dim: the dimension of the classes.
            generator: source of the noise; see `sampled_params`.

        Returns:
            Probabilities, or mean outputs, of the shape of an output.
        """
        check_int("samples", samples)
        mean: Tensor | None = None
        for _ in range(samples):
            with self.sampled_params(generator=generator):
                output = forward()
            output = output.softmax(dim) if softmax else output
            mean = output / samples if mean is None else mean.add_(output, alpha=1 / samples)
        assert mean is not None
        return mean

    def update_bn(self, model: nn.Module, data: Iterable[Any], *, sampled: bool = False) -> None:
        """Compute the statistics of all BatchNorm layers anew: training leaves in them those of noisy parameters.

        Args:
            model: the model whose parameters these are.
            data: batches: inputs, or tuples that begin with inputs.
            sampled: whether each batch meets a draw of the parameters (for `predict`), or the mean.
        """
        from torch.optim.swa_utils import update_bn

        def batches() -> Iterator[Any]:
            for batch in data:
                with self.sampled_params():
                    yield batch

        update_bn(batches() if sampled else data, model)
