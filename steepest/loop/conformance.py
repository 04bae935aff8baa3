"""The checks that every stepper passes: the library's own, and yours.

`check_stepper(make)` runs them all; `stepper_checks(make)` gives them one by one, for a test framework.
"""

import io
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.loop.driver import run
from steepest.loop.record import Metrics

Make = Callable[[torch.dtype, torch.Generator], Any]
MakeWith = Callable[[Callable[..., Any]], Any]
NonFinite = Literal["raises", "skips", "any"]


@dataclass(frozen=True)
class StepperCase:
    """How to build a stepper, and what is true of it.

    Attributes:
        make: (dtype, generator) to a new stepper on a small problem. Same arguments, same stepper.
        random: whether it draws from the generator.
        with_objective: a function of the user's to a stepper that calls it; None: there is no such function.
        objective: a well-behaved function for `with_objective`.
        some_nan: what a step does if some of the function's values are NaN: "skips" goes on with a finite state,
            "raises" is an error that changes nothing, "any" promises nothing.
        all_nan: the same if all are NaN.
        steps: how many steps a check makes, at least 2.
        dtypes: the dtypes that the stepper takes.
    """

    make: Make
    random: bool = True
    with_objective: MakeWith | None = None
    objective: Callable[..., Any] | None = None
    some_nan: NonFinite = "any"
    all_nan: NonFinite = "raises"
    steps: int = 6
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


