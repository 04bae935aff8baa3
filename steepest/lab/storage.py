"""A race's memory: one Optuna study that any number of workers share, and from which the report is made."""

import contextlib
import json
import math
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steepest.lab.database import open_storage, quiet, unreachable
from steepest.lab.machine import is_alive, me
from steepest.lab.plan import TrialKey
from steepest.lab.settings import RaceError

DUPLICATE, DEAD, INTERRUPTED = "duplicate", "worker died", "interrupted"
BEAT_SECONDS = 5.0
PATIENCE = 60.0


@dataclass(frozen=True)
class Record:
    """A trial as it stands in the storage."""

    number: int
    key: TrialKey
    state: str  # "waiting", "running", "finished", "lost" (dead, interrupted or duplicate; it does not count)
    result: dict[str, Any] | None
    owner: dict[str, Any] | None
    reason: str | None
    started: float | None
    ended: float | None

    @property
    def value(self) -> float:
        """Final validation loss; infinity unless the trial ran to its end."""
        result = self.result or {}
        value = result.get("value")
        return value if result.get("state") == "complete" and value is not None else math.inf


@dataclass
class Claim:
    """A trial that this worker owns and runs."""

    number: int
    key: TrialKey
    owner: dict[str, Any]


class RaceStore:
    """The study of one race in an Optuna storage.

    Args:
        url: SQLAlchemy URL, for example `sqlite:///runs/text/race.db` or `postgresql+psycopg://user@host/db`.
        name: The race's name, which is the study's name.
        command_id: Names the running command; its workers share it.

    Raises:
        RaceError: the URL is wrong, the driver is missing, or the storage does not answer.
    """

    def __init__(self, url: str, name: str, command_id: str | None = None):
        self.url, self.name = url, name
        self.command_id = command_id or uuid.uuid4().hex
        self.storage = open_storage(url)
        self._study: Any = None
        self._mine: set[int] = set()
        self._seen: dict[int, tuple[Any, float]] = {}

    def close(self) -> None:
        """Close the connections; the store can be used again, and opens new ones."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def exists(self) -> bool:
        """Whether the study is there."""
        import optuna

        try:
            self._load()
        except KeyError:
            return False
        except optuna.exceptions.StorageInternalError as error:
            raise RaceError(unreachable(self.url, error)) from error
        return True

    def create(self, attributes: dict[str, Any]) -> bool:
        """Make the study with these attributes; False if another worker was first (its attributes then hold)."""
        import optuna

        try:
            with quiet():
                study = optuna.create_study(storage=self.storage, study_name=self.name, direction="minimize")
        except optuna.exceptions.DuplicatedStudyError:
            return False
        study.set_user_attr("race", _clean(attributes))
        self._study = study
        return True

    def attributes(self, wait: float = 15.0) -> dict[str, Any] | None:
        """What `create` stored; waits for a worker that has just made the study; None if it died before storing."""
        study = self._load()
        deadline = time.monotonic() + wait
        while True:
            found = self._retry(lambda: study.user_attrs).get("race")
            if found is not None or time.monotonic() > deadline:
                return found
            time.sleep(0.2)

    def adopt(self, attributes: dict[str, Any]) -> None:
        """Store the attributes of a study whose maker died before it could."""
        self._load().set_user_attr("race", _clean(attributes))

    def records(self) -> list[Record]:
        """All trials, in the order in which they were made."""
        study = self._load()
        return [_record(trial) for trial in self._retry(lambda: study.get_trials(deepcopy=False))]

    def finished(self) -> dict[TrialKey, Record]:
        """The trials that count, by key."""
        found: dict[TrialKey, Record] = {}
        for record in self.records():
            if record.state == "finished":
                found.setdefault(record.key, record)
        return found

    def enqueue(self, keys: Sequence[TrialKey]) -> None:
        """Put trials in the queue, unless they are there or have finished."""
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        live = {record.key for record in self.records() if record.state != "lost"}
        distributions = {
            "lr": FloatDistribution(1e-30, 1e30, log=True),
            "seed": IntDistribution(0, 1_000_000),
        }
        for key in keys:
            if key in live:
                continue
            trial = optuna.trial.create_trial(
                state=optuna.trial.TrialState.WAITING,
                params={"lr": key.lr, "seed": key.seed, "method": key.method},
                distributions={**distributions, "method": CategoricalDistribution(self._method_choices(key.method))},
                user_attrs={"trial": key.to_json(), "stage": key.stage},
            )
            self._retry(lambda trial=trial: self._load().add_trial(trial))

    def claim(self) -> Claim | None:
        """Take the first waiting trial; None if none waits. Duplicates of a live trial are dropped on the way."""
        for record in self.records():
            if record.state != "waiting" or not self._to_running(record.number):
                continue
            owner = {**me(), "command": self.command_id, "beat": 0, "step": 0}
            self._attribute(record.number, "owner", owner)
            self._mine.add(record.number)
            if self._is_duplicate(record):
                self._end(record.number, "FAIL", reason=DUPLICATE)
                continue
            return Claim(record.number, record.key, owner)
        return None

    def beat(self, claim: Claim, **progress: Any) -> None:
        """Show that the claim's worker lives, and how far it is."""
        claim.owner.update(progress)
        claim.owner["beat"] += 1
        self._attribute(claim.number, "owner", claim.owner, patient=False)

    def finish(self, claim: Claim, result: dict[str, Any]) -> bool:
        """Store a trial's result; False if it was given to another worker in the meantime."""
        import optuna

        try:
            self._attribute(claim.number, "result", _clean(result))
            self._settle(claim.number, result)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        finally:
            self._mine.discard(claim.number)
        return True

    def release(self, claim: Claim, reason: str = INTERRUPTED) -> None:
        """Give a trial up, so that any worker (this one, later) may go on with it from its checkpoint."""
        self._end(claim.number, "FAIL", reason=reason)

    def reclaim(self, grace: float, retries: int = 2) -> list[TrialKey]:
        """Free the trials of dead workers; returns them.

        A worker on this machine is dead if its process is gone; one elsewhere, if its trial showed no sign of life for
        `grace` seconds on our own clock (so the machines' clocks need not agree). A trial whose worker had stored its
        result is finished with it. A trial that killed more than `retries` workers of the running command is failed.
        """
        freed = []
        records = self.records()
        for record in records:
            if record.state != "running" or record.number in self._mine or not self._dead(record, grace):
                continue
            if record.result is not None:
                self._settle(record.number, record.result, lenient=True)
                continue
            ours = record.owner is not None and record.owner.get("command") == self.command_id
            before = sum(
                other.reason == DEAD
                and other.key == record.key
                and (other.owner or {}).get("command") == self.command_id
                for other in records
            )
            if ours and before >= retries:
                reason = f"its worker process died {before + 1} times (out of memory, or killed)"
                result = {"state": "failed", "reason": reason, "value": None, "steps": 0, "seconds": 0.0}
                with contextlib.suppress(Exception):
                    self._attribute(record.number, "result", result)
                self._settle(record.number, result, lenient=True)
            else:
                self._end(record.number, "FAIL", reason=DEAD if ours else INTERRUPTED)
            freed.append(record.key)
        return freed

    def _dead(self, record: Record, grace: float) -> bool:
        if record.owner is not None:
            alive = is_alive(record.owner)
            if alive is not None:
                return not alive or record.owner.get("pid") == me()["pid"]
        sign = json.dumps(record.owner, sort_keys=True)
        last, since = self._seen.get(record.number, (None, 0.0))
        if sign != last:
            self._seen[record.number] = (sign, time.monotonic())
            return False
        return time.monotonic() - since > (grace if record.owner is not None else min(grace, 10.0))

    def _is_duplicate(self, record: Record) -> bool:
        return any(
            other.key == record.key and other.number < record.number and other.state != "lost"
            for other in self.records()
        )

    def _settle(self, number: int, result: dict[str, Any], lenient: bool = False) -> None:
        state = {"complete": "COMPLETE", "diverged": "COMPLETE", "pruned": "PRUNED"}.get(result["state"], "FAIL")
        value = result.get("value")
        lost = result["state"] == "diverged" or value is None
        values = None if state == "FAIL" else [math.inf if lost or value is None else float(value)]
        self._end(number, state, values=values, lenient=lenient)

    def _method_choices(self, method: str) -> list[str]:
        attributes = self._load().user_attrs.get("race") or {}
        names = [entrant["name"] for entrant in attributes.get("entrants", [])]
        return names if method in names else [*names, method]

    def _load(self) -> Any:
        if self._study is None:
            import optuna

            with quiet():
                self._study = optuna.load_study(
                    study_name=self.name, storage=self.storage, sampler=optuna.samplers.RandomSampler()
                )
        return self._study

    def _id(self, number: int) -> int:
        storage = self.storage
        return storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(self.name), number)

    def _to_running(self, number: int) -> bool:
        import optuna

        running = optuna.trial.TrialState.RUNNING
        try:
            return self._retry(lambda: self.storage.set_trial_state_values(self._id(number), state=running))
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _attribute(self, number: int, name: str, value: Any, patient: bool = True) -> None:
        self._retry(lambda: self.storage.set_trial_user_attr(self._id(number), name, value), patient)

    def _end(
        self,
        number: int,
        state: str,
        *,
        values: list[float] | None = None,
        reason: str | None = None,
        lenient: bool = True,
    ) -> None:
        import optuna

        try:
            if reason is not None:
                self._attribute(number, "reason", reason)
            target = optuna.trial.TrialState[state]
            self._retry(lambda: self.storage.set_trial_state_values(self._id(number), state=target, values=values))
        except optuna.exceptions.UpdateFinishedTrialError:
            if not lenient:
                raise
        finally:
            self._mine.discard(number)

    def _retry(self, action: Callable[[], Any], patient: bool = True) -> Any:
        """Do a storage action, outlasting a short outage of the storage."""
        import optuna
        import sqlalchemy.exc

        deadline = time.monotonic() + (PATIENCE if patient else 0.0)
        while True:
            try:
                return action()
            except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.OperationalError) as error:
                if time.monotonic() > deadline:
                    raise RaceError(unreachable(self.url, error)) from error
                time.sleep(0.5 + random.random())


