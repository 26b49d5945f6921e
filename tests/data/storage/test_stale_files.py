"""NFS's ESTALE, which no filesystem of this machine gives: reading is made to raise it."""

import errno
import os
from pathlib import Path

import pytest

from configs.errors import StorageFailed
from data.cache.dropout_tensors import constants_are_there
from data.preprocessing.shard_queue import read_finished
from data.preprocessing.worker_group import join
from data.samples.geometry import Bucket
from tests.data.preprocessing.test_shard_queue import planned, shard_plan


@pytest.fixture
def stale(monkeypatch):
    """Makes reading files whose path has a part raise: `stale(part, times)`."""
    monkeypatch.setattr("data.storage.stale_files._FIRST_WAIT_SECONDS", 0)

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
        assert other.holds("a")


def test_a_shard_whose_index_is_replaced_meanwhile_is_read(tmp_path, write_shard, stale):
    path = "shards/cats/32x32-000001.tar"
    index = write_shard(tmp_path / path, Bucket(32, 32), ["a", "b"])
    plan = shard_plan(path, (planned("a"), planned("b")), index.plan)
    stale(".index", 3)
    assert read_finished(tmp_path, plan).keys == ("a", "b")


def test_constants_that_are_replaced_meanwhile_are_read(cache, stale):
    stale("empty_text", 1)
    assert not constants_are_there(cache.folder, [], {"of": "others"})


@pytest.mark.parametrize("part", ["workers/", "empty_text", ".index"])
def test_what_stays_stale_is_named(tmp_path, cache, write_shard, stale, part):
    path = "shards/cats/32x32-000001.tar"
    index = write_shard(tmp_path / path, Bucket(32, 32), ["a"])
    plan = shard_plan(path, (planned("a"),), index.plan)
    with join(tmp_path / "crew", {}) as one, join(tmp_path / "crew", {}):
        calls = {
            "workers/": lambda: one.others(),
            "empty_text": lambda: constants_are_there(cache.folder, [], {}),
            ".index": lambda: read_finished(tmp_path, plan),
        }
        stale(part, 6)
        with pytest.raises(
            StorageFailed, match=rf"{part}.*: the file server says .*Stale file handle.* Look at the mount"
        ):
            calls[part]()
