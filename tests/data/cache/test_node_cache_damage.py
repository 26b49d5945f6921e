"""Damaged copies of shards on a node (data/cache/node_cache.py)."""

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from data.batches.shard_reader import DamagedSample, DamagedShard, ShardReader
from data.cache.node_cache import NodeCache
from data.cache.shard_index import read_index, write_index
from tests.data.cache.made_copies import copies_of, held
from tests.data.made_caches import index_of


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
    place = index_of(cache.folder / str(cache.table.path[1]))
    index = read_index(place)
    write_index(place, replace(index, latents_xxh3=index.latents_xxh3 ^ np.array([0, 0, 1], np.uint64)))
    reader, out = ShardReader(replace(cache, copies=copies_of(url, cache, tmp_path))), memoryview(bytearray(512))
    for _ in range(3):
        reader.read(1, 1, {"latents": out})
        with pytest.raises(DamagedSample, match="a-1-2"):
            reader.read(1, 2, {"latents": out})
    assert server.requests["shards/a/32x32-000001.tar"] == 2


@pytest.mark.parametrize("damage", ["index", "index and copy", "header"])
def test_a_copy_that_cannot_be_opened_is_fetched_anew(remote, tmp_path, caplog, damage):
    url, _, cache = remote
    copies = copies_of(url, cache, tmp_path)
    whole = (cache.folder / str(cache.table.path[1])).read_bytes()
    held(copies, 1)
    if "index" in damage:
        index_of(copies.path(1)).write_bytes(b"torn")
    if damage == "index and copy":
        index_of(copies.path(1)).unlink()
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
    assert index_of(copies.path(1)).exists()
