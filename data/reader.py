"""Shards -> micro-batches, read ahead by threads.

A row's bytes go from the shard straight to their place in the batch (`data/shard_reader.py`); none pass between
processes. Beside the stored tensors a row gets what is random about it (`data/noise.py`), drawn here in the threads.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import load_file

from configs.errors import InputError
from data.geometry import Bucket
from data.manifest import EMPTY_TEXT, Cache, parse_bucket
from data.micro_batch import MicroBatch, Slot, row_fields
from data.noise import draw_dropout, draw_noise, draw_uniform, draw_variant
from data.order import Batch, Order, num_micro_steps, rank_rows
from data.shard_reader import ShardReader


@dataclass(frozen=True)
class _Ahead:
    """A micro-batch that is being read."""

    batch: Batch
    is_last: bool
    slot: Slot
    work: list[Future]


class BatchStream:
    """This rank's share of the global batches, in order, read ahead.

    `next(stream)` gives an iterator over the micro-batches of the next global batch: as many on every rank, rows that
    only fill up have weight 0. A micro-batch's memory is used again after the next one has been asked for; with
    `pin_memory` after the CUDA work queued by then has run, so copy it to the device and forget it. An iterator that is
    not read to its end has ended once the next global batch is asked for.

    What a thread could not read is raised where its micro-batch would have come, and again at every later try: the
    stream does not pass over it.

    current: the global batch last asked for.  batch_start: when, by the monotonic clock.  wait_seconds: how long its
    user waited for it.

    micro_batch_size: rows per forward of the largest bucket; smaller buckets get more, at the same number of tokens.
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
        caption_dropout: float = 0.0,
        start: int = 0,
        threads: int = 2,
        depth: int = 3,
        pin_memory: bool = False,
    ) -> None:
        self.reader = ShardReader(cache.folder, cache.manifest, cache.table)
        self.order = order
        self.next_batch = start
        self.batch_start, self.wait_seconds = time.monotonic(), 0.0
        self._rank, self._world_size = rank, world_size
        self._micro_batch_size = micro_batch_size
        self._buckets = {name: parse_bucket(name) for name in order.buckets}
        self._largest = max(bucket.tokens for bucket in self._buckets.values())
        self._fields = {bucket: row_fields(bucket, cache.manifest) for bucket in self._buckets.values()}
        self._most_rows = -(-order.settings.global_batch_size // world_size)
        self._dropout = caption_dropout
        self._empty_text = _read_empty_text(cache) if caption_dropout else None
        self._depth = depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        slot_bytes = max(
            sum(field.slot_bytes(min(self.micro_batch_size(bucket), self._most_rows)) for field in fields)
            for bucket, fields in self._fields.items()
        )
        self._free = [Slot(slot_bytes, pin_memory) for _ in range(depth + 1)]
        self._lent: Slot | None = None
        self._planned: Iterator[tuple[Batch, bool, range, Bucket, int]] = self._plan(start)
        self._ahead: deque[_Ahead] = deque()

    def micro_batch_size(self, bucket: Bucket) -> int:
        """Rows per forward of a bucket: about as many tokens as the largest bucket's."""
        return max(self._micro_batch_size, self._micro_batch_size * self._largest // bucket.tokens)

    def num_micro_steps(self, bucket: Bucket) -> int:
        """Forward passes per update when a global batch is of this bucket."""
        size = self.order.settings.global_batch_size
        return num_micro_steps(size, world_size=self._world_size, micro_batch_size=self.micro_batch_size(bucket))

    def _plan(self, start: int) -> Iterator[tuple[Batch, bool, range, Bucket, int]]:
        """(batch, whether it ends the batch, its rows, bucket, rows per forward) of every micro-batch, endlessly."""
        size = self.order.settings.global_batch_size
        mine = rank_rows(size, rank=self._rank, world_size=self._world_size)
        index = start
        while True:
            batch = self.order.batch(index)
            bucket = self._buckets[batch.pool[1]]
            width = min(self.micro_batch_size(bucket), self._most_rows)
            num_steps = self.num_micro_steps(bucket)
            for step in range(num_steps):
                rows = mine[step * width : (step + 1) * width]
                yield batch, step == num_steps - 1, rows, bucket, min(width, self._most_rows - step * width)
            index += 1

    def _read_ahead(self) -> None:
        while len(self._ahead) < self._depth:
            batch, is_last, rows, bucket, width = next(self._planned)
            slot = self._free.pop()
            slot.lay_out(bucket, self._fields[bucket], width)
            work = [self._pool.submit(self._fill, slot, place, batch, row) for place, row in enumerate(rows)]
            work += [self._pool.submit(self._idle, slot, place) for place in range(len(rows), width)]
            self._ahead.append(_Ahead(batch, is_last, slot, work))

    def _fill(self, slot: Slot, place: int, batch: Batch, row: int) -> None:
        """Read row `row` of a global batch into `place` of a slot, and draw what is random about it."""
        slot.wait_until_free()
        shard, sample, position = int(batch.shards[row]), int(batch.rows[row]), batch.position + row
        seed, out = self.order.settings.seed, {name: rows[place] for name, rows in slot.rows.items()}
        self.reader.read_latents(shard, sample, out["latents"])
        variant = draw_variant(seed, position, self.reader.num_variants(shard))
        self.reader.read_masked(shard, sample, variant, out["masked_latents"], out["mask"])
        if self._empty_text is not None and draw_dropout(seed, position, self._dropout):
            out["t5"][:], out["pooled"][:] = self._empty_text
        else:
            self.reader.read_text(shard, sample, out["t5"], out["pooled"])
        draw_noise(seed, position, slot.noise[place])
        slot.uniform[place] = draw_uniform(seed, position)
        slot.weight[place] = 1.0
        slot.position[place] = position

    def _idle(self, slot: Slot, place: int) -> None:
        """A row that only fills up: finite numbers, weight 0."""
        slot.wait_until_free()
        for rows in slot.rows.values():
            rows[place] = 0
        slot.uniform[place] = 0.5

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Iterator[MicroBatch]:
        self.current = self.order.batch(self.next_batch)
        self.batch_start, self.wait_seconds = time.monotonic(), 0.0
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
            if ahead.batch.index > index:
                return
            wait_start = time.monotonic()
            for future in ahead.work:
                future.result()
            self.wait_seconds += time.monotonic() - wait_start
            self._ahead.popleft()
            self._lent = ahead.slot
            self._read_ahead()  # while its user computes
            if ahead.batch.index == index:  # else left over from a batch that was not read to its end
                yield replace(ahead.slot.batch, is_last=ahead.is_last)

    def keys(self, batch: Batch) -> list[str]:
        """Names of a global batch's samples, in order."""
        return [self.reader.key(int(s), int(r)) for s, r in zip(batch.shards, batch.rows, strict=True)]

    def close(self) -> None:
        """Stop reading ahead and let go of the shards. The stream cannot be used after it."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self.reader.close()


def _read_empty_text(cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the empty caption's t5 and pooled, from beside the manifest. Raises InputError if they do not fit it."""
    path, manifest = cache.folder / EMPTY_TEXT, cache.manifest
    expected = {"t5": (manifest.text_length, manifest.text_width), "pooled": (manifest.pooled_width,)}
    try:
        tensors = load_file(path)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected or any(tensor.dtype != torch.bfloat16 for tensor in tensors.values()):
            raise ValueError(f"it holds {found}, not bf16 {expected}")
    except Exception as error:  # of files, and safetensors' own
        raise InputError(
            f"{path}: cannot be read ({error}). Delete it and run `fluxfill preprocess CONFIG` again; whole shards are "
            "kept."
        ) from error
    t5, pooled = (tensors[name].flatten().view(torch.uint8).numpy() for name in ("t5", "pooled"))
    return t5, pooled
