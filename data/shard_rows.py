"""Rows that were encoded before: read from the shards of a cache, by threads.

A row's bytes go from the shard straight to their place in the batch (`data/shard_reader.py`); none pass between
processes. Beside the stored tensors a row gets what is random about it (`data/noise.py`), drawn here in the threads.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from data.blanks import read_blank, read_empty_text
from data.cache import Cache
from data.manifest import parse_bucket
from data.micro_batch import Rows, Slot
from data.order import Batch, Order
from data.prefetch import Prefetcher
from data.row_filler import ReplacedRow, RowFiller, RowPolicy
from data.row_source import PlannedMicroBatch, PlannedRow
from data.shard_reader import ShardReader


class ShardRows:
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
        buckets = [parse_bucket(name) for name in order.buckets] if policy.mask_dropout else []
        self._filler = RowFiller(
            order.settings.seed,
            policy,
            empty_text=read_empty_text(cache) if policy.caption_dropout else {},
            blanks={bucket: read_blank(cache, bucket) for bucket in buckets},
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
        elif (copies := self._cache.copies) is not None:
            sizes = self._cache.table.bytes
            self._prefetcher = Prefetcher(copies, self._order, sizes, part=batch.part, start=batch.index)

    def fill(self, planned: PlannedMicroBatch, slot: Slot, rows: Rows) -> list[Future[None]]:
        # A share of the rows for each thread rather than a task for each row: handing one over costs as much as reading
        # a small one.
        shares = min(self._threads, planned.width)
        return [self._pool.submit(self._fill_share, planned, slot, rows, first, shares) for first in range(shares)]

    def _fill_share(self, planned: PlannedMicroBatch, slot: Slot, rows: Rows, first: int, step: int) -> None:
        """Fill every `step`-th place from `first` on."""
        slot.wait_until_free()
        for place in range(first, planned.width, step):
            wanted = planned.at(place)
            if wanted is None:
                rows.clear(place)
            else:
                self._fill_row(rows, place, wanted)

    def _fill_row(self, rows: Rows, place: int, wanted: PlannedRow) -> None:
        reader, filler, shard, position = self._reader, self._filler, wanted.shard, wanted.position
        out = filler.begin(rows, place, position)
        variant = filler.choose_variant(reader.num_variants(shard), row=wanted.row, turn=wanted.turn, position=position)
        filler.first_whole(
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