class Heartbeat:
    """A thread that shows, every few seconds, that a claim's worker lives; a context manager.

    Args:
        store: The race's storage.
        claim: The trial.
        progress: Gives what to show, for example the step.
        orphaned: Called at each beat; the thread ends when it returns True.
    """

    def __init__(
        self, store: RaceStore, claim: Claim, progress: Callable[[], dict[str, Any]], every: float = BEAT_SECONDS
    ):
        self.store, self.claim, self.progress, self.every = store, claim, progress, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="race-heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import optuna

        while not self._stop.wait(self.every):
            try:
                self.store.beat(self.claim, **self.progress())
            except optuna.exceptions.UpdateFinishedTrialError:
                return
            except RaceError:
                continue


def _record(trial: Any) -> Record:
    attributes = trial.user_attrs
    result = attributes.get("result")
    name = trial.state.name
    state = {"WAITING": "waiting", "RUNNING": "running"}.get(name, "finished" if result is not None else "lost")
    started, ended = trial.datetime_start, trial.datetime_complete
    return Record(
        number=trial.number,
        key=TrialKey.from_json(attributes["trial"]),
        state=state,
        result=result,
        owner=attributes.get("owner"),
        reason=attributes.get("reason"),
        started=started.timestamp() if started else None,
        ended=ended.timestamp() if ended else None,
    )


def _clean(value: Any) -> Any:
    """The value with NaN and infinity as null, so that every JSON reader takes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
