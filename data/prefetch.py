"""Fetching the shards that the order comes to, ahead of the reader, and holding them until it has passed them."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.order import Order
from data.shard_copies import FileHandle, ShardCopies

_PARALLEL = 4  # transfers at once, in each process
_HORIZON = 512  # batches that are looked ahead, where everything fits


@dataclass
class _Held:
    """A shard that is held, or on its way. last_batch: that needs it, of those looked at so far."""

    size: int
    last_batch: int
    handle: "Future[FileHandle | None]"


class Prefetcher:
    """Fetches what one rank's rows of the coming batches need, nearest first, as far as the copies' limit goes.

    A shard that could not be fetched is left to the reader, which tries again and says so.
    """

    def __init__(self, copies: ShardCopies, order: Order, sizes: np.ndarray, *, part: range, start: int) -> None:
        self._copies, self._order, self._sizes, self._part = copies, order, sizes, part
        self._budget = copies.prefetch_bytes
        self._held: dict[int, _Held] = {}
        self._current = start
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="prefetch")
        self._walker = threading.Thread(target=self._walk, args=(start,), name="prefetch-order", daemon=True)
        self._walker.start()

    def reached(self, batch: int) -> None:
        """The reader is at a batch: let go of what only earlier ones needed."""
        with self._changed:
            self._current = batch
            for shard in [shard for shard, held in self._held.items() if held.last_batch < batch]:
                self._held.pop(shard).handle.cancel()
            self._changed.notify()

    def close(self) -> None:
        """Stop fetching and let go of everything."""
        with self._changed:
            self._stop.set()
            self._changed.notify()
        self._walker.join()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.clear()

    def _walk(self, start: int) -> None:
        for batch, shard in self._needed(start):
            size = int(self._sizes[shard])
            with self._changed:
                self._changed.wait_for(partial(self._may_fetch, batch, size))
                if self._stop.is_set():
                    return
                if held := self._held.get(shard):
                    held.last_batch = batch
                elif batch >= self._current:
                    handle = self._pool.submit(self._copies.open, shard, stop=self._stop, may_exceed=False)
                    self._held[shard] = _Held(size, batch, handle)

    def _may_fetch(self, batch: int, size: int) -> bool:
        if self._stop.is_set() or batch <= self._current:
            return True
        used = sum(held.size for held in self._held.values())
        return batch < self._current + _HORIZON and used + size <= self._budget

    def _needed(self, start: int) -> Iterator[tuple[int, int]]:
        """(batch, shard) of everything that this rank will read, endlessly."""
        batch = start
        while True:
            shards = np.unique(self._order.batch(batch, self._part).shards)
            # Not all ranks of a node in the same order: each fetches another one first, and finds the rest there.
            for shard in np.roll(shards, self._part.start):
                yield batch, int(shard)
            batch += 1
