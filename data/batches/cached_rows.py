"""Rows of a cache, read from its shards by threads.

A row's bytes go from the shard straight to their place in the batch (`shard_reader.py`); none pass between processes.
Beside the stored tensors a row gets its random draws (`noise.py`), made here in the threads.
"""

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from data.batches.batch_memory import BatchViews, BufferLease
from data.batches.order import Batch, Order
from data.batches.prefetch import Prefetcher
from data.batches.row_filler import ReplacedRow, RowFiller, RowPolicy
from data.batches.row_source import PlannedMicroBatch, PlannedRow
from data.batches.shard_reader import ShardReader
from data.cache.dropout_tensors import read_empty_caption, read_full_mask
from data.cache.open_cache import Cache
from data.samples.geometry import Bucket


class _Filling:
    """A micro-batch in the making, by `shares` tasks.

    ready: done when all of them are. The last one says so, once: whoever waits is not woken for each of them.
    """

    def __init__(self, planned: PlannedMicroBatch, memory: BufferLease, shares: int) -> None:
        self.planned, self.memory, self.shares = planned, memory, shares
        self.ready: Future[None] = Future()
        self._error: BaseException | None = None
        self._left = shares
        self._lock = threading.Lock()

    def one_is_done(self, error: BaseException | None) -> None:
        """One of the tasks has ended; with an error, if it has not filled its places."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            is_last = self._left == 0
        if is_last and self._error is not None:
            self.ready.set_exception(self._error)
        elif is_last:
            self.ready.set_result(None)


class CachedRows:
    """A cache as a RowSource.

    policy: how a sample's stored parts are put together.  replaced: rows that earlier processes of the run replaced.
    threads: that read.
    """

    def __init__(
        self,
        cache: Cache,
        order: Order,
        *,
        policy: RowPolicy = RowPolicy(),  # noqa: B008  frozen
        replaced: Iterable[ReplacedRow] = (),
        threads: int = 2,
    ) -> None:
        self._reader = ShardReader(cache)
        buckets = [Bucket.parse(name) for name in order.buckets] if policy.mask_dropout else []
        self._filler = RowFiller(
            order.settings.seed,
            policy,
            empty_caption=read_empty_caption(cache) if policy.caption_dropout else {},
            full_masks={bucket: read_full_mask(cache, bucket) for bucket in buckets},
            replaced=replaced,
        )
        self._cache, self._order, self._threads = cache, order, threads
        self._prefetcher: Prefetcher | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")

    @property
    def replaced(self) -> set[ReplacedRow]:
        return self._filler.replaced

    def least_depth(self, width: int) -> int:
        return 1

    def key(self, shard: int, row: int) -> str:
        """A sample's name. Opens its shard."""
        return self._reader.key(shard, row)

    def reached(self, batch: Batch) -> None:
        """Has the shards of a remote cache fetched from there on."""
        if self._prefetcher is not None:
            self._prefetcher.reached(batch.index)
        elif (copies := self._cache.copies) is not None and batch.part:  # of more ranks than rows, some have none
            sizes = self._cache.table.bytes
            self._prefetcher = Prefetcher(copies, self._order, sizes, part=batch.part, start=batch.index)

    def fill(self, planned: PlannedMicroBatch, memory: BufferLease) -> Future[None]:
        # A share of the rows for each thread rather than a task for each row: handing one over costs as much as reading
        # a small one.
        shares = min(self._threads, planned.width)
        filling = _Filling(planned, memory, shares)
        for first in range(shares):
            self._pool.submit(self._fill_share, filling, first)
        return filling.ready

    def _fill_share(self, filling: _Filling, first: int) -> None:
        """Fill every so many-th place from `first` on."""
        try:
            self._fill_places(filling, first)
        except BaseException as error:
            filling.one_is_done(error)
        else:
            filling.one_is_done(None)

    def _fill_places(self, filling: _Filling, first: int) -> None:
        planned, rows = filling.planned, filling.memory.rows()
        for place in range(first, planned.width, filling.shares):
            wanted = planned.at(place)
            if wanted is None:
                rows.pad(place)
            else:
                self._fill_row(rows, place, wanted)

    def _fill_row(self, rows: BatchViews, place: int, wanted: PlannedRow) -> None:
        reader, filler, shard, position = self._reader, self._filler, wanted.shard, wanted.position
        out = filler.begin(rows, place, position)
        variant = filler.choose_variant(
            reader.num_variants(shard), row=wanted.row, stream_epoch=wanted.stream_epoch, position=position
        )
        filler.first_intact(
            lambda row: reader.read(shard, row, out, variant=variant),
            shard=str(reader.table.path[shard]),
            num_samples=reader.num_samples(shard),
            row=wanted.row,
            position=position,
        )

    def close(self) -> None:
        self._reader.stop()  # whoever waits for a storage that fails
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
