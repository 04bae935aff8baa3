import subprocess
import sys
import threading

import pytest

from steepest.lab.machine import is_alive, me
from steepest.lab.plan import TUNE, TrialKey
from steepest.lab.settings import RaceError
from steepest.lab.storage import DEAD, DUPLICATE, INTERRUPTED, RaceStore

A, B = TrialKey("a", 0.1, 0, TUNE), TrialKey("b", 0.1, 0, TUNE)
DONE = {"state": "complete", "value": 1.5, "steps": 3, "seconds": 0.1, "val": {"loss": [float("nan"), 1.5]}}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'race.db'}"


@pytest.fixture
def store(url):
    store = RaceStore(url, "r")
    assert store.create({"id": "1", "entrants": [{"name": "a"}, {"name": "b"}]})
    return store


def states(store):
    return [(record.key, record.state, record.reason) for record in store.records()]


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def own(store, claim, **owner):
    """Pretend that a claim belongs to somebody else."""
    claim.owner.update(owner)
    store.beat(claim)
    store._mine.clear()


def test_a_trial_goes_from_the_queue_to_its_result(store, url):
    store.enqueue([A, B])
    store.enqueue([A, B])
    first, second = store.claim(), store.claim()
    assert (first.key, second.key) == (A, B)
    assert store.claim() is None
    assert store.finish(first, DONE)
    other = RaceStore(url, "r")
    assert other.attributes()["id"] == "1"
    assert set(other.finished()) == {A}
    record = other.finished()[A]
    assert record.value == 1.5
    assert record.result["val"]["loss"] == [None, 1.5]
    other.enqueue([A])
    assert other.claim() is None


def test_only_one_worker_makes_the_race(url):
    first, second = RaceStore(url, "r"), RaceStore(url, "r")
    assert not first.exists()
    assert first.create({"id": "1"})
    assert not second.create({"id": "2"})
    assert second.attributes()["id"] == "1"


def test_many_workers_at_once_never_take_the_same_trial(store, url):
    keys = [TrialKey("a", lr / 100, 0, TUNE) for lr in range(1, 13)]
    taken, errors, barrier = [], [], threading.Barrier(4)

    def work():
        try:
            mine = RaceStore(url, "r")
            barrier.wait()
            mine.enqueue(keys)
            while claim := mine.claim():
                taken.append(claim.key)
                mine.finish(claim, DONE)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(taken) == keys
    assert set(store.finished()) == set(keys)


def test_of_two_trials_with_one_key_the_second_is_dropped(store, url, monkeypatch):
    other = RaceStore(url, "r")
    other.enqueue([A])
    monkeypatch.setattr(store, "records", lambda: [])  # both looked at the queue before either wrote
    store.enqueue([A])
    monkeypatch.undo()
    claim = other.claim()
    assert store.claim() is None
    assert states(store) == [(A, "running", None), (A, "lost", DUPLICATE)]
    other.finish(claim, DONE)
    assert set(store.finished()) == {A}


def test_the_trial_of_a_dead_worker_is_freed_and_run_again(store, url):
    store.enqueue([A])
    own(store, store.claim(), pid=dead_pid(), command="another command")
    other = RaceStore(url, "r")
    assert other.reclaim(grace=60) == [A]
    assert other.reclaim(grace=60) == []
    assert states(other) == [(A, "lost", INTERRUPTED)]
    other.enqueue([A])
    assert other.claim().key == A


def test_a_reused_process_number_is_not_the_worker(store):
    assert is_alive(me()) is True
    assert is_alive({**me(), "pid": dead_pid()}) is False
    assert is_alive({**me(), "place": "elsewhere"}) is None
    if sys.platform == "linux":
        assert is_alive({**me(), "started": 1}) is False


def test_the_trial_of_a_living_worker_is_left_alone(store, url):
    store.enqueue([A])
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        from steepest.lab.machine import _started

        own(store, store.claim(), pid=process.pid, started=_started(process.pid))
        assert RaceStore(url, "r").reclaim(grace=1e-6) == []
    finally:
        process.communicate(b"\n")


def test_a_worker_elsewhere_counts_as_dead_after_the_grace_without_a_sign(store, url, monkeypatch):
    from steepest.lab import storage

    store.enqueue([A])
    claim = store.claim()
    own(store, claim, place="elsewhere")
    watcher, clock = RaceStore(url, "r"), [100.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    assert watcher.reclaim(grace=60) == []
    clock[0] += 50
    store.beat(claim, step=3)
    assert watcher.reclaim(grace=60) == []
    clock[0] += 59
    assert watcher.reclaim(grace=60) == []
    clock[0] += 2
    assert watcher.reclaim(grace=60) == [A]
    assert not store.finish(claim, DONE)  # too late: it is somebody else's now


def test_a_worker_that_died_after_storing_its_result_has_finished(store, url):
    store.enqueue([A])
    claim = store.claim()
    store._attribute(claim.number, "result", DONE)
    own(store, claim, pid=dead_pid())
    other = RaceStore(url, "r")
    assert other.reclaim(grace=60) == []
    assert other.finished()[A].value == 1.5


def test_a_trial_that_kills_its_workers_is_failed_after_two_retries(store, url):
    for attempt in range(3):
        store.enqueue([A])
        own(store, store.claim(), pid=dead_pid())
        assert store.reclaim(grace=60) == [A]
        assert (A in store.finished()) is (attempt == 2)
    result = store.finished()[A].result
    assert result["state"] == "failed"
    assert "died 3 times" in result["reason"]
    assert states(store)[:2] == [(A, "lost", DEAD)] * 2


def test_deaths_of_a_whole_command_do_not_count_against_a_trial(store, url):
    for _ in range(5):
        store.enqueue([A])
        own(store, store.claim(), pid=dead_pid(), command="killed by the user")
        store.reclaim(grace=60)
    assert store.finished() == {}


def test_a_diverged_trial_has_an_infinite_value(store):
    store.enqueue([A, B])
    store.finish(store.claim(), {**DONE, "state": "diverged", "value": 3.0})
    store.finish(store.claim(), {**DONE, "state": "pruned", "value": 3.0})
    assert {key: record.value for key, record in store.finished().items()} == {A: float("inf"), B: float("inf")}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("not a url", "is not a storage URL"),
        ("sqlite://", "in memory"),
        ("nosuchdatabase://host/db", "does not know"),
        ("oracle+oracledb://host/db", "driver that is not installed"),
        ("postgresql+psycopg://user:secret@127.0.0.1:1/db", "does not answer"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_clear_message(url, message):
    with pytest.raises(RaceError, match=message) as caught:
        RaceStore(url, "r")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "race.db"
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(RaceError, match="not a database"):
        RaceStore(f"sqlite:///{path}", "r")
    assert path.read_bytes() == b"not a database, " * 100
