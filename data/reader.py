"""Shards -> micro-batches, read ahead by threads.

A row is read by `preadv` at its member's offset, straight into its place in the batch: there is nothing to decode, the
call releases the GIL, and no bytes pass between processes. Every byte is checked against its xxh3 (30 GB/s, next to
nothing). Beside the stored tensors a row gets what is random about it (`data/noise.py`), drawn here in the threads.
"""

import json
import math
import os
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import InputError
from data.geometry import Bucket
from data.manifest import EMPTY_TEXT, Cache, Manifest, ShardTable, parse_bucket
from data.noise import draw_dropout, draw_noise, draw_uniform, draw_variant
from data.order import Batch, Order, num_micro_steps, rank_rows
from data.shards import ShardIndex, index_path, read_index, rebuild_index

# File handles and indexes that a reader keeps. The order stays within a block or two of shards per dataset and bucket,
# but goes round all of these; a process may have 1024 files open where nobody raised the limit.
_OPEN_SHARDS = 256
_MAX_HEADER = 1 << 16
_ALIGNMENT = 64  # bytes, of each tensor in a slot

_ENCODE_ANEW = "Delete the shard and run `fluxfill preprocess CONFIG` again: only that shard is encoded anew."


class DamagedShard(InputError):
    """A shard on disk is not what the manifest promised."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one bucket, one forward pass.  B rows, the last of them perhaps idle (weight 0).

    latents, masked_latents: bf16 [B, 16, h, w].  mask: uint8 [B, H, W/8], bit-packed rows, 1 = paint.
    t5: bf16 [B, L, D].  pooled: bf16 [B, P].  noise: fp32 [B, 16, h, w].  uniform: fp64 [B] in (0, 1).
    weight: fp32 [B], 1 for a row that counts, 0 for one that fills up.  position: int64 [B], place in the order.
    is_last: the last micro-batch of its global batch.
    """

    bucket: Bucket
    is_last: bool
    latents: Tensor
    masked_latents: Tensor
    mask: Tensor
    t5: Tensor
    pooled: Tensor
    noise: Tensor
    uniform: Tensor
    weight: Tensor
    position: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on a device; from pinned memory the copies do not block."""
        copies: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **copies)


def unpack_mask(packed: Tensor) -> Tensor:
    """Bit-packed rows uint8 [B, H, W/8] (numpy.packbits order) -> mask fp32 [B, 1, H, W], 1 = paint."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1)  # [B, H, W/8, 8]
    return bits.flatten(-2).unsqueeze(1).float()


@dataclass(frozen=True)
class _Layout:
    """How one kind of member looks: its safetensors header, and (name, bytes) in the order of its data."""

    header: bytes
    fields: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(size for _, size in self.fields)


