"""Several optimizers that act as one."""

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from steepest.optim.distributed import first_bad
from steepest.optim.placement import local

NonFinite = Literal["raise", "skip", "ignore"]


class Mixed(Optimizer):
    """Several optimizers over different parameters, used as one `torch.optim.Optimizer`.

    `param_groups` joins the parts' groups; they are the parts' own dictionaries, so a learning-rate scheduler, a
    GradScaler or a logger that works on an optimizer works on this one. There is one `state_dict`, one `step` (a
    closure is evaluated once), and one check for bad gradients before any part moves.

    Args:
        parts: name -> optimizer. No parameter may be in two parts. Optimizers that evaluate the closure several
            times (`torch.optim.LBFGS`) are refused.
        nonfinite: what a gradient with NaN or infinity does, before anything is changed: "raise" an error, "skip" the
            whole step (counted in `skipped_steps`), or "ignore": leave it to the parts.

    Raises:
        TypeError: a part is not an optimizer.
        ValueError: there is no part, a parameter is in two parts, or a part needs the closure.
        FloatingPointError: at a step, a non-finite gradient under nonfinite="raise".

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = Mixed({
        ...     "weights": torch.optim.SGD([layer.weight], lr=0.1, momentum=0.9),
        ...     "bias": torch.optim.AdamW([layer.bias], lr=0.01),
        ... })
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.01]
    """

    def __init__(self, parts: Mapping[str, Optimizer], *, nonfinite: NonFinite = "ignore") -> None:
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite must be one of {', '.join(get_args(NonFinite))}; got {nonfinite!r}")
        self.nonfinite = nonfinite
        self._skipped = 0
        checked = _checked(parts)
        self._parts: dict[str, Optimizer] = {}
        super().__init__([{"params": []}], {})  # sets up hooks; while there are no parts, groups are ignored
        self._parts = checked
        self.defaults = _common_defaults(checked)

    @property
    def parts(self) -> Mapping[str, Optimizer]:
        """The optimizers by name; read-only, the optimizers themselves may be used."""
        return MappingProxyType(self._parts)

    @property
    def skipped_steps(self) -> int:
        """How many steps `nonfinite="skip"` has left out, of all parts at once or of one that checks for itself."""
        return self._skipped + max(getattr(part, "skipped_steps", 0) for part in self._parts.values())

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parts' own groups, one part after the other. Add to them with `add_param_group`."""
        return [group for part in self._parts.values() for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if groups and [id(group) for group in groups] != [id(group) for group in self.param_groups]:
            raise AttributeError("param_groups of a Mixed belongs to its parts; use add_param_group(group, part=...)")

    @property
    def state(self) -> "MutableMapping[Any, Any]":  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parts' states, seen as one mapping from parameter to state."""
        return _JoinedState(self._parts)

    @state.setter
    def state(self, state: Any) -> None:
        if len(state):
            raise AttributeError("state of a Mixed belongs to its parts; use load_state_dict")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every part.

        Args:
            closure: evaluates the model again, calls backward, and returns the loss; it is called once.

        Returns:
            What `closure` returned, or None.
        """
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """What `step` does between the hooks that torch puts around it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.nonfinite != "ignore" and not self._finite():
            self._skipped += 1
            return loss
        for part in self._parts.values():
            part.step()
        return loss

    def _finite(self) -> bool:
        from steepest.optim.checks import first_nonfinite

        found = [
            (name, group, index, parameter.grad)
            for name, part in self._parts.items()
            for group in part.param_groups
            for index, parameter in enumerate(group["params"])
            if parameter.grad is not None and parameter.grad.layout == torch.strided
        ]
        bad = first_nonfinite([local(gradient) for *_, gradient in found])
        everything = [parameter for _, parameter in _parameters(self._parts)]
        bad = first_bad(list(self._parts.values()), everything, bad)
        if bad is None:
            return True
        if self.nonfinite == "skip":
            return False
        part, group, index, gradient = found[bad]
        name = group["param_names"][index] if "param_names" in group else f"number {index} of its group"
        raise FloatingPointError(
            f"the gradient of parameter {name} (shape {tuple(gradient.shape)}, part {part!r}) holds NaN or infinity; "
            "nothing was changed. Lower lr, look for the cause, or pass nonfinite='skip' to leave such steps out"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of every part."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any], part: str | None = None) -> None:
        """Add parameters to one part.

        Args:
            param_group: as for any optimizer; a key "part" may name the part.
            part: the name of the part; not needed if there is only one.

        Raises:
            ValueError: no part of that name, none given where there are several, or a parameter that is in a part.
        """
        if not self._parts:
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        part = group.pop("part", part) if part is None else part
        known = ", ".join(map(repr, self._parts))
        if part is None and len(self._parts) == 1:
            part = next(iter(self._parts))
        if part is None:
            raise ValueError(
                f"part: say which part the group belongs to: add_param_group(group, part=...), one of {known}"
            )
        if part not in self._parts:
            raise ValueError(f"part: no part {part!r}; the parts are {known}")
        given = group.get("params", [])
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        own = {id(parameter): name for name, parameter in _parameters(self._parts)}
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if id(parameter) in own:
                raise ValueError(f"param_group: a parameter of shape {tuple(parameter.shape)} is already in part "
                                 f"{own[id(parameter)]!r}")  # fmt: skip
        target = self._parts[part]
        if any("param_names" in known_group for known_group in target.param_groups):
            start = sum(len(known_group["params"]) for known_group in target.param_groups)
            group["params"] = [
                entry if isinstance(entry, tuple) else (f"{part}.added.{start + index}", entry)
                for index, entry in enumerate(group["params"])
            ]
        target.add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The joined state in torch's format ("state" by number, "param_groups"), and "parts" to take it apart.

        It holds what the parts' state dicts hold: with torch's and this library's optimizers, plain data and tensors,
        so that `torch.load(..., weights_only=True)` reads it.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        joined: dict[str, Any] = {"state": {}, "param_groups": [], "parts": {}, "skipped_steps": self._skipped}
        offset = 0
        for name, part in self._parts.items():
            own = part.state_dict()
            numbers = {number for group in own["param_groups"] for number in group["params"]}
            joined["state"] |= {key + offset: value for key, value in own["state"].items() if key in numbers}
            joined["param_groups"] += [
                {**group, "params": [number + offset for number in group["params"]]} for group in own["param_groups"]
            ]
            joined["parts"][name] = {
                "optimizer": type(part).__name__,
                "groups": len(own["param_groups"]),
                "parameters": len(numbers),
                "state": {key: value for key, value in own["state"].items() if key not in numbers},
                "extra": {key: value for key, value in own.items() if key not in ("state", "param_groups")},
            }
            offset += len(numbers)
        for hook in self._optimizer_state_dict_post_hooks.values():
            joined = hook(self, joined) or joined
        return joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it comes from other parts, groups or parameters. Nothing is changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        pieces = self._take_apart(state_dict)
        before = {name: dict(part.__dict__) for name, part in self._parts.items()}
        try:
            for name, part in self._parts.items():
                part.load_state_dict(pieces[name])
        except BaseException:
            for name, part in self._parts.items():
                part.__dict__.clear()
                part.__dict__.update(before[name])
            raise
        self._skipped = int(state_dict.get("skipped_steps", 0))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _take_apart(self, joined: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        named = "parts" not in joined and _has_names(joined)
        missing = {"state", "param_groups", *(() if named else ("parts",))} - set(joined)
        if missing:
            raise ValueError(
                f"state_dict: not one of a Mixed, it has no {', '.join(sorted(missing))}; it has "
                f"{', '.join(map(str, joined)) or 'nothing'}"
            )
        own = self._parts
        saved = joined["parts"] if not named else {name: _part_entry(part) for name, part in own.items()}
        if list(saved) != list(own):
            raise ValueError(f"state_dict: it has the parts {list(saved)}, this optimizer has {list(own)}")
        pieces, groups = {}, list(joined["param_groups"])
        for name, part in own.items():
            entry = saved[name]
            if entry["optimizer"] != type(part).__name__:
                raise ValueError(
                    f"state_dict: part {name!r} was saved by {entry['optimizer']}, here it is {type(part).__name__}"
                )
            mine, groups = groups[: entry["groups"]], groups[entry["groups"] :]
            sizes, wanted = [len(g["params"]) for g in mine], [len(g["params"]) for g in part.param_groups]
            if sizes != wanted:
                raise ValueError(
                    f"state_dict: the groups of part {name!r} hold {sizes} parameters, this optimizer's hold {wanted}"
                )
            numbers = [number for group in mine for number in group["params"]]
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            places = {number: place for place, number in enumerate(numbers)}
            state = {number: joined["state"][number] for number in numbers if number in joined["state"]}
            _check_shapes(name, state, dict(zip(numbers, parameters, strict=True)))
            pieces[name] = {
                **entry["extra"],
                "state": {places[number]: value for number, value in state.items()} | entry["state"],
                "param_groups": [{**g, "params": [places[number] for number in g["params"]]} for g in mine],
            }
        if groups:
            raise ValueError(f"state_dict: {len(groups)} parameter groups belong to no part")
        return pieces

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "_parts": self._parts, "nonfinite": self.nonfinite,
                "_skipped": self._skipped}  # fmt: skip

    def __repr__(self) -> str:
        lines = []
        for name, part in self._parts.items():
            groups = part.param_groups
            tensors = sum(len(group["params"]) for group in groups)
            rates = dict.fromkeys(f"{float(group['lr']):g}" for group in groups if "lr" in group)
            lines.append(
                f"  {name}: {type(part).__name__}({tensors} tensors in {len(groups)} groups, lr {', '.join(rates)})"
            )
        return "Mixed(\n" + "\n".join(lines) + "\n)"


class _JoinedState(MutableMapping[Any, Any]):
    """The states of several optimizers; a parameter is looked up in the part that owns it."""

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        self._parts = parts

    def _home(self, key: Any) -> MutableMapping[Any, Any]:
        for part in self._parts.values():
            if key in part.state or any(key is parameter for g in part.param_groups for parameter in g["params"]):
                return part.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._home(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._home(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._home(key)[key]

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts.values():
            yield from part.state

    def __contains__(self, key: object) -> bool:
        return any(key in part.state for part in self._parts.values())

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts.values())


def _parameters(parts: Mapping[str, Optimizer]) -> Iterator[tuple[str, Tensor]]:
    for name, part in parts.items():
        for group in part.param_groups:
            for parameter in group["params"]:
                yield name, parameter


def _checked(parts: Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    if not isinstance(parts, Mapping):
        raise TypeError(f"parts: expected a mapping from name to optimizer, got {type(parts).__name__}")
    if not parts:
        raise ValueError("parts: at least one optimizer is needed")
    for name, part in parts.items():
        if not isinstance(name, str):
            raise TypeError(f"parts: a name must be a string, got {name!r}")
        if not isinstance(part, Optimizer):
            raise TypeError(f"parts[{name!r}]: expected a torch.optim.Optimizer, got {type(part).__name__}")
        closure = inspect.signature(part.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"parts[{name!r}]: {type(part).__name__} must evaluate the closure itself; use it alone")
    owner: dict[int, str] = {}
    for name, parameter in _parameters(parts):
        if owner.setdefault(id(parameter), name) != name:
            raise ValueError(
                f"parts: a parameter of shape {tuple(parameter.shape)} is in both {owner[id(parameter)]!r} and {name!r}"
            )
    return dict(parts)


def _common_defaults(parts: Mapping[str, Optimizer]) -> dict[str, Any]:
    """What every part has as a default; and, for schedulers that cycle momentum, "momentum" where some part has it.

    A scheduler that cycles "betas" writes them to every group, so they count only if all parts have them.
    """
    every = [part.defaults for part in parts.values()]
    shared = {key: every[0][key] for key in every[0] if all(key in defaults for defaults in every)}
    momentum = next((defaults["momentum"] for defaults in every if "momentum" in defaults), None)
    if momentum is not None and "betas" not in shared:
        shared["momentum"] = momentum
    return shared


def _has_names(joined: Mapping[str, Any]) -> bool:
    """Whether parameters go by name, as `torch.distributed.checkpoint` has them: it keeps states and groups alone."""
    groups = joined.get("param_groups", ())
    return any(isinstance(number, str) for group in groups for number in group.get("params", ()))


def _part_entry(part: Optimizer) -> dict[str, Any]:
    """What `state_dict` would say of a part that has nothing beside states and groups."""
    return {"optimizer": type(part).__name__, "groups": len(part.param_groups), "state": {}, "extra": {}}


def _check_shapes(name: str, state: Mapping[Any, Any], parameters: Mapping[Any, Tensor]) -> None:
    """Buffers shaped like another parameter show that the state belongs to another model."""
    for number, values in state.items():
        shape = parameters[number].shape
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            value = values.get(key) if isinstance(values, Mapping) else None
            if isinstance(value, Tensor) and value.shape != shape:
                raise ValueError(
                    f"state_dict: {key} of parameter {number} in part {name!r} has shape {tuple(value.shape)}, "
                    f"the parameter here {tuple(shape)}"
                )
