"""Evidence: what a study measured, and the verdict that follows, as one JSON file a paper.

The file is one object: ``paper``, ``scale``, ``fingerprint``, ``environment``, ``recorded_at`` and ``claims``, a list
of ``{id, statement, reported, criterion, measured, verdict, seeds, seconds}``. Numbers that JSON has no word for are
written as the strings "NaN", "Infinity" and "-Infinity", and are numbers again when loaded.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from steepest._errors import UserError
from steepest._files import write_atomic
from steepest.lab.fingerprint import PACKAGE
from steepest.studies._base import SCALES, VERDICTS, Scale, Verdict

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class ClaimResult:
    """One claim as it was judged.

    Attributes:
        id: the claim's id in its study.
        statement: the claim in words.
        reported: what the paper reports.
        criterion: when we say that it holds.
        measured: the numbers that the verdict is computed from, per seed where random.
        verdict: "holds", "partly" or "does not hold here".
        seeds: the seeds used; empty where nothing is random.
        seconds: how long the measurement took.
    """

    id: str
    statement: str
    reported: str
    criterion: str
    measured: Mapping[str, Any]
    verdict: Verdict
    seeds: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Evidence:
    """What one run of a study found.

    Attributes:
        paper: the study's name.
        scale: the scale it ran at.
        fingerprint: the hash of the code it ran (`steepest.lab.fingerprint`).
        environment: versions, processor and threads.
        recorded_at: when, as an ISO 8601 time with its zone.
        claims: the results in the study's order.
    """

    paper: str
    scale: Scale
    fingerprint: str
    environment: Mapping[str, Any]
    recorded_at: str
    claims: tuple[ClaimResult, ...]

    def counts(self) -> dict[Verdict, int]:
        """How many claims have each verdict."""
        found = Counter(claim.verdict for claim in self.claims)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        head = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "claims"}
        claims = [{item.name: getattr(claim, item.name) for item in fields(claim)} for claim in self.claims]
        return cast(dict[str, Any], plain({**head, "claims": claims}))


def save(evidence: Evidence, path: str | Path) -> Path:
    """Write the evidence to `path`, atomically.

    Raises:
        ValueError: the evidence is not well formed; nothing is written.
        OSError: the file cannot be written.
    """
    document = evidence.to_dict()
    parse(document, str(path))
    return write_atomic(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load(path: str | Path) -> Evidence:
    """Read and check an evidence file.

    Raises:
        UserError: the file is not JSON, or a field is missing, unknown, or of the wrong kind; the message names it.
        OSError: the file cannot be read.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not an evidence file: {error}") from None
    return parse(document, str(path))


def parse(document: Any, source: str = "evidence") -> Evidence:
    """The evidence in a decoded JSON document.

    Args:
        document: the decoded JSON.
        source: what messages call it.

    Raises:
        UserError: a field is missing, unknown, or of the wrong kind; the message names it.
    """
    head = _fields(document, Evidence, source)
    for name in ("paper", "fingerprint", "recorded_at"):
        _require(_is_text(head[name]), f"{source}: {name} must be a non-empty string, got {head[name]!r}")
    _require(head["scale"] in SCALES, f"{source}: scale must be one of {', '.join(SCALES)}, got {head['scale']!r}")
    _require(
        re.fullmatch("[0-9a-f]{64}", head["fingerprint"]) is not None,
        f"{source}: fingerprint must be 64 hexadecimal digits, got {head['fingerprint']!r}",
    )
    _require(
        isinstance(head["environment"], dict) and bool(head["environment"]),
        f"{source}: environment must be a non-empty object, got {head['environment']!r}",
    )
    try:
        zone = datetime.fromisoformat(head["recorded_at"]).tzinfo
    except ValueError:
        zone = None
    _require(zone is not None, f"{source}: recorded_at must be an ISO time with a zone, got {head['recorded_at']!r}")
    _require(
        isinstance(head["claims"], list) and bool(head["claims"]), f"{source}: claims must be a list that is not empty"
    )
    claims = tuple(_claim(item, f"{source}: claims[{index}]") for index, item in enumerate(head["claims"]))
    repeated = [key for key, count in Counter(claim.id for claim in claims).items() if count > 1]
    _require(not repeated, f"{source}: claim ids must be unique, {', '.join(repeated)} occurs more than once")
    return Evidence(**{**head, "claims": claims})


def _claim(document: Any, source: str) -> ClaimResult:
    values = _fields(document, ClaimResult, source)
    for name in ("id", "statement", "reported", "criterion"):
        _require(_is_text(values[name]), f"{source}.{name} must be a non-empty string, got {values[name]!r}")
    source = f"{source} ({values['id']})"
    verdict, measured, seeds, seconds = (values[name] for name in ("verdict", "measured", "seeds", "seconds"))
    _require(verdict in VERDICTS, f"{source}: verdict must be one of {', '.join(VERDICTS)}; got {verdict!r}")
    _require(isinstance(measured, dict) and bool(measured), f"{source}: measured must be an object with numbers in it")
    _require(
        isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds),
        f"{source}: seeds must be a list of integers, got {seeds!r}",
    )
    _require(
        isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < math.inf,
        f"{source}: seconds must be a number that is not negative, got {seconds!r}",
    )
    return ClaimResult(**{**values, "measured": numbers(measured), "seeds": tuple(seeds), "seconds": float(seconds)})


def _fields(document: Any, kind: type, source: str) -> dict[str, Any]:
    _require(isinstance(document, dict), f"{source} must be a JSON object, got {type(document).__name__}")
    wanted = [item.name for item in fields(kind)]
    missing = [name for name in wanted if name not in document]
    unknown = [name for name in document if name not in wanted]
    _require(not missing, f"{source}: missing {', '.join(missing)}")
    _require(not unknown, f"{source}: unknown field {', '.join(map(repr, unknown))}; known are {', '.join(wanted)}")
    return dict(document)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and arrays become numbers or lists, non-finite numbers become strings.

    Raises:
        TypeError: something in it has no such form.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range | set):
        return [plain(item) for item in value]
    raise TypeError(f"measured values must be numbers, strings, lists or mappings, got {type(value).__name__}")


def numbers(value: Any) -> Any:
    """The inverse of `plain` for non-finite numbers."""
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def results_folder() -> Path:
    """Where evidence lives: ``results`` of the checkout that the package runs from, else of the working directory."""
    checkout = PACKAGE.parent
    root = checkout if (checkout / "pyproject.toml").is_file() and os.access(checkout, os.W_OK) else Path()
    return root / "results"
