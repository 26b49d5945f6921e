"""What belongs to no sample: the empty caption's text (for caption dropout), and per bucket the latents of a picture
that is all hole."""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.atomic_write import write_atomically
from data.encode import encode_captions, encode_images
from data.geometry import Bucket
from data.load_encoders import Encoders
from data.manifest import EMPTY_TEXT


def blank_path(cache: Path, bucket: str) -> Path:
    return cache / f"blank_{bucket}.safetensors"


def _paths(cache: Path, buckets: Iterable[Bucket]) -> list[Path]:
    return [cache / EMPTY_TEXT, *(blank_path(cache, str(bucket)) for bucket in buckets)]


def _made_by(encoding: Mapping[str, object]) -> dict[str, str]:
    text = json.dumps(encoding, sort_keys=True)
    return {"encoding": xxhash.xxh3_128_hexdigest(text.encode())}


def constants_are_there(cache: Path, buckets: Iterable[Bucket], encoding: Mapping[str, object]) -> bool:
    """Whether all of them are, made by this encoding."""
    for path in _paths(cache, buckets):
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != _made_by(encoding):
                    return False
        except (FileNotFoundError, SafetensorError):
            return False
    return True


def write_constants(
    cache: Path, encoders: Encoders, buckets: Iterable[Bucket], encoding: Mapping[str, object], *, text_length: int
) -> None:
    """Write all of them, each whole or not at all."""
    text = encode_captions(encoders.text, [""], text_length=text_length)
    empty = {"t5": text.t5[0].bfloat16().cpu().contiguous(), "pooled": text.pooled[0].bfloat16().cpu().contiguous()}
    write_atomically(cache / EMPTY_TEXT, partial(save_file, empty, metadata=_made_by(encoding)))
    for bucket in buckets:
        grey = torch.zeros(1, 3, bucket.height, bucket.width)
        blank = {"masked_latents": encode_images(encoders.vae, grey)[0].bfloat16().cpu().contiguous()}
        write_atomically(blank_path(cache, str(bucket)), partial(save_file, blank, metadata=_made_by(encoding)))
