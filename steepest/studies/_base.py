"""The vocabulary in which a study is written.

A study is one module of this package, named after its paper, with three names in it:

* ``COMPONENTS``, a tuple of strings: the dotted names of what the library implements of the paper;
* ``CLAIMS``, a tuple of `Claim`: what the paper says, and when we say that it holds;
* ``measure(claim, run)``: the numbers for the claim with that id, a mapping that JSON can hold.

Nobody writes a verdict: `Claim.verdict` computes it from the numbers. ``steepest study SLUG`` runs a study.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:
    import torch

Scale = Literal["smoke", "desktop", "gpu"]
Verdict = Literal["holds", "partly", "does not hold here"]
SCALES: tuple[Scale, ...] = get_args(Scale)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Attributes:
        id: short and unique in the study, such as "C1".
        statement: the claim, in our words.
        reported: what the paper reports for it, numbers included.
        criterion: when we say that it holds, in words; `judge` is the same in code.
        judge: from the measured numbers to one bool per part of the criterion (or a single bool).
            All true: the claim holds. Some: partly. None: it does not hold here.
        scales: where the claim is measured; leave out scales that cannot show it.
    """

    id: str
    statement: str
    reported: str
    criterion: str
    judge: Callable[[Mapping[str, Any]], bool | Sequence[bool] | Mapping[str, bool]]
    scales: tuple[Scale, ...] = SCALES

    def verdict(self, measured: Mapping[str, Any]) -> Verdict:
        """The verdict that the measured numbers give.

        Raises:
            TypeError: `judge` returned something else than truth values, or none at all.
        """
        answer = self.judge(measured)
        if isinstance(answer, Mapping):
            answer = list(answer.values())
        parts = list(answer) if isinstance(answer, Sequence) else [answer]
        if not parts or not all(_is_truth(part) for part in parts):
            raise TypeError(f"the judge of claim {self.id!r} must return True or False for each part, got {answer!r}")
        if all(parts):
            return "holds"
        return "partly" if any(parts) else "does not hold here"


@dataclass
class Run:
    """What a study's `measure` is given: the scale, the randomness, and a place to say what it is doing.

    Attributes:
        scale: "smoke" (at most 5 s a study), "desktop" (at most 15 minutes) or "gpu".
        device: where tensors belong at this scale.
        say: shows one line of progress.
        remember: see `once`; set by the runner.
        used_seeds: the seeds handed out while the present claim was measured; they go into the evidence.
    """

    scale: Scale
    device: str = "cpu"
    say: Callable[[str], None] = lambda line: None
    remember: Callable[[str, Callable[[], Any]], Any] = lambda name, compute: compute()
    used_seeds: set[int] = field(default_factory=set)

    def pick(self, *, smoke: T, desktop: T, gpu: T | None = None) -> T:
        """The value for this run's scale; `gpu` defaults to `desktop`."""
        if self.scale == "smoke":
            return smoke
        return desktop if self.scale == "desktop" or gpu is None else gpu

    def seeds(self, count: int) -> range:
        """The seeds 0 .. count - 1, noted in the evidence."""
        self.used_seeds.update(range(count))
        return range(count)

    def generator(self, seed: int) -> "torch.Generator":
        """A generator on the CPU (the same numbers for every device), its seed noted in the evidence."""
        import torch

        self.used_seeds.add(seed)
        return torch.Generator().manual_seed(seed)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, done once for all claims of the study that ask for `name`, and kept when a run is resumed.

        The result must be something that JSON can hold: numbers, strings, lists, mappings with string keys.
        """
        return self.remember(name, compute)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in {"bool", "bool_"}
