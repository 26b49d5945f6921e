import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import AlreadyRunning, InputError, StorageFailed
from data.storage import run_lock
from data.storage.run_lock import VARIABLE, own_run_folder, take_run_folder
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]

# Takes the folder, says how that ended, keeps it until it is killed or its standard input ends.
_OWNER = """
import os, sys
from pathlib import Path
from configs.errors import AlreadyRunning
from data.storage.run_lock import take_run_folder
print("ready", flush=True)
sys.stdin.readline()
try:
    lock = take_run_folder(Path(sys.argv[1]), os.environ, supervisor="fluxfill train")
    print("owner", flush=True)
except AlreadyRunning as error:
    print(f"refused: {error}", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that takes tmp_path/run when told to by a line."""
    started = []

    def start():
        line = [sys.executable, "-c", _OWNER, str(tmp_path / "run")]
        process = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def take(process) -> str:
    process.stdin.write("go\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def edit_owner(folder: Path, **changes) -> None:
    """Of the one owner: all of its processes elsewhere, or what is given."""
    (file,) = folder.glob("owner-*.json")
    told = json.loads(file.read_text())
    told["processes"] = [process | {"place": "another kernel", "host": "n02"} for process in told["processes"]]
    file.write_text(json.dumps(told | changes))


def test_a_second_start_is_told_who_the_first_is_and_touches_no_file(start, tmp_path):
    first = start()
    assert take(first) == "owner"
    before = contents(tmp_path / "run")
    told = take(start())
    assert told.startswith(f"refused: {tmp_path / 'run'}: belongs to another start of this run (fluxfill train, ")
    assert f"process {first.pid} on " in told
    assert contents(tmp_path / "run") == before


def test_after_kill_9_the_next_start_takes_over_at_once_and_aloud(start, tmp_path):
    first, said = start(), []
    take(first)
    first.kill()
    first.wait()
    lock = take_run_folder(tmp_path / "run", {}, supervisor="test", say=said.append)
    assert said == [f"{tmp_path / 'run'}: taken over from {said[0].partition('taken over from ')[2]}"]
    assert f"process {first.pid} on " in said[0]
    lock.end()


def test_a_folder_that_was_given_back_is_taken_without_a_word(tmp_path):
    said = []
    for number in range(1, 4):
        lock = take_run_folder(tmp_path / "run", {}, supervisor="test", say=said.append)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [f"owner-{number}.json"]
        lock.end()
    assert said == []


@pytest.mark.fault(23, "two starts of the same folder, and many at once after a death")
@pytest.mark.parametrize("attempt", range(5))
def test_of_many_that_start_at_once_after_a_death_one_wins(start, tmp_path, attempt):
    dead = start()
    take(dead)
    dead.kill()
    dead.wait()
    processes = [start() for _ in range(6)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.stdout.readline().split(":")[0].strip() for process in processes]
    assert sorted(answers) == ["owner"] + ["refused"] * 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["owner-2.json"]


def test_a_start_between_a_kill_and_the_end_of_its_ranks_waits_for_them(start, tmp_path, monkeypatch):
    """Rank 0 of a launcher that was killed saves for some seconds."""
    supervisor, rank, said = start(), start(), []
    take(supervisor)
    (file,) = (tmp_path / "run").glob("owner-*.json")
    told = json.loads(file.read_text())
    start_of_rank = run_lock.process_start(rank.pid)
    told["processes"].append(told["processes"][0] | {"what": "rank 0", "pid": rank.pid, "start": start_of_rank})
    file.write_text(json.dumps(told))
    supervisor.kill()
    supervisor.wait()

    def end_the_rank(text: str) -> None:
        said.append(text)
        rank.kill()
        rank.wait()

    take_run_folder(tmp_path / "run", {}, supervisor="test", say=end_the_rank).end()
    assert "whose launcher is gone: its ranks may be saving" in said[0] and "taken over" in said[1]


# --- other machines ---------------------------------------------------------------------------------------------------


def test_an_owner_elsewhere_whose_heartbeat_moves_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.3)
    lock = take_run_folder(tmp_path, {"SLURM_JOB_ID": "4711"}, supervisor="batch script")
    edit_owner(tmp_path)
    lock.start_heartbeat(lambda _: None)
    with pytest.raises(AlreadyRunning, match=r"job 4711, batch script, process .* on n02"):
        take_run_folder(tmp_path, {"SLURM_JOB_ID": "4712"}, supervisor="test", say=lambda _: None)
    lock.end()


