"""Hessian and Jacobian products of a module, or of any function."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steepest._checks import check_int
from steepest.curvature._problem import Batches, Loss, ModelPoint, Point, scalar, split_batch
from steepest.curvature._twice import Twice
from steepest.curvature.operator import LinearOperator

RETAINED = 8  # graphs of at most so many batches are kept between products


def columnwise(product: Callable[[Tensor], Tensor], columns: Tensor, chunk: int | None) -> Tensor:
    """`product` (k, n) -> (k, m) applied to columns (n, k), `chunk` at a time; gives (m, k)."""
    rows = columns.T.contiguous()  # each vector's parts in one piece: the products then copy less
    if chunk is None or rows.shape[0] <= chunk:
        return product(rows).T
    return torch.cat([product(part) for part in rows.split(chunk)]).T


class Pullback:
    """Vector-Jacobian products of a graph that stays: rows of cotangents, several at once.

    Args:
        outputs: What was computed.
        inputs: With respect to what.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        kept = [(i, t) for i, t in enumerate(outputs) if t.requires_grad]
        self.kept, self.outputs = [i for i, _ in kept], [t for _, t in kept]
        self.inputs, self.batched = list(inputs), True

    def __call__(self, rows: Sequence[Tensor]) -> list[Tensor | None]:
        """Tensors (k, *input shape) for cotangents (k, *output shape); None where nothing depends on the input."""
        if not self.outputs:
            return [None] * len(self.inputs)
        cotangents = [rows[i] for i in self.kept]
        if len(cotangents[0]) == 1 or not self.batched:
            return self._one_by_one(cotangents)
        try:
            return self._together(cotangents)
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in ("vmap", "batch")):
                raise
            self.batched = False  # an operation without a batched backward pass
            return self._one_by_one(cotangents)

    def _together(self, cotangents: list[Tensor]) -> list[Tensor | None]:
        present: list[int] = []

        def pull(*rows: Tensor) -> tuple[Tensor, ...]:
            found = self._grad(rows)
            present[:] = [i for i, part in enumerate(found) if part is not None]
            return tuple(part for part in found if part is not None)

        stacked = torch.vmap(pull)(*cotangents)
        parts = dict(zip(present, stacked, strict=True))
        return [parts.get(i) for i in range(len(self.inputs))]

    def _one_by_one(self, cotangents: list[Tensor]) -> list[Tensor | None]:
        found = [self._grad(row) for row in zip(*cotangents, strict=True)]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)]

    def _grad(self, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outputs, self.inputs, cotangents, retain_graph=True, allow_unused=True)


def check_twice(gradients: Sequence[Tensor | None]) -> None:
    """Raise if a gradient hides that it cannot be differentiated: autograd itself leaves such a part out in silence.

    Raises:
        RuntimeError: a function of the model or the loss is marked `once_differentiable`.
    """
    nodes: list[Any] = [g.grad_fn for g in gradients if g is not None]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):
            raise RuntimeError("curvature needs second derivatives, but a function here is marked once_differentiable")
        nodes += [parent for parent, _ in node.next_functions]


class ParameterOperator(LinearOperator):
    """What the operators at a point of parameters share: the order of the vector, and its parts."""

    point: Point

    def flatten(self, tensors: Sequence[Tensor | None]) -> Float[Tensor, "n"]:
        """One vector of tensors in the order of the parameters; None counts as zeros."""
        return self.point.flatten(list(tensors))

    def unflatten(self, vector: Float[Tensor, "n"]) -> list[Tensor]:
        """The parts of a vector, in the order and the shapes of the parameters."""
        if vector.shape != (self.point.size,):
            raise ValueError(f"expected a vector ({self.point.size},), got {tuple(vector.shape)}")
        return [part[0] for part in self.point.unflatten_rows(vector[None])]


