import gc
import threading
import time

import pytest

from configs.errors import InputError
from data.batches.shard_reader import ShardReader
from tests.data.batches.streams import SHARDS, damage, open_stream, open_tars
from tests.patience import PATIENCE


def test_a_micro_batch_is_ready_when_all_who_fill_it_have_ended(make_cache, monkeypatch):
    """Also if one of them fails at once: nothing may write to memory that is thought free."""
    cache = make_cache([("a", "32x32", 6)])
    damage(cache, 1)
    begun, go_on = threading.Event(), threading.Event()
    read = ShardReader.read

    def read_slowly(self, shard, row, out, **options):
        if row != 1:
            begun.set()
            assert go_on.wait(PATIENCE)
        return read(self, shard, row, out, **options)

    monkeypatch.setattr(ShardReader, "read", read_slowly)
    stream = open_stream(cache, size=6, micro=6, threads=2, depth=1)
    stream._begin_ahead()
    ready = stream._ahead[0].ready
    assert begun.wait(PATIENCE)
    with pytest.raises(TimeoutError):
        ready.result(timeout=0.3)
    go_on.set()
    with pytest.raises(InputError, match="1 damaged sample"):
        ready.result(timeout=PATIENCE)
    stream.close()


def test_a_closed_stream_leaves_no_thread_and_no_file(make_cache):
    cache = make_cache(SHARDS)
    before = set(threading.enumerate())
    stream = open_stream(cache, threads=3)
    next(next(stream))
    assert set(threading.enumerate()) - before
    assert open_tars(cache)
    stream.close()
    stream.close()
    assert set(threading.enumerate()) - before == set()
    assert open_tars(cache) == []
    with pytest.raises(RuntimeError):
        next(next(stream))


def test_a_forgotten_stream_leaves_no_file(make_cache):
    cache = make_cache(SHARDS)
    stream = open_stream(cache)
    next(next(stream))
    assert open_tars(cache)
    del stream
    deadline = time.monotonic() + PATIENCE
    while open_tars(cache) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert open_tars(cache) == []