@pytest.mark.fault(19, "an owner on another machine whose clock is wrong")
@pytest.mark.parametrize("skew", [0, 10 * 365 * 86400])
def test_an_owner_elsewhere_that_is_silent_is_dead_whatever_the_clocks_say(tmp_path, monkeypatch, skew):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    take_run_folder(tmp_path, {}, supervisor="test")
    edit_owner(tmp_path)
    (file,) = tmp_path.glob("owner-*.json")
    os.utime(file, (time.time() + skew,) * 2)
    said = []
    lock = take_run_folder(tmp_path, {}, supervisor="test", say=said.append)
    assert "taken over from" in said[-1]
    if skew:  # else it may have been silent for long enough when it is looked at first
        assert "waiting for" in said[0]
    lock.end()


def test_one_that_has_been_silent_for_long_is_not_watched(tmp_path):
    take_run_folder(tmp_path, {}, supervisor="test")
    edit_owner(tmp_path)
    (file,) = tmp_path.glob("owner-*.json")
    os.utime(file, (time.time() - 200,) * 2)
    said = []
    take_run_folder(tmp_path, {}, supervisor="test", say=said.append).end()
    assert len(said) == 1 and "taken over" in said[0]


@pytest.mark.parametrize("restarts, job, dead", [("1", "4711", True), ("0", "4711", False), ("1", "4712", False)])
def test_a_job_that_slurm_started_again_takes_over_at_once(tmp_path, monkeypatch, restarts, job, dead):
    monkeypatch.setattr(run_lock, "END_SECONDS", 0.5)
    take_run_folder(tmp_path, {"SLURM_JOB_ID": "4711"}, supervisor="test")
    edit_owner(tmp_path)
    again = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts}
    if dead:
        take_run_folder(tmp_path, again, supervisor="test", say=lambda _: None).end()
    else:
        with pytest.raises(AlreadyRunning):
            take_run_folder(tmp_path, again, supervisor="test", say=lambda _: None)


def test_an_owner_that_proc_hides_is_judged_by_its_heartbeat(tmp_path, monkeypatch):
    """Another user's of this machine: whether it is that one, or another of its number, /proc does not tell."""
    lock = take_run_folder(tmp_path, {}, supervisor="first")
    monkeypatch.setattr(run_lock, "is_hidden", lambda pid: True)
    monkeypatch.setattr(run_lock, "process_start", lambda pid: None)
    clock = SimpleNamespace(monotonic=time.monotonic, strftime=time.strftime, sleep=lambda _: lock._touch())
    monkeypatch.setattr(run_lock, "time", clock)
    with pytest.raises(AlreadyRunning):
        take_run_folder(tmp_path, {}, supervisor="second", say=lambda _: None)
    (file,) = tmp_path.glob("owner-*.json")
    os.utime(file, (time.time() - 200,) * 2)
    take_run_folder(tmp_path, {}, supervisor="second", say=lambda _: None).end()


# --- an owner that was taken for dead ---------------------------------------------------------------------------------


def test_an_owner_that_was_replaced_learns_it_from_its_heartbeat_and_before_a_write(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.2)
    now = run_lock._now()
    monkeypatch.setattr(run_lock, "_now", lambda: now)
    old = take_run_folder(tmp_path, {}, supervisor="old")
    edit_owner(tmp_path)
    (file,) = tmp_path.glob("owner-*.json")
    os.utime(file, (time.time() - 200,) * 2)
    new = take_run_folder(tmp_path, {}, supervisor="new", say=lambda _: None)
    old.require()  # a moment after its heartbeat nobody can have taken it: no look at the disk
    monkeypatch.setattr(run_lock, "_now", lambda: now + 300)
    with pytest.raises(AlreadyRunning, match=r"taken for dead; the folder belongs to new, process"):
        old.require()
    lost = []
    old.start_heartbeat(lost.append)
    deadline = time.monotonic() + PATIENCE
    while not lost:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = contents(tmp_path)
    old.end()
    assert contents(tmp_path) == before
    new.refuse_loss()
    new.end()


