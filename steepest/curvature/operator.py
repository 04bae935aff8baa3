"""Linear operators: a matrix that is known by its products."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class LinearOperator:
    """A real matrix of shape (m, n), known by its products `A @ v`.

    `v` is (n,), or (n, k) for k products at once, which cost much less together than one by one. `A.T` is the
    transpose where there is one; `A + number`, `number * A` and `-A` are operators, too.

    Subclasses give `_products`, and `_transposed` unless the operator is symmetric.

    Args:
        shape: (m, n).
        dtype: Type of the entries; vectors are converted to it.
        device: Where the products are computed.
        symmetric: Whether the matrix equals its transpose.
    """

    def __init__(
        self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device | str = "cpu", symmetric: bool = False
    ) -> None:
        self.shape, self.dtype, self.device = (int(shape[0]), int(shape[1])), dtype, torch.device(device)
        self.symmetric = symmetric

    def _products(self, columns: Tensor) -> Tensor:
        """(n, k) -> (m, k)."""
        raise NotImplementedError

    def _transposed(self, columns: Tensor) -> Tensor:
        """(m, k) -> (n, k)."""
        if self.symmetric:
            return self._products(columns)
        raise TypeError(f"{type(self).__name__} has no transpose")

    def __matmul__(self, v: Tensor) -> Tensor:
        columns = self._check(v, self.shape[1])
        result = self._products(columns) if columns.shape[1] else columns.new_zeros(self.shape[0], 0)
        return result if v.ndim == 2 else result[:, 0]

    def _check(self, v: Tensor, n: int) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"an operator multiplies a tensor, got {type(v).__name__}")
        if v.is_complex():
            raise TypeError(f"an operator multiplies real vectors, got {v.dtype}")
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"the operator is {self.shape}: it multiplies ({n},) or ({n}, k), got {tuple(v.shape)}")
        columns = v if v.ndim == 2 else v[:, None]
        return columns.detach().to(device=self.device, dtype=self.dtype)

    @property
    def T(self) -> "LinearOperator":  # noqa: N802
        """The transpose."""
        return self if self.symmetric else _Transpose(self)

    def __add__(self, shift: float) -> "LinearOperator":
        return _Affine(self, 1.0, _number("added", shift))

    __radd__ = __add__

    def __sub__(self, shift: float) -> "LinearOperator":
        return self + -_number("subtracted", shift)

    def __mul__(self, factor: float) -> "LinearOperator":
        return _Affine(self, _number("factor", factor), 0.0)

    __rmul__ = __mul__

    def __neg__(self) -> "LinearOperator":
        return self * -1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={str(self.device)!r})"

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself, from n products."""
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` with the same products, on NumPy arrays of the same precision."""
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def on_arrays(product: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            def call(array: Any) -> Any:
                # A product of a column (n, 1) is a column, as SciPy expects.
                return product(torch.tensor(array, dtype=self.dtype, device=self.device)).cpu().numpy()

            return call

        forward, backward = on_arrays(self.__matmul__), on_arrays(lambda v: self.T @ v)
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        make: Any = ScipyOperator
        return make(self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype)


class MatrixOperator(LinearOperator):
    """A matrix at hand, as an operator.

    Args:
        matrix: (m, n), real and floating.
    """

    def __init__(self, matrix: Float[Tensor, "m n"]) -> None:
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point():
            raise TypeError(f"matrix must be a real floating tensor (m, n), got {_what(matrix)}")
        symmetric = matrix.shape[0] == matrix.shape[1] and _equal(matrix, matrix.T)
        super().__init__((matrix.shape[0], matrix.shape[1]), dtype=matrix.dtype, device=matrix.device)
        self.matrix, self.symmetric = matrix.detach(), symmetric

    def _products(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def _transposed(self, columns: Tensor) -> Tensor:
        return self.matrix.T @ columns


class FunctionOperator(LinearOperator):
    """A linear function as an operator.

    Args:
        function: Takes (n, k), gives (m, k).
        shape: (m, n).
        transposed: Takes (m, k), gives (n, k); not needed for a symmetric one.
        dtype: Type of the entries.
        device: Where the products are computed.
        symmetric: Whether the matrix equals its transpose.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        *,
        transposed: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        symmetric: bool = False,
    ) -> None:
        super().__init__(shape, dtype=dtype, device=device, symmetric=symmetric)
        self._products = function  # type: ignore[method-assign]
        if transposed is not None:
            self._transposed = transposed  # type: ignore[method-assign]


class _Transpose(LinearOperator):
    def __init__(self, base: LinearOperator) -> None:
        super().__init__((base.shape[1], base.shape[0]), dtype=base.dtype, device=base.device)
        self.base = base
        self._products, self._transposed = base._transposed, base._products  # type: ignore[method-assign]

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        return self.base


class _Affine(LinearOperator):
    """factor * A + shift * I."""

    def __init__(self, base: LinearOperator, factor: float, shift: float) -> None:
        if shift and base.shape[0] != base.shape[1]:
            raise ValueError(f"a number can be added to a square operator only, got shape {base.shape}")
        super().__init__(base.shape, dtype=base.dtype, device=base.device, symmetric=base.symmetric)
        self.base, self.factor, self.shift = base, factor, shift

    def _products(self, columns: Tensor) -> Tensor:
        return (
            torch.add(self.factor * self.base._products(columns), columns, alpha=self.shift)
            if self.shift
            else (self.factor * self.base._products(columns))
        )

    def _transposed(self, columns: Tensor) -> Tensor:
        result = self.factor * self.base._transposed(columns)
        return result + self.shift * columns if self.shift else result


def as_operator(value: Any, name: str = "A") -> LinearOperator:
    """`value` as an operator: it is one, or a matrix."""
    if isinstance(value, LinearOperator):
        return value
    if isinstance(value, Tensor):
        return MatrixOperator(value)
    raise TypeError(f"{name} must be a LinearOperator or a matrix, got {type(value).__name__}")


def symmetric_operator(value: Any, name: str = "A") -> LinearOperator:
    """`value` as a symmetric operator that is not empty."""
    operator = as_operator(value, name)
    if not operator.symmetric:
        raise ValueError(f"{name} must be symmetric, got {operator!r}")
    if operator.shape[0] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {operator.shape}")
    return operator


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices are the same to rounding."""
    scale = torch.where(a.isfinite(), a, 0).abs().max() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=float(8 * torch.finfo(a.dtype).eps * scale), equal_nan=True)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"the {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"the {name} must be finite, got {value}")
    return float(value)


def _what(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
