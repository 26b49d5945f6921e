"""Micro-batches: what a forward pass takes, and the memory that is filled with one after another."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cache.manifest import Manifest
from data.cache.members import DTYPES, sample_tensors
from data.encoders.stored_text import dequantize_tokens
from data.samples.geometry import Bucket

_ALIGNMENT = 64  # bytes, of each tensor in a slot


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one bucket, one forward pass.  B rows, the last of them perhaps idle (weight 0).

    latents, masked_latents: bf16 [B, 16, h, w].  mask: uint8 [B, H, W/8], bit-packed rows, 1 = paint.
    t5: bf16 [B, L, D]; from a cache of int8 texts int8, with t5_scale fp32 [B, L], until `to` moves the rows.
    pooled: bf16 [B, P].  noise: fp32 [B, 16, h, w].  uniform: fp64 [B] in (0, 1).
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
    t5_scale: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on a device, texts in bf16; from pinned memory the copies do not block."""
        copies: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.t5_scale is not None:
            # There and not in the reader's threads: half the bytes cross over, and a thread would take longer over this
            # than over reading.
            copies |= {"t5": dequantize_tokens(copies["t5"], copies["t5_scale"]), "t5_scale": None}
        return replace(self, **copies)


def unpack_mask(packed: Tensor) -> Tensor:
    """Bit-packed rows uint8 [B, H, W/8] (numpy.packbits order) -> mask fp32 [B, 1, H, W], 1 = paint."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1)  # [B, H, W/8, 8]
    return bits.flatten(-2).unsqueeze(1).float()


@dataclass(frozen=True)
class RowField:
    """One tensor of a micro-batch. shape: of a row's part in it.  is_stored: in shards; else drawn."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_stored: bool = True

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slot_bytes(self, rows: int) -> int:
        """Bytes of `rows` rows in a slot, the gap before the next tensor included."""
        return -(-self.row_bytes * rows // _ALIGNMENT) * _ALIGNMENT


def row_fields(bucket: Bucket, manifest: Manifest) -> tuple[RowField, ...]:
    """What a row of a bucket consists of."""
    stored = (
        RowField(name, DTYPES[dtype], tuple(shape))
        for tensors in sample_tensors(bucket, manifest).values()
        for name, (dtype, shape) in tensors.items()
    )
    return (
        *stored,
        RowField("noise", torch.float32, bucket.latent_shape, is_stored=False),
        RowField("uniform", torch.float64, (), is_stored=False),
        RowField("weight", torch.float32, (), is_stored=False),
        RowField("position", torch.int64, (), is_stored=False),
    )


@dataclass(frozen=True)
class BatchViews:
    """A slot's memory seen as rows of one bucket.

    batch: as tensors.  stored: for each row, the bytes of what shards store, by tensor name.  raw: uint8 [rows, bytes
    of a row] of each tensor.  All but `batch` are for the threads: torch would start threads of its own in each.
    """

    batch: MicroBatch
    stored: tuple[dict[str, memoryview], ...]
    raw: tuple[np.ndarray, ...]
    noise: np.ndarray
    uniform: np.ndarray
    weight: np.ndarray
    position: np.ndarray

    def clear(self, place: int) -> None:
        """Make a row one that only fills up: finite numbers, weight 0."""
        for rows in self.raw:
            rows[place] = 0
        self.uniform[place] = 0.5


class BatchBuffer:
    """Memory of one micro-batch, used over and over for micro-batches of any bucket."""

    def __init__(self, num_bytes: int, pin: bool) -> None:
        # numpy asks the system for huge pages, torch does not: copies into them are a fifth faster.
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) if pin else _huge_pages(num_bytes)
        self._device = torch.cuda.current_device() if pin else None
        self._copied = torch.cuda.Event(blocking=True) if pin else None
        self._was_lent = False
        self._laid_out: dict[tuple[Bucket, int], BatchViews] = {}

    def lay_out(self, bucket: Bucket, fields: Sequence[RowField], rows: int) -> BatchViews:
        """The memory as `rows` rows of a bucket; what was in it is lost."""
        if (bucket, rows) in self._laid_out:
            return self._laid_out[bucket, rows]
        tensors: dict[str, Any] = {}
        start = 0
        for field in fields:
            flat = self._memory[start : start + field.row_bytes * rows]
            tensors[field.name] = flat.view(field.dtype).view(rows, *field.shape)
            start += field.slot_bytes(rows)
        raw = {name: tensor.view(rows, -1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
        stored = tuple(
            {field.name: raw[field.name][place].data for field in fields if field.is_stored} for place in range(rows)
        )
        drawn = (tensors[name].numpy() for name in ("noise", "uniform", "weight", "position"))
        made = self._laid_out[bucket, rows] = BatchViews(
            MicroBatch(bucket, is_last=False, **tensors), stored, tuple(raw.values()), *drawn
        )
        return made

    def wait_until_free(self) -> None:
        """Return once the copies to the device that its last user queued have run."""
        if self._copied is not None and self._was_lent:
            with torch.cuda.device(self._device):  # a thread that waits would else make itself at home on the first GPU
                self._copied.synchronize()

    def give_back(self) -> None:
        """Its user has asked for the next one: what it queued on the device until now may still read from it."""
        self._was_lent = True
        if self._copied is not None:
            self._copied.record()


class BufferLease:
    """Where the rows of one micro-batch go: a slot that is taken when the first of them is filled.

    free: the slots that are not in use. The one last given back is taken, as it may still be in the processor's cache.
    """

    def __init__(self, free: list[BatchBuffer], bucket: Bucket, fields: Sequence[RowField], rows: int) -> None:
        self._free, self._shape = free, (bucket, fields, rows)
        self._lock = threading.Lock()
        self._taken: tuple[BatchBuffer, BatchViews] | None = None

    def rows(self) -> BatchViews:
        """The rows, once they may be written to; safe to call from many threads."""
        with self._lock:
            if self._taken is None:
                slot = self._free.pop()
                slot.wait_until_free()
                self._taken = slot, slot.lay_out(*self._shape)
            return self._taken[1]

    def give_back(self) -> None:
        """Its user has asked for the next one. Nobody may have asked for its rows at the same time."""
        assert self._taken is not None, "rows that nobody filled"
        slot, _ = self._taken
        slot.give_back()
        self._free.append(slot)


def _huge_pages(num_bytes: int) -> Tensor:
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))
