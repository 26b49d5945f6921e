"""What belongs to no sample: the empty caption's text (for caption dropout), and per bucket the latents of a picture
that is all hole."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from configs.schema import CaptionsConfig
from data.cache.manifest import EMPTY_TEXT, blank_name
from data.cache.shard_writer import NotFinite
from data.encoders.device import raise_out_of_memory
from data.encoders.encode import encode_captions, encode_images
from data.encoders.load import Encoders
from data.encoders.stored_text import store_text
from data.samples.geometry import Bucket
from data.storage.atomic_write import write_bytes_atomically
from data.storage.stale_files import retry_if_stale


def blank_path(cache: Path, bucket: str) -> Path:
    return cache / blank_name(bucket)


def _paths(cache: Path, buckets: Iterable[Bucket]) -> list[Path]:
    return [cache / EMPTY_TEXT, *(blank_path(cache, str(bucket)) for bucket in buckets)]


def _made_by(encoding: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    digest = xxhash.xxh3_128()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(encoding, sort_keys=True)
    # One entry: safetensors writes several in an order that changes from process to process.
    return {"encoding, tensors": f"{xxhash.xxh3_128_hexdigest(text.encode())}, {digest.hexdigest()}"}


def constants_are_there(cache: Path, buckets: Iterable[Bucket], encoding: Mapping[str, object]) -> bool:
    """Whether all of them are, made by this encoding and undamaged."""
    for path in _paths(cache, buckets):
        try:
            data = retry_if_stale(path, path.read_bytes)  # not mapped: they are replaced while others look
            if _metadata(data) != _made_by(encoding, load(data)):
                return False
        except (FileNotFoundError, SafetensorError):
            return False
    return True


def _metadata(data: bytes) -> object:
    """What a safetensors file says of itself, which `load` leaves out."""
    try:
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    except (ValueError, AttributeError):
        return None


def write_constants(
    cache: Path,
    encoders: Encoders,
    buckets: Iterable[Bucket],
    encoding: Mapping[str, object],
    captions: CaptionsConfig,
    check: Callable[[], object],
) -> None:
    """Write all of them, each whole or not at all.  check: called before each is; raises if it must not be."""
    empty = encode_empty_text(encoders, captions)
    check()
    _write(cache / EMPTY_TEXT, empty, encoding)
    for bucket in buckets:
        blank = encode_blank(encoders, bucket)
        check()
        _write(blank_path(cache, str(bucket)), blank, encoding)


def encode_empty_text(encoders: Encoders, captions: CaptionsConfig) -> dict[str, Tensor]:
    """The empty caption's tensors as shards store them."""
    with raise_out_of_memory(encoders.text.t5.device, "encode the empty caption"):
        text = encode_captions(encoders.text, [""], text_length=captions.text_length)
        return store_text(text.t5[0], text.pooled[0], captions.text_dtype)


def encode_blank(encoders: Encoders, bucket: Bucket) -> dict[str, Tensor]:
    """`masked_latents` of a bucket's picture that is all hole, as stored."""
    grey = torch.zeros(1, 3, bucket.height, bucket.width)
    with raise_out_of_memory(encoders.vae.device, f"encode a single picture of {bucket}"):
        return {"masked_latents": encode_images(encoders.vae, grey)[0].bfloat16()}


def _write(path: Path, tensors: Mapping[str, Tensor], encoding: Mapping[str, object]) -> None:
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise NotFinite(f"{path}: {name} holds NaN or infinity. Look at the model's files and at the GPU.")
    write_bytes_atomically(path, save(stored, metadata=_made_by(encoding, stored)))
