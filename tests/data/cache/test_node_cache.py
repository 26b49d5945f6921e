import fcntl
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data.cache.node_cache
from configs.errors import InputError, StorageFailed
from data.batches.batch_stream import BatchStream
from data.batches.cached_rows import CachedRows
from data.batches.order import Order, OrderSettings
from data.batches.shard_reader import ShardReader
from data.cache.manifest import read_manifest, read_shard_table
from data.cache.node_cache import NodeCache
from data.cache.open_cache import Cache
from data.cache.remote_manifest import fetch_manifest
from tests.data.cache.made_copies import copies_of, held
from tests.data.made_caches import index_of
from tests.data.storage.remote_server import Remote
from tests.patience import PATIENCE


def test_a_copy_is_the_shard_and_is_fetched_once(remote, tmp_path):
    url, server, cache = remote
    copies = copies_of(url, cache, tmp_path)
    for _ in range(3):
        handle = held(copies, 1)
        tar = cache.folder / str(cache.table.path[1])
        assert os.pread(handle, tar.stat().st_size + 1, 0) == tar.read_bytes()
    assert index_of(copies.path(1)).read_bytes() == index_of(tar).read_bytes()
    assert server.requests == {"shards/a/32x32-000001.tar": 1, "index/a/32x32-000001.index": 1}
    assert not list(copies.folder.rglob("*.part"))


def test_the_shards_and_indexes_of_a_cache_of_format_1_are_fetched_too(serve, tmp_path):
    folder = Path(__file__).parent / "format_v1" / "bf16"
    cache, server = Cache(folder, read_manifest(folder), read_shard_table(folder)), Remote(folder)
    copies = copies_of(serve(server.get), cache, tmp_path)
    with closing(ShardReader(replace(cache, copies=copies))) as reader:
        assert [reader.key(0, row) for row in range(3)] == [f"photos-32x48-000001-{row}" for row in range(3)]
    assert server.requests == {"shards/photos/32x48-000001.tar": 1, "shards/photos/32x48-000001.index": 1}
    assert copies.index_path(0).read_bytes() == (folder / "shards/photos/32x48-000001.index").read_bytes()


@pytest.mark.parametrize("fault", [503, 429, "cut", "page", "flip"])
def test_what_goes_wrong_for_a_while_is_tried_again(remote, tmp_path, no_waits, fault, caplog):
    url, server, cache = remote
    server.faults["shards/a/32x32-000001.tar"] = [fault] * 7
    handle = held(copies_of(url, cache, tmp_path), 1)
    tar = cache.folder / str(cache.table.path[1])
    assert os.pread(handle, tar.stat().st_size, 0) == tar.read_bytes()
    assert server.requests["shards/a/32x32-000001.tar"] == 8
    assert all(f"{url}/shards/a/32x32-000001.tar: " in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "fault, problem",
    [
        (503, "HTTPError: HTTP Error 503"),
        ("cut", r"\d+ bytes, the manifest says \d+"),
        ("page", "the manifest says .*; it begins with b'<!DOCTYPE html><title>Please"),
        ("flip", "sha256 .*, the manifest says"),
        ("longer", r"more than the \d+ bytes of the manifest"),
    ],
)
def test_what_stays_wrong_is_named_with_its_url(remote, tmp_path, no_waits, fault, problem):
    url, server, cache = remote
    if fault == "longer":
        with (cache.folder / str(cache.table.path[1])).open("ab") as file:
            file.write(b"more")
    else:
        server.faults["shards/a/32x32-000001.tar"] = [fault] * 99
    copies = copies_of(url, cache, tmp_path)
    with pytest.raises(InputError, match=rf"{url}/shards/a/32x32-000001\.tar: failed 8 time\(s\), .*{problem}"):
        held(copies, 1)
    assert not copies.path(1).exists()
    assert not list(copies.folder.rglob("*.part"))


