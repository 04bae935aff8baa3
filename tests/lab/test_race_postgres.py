"""Two workers on a real PostgreSQL server, which the test starts."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from steepest.lab.plan import next_trials
from steepest.lab.race import RaceSettings, race
from steepest.lab.start import plan_settings
from steepest.lab.storage import RaceStore
from steepest.lab.worker import values


def binaries():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    return Path(initdb).parent if initdb else None


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("psycopg")
    folder = binaries()
    if folder is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    prefix = []
    if os.geteuid() == 0:
        if subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode or not shutil.which(
            "runuser"
        ):
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres to run it as")
        prefix = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = Path(tempfile.mkdtemp(prefix="steepest-pg-"))
    home.chmod(0o777)

    def call(program, *arguments):
        done = subprocess.run(
            [*prefix, folder / program, *arguments], capture_output=True, cwd="/", check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(home / "data")
    call("initdb", "-D", data, "-U", "racer", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
    options = f"-h 127.0.0.1 -p {port} -k {home} -c fsync=off"
    # pg_ctl's own log, not a pipe: the server would keep the pipe open
    call("pg_ctl", "-D", data, "-l", str(home / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg://racer@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)


def given(waves, server, name, folder):
    return {
        "task": f"{waves}:Waves",
        "methods": (f"{waves}:adam", f"{waves}:sgd"),
        "steps": 30,
        "lr_trials": 3,
        "seeds": 2,
        "name": name,
        "storage": server,
        "runs": str(waves.parent / folder),
    }


def as_code(settings):
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def finished_once(settings):
    with closing(RaceStore(settings["storage"], settings["name"])) as store:
        records = [record for record in store.records() if record.state == "finished"]
        keys = [record.key for record in records]
        assert len(keys) == len(set(keys)) == 8
        assert next_trials(plan_settings(store.attributes()), values(store.finished())) == []
    return records


def test_two_machines_share_a_race_through_the_server(server, waves, race_process):
    """Two commands with run folders of their own share nothing but the server."""
    both = [given(waves, server, "shared", folder) for folder in ("here", "there")]
    processes = [race_process(as_code(settings), WAVES_SLEEP="0.02") for settings in both]
    outputs = [process.communicate(timeout=250)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    records = finished_once(both[0])
    assert {record.owner["pid"] for record in records} == {process.pid for process in processes}
    for settings in both:
        assert (Path(settings["runs"]) / "shared" / "report.html").is_file()


def test_the_other_worker_takes_over_from_a_killed_one(server, waves, race_process):
    settings = given(waves, server, "killed", "runs")
    victim, survivor = (race_process(as_code(settings), WAVES_SLEEP="0.02") for _ in range(2))
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        try:
            with closing(RaceStore(server, "killed")) as store:
                owners = [r.owner["pid"] for r in store.records() if r.state == "running" and r.owner]
        except KeyError:  # not made yet
            continue
        if victim.pid in owners:
            break
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = survivor.communicate(timeout=250)
    assert survivor.returncode == 0, output
    finished_once(settings)


def test_workers_of_one_command_share_the_server(server, waves):
    settings = {**given(waves, server, "team", "runs"), "workers": 2}
    document = race(RaceSettings(**settings))
    assert document["status"] == "complete"
    assert not (Path(settings["runs"]) / "team" / "race.db").exists()
    finished_once(settings)
