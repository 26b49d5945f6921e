"""Which sample goes into which shard: a pure function of the pictures, whatever machines encode them.

Samples of one dataset, bucket and split are split by the bits of a hash until each part fits a shard, as in extendible
hashing. So a new, changed or removed picture touches the one shard it hashes to (now and then two), and equal captions
end up together, where their text is stored once.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from data.geometry import Bucket, Crop
from data.manifest import FORMAT_VERSION
from data.mask_recipe import OWN_MASKS, MaskRecipe
from data.sources import Triple


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A triple with all that is decided before its pictures are decoded.

    size: upright (width, height).  recipe: how its masks are made.  flip: it is the mirror image of its triple.
    """

    triple: Triple
    size: tuple[int, int]
    bucket: Bucket
    crop: Crop
    split: str
    recipe: MaskRecipe = OWN_MASKS
    flip: bool = False

    @property
    def key(self) -> str:
        """Its name inside a shard, at most 75 letters, digits, - and _."""
        return f"{self.triple.key}-flip" if self.flip else self.triple.key

    @property
    def text(self) -> str:
        """Name of its caption's text member."""
        return text_name(self.triple.caption)


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be.  path: below the cache folder.  plan: 32 hex digits over all that shapes its bytes."""

    path: str
    dataset: str
    bucket: Bucket
    split: str
    samples: tuple[PlannedSample, ...]
    plan: str


def text_name(caption: str) -> str:
    return f"text-{xxhash.xxh3_64_hexdigest(caption.encode())}"


def sample_bytes(bucket: Bucket, *, num_variants: int) -> int:
    """About what a sample takes in its tar, without its text: latents, variants, headers and JSON."""
    h, w = bucket.latent_size
    latents = 16 * h * w * 2
    return latents + num_variants * (latents + bucket.height * bucket.width // 8 + 1024) + 2048


def plan_shards(
    samples: Sequence[PlannedSample], *, size_limit: int, text_bytes: int, encoding: Mapping[str, object]
) -> list[ShardPlan]:
    """Deal samples to shards of at most `size_limit` bytes (a single larger sample gets one of its own).

    text_bytes: of one caption's member.  encoding: what else shapes the stored tensors (encoders, text length): its
    change makes every shard another one.
    """
    groups: dict[tuple[str, Bucket, str], list[PlannedSample]] = defaultdict(list)
    for sample in samples:
        groups[sample.triple.dataset, sample.bucket, sample.split].append(sample)
    plans = []
    for (dataset, bucket, split), members in sorted(groups.items()):
        each = sample_bytes(bucket, num_variants=members[0].recipe.variants)  # one recipe a dataset
        for leaf, part in _split(_with_hashes(members, size_limit // 2 // each), 1, each, text_bytes, size_limit):
            part.sort(key=lambda sample: (sample.text, sample.key))
            name = f"{bucket}-{leaf:06d}" if split == "train" else f"{split}-{bucket}-{leaf:06d}"
            plan = _plan_hash(part, encoding)
            plans.append(ShardPlan(f"shards/{dataset}/{name}.tar", dataset, bucket, split, tuple(part), plan))
    return plans


def _with_hashes(samples: Sequence[PlannedSample], crowd: int) -> list[tuple[int, PlannedSample]]:
    """Each sample with 64 bits that place it: its caption's, so that equal captions meet; its own where a caption has
    more than `crowd` samples, which no bit of the caption's could part."""
    sharing = Counter(sample.text for sample in samples)
    return [
        (
            xxhash.xxh3_64_intdigest((s.key if sharing[s.text] > crowd else s.text).encode()),
            s,
        )
        for s in samples
    ]


def _split(
    samples: list[tuple[int, PlannedSample]], leaf: int, each: int, text_bytes: int, size_limit: int
) -> Iterator[tuple[int, list[PlannedSample]]]:
    """(leaf number, samples) of every part that fits. The root is leaf 1, the halves of leaf n are 2n and 2n + 1."""
    num_texts = len({sample.text for _, sample in samples})
    depth = leaf.bit_length() - 1
    if len(samples) <= 1 or depth >= 64 or len(samples) * each + num_texts * text_bytes <= size_limit:
        yield leaf, [sample for _, sample in samples]
        return
    for bit in (0, 1):
        half = [(bits, sample) for bits, sample in samples if bits >> (63 - depth) & 1 == bit]
        if half:
            yield from _split(half, 2 * leaf + bit, each, text_bytes, size_limit)


def _plan_hash(samples: Sequence[PlannedSample], encoding: Mapping[str, object]) -> str:
    parts = [
        {
            "key": sample.key,
            "content": sample.triple.content,
            "caption": sample.triple.caption,
            "bucket": str(sample.bucket),
            "crop": vars(sample.crop),
            "masks": vars(sample.recipe),
            "flip": sample.flip,
        }
        for sample in samples
    ]
    text = json.dumps({"format": FORMAT_VERSION, "encoding": encoding, "samples": parts}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