def test_a_shard_that_the_storage_does_not_have_is_named_at_once(remote, tmp_path):
    url, server, cache = remote
    (cache.folder / "shards/a/32x32-000001.tar").unlink()
    copies = copies_of(url, cache, tmp_path)
    with pytest.raises(InputError, match=rf"{url}/shards/a/32x32-000001\.tar: the server answers 404"):
        held(copies, 1)
    assert server.requests["shards/a/32x32-000001.tar"] == 1
    assert not list(copies.folder.rglob("*.part"))


@pytest.mark.parametrize("fault", [404, "flip", "another's"])
def test_an_index_that_does_not_come_is_rebuilt(remote, tmp_path, fault):
    url, server, cache = remote
    if fault == "another's":
        shutil.copy(
            index_of(cache.folder / str(cache.table.path[0])), index_of(cache.folder / str(cache.table.path[1]))
        )
    else:
        server.faults["index/a/32x32-000001.index"] = [fault]
    opened = ShardReader(replace(cache, copies=copies_of(url, cache, tmp_path))).shard(1)
    assert opened.index.keys == ("a-1-0", "a-1-1", "a-1-2")


def test_a_reader_that_is_closed_waits_for_nothing(remote, tmp_path, monkeypatch):
    url, server, cache = remote
    monkeypatch.setattr("data.storage.retry.FIRST_WAIT_SECONDS", 100.0)
    monkeypatch.setattr("data.storage.retry.LONGEST_WAIT_SECONDS", 100.0)
    server.faults["shards/a/32x32-000001.tar"] = [503] * 99
    copies, stop = copies_of(url, cache, tmp_path), threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(InputError, match=r"32x32-000001\.tar: failed 1 time"):
        copies.open(1, stop=stop)
    assert server.requests["shards/a/32x32-000001.tar"] == 1


def _open_and_tell(copies, number, connection):
    handle = copies.open(number, stop=threading.Event())
    connection.send(os.fstat(handle).st_size)
    connection.recv()


def start_process(target, *arguments):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process is heard
    return process, here


def hear(connection):
    assert connection.poll(PATIENCE), "the other process says nothing"
    return connection.recv()


