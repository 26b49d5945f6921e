"""The shard plan: which sample goes into which shard, a pure function of the pictures, whatever machines encode them.

Samples of one dataset, bucket and split are split by the bits of a hash until each part fits a shard, as in extendible
hashing: by their captions' first, so that equal captions end up together, where their text is stored once; then, where
one caption alone is more than a shard, by their own. So a new picture is written with the samples of the one shard that
it hashes to, which becomes several if it is too much for one, and a removed one likewise: no other shard is touched.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from data.samples.geometry import Bucket
from data.samples.plan import TRAIN, PlannedSample


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A planned shard without its samples.

    path: below the cache folder.  plan: 32 hex digits over all that shapes its tensors.  num_bytes: about, of its tar.
    format_version: of its cache.
    """

    path: str
    dataset: str
    bucket: Bucket
    split: str
    plan: str
    num_samples: int
    num_bytes: int
    format_version: int


@dataclass(frozen=True, slots=True)
class PlannedShard(ShardSpec):
    """A planned shard and its samples, in their order in the tar."""

    samples: tuple[PlannedSample, ...]


def sample_bytes(bucket: Bucket, *, num_variants: int) -> int:
    """About what a sample takes in its tar, without its text: latents, variants, headers and JSON."""
    latents = math.prod(bucket.latent_shape) * 2
    return latents + num_variants * (latents + bucket.mask_bytes + 1024) + 2048


def plan_shards(
    samples: Sequence[PlannedSample],
    *,
    size_limit: int,
    text_bytes: int,
    encoding: Mapping[str, object],
    format_version: int,
) -> list[PlannedShard]:
    """Deal samples to shards of at most `size_limit` bytes (a single larger sample gets one of its own).

    text_bytes: of one caption's member.  encoding: what else shapes the tensors (encoders, text length): its change
    makes every shard another one.  format_version: of the cache.
    """
    groups: dict[tuple[str, Bucket, str], list[PlannedSample]] = defaultdict(list)
    for sample in samples:
        groups[sample.triple.dataset, sample.bucket, sample.split].append(sample)
    plans = []
    for (dataset, bucket, split), members in sorted(groups.items()):
        each = sample_bytes(bucket, num_variants=members[0].recipe.variants)  # one recipe a dataset
        prefix = f"shards/{dataset}/{bucket}" if split == TRAIN else f"shards/{dataset}/{split}-{bucket}"

        def num_bytes(num_samples: int, num_texts: int, each: int = each) -> int:
            return num_samples * each + num_texts * text_bytes

        for name, part in _deal(members, num_bytes, size_limit):
            part.sort(key=lambda sample: (sample.text, sample.key))
            plans.append(
                PlannedShard(
                    f"{prefix}-{name}.tar",
                    dataset,
                    bucket,
                    split,
                    _plan_hash(part, encoding),
                    num_samples=len(part),
                    num_bytes=num_bytes(len(part), len({sample.text for sample in part})),
                    format_version=format_version,
                    samples=tuple(part),
                )
            )
    return plans


def _deal(
    samples: Iterable[PlannedSample], num_bytes: Callable[[int, int], int], size_limit: int
) -> Iterator[tuple[str, list[PlannedSample]]]:
    """(name, samples) of every part: split by the captions' bits down to a part that fits or has one caption, and that
    by the bits of the samples' own keys.

    num_bytes: of so many samples with so many captions.  What a caption is split into has its hash for a name: the
    part of the tree in which it is alone changes with the captions around it.
    """

    def fits(num_samples: int, num_texts: int) -> bool:
        return num_bytes(num_samples, num_texts) <= size_limit

    for leaf, part in _split(
        [(_bits_of(sample.text), sample) for sample in samples],
        1,
        lambda part: _num_texts(part) == 1 or fits(len(part), _num_texts(part)),
    ):
        if fits(len(part), _num_texts(part)):
            yield f"{leaf:06d}", [sample for _, sample in part]
            continue
        caption = part[0][1].text.removeprefix("text-")
        by_key = [(_bits_of(sample.key), sample) for _, sample in part]
        for key_leaf, key_part in _split(by_key, 1, lambda part: fits(len(part), 1)):
            yield f"{caption}-{key_leaf:06d}", [sample for _, sample in key_part]


_Placed = tuple[int, PlannedSample]  # by 64 bits


def _bits_of(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _num_texts(samples: Sequence[_Placed]) -> int:
    """Of samples placed by their captions."""
    return len({bits for bits, _ in samples})


def _split(
    samples: list[_Placed], leaf: int, is_done: Callable[[list[_Placed]], bool]
) -> Iterator[tuple[int, list[_Placed]]]:
    """(leaf number, samples) of every part that is done. The root is leaf 1, the halves of leaf n are 2n and 2n + 1."""
    depth = leaf.bit_length() - 1
    if len(samples) <= 1 or depth >= 64 or is_done(samples):
        yield leaf, samples
        return
    for bit in (0, 1):
        half = [(bits, sample) for bits, sample in samples if bits >> (63 - depth) & 1 == bit]
        if half:
            yield from _split(half, 2 * leaf + bit, is_done)


def _plan_hash(samples: Sequence[PlannedSample], encoding: Mapping[str, object]) -> str:
    parts = [
        {
            "key": sample.key,
            "content": sample.triple.content,
            "caption": sample.triple.caption,
            "bucket": str(sample.bucket),
            "crop": vars(sample.crop),
            "masks": sample.recipe.hashed,
            "flip": sample.flip,
        }
        for sample in samples
    ]
    # 1 in every format: a run's order goes by this hash, and goes on in a cache that was made again in a newer one.
    text = json.dumps({"format": 1, "encoding": encoding, "samples": parts}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
