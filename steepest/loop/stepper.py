"""`Resumable`: the state of a stepper from a list of its attributes."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.loop.driver import run
from steepest.loop.record import Result


class Resumable:
    """What the library's steppers share: a state dict made of named attributes, and `run`.

    A subclass names in `_state` the attributes that its next step depends on. Each is a tensor, a number, a text,
    None, a list, tuple or dict of these, a `torch.Generator`, or an object with `state_dict` and `load_state_dict`.
    An attribute `generator` is added by itself. Names in `_late` may be None at one time and a tensor at another.

    Loading checks everything before it changes anything. A tensor keeps the shape, dtype and device that the stepper
    was built with; a late one takes the shape of what is loaded.
    """

    _state: ClassVar[tuple[str, ...]] = ()
    _late: ClassVar[tuple[str, ...]] = ()

    def step(self) -> Mapping[str, Any]:
        """Advance by one step.

        Returns:
            The metrics of the step.
        """
        raise NotImplementedError

    def _names(self) -> tuple[str, ...]:
        return (*self._state, "generator") if getattr(self, "generator", None) is not None else self._state

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the next step depends on."""
        return {name: _snapshot(getattr(self, name)) for name in self._names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            TypeError: it is no mapping.
            ValueError: it is of another problem, or of another method; nothing is changed then.
        """
        names = set(self._names())
        _check_names(state, names)
        fitted = {}
        for name in names:
            present = getattr(self, name)
            late = name in self._late and (present is None or state[name] is None)
            fitted[name] = _snapshot(state[name]) if late else _fit(name, present, state[name])
        parts = {name: copy.deepcopy(getattr(self, name).state_dict()) for name in names if _is_part(self, name)}
        try:
            for name in parts:
                getattr(self, name).load_state_dict(fitted[name])
        except Exception:
            for name, before in parts.items():
                getattr(self, name).load_state_dict(before)
            raise
        for name in names - set(parts):
            present = getattr(self, name)
            if isinstance(present, torch.Generator):
                present.set_state(fitted[name])
            else:
                setattr(self, name, fitted[name])

    def run(self, steps: int | None = None, **options: Any) -> Result:
        """`steepest.run(self, steps, **options)`: progress, history, stop rules, checkpoints."""
        return run(self, steps, **options)


def matching_state(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `state` that has the names, shapes, dtypes and devices of `like`, for a `load_state_dict` by hand.

    Raises:
        TypeError: it is no mapping.
        ValueError: it does not fit.
    """
    _check_names(state, set(like))
    return {name: _fit(name, present, state[name]) for name, present in like.items()}


def _check_names(state: Any, names: set[str]) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping, got {type(state).__name__}")
    if set(state) != names:
        raise ValueError(
            f"state must have the entries {sorted(names)}, got {sorted(map(str, state))}: it is of another method, "
            "or was made with other options"
        )


def _is_part(owner: Any, name: str) -> bool:
    value = getattr(owner, name)
    return hasattr(value, "load_state_dict") and not isinstance(value, torch.Generator)


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Mapping):
        return {name: _snapshot(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_snapshot(each) for each in value)
    if hasattr(value, "state_dict"):
        return _snapshot(value.state_dict())
    return value


def _fit(name: str, present: Any, saved: Any) -> Any:
    """`saved`, in the form of `present`; raises where they do not match."""
    if isinstance(present, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != present.shape:
            found = tuple(saved.shape) if isinstance(saved, Tensor) else repr(saved)
            raise ValueError(f"state: {name} must have the shape {tuple(present.shape)}, got {found}")
        if saved.is_complex() != present.is_complex():
            raise ValueError(f"state: {name} must be of dtype {present.dtype}, got {saved.dtype}")
        return saved.detach().to(present, copy=True)
    if isinstance(present, torch.Generator):
        size = present.get_state().shape
        if not isinstance(saved, Tensor) or saved.dtype != torch.uint8 or saved.shape != size:
            raise ValueError(f"state: {name} must be the state of a generator on {present.device}, got {saved!r:.60}")
        return saved.cpu()
    if isinstance(present, Mapping):
        if not isinstance(saved, Mapping) or set(saved) != set(present):
            raise ValueError(f"state: {name} must have the entries {sorted(map(str, present))}, got {saved!r:.60}")
        return {key: _fit(f"{name}[{key!r}]", each, saved[key]) for key, each in present.items()}
    if isinstance(present, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(present):
            raise ValueError(f"state: {name} must have {len(present)} entries, got {saved!r:.60}")
        pairs = enumerate(zip(present, saved, strict=True))
        return type(present)(_fit(f"{name}[{index}]", each, other) for index, (each, other) in pairs)
    if hasattr(present, "load_state_dict"):
        return saved
    if isinstance(saved, Tensor) or (present is None) != (saved is None):
        raise ValueError(f"state: {name} must be like {present!r}, got {saved!r:.60}")
    if isinstance(present, int | float | bool | str) and not _same_kind(present, saved):
        raise ValueError(f"state: {name} must be a {type(present).__name__}, got {saved!r}")
    return saved


def _same_kind(present: Any, saved: Any) -> bool:
    if isinstance(present, str | bool):
        return type(saved) is type(present)
    return isinstance(saved, int | float) and not isinstance(saved, bool)
