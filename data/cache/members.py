"""The members of a shard: the tensors' names, types and shapes, which follow from the bucket and the manifest."""

import json
import math
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from data.cache.manifest import Manifest
from data.samples.geometry import Bucket

LATENTS, MASKED, TEXT = "latents", "masked", "text"  # the kinds of a sample's members with tensors

# Since format 2 every sample has a text member, so that all have the same members: other programs take those of the
# first samples for everyone's. Where an earlier sample of the shard has the text, it is a safetensors file of nothing.
TEXT_SUFFIX = "text.safetensors"
NO_TEXT = struct.pack("<Q", 8) + b"{}".ljust(8)

Tensors = Mapping[str, tuple[str, list[int]]]  # name -> (safetensors dtype, shape)

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8}
MAX_HEADER = 1 << 16  # bytes of a member's safetensors header; ours have about 150


def sample_tensors(bucket: Bucket, manifest: Manifest) -> dict[str, Tensors]:
    """Kind of member (LATENTS, MASKED, TEXT) -> the tensors that every one of them holds."""
    latents = ("BF16", list(bucket.latent_shape))
    return {
        LATENTS: {"latents": latents},
        MASKED: {"masked_latents": latents, "mask": ("U8", [bucket.height, bucket.width // 8])},  # 8 pixels a byte
        TEXT: text_tensors(manifest),
    }


def text_tensors(manifest: Manifest) -> Tensors:
    """The tensors of a text member, and of empty_text.safetensors."""
    length, pooled = manifest.text_length, ("BF16", [manifest.pooled_width])
    if manifest.text_dtype == "int8":
        return {"t5": ("I8", [length, manifest.text_width]), "t5_scale": ("F32", [length]), "pooled": pooled}
    return {"t5": ("BF16", [length, manifest.text_width]), "pooled": pooled}


def num_bytes(tensors: Tensors) -> int:
    """Bytes of the tensors' numbers."""
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in tensors.values())


def parse_header(data: bytes | memoryview) -> tuple[int, Mapping[str, dict]]:
    """(bytes up to the first tensor, name -> {dtype, shape, data_offsets}) of a safetensors file's first bytes.

    Raises ValueError if they are no header.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        entries = json.loads(bytes(data[8 : 8 + length]))
        entries.pop("__metadata__", None)
        for entry in entries.values():
            entry["dtype"], entry["shape"], entry["data_offsets"][0]
    except (struct.error, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(str(error)) from error
    return 8 + length, entries


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data