class _Linearised:
    """The gradient of one batch's loss with its graph."""

    def __init__(self, point: Point, loss: Callable[[Sequence[Tensor]], Tensor]) -> None:
        with torch.enable_grad():
            with sdpa_kernel(SDPBackend.MATH), Twice():
                value = loss(point.tensors)
            if not bool(value.detach().isfinite()):
                raise FloatingPointError(f"the loss is {float(value.detach())} at this point: it has no curvature")
            if value.requires_grad:
                found = torch.autograd.grad(value, point.tensors, create_graph=True, allow_unused=True)
            else:
                found = [None] * len(point.tensors)
        check_twice(found)
        self.value = value.detach()
        self.present = [i for i, g in enumerate(found) if g is not None]
        gradients = [g for g in found if g is not None]
        self.gradient = point.flatten(list(found))
        self.pullback = Pullback(gradients, point.tensors)

    def product(self, rows: Sequence[Tensor]) -> list[Tensor | None]:
        if not self.present:
            return [None] * len(rows)
        return self.pullback([rows[i] for i in self.present])


class Hessian(ParameterOperator):
    r"""The Hessian of a loss over data with respect to a module's parameters, $H = \nabla^2 L(\theta)$.

    $L(\theta) = \sum_b (n_b / n) \, \ell(f_\theta(x_b), y_b)$ over the batches, with $n_b$ examples in batch $b$. The
    gradient is computed once with its graph, and each product is one more backward pass through it. The point is the
    parameters' values at construction: training may go on. Nothing of the module changes, neither parameters nor
    buffers nor modes.

    Args:
        model: The module.
        loss_fn: `loss_fn(model_output, targets)`, the mean over the batch.
        data: One batch (inputs, targets), or an iterable of batches. Inputs that are a tuple are several arguments,
            and a mapping is keywords.
        params: Names of parameters, or the parameters; all that require a gradient if None.
        chunk: Vectors multiplied at once; all if None. Fewer need less memory.
        train: Run the module in train mode (batch statistics, dropout with the masks of `seed`) instead of eval mode.
        seed: Of the module's random numbers.
        dtype: Type to compute in; if None that of the parameters, and float32 for bfloat16 and float16.
        size: Number of examples in a batch; the first dimension of its first tensor if None.

    Raises:
        TypeError, ValueError: a complex parameter, nothing to differentiate, empty data, a loss that is no scalar.
        FloatingPointError: from the first product, when the loss is not finite.

    Examples:
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.eye(3), torch.zeros(3, 1)
        >>> H = Hessian(model, torch.nn.functional.mse_loss, (x, y))
        >>> (H @ torch.ones(4, 2)).shape
        torch.Size([4, 2])
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

        def loss(tensors: Sequence[Tensor], batch: Any) -> Tensor:
            inputs, targets = split_batch(batch)
            return loss_fn(point.call(tensors, inputs), point.cast_inputs(targets))

        self._prepare(point, loss, Batches(data, size), chunk)

    @classmethod
    def of_loss(
        cls,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Iterable[Any],
        *,
        params: Iterable[Any] | None = None,
        chunk: int | None = None,
        train: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        size: Callable[[Any], float] | None = None,
    ) -> "Hessian":
        """The Hessian of `loss(model, batch)`, any scalar that calls the module: the form of a race's task.

        Args:
            model: The module.
            loss: Gives the mean over the batch.
            data: An iterable of batches.
            params: See `Hessian`, as for all that follow.
            chunk: Vectors multiplied at once.
            train: Train mode instead of eval mode.
            seed: Of the module's random numbers.
            dtype: Type to compute in.
            size: Number of examples in a batch.
        """
        point = ModelPoint(model, params, train=train, seed=seed, dtype=dtype)
        operator = cls.__new__(cls)
        operator._prepare(point, lambda t, batch: point.call(t, batch, loss), Batches(data, size, pairs=False), chunk)
        return operator

    @classmethod
    def of(
        cls,
        function: Callable[[Any], Tensor],
        x: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
        *,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Hessian":
        """The Hessian of any scalar function of a tensor, or of a mapping or a sequence of tensors.

        Args:
            function: Takes what `x` is, gives a scalar; of differentiable operations.
            x: The point.
            chunk: Vectors multiplied at once; all if None.
            dtype: Type to compute in; that of `x` if None.

        Examples:
            >>> H = Hessian.of(lambda x: (x**4).sum(), torch.tensor([1.0, 2.0]))
            >>> H @ torch.ones(2)
            tensor([12., 48.])
        """
        point, rebuild = free_point(x, dtype)
        operator = cls.__new__(cls)
        operator._prepare(point, lambda t, _: function(rebuild(t)), Batches([None], pairs=False), chunk)
        return operator

    def _prepare(
        self, point: Point, loss: Callable[[Sequence[Tensor], Any], Tensor], batches: Batches, chunk: int | None
    ) -> None:
        if chunk is not None:
            check_int("chunk", chunk)
        super().__init__((point.size, point.size), dtype=point.dtype, device=point.device, symmetric=True)
        self.point, self.batches, self.chunk = point, batches, chunk
        self._loss = lambda tensors, batch: scalar(loss(tensors, batch), "the loss")
        self._kept: list[tuple[_Linearised, float]] | None = None
        self._first: tuple[Tensor, Tensor] | None = None

    def loss(self) -> Float[Tensor, ""]:
        """The loss at the point, over all data."""
        return self._value_and_gradient()[0]

    def gradient(self) -> Float[Tensor, "n"]:
        """The gradient at the point, over all data."""
        return self._value_and_gradient()[1]

    def _value_and_gradient(self) -> tuple[Tensor, Tensor]:
        if self._first is None:
            value, gradient = torch.zeros((), device=self.device), torch.zeros(self.shape[0], device=self.device)
            for linearised, weight in self._linearised():
                value, gradient = value + weight * linearised.value, gradient + weight * linearised.gradient
            self._first = value, gradient
        return self._first

    def _linearised(self) -> Iterator[tuple[_Linearised, float]]:
        if self._kept is not None:
            yield from self._kept
            return
        made = ((_Linearised(self.point, partial(self._of_batch, batch)), weight) for batch, weight in self.batches)
        if self.batches.count <= RETAINED:
            self._kept = list(made)
            made = iter(self._kept)
        yield from made

    def _of_batch(self, batch: Any, tensors: Sequence[Tensor]) -> Tensor:
        return self._loss(tensors, batch)

    def _products(self, columns: Tensor) -> Tensor:
        result: Tensor | None = None
        for linearised, weight in self._linearised():
            term = columnwise(partial(self._rows, linearised), columns, self.chunk)
            term = term if weight == 1.0 else term * weight
            result = term if result is None else result + term
        assert result is not None
        return result

    def _rows(self, linearised: _Linearised, rows: Tensor) -> Tensor:
        return self.point.flatten_rows(linearised.product(self.point.unflatten_rows(rows)), len(rows))


def free_point(x: Any, dtype: torch.dtype | None) -> tuple[Point, Callable[[Sequence[Tensor]], Any]]:
    """The point of a function of `x`, and how its argument is built from the point's tensors."""
    if isinstance(x, Tensor):
        return Point([x], dtype, ["x"]), lambda tensors: tensors[0]
    if isinstance(x, Mapping):
        names = list(x)
        point = Point(_tensors(x.values()), dtype, [f"x[{name!r}]" for name in names])
        return point, lambda tensors: dict(zip(names, tensors, strict=True))
    if isinstance(x, Sequence):
        kind = tuple if isinstance(x, tuple) else list
        return Point(_tensors(x), dtype, [f"x[{i}]" for i in range(len(x))]), kind
    raise TypeError(f"x must be a tensor, or a mapping or a sequence of tensors, got {type(x).__name__}")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = list(values)
    for value in found:
        if not isinstance(value, Tensor):
            raise TypeError(f"x must hold tensors, got {type(value).__name__}")
    return found
