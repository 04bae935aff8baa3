"""Checkpoints of a run: written atomically, read with `weights_only=True`, judged before anything is changed."""

import copy
import io
import stat
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steepest._files import save_atomic
from steepest.loop.record import History

FORMAT = 1
KIND = "steepest.loop checkpoint"
_PLAIN = (Tensor, torch.nn.Parameter, int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype)
_FIELDS: dict[str, tuple[type, ...]] = {
    "stepper": (str,),
    "step": (int,),
    "seconds": (float,),
    "history": (dict,),
    "ended": (str, type(None)),
    "final": (bool,),
    "parts": (dict,),
    "rng": (dict, type(None)),
}


@dataclass
class Progression:
    """Where a run stands: `final` if a rule or a callback ended it, `ended` the reason if it was a callback."""

    step: int = 0
    seconds: float = 0.0
    history: History = field(default_factory=History)
    ended: str | None = None
    final: bool = False


@dataclass(frozen=True)
class Part:
    """A piece of state with its owner's way to give and take it."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]

    @classmethod
    def of(cls, name: str, owner: Any) -> "Part":
        """The part of an object with a state dict, or of a torch.Generator.

        Raises:
            TypeError: `owner` has neither.
        """
        if isinstance(owner, torch.Generator):
            return cls(owner.get_state, owner.set_state)
        if isinstance(owner, type) or not all(
            callable(getattr(owner, method, None)) for method in ("state_dict", "load_state_dict")
        ):
            what = f"the class {owner.__name__}" if isinstance(owner, type) else repr(owner)
            raise TypeError(
                f"state[{name!r}] must be an object with state_dict() and load_state_dict(), or a torch.Generator; "
                f"got {what}"
            )
        return cls(owner.state_dict, owner.load_state_dict)

    @classmethod
    def parameters(cls, parameters: list[Tensor]) -> "Part":
        """The part that holds bare tensors, written back in place."""

        def put(saved: list[Tensor]) -> None:
            shapes, found = [tuple(p.shape) for p in parameters], [tuple(p.shape) for p in saved]
            if shapes != found:
                raise ValueError(f"parameters of shapes {found} saved, {shapes} here")
            with torch.no_grad():
                for parameter, value in zip(parameters, saved, strict=True):
                    parameter.copy_(value)

        return cls(lambda: [p.detach() for p in parameters], put)


class Checkpoint:
    """One checkpoint file and the parts that go into it."""

    def __init__(self, path: Path, parts: Mapping[str, Part], stepper: str, rng: bool):
        self.path, self.parts, self.stepper, self.rng = path, parts, stepper, rng
        self._portable: set[type] = set()

    def check(self) -> None:
        """Raise now what the first save would raise later: an unwritable path, a state of the wrong kinds."""
        _check_writable(self.path)
        self._collect()

    def save(self, at: Progression) -> None:
        """Write the file: the old one stays in place until the new one is whole."""
        content = {
            "kind": KIND,
            "format": FORMAT,
            "stepper": self.stepper,
            "step": at.step,
            "seconds": float(at.seconds),
            "history": at.history.state_dict(),
            "ended": at.ended,
            "final": at.final,
            "parts": self._collect(),
            "rng": _rng_state() if self.rng else None,
        }
        save_atomic(self.path, content)

    def load(self, last_step: int | None = None) -> Progression | None:
        """Put the saved state back into the parts; None if there is no file.

        Raises:
            ValueError: the file is unusable, of another run, or past `last_step`. The parts are then as before.
        """
        if not self.path.exists():
            return None
        content = self._read()
        try:
            history = History.from_state(content["history"])
        except Exception as error:
            raise self._broken("its history cannot be read") from error
        if last_step is not None and content["step"] > last_step:
            raise ValueError(
                f"checkpoint {self.path} is at step {content['step']}, past steps={last_step}; "
                "ask for more steps, give another path, or pass resume=False to start over"
            )
        saved = [(name, part, content["parts"][name]) for name, part in self.parts.items()]
        if self.rng:
            saved.append(("torch's random number generator", Part(_rng_state, _set_rng_state), content["rng"]))
        self._put(saved)
        return Progression(content["step"], content["seconds"], history, content["ended"], content["final"])

    def _read(self) -> dict[str, Any]:
        try:
            content = torch.load(self.path, map_location=_place, weights_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except PermissionError as error:
            raise self._broken(f"it cannot be read ({error.strerror})") from error
        except Exception as error:
            raise self._broken("it is damaged, or no checkpoint at all") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise self._broken("it was not written by steepest.run")
        found = content.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise self._broken(f"it has format {found}, of a newer steepest; this one reads up to {FORMAT}")
        wrong = ["format"] if not isinstance(found, int) or found < 1 else []
        wrong += [name for name, kinds in _FIELDS.items() if not isinstance(content.get(name, self), kinds)]
        if wrong or content["step"] < 0:
            raise self._broken(f"its content is not what it should be ({', '.join(wrong) or 'step'})")
        if content["stepper"] != self.stepper:
            raise self._broken(f"it is of a run of {content['stepper']}, not of {self.stepper}")
        if set(content["parts"]) != set(self.parts):
            raise self._broken(
                f"it holds the state of {sorted(map(str, content['parts']))}, this run has {sorted(self.parts)}"
            )
        if self.rng and content["rng"] is None:
            raise self._broken("it has no state of torch's random number generators; pass rng=False to go on without")
        return content

    def _put(self, saved: list[tuple[str, Part, Any]]) -> None:
        before = [copy.deepcopy(part.get()) for _, part, _ in saved]
        for index, (name, part, state) in enumerate(saved):
            try:
                part.set(state)
            except Exception as error:
                for (_, touched, _), old in zip(saved[: index + 1], before, strict=False):
                    touched.set(old)
                reason = " ".join(str(error).split()) or type(error).__name__
                raise self._broken(f"{name} does not take its state: {reason}") from error

    def _collect(self) -> dict[str, Any]:
        states = {name: part.get() for name, part in self.parts.items()}
        for name, state in states.items():
            self._check_portable(state, name)
        return states

    def _check_portable(self, value: Any, where: str) -> None:
        kind = type(value)
        if kind in _PLAIN or kind in self._portable:
            return
        if kind in (dict, OrderedDict):
            for key, item in value.items():
                self._check_portable(key, f"a key of {where}")
                self._check_portable(item, f"{where}[{key!r}]")
        elif kind in (list, tuple):
            for index, item in enumerate(value):
                self._check_portable(item, f"{where}[{index}]")
        else:
            _check_readable(value, where)
            if isinstance(value, Tensor):
                self._portable.add(kind)

    def _broken(self, reason: str) -> ValueError:
        return ValueError(f"cannot resume from checkpoint {self.path}: {reason}. Pass resume=False to start over")


def _place(storage: Any, location: str) -> Any:
    if location.startswith("cuda"):
        index = int(location.partition(":")[2] or 0)
        return None if index < torch.cuda.device_count() else storage
    return storage if location.startswith("mps") and not torch.backends.mps.is_available() else None


def _check_writable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be written: {error}") from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"checkpoint must be the path of a file, and {path} is a folder; try {path / 'run.ckpt'}")
    if not stat.S_ISREG(mode):
        raise ValueError(f"checkpoint must be the path of a file, and {path} is a device or the like")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be written, its folder says: {error.strerror}") from error


def _check_readable(value: Any, where: str) -> None:
    try:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise TypeError(
            f"the state dict cannot go into a checkpoint: {where} is a "
            f"{type(value).__module__}.{type(value).__qualname__}; "
            "use tensors, Python numbers, text, and lists, tuples and dicts of them"
        ) from error


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["cpu"])
    states = saved.get("cuda", [])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, state in enumerate(states[:here]):
        torch.cuda.set_rng_state(state, index)
    if here < len(states):
        warnings.warn(
            f"the checkpoint has random number states of {len(states)} CUDA devices and {here} are here: "
            "draws on the others will differ from an uninterrupted run",
            stacklevel=2,
        )
