import threading
import time

from data.batches.order import Order, OrderSettings
from data.batches.prefetch import Prefetcher
from data.cache.node_cache import NodeCache
from data.storage.file_locks import try_lock
from tests.data.storage.remote_server import Remote
from tests.patience import PATIENCE


def test_shards_are_fetched_before_they_are_read_and_held_until_then(make_cache, serve, tmp_path):
    """Blocks of one shard, one after the other: while the first is read, the second comes, but not the tenth."""
    cache = make_cache([("a", "32x32", 8)] * 12)
    server = Remote(cache.folder)
    size = int(cache.table.bytes[0])
    copies = NodeCache(serve(server.get), tmp_path / "node", 5 * size + 9, cache.table)
    settings = OrderSettings.current(seed=3, global_batch_size=4, weights={"a": 1.0}, shards="", block_shards=1)
    order = Order(cache.table.dataset, cache.table.bucket, cache.table.samples, settings)
    turns = [int(order.batch(2 * number).shards[0]) for number in range(12)]
    prefetcher = Prefetcher(copies, order, cache.table.bytes, part=range(4), start=0)

    def wait_for(look, numbers):
        deadline = time.monotonic() + PATIENCE
        while not all(look(number) for number in numbers):
            assert time.monotonic() < deadline, f"{numbers} did not come"
            time.sleep(0.01)

    def is_held(number):
        with copies.path(number).open() as file:
            return not try_lock(file)

    for at in range(0, 10):
        prefetcher.reached(2 * at)
        wait_for(lambda number: copies.path(number).exists(), turns[at : at + 3])
        wait_for(is_held, turns[at : at + 2])  # between a copy's name and its reader's lock is a moment
        assert all(not copies.path(number).exists() for number in turns[at + 4 :]), "too far ahead"
    prefetcher.close()
    assert sum(count for path, count in server.requests.items() if path.endswith(".tar")) == 12


def test_what_found_no_room_is_fetched_when_there_is_some(make_cache, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("data.batches.prefetch._LOOK_AGAIN_SECONDS", 0.05)
    cache = make_cache([("a", "32x32", 8)] * 4)
    copies = NodeCache(
        serve(Remote(cache.folder).get), tmp_path / "node", int(cache.table.bytes[:2].sum()) + 9, cache.table
    )
    settings = OrderSettings.current(seed=3, global_batch_size=4, weights={"a": 1.0}, shards="", block_shards=1)
    order = Order(cache.table.dataset, cache.table.bucket, cache.table.samples, settings)
    first, *others = dict.fromkeys(int(order.batch(number).shards[0]) for number in range(8))
    held = [copies.open(other, stop=threading.Event()) for other in others[:2]]  # by other processes of the node
    prefetcher = Prefetcher(copies, order, cache.table.bytes, part=range(4), start=0)
    time.sleep(0.3)
    assert not copies.path(first).exists()
    held.clear()
    deadline = time.monotonic() + PATIENCE
    while not copies.path(first).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert copies.path(first).exists()
    prefetcher.close()
