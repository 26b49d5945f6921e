import fcntl
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import data.cache.node_cache
from configs.errors import InputError, StorageFailed
from data.batches.batch_stream import BatchStream
from data.batches.cached_rows import CachedRows
from data.batches.order import Order, OrderSettings
from data.batches.shard_reader import DamagedSample, DamagedShard, ShardReader
from data.cache.node_cache import NodeCache
from data.cache.open_cache import Cache
from data.cache.remote_manifest import fetch_manifest
from data.cache.shard_index import read_index, write_index
from data.cache_layout import index_path

GIB = 1 << 30


def copies_of(url, cache, tmp_path, *, limit=GIB):
    return NodeCache(url, tmp_path / "node", limit, cache.table)


def held(copies, number, **options):
    return copies.open(number, stop=threading.Event(), **options)


# --- one shard --------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_shard_and_is_fetched_once(remote, tmp_path):
    url, server, cache = remote
    copies = copies_of(url, cache, tmp_path)
    for _ in range(3):
        handle = held(copies, 1)
        tar = cache.folder / str(cache.table.path[1])
        assert os.pread(handle, tar.stat().st_size + 1, 0) == tar.read_bytes()
    assert index_path(copies.path(1)).read_bytes() == index_path(tar).read_bytes()
    assert server.requests == {"shards/a/32x32-000001.tar": 1, "shards/a/32x32-000001.index": 1}
    assert not list(copies.folder.rglob("*.part"))


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
            index_path(cache.folder / str(cache.table.path[0])), index_path(cache.folder / str(cache.table.path[1]))
        )
    else:
        server.faults["shards/a/32x32-000001.index"] = [fault]
    opened = ShardReader(replace(cache, copies=copies_of(url, cache, tmp_path))).shard(1)
    assert opened.index.keys == ("a-1-0", "a-1-1", "a-1-2")


