import json
import os
import signal
import time

import pytest

from steepest.lab.document import build_document
from steepest.lab.plan import next_trials
from steepest.lab.race import RaceError, RaceSettings, load_document, race
from steepest.lab.start import plan_settings, steps_for
from steepest.lab.storage import RaceStore
from steepest.lab.worker import settings_from_json, settings_to_json, values

STATES = {"complete", "pruned", "diverged", "failed"}


def small(waves, **changes):
    methods = (f"{waves}:adam", f"{waves}:sgd")
    given = {"task": f"{waves}:Waves", "methods": methods, "steps": 12, "seeds": 2, "lr_trials": 3}
    return {**given, "runs": waves.parent / "runs", "name": "r", **changes}


def as_code(given):
    plain = ", ".join(f"{name}={value!r}" for name, value in given.items() if name != "runs")
    return f"{plain}, runs={str(given['runs'])!r}"


def store_of(given):
    return RaceStore(given.get("storage") or f"sqlite:///{given['runs'] / 'r' / 'race.db'}", "r")


def finished_once(given):
    """All keys of the finished trials; each must be there once, and the race must be done."""
    store = store_of(given)
    records = [record for record in store.records() if record.state == "finished"]
    keys = [record.key for record in records]
    assert len(keys) == len(set(keys))
    assert next_trials(plan_settings(store.attributes()), values(store.finished())) == []
    return keys


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def finished_and_running(given):
    try:
        records = store_of(given).records()
    except KeyError:  # not made yet
        return 0, 0
    return sum(r.state == "finished" for r in records), sum(r.state == "running" for r in records)


def test_a_race_from_its_beginning_to_its_report(waves):
    given = small(waves)
    document = race(RaceSettings(**given))
    folder = given["runs"] / "r"
    assert json.loads((folder / "race.json").read_text()) == document
    assert (folder / "report.html").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["race.db", "race.json", "report.html"]
    assert document["status"] == "complete"
    assert len(document["trials"]) == 2 * 3 + 2 == len(finished_once(given))
    assert {trial["state"] for trial in document["trials"]} <= STATES
    assert [m["rank"] for m in document["methods"]] == [1, 2]
    winner, other = document["methods"]
    assert document["winner"] == winner["name"]
    assert winner["final"]["mean"] <= other["final"]["mean"]
    assert len(winner["final"]["values"]) == 2
    best = [t for t in document["trials"] if t["method"] == winner["name"] and t["lr"] == winner["best_lr"]]
    assert sorted(t["seed"] for t in best) == [0, 1]
    assert winner["final"]["values"] == [t["value"] for t in sorted(best, key=lambda t: t["seed"])]
    tuning = [t["value"] for t in document["trials"] if t["method"] == winner["name"] and t["state"] == "complete"]
    assert winner["tune_value"] == min(t["value"] for t in best if t["stage"] == "tune") <= max(tuning)
    assert "error" in document["trials"][0]["val"]
    assert document["why"] and all(m["verdict"] for m in document["methods"])
    assert load_document(folder) == document


def test_the_same_call_on_a_finished_race_runs_nothing(waves, monkeypatch):
    given = small(waves)
    first = race(RaceSettings(**given))
    monkeypatch.setattr("steepest.lab.worker._train", None)
    assert race(RaceSettings(**given)) == first


def test_two_races_of_the_same_settings_end_with_the_same_numbers(waves):
    first = race(RaceSettings(**small(waves)))
    second = race(RaceSettings(**small(waves, runs=waves.parent / "other")))
    assert [(t["key"], t["value"]) for t in first["trials"]] == [(t["key"], t["value"]) for t in second["trials"]]


def test_other_settings_under_the_same_name_are_refused(waves):
    given = small(waves, steps=2, seeds=1, lr_trials=1)
    race(RaceSettings(**given))
    with pytest.raises(RaceError, match=r"steps was 2, now 3.*--name other"):
        race(RaceSettings(**{**given, "steps": 3}))
    waves.write_text(waves.read_text() + "\n# changed\n")
    with pytest.raises(RaceError, match=r"task was waves\.py:Waves"):
        race(RaceSettings(**given))


