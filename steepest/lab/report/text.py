"""Numbers and names of a race document as text a person can read and a page can trust."""

import math
import unicodedata
from typing import Any

MISSING = "–"
# Characters that change how the text around them is read: bidirectional marks, embeddings, overrides and isolates.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


def number(value: Any) -> float | None:
    """`value` as a finite float, or None: null, NaN, infinities, booleans and text are all "no number"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def numbers(values: Any) -> list[float]:
    """The finite numbers of a list, in order; empty for anything that is not a list."""
    if not isinstance(values, list | tuple):
        return []
    return [x for x in map(number, values) if x is not None]


def clean(value: Any, limit: int = 120) -> str:
    """One line of plain text: control, reordering and unpaired surrogate characters become U+FFFD, long text is cut."""
    text = "" if value is None else str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return " ".join("".join(map(_safe, text)).split())


def clean_code(value: Any) -> str:
    """Like `clean`, but keeps line ends and tabs, and cuts nothing."""
    text = "" if value is None else str(value).replace("\r\n", "\n")
    return "".join(c if c in "\n\t" else _safe(c) for c in text).strip("\n")


def _safe(character: str) -> str:
    category = unicodedata.category(character)
    if character in "\n\t\r" or category in {"Zl", "Zp"}:
        return " "
    return "\ufffd" if category in {"Cc", "Cs"} or character in _REORDERING else character


def plot_text(value: Any, limit: int = 60) -> str:
    """Text for plotly, which reads a subset of HTML in names and labels: this turns all of it into plain characters."""
    return clean(value, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def loss(value: Any) -> str:
    """A loss with four decimals where they mean something."""
    x = number(value)
    if x is None:
        return MISSING
    return f"{x:.4f}" if x == 0 or 1e-2 <= abs(x) < 1e4 else f"{x:.3g}"


def spread(value: Any) -> str:
    """A standard deviation or a gap: two significant digits, at most four decimals."""
    x = number(value)
    if x is None:
        return MISSING
    if x == 0:
        return "0"
    digits = min(max(1 - math.floor(math.log10(abs(x))), 0), 4)
    return f"{x:.{digits}f}" if 5e-5 <= abs(x) < 1e4 else f"{x:.1e}"


def short(value: Any) -> str:
    """Three significant digits: learning rates, ratios, milliseconds."""
    x = number(value)
    if x is None:
        return MISSING
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.3g}"


def ratio(value: Any) -> str:
    """`1.94×`."""
    x = number(value)
    if x is None:
        return MISSING
    return f"{x:.2f}×" if 0.01 <= x < 100 else f"{short(x)}×"


def count(value: Any) -> str:
    """A whole number with thousands separators; millions and more in words."""
    x = number(value)
    if x is None:
        return MISSING
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:,.0f}"


def milliseconds(seconds: Any) -> str:
    """Seconds as milliseconds, without the unit."""
    x = number(seconds)
    return MISSING if x is None else short(x * 1e3)


def duration(seconds: Any) -> str:
    """`12.3 s`, `4 min 12 s`, `2 h 05 min`."""
    x = number(seconds)
    if x is None:
        return MISSING
    if x < 60:
        return f"{x:.3g} s"
    if round(x) < 3600:
        minutes, rest = divmod(round(x), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(x / 60), 60)
    return f"{hours} h {minutes:02d} min"


def memory(size: Any) -> str:
    """Bytes in binary units."""
    x = number(size)
    if x is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(x) < 1024 or unit == "GiB":
            break
        x /= 1024
    return f"{x:.0f} B" if unit == "B" else f"{x:.3g} {unit}" if x < 1000 else f"{x:,.0f} {unit}"


def listed(names: list[str], word: str = "and") -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}" if names else ""
