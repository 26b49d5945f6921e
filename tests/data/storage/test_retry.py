import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import InputError, StorageFailed
from data.cache.dropout_tensors import dropout_tensors_are_current
from data.preprocessing.shard_queue import read_finished
from data.preprocessing.worker_group import join
from data.samples.geometry import Bucket
from data.storage.retry import ATTEMPTS, STALE_ATTEMPTS, with_retries
from tests.data.preprocessing.test_shard_queue import planned, shard_plan


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited by the thread of the test."""
    waited, wait, here = [], threading.Event.wait, threading.get_ident()

    def note(event, seconds=None):
        return waited.append(seconds) if threading.get_ident() == here else wait(event, seconds)

    monkeypatch.setattr("threading.Event.wait", note)
    return waited


def failing(times, error):
    calls = []

    def attempt():
        calls.append(None)
        if len(calls) <= times:
            raise error
        return len(calls)

    return attempt


def test_what_fails_for_a_while_is_tried_again_ever_later(waits):
    assert with_retries(failing(ATTEMPTS - 1, OSError("busy")), "a.tar") == ATTEMPTS
    assert len(waits) == ATTEMPTS - 1
    for wait, middle in zip(waits, (1, 2, 4, 8, 16, 30, 30), strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle
    assert len(set(waits)) == len(waits), "processes that fail together would come back together"


def test_what_keeps_failing_is_named_with_its_last_error(waits):
    with pytest.raises(StorageFailed, match=r"^s3://b/a\.tar: failed 8 time\(s\), .*ConnectionError: reset\. Look"):
        with_retries(failing(99, ConnectionError("reset")), "s3://b/a.tar")
    assert len(waits) == ATTEMPTS - 1


def test_what_a_user_must_mend_is_not_tried_again(waits):
    attempt = failing(1, InputError("no such driver"))
    with pytest.raises(InputError, match="no such driver"):
        with_retries(attempt, "a.tar")
    assert waits == []
    assert attempt() == 2


def test_a_stop_ends_the_waiting():
    stop = threading.Event()
    stop.set()
    with pytest.raises(InputError, match=r"failed 1 time\(s\)"):
        with_retries(failing(99, OSError("busy")), "a.tar", stop=stop)


def test_a_stop_during_a_wait_ends_it_without_another_attempt(monkeypatch):
    monkeypatch.setattr("data.storage.retry.FIRST_WAIT_SECONDS", 100.0)
    monkeypatch.setattr("data.storage.retry.LONGEST_WAIT_SECONDS", 100.0)
    stop, calls = threading.Event(), []

    def attempt():
        calls.append(None)
        raise OSError("busy")

    threading.Timer(0.1, stop.set).start()
    with pytest.raises(StorageFailed, match=r"a\.tar: failed 1 time\(s\), .*busy"):
        with_retries(attempt, "a.tar", stop=stop)
    assert len(calls) == 1


def test_no_attempt_begins_after_four_minutes(waits, monkeypatch):
    """A silent server takes a minute for each; the other processes of a run wait ten minutes at most."""
    clock = iter(range(0, 10_000, 65))
    monkeypatch.setattr("data.storage.retry.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(StorageFailed, match=r"failed 4 time\(s\)"):
        with_retries(failing(99, TimeoutError("timed out")), "a.tar")


# --- ESTALE, which no filesystem of this machine gives: reading is made to raise it -----------------------------------


@pytest.fixture
def stale(monkeypatch):
    """Makes reading files whose path has a part raise: `stale(part, times)`."""
    monkeypatch.setattr("data.storage.retry.FIRST_STALE_WAIT_SECONDS", 0)

    def make(part, times):
        left = [times]

        def raising(read):
            def read_or_raise(path, *arguments, **options):
                if part in os.fspath(path) and left[0]:
                    left[0] -= 1
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                return read(path, *arguments, **options)

            return read_or_raise

        for name in ("read_text", "read_bytes"):
            monkeypatch.setattr(Path, name, raising(getattr(Path, name)))
        monkeypatch.setattr(os, "listdir", raising(os.listdir))

    return make


@pytest.mark.parametrize("part", ["workers/", "workers"])
def test_a_member_whose_file_is_replaced_meanwhile_is_no_dead_one(tmp_path, stale, part):
    with join(tmp_path / "crew", {}) as one, join(tmp_path / "crew", {}) as other:
        assert other.claim("a")
        stale(part, 2)
        assert not one.claim("a")
        assert other.still_holds("a")


def test_a_shard_whose_index_is_replaced_meanwhile_is_read(tmp_path, write_shard, stale):
    path = "shards/cats/32x32-000001.tar"
    index = write_shard(tmp_path / path, Bucket(32, 32), ["a", "b"])
    plan = shard_plan(path, (planned("a"), planned("b")), index.plan)
    stale(".index", 3)
    assert read_finished(tmp_path, plan).keys == ("a", "b")


def test_constants_that_are_replaced_meanwhile_are_read(cache, stale):
    stale("empty_text", 1)
    assert not dropout_tensors_are_current(cache.folder, [], {"of": "others"})


@pytest.mark.parametrize("part", ["workers/", "empty_text", ".index"])
def test_what_stays_stale_is_named(tmp_path, cache, write_shard, stale, part):
    path = "shards/cats/32x32-000001.tar"
    index = write_shard(tmp_path / path, Bucket(32, 32), ["a"])
    plan = shard_plan(path, (planned("a"),), index.plan)
    with join(tmp_path / "crew", {}) as one, join(tmp_path / "crew", {}):
        calls = {
            "workers/": lambda: one.others(),
            "empty_text": lambda: dropout_tensors_are_current(cache.folder, [], {}),
            ".index": lambda: read_finished(tmp_path, plan),
        }
        stale(part, STALE_ATTEMPTS)
        with pytest.raises(
            StorageFailed, match=rf"{part}.*: the file server says .*Stale file handle.* Look at the mount"
        ):
            calls[part]()