def check_stepper(make: Make, **options: Any) -> None:
    """Run all checks on a stepper.

    Args:
        make: (dtype, generator) to a new stepper on a small problem.
        options: the other attributes of `StepperCase`.

    Raises:
        AssertionError: a check failed; it says which, and how.

    Examples:
        >>> import torch
        >>> from steepest.geometry import Euclidean
        >>> from steepest.loop import check_stepper
        >>> from steepest.minimize import steepest_descent
        >>> def make(dtype, generator):
        ...     x0 = torch.ones(3, dtype=dtype)
        ...     return steepest_descent(lambda x: (x**4).sum(), x0, Euclidean(event_ndim=1), step_size=0.1)
        >>> check_stepper(make, random=False)
    """
    for name, check in stepper_checks(make, **options):
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def stepper_checks(make: Make, **options: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks by name, as functions without arguments.

    Args:
        make: see `check_stepper`.
        options: see `check_stepper`.
    """
    case = StepperCase(make, **options)
    for name, check in _CHECKS.items():
        yield name, lambda check=check: check(case)
    if case.with_objective is not None:
        for name, check in _OBJECTIVE_CHECKS.items():
            yield name, lambda check=check: check(case)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _new(case: StepperCase, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    return case.make(dtype or case.dtypes[-1], _seeded(seed))


def _advance(stepper: Any, steps: int) -> Any:
    for _ in range(steps):
        stepper.step()
    return stepper


def _same(one: Any, other: Any) -> bool:
    """Equal to the last bit, NaN equal to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and bool(one == other)


def _difference(one: Any, other: Any, name: str = "state") -> str:
    if isinstance(one, Mapping) and isinstance(other, Mapping) and set(one) == set(other):
        return next((_difference(one[key], other[key], f"{name}[{key!r}]") for key in one
                     if not _same(one[key], other[key])), "")  # fmt: skip
    return f"{name} is {other!r:.120}, not {one!r:.120}"


def _expect_same(one: Any, other: Any, what: str) -> None:
    assert _same(one, other), f"{what}: {_difference(one, other)}"


def _saved(stepper: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(dict(stepper.state_dict()), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _metrics_are_numbers(case: StepperCase) -> None:
    for dtype in case.dtypes:
        raw = _new(case, dtype=dtype).step()
        assert isinstance(raw, Mapping), f"step must return a mapping of metrics, got {type(raw).__name__}"
        assert raw, "step returned no metric"
        values = Metrics(raw).floats()
        assert all(math.isfinite(value) for value in values.values()), f"a metric is not finite: {values}"


def _same_seed_same_run(case: StepperCase) -> None:
    one, other = (_advance(_new(case), case.steps).state_dict() for _ in range(2))
    _expect_same(one, other, "two steppers made alike differ")
    if not case.random:
        return
    third = _advance(_new(case, seed=1), case.steps).state_dict()
    assert not _same(one, third), "another seed gives the same run: the generator is not used"


def _resumes_exactly(case: StepperCase) -> None:
    for dtype in case.dtypes:
        stepper = _advance(_new(case, dtype=dtype), case.steps // 2)
        saved = _saved(stepper)
        reference = _advance(stepper, case.steps - case.steps // 2).state_dict()
        fresh = _new(case, seed=5, dtype=dtype)
        fresh.load_state_dict(saved)
        _expect_same(saved, dict(fresh.state_dict()), "the state that was loaded is not the one that was saved")
        resumed = _advance(fresh, case.steps - case.steps // 2).state_dict()
        _expect_same(reference, resumed, f"a resumed run in {dtype} ends elsewhere")


def _state_is_a_snapshot(case: StepperCase) -> None:
    stepper = _advance(_new(case), 1)
    state, copy = stepper.state_dict(), _saved(stepper)
    _advance(stepper, 2)
    _expect_same(copy, dict(state), "stepping changed a state dict that was taken before")
    stepper.load_state_dict(state)
    _advance(stepper, 2)
    _expect_same(copy, dict(state), "stepping changed a state dict that was loaded")


def _refuses_foreign_states(case: StepperCase) -> None:
    stepper = _advance(_new(case), 2)
    state = stepper.state_dict()
    wrong: list[Any] = [{}, {"nothing": 1}]
    wrong += [{key: value for key, value in state.items() if key != left} for left in state]
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype != torch.uint8:
            wrong.append({**state, name: torch.zeros((*value.shape, 2), dtype=value.dtype)})
    for each in wrong:
        try:
            stepper.load_state_dict(each)
        except (ValueError, TypeError, KeyError, RuntimeError):
            pass
        else:
            raise AssertionError(f"a state with the entries {sorted(each)} of another problem was taken")
        _expect_same(state, stepper.state_dict(), "a state that was refused changed the stepper")


def _follows_dtype(case: StepperCase) -> None:
    for dtype in case.dtypes:
        state = _advance(_new(case, dtype=dtype), 2).state_dict()
        found = {value.dtype for value in _tensors(state) if value.is_floating_point()}
        assert dtype in found or not found, f"made in {dtype}, it works in {found}"
        assert found <= {dtype, torch.float64}, f"made in {dtype}, part of the state is in {found}"


def _changes_nothing_global(case: StepperCase) -> None:
    def world() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
            torch.are_deterministic_algorithms_enabled(),
        )

    before = world()
    _advance(_new(case), 2)
    assert world() == before, "a step changed torch's default dtype, threads, gradient mode or global random numbers"


def _works_under_gradient_modes(case: StepperCase) -> None:
    plain = _advance(_new(case), 2).state_dict()
    with torch.no_grad():
        without = _advance(_new(case), 2).state_dict()
    _expect_same(plain, without, "the result under torch.no_grad() differs")
    assert not any(value.requires_grad for value in _tensors(plain)), "the state holds a graph"


def _runs_and_resumes(case: StepperCase) -> None:
    reference = _advance(_new(case), case.steps).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        run(_new(case), case.steps // 2, checkpoint=path, progress=False)
        stepper = _new(case, seed=7)
        result = run(stepper, case.steps, checkpoint=path, progress=False)
    assert result.steps == case.steps, f"the resumed run made {result.steps} steps, not {case.steps}"
    _expect_same(reference, stepper.state_dict(), "a run that was resumed from its checkpoint ends elsewhere")


def _survives_ctrl_c(case: StepperCase) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    reference = _advance(_new(case), case.steps).state_dict()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.pt"

            def press(step: int, _: Mapping[str, float]) -> None:
                if step == 1:
                    os.kill(os.getpid(), signal.SIGINT)

            try:
                run(_new(case), case.steps, checkpoint=path, callbacks=press, progress=False)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("Ctrl-C did not end the run")
            stepper = _new(case, seed=7)
            result = run(stepper, case.steps, checkpoint=path, progress=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert result.resumed_from >= 1, "Ctrl-C lost the step under way"
    _expect_same(reference, stepper.state_dict(), "a run that was interrupted ends elsewhere")


def _build(case: StepperCase, function: Callable[..., Any]) -> Any:
    assert case.with_objective is not None
    return case.with_objective(function)


def _good(case: StepperCase) -> Callable[..., Any]:
    assert case.objective is not None, "with_objective needs objective, a well-behaved function"
    return case.objective


class _Faulty:
    """A function that works, except when told to fail: then it returns `spoil(value)`, or raises."""

    def __init__(self, function: Callable[..., Any], spoil: Callable[[Any], Any]) -> None:
        self.function, self.spoil, self.failing = function, spoil, False

    def __call__(self, *arguments: Any) -> Any:
        value = self.function(*arguments)
        return self.spoil(value) if self.failing else value


def _spoil(case: StepperCase, spoil: Callable[[Any], Any]) -> tuple[Any, _Faulty, Any]:
    """A stepper after one good step, its function, and where it ends without a fault."""
    reference = _advance(_build(case, _good(case)), 3).state_dict()
    faulty = _Faulty(_good(case), spoil)
    stepper = _advance(_build(case, faulty), 1)
    faulty.failing = True
    return stepper, faulty, reference


def _recovers(stepper: Any, faulty: _Faulty, reference: Any, kinds: tuple[type[BaseException], ...], what: str) -> None:
    try:
        stepper.step()
    except kinds:
        pass
    else:
        raise AssertionError(f"{what} was not noticed")
    faulty.failing = False
    _expect_same(reference, _advance(stepper, 2).state_dict(), f"{what} changed the stepper")


class _MineError(Exception):
    """An exception of the user's."""


def _an_exception_costs_nothing(case: StepperCase) -> None:
    def explode(_: Any) -> Any:
        raise _MineError("mine")

    _recovers(*_spoil(case, explode), (_MineError,), "an exception in the user's function")


def _a_wrong_shape_is_refused(case: StepperCase) -> None:
    spoiled = _spoil(case, lambda value: torch.zeros((*value.shape, 3), dtype=value.dtype))
    _recovers(*spoiled, (ValueError,), "a value of a wrong shape")


def _a_wrong_type_is_refused(case: StepperCase) -> None:
    _recovers(*_spoil(case, lambda _: "text"), (TypeError, ValueError), "a value that is no tensor")


def _complex_values_are_refused(case: StepperCase) -> None:
    _recovers(*_spoil(case, lambda value: value + 1j), (TypeError, ValueError), "a complex value")


def _nan(case: StepperCase, spoil: Callable[[Tensor], Tensor], promise: NonFinite, what: str) -> None:
    if promise == "any":
        return
    stepper, faulty, reference = _spoil(case, spoil)
    if promise == "raises":
        return _recovers(stepper, faulty, reference, (RuntimeError, FloatingPointError, ValueError), what)
    stepper.step()
    faulty.failing = False
    _advance(stepper, 2)
    bad = [value for value in _tensors(stepper.state_dict()) if value.is_floating_point() and bool(value.isnan().any())]
    assert not bad, f"{what} put NaN into the state"
    return None


def _some_nan(case: StepperCase) -> None:
    def spoil(value: Tensor) -> Tensor:
        value = value.clone()
        value.view(-1)[0] = torch.nan
        return value

    _nan(case, spoil, case.some_nan, "a value that is NaN")


def _all_nan(case: StepperCase) -> None:
    _nan(case, lambda value: torch.full_like(value, torch.nan), case.all_nan, "a function that is NaN everywhere")
    _nan(case, lambda value: torch.full_like(value, torch.inf), case.all_nan, "a function that is infinite everywhere")


def _the_user_may_write_into_arguments(case: StepperCase) -> None:
    good = _good(case)
    reference = _advance(_build(case, good), 3).state_dict()

    def vandal(*arguments: Any) -> Any:
        value = good(*arguments)
        with torch.no_grad():
            for each in _tensors(arguments):
                if not each.requires_grad:
                    each.zero_()
        return value

    found = _advance(_build(case, vandal), 3).state_dict()
    _expect_same(reference, found, "a function that writes into its argument changed the run")


_CHECKS: dict[str, Callable[[StepperCase], None]] = {
    check.__name__.strip("_"): check
    for check in (
        _metrics_are_numbers,
        _same_seed_same_run,
        _resumes_exactly,
        _state_is_a_snapshot,
        _refuses_foreign_states,
        _follows_dtype,
        _changes_nothing_global,
        _works_under_gradient_modes,
        _runs_and_resumes,
        _survives_ctrl_c,
    )
}
_OBJECTIVE_CHECKS: dict[str, Callable[[StepperCase], None]] = {
    check.__name__.strip("_"): check
    for check in (
        _an_exception_costs_nothing,
        _a_wrong_shape_is_refused,
        _a_wrong_type_is_refused,
        _complex_values_are_refused,
        _some_nan,
        _all_nan,
        _the_user_may_write_into_arguments,
    )
}
