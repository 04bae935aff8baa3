"""What can be averaged: a tensor, or a mapping or sequence of tensors, as a flat list and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Value = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class Structure:
    """How a value is made of tensors.

    Attributes:
        kind: "tensor", "mapping", "list" or "tuple".
        names: of the tensors; their keys in a mapping, else their positions.
        shapes: of the tensors.
        dtypes: of the tensors.
    """

    kind: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, value: Any) -> tuple["Structure", list[Tensor]]:
        """The structure of a value, and its tensors.

        Raises:
            TypeError: it is neither of the three, or holds something else than floating-point or complex tensors.
            ValueError: it holds no tensor.
        """
        if isinstance(value, Tensor):
            kind, named = "tensor", {"0": value}
        elif isinstance(value, Mapping):
            kind, named = "mapping", dict(value)
            if wrong := [name for name in named if not isinstance(name, str)]:
                raise TypeError(f"value must have text as keys, got {wrong[0]!r}")
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            kind = "list" if isinstance(value, list) else "tuple"
            named = {str(index): each for index, each in enumerate(value)}
        else:
            raise TypeError(f"value must be a tensor, or a mapping or sequence of tensors, got {type(value).__name__}")
        if not named:
            raise ValueError("value holds no tensor")
        for name, each in named.items():
            if not isinstance(each, Tensor):
                raise TypeError(f"value must be made of tensors, got {type(each).__name__} at {name!r}")
            if not (each.is_floating_point() or each.is_complex()):
                raise TypeError(f"value must be of floating-point or complex tensors, got {each.dtype} at {name!r}")
        tensors = [each.detach() for each in named.values()]
        shapes, dtypes = (tuple(each.shape) for each in tensors), (each.dtype for each in tensors)
        return cls(kind, tuple(named), tuple(shapes), tuple(dtypes)), tensors

    def order(self, other: "Structure", tensors: list[Tensor]) -> list[Tensor]:
        """The tensors of a later value, in the order of this one; raises ValueError if it is made otherwise."""
        if other.kind != self.kind or set(other.names) != set(self.names):
            raise ValueError(
                f"value must be made like the first one, a {self.kind} of {_few(self.names)}; "
                f"got a {other.kind} of {_few(other.names)}"
            )
        places = {name: index for index, name in enumerate(other.names)}
        ordered = [tensors[places[name]] for name in self.names]
        for name, each, shape, dtype in zip(self.names, ordered, self.shapes, self.dtypes, strict=True):
            if tuple(each.shape) != shape:
                raise ValueError(f"value must keep its shapes: {shape} at {name!r}, got {tuple(each.shape)}")
            if each.is_complex() != dtype.is_complex:
                raise TypeError(f"value must keep its dtypes: {dtype} at {name!r}, got {each.dtype}")
        return ordered

    def build(self, tensors: list[Tensor]) -> Any:
        """A value of this kind, made of other tensors."""
        match self.kind:
            case "tensor":
                return tensors[0]
            case "mapping":
                return dict(zip(self.names, tensors, strict=True))
            case "list":
                return list(tensors)
        return tuple(tensors)

    def state(self) -> dict[str, Any]:
        """As text and numbers."""
        return {
            "kind": self.kind,
            "names": list(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Structure":
        """What `state` wrote."""
        dtypes = tuple(getattr(torch, name) for name in state["dtypes"])
        shapes = tuple(tuple(shape) for shape in state["shapes"])
        return cls(state["kind"], tuple(state["names"]), shapes, dtypes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
