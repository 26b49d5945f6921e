"""Prefetching of remote shards in the order's sequence, ahead of the reader, each held until it has passed it."""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.batches.order import Order
from data.cache.node_cache import FileHandle, NodeCache

log = logging.getLogger("fluxfill")

_PARALLEL = 4  # transfers at once, in each process
_HORIZON = 512  # batches that are looked ahead, where everything fits
_MOST_HELD = 256  # shards: each is an open file, of which a process may have 1024 where nobody raised the limit
_LOOK_AGAIN_SECONDS = 5.0


@dataclass
class _Held:
    """A shard that is held, or on its way. last_batch: that needs it, of those looked at so far."""

    size: int
    last_batch: int
    handle: FileHandle | None = None


class Prefetcher:
    """Fetches what one rank's rows of the coming batches need, nearest first, as far as the copies' limit goes.

    part: its rows of a global batch, one at least.  A shard that could not be fetched at the first attempt is left to
    the reader, which tries again and says so: whoever needs it now must not wait for the attempts of those who do not.
    """

    def __init__(self, copies: NodeCache, order: Order, sizes: np.ndarray, *, part: range, start: int) -> None:
        self._copies, self._order, self._sizes, self._part = copies, order, sizes, part
        self._budget = copies.prefetch_bytes
        self._held: dict[int, _Held] = {}
        self._wanted: deque[int] = deque()
        self._current = start
        self._changed = threading.Condition()
        self._stop = threading.Event()
        # Daemons: a process that ends in the middle of a transfer does not wait for it.
        self._threads = [threading.Thread(target=self._walk, args=(start,), name="prefetch-order", daemon=True)]
        self._threads += [threading.Thread(target=self._fetch, name="prefetch", daemon=True) for _ in range(_PARALLEL)]
        for thread in self._threads:
            thread.start()

    def reached(self, batch: int) -> None:
        """Release what only batches before this one needed: the reader is at it."""
        with self._changed:
            self._current = batch
            for shard in [shard for shard, held in self._held.items() if held.last_batch < batch]:
                del self._held[shard]
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching and release everything."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._held.clear()

    def _walk(self, start: int) -> None:
        """Go through the order and put on the list what may be fetched."""
        for batch, shard in self._needed(start):
            size = int(self._sizes[shard])
            with self._changed:
                self._changed.wait_for(partial(self._may_fetch, batch, shard, size))
                if self._stop.is_set():
                    return
                if shard in self._held:
                    self._held[shard].last_batch = batch
                elif batch >= self._current:
                    self._held[shard] = _Held(size, batch)
                    self._wanted.append(shard)
                    self._changed.notify_all()

    def _may_fetch(self, batch: int, shard: int, size: int) -> bool:
        if self._stop.is_set() or batch <= self._current:
            return True
        if batch >= self._current + _HORIZON:
            return False
        if shard in self._held:
            return True
        return len(self._held) < _MOST_HELD and sum(h.size for h in self._held.values()) + size <= self._budget

    def _needed(self, start: int) -> Iterator[tuple[int, int]]:
        """(batch, shard) of everything that this rank will read, endlessly."""
        batch = start
        while True:
            shards = np.unique(self._order.batch(batch, self._part).shards)
            # Not all ranks of a node in the same order: each fetches another one first, and finds the rest there.
            for shard in np.roll(shards, self._part.start):
                yield batch, int(shard)
            batch += 1

    def _fetch(self) -> None:
        """Fetch what is on the list, one after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._stop.is_set())
                if self._stop.is_set():
                    return
                shard = self._wanted.popleft()
                if shard not in self._held:
                    continue  # the reader has passed it
            try:
                handle = self._copies.open(shard, stop=self._stop, may_exceed=False, attempts=1)
            except Exception as error:  # of any driver, or of the folder; the thread goes on with the next
                log.info("not fetched ahead: %s", error)
                continue
            with self._changed:
                if handle is None and shard in self._held and not self._stop.is_set():
                    self._wanted.appendleft(shard)  # no room: others of this node hold it
                    self._changed.wait(_LOOK_AGAIN_SECONDS)
                elif shard in self._held:
                    self._held[shard].handle = handle
            handle = None  # else this thread's own reference would hold the copy while it waits for the next
