"""Gauss-Newton and Fisher products: what the loss curves at the output, pulled back to the parameters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steepest._checks import check_int
from steepest.curvature._problem import Batches, Loss, ModelPoint, Point, scalar, split_batch
from steepest.curvature.products import RETAINED, ParameterOperator, Pullback, check_twice, columnwise

Middle = Callable[[Tensor], Tensor]


class _Output:
    """One batch's output with its graph: J v through the pull-back's own pull-back, and J^T u."""

    def __init__(self, point: Point, output: Any, middle: Callable[[Tensor], Middle]) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"the output must be one tensor, got {type(output).__name__}")
        if output.is_complex():
            raise TypeError(f"the output must be real, got {output.dtype}")
        if not bool(output.detach().isfinite().all()):
            raise FloatingPointError("the output is not finite at this point: it has no curvature")
        self.output = output
        self.back = Pullback([output], point.tensors)
        self.middle = middle(output.detach())
        self.covector = torch.zeros_like(output, requires_grad=True)
        pulled: Sequence[Tensor | None] = [None] * len(point.tensors)
        if output.requires_grad:
            pulled = torch.autograd.grad(output, point.tensors, self.covector, create_graph=True, allow_unused=True)
        check_twice(pulled)
        self.present = [i for i, p in enumerate(pulled) if p is not None]
        self.forth = Pullback([p for p in pulled if p is not None], [self.covector])

    def product(self, rows: list[Tensor]) -> list[Tensor | None]:
        along = self.forth([rows[i] for i in self.present])[0] if self.present else None
        if along is None:
            return [None] * len(rows)
        return self.back([self.middle(along)])


class _OutputCurvature(ParameterOperator):
    """J^T M J, averaged over batches, with M given at each batch's output."""

    def _prepare(
        self,
        point: ModelPoint,
        batches: Batches,
        chunk: int | None,
        loss: Loss,
        middle: Callable[[Any, Tensor], Middle],
    ) -> None:
        if chunk is not None:
            check_int("chunk", chunk)
        super().__init__((point.size, point.size), dtype=point.dtype, device=point.device, symmetric=True)
        self.point, self.batches, self.chunk = point, batches, chunk
        self._loss, self._middle = loss, middle
        self._kept: list[tuple[_Output, Tensor, float]] | None = None
        self._first: tuple[Tensor, Tensor] | None = None

    def loss(self) -> Float[Tensor, ""]:
        """The loss at the point, over all data."""
        return self._value_and_gradient()[0]

    def gradient(self) -> Float[Tensor, "n"]:
        """The gradient of the loss at the point, over all data."""
        return self._value_and_gradient()[1]

    def _value_and_gradient(self) -> tuple[Tensor, Tensor]:
        if self._first is None:
            total = torch.zeros((), dtype=self.dtype, device=self.device)
            gradient = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            for linearised, targets, weight in self._linearised():
                with torch.enable_grad():
                    output = linearised.output.detach().requires_grad_(True)
                    value = scalar(self._loss(output, targets), "the loss")
                    (covector,) = torch.autograd.grad(value, output)
                total = total + weight * value.detach()
                gradient = gradient + weight * self.point.flatten_rows(linearised.back([covector[None]]), 1)[0]
            self._first = total, gradient
        return self._first

    def _linearised(self) -> Iterator[tuple[_Output, Any, float]]:
        if self._kept is not None:
            yield from self._kept
            return
        made = (self._of_batch(batch, weight) for batch, weight in self.batches)
        if self.batches.count <= RETAINED:
            self._kept = list(made)
            made = iter(self._kept)
        yield from made

    def _of_batch(self, batch: Any, weight: float) -> tuple[_Output, Any, float]:
        assert isinstance(self.point, ModelPoint)
        inputs, targets = split_batch(batch)
        targets = self.point.cast_inputs(targets)
        with torch.enable_grad():
            output = self.point.call(self.point.tensors, inputs)
            return _Output(self.point, output, partial(self._middle, targets)), targets, weight

    def _products(self, columns: Tensor) -> Tensor:
        result: Tensor | None = None
        for linearised, _, weight in self._linearised():
            term = columnwise(partial(self._rows, linearised), columns, self.chunk)
            term = term if weight == 1.0 else term * weight
            result = term if result is None else result + term
        assert result is not None
        return result

    def _rows(self, linearised: _Output, rows: Tensor) -> Tensor:
        return self.point.flatten_rows(linearised.product(self.point.unflatten_rows(rows)), len(rows))


