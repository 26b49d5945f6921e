"""Single samples of a cache, for people to look at: checked as by the training's reader, and slower."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from safetensors.torch import load
from torch import Tensor

from configs.errors import InputError
from data.cache.manifest import Manifest, ShardTable
from data.cache.shard_index import read_index
from data.cache_layout import index_path


@dataclass(frozen=True)
class StoredSample:
    """One sample. shard: its tar, below the cache.  bucket: "HxW".  latents: bf16 [16, h, w].

    masked_latents: bf16 [16, h, w] per mask variant.  masks: bool [H, W] per variant.  meta: the JSON member.
    """

    key: str
    shard: str
    bucket: str
    split: str
    latents: Tensor
    masked_latents: list[Tensor]
    masks: list[np.ndarray]
    meta: dict


def spread_samples(table: ShardTable, rows: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(row of the table, row in the shard) of `count` samples, evenly spread over the shards in `rows`."""
    samples = table.samples[list(rows)]
    ends = np.cumsum(samples)
    total = int(samples.sum())
    chosen = (np.arange(min(count, total)) * 2 + 1) * total // (2 * max(min(count, total), 1))
    shards = np.searchsorted(ends, chosen, side="right")
    places = chosen - (ends - samples)[shards]
    return [(rows[shard], int(place)) for shard, place in zip(shards, places, strict=True)]


def read_samples(
    cache: Path, manifest: Manifest, table: ShardTable, chosen: Sequence[tuple[int, int]]
) -> Iterator[StoredSample]:
    """The samples at (row of the table, row in the shard). Raises InputError if one is not as it was written."""
    for shard, row in chosen:
        path = cache / str(table.path[shard])
        try:
            index = read_index(index_path(path, manifest.format_version))
            with path.open("rb") as file:
                latents = load(_member(file, path, index.latents[row], index.latents_xxh3[row]))["latents"]
                variants = [
                    load(_member(file, path, place, xxh3))
                    for place, xxh3 in zip(index.masked[row], index.masked_xxh3[row], strict=True)
                ]
                meta = json.loads(_member(file, path, index.metas[row], index.metas_xxh3[row]))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}). `fluxfill shards verify` says what else is amiss."
            ) from error
        yield StoredSample(
            index.keys[row],
            str(table.path[shard]),
            str(table.bucket[shard]),
            str(table.split[shard]),
            latents,
            [variant["masked_latents"] for variant in variants],
            [np.unpackbits(variant["mask"].numpy(), axis=1).astype(bool) for variant in variants],
            meta,
        )


def _member(file: BinaryIO, path: Path, place: np.ndarray, xxh3: np.uint64) -> bytes:
    file.seek(int(place[0]))
    data = file.read(int(place[1]))
    if xxhash.xxh3_64_intdigest(data) != int(xxh3):
        raise InputError(
            f"{path}: the {len(data)} bytes at {place[0]} do not match their checksum. "
            "`fluxfill shards verify --repair CONFIG` mends it."
        )
    return data
