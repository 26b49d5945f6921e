"""Statistics of a cache, counted from its manifest, the shards' indexes and a few JSON members; no tensor is read."""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.data_schema import CaptionsConfig
from configs.errors import InputError
from data.cache.manifest import Manifest, ShardTable
from data.cache.members import LATENTS, MASKED, TEXT, num_bytes, sample_tensors
from data.cache.shard_index import ShardIndex, count_hole_fractions, read_index
from data.cache_layout import index_path
from data.samples.geometry import Bucket
from data.samples.plan import text_name
from data.sources.items import OWN, finish_caption, whose_caption

_THREADS = 16  # that wait for small files


@dataclass(frozen=True)
class Group:
    """The shards of one dataset, bucket and split. variants: masks of each sample.  bytes: of the tars."""

    dataset: str
    bucket: str
    split: str
    shards: int
    samples: int
    variants: int
    bytes: int


@dataclass(frozen=True)
class CacheStatistics:
    """Counts of a cache's shards.

    parts: what the tars' bytes are, adding up to all of them: latents, masked latents, masks, text, JSON, and headers
    and padding of tar and safetensors.  texts: captions stored, each once per shard.  apart: bytes of the same tensors
    with a file of its own for every sample and mask, text and target in each, as other trainers cache them.
    hole_fractions: masks per tenth of the area.  tokens: of T5, real ones, per sample, as (middle, longest).
    cut: samples whose caption fills the text length: it may have been cut.  captions: samples by `whose_caption`.
    """

    groups: list[Group]
    parts: dict[str, int]
    texts: int
    apart: int
    hole_fractions: list[int]
    tokens: tuple[int, int]
    cut: int
    captions: Counter[str]

    @property
    def samples(self) -> int:
        return sum(group.samples for group in self.groups)

    @property
    def masks(self) -> int:
        return sum(group.samples * group.variants for group in self.groups)

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.groups)


@dataclass(frozen=True)
class _Shard:
    """Counts of one shard.  tokens: how many samples have 0, 1, ... text_length real tokens.
    with_default: samples whose caption is the one of samples that have none."""

    variants: int
    parts: dict[str, int]
    texts: int
    apart: int
    hole_fractions: list[int]
    tokens: np.ndarray
    with_default: int


def find_shards(table: ShardTable, name: str | None) -> list[int]:
    """Rows of all of a table's shards, or of the one whose path is a name or ends in it. Raises InputError if none or
    several do."""
    if name is None:
        return list(range(len(table)))
    paths = table.path.tolist()
    found = [row for row, path in enumerate(paths) if f"/{path}".endswith((f"/{name}", f"/{name}.tar"))]
    if len(found) != 1:
        which = ", ".join(paths[row] for row in found[:5]) or f"the first of {len(paths)} are {', '.join(paths[:5])}"
        raise InputError(f"--shard {name}: {len(found)} shards have that name ({which}).")
    return found


def count_cache(
    cache: Path, manifest: Manifest, table: ShardTable, rows: Sequence[int], advance: Callable[[], None]
) -> CacheStatistics:
    """Count the shards in `rows` of the table. advance: called after each.

    Raises InputError if an index is missing or damaged, or a shard missing.
    """
    settings = manifest.settings
    captions = CaptionsConfig(
        default=settings.get("data.captions.default", ""), trigger=settings.get("data.captions.trigger")
    )
    default = finish_caption(None, captions)

    def count(row: int) -> _Shard:
        tar = cache / str(table.path[row])
        path = index_path(tar, manifest.format_version)
        try:
            index = read_index(path)
        except FileNotFoundError:
            raise InputError(f"{path}: missing. `fluxfill shards verify --repair CONFIG` rebuilds it.") from None
        with_default = _count_text(index, tar, text_name(default))
        counted = _count_shard(index, manifest, str(table.bucket[row]), with_default)
        advance()
        return counted

    with ThreadPoolExecutor(_THREADS) as pool:
        shards = list(pool.map(count, rows))
    lacking = sum(shard.with_default for shard in shards)
    samples = int(table.samples[list(rows)].sum())
    tokens = sum((shard.tokens for shard in shards), np.zeros(manifest.text_length + 1, dtype=np.int64))
    return CacheStatistics(
        groups=_group(table, rows, shards),
        parts={part: sum(shard.parts[part] for shard in shards) for part in shards[0].parts} if shards else {},
        texts=sum(shard.texts for shard in shards),
        apart=sum(shard.apart for shard in shards),
        hole_fractions=np.sum([shard.hole_fractions for shard in shards], axis=0).tolist(),
        tokens=_middle_and_longest(tokens),
        cut=int(tokens[-1]),
        captions=Counter({OWN: samples - lacking, whose_caption(default, captions): lacking}),
    )


def _count_shard(index: ShardIndex, manifest: Manifest, bucket: str, with_default: int) -> _Shard:
    kinds = sample_tensors(Bucket.parse(bucket), manifest)
    samples, variants = index.masked.shape[:2]
    latents, text = num_bytes(kinds[LATENTS]), num_bytes(kinds[TEXT])
    mask = num_bytes({"mask": kinds[MASKED]["mask"]})
    parts = {
        "latents": samples * latents,
        "masked latents": samples * variants * latents,
        "masks": samples * variants * mask,
        "text": len(index.texts) * text,
        "JSON": int(index.metas[:, 1].sum()),
    }
    parts["headers and padding"] = index.tar_bytes - sum(parts.values())
    apart = samples * variants * (2 * latents + mask + text)
    tokens = np.bincount(np.minimum(index.tokens, manifest.text_length), minlength=manifest.text_length + 1)
    return _Shard(variants, parts, len(index.texts), apart, count_hole_fractions([index]), tokens, with_default)


def _count_text(index: ShardIndex, tar: Path, name: str) -> int:
    """How many of a shard's samples have the text of this name. The index has no names: a few JSON members have, read
    from the tar, in which samples and so texts are sorted by them."""
    texts, first_samples = np.unique(index.text_row, return_index=True)
    try:
        with tar.open("rb") as file:

            def name_of(sample: int) -> str:
                offset, size = map(int, index.metas[sample])
                file.seek(offset)
                return json.loads(file.read(size))["text"]

            row = bisect_left(first_samples.tolist(), name, key=name_of)
            if row == len(texts) or name_of(first_samples[row]) != name:
                return 0
    except FileNotFoundError:
        raise InputError(f"{tar}: missing. Restore it, or run `fluxfill preprocess CONFIG` again.") from None
    return int((index.text_row == texts[row]).sum())


def _group(table: ShardTable, rows: Sequence[int], shards: Sequence[_Shard]) -> list[Group]:
    """Shards summed up by dataset, bucket, split and number of masks."""
    groups: dict[tuple[str, str, str, int], list[int]] = {}
    for row, shard in zip(rows, shards, strict=True):
        key = (str(table.dataset[row]), str(table.bucket[row]), str(table.split[row]), shard.variants)
        total = groups.setdefault(key, [0, 0, 0])
        for place, count in enumerate((1, int(table.samples[row]), int(table.bytes[row]))):
            total[place] += count
    return [
        Group(dataset, bucket, split, shards, samples, variants, size)
        for (dataset, bucket, split, variants), (shards, samples, size) in sorted(groups.items())
    ]


def _middle_and_longest(tokens: np.ndarray) -> tuple[int, int]:
    """Of a histogram of lengths; (0, 0) of an empty one."""
    if not tokens.any():
        return 0, 0
    middle = int(np.searchsorted(np.cumsum(tokens), (tokens.sum() + 1) // 2))
    return middle, int(np.flatnonzero(tokens)[-1])
