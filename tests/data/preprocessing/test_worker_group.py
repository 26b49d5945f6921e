import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data.preprocessing.worker_group
from configs.errors import InputError
from data.preprocessing.worker_group import STALE_SECONDS, Evicted, WorkerGroup, join

SETTINGS = {"data.resolution": [512], "format": 1}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "crew"


def move_elsewhere(group, *, silent_seconds):
    """Make a member one of another machine, last heard of so long ago."""
    file = group.folder / "workers" / f"{group.token}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"place": "another machine", "host": "node-7"}))
    then = time.time() - silent_seconds
    os.utime(file, (then, then))


def test_never_do_two_have_the_same_thing(folder):
    """Twelve members for four things, as fast as they can."""
    held, twice, taken = [threading.Lock() for _ in range(4)], [], [0] * 4

    def work(number):
        with join(folder, SETTINGS) as group:
            for turn in range(60):
                thing = (number + turn) % 4
                if group.claim(f"thing-{thing}"):
                    if not held[thing].acquire(blocking=False):
                        twice.append(thing)
                        continue
                    taken[thing] += 1
                    time.sleep(0.001)
                    held[thing].release()
                    group.release(f"thing-{thing}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    assert twice == []
    assert min(taken) > 0
    assert not folder.exists(), "the last one clears up"


def test_a_claim_is_kept_until_it_is_released(folder):
    with join(folder, SETTINGS) as one, join(folder, SETTINGS) as other:
        assert one.claim("a.b")
        assert not other.claim("a.b")
        assert other.claim("a"), "not the same thing"
        assert other.claim("a.b-2")
        assert str(other.holder("a.b")) == f"process {os.getpid()} on {socket.gethostname()}"
        assert other.claims_of_others("a.") == {"a.b"}
        one.release("a.b")
        assert other.claim("a.b")
        assert other.claims_of_others("a.") == set()


def test_however_they_leave_the_last_one_clears_up(folder):
    for _ in range(20):
        groups = [WorkerGroup(folder, SETTINGS) for _ in range(4)]
        (folder / "plan-of-theirs.json.gz").write_text("")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(WorkerGroup.leave, groups))
        assert not folder.exists()


def test_what_a_worker_writes_that_joins_while_the_last_one_clears_up_stays(folder, monkeypatch):
    """Its plan above all, which it reads again for every shard."""
    last, joined, rmdir = WorkerGroup(folder, SETTINGS), [], Path.rmdir

    def join_first(path):
        if not joined:
            joined.append(WorkerGroup(folder, SETTINGS))
            assert joined[0].claim("a")
            joined[0].plan_path.write_text("its shards")
            joined[0].announce_plan(joined[0].plan_path.name)
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", join_first)
    (folder / "plan-0123456789abcdef").write_text("of a dead worker")
    last.leave()
    (late,) = joined
    assert [path.name for path in folder.glob("plan-*")] == [late.plan_path.name]
    assert late.still_holds("a")
    late.leave()
    assert not folder.exists()


def test_a_member_that_left_holds_nothing(folder):
    with join(folder, SETTINGS) as one:
        with join(folder, SETTINGS) as other:
            assert other.claim("a")
        assert one.others() == []
        assert one.claim("a")
    assert not folder.exists()


def test_a_silent_member_of_another_machine_is_dead_after_a_while(folder):
    with join(folder, SETTINGS) as one:
        remote = WorkerGroup(folder, SETTINGS)
        assert remote.claim("a")
        move_elsewhere(remote, silent_seconds=STALE_SECONDS / 2)
        assert not one.claim("a")
        move_elsewhere(remote, silent_seconds=STALE_SECONDS + 1)
        assert one.claim("a")
        assert not remote.still_holds("a"), "it was taken for dead: it must not publish"
        # It was only stopped, and works on; what another has by now it does not get.
        remote.touch()
        assert [member.token for member in one.others()] == [remote.token]
        assert not remote.claim("a")
        assert remote.claim("b")
        remote.leave()
        assert one.still_holds("a")


@pytest.mark.parametrize("by", ["one that plans", "one that clears up"])
def test_who_was_buried_alive_stops(folder, by):
    """Stopped for minutes, it goes by a plan that nobody else goes by any more."""
    remote = WorkerGroup(folder, SETTINGS)
    assert remote.claim("a")
    move_elsewhere(remote, silent_seconds=STALE_SECONDS + 1)
    with join(folder, SETTINGS) as one:
        if by == "one that plans":
            one.evict_dead()
        else:
            with join(folder, SETTINGS) as other:
                other.evict_dead()
    started_again = WorkerGroup(folder, SETTINGS)
    assert started_again.claim("a")
    calls = [
        lambda: remote.claim("b"),
        lambda: remote.still_holds("a"),
        lambda: remote.require_claim("a"),
        lambda: remote.announce_plan("plan-of-then"),
        lambda: remote.others(),
    ]
    for call in calls:
        with pytest.raises(Evicted, match=r"this worker \(process \d+ on .*taken for dead.*Start the same command"):
            call()
    remote.leave()
    assert started_again.still_holds("a")
    assert not (folder / "workers" / f"{remote.token}.json").exists()
    started_again.leave()
    assert not folder.exists()


def test_a_heart_that_finds_its_file_gone_beats_no_more(folder, monkeypatch):
    monkeypatch.setattr("data.preprocessing.worker_group.HEARTBEAT_SECONDS", 0.01)
    with join(folder, SETTINGS) as group:
        (folder / "workers" / f"{group.token}.json").unlink()
        time.sleep(0.1)
        assert list((folder / "workers").iterdir()) == []
        with pytest.raises(Evicted):
            group.touch()


