"""The dropout tensors: the empty-caption embedding, and per bucket the full-mask latents (all of the picture is hole).

Training takes them for the samples whose caption (captions.dropout) or mask (mask_dropout) is dropped.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from configs.data_schema import CaptionsConfig
from configs.errors import InputError
from data.cache.members import MASKED, Tensors, bytes_of, num_bytes, parse_header, sample_tensors, text_tensors
from data.cache.open_cache import Cache
from data.cache_layout import EMPTY_TEXT, full_mask_name
from data.encoders.device import raise_out_of_memory
from data.encoders.encode import NotFinite, encode_captions, encode_images
from data.encoders.load import Encoders
from data.encoders.stored_text import store_text
from data.samples.geometry import Bucket
from data.storage.atomic_write import write_bytes_atomically
from data.storage.retry import retry_if_stale


def _paths(cache: Path, buckets: Iterable[Bucket]) -> list[Path]:
    return [cache / EMPTY_TEXT, *(cache / full_mask_name(str(bucket)) for bucket in buckets)]


def _made_by(encoding: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    digest = xxhash.xxh3_128()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(encoding, sort_keys=True)
    # One entry: safetensors writes several in an order that changes from process to process.
    return {"encoding, tensors": f"{xxhash.xxh3_128_hexdigest(text.encode())}, {digest.hexdigest()}"}


def dropout_tensors_are_current(cache: Path, buckets: Iterable[Bucket], encoding: Mapping[str, object]) -> bool:
    """Whether a cache has all of them, undamaged and made by this encoding."""
    for path in _paths(cache, buckets):
        try:
            data = retry_if_stale(path, path.read_bytes)  # not mapped: they are replaced while others look
            if _metadata(data) != _made_by(encoding, load(data)):
                return False
        except (FileNotFoundError, SafetensorError):
            return False
    return True


def _metadata(data: bytes) -> object:
    """The metadata in a safetensors file's header, which `load` leaves out."""
    try:
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    except (ValueError, AttributeError):
        return None


def write_dropout_tensors(
    cache: Path,
    encoders: Encoders,
    buckets: Iterable[Bucket],
    encoding: Mapping[str, object],
    captions: CaptionsConfig,
    check: Callable[[], object],
) -> None:
    """Encode and write all of them, each atomically.  check: called before each write; raises if it must not be."""
    empty = encode_empty_caption(encoders, captions)
    check()
    _write(cache / EMPTY_TEXT, empty, encoding)
    for bucket in buckets:
        latents = encode_full_mask(encoders, bucket)
        check()
        _write(cache / full_mask_name(str(bucket)), latents, encoding)


def encode_empty_caption(encoders: Encoders, captions: CaptionsConfig) -> dict[str, Tensor]:
    """The empty caption's tensors as shards store them."""
    with raise_out_of_memory(encoders.text.t5.device, "encode the empty caption"):
        text = encode_captions(encoders.text, [""], text_length=captions.text_length)
        return store_text(text.t5[0], text.pooled[0], captions.text_dtype)


def encode_full_mask(encoders: Encoders, bucket: Bucket) -> dict[str, Tensor]:
    """`masked_latents` bf16 [16, h, w] of a picture that is all hole."""
    grey = torch.zeros(1, 3, bucket.height, bucket.width)
    with raise_out_of_memory(encoders.vae.device, f"encode a single picture of {bucket}"):
        return {"masked_latents": encode_images(encoders.vae, grey)[0].bfloat16()}


def _write(path: Path, tensors: Mapping[str, Tensor], encoding: Mapping[str, object]) -> None:
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise NotFinite(f"{path}: {name} holds NaN or infinity. Look at the model's files and at the GPU.")
    write_bytes_atomically(path, save(stored, metadata=_made_by(encoding, stored)))


def read_empty_caption(cache: Cache) -> dict[str, memoryview]:
    """Bytes of the empty caption's tensors, by name. Raises InputError if the file is not what the manifest says."""
    return _read(cache, EMPTY_TEXT, text_tensors(cache.manifest))


def read_full_mask(cache: Cache, bucket: Bucket) -> dict[str, memoryview]:
    """Bytes of the full-mask latents and of the mask itself, by name. Raises InputError likewise."""
    masked = sample_tensors(bucket, cache.manifest)[MASKED]
    latents = _read(cache, full_mask_name(str(bucket)), {"masked_latents": masked["masked_latents"]})
    return latents | {"mask": memoryview(b"\xff" * num_bytes({"mask": masked["mask"]}))}


def _read(cache: Cache, name: str, expected: Tensors) -> dict[str, memoryview]:
    path = cache.folder / name
    try:
        data = path.read_bytes()
        _, entries = parse_header(data)
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        if found != expected:
            raise ValueError(f"it holds {found}, not {expected}")
        if xxhash.xxh3_128_hexdigest(data) != cache.manifest.files.get(name):
            raise ValueError("its checksum differs")
        tensors = load(data)
    except Exception as error:  # of files, and safetensors' own
        raise InputError(
            f"{path}: cannot be read ({error}). Delete it and run `fluxfill preprocess CONFIG` again; whole shards are "
            "kept."
        ) from error
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}
