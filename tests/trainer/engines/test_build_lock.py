import logging
import os
import subprocess
import sys
import time

import pytest

from tests.patience import wait_until
from trainer.engines.build_lock import clear_stale_build_locks, watched_build_locks


@pytest.fixture(autouse=True)
def heard(monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)  # a run in this process may have cut it off
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def test_only_locks_older_than_any_build_are_removed(tmp_path, caplog):
    stale, fresh = tmp_path / "py311_cpu" / "shm" / "lock", tmp_path / "fused" / "lock"
    for lock in (stale, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    an_hour_ago = time.time() - 3600
    os.utime(stale, (an_hour_ago, an_hour_ago))
    assert clear_stale_build_locks() == [stale]
    assert not stale.exists()
    assert fresh.exists()
    assert "left 60 minutes ago by a build that did not finish" in caplog.text


def test_who_builds_what_is_waited_for_is_said_once(tmp_path, caplog):
    """By a process that has the lock open, as torch has while it builds."""
    lock = tmp_path / "py311_cpu" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    hold = f"lock = open({str(lock)!r}, 'x'); print(); input()"
    line = [sys.executable, "-c", hold]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        builder.stdout.readline()
        told = f"{lock}: an extension is built; process {builder.pid} of this machine"
        with watched_build_locks(patience_seconds=0.1):
            wait_until(lambda: told in caplog.text, "the lock was not told of")
            seen = len(caplog.records)
            time.sleep(0.5)
            assert len(caplog.records) == seen
        builder.communicate(b"\n")


def test_a_lock_that_a_slow_build_here_holds_stays(tmp_path, caplog):
    """torch removes it at the end of the build, and raises if it is gone."""
    lock = tmp_path / "py311_cpu" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("x"):
        os.utime(lock, (time.time() - 3600,) * 2)
        assert clear_stale_build_locks() == [] and lock.exists()
    assert clear_stale_build_locks() == [lock]


@pytest.mark.fault(25, "a lock of a build that was killed just now, which torch waits for")
def test_a_lock_that_nobody_holds_is_told_and_removed_while_it_is_waited_for(tmp_path, caplog):
    lock = tmp_path / "py311_cpu" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    told = "or of one that was killed. It is waited for, and removed when it is 10 minutes old"
    with watched_build_locks(patience_seconds=0.1, stale_seconds=600):
        wait_until(lambda: told in caplog.text, "the lock was not told of")
        assert lock.exists()
        os.utime(lock, (time.time() - 601,) * 2)
        wait_until(lambda: not lock.exists(), "the lock is as it was")
    assert "removed, left 10 minutes ago" in caplog.text


def test_the_other_processes_of_a_machine_say_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "lock").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with watched_build_locks(patience_seconds=0.01):
        time.sleep(0.3)
    assert caplog.text == ""
