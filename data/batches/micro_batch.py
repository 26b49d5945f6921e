"""A micro-batch: the tensors of one forward pass, and the fields that a row of it consists of."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.cache.manifest import Manifest
from data.cache.members import DTYPES, sample_tensors
from data.encoders.stored_text import dequantize_tokens
from data.samples.geometry import Bucket


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one bucket, one forward pass.  B rows, the last of them perhaps padding rows (weight 0).

    latents, masked_latents: bf16 [B, 16, h, w].  mask: uint8 [B, H, W/8], bit-packed rows, 1 = paint.
    t5: bf16 [B, L, D]; from a cache of int8 texts int8, with t5_scale fp32 [B, L], until `to` moves the rows.
    pooled: bf16 [B, P].  noise: fp32 [B, 16, h, w].  uniform: fp64 [B] in (0, 1).
    weight: fp32 [B], 1 for a sample, 0 for a padding row.  position: int64 [B], place in the order.
    unmasked: fp32 [B], 1 for a sample whose loss ignores the mask; None: of none.
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
    unmasked: Tensor | None = None

    @property
    def hole(self) -> Tensor:
        """The mask, unpacked: fp32 [B, 1, H, W], 1 = paint."""
        return unpack_mask(self.mask)

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
    """One tensor of a micro-batch.  shape: of a row's part in it.  is_stored: in shards; else drawn."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_stored: bool = True

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_fields(bucket: Bucket, manifest: Manifest) -> tuple[RowField, ...]:
    """The fields of a row of a bucket: stored tensors, then those drawn by the order."""
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
        RowField("unmasked", torch.float32, (), is_stored=False),
    )
