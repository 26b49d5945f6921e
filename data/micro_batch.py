"""Micro-batches: what a forward pass takes, and the memory that is filled with one after another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.geometry import Bucket
from data.manifest import Manifest

_ALIGNMENT = 64  # bytes, of each tensor in a slot


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
class RowField:
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


def row_fields(bucket: Bucket, manifest: Manifest) -> tuple[RowField, ...]:
    """What a row of a bucket consists of."""
    h, w = bucket.latent_size
    return (
        RowField("latents", torch.bfloat16, (16, h, w)),
        RowField("masked_latents", torch.bfloat16, (16, h, w)),
        RowField("mask", torch.uint8, (bucket.height, bucket.width // 8)),
        RowField("t5", torch.bfloat16, (manifest.text_length, manifest.text_width)),
        RowField("pooled", torch.bfloat16, (manifest.pooled_width,)),
        RowField("noise", torch.float32, (16, h, w)),
        RowField("uniform", torch.float64, ()),
        RowField("weight", torch.float32, ()),
        RowField("position", torch.int64, ()),
    )


class Slot:
    """Memory of one micro-batch, used over and over for micro-batches of any bucket.

    batch: the micro-batch as tensors.  rows: the bytes of each, uint8 [rows, bytes of a row].  noise, uniform, weight,
    position: numpy arrays of the same memory, for the threads: torch would start threads of its own in each of them.
    """

    def __init__(self, num_bytes: int, pin: bool) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
        self._copied = torch.cuda.Event(blocking=True) if pin else None
        self._was_lent = False

    def lay_out(self, bucket: Bucket, fields: Sequence[RowField], rows: int) -> None:
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