def test_processes_and_threads_of_a_node_fetch_a_shard_once(remote, tmp_path):
    url, server, cache = remote
    server.slow.clear()
    copies = copies_of(url, cache, tmp_path)
    others = [start_process(_open_and_tell, copies, 1) for _ in range(3)]
    sizes = []
    threads = [threading.Thread(target=lambda: sizes.append(os.fstat(held(copies, 1)).st_size)) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.slow.set()
    for thread in threads:
        thread.join()
    sizes += [hear(connection) for _, connection in others]
    for process, connection in others:
        connection.send("done")
        process.join()
    assert sizes == [cache.table.bytes[1]] * 6
    assert server.requests["shards/a/32x32-000001.tar"] == 1


@pytest.mark.fault(25, "a fetch into the node's cache that was killed")
def test_a_fetch_that_was_killed_is_taken_over(remote, tmp_path):
    url, server, cache = remote
    server.slow.clear()
    copies = copies_of(url, cache, tmp_path)
    process, _ = start_process(_open_and_tell, copies, 1)
    part = copies.path(1).with_suffix(".part")
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    found = []
    waiting = threading.Thread(target=lambda: found.append(held(copies, 1)))
    waiting.start()
    time.sleep(0.2)
    assert not found
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.slow.set()
    waiting.join(timeout=PATIENCE)
    assert os.fstat(found[0]).st_size == cache.table.bytes[1]
    assert not part.exists()


def test_an_error_that_holds_itself_holds_no_copy(remote, tmp_path, no_waits, monkeypatch):
    """As those of fsspec's drivers do, until Python's collector comes by: nobody waits for it."""
    url, _, cache = remote
    fetch = data.cache.node_cache.open_url
    failures = []

    def fail_once(url):
        if not failures:
            error: Any = ConnectionResetError("reset")
            failures.append(None)
            error.myself = error  # a cycle, and with the traceback every frame up to the caller's
            raise error
        return fetch(url)

    monkeypatch.setattr("data.cache.node_cache.open_url", fail_once)
    gc.disable()
    try:
        found = []
        opening = threading.Thread(target=lambda: found.append(held(copies_of(url, cache, tmp_path), 1)), daemon=True)
        opening.start()
        opening.join(timeout=PATIENCE)
        assert found, "the copy is still locked by whoever fetched it"
    finally:
        gc.enable()


def test_a_copy_that_came_while_its_lock_was_waited_for_is_not_fetched_again(remote, tmp_path):
    url, server, cache = remote
    copies = copies_of(url, cache, tmp_path)
    held(copies, 1)
    assert copies._fetch(1, threading.Event(), may_exceed=True, attempts=1)  # of one who looked before it came
    assert server.requests["shards/a/32x32-000001.tar"] == 1
    assert not list(copies.folder.rglob("*.part"))
    assert copies.path(1).exists() and index_of(copies.path(1)).exists()


@pytest.mark.parametrize("call", ["os.write", "os.fsync"])
def test_a_full_disk_is_named_and_nothing_fetched_again(remote, tmp_path, monkeypatch, call):
    """As one of the storage: with room there, the run goes on."""
    url, server, cache = remote

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(StorageFailed, match=r"data.local_cache .*node: No space left on device\. Free room there, or"):
        held(copies_of(url, cache, tmp_path), 1)
    assert server.requests == {"shards/a/32x32-000001.tar": 1}
    assert not list((tmp_path / "node").rglob("*.part"))


def test_the_copies_unused_for_the_longest_time_make_room(remote, tmp_path):
    url, _, cache = remote
    sizes = cache.table.bytes
    copies = copies_of(url, cache, tmp_path, limit=int(sizes[0] + sizes[1] + sizes[2]))
    for number in (0, 1, 2):
        held(copies, number)
        os.utime(copies.path(number), (number, number))  # clocks of files tick in milliseconds
    held(copies, 0)  # used again
    held(copies, 3)
    there = {number for number in range(4) if copies.path(number).exists()}
    assert there >= {0, 3} and 1 not in there
    assert sum(path.stat().st_size for path in copies.folder.rglob("*.tar")) <= copies.limit_bytes
    assert {path.stem for path in copies.folder.rglob("*.index")} == {copies.path(number).stem for number in there}


def test_a_copy_in_use_is_never_removed(remote, tmp_path, caplog):
    url, _, cache = remote
    copies = copies_of(url, cache, tmp_path, limit=int(cache.table.bytes[0]) + 100)
    reading, connection = start_process(_open_and_tell, copies, 0)  # another process of the node
    hear(connection)
    assert held(copies, 1, may_exceed=False) is None
    assert not copies.path(1).exists()
    held(copies, 1)
    assert copies.path(0).exists()
    assert "more than data.local_cache_gib" in caplog.text
    connection.send("done")
    reading.join()
    held(copies, 2)
    assert not copies.path(0).exists()


def test_what_a_killed_process_left_makes_room_first(remote, tmp_path):
    url, _, cache = remote
    copies = copies_of(url, cache, tmp_path, limit=int(cache.table.bytes.max()))
    left = copies.path(0).with_suffix(".part")
    left.write_bytes(b"x" * int(cache.table.bytes.max()))
    assert held(copies, 1, may_exceed=False) is not None
    assert not left.exists()


def test_many_processes_in_little_room_end(remote, tmp_path):
    """Fetching, reading and removing at once, in room for one or two shards: nobody waits for ever, nothing is torn."""
    url, _, cache = remote
    copies = copies_of(url, cache, tmp_path, limit=int(cache.table.bytes.max() * 1.5))

    def churn(seed, connection):
        rng = np.random.default_rng(seed)
        for _ in range(25):
            number = int(rng.integers(4))
            handle = copies.open(number, stop=threading.Event())
            data = os.pread(handle, 1 << 24, 0)
            if data != (cache.folder / str(cache.table.path[number])).read_bytes():
                connection.send(f"shard {number} is torn")
                return
            del handle
        connection.send("whole")

    others = [start_process(churn, seed) for seed in range(4)]
    assert [hear(connection) for _, connection in others] == ["whole"] * 4
    for process, _ in others:
        process.join()


def open_stream(cache: Cache, *, rank=0, world_size=1, block_shards=8, start=0) -> BatchStream:
    settings = OrderSettings.current(
        seed=3, global_batch_size=4, weights={"a": 1.0, "b": 1.0}, shards="", block_shards=block_shards
    )
    order = Order(cache.table.dataset, cache.table.bucket, cache.table.samples, settings)
    source, shape = CachedRows(cache, order), {"rank": rank, "world_size": world_size, "micro_batch_size": 2}
    return BatchStream(cache.manifest, order, source, start=start, **shape)


def contents(stream: BatchStream, num_batches: int) -> list[tuple]:
    found = []
    for _ in range(num_batches):
        for rows in next(stream):
            found += zip(rows.position.tolist(), rows.latents.sum((1, 2, 3)).tolist(), strict=True)
            assert torch.isfinite(rows.t5.float()).all()
    stream.close()
    return found


@pytest.mark.parametrize("limit_shards", [1.2, 2.5, 100])
def test_a_remote_cache_trains_as_its_folder_does(remote, tmp_path, limit_shards):
    url, server, cache = remote
    expected = contents(open_stream(cache), 20)
    head = fetch_manifest(url, tmp_path / "node")
    copies = copies_of(url, cache, tmp_path, limit=int(limit_shards * cache.table.bytes.max()))
    assert contents(open_stream(replace(cache, folder=head, copies=copies)), 20) == expected
    resumed = open_stream(replace(cache, folder=head, copies=copies), start=13)
    assert contents(resumed, 7) == [row for row in expected if row[0] >= 13 * 4]
    if limit_shards == 100:
        assert all(count == 1 for path, count in server.requests.items() if path.endswith(".tar"))


def test_a_closed_stream_holds_no_copy(remote, tmp_path):
    url, _, cache = remote
    copies = copies_of(url, cache, tmp_path)
    before = set(threading.enumerate())
    stream = open_stream(replace(cache, copies=copies))
    next(next(stream))
    stream.close()
    del stream
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in left if "process_request" not in name], "the server's"
    for path in copies.folder.rglob("*.tar"):
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_ranks_without_rows_fetch_nothing_and_can_be_closed(remote, tmp_path):
    url, _, cache = remote
    streams = [
        open_stream(replace(cache, copies=copies_of(url, cache, tmp_path)), rank=rank, world_size=6)
        for rank in range(6)
    ]
    rows = [sum(int(micro.weight.sum()) for micro in next(stream)) for stream in streams]
    assert sorted(rows) == [0, 0, 1, 1, 1, 1]
    closing = threading.Thread(target=lambda: [stream.close() for stream in streams], daemon=True)
    closing.start()
    closing.join(timeout=PATIENCE)
    assert not closing.is_alive()