class GaussNewton(_OutputCurvature):
    r"""The generalised Gauss-Newton matrix $G = J^T (\nabla^2_f \ell) J$ of a loss of a module's output.

    It is the Hessian without the curvature of the module itself, and positive semi-definite for a convex loss.

    Args:
        model: The module; its output is one tensor.
        loss_fn: `loss_fn(model_output, targets)`, the mean over the batch.
        data: One batch (inputs, targets), or an iterable of batches; they are weighted by their size.
        params: See `Hessian`, as for all that follow.
        chunk: Vectors multiplied at once.
        train: Train mode instead of eval mode.
        seed: Of the module's random numbers.
        dtype: Type to compute in.
        size: Number of examples in a batch.

    Source:
        Schraudolph 2002, Neural Computation 14(7), 1723-1738.

    Examples:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> G = GaussNewton(model, torch.nn.functional.mse_loss, (torch.eye(3), torch.zeros(3, 1)))
        >>> (G @ torch.ones(3)).mul(3).round()
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Any,
        *,
        params: Iterable[Any] | None = None,
        chunk: int | None = None,
        train: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        size: Callable[[Any], float] | None = None,
    ) -> None:
        point = ModelPoint(model, params, train=train, seed=seed, dtype=dtype)
        self._prepare(point, Batches(data, size), chunk, loss_fn, self._loss_curvature)

    def _loss_curvature(self, targets: Any, output: Tensor) -> Middle:
        output = output.detach().requires_grad_(True)
        value = scalar(self._loss(output, targets), "the loss")
        if not value.requires_grad:
            return torch.zeros_like
        (slope,) = torch.autograd.grad(value, output, create_graph=True)
        back = Pullback([slope], [output])

        def product(rows: Tensor) -> Tensor:
            found = back([rows])[0]
            return torch.zeros_like(rows) if found is None else found

        return product


class Fisher(_OutputCurvature):
    r"""The Fisher information of a module that gives the parameters of a distribution.

    Each row of the output (its last dimension) is the distribution of one datum: logits of a categorical one, or the
    mean of a Gaussian one with unit variance. With $s = \nabla_f \log p(y \mid f)$,
    $F = \frac1n \sum_i J_i^T \, \mathbb{E}[s_i s_i^T] \, J_i$, where the expectation over $y$ is

    - "exact": under the module, in closed form;
    - "mc": under the module, the mean over `samples` draws, which `seed` fixes;
    - "empirical": at the targets of the data, from the gradient of `loss_fn`. This is not the Fisher information.

    Args:
        model: The module; its output is one tensor (..., classes).
        loss_fn: `loss_fn(model_output, targets)`, the mean over all rows; for "empirical", `loss` and `gradient`.
        data: One batch (inputs, targets), or an iterable of batches; they are weighted by their size.
        kind: "exact", "mc" or "empirical".
        likelihood: "categorical" or "gaussian".
        samples: Draws of each row, for "mc".
        params: See `Hessian`, as for all that follow.
        chunk: Vectors multiplied at once.
        train: Train mode instead of eval mode.
        seed: Of the module's random numbers, and of the draws.
        dtype: Type to compute in.
        size: Number of examples in a batch.

    Source:
        Martens 2020, JMLR 21(146); Kunstner, Balles and Hennig 2019, arXiv 1905.12558 (on the empirical one).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Any,
        *,
        kind: Literal["exact", "mc", "empirical"] = "exact",
        likelihood: Literal["categorical", "gaussian"] = "categorical",
        samples: int = 1,
        params: Iterable[Any] | None = None,
        chunk: int | None = None,
        train: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        size: Callable[[Any], float] | None = None,
    ) -> None:
        if kind not in ("exact", "mc", "empirical"):
            raise ValueError(f"kind must be exact, mc or empirical, got {kind!r}")
        if likelihood not in ("categorical", "gaussian"):
            raise ValueError(f"likelihood must be categorical or gaussian, got {likelihood!r}")
        check_int("samples", samples)
        self.kind, self.likelihood, self.samples, self.seed = kind, likelihood, samples, seed
        point = ModelPoint(model, params, train=train, seed=seed, dtype=dtype)
        self._prepare(point, Batches(data, size), chunk, loss_fn, self._second_moment)

    def _second_moment(self, targets: Any, output: Tensor) -> Middle:
        if output.ndim == 0:
            raise ValueError("the output must have at least one dimension, of the classes of a datum")
        n = output.numel() // output.shape[-1]
        if self.kind == "exact":
            if self.likelihood == "gaussian":
                return lambda rows: rows / n
            p = output.softmax(-1)
            return lambda rows: p * (rows - (p * rows).sum(-1, keepdim=True)) / n
        scores = (self._scores(output) if self.kind == "mc" else self._slopes(output, targets, n)).flatten(1, -2)

        def product(rows: Tensor) -> Tensor:
            flat = rows.reshape(len(rows), n, -1)  # (k, n, classes); scores are (samples, n, classes)
            along = torch.einsum("snc,knc->ksn", scores, flat)
            return torch.einsum("snc,ksn->knc", scores, along).div(len(scores) * n).reshape(rows.shape)

        return product

    def _scores(self, output: Tensor) -> Tensor:
        generator = torch.Generator(output.device).manual_seed(self.seed)
        flat = output.reshape(-1, output.shape[-1])
        if self.likelihood == "gaussian":
            shape = (self.samples, *flat.shape)
            return torch.randn(shape, generator=generator, dtype=flat.dtype, device=flat.device)
        p = flat.softmax(-1)
        drawn = torch.multinomial(p, self.samples, replacement=True, generator=generator)
        return torch.nn.functional.one_hot(drawn.T, p.shape[-1]).to(p.dtype) - p

    def _slopes(self, output: Tensor, targets: Any, n: int) -> Tensor:
        output = output.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(scalar(self._loss(output, targets), "the loss"), output)
        return n * slope.reshape(1, n, -1)