def _parse_layout(data: bytes, expected: dict[str, tuple[str, list[int]]], where: str) -> _Layout:
    """Layout of a safetensors member from its first bytes.

    expected: name -> (safetensors dtype, shape).  Raises DamagedShard if the bytes are no header, or say otherwise.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        entries = json.loads(data[8 : 8 + length])
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        starts = {name: entry["data_offsets"][0] for name, entry in entries.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShard(f"{where}: no safetensors header ({error}). {_ENCODE_ANEW}") from error
    if found != expected:
        raise DamagedShard(
            f"{where}: holds {found}, the cache's bucket and text length ask for {expected}. {_ENCODE_ANEW}"
        )
    sizes = {name: math.prod(shape) * (2 if dtype == "BF16" else 1) for name, (dtype, shape) in expected.items()}
    return _Layout(data[: 8 + length], tuple((name, sizes[name]) for name in sorted(starts, key=starts.__getitem__)))


@dataclass(frozen=True)
class _OpenShard:
    path: Path
    handle: "_Handle"
    index: ShardIndex
    layouts: dict[str, _Layout]


class ShardReader:
    """Reads rows of a cache's shards; safe to call from many threads.

    Keeps the last few shards open. Raises DamagedShard, naming shard and sample, for whatever is not as written.
    """

    def __init__(self, cache: Path, manifest: Manifest, table: ShardTable) -> None:
        self.cache = cache
        self.manifest = manifest
        self.table = table
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def shard(self, number: int) -> _OpenShard:
        """An open shard. Raises DamagedShard if it is missing, of another size, or not the one in the table."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        # Not under the lock: the others read on while this thread waits for the disk. Two that open one shard at the
        # same moment end up with the same.
        newly_opened = self._open_shard(number)
        with self._lock:
            opened = self._open.setdefault(number, newly_opened)
            if len(self._open) > _OPEN_SHARDS:
                # Not closed here: another thread may be reading from it. The handle goes with the last reference.
                self._open.popitem(last=False)
            return opened

    def close(self) -> None:
        """Let go of all shards: their files are closed when nobody reads from them any more."""
        with self._lock:
            self._open.clear()

    def _open_shard(self, number: int) -> _OpenShard:
        path = self.cache / str(self.table.path[number])
        sha256, size = str(self.table.sha256[number]), int(self.table.bytes[number])
        try:
            handle = _Handle(path)
        except OSError as error:
            raise DamagedShard(
                f"{path}: cannot be opened ({error.strerror}). Restore it, or run `fluxfill preprocess CONFIG` again."
            ) from error
        if (actual := os.fstat(handle).st_size) != size:
            raise DamagedShard(
                f"{path}: {actual} bytes, the manifest says {size}. Restore it, or delete it and run "
                "`fluxfill preprocess CONFIG` again."
            )
        try:
            index = read_index(index_path(path))
        except FileNotFoundError:
            index = rebuild_index(path, plan=str(self.table.plan[number]), sha256=sha256)
        if index.tar_sha256 != sha256:
            raise DamagedShard(
                f"{index_path(path)}: belongs to another shard. Delete it: it is rebuilt from the shard."
            )
        bucket = parse_bucket(str(self.table.bucket[number]))
        latents = ("BF16", [16, *bucket.latent_size])
        text_length, manifest = self.manifest.text_length, self.manifest
        kinds = {
            "latents": (index.latents, {"latents": latents}),
            "masked": (
                index.masked.reshape(-1, 2),
                {"masked_latents": latents, "mask": ("U8", [bucket.height, bucket.width // 8])},
            ),
            "text": (
                index.texts,
                {"t5": ("BF16", [text_length, manifest.text_width]), "pooled": ("BF16", [manifest.pooled_width])},
            ),
        }
        layouts = {}
        for kind, (places, expected) in kinds.items():
            head = os.pread(handle, min(int(places[0, 1]), _MAX_HEADER), int(places[0, 0]))
            layouts[kind] = _parse_layout(head, expected, f"{path}: first {kind} member")
        return _OpenShard(path, handle, index, layouts)

    def key(self, shard: int, row: int) -> str:
        """A sample's name."""
        return self.shard(shard).index.keys[row]

    def num_variants(self, shard: int) -> int:
        """Mask variants that every sample of a shard has."""
        return self.shard(shard).index.masked.shape[1]

    def read_latents(self, shard: int, row: int, out: np.ndarray) -> None:
        """Fill `out` (uint8, contiguous) with a sample's latents as they are stored."""
        index = (opened := self.shard(shard)).index
        self._read(opened, "latents", index.latents[row], index.latents_xxh3[row], {"latents": out}, index.keys[row])

    def read_masked(self, shard: int, row: int, variant: int, masked_latents: np.ndarray, mask: np.ndarray) -> None:
        """Fill `masked_latents` and `mask` (uint8, contiguous) with one mask variant of a sample."""
        index = (opened := self.shard(shard)).index
        out = {"masked_latents": masked_latents, "mask": mask}
        self._read(opened, "masked", index.masked[row, variant], index.masked_xxh3[row, variant], out, index.keys[row])

    def read_text(self, shard: int, row: int, t5: np.ndarray, pooled: np.ndarray) -> None:
        """Fill `t5` and `pooled` (uint8, contiguous) with the text of a sample."""
        index = (opened := self.shard(shard)).index
        text = index.text_row[row]
        out = {"t5": t5, "pooled": pooled}
        self._read(opened, "text", index.texts[text], index.texts_xxh3[text], out, f"the text of {index.keys[row]}")

    def _read(
        self, opened: _OpenShard, kind: str, place: np.ndarray, xxh3: np.uint64, out: dict[str, np.ndarray], name: str
    ) -> None:
        layout = opened.layouts[kind]
        offset, size = int(place[0]), int(place[1])
        where = f"{opened.path}: {name} ({kind}, {size} bytes at {offset})"
        if size != layout.num_bytes:
            raise DamagedShard(
                f"{where} should have {layout.num_bytes} bytes, as the others of its shard. {_ENCODE_ANEW}"
            )
        if not hasattr(self._scratch, "header"):
            self._scratch.header = bytearray(_MAX_HEADER)
        header = memoryview(self._scratch.header)[: len(layout.header)]
        parts = [header, *(out[field].reshape(-1).data for field, _ in layout.fields)]
        try:
            if os.preadv(opened.handle, parts, offset) != size:
                _read_again(opened.handle, parts, offset, size, where)
        except OSError as error:
            raise DamagedShard(f"{where} cannot be read ({error.strerror}). Look at the disk it lies on.") from error
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        if digest.intdigest() != int(xxh3):
            raise DamagedShard(f"{where} does not match its checksum. {_ENCODE_ANEW}")
        if header != layout.header:
            raise DamagedShard(f"{where} holds other tensors than the others of its shard. {_ENCODE_ANEW}")


def _read_again(handle: int, parts: list, offset: int, size: int, where: str) -> None:
    """Finish a short read: legal on network filesystems, and the only answer at the end of a cut file."""
    data = bytearray()
    while len(data) < size and (piece := os.pread(handle, size - len(data), offset + len(data))):
        data += piece
    if len(data) != size:
        raise DamagedShard(f"{where}: the file ends there. {_ENCODE_ANEW}")
    start = 0
    for part in parts:
        part[:] = data[start : start + len(part)]
        start += len(part)


class _Handle(int):
    """A file descriptor that closes itself with its last reference."""

    def __new__(cls, path: Path) -> "_Handle":
        return super().__new__(cls, os.open(path, os.O_RDONLY))

    def __del__(self, close=os.close) -> None:  # bound here: at exit the module may be gone before the last handle
        close(self)


@dataclass(frozen=True)
class _Field:
    """One tensor of a micro-batch. shape: of a row's part in it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slot_bytes(self, rows: int) -> int:
        """Bytes of `rows` rows in a slot, the gap before the next tensor included."""
        return -(-self.row_bytes * rows // _ALIGNMENT) * _ALIGNMENT


def _row_fields(bucket: Bucket, manifest: Manifest) -> tuple[_Field, ...]:
    """What a row of a bucket consists of."""
    h, w = bucket.latent_size
    return (
        _Field("latents", torch.bfloat16, (16, h, w)),
        _Field("masked_latents", torch.bfloat16, (16, h, w)),
        _Field("mask", torch.uint8, (bucket.height, bucket.width // 8)),
        _Field("t5", torch.bfloat16, (manifest.text_length, manifest.text_width)),
        _Field("pooled", torch.bfloat16, (manifest.pooled_width,)),
        _Field("noise", torch.float32, (16, h, w)),
        _Field("uniform", torch.float64, ()),
        _Field("weight", torch.float32, ()),
        _Field("position", torch.int64, ()),
    )


class _Slot:
    """Memory of one micro-batch, used over and over for micro-batches of any bucket.

    batch: the micro-batch as tensors.  rows: the bytes of each, uint8 [rows, bytes of a row].  noise, uniform, weight,
    position: numpy arrays of the same memory, for the threads: torch would start threads of its own in each of them.
    """

    def __init__(self, num_bytes: int, pin: bool) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
        self._copied = torch.cuda.Event(blocking=True) if pin else None
        self._was_lent = False

    def lay_out(self, bucket: Bucket, fields: Sequence[_Field], rows: int) -> None:
        """Make it hold `rows` rows of a bucket; what was in it is lost."""
        tensors: dict[str, Any] = {}
        start = 0
        for field in fields:
            flat = self._memory[start : start + field.row_bytes * rows]
            tensors[field.name] = flat.view(field.dtype).view(rows, *field.shape)
            start += field.slot_bytes(rows)
        self.batch = MicroBatch(bucket, is_last=False, **tensors)
        self.rows = {name: tensor.view(rows, -1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
        self.noise, self.uniform, self.weight, self.position = (
            tensors[name].numpy() for name in ("noise", "uniform", "weight", "position")
        )

    def wait_until_free(self) -> None:
        """Return once the copies to the device that its last user queued have run."""
        if self._copied is not None and self._was_lent:
            self._copied.synchronize()

    def give_back(self) -> None:
        """Its user has asked for the next one: what it queued on the device until now may still read from it."""
        self._was_lent = True
        if self._copied is not None:
            self._copied.record()


@dataclass(frozen=True)
class _Ahead:
    """A micro-batch that is being read."""

    batch: Batch
    is_last: bool
    slot: _Slot
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
        self._fields = {bucket: _row_fields(bucket, cache.manifest) for bucket in self._buckets.values()}
        self._most_rows = -(-order.settings.global_batch_size // world_size)
        self._dropout = caption_dropout
        self._empty_text = _read_empty_text(cache) if caption_dropout else None
        self._depth = depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        slot_bytes = max(
            sum(field.slot_bytes(min(self.micro_batch_size(bucket), self._most_rows)) for field in fields)
            for bucket, fields in self._fields.items()
        )
        self._free = [_Slot(slot_bytes, pin_memory) for _ in range(depth + 1)]
        self._lent: _Slot | None = None
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

    def _fill(self, slot: _Slot, place: int, batch: Batch, row: int) -> None:
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

    def _idle(self, slot: _Slot, place: int) -> None:
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