def test_a_reader_that_is_closed_waits_for_nothing(remote, tmp_path):
    url, server, cache = remote
    server.faults["shards/a/32x32-000001.tar"] = [503] * 99
    copies, stop = copies_of(url, cache, tmp_path), threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(InputError, match=r"32x32-000001\.tar: (failed|not fetched)"):
        copies.open(1, stop=stop)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_copy_that_was_damaged_on_this_node_is_fetched_anew(remote, tmp_path, caplog, damage):
    url, server, cache = remote
    copies = copies_of(url, cache, tmp_path)
    whole = (cache.folder / str(cache.table.path[1])).read_bytes()
    held(copies, 1)
    if damage == "bit":
        place = int(ShardReader(cache).shard(1).index.latents[2].sum()) - 9
        copies.path(1).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        os.truncate(copies.path(1), 0 if damage == "empty" else len(whole) // 2)
    reader, out = ShardReader(replace(cache, copies=copies)), memoryview(bytearray(16 * 4 * 4 * 2))
    for row in (0, 2, 1, 2):
        reader.read(1, row, {"latents": out})
    assert copies.path(1).read_bytes() == whole
    assert server.requests["shards/a/32x32-000001.tar"] == 2
    assert ("damaged, fetched again" in caplog.text) == (damage == "bit")


def test_a_shard_that_is_damaged_at_its_source_too_is_fetched_anew_once(remote, tmp_path):
    url, server, cache = remote
    place = index_path(cache.folder / str(cache.table.path[1]))
    index = read_index(place)
    write_index(place, replace(index, latents_xxh3=index.latents_xxh3 ^ np.array([0, 0, 1], np.uint64)))
    reader, out = ShardReader(replace(cache, copies=copies_of(url, cache, tmp_path))), memoryview(bytearray(512))
    for _ in range(3):
        reader.read(1, 1, {"latents": out})
        with pytest.raises(DamagedSample, match="a-1-2"):
            reader.read(1, 2, {"latents": out})
    assert server.requests["shards/a/32x32-000001.tar"] == 2


# --- several at once --------------------------------------------------------------------------------------------------


def _open_and_tell(copies, number, connection):
    handle = copies.open(number, stop=threading.Event())
    connection.send(os.fstat(handle).st_size)
    connection.recv()


def start_process(target, *arguments):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    return process, here


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
    sizes += [connection.recv() for _, connection in others]
    for process, connection in others:
        connection.send("done")
        process.join()
    assert sizes == [cache.table.bytes[1]] * 6
    assert server.requests["shards/a/32x32-000001.tar"] == 1


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
    waiting.join(timeout=20)
    assert os.fstat(found[0]).st_size == cache.table.bytes[1]
    assert not part.exists()


def test_an_error_that_holds_itself_holds_no_copy(remote, tmp_path, no_waits, monkeypatch):
    """As those of fsspec's drivers do, until Python's collector comes by: nobody waits for it."""
    url, _, cache = remote
    fetch = data.cache.node_cache.open_url
    failures = []

    def fail_once(url):
        if not failures:
            error = ConnectionResetError("reset")
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
        opening.join(timeout=10)
        assert found, "the copy is still locked by whoever fetched it"
    finally:
        gc.enable()


@pytest.mark.parametrize("damage", ["index", "index and copy", "header"])
def test_a_copy_that_cannot_be_opened_is_fetched_anew(remote, tmp_path, caplog, damage):
    url, _, cache = remote
    copies = copies_of(url, cache, tmp_path)
    whole = (cache.folder / str(cache.table.path[1])).read_bytes()
    held(copies, 1)
    if "index" in damage:
        index_path(copies.path(1)).write_bytes(b"torn")
    if damage == "index and copy":
        index_path(copies.path(1)).unlink()
        copies.path(1).write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    if damage == "header":
        data = bytearray(whole)
        for offset, _ in ShardReader(cache).shard(1).index.latents.tolist():
            data[offset] ^= 0xFF
        copies.path(1).write_bytes(data)
    reader, out = ShardReader(replace(cache, copies=copies)), memoryview(bytearray(16 * 4 * 4 * 2))
    for row in range(3):
        reader.read(1, row, {"latents": out})
    assert copies.path(1).read_bytes() == whole
    assert f"{url}/shards/a/32x32-000001.tar" in caplog.text and "fetched again" in caplog.text


def test_a_shard_that_cannot_be_opened_wherever_it_comes_from_names_its_url(remote, tmp_path):
    url, server, cache = remote
    table = replace(cache.table, bucket=np.where(np.arange(4) == 1, "48x48", cache.table.bucket))
    reader = ShardReader(replace(cache, table=table, copies=copies_of(url, cache, tmp_path)))
    with pytest.raises(DamagedShard, match=rf"{url}/shards/a/32x32-000001\.tar \(its copy .*: first latents member"):
        reader.shard(1)
    assert server.requests["shards/a/32x32-000001.tar"] == 2


def test_threads_that_find_the_same_damage_read_the_same_new_copy(remote, tmp_path, monkeypatch):
    """However they come: none may open the damaged copy once more and take its row for lost."""
    url, server, cache = remote
    copies = copies_of(url, cache, tmp_path)
    whole = (cache.folder / str(cache.table.path[1])).read_bytes()
    held(copies, 1)
    places = ShardReader(cache).shard(1).index.latents.sum(axis=1) - 9
    data = bytearray(whole)
    for place in places.tolist():
        data[place] ^= 1
    copies.path(1).write_bytes(data)
    reader = ShardReader(replace(cache, copies=copies))
    reader.shard(1)
    discard = NodeCache.discard

    def discard_slowly(self, number, handle):
        time.sleep(0.3)
        discard(self, number, handle)

    monkeypatch.setattr(NodeCache, "discard", discard_slowly)
    problems = []

    def read(row):
        time.sleep(0.1 * row)
        try:
            reader.read(1, row, {"latents": memoryview(bytearray(16 * 4 * 4 * 2))})
        except DamagedSample as error:
            problems.append(str(error))

    threads = [threading.Thread(target=read, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert server.requests["shards/a/32x32-000001.tar"] == 2


def test_a_thread_that_sees_the_damage_while_another_fetches_the_shard_looks_again(remote, tmp_path):
    url, _, cache = remote
    reader = ShardReader(replace(cache, copies=copies_of(url, cache, tmp_path)))
    damaged = reader.shard(1)  # two threads have read from it
    assert reader._copy_is_replaced(1, damaged)
    assert reader._copy_is_replaced(1, damaged), "it would take its row for lost"
    new = reader.shard(1)
    assert reader._copy_is_replaced(1, damaged)
    assert not reader._copy_is_replaced(1, new), "damaged where it comes from: not fetched for every row"


def test_what_another_process_fetched_in_the_place_of_a_damaged_copy_stays(remote, tmp_path):
    url, _, cache = remote
    copies = copies_of(url, cache, tmp_path)
    old = held(copies, 1)
    copies.discard(1, old)
    new = held(copies, 1)
    copies.discard(1, old)
    assert os.fstat(new).st_nlink == 1
    assert index_path(copies.path(1)).exists()


def test_a_copy_that_came_while_its_lock_was_waited_for_is_not_fetched_again(remote, tmp_path):
    url, server, cache = remote
    copies = copies_of(url, cache, tmp_path)
    held(copies, 1)
    assert copies._fetch(1, threading.Event(), may_exceed=True, attempts=1)  # of one who looked before it came
    assert server.requests["shards/a/32x32-000001.tar"] == 1
    assert not list(copies.folder.rglob("*.part"))
    assert copies.path(1).exists() and index_path(copies.path(1)).exists()


def test_a_full_disk_is_named(remote, tmp_path, monkeypatch):
    url, _, cache = remote

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(InputError, match=r"data.local_cache .*node: No space left on device\. Free room there, or"):
        held(copies_of(url, cache, tmp_path), 1)
    assert not list((tmp_path / "node").rglob("*.part"))


# --- room -------------------------------------------------------------------------------------------------------------


def test_the_copies_unused_for_the_longest_time_make_room(remote, tmp_path):
    url, _, cache = remote
    sizes = cache.table.bytes
    copies = copies_of(url, cache, tmp_path, limit=int(sizes[0] + sizes[1] + sizes[2]))
    for number in (0, 1, 2):
        held(copies, number)
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
    connection.recv()
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
    assert [connection.recv() for _, connection in others] == ["whole"] * 4
    for process, _ in others:
        process.join()


# --- streams ----------------------------------------------------------------------------------------------------------


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
    before = threading.active_count()
    stream = open_stream(replace(cache, copies=copies))
    next(next(stream))
    stream.close()
    del stream
    server_threads = [thread for thread in threading.enumerate() if "process_request" in thread.name]
    assert threading.active_count() - len(server_threads) <= before
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
    closing.join(timeout=20)
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


def test_a_shard_that_stays_away_stops_the_stream_and_is_named(remote, tmp_path, no_waits):
    url, server, cache = remote
    server.faults = {str(path): [503] * 99 for path in cache.table.path}
    stream = open_stream(replace(cache, copies=copies_of(url, cache, tmp_path)))
    with pytest.raises(
        StorageFailed, match=rf"{url}/shards/./.*\.tar: failed 8 time\(s\), at last with HTTPError: .* 503"
    ):
        list(next(stream))
    stream.close()
