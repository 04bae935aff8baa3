"""What a role is, and the table of them."""

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


class Role(StrEnum):
    """What a parameter does in its network. A fused role holds several matrices in one tensor."""

    EMBEDDING = "embedding"
    POSITION = "position"
    HEAD = "head"
    INPUT = "input"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    QKV = "qkv"
    KEY_VALUE = "key_value"
    ATTENTION_OUT = "attention_out"
    GATE = "gate"
    UP = "up"
    GATE_UP = "gate_up"
    DOWN = "down"
    ROUTER = "router"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_GATE_UP = "expert_gate_up"
    EXPERT_DOWN = "expert_down"
    CONV = "conv"
    DEPTHWISE = "depthwise"
    LINEAR = "linear"
    NORM = "norm"
    BIAS = "bias"
    SCALAR = "scalar"
    AMBIGUOUS = "ambiguous"

    @property
    def hidden(self) -> bool:
        """Whether it is a matrix (or a stack of them) between hidden layers, the kind Muon was made for."""
        return self in HIDDEN


HIDDEN = frozenset(
    {
        Role.INPUT, Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.KEY_VALUE, Role.ATTENTION_OUT, Role.GATE, Role.UP,
        Role.GATE_UP, Role.DOWN, Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_GATE_UP, Role.EXPERT_DOWN, Role.CONV,
        Role.LINEAR,
    }
)  # fmt: skip
EXPERT = {
    Role.GATE: Role.EXPERT_GATE,
    Role.UP: Role.EXPERT_UP,
    Role.GATE_UP: Role.EXPERT_GATE_UP,
    Role.DOWN: Role.EXPERT_DOWN,
}


@dataclass(frozen=True)
class ParameterRole:
    """The role of one parameter, how it is read as matrices, and why.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: as stored.
        role: what it does.
        reason: the evidence, in words.
        layout: how the tensor is read as matrices of shape (out, in): "matrix" (2-D as it is), "conv" ((out, in, *k)
            is flattened to (out, in*prod(k))), "batch" (leading dimensions number the matrices, as with experts),
            "vector" (no matrix).
        split: sizes of blocks along the output dimension that are matrices of their own, or None for one matrix.
        blocks: a name for each block of `split` ("query", "key", ...); empty when there is no split.
        transposed: True if the last two dimensions are stored (in, out); for "conv", (in, out, *k).
        interleaved: the fused parts alternate along the output dimension. With a `split` the blocks follow the
            alternation, so each is pure; without one (gate and up row by row) the parts can not be cut out by blocks.
        head_dim: rows (for attention_out: columns) of one attention head, where it is known.
        frozen: `requires_grad` is False; it is listed, and not optimised.
        shared_with: other names of the same tensor (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    reason: str
    layout: str = "vector"
    split: tuple[int, ...] | None = None
    blocks: tuple[str, ...] = ()
    transposed: bool = False
    interleaved: bool = False
    head_dim: int | None = None
    frozen: bool = False
    shared_with: tuple[str, ...] = ()

    @property
    def notes(self) -> str:
        """Layout, split and sharing in a few words, for tables."""
        words = [] if self.layout == "vector" else [self.layout]
        if self.transposed:
            words.append("stored (in, out)")
        if self.interleaved:
            words.append("interleaved")
        if self.split:
            words.append(f"split {short_split(self.split)}")
        if self.shared_with:
            words.append(f"tied to {', '.join(self.shared_with)}")
        if self.frozen:
            words.append("frozen")
        return ", ".join(words)


class Roles(Mapping[str, ParameterRole]):
    """Parameter name -> `ParameterRole`, in the order of `model.named_parameters()`.

    `print(roles)` is a plain-text table, `roles.table()` a rich one, and a notebook shows HTML.
    """

    def __init__(self, rows: Iterable[ParameterRole]) -> None:
        self._rows = {row.name: row for row in rows}

    def __getitem__(self, name: str) -> ParameterRole:
        if name not in self._rows:
            raise KeyError(f"no parameter is named {name!r}; the model has {some(self._rows)}")
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ambiguous(self) -> tuple[ParameterRole, ...]:
        """The trainable parameters whose role could not be told."""
        return tuple(row for row in self.values() if row.role is Role.AMBIGUOUS and not row.frozen)

    @property
    def frozen(self) -> tuple[ParameterRole, ...]:
        """The parameters with `requires_grad=False`."""
        return tuple(row for row in self.values() if row.frozen)

    def by_role(self) -> dict[Role, tuple[ParameterRole, ...]]:
        """The rows of each role that occurs, in the order of `Role`."""
        found = {role: tuple(row for row in self.values() if row.role is role) for role in Role}
        return {role: rows for role, rows in found.items() if rows}

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain data (JSON-ready)."""
        return [{**asdict(row), "role": row.role.value} for row in self.values()]

    def table(self) -> "Table":
        """A `rich.table.Table`; names are shown literally, never read as markup."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title(), title_justify="left")
        for column in _COLUMNS:
            table.add_column(column, overflow="fold")
        for row in self.values():
            style = "yellow" if row.role is Role.AMBIGUOUS else "dim" if row.frozen else ""
            table.add_row(*(Text(cell, style=style) for cell in _cells(row)))
        return table

    def __str__(self) -> str:
        return text_table(self.values(), self._title())

    def __repr__(self) -> str:
        counts = ", ".join(f"{role}: {count}" for role, count in self._counts().items())
        return f"Roles({len(self)} parameters; {counts})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in self.values()
        )
        return f"<table><caption>{html.escape(self._title())}</caption><tr>{head}</tr>{body}</table>"

    def _counts(self) -> Counter[str]:
        return Counter(row.role.value for row in self.values())

    def _title(self) -> str:
        frozen, ambiguous = len(self.frozen), len(self.ambiguous)
        extra = f", {frozen} frozen" * bool(frozen) + f", {ambiguous} ambiguous" * bool(ambiguous)
        return f"{len(self)} parameters{extra}"


_COLUMNS = ("parameter", "shape", "role", "read as", "why")


def _cells(row: ParameterRole) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    return printable(row.name), shape, row.role.value, printable(row.notes), printable(row.reason)


def text_table(rows: Iterable[ParameterRole], title: str = "") -> str:
    """Rows as aligned plain text."""
    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([title, *lines] if title else lines)


def short_split(split: tuple[int, ...]) -> str:
    """`(64, 16, 16)` -> "64+16+16", and many equal blocks as "12 of 64"."""
    if len(split) > 4 and len(set(split)) == 1:
        return f"{len(split)} of {split[0]}"
    return "+".join(map(str, split[:8])) + "+..." * (len(split) > 8)


def printable(text: str) -> str:
    """Control characters (which could forge a terminal line) shown escaped."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)


def some(names: Iterable[str], most: int = 8) -> str:
    """The first few names, for an error message."""
    names = [printable(name) for name in names]
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "") or "none"
