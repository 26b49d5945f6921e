"""The ring of buffers that micro-batches are filled into, pinned where a GPU copies from them.

A buffer is lent to one micro-batch at a time, and again once the copies to the device that its user queued have run.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches.micro_batch import MicroBatch, RowField
from data.samples.geometry import Bucket

_ALIGNMENT = 64  # bytes, of each tensor in a buffer


def buffer_bytes(fields: Sequence[RowField], rows: int) -> int:
    """Size of a buffer that holds `rows` rows of these fields."""
    return sum(_padded_bytes(field, rows) for field in fields)


def _padded_bytes(field: RowField, rows: int) -> int:
    return -(-field.row_bytes * rows // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class BatchViews:
    """A buffer's memory as rows of one bucket.

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
    unmasked: np.ndarray

    def pad(self, place: int) -> None:
        """Make a row a padding row: finite numbers, weight 0."""
        for rows in self.raw:
            rows[place] = 0
        self.uniform[place] = 0.5


class BatchBuffer:
    """Memory of one micro-batch, reused for micro-batches of any bucket.  pin: in page-locked memory."""

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
            start += _padded_bytes(field, rows)
        raw = {name: tensor.view(rows, -1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
        stored = tuple(
            {field.name: raw[field.name][place].data for field in fields if field.is_stored} for place in range(rows)
        )
        drawn = (tensors[name].numpy() for name in ("noise", "uniform", "weight", "position", "unmasked"))
        made = self._laid_out[bucket, rows] = BatchViews(
            MicroBatch(bucket, is_last=False, **tensors), stored, tuple(raw.values()), *drawn
        )
        return made

    def wait_until_free(self) -> None:
        """Wait for the copies to the device that its last user queued."""
        if self._copied is not None and self._was_lent:
            with torch.cuda.device(self._device):  # a thread that waits would else open the first GPU too
                self._copied.synchronize()

    def give_back(self) -> None:
        """Its user has asked for the next one: what it queued on the device until now may still read from it."""
        self._was_lent = True
        if self._copied is not None:
            self._copied.record()


class BufferLease:
    """A buffer for the rows of one micro-batch, taken from `free` when the first of them is filled.

    free: buffers that are not in use. The one last given back is taken, as it may still be in the processor's cache.
    """

    def __init__(self, free: list[BatchBuffer], bucket: Bucket, fields: Sequence[RowField], rows: int) -> None:
        self._free, self._shape = free, (bucket, fields, rows)
        self._lock = threading.Lock()
        self._taken: tuple[BatchBuffer, BatchViews] | None = None

    def rows(self) -> BatchViews:
        """The rows, once they may be written to; safe to call from many threads."""
        with self._lock:
            if self._taken is None:
                buffer = self._free.pop()
                buffer.wait_until_free()
                self._taken = buffer, buffer.lay_out(*self._shape)
            return self._taken[1]

    def give_back(self) -> None:
        """Its user has asked for the next one. Nobody may have asked for its rows at the same time."""
        assert self._taken is not None, "rows that nobody filled"
        buffer, _ = self._taken
        buffer.give_back()
        self._free.append(buffer)


def _huge_pages(num_bytes: int) -> Tensor:
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))