def test_kill_9_and_the_same_command_goes_on(waves, race_process, tmp_path):
    """Bar: nothing that had finished is lost or run twice, and the trial under way goes on from its checkpoint."""
    given = small(waves, steps=40, checkpoint_every=0.02)
    count = tmp_path / "count"
    process = race_process(as_code(given), WAVES_SLEEP="0.02", WAVES_COUNT=str(count))
    wait_for(lambda: (found := finished_and_running(given))[0] >= 2 and found[1] == 1)
    checkpoints = given["runs"] / "r" / "trials"
    wait_for(lambda: any(checkpoints.glob("*.ckpt")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (checkpoints / ".half.ckpt.x.part").write_bytes(b"what a kill leaves in the middle of writing")
    before = {key: (record.number, record.result) for key, record in store_of(given).finished().items()}
    assert before
    document = race(RaceSettings(**given))
    assert document["status"] == "complete"
    after = {key: (record.number, record.result) for key, record in store_of(given).finished().items()}
    assert {key: after[key] for key in before} == before
    assert len(finished_once(given)) == 8
    lost = [record for record in store_of(given).records() if record.state == "lost"]
    assert len(lost) <= 1
    assert not checkpoints.exists()
    uninterrupted = race(RaceSettings(**small(waves, steps=40, runs=waves.parent / "other")))
    assert [(t["key"], t["value"]) for t in document["trials"]] == [
        (t["key"], t["value"]) for t in uninterrupted["trials"]
    ]


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_ctrl_c_saves_and_says_how_to_go_on(waves, race_process, tmp_path, number, workers):
    given = small(waves, steps=40, workers=workers, checkpoint_every=60)
    count = tmp_path / "count"
    process = race_process(as_code(given), WAVES_SLEEP="0.05", WAVES_COUNT=str(count))
    wait_for(lambda: count.exists() and count.stat().st_size >= 15)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert b"same command again" in output
    assert finished_and_running(given)[1] == 0
    assert any((given["runs"] / "r" / "trials").glob("*.ckpt"))
    document = race(RaceSettings(**{**given, "workers": 1}))
    assert document["status"] == "complete"
    assert len(finished_once(given)) == 8


def test_two_workers_share_a_race_on_sqlite(waves):
    given = small(waves, steps=40, workers=2, methods=(f"{waves}:adam", f"{waves}:sgd"))
    document = race(RaceSettings(**given))
    assert document["status"] == "complete"
    assert len(finished_once(given)) == 8
    alone = race(RaceSettings(**small(waves, steps=40, runs=waves.parent / "other")))
    final = [(m["name"], m["best_lr"]) for m in document["methods"]]
    assert final == [(m["name"], m["best_lr"]) for m in alone["methods"]]


def test_two_commands_at_once_share_a_race(waves, race_process):
    """Both make the folder, the database and the study at the same moment; each trial is run by one of them."""
    given = small(waves, steps=30)
    both = [race_process(as_code(given), WAVES_SLEEP="0.01") for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(finished_once(given)) == 8
    places = {record.owner["pid"] for record in store_of(given).records() if record.state == "finished"}
    assert places <= {process.pid for process in both}


def test_a_worker_that_is_killed_is_replaced(waves, race_process):
    given = small(waves, steps=40, workers=2)
    process = race_process(as_code({**given}), WAVES_SLEEP="0.03")
    wait_for(lambda: finished_and_running(given)[1] >= 1)
    victim = next(r.owner["pid"] for r in store_of(given).records() if r.state == "running" and r.owner)
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert len(finished_once(given)) == 8


def test_workers_that_cannot_start_end_the_race_with_their_message(waves, monkeypatch):
    monkeypatch.setattr("steepest.lab.team.settings_to_json", lambda settings: {})
    with pytest.raises(RaceError, match="workers died before they took a trial"):
        race(RaceSettings(**small(waves, workers=2)))


def test_a_trial_that_raises_is_failed_with_its_reason_and_the_race_goes_on(waves):
    waves.write_text(
        waves.read_text()
        + "\ndef fragile(model, lr):\n    if lr > 0.05: raise MemoryError('no room')\n    return adam(model, lr)\n"
        "fragile.lr_range = (1e-5, 1e-1)\n"
    )
    given = small(waves, methods=(f"{waves}:fragile", f"{waves}:sgd"), lr_ranges={f"{waves}:fragile": (2e-3, 1e-1)})
    document = race(RaceSettings(**given))
    failed = [trial for trial in document["trials"] if trial["state"] == "failed"]
    assert failed
    assert all(trial["reason"] == "MemoryError: no room" for trial in failed)
    assert document["status"] == "complete"


def test_a_race_that_no_method_survives_has_a_document_without_a_winner(waves):
    name = f"{waves}:sgd"
    given = small(waves, methods=(name,), lr_ranges={name: (1e8, 1e10)}, steps=40)
    document = race(RaceSettings(**given))
    assert document["winner"] is None
    assert document["methods"][0]["best_lr"] is None
    assert {trial["state"] for trial in document["trials"]} == {"diverged"}
    assert "No method trained to the end" in document["why"][0]


def test_the_document_of_a_race_under_way(waves):
    given = small(waves)
    race(RaceSettings(**given))
    store = store_of(given)
    whole = store.records()
    for count in range(len(whole)):
        store.records = lambda count=count: whole[:count]
        document = build_document(store)
        assert document["status"] == "partial"
        assert len(document["trials"]) == count
        json.dumps(document, allow_nan=False)


def test_the_reference_gives_the_targets(waves):
    document = race(RaceSettings(**small(waves, methods=("adamw", "muon"), steps=40)))
    by_name = {m["name"]: m for m in document["methods"]}
    assert document["reference"] == "adamw"
    assert by_name["adamw"]["steps_to_target"]["mean"] == 40
    other = by_name["muon"]["steps_to_target"]
    better = by_name["muon"]["final"]["mean"] <= by_name["adamw"]["final"]["mean"]
    assert (other is not None) or not better
    assert document["winner_margin"]["against"] != document["winner"]


def test_minutes_become_steps_once(waves):
    given = small(waves, steps=None, minutes=0.05, lr_trials=1, seeds=1)
    document = race(RaceSettings(**given))
    steps = document["settings"]["steps"]
    assert steps >= 10
    assert document["settings"]["budget_seconds"] == pytest.approx(3.0)
    assert store_of(given).attributes()["steps"] == steps == race(RaceSettings(**given))["settings"]["steps"]


def test_the_budget_covers_all_trials(waves):
    plan = plan_settings(
        {
            "entrants": [{"name": n, "low": 0.1, "high": 1.0, "bounded": False} for n in ("a", "b")],
            "lr_trials": 4,
            "seeds": 2,
            "finalists": 2,
            "reference": None,
        }
    )
    costs = {"a": (0.1, 0.5), "b": (0.3, 0.5)}
    steps = steps_for(plan, 600, costs)
    spent = steps * (4 * 0.4 + 2 * 0.3) + 10 * 9 * 0.5
    assert 0.7 * 600 < spent < 600
    with pytest.raises(RaceError, match=r"too short: .* minutes"):
        steps_for(plan, 10, costs)
    assert steps_for(plan, 10, costs, fewest=60) == 60
    assert steps_for(plan, 600, costs, fewest=60) == steps


def test_settings_travel_to_workers(waves):
    settings = RaceSettings(**small(waves, lr_ranges={f"{waves}:adam": (0.1, 1.0)}))
    assert settings_from_json(json.loads(json.dumps(settings_to_json(settings)))) == RaceSettings(
        **small(waves, lr_ranges={f"{waves}:adam": (0.1, 1.0)}, runs=str(settings.runs))
    )


def test_hostile_names(waves):
    name = "<img src=x onerror=alert(1)> '\"; drop table"
    document = race(RaceSettings(**small(waves, name=name, steps=2, seeds=1, lr_trials=1)))
    assert document["name"] == name
    assert (waves.parent / "runs" / name / "report.html").is_file()