# --- a supervisor and its rank 0 --------------------------------------------------------------------------------------


def test_rank_0_joins_its_supervisor_and_no_other(tmp_path):
    with own_run_folder(tmp_path, {}, supervisor="fluxfill train") as lock:
        mine = {VARIABLE: lock.owner.id, "MASTER_ADDR": "n01", "MASTER_PORT": "29501"}
        joined = take_run_folder(tmp_path, mine)
        assert [process.what for process in joined.owner.processes] == ["fluxfill train", "rank 0"]
        joined.end()
        lock.refuse_loss()
        again = take_run_folder(tmp_path, mine)  # after a restart by the same supervisor
        assert len(again.owner.processes) == 2
        with pytest.raises(AlreadyRunning):
            take_run_folder(tmp_path, {VARIABLE: "0" * 16})
        assert run_lock.is_of_another(tmp_path, {"MASTER_ADDR": "n01", "MASTER_PORT": "29502"})
        assert not run_lock.is_of_another(tmp_path, mine)
    assert not run_lock.is_of_another(tmp_path, {"MASTER_ADDR": "n01", "MASTER_PORT": "29502"})


def test_ranks_know_an_owner_by_its_name_before_its_ranks_have_met(tmp_path):
    """Those of a start that lost the folder may fail while the new one loads weights."""
    with own_run_folder(tmp_path, {}, supervisor="fluxfill train") as lock:
        where = {"MASTER_ADDR": "n01", "MASTER_PORT": "29501"}
        assert run_lock.is_of_another(tmp_path, where | {VARIABLE: "0" * 16})
        assert run_lock.is_of_another(tmp_path, {VARIABLE: "0" * 16})  # of a supervisor, which meets nobody
        assert not run_lock.is_of_another(tmp_path, where | {VARIABLE: lock.owner.id})
        assert not run_lock.is_of_another(tmp_path, where)


_KILLED_ONCE = """
import os, pathlib, sys
from data.storage.run_lock import take_run_folder
lock = take_run_folder(pathlib.Path("run"), os.environ)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), 9)
print("number", *(path.name for path in pathlib.Path("run").iterdir()))
"""


def test_rank_0_that_its_launcher_starts_again_takes_over_at_once(tmp_path):
    (tmp_path / "rank.py").write_text(_KILLED_ONCE)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--master_port=0"]
    line += ["--max_restarts=1", "rank.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (0, "number owner-2.json\n"), ended.stderr


def test_rank_0_gives_back_what_its_dead_supervisor_cannot(start, tmp_path):
    supervisor = start()
    take(supervisor)
    (file,) = (tmp_path / "run").glob("owner-*.json")
    joined = take_run_folder(tmp_path / "run", {VARIABLE: json.loads(file.read_text())["id"]})
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    joined.end()
    assert json.loads(file.read_text())["ended"]


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_filesystem_without_links_has_one_owner_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    lock = take_run_folder(tmp_path, {}, supervisor="test")
    with pytest.raises(AlreadyRunning):
        take_run_folder(tmp_path, {}, supervisor="test")
    lock.end()


def test_a_folder_that_cannot_be_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: the run's folder cannot be written to \(.*\)\. Make room or give"):
        take_run_folder(tmp_path / "file" / "run", {}, supervisor="test")


@pytest.mark.parametrize("call", ["os.fsync", "os.listdir"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_disk_that_fails_is_no_bad_input(tmp_path, monkeypatch, call, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(call, refuse)
    with pytest.raises(StorageFailed, match=os.strerror(number)):
        take_run_folder(tmp_path / "run", {}, supervisor="test")


def test_a_file_that_cannot_be_understood_is_an_owner_as_long_as_it_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    (tmp_path / "owner-7.json").write_text("{")
    lock = take_run_folder(tmp_path, {}, supervisor="test", say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["owner-8.json"]
    assert replace(lock.owner, ended=True) != lock.owner
    lock.end()