def test_what_fails_in_fetching_ahead_stops_no_thread(remote, tmp_path, monkeypatch):
    """A reader that is closed just then ends too."""
    url, _, cache = remote
    expected = contents(open_stream(cache), 8)
    opened = NodeCache.open

    def fail_ahead(self, number, *, stop, may_exceed=True, **options):
        if not may_exceed:
            raise OSError(24, "Too many open files")
        return opened(self, number, stop=stop, may_exceed=may_exceed, **options)

    monkeypatch.setattr(NodeCache, "open", fail_ahead)
    stream = open_stream(replace(cache, copies=copies_of(url, cache, tmp_path)))
    list(next(stream))
    assert all(thread.is_alive() for thread in threading.enumerate() if thread.name == "prefetch")
    stream.close()
    assert contents(open_stream(replace(cache, copies=copies_of(url, cache, tmp_path))), 8) == expected


@pytest.mark.fault(7, "never there in its bucket, and gone for a while")
def test_a_shard_that_stays_away_stops_the_stream_and_is_named(remote, tmp_path, no_waits):
    url, server, cache = remote
    server.faults = {str(path): [503] * 99 for path in cache.table.path}
    stream = open_stream(replace(cache, copies=copies_of(url, cache, tmp_path)))
    with pytest.raises(
        StorageFailed, match=rf"{url}/shards/./.*\.tar: failed 8 time\(s\), at last with HTTPError: .* 503"
    ):
        list(next(stream))
    stream.close()
