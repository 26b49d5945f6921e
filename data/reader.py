"""Shards -> micro-batches, read ahead by threads.

A row's bytes go from the shard straight to their place in the batch (`data/shard_reader.py`); none pass between
processes. Beside the stored tensors a row gets what is random about it (`data/noise.py`), drawn here in the threads.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch

from data.blanks import read_blank, read_empty_text
from data.cache import Cache
from data.geometry import Bucket
from data.manifest import parse_bucket
from data.micro_batch import MicroBatch, Rows, Slot, row_fields
from data.order import Batch, Order, num_micro_steps, rank_rows
from data.prefetch import Prefetcher
from data.row_filler import ReplacedRow, RowFiller, RowPolicy
from data.shard_reader import ShardReader


@dataclass(frozen=True)
class _Planned:
    """One micro-batch to come. rows: of the global batch.  width: rows per forward; those that are missing fill up."""

    batch: Batch
    is_last: bool
    rows: range
    bucket: Bucket
    width: int


@dataclass(frozen=True)
class _Ahead:
    """A micro-batch that is being read."""

    planned: _Planned
    slot: Slot
    rows: Rows
    work: list[Future]


class BatchStream:
    """This rank's share of the global batches, in order, read ahead.

    `next(stream)` gives an iterator over the micro-batches of the next global batch: as many on every rank, rows that
    only fill up have weight 0. A micro-batch's memory is used again after the next one has been asked for; with
    `pin_memory` after the CUDA work queued by then has run, so copy it to the device and forget it. An iterator that is
    not read to its end has ended once the next global batch is asked for.

    What a thread could not read is raised where its micro-batch would have come, and again at every later try: the
    stream does not pass over it.

    current: the global batch last asked for, this rank's rows of it.  batch_start: when, by the monotonic clock.
    wait_seconds: how long its user waited for it.

    micro_batch_size: rows per forward of the largest bucket; smaller buckets get more, at the same number of tokens.
    policy: how a sample's stored parts are put together.  replaced: rows that earlier processes of the run replaced.
    start: the first global batch.  threads: that read.  depth: micro-batches read ahead of the one in use.
    """

    def __init__(
        self,
        cache: Cache,
        order: Order,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        policy: RowPolicy = RowPolicy(),  # noqa: B008  frozen
        replaced: Iterable[ReplacedRow] = (),
        start: int = 0,
        threads: int = 2,
        depth: int = 3,
        pin_memory: bool = False,
    ) -> None:
        self.reader = ShardReader(cache)
        self.order = order
        self.next_batch = start
        self.batch_start, self.wait_seconds = time.monotonic(), 0.0
        self._mine = rank_rows(order.settings.global_batch_size, rank=rank, world_size=world_size)
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        self._buckets = {name: parse_bucket(name) for name in order.buckets}
        self._largest = max(bucket.tokens for bucket in self._buckets.values())
        self._fields = {bucket: row_fields(bucket, cache.manifest) for bucket in self._buckets.values()}
        self._most_rows = -(-order.settings.global_batch_size // world_size)
        self._filler = RowFiller(
            self.reader,
            order.settings.seed,
            policy,
            empty_text=read_empty_text(cache) if policy.caption_dropout else {},
            blanks={bucket: read_blank(cache, bucket) for bucket in self._fields} if policy.mask_dropout else {},
            replaced=replaced,
        )
        self._depth, self._threads = depth, threads
        self._pool = ThreadPoolExecutor(
            threads,
            thread_name_prefix="reader",
            # A thread that waits for a CUDA event would else make itself at home on the first GPU.
            initializer=partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None,
        )
        slot_bytes = max(
            sum(field.slot_bytes(min(self.micro_batch_size(bucket), self._most_rows)) for field in fields)
            for bucket, fields in self._fields.items()
        )
        self._free = [Slot(slot_bytes, pin_memory) for _ in range(depth + 1)]
        self._lent: Slot | None = None
        self._planned = self._plan(start)
        self._ahead: deque[_Ahead] = deque()
        self._prefetcher = None
        if cache.copies is not None:
            self._prefetcher = Prefetcher(cache.copies, order, cache.table.bytes, part=self._mine, start=start)

    def micro_batch_size(self, bucket: Bucket) -> int:
        """Rows per forward of a bucket: about as many tokens as the largest bucket's."""
        return max(self._micro_batch_size, self._micro_batch_size * self._largest // bucket.tokens)

    def num_micro_steps(self, bucket: Bucket) -> int:
        """Forward passes per update when a global batch is of this bucket."""
        size = self.order.settings.global_batch_size
        return num_micro_steps(size, world_size=self._world_size, micro_batch_size=self.micro_batch_size(bucket))

    def _plan(self, start: int) -> Iterator[_Planned]:
        """Every micro-batch from a global batch on, endlessly."""
        mine, index = self._mine, start
        while True:
            batch = self.order.batch(index, mine)
            bucket = self._buckets[batch.pool[1]]
            width = min(self.micro_batch_size(bucket), self._most_rows)
            num_steps = self.num_micro_steps(bucket)
            for step in range(num_steps):
                rows = mine[step * width : (step + 1) * width]
                yield _Planned(batch, step == num_steps - 1, rows, bucket, min(width, self._most_rows - step * width))
            index += 1

    def _read_ahead(self) -> None:
        while len(self._ahead) < self._depth:
            planned = next(self._planned)
            slot = self._free.pop()
            rows = slot.lay_out(planned.bucket, self._fields[planned.bucket], planned.width)
            # A share of the rows for each thread rather than a task for each row: handing one over costs as much as
            # reading a small one.
            shares = min(self._threads, planned.width)
            work = [self._pool.submit(self._fill, planned, slot, rows, first, shares) for first in range(shares)]
            self._ahead.append(_Ahead(planned, slot, rows, work))

    def _fill(self, planned: _Planned, slot: Slot, rows: Rows, first: int, step: int) -> None:
        """Fill every `step`-th place of a micro-batch from `first` on: read the row, draw what is random about it."""
        slot.wait_until_free()
        batch, mine = planned.batch, planned.rows
        for place in range(first, planned.width, step):
            if place < len(mine):
                at = mine[place] - batch.part.start
                self._filler.fill(
                    rows,
                    place,
                    shard=int(batch.shards[at]),
                    row=int(batch.rows[at]),
                    turn=int(batch.rounds[at]),
                    position=batch.position + mine[place],
                )
            else:
                rows.clear(place)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Iterator[MicroBatch]:
        self.current = self.order.batch(self.next_batch, self._mine)
        self.batch_start, self.wait_seconds = time.monotonic(), 0.0
        if self._prefetcher is not None:
            self._prefetcher.reached(self.next_batch)
        self.next_batch += 1
        return self._micro_batches(self.next_batch - 1)

    def _micro_batches(self, index: int) -> Iterator[MicroBatch]:
        while index == self.next_batch - 1:  # no later batch has been asked for
            if self._lent is not None:
                self._lent.give_back()
                self._free.append(self._lent)
                self._lent = None
            self._read_ahead()
            ahead = self._ahead[0]
            if ahead.planned.batch.index > index:
                return
            wait_start = time.monotonic()
            for future in ahead.work:
                future.result()
            self.wait_seconds += time.monotonic() - wait_start
            self._ahead.popleft()
            self._lent = ahead.slot
            self._read_ahead()  # while its user computes
            if ahead.planned.batch.index == index:  # else left over from a batch that was not read to its end
                yield replace(ahead.rows.batch, is_last=ahead.planned.is_last)

    def replaced(self) -> list[ReplacedRow]:
        """The damaged rows up to the global batch last asked for that were replaced, in order: those of this rank, and
        those that were given."""
        end = self.next_batch * self.order.settings.global_batch_size
        return sorted(row for row in list(self._filler.replaced) if row.position < end)

    def keys(self, batch: Batch) -> list[str]:
        """Names of all of a global batch's samples, in order. Opens every shard that it touches."""
        whole = self.order.batch(batch.index)
        return [self.reader.key(int(s), int(r)) for s, r in zip(whole.shards, whole.rows, strict=True)]

    def close(self) -> None:
        """Stop reading ahead and let go of the shards. The stream cannot be used after it."""
        self.reader.stop()  # whoever waits for a storage that fails
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self.reader.close()
