"""Rows of the planned shards that are finished in the cache, whoever made them: a job before the run, or beside it."""

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.errors import InputError, StorageFailed
from data.batches.shard_reader import Buffers, ShardReader
from data.cache.manifest import Manifest, ShardTable
from data.cache.open_cache import Cache
from data.preprocessing.shard_queue import read_finished
from data.samples.shard_plan import PlannedShard

log = logging.getLogger("fluxfill")

LOOK_SECONDS = 20.0  # between two looks for a shard that was not there


class FinishedShards:
    """The finished shards of a run's plan; safe to call from many threads.

    A shard is looked for when a row of it is wanted: the order stays within a few shards for long, so a cache of a
    million is not searched through. What is found is known from then on; what is not there is looked for now and then.
    """

    def __init__(self, folder: Path, plans: Sequence[PlannedShard], manifest: Manifest, table: ShardTable) -> None:
        # Filled in as shards are found: before, nothing has their size and hash.
        self._table = replace(
            table,
            bytes=np.zeros(len(table), dtype=np.int64),
            sha256=np.full(len(table), "", dtype=np.dtypes.StringDType()),
        )
        self._folder, self._plans = folder, plans
        self._reader = ShardReader(Cache(folder, manifest, self._table))
        self._looking = threading.Lock()
        self._found: set[int] = set()
        self._look_at: dict[int, float] = {}  # by the monotonic clock, of those that were looked for in vain

    def read(self, shard: int, row: int, out: Buffers, *, variant: int) -> bool:
        """Fill buffers with a row's tensors, as ShardReader does; False if they must be encoded.

        Raises StorageFailed if a shard is there, but cannot be read however often it is tried.
        """
        if not self._is_there(shard):
            return False
        try:
            self._reader.read(shard, row, out, variant=variant)
        except StorageFailed:
            if (self._folder / self._plans[shard].path).exists():
                raise
            self._forget(shard, look_at=time.monotonic() + LOOK_SECONDS)  # deleted by who made another plan
            return False
        except InputError as error:  # the shard or its index is damaged, or is another since it was found
            if self._forget(shard, look_at=math.inf):
                log.warning("%s\nThis run goes on and encodes its samples.", error)
            return False
        return True

    def _is_there(self, shard: int) -> bool:
        if shard in self._found:
            return True
        with self._looking:  # one for all rows of a shard: the others wait for what it finds
            return shard in self._found or self._look(shard)

    def _look(self, shard: int) -> bool:
        now = time.monotonic()
        if now < self._look_at.get(shard, 0.0):
            return False
        self._look_at[shard] = now + LOOK_SECONDS
        try:
            index = read_finished(self._folder, self._plans[shard])
        except OSError as error:  # a server that is away for a moment; the encoders are here
            log.info("%s: not looked at (%s)", self._folder / self._plans[shard].path, error)
            return False
        if index is None:
            return False
        if not self._found:
            log.info("data.mode online: rows of shards that are finished in %s are read, not encoded", self._folder)
        self._table.bytes[shard], self._table.sha256[shard] = index.tar_bytes, index.tar_sha256
        self._found.add(shard)
        return True

    def _forget(self, shard: int, *, look_at: float) -> bool:
        """Whether this thread is the first to do so."""
        with self._looking:
            is_first = shard in self._found
            self._look_at[shard] = look_at
            self._found.discard(shard)
            return is_first

    def stop(self) -> None:
        """End all retries: whoever waits for a storage that fails gets the error at once."""
        self._reader.stop()

    def close(self) -> None:
        """Close all shards."""
        self._reader.close()
