"""Norms by name, for settings that must be plain text."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from steepest.geometry.directions import Direction
from steepest.geometry.matrix_norms import MaxColumn, MaxRow, Nuclear, Spectral, SumColumn, SumRow
from steepest.geometry.norms import L1, Euclidean, Max, Norm
from steepest.geometry.scaled import one_to_max, one_to_rms, rms_to_max, rms_to_rms, vector_rms

NORMS: Mapping[str, Callable[[], Norm]] = MappingProxyType(
    {
        "euclidean": Euclidean,
        "frobenius": Euclidean,
        "max": Max,
        "sign": Max,
        "l1": L1,
        "spectral": lambda: Spectral(method="auto"),
        "nuclear": Nuclear,
        "max_row": MaxRow,
        "row": MaxRow,
        "sum_row": SumRow,
        "max_column": MaxColumn,
        "column": MaxColumn,
        "sum_column": SumColumn,
        "rms_to_rms": lambda: rms_to_rms(base=Spectral(method="auto")),
        "one_to_rms": one_to_rms,
        "rms_to_max": rms_to_max,
        "one_to_max": one_to_max,
        "vector_rms": vector_rms,
    }
)


def get_norm(norm: str | Direction) -> Direction:
    """The `Norm` of this name (a key of `NORMS`), or the `Norm` or other `Direction` itself.

    ``"spectral"`` and ``"rms_to_rms"`` come with the fastest iteration for the device; build `Spectral` for others.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a `Direction`.
    """
    if isinstance(norm, Direction):
        return norm
    if not isinstance(norm, str):
        raise TypeError(
            f"norm must be a Norm, another Direction, or one of the names {', '.join(NORMS)}; got {type(norm).__name__}"
        )
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    return NORMS[norm]()
