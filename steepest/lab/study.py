"""Find studies, run them, and judge what they measure."""

import ast
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from steepest._errors import UserError
from steepest._files import write_atomic
from steepest.lab import evidence as evidence_file
from steepest.lab.evidence import ClaimResult, Evidence, numbers, plain
from steepest.lab.fingerprint import PACKAGE, fingerprint
from steepest.lab.machine import environment
from steepest.studies._base import SCALES, Claim, Run, Scale

STUDIES = PACKAGE / "studies"
RUNS = Path("runs") / "studies"


@dataclass(frozen=True)
class Study:
    """One study, imported.

    Attributes:
        slug: its name, which is its module's.
        title: the first line of its module's docstring.
        components: dotted names of what the library implements of the paper.
        claims: the claims, in order.
        measure: the function that measures one claim.
        fingerprint: the hash of the code that it runs.
    """

    slug: str
    title: str
    components: tuple[str, ...]
    claims: tuple[Claim, ...]
    measure: Callable[[str, Run], Mapping[str, Any]]
    fingerprint: str


def slugs(folder: Path = STUDIES) -> list[str]:
    """The names of all studies, in alphabetical order; none is imported."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def source(slug: str) -> Path:
    """The file of a study.

    Raises:
        UserError: there is no such study; the message lists those that there are.
    """
    known = slugs()
    if slug not in known:
        near = get_close_matches(slug, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the studies are: {', '.join(known)}"
        raise UserError(f"no study is named {slug!r}; {hint}")
    return STUDIES / f"{slug}.py"


def components(slug: str) -> tuple[str, ...]:
    """What a study says that the library implements of its paper; the study is read, not imported."""
    for node in ast.parse(source(slug).read_bytes()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "COMPONENTS" for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    return ()


def load(slug: str) -> Study:
    """Import a study and check that it has what a study needs.

    Raises:
        UserError: there is no such study.
        TypeError: its module lacks ``CLAIMS``, ``COMPONENTS`` or ``measure``, or two claims share an id.
    """
    path = source(slug)
    module = import_module(f"steepest.studies.{slug}")
    for name in ("COMPONENTS", "CLAIMS", "measure"):
        if not getattr(module, name, None):
            raise TypeError(f"study {slug!r} must define {name} (see steepest.studies._base)")
    claims = tuple(module.CLAIMS)
    ids = [claim.id for claim in claims]
    if len(set(ids)) < len(ids):
        raise TypeError(f"study {slug!r} has two claims with the same id: {', '.join(ids)}")
    title = (module.__doc__ or slug).strip().splitlines()[0]
    return Study(slug, title, tuple(module.COMPONENTS), claims, module.measure, fingerprint(path))


def run_study(
    study: Study | str,
    scale: Scale = "desktop",
    *,
    runs: Path | None = RUNS,
    say: Callable[[str], None] = lambda line: None,
    done: Callable[[ClaimResult], None] = lambda result: None,
) -> Evidence:
    """Measure and judge every claim of a study.

    Each claim is kept in `runs` as soon as it is measured. The same command goes on after an interruption, as long as
    neither the study's code nor the environment changed; the claim under way is measured again.

    Args:
        study: a study or its name.
        scale: "smoke", "desktop" or "gpu".
        runs: where measurements are kept; None keeps none.
        say: called with lines of progress.
        done: called with each claim's result.

    Returns:
        The evidence, with a verdict for each claim that this scale measures.

    Raises:
        UserError: no such study or scale, or no GPU for scale "gpu".
    """
    device = _device(check_scale(scale))
    study = load(study) if isinstance(study, str) else study
    around = _environment(device)
    folder = runs / study.slug / f"{scale}-{study.fingerprint[:12]}" if runs else None
    keep = _Kept(folder, {"fingerprint": study.fingerprint, "environment": around})
    results = []
    for claim in study.claims:
        if scale not in claim.scales:
            continue
        run = Run(scale, device, say)
        run.remember = lambda name, compute, run=run: keep.shared(name, compute, run)
        kept = keep.get(
            f"claim-{claim.id}",
            run,
            partial(_measure, study, claim, run),
            partial(say, f"{study.slug} {claim.id}: already measured"),
        )
        result = ClaimResult(
            claim.id,
            claim.statement,
            claim.reported,
            claim.criterion,
            kept["value"],
            claim.verdict(kept["value"]),
            tuple(kept["seeds"]),
            kept["seconds"],
        )
        results.append(result)
        done(result)
    if not results:
        raise UserError(f"study {study.slug!r} measures nothing at scale {scale!r}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Evidence(study.slug, scale, study.fingerprint, around, now, tuple(results))


def record(evidence: Evidence, results: Path | None = None) -> Path:
    """Write evidence where it counts: ``results/<slug>.json``.

    Raises:
        UserError: the evidence is of scale "smoke", which only shows that the machinery works.
    """
    check_recordable(evidence.scale)
    return evidence_file.save(evidence, (results or evidence_file.results_folder()) / f"{evidence.paper}.json")


def check_scale(scale: str) -> Scale:
    """`scale`, if it is one.

    Raises:
        UserError: it is not.
    """
    if scale not in SCALES:
        raise UserError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    return scale


def check_recordable(scale: Scale) -> None:
    """Refuse to record at a scale that only shows that a study runs.

    Raises:
        UserError: the scale is "smoke".
    """
    if scale == "smoke":
        raise UserError("scale smoke only shows that the study runs; record at scale desktop or gpu")


def status(slug: str, results: Path | None = None) -> tuple[str, Evidence | None]:
    """Whether a study's evidence is "fresh", "stale" (its code changed since) or "missing", and the evidence.

    Raises:
        UserError: the evidence file is malformed or belongs to another paper.
    """
    path = (results or evidence_file.results_folder()) / f"{slug}.json"
    if not path.is_file():
        return "missing", None
    found = evidence_file.load(path)
    if found.paper != slug:
        raise UserError(f"{path}: paper must be {slug!r}, the file's name; got {found.paper!r}")
    return ("fresh" if found.fingerprint == fingerprint(source(slug)) else "stale"), found


def check_verdicts(evidence: Evidence) -> list[str]:
    """Judge recorded numbers again: what a recorded verdict, or text, says differently from the study.

    Returns:
        One sentence per difference; empty if the file says what its numbers say.
    """
    claims = {claim.id: claim for claim in load(evidence.paper).claims}
    wrong = []
    for result in evidence.claims:
        claim = claims.get(result.id)
        if claim is None:
            wrong.append(f"{result.id}: the study has no such claim")
            continue
        verdict = claim.verdict(result.measured)
        if verdict != result.verdict:
            wrong.append(f"{result.id}: recorded as {result.verdict!r}, but its numbers say {verdict!r}")
        wrong += [
            f"{result.id}: the {name} differs from the study's"
            for name in ("statement", "reported", "criterion")
            if getattr(claim, name) != getattr(result, name)
        ]
    return wrong


def _measure(study: Study, claim: Claim, run: Run) -> Mapping[str, Any]:
    run.say(f"{study.slug} {claim.id} ...")
    measured = study.measure(claim.id, run)
    if not isinstance(measured, Mapping) or not measured:
        raise TypeError(f"measure({claim.id!r}) of study {study.slug!r} must return numbers by name, got {measured!r}")
    return measured


def _environment(device: str) -> dict[str, Any]:
    import torch

    return {**environment(torch.device(device)), "platform": f"{platform.system()} {platform.machine()}"}


def _device(scale: Scale) -> str:
    if scale != "gpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UserError("scale gpu needs a CUDA device, and this machine has none; use scale desktop")
    return "cuda"


class _Kept:
    """Measured values by name, kept as JSON files where a folder is given, valid for one code and one environment."""

    def __init__(self, folder: Path | None, key: Mapping[str, Any]):
        self.folder = folder
        self.key = plain(key)
        self.memory: dict[str, dict[str, Any]] = {}

    def get(
        self, name: str, run: Run, compute: Callable[[], Any], found: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """The entry {value, seeds, seconds} of `name`, computed if there is none yet."""
        entry = self.memory.get(name) or self._read(name)
        if entry is None:
            before, run.used_seeds = run.used_seeds, set()
            start = time.perf_counter()
            value = plain(compute())
            seconds = round(time.perf_counter() - start, 3)
            entry = {"value": value, "seeds": sorted(run.used_seeds), "seconds": seconds}
            run.used_seeds |= before
            if self.folder:
                write_atomic(self._path(name), json.dumps({**self.key, **entry}, indent=1, allow_nan=False))
        else:
            found()
        run.used_seeds.update(entry["seeds"])
        self.memory[name] = entry
        return {**entry, "value": numbers(entry["value"])}

    def shared(self, name: str, compute: Callable[[], Any], run: Run) -> Any:
        return self.get(f"shared-{name}", run, compute)["value"]

    def _path(self, name: str) -> Path:
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
        return cast(Path, self.folder) / f"{safe}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return entry if all(entry.get(key) == value for key, value in self.key.items()) else None
