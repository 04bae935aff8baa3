"""`run`: drive a stepper or a torch optimizer to its end, whatever happens on the way."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch.optim import Optimizer

from steepest.loop.arguments import callables, make_advance, make_cadence, make_parts
from steepest.loop.checkpoint import Checkpoint, Progression
from steepest.loop.interrupt import Interrupts
from steepest.loop.progress import Reporter, duration, format_metrics, reporter
from steepest.loop.record import Metrics, Record, Result, Stepper
from steepest.loop.rules import Diverged, Seconds, Steps, Tolerance, positive_int

Callback = Callable[[int, Mapping[str, float]], str | Mapping[str, Any] | Literal[False] | None]
Rule = Callable[[Record], str | Literal[False] | None]


def run(
    stepper: Stepper | Optimizer,
    steps: int | None = None,
    *,
    closure: Callable[[], Any] | None = None,
    scheduler: Any = None,
    state: Mapping[str, Any] | None = None,
    callbacks: Callback | Iterable[Callback] = (),
    stop: Rule | Iterable[Rule] = (),
    record_every: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    checkpoint_seconds: float | None = None,
    resume: bool = True,
    rng: bool | None = None,
    progress: Any = True,
    label: str | None = None,
) -> Result:
    """Step until a rule, a callback, or a signal says stop; record, show and checkpoint on the way.

    After each step, in this order: the callbacks, the scheduler, the record, the stop rules, the checkpoint.

    With `checkpoint`, the run can be killed at any moment: the same call goes on from the file, and ends with the same
    bits as a run that was never stopped. `steps` and `Seconds` count over all parts. At the first Ctrl-C (or SIGTERM)
    the step under way is finished, the checkpoint is written, and the signal is sent on to the handler that was there
    before: with Python's own handlers, Ctrl-C raises KeyboardInterrupt and SIGTERM ends the process. A handler of the
    caller that returns makes `run` return with `stopped_by="interrupted"`. A second signal acts at once. Without
    `checkpoint`, or outside the main thread, signals are left alone. An exception from a step or a callback passes
    through unchanged, and the file keeps the last complete step saved.

    Args:
        stepper: an object with `step()`, which returns a mapping of metrics, `state_dict()` and `load_state_dict()`;
            or a torch optimizer, with `closure`.
        steps: stop after so many complete steps in total. None: a rule in `stop` ends the run.
        closure: for an optimizer, as in torch: zeroes the gradients, computes the loss, calls backward, and returns the
            loss, or (loss, mapping of further metrics). If the optimizer calls it several times in a step, the first
            call is recorded, as "loss". For an optimizer with `loss_names`, such as those of games, it returns as many
            losses, and they are recorded under these names.
        scheduler: for an optimizer, a learning-rate scheduler, stepped after each step and checkpointed.
        state: further objects to checkpoint, by name: the model, a data iterator, a gradient scaler (anything with
            `state_dict` and `load_state_dict`), or a torch.Generator. An optimizer's parameters that are in no module
            given here are saved too, but a module's buffers only if the module is given.
        callbacks: called as callback(step, metrics) after each step. A str returned stops the run and is its reason;
            a mapping returned is added to the metrics. Metrics are read from a GPU when first looked at.
        stop: rules: `Steps`, `Seconds`, `Tolerance`, `Diverged`, or any rule(record) -> reason or None. A rule's own
            variables are not checkpointed: judge by the record, which holds the history too.
        record_every: record every n-th step, and the last. On a GPU, `run` reads metrics at recorded steps only.
        checkpoint: path of the checkpoint file; its folder is made. Several processes need a path each.
        checkpoint_every: save after every n-th step.
        checkpoint_seconds: save when so many seconds have passed since the last save. If neither this nor
            `checkpoint_every` is given: 60.
        resume: go on from the file if it exists; False starts over and replaces it.
        rng: save and restore the states of torch's global random number generators (CPU and CUDA). None: only for an
            optimizer, whose model may draw from them (dropout). Python's and NumPy's are not saved.
        progress: True: a bar on stderr, or a line every half minute if that is not a terminal, and one line at the
            end. False: silent. Or a `rich.progress.Progress`, to which a task is added.
        label: name of the run in the progress; by default the stepper's class name.

    Returns:
        The history and how the run ended. If the checkpoint shows a run that has ended already, its result at once.

    Raises:
        TypeError, ValueError: a wrong argument, or a checkpoint that cannot be used; nothing has been changed then.
        KeyboardInterrupt: Ctrl-C, after the checkpoint is written.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(8, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> result = run(optimizer, steps=20, closure=closure, state={"model": model}, progress=False)
        >>> result.stopped_by, len(result.history["loss"])
        ('steps: 20 done', 20)
    """
    advance = make_advance(stepper, closure, scheduler)
    rules = [*([] if steps is None else [Steps(positive_int("steps", steps))]), *callables("stop", stop)]
    if not rules:
        raise ValueError("nothing would end this run: give steps=, or a rule in stop=, such as Seconds(60)")
    hooks = callables("callbacks", callbacks)
    record_every = positive_int("record_every", record_every)
    last_step = min((rule.n for rule in rules if isinstance(rule, Steps)), default=None)
    limit = min((rule.limit for rule in rules if isinstance(rule, Seconds)), default=None)
    name = type(stepper).__name__
    show = reporter(progress, name if label is None else str(label), last_step, limit)
    parts = make_parts(stepper, scheduler, state)
    every, pause = make_cadence(checkpoint, checkpoint_every, checkpoint_seconds)
    store = None
    if checkpoint is not None:
        rng = isinstance(stepper, Optimizer) if rng is None else bool(rng)
        store = Checkpoint(Path(checkpoint), parts, name, rng)
        store.check()

    at = (store.load(last_step) if store and resume else None) or Progression()
    resumed_from, history = at.step, at.history
    reason = _already_ended(at, rules)
    if reason is not None:
        show.say(f"{show.label}: {checkpoint} holds the finished run ({reason})")
        return _result(at, reason, resumed_from, store)

    with show, Interrupts(enabled=store is not None) as interrupts:
        if at.step:
            show.say(f"{show.label}: resumed from {checkpoint} at step {at.step}")
        show.begin(at.step, at.seconds)
        saved = time.perf_counter()
        start = saved - at.seconds
        while reason is None:
            metrics = advance()
            at.step += 1
            for hook in hooks:
                wish = _heed(hook(at.step, metrics), metrics)
                at.ended = at.ended or wish
            if scheduler is not None:
                scheduler.step()
            recorded = at.step % record_every == 0
            values = metrics.floats() if recorded else {}
            now = time.perf_counter()
            at.seconds = now - start
            if recorded:
                history.append(at.step, at.seconds, values)
            record = Record(at.step, at.seconds, metrics, recorded, MappingProxyType(history.metrics))
            reason = at.ended or _first_reason(rules, record)
            at.final = reason is not None
            if reason is None and interrupts.received is not None:
                reason = "interrupted"
            if reason is not None:
                history.mark(at.step, at.seconds, metrics.floats())
            elif store and ((every and at.step % every == 0) or now - saved >= pause):
                store.save(at)
                saved = time.perf_counter()
            show.update(at.step, at.seconds, history.latest())
        show.end(at.step, at.seconds, history.latest())
        if store:
            store.save(at)
    result = _result(at, reason, resumed_from, store)
    _say_end(show, result)
    _warn_unseen(rules, result)
    interrupts.deliver()
    return result


def _heed(answer: Any, metrics: Metrics) -> str | None:
    if isinstance(answer, Mapping):
        metrics.update(answer)
        return None
    return _reason("a callback", answer)


def _first_reason(rules: Iterable[Rule], record: Record) -> str | None:
    for rule in rules:
        reason = _reason("a stop rule", rule(record))
        if reason is not None:
            return reason
    return None


def _reason(who: str, answer: Any) -> str | None:
    if answer is None or answer is False:
        return None
    if isinstance(answer, str):
        return answer or None
    raise TypeError(f"{who} must return None, or the reason to stop as a str; got {answer!r}")


def _already_ended(at: Progression, rules: Iterable[Rule]) -> str | None:
    if at.step == 0 or at.ended is not None:
        return at.ended
    # A rule may have changed since the file was written, so the last record is judged anew; one saved on the way
    # did not stop the run, and only the limits can be tighter now.
    known = at.final and at.history.last is not None
    if not known:
        rules = [rule for rule in rules if isinstance(rule, Steps | Seconds)]
    recorded = bool(at.history.steps) and at.history.steps[-1] == at.step
    metrics = MappingProxyType(at.history.latest() if known else {})
    return _first_reason(rules, Record(at.step, at.seconds, metrics, recorded, MappingProxyType(at.history.metrics)))


def _result(at: Progression, reason: str, resumed_from: int, store: Checkpoint | None) -> Result:
    metrics, steps, seconds = at.history.complete()
    return Result(metrics, steps, seconds, at.step, at.seconds, reason, resumed_from, store.path if store else None)


def _say_end(show: Reporter, result: Result) -> None:
    words = [
        f"{result.steps} step{'s' if result.steps != 1 else ''} in {duration(result.seconds)}",
        *format_metrics(result.last),
        result.stopped_by,
        *([f"saved {result.checkpoint}"] if result.checkpoint else []),
    ]
    show.say(f"{show.label}: {' · '.join(words)}")


def _warn_unseen(rules: Iterable[Rule], result: Result) -> None:
    for rule in rules:
        if isinstance(rule, Diverged | Tolerance) and rule.metric not in result.history:
            warnings.warn(
                f"{type(rule).__name__} watched {rule.metric!r}, which was never recorded; "
                f"the metrics are: {', '.join(result.history) or 'none'}",
                stacklevel=3,
            )