def test_a_process_of_this_machine_is_dead_at_once(folder):
    with join(folder, SETTINGS) as one:
        gone = WorkerGroup(folder, SETTINGS)
        assert gone.claim("a")
        assert not one.claim("a")
        file = folder / "workers" / f"{gone.token}.json"
        # Its number was given to another process since: this one, which started at another time.
        file.write_text(json.dumps(json.loads(file.read_text()) | {"process_start": 1}))
        assert one.others() == []
        assert one.claim("a")


def test_a_process_of_this_machine_that_proc_hides_is_judged_by_its_heartbeat(folder, monkeypatch):
    """Another user's: /proc does not tell whether it runs."""
    hidden = WorkerGroup(folder, SETTINGS)
    assert hidden.claim("a")
    monkeypatch.setattr(data.preprocessing.worker_group, "is_hidden", lambda pid: True)
    monkeypatch.setattr(data.preprocessing.worker_group, "process_start", lambda pid: None)
    time.sleep(0.02)  # clocks of files tick in milliseconds
    with join(folder, SETTINGS) as one:
        (other,) = one.others()
        assert not one.claim("a")
        assert not one.is_confirmed_alive(other), "it was not heard of since"
        time.sleep(0.02)
        hidden.touch()
        assert one.is_confirmed_alive(other)
        then = time.time() - STALE_SECONDS - 1
        os.utime(folder / "workers" / f"{hidden.token}.json", (then, then))
        assert one.claim("a")


@pytest.mark.fault(19, "the clock of a preprocessing worker jumps by years while it runs")
def test_a_clock_that_is_wrong_kills_nobody(folder, monkeypatch):
    """Ages are told by the file server's clock."""
    with join(folder, SETTINGS) as one:
        remote = WorkerGroup(folder, SETTINGS)
        remote.claim("a")
        move_elsewhere(remote, silent_seconds=1)
        monkeypatch.setattr("time.time", lambda: 2e9)
        monkeypatch.setattr("time.time_ns", lambda: 2 * 10**18)
        assert not one.claim("a")


def test_others_settings_are_refused_by_name_and_leave_nothing(folder):
    with join(folder, SETTINGS) as one:
        with (
            pytest.raises(InputError, match=r"another job is encoding into it by other settings \(process \d+ on") as e,
            join(folder, SETTINGS | {"data.resolution": [768], "new": True}),
        ):
            pass
        assert "data.resolution is [768] here, [512] there\n  new is True here, None there" in str(e.value)
        assert one.others() == []
    with join(folder, {"data.resolution": [768]}):
        pass
    assert not folder.exists()


def test_settings_of_the_dead_bind_nobody(folder):
    gone = WorkerGroup(folder, SETTINGS)
    move_elsewhere(gone, silent_seconds=STALE_SECONDS + 1)
    with join(folder, {"data.resolution": [768]}) as group:
        assert group.others() == []
    assert not folder.exists(), "what the dead left is cleared up too"


def test_failures_are_told_to_those_who_were_there(folder):
    with join(folder, SETTINGS) as one, join(folder, SETTINGS) as other:
        time.sleep(0.02)  # clocks of files tick in milliseconds
        one.report_failure("shards.a", InputError("picture.png: cannot be decoded"))
        assert str(other.failure("shards.a")) == "picture.png: cannot be decoded"
        assert other.failure("shards.b") is None
        time.sleep(0.02)
        with join(folder, SETTINGS) as late:
            assert late.failure("shards.a") is None, "it may have been mended since"


def test_a_folder_that_vanishes_is_made_again(folder):
    """By a member that took itself for the last one."""
    with join(folder, SETTINGS) as group:
        for name in ("claims", "failed"):
            (folder / name).rmdir()
        assert group.claim("a")
        group.report_failure("a", InputError("cannot be done"))
        with join(folder, SETTINGS) as other:
            assert not other.claim("a")


@pytest.mark.parametrize("strange", ["crew", "crew/workers", "crew/claims", "crew/agents.yaml", "crew/tasks/a.py"])
def test_what_another_program_has_there_is_named_and_stays(folder, strange):
    file = folder.parent / strange
    file.parent.mkdir(parents=True)
    file.write_text("another program's")
    named = folder.parent / Path(*Path(strange).parts[:2])
    told = rf"data\.cache {folder.parent}: {named} is there, which no job of fluxfill has made\. Point data\.cache at"
    with pytest.raises(InputError, match=told), join(folder, SETTINGS):
        pass
    assert [path for path in folder.parent.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("content", ["", '{"token": "a', "[1]", '{"settings": {}}', "settings", "plan"])
def test_a_workers_file_that_is_damaged_is_nobodys(folder, content):
    with join(folder, SETTINGS) as one:
        other = WorkerGroup(folder, SETTINGS)
        file = folder / "workers" / f"{other.token}.json"
        whole = json.loads(file.read_text())
        file.write_text(json.dumps(whole | {content: 7}) if content in whole else content)
        assert one.others() == []
    assert not folder.exists()


def test_workers_that_cannot_be_read_are_a_message(folder):
    (folder / "workers" / f"{'a' * 16}.json").mkdir(parents=True)
    told = r"workers/a{16}\.json: cannot be read \(Is a directory\)\. It says who is at work in data\.cache: have it"
    with pytest.raises(InputError, match=told), join(folder, SETTINGS):
        pass
