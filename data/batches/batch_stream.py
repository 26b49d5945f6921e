"""The order of the samples -> micro-batches, begun ahead of their use.

Where a row's tensors come from is the RowSource's matter: shards (`data/batches/cached_rows.py`) or encoders
(`data/online/encoded_rows.py`).
"""

import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from data.batches.batch_memory import BatchBuffer, BufferLease, buffer_bytes
from data.batches.micro_batch import MicroBatch, row_fields
from data.batches.order import Batch, Order, num_micro_steps, rank_rows
from data.batches.row_filler import ReplacedRow
from data.batches.row_source import PlannedMicroBatch, RowSource
from data.cache.manifest import Manifest
from data.samples.geometry import Bucket


@dataclass(frozen=True)
class _Ahead:
    """A micro-batch in the making."""

    planned: PlannedMicroBatch
    memory: BufferLease
    ready: Future[None]


class BatchStream:
    """This rank's rows of the global batches, in order, begun ahead.

    `next(stream)` gives an iterator over the micro-batches of the next global batch: as many on every rank, padding
    rows have weight 0. A micro-batch's memory is used again after the next one has been asked for; with
    `pin_memory` after the CUDA work queued by then has run, so copy it to the device and forget it. An iterator that is
    not read to its end has ended once the next global batch is asked for.

    An error of the source is raised in the place of its micro-batch, and again at every later try: the stream does not
    pass over it.

    current: the global batch last asked for, this rank's rows of it.  batch_start: when, by the monotonic clock.
    wait_seconds: how long its user waited for it.

    micro_batch_size: rows per forward of the largest bucket; smaller buckets get more, at the same number of tokens.
    start: the first global batch.  excluded: those that are passed over; the others keep their positions, so their
    noise too.  depth: micro-batches begun ahead of the one in use, or more if the source asks.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        source: RowSource,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        start: int = 0,
        excluded: Collection[int] = (),
        depth: int = 3,
        pin_memory: bool = False,
    ) -> None:
        self.order = order
        self.batch_start, self.wait_seconds = time.monotonic(), 0.0
        self._mine = rank_rows(order.settings.global_batch_size, rank=rank, world_size=world_size)
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        self._buckets = {name: Bucket.parse(name) for name in order.buckets}
        self._largest = max(bucket.tokens for bucket in self._buckets.values())
        self._fields = {bucket: row_fields(bucket, manifest) for bucket in self._buckets.values()}
        self._most_rows = -(-order.settings.global_batch_size // world_size)
        self._depth = max(depth, source.least_depth(min(micro_batch_size, self._most_rows)))
        num_bytes = max(
            buffer_bytes(fields, min(self.micro_batch_size(bucket), self._most_rows))
            for bucket, fields in self._fields.items()
        )
        self._buffers = [BatchBuffer(num_bytes, pin_memory) for _ in range(self._depth + 1)]
        self._lent: BufferLease | None = None
        # A batch is asked for twice: when the first of it is begun ahead, and when its user comes to it.
        self._batch = lru_cache(maxsize=self._depth + 2)(partial(order.batch, part=self._mine))
        self._start_at(source, start, excluded)

    def _start_at(self, source: RowSource, start: int, excluded: Collection[int]) -> None:
        self._source, self._excluded = source, frozenset(excluded)
        self.next_batch = self._first_from(start)
        self._free = list(self._buffers)
        self._planned = self._plan(self.next_batch)
        self._ahead: deque[_Ahead] = deque()
        source.reached(self._batch(self.next_batch))

    def restart(self, source: RowSource, start: int, excluded: Collection[int]) -> None:
        """Go on from another global batch, with a source of its own. The one before is closed."""
        self.close()
        if self._lent is not None:
            self._lent.give_back()  # what was queued may still read from it; nobody reads from what was begun ahead
            self._lent = None
        self._start_at(source, start, excluded)

    def _first_from(self, batch: int) -> int:
        """The first global batch from one on that is not passed over."""
        while batch in self._excluded:
            batch += 1
        return batch

    @property
    def rows_per_forward(self) -> int:
        """Of the largest bucket, on this rank."""
        return min(self._micro_batch_size, self._most_rows)

    def example(self) -> MicroBatch:
        """A micro-batch of the largest bucket, as large as they come, of zeros, noise and weight 0; of no order."""
        bucket = max(self._fields, key=lambda bucket: bucket.tokens)
        shape = {field.name: ((self.rows_per_forward, *field.shape), field.dtype) for field in self._fields[bucket]}
        tensors: dict[str, Any] = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in shape.items()}
        tensors["noise"].normal_(generator=torch.Generator().manual_seed(0))
        tensors["uniform"].fill_(0.5)
        return MicroBatch(bucket, is_last=True, **tensors)

    def micro_batch_size(self, bucket: Bucket) -> int:
        """Rows per forward of a bucket: about as many tokens as the largest bucket's."""
        return max(self._micro_batch_size, self._micro_batch_size * self._largest // bucket.tokens)

    def num_micro_steps(self, bucket: Bucket) -> int:
        """Forward passes per update when a global batch is of this bucket."""
        size = self.order.settings.global_batch_size
        return num_micro_steps(size, world_size=self._world_size, micro_batch_size=self.micro_batch_size(bucket))

    def _plan(self, start: int) -> Iterator[PlannedMicroBatch]:
        """Every micro-batch from a global batch on, endlessly."""
        mine, index = self._mine, start
        while True:
            batch = self._batch(index)
            bucket = self._buckets[batch.pool[1]]
            width = min(self.micro_batch_size(bucket), self._most_rows)
            num_steps = self.num_micro_steps(bucket)
            for step in range(num_steps):
                rows = mine[step * width : (step + 1) * width]
                rest = self._most_rows - step * width
                yield PlannedMicroBatch(batch, step == num_steps - 1, rows, bucket, min(width, rest))
            index = self._first_from(index + 1)

    def _begin_ahead(self) -> None:
        while len(self._ahead) < self._depth:
            planned = next(self._planned)
            memory = BufferLease(self._free, planned.bucket, self._fields[planned.bucket], planned.width)
            self._ahead.append(_Ahead(planned, memory, self._source.fill(planned, memory)))

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Iterator[MicroBatch]:
        self.current = self._batch(self.next_batch)
        self.batch_start, self.wait_seconds = time.monotonic(), 0.0
        self._source.reached(self.current)
        self.next_batch = self._first_from(self.next_batch + 1)
        return self._micro_batches(self.current.index)

    def _micro_batches(self, index: int) -> Iterator[MicroBatch]:
        while index == self.current.index:  # no later batch has been asked for
            if self._lent is not None:
                self._lent.give_back()
                self._lent = None
            self._begin_ahead()
            ahead = self._ahead[0]
            if ahead.planned.batch.index > index:
                return
            wait_start = time.monotonic()
            ahead.ready.result()
            self.wait_seconds += time.monotonic() - wait_start
            self._ahead.popleft()
            self._lent = ahead.memory
            self._begin_ahead()  # while its user computes
            if ahead.planned.batch.index == index:  # else left over from a batch that was not read to its end
                yield replace(ahead.memory.rows().batch, is_last=ahead.planned.is_last)

    def replaced(self) -> list[ReplacedRow]:
        """The damaged rows up to the global batch last asked for that were replaced, in order: those of this rank, and
        those that were given."""
        end = self.next_batch * self.order.settings.global_batch_size  # of passed-over ones nothing was read
        return sorted(row for row in list(self._source.replaced) if row.position < end)

    def keys(self, batch: Batch) -> list[str]:
        """Names of all of a global batch's samples, in order. Of a cache this opens every shard that it touches."""
        complete = self.order.batch(batch.index)  # not this rank's part alone
        return [self._source.key(int(s), int(r)) for s, r in zip(complete.shards, complete.rows, strict=True)]

    def own_samples(self) -> list[tuple[int, int, str]]:
        """(shard, row, name) of this rank's samples of the global batch last asked for, in order; of a damaged one, of
        the row that stands in for it."""
        replacements = {row.position: row.replacement for row in self.replaced()}
        batch, found = self.current, []
        for number, shard, row in zip(batch.part, batch.shards.tolist(), batch.rows.tolist(), strict=True):
            row = replacements.get(batch.position + number, row)
            found.append((shard, row, self._source.key(shard, row)))
        return found

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is going on ahead, and close the source. The stream cannot be used after it."""
        self._source.close()
        self._ahead.clear()
