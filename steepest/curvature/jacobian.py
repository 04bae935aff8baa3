"""Jacobian products of a module's output, or of any function, with respect to its parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steepest._checks import check_int
from steepest.curvature._problem import ModelPoint, Point
from steepest.curvature.products import ParameterOperator, Pullback, columnwise, free_point


class Jacobian(ParameterOperator):
    r"""The Jacobian of a module's output with respect to its parameters.

    $J v$ is the output's derivative along v, and $J^T u$ pulls a covector of the output back to the parameters. The
    output is flattened, (m,) for all entries of all examples. `J @ v` runs in forward mode: about the cost of two
    forward passes, and no graph is kept.

    Args:
        model: The module; its output is one tensor.
        inputs: One batch of inputs; a tuple is several arguments, a mapping is keywords.
        params: See `Hessian`, as for all that follow.
        chunk: Vectors multiplied at once.
        train: Train mode instead of eval mode.
        seed: Of the module's random numbers.
        dtype: Type to compute in.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        params: Iterable[Any] | None = None,
        chunk: int | None = None,
        train: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        point = ModelPoint(model, params, train=train, seed=seed, dtype=dtype)
        self._prepare(point, lambda tensors: point.call(tensors, inputs), chunk)

    @classmethod
    def of(
        cls,
        function: Callable[[Any], Tensor],
        x: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
        *,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Jacobian":
        """The Jacobian of any function of a tensor, or of a mapping or a sequence of tensors.

        Args:
            function: Takes what `x` is, gives a tensor.
            x: The point.
            chunk: Vectors multiplied at once; all if None.
            dtype: Type to compute in; that of `x` if None.
        """
        point, rebuild = free_point(x, dtype)
        operator = cls.__new__(cls)
        operator._prepare(point, lambda tensors: function(rebuild(tensors)), chunk)
        return operator

    def _prepare(self, point: Point, function: Callable[[Sequence[Tensor]], Any], chunk: int | None) -> None:
        if chunk is not None:
            check_int("chunk", chunk)
        self.point, self.chunk = point, chunk

        def unfused(tensors: Sequence[Tensor]) -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return function(tensors)

        self._function = unfused
        self._graph: Pullback | None = None
        self._forward = True
        with torch.no_grad():
            value = unfused(point.tensors)
        if not isinstance(value, Tensor):
            raise TypeError(f"the output must be one tensor, got {type(value).__name__}")
        if value.is_complex():
            raise TypeError(f"the output must be real, got {value.dtype}")
        self.value: Tensor = value.detach()
        dtype = torch.promote_types(point.dtype, value.dtype)
        super().__init__((value.numel(), point.size), dtype=dtype, device=point.device)

    def _pullback(self) -> Pullback:
        if self._graph is None:
            with torch.enable_grad():
                self._graph = Pullback([self._function(self.point.tensors)], self.point.tensors)
        return self._graph

    def _products(self, columns: Tensor) -> Tensor:
        return columnwise(self._forward_rows, columns.to(self.point.dtype), self.chunk).to(self.dtype)

    def _forward_rows(self, rows: Tensor) -> Tensor:
        tangents = self.point.unflatten_rows(rows)
        if self._forward:
            try:
                return self._forward_mode(tangents, len(rows)).reshape(len(rows), -1)
            except (RuntimeError, NotImplementedError) as error:
                if not any(word in str(error) for word in ("forward AD", "vmap", "batching", "in-place", "inplace")):
                    raise
                self._forward = False  # an operation without forward mode: go through the pull-back's own pull-back
        return self._twice_back(tangents, len(rows))

    def _forward_mode(self, tangents: list[Tensor], k: int) -> Tensor:
        def along(*tangent: Tensor) -> Tensor:
            points = tuple(t.detach() for t in self.point.tensors)
            return torch.func.jvp(lambda *t: self._function(t), points, tangent)[1]

        with torch.no_grad():
            if k == 1:
                return along(*(t[0] for t in tangents))[None]
            return torch.vmap(along, randomness="same")(*tangents)

    def _twice_back(self, tangents: list[Tensor], k: int) -> Tensor:
        pullback = self._pullback()
        output = pullback.outputs[0] if pullback.outputs else None
        if output is None:
            return torch.zeros(k, self.shape[0], dtype=self.dtype, device=self.device)
        with torch.enable_grad():
            dummy = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, self.point.tensors, dummy, create_graph=True, allow_unused=True)
        present = [i for i, p in enumerate(pulled) if p is not None]
        back = Pullback([pulled[i] for i in present], [dummy])
        result = back([tangents[i] for i in present])[0]
        assert result is not None
        return result.reshape(k, -1)

    def _transposed(self, columns: Tensor) -> Tensor:
        pullback = self._pullback()

        def rows_of(rows: Tensor) -> Tensor:
            shaped = rows.reshape(len(rows), *self.value.shape).to(self.value.dtype)
            return self.point.flatten_rows(pullback([shaped]), len(rows))

        return columnwise(rows_of, columns, self.chunk).to(self.dtype)
