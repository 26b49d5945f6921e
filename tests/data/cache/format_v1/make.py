"""Writes the two small caches of format 1 that stay here for good: bf16/ and int8/, of tensors that are formulas.

Run once, with the first release's code. Never again after it: the point of these files is that later code reads what
the first wrote. A change of the format gets a version and a folder of its own.

    python tests/data/format_v1/make.py
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from data.cache.manifest import Manifest, ShardTable, write_manifest
from data.cache.shard_index import ShardIndex, count_hole_fractions
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.cache.validation_items import ValidationItem, write_validation_items
from data.cache_layout import EMPTY_TEXT, full_mask_name
from data.encoders.stored_text import store_text
from data.samples.geometry import Bucket, Pixels
from data.samples.plan import HOLDOUT, TRAIN

HERE = Path(__file__).resolve().parent
TEXT_LENGTH, TEXT_WIDTH, POOLED_WIDTH, VARIANTS = 16, 12, 8, 2
SHARDS = [  # path, dataset, bucket, split, number of samples
    ("shards/photos/32x48-000001.tar", "photos", "32x48", TRAIN, 3),
    ("shards/photos/48x32-000001.tar", "photos", "48x32", TRAIN, 2),
    ("shards/photos/holdout-32x48-000001.tar", "photos", "32x48", HOLDOUT, 1),
    ("shards/removal/32x48-000001.tar", "removal", "32x48", TRAIN, 2),
]


def numbers(name: str, *shape: int) -> torch.Tensor:
    """fp32 numbers of a name that bf16 holds exactly: multiples of 1/32 in -4..4, for any code to repeat."""
    start = xxhash.xxh3_64_intdigest(name.encode()) % 1009
    steps = (np.arange(np.prod(shape), dtype=np.int64) * 37 + start) % 257 - 128
    return torch.from_numpy(steps.astype(np.float32) / 32).reshape(shape)


def hole(name: str, bucket: Bucket) -> np.ndarray:
    """bool [H, W]: a box that hangs on the name."""
    top = xxhash.xxh3_64_intdigest(name.encode()) % 8
    mask = np.zeros((bucket.height, bucket.width), dtype=bool)
    mask[top : top + 16, 5:29] = True
    return mask


def sample_of(key: str, bucket: Bucket) -> SampleTensors:
    """The sample of a key; its text is one of two."""
    masks = [hole(f"{key} {variant}", bucket) for variant in range(VARIANTS)]
    text = f"text-{int(key.rpartition('-')[2]) % 2:016x}"
    latents = (16, *bucket.latent_size)
    return SampleTensors(
        key=key,
        latents=numbers(key, *latents).bfloat16(),
        masked_latents=[numbers(f"{key} {variant}", *latents).bfloat16() for variant in range(VARIANTS)],
        masks=masks,
        text=text,
        tokens=5,
        meta={"caption": f"the caption of {text} 一只猫"},
    )


def text_of(name: str, text_dtype: str) -> dict[str, torch.Tensor]:
    return store_text(
        numbers(f"t5 {name}", TEXT_LENGTH, TEXT_WIDTH), numbers(f"pooled {name}", POOLED_WIDTH), text_dtype
    )


def keys_of(path: str, count: int) -> list[str]:
    stem = path.removeprefix("shards/").removesuffix(".tar").replace("/", "-")
    return [f"{stem}-{number}" for number in range(count)]


def make(folder: Path, text_dtype: str, format_version: int = 1) -> None:
    """Write one cache.  format_version: another one's folder has the same samples."""
    indexes: list[ShardIndex] = []
    for path, _, bucket, _, count in SHARDS:
        samples = [sample_of(key, Bucket.parse(bucket)) for key in keys_of(path, count)]
        with ShardWriter(folder / path, format_version) as writer:
            for text in sorted({sample.text for sample in samples}):
                writer.add_text(text, **text_of(text, text_dtype))
            for sample in samples:
                writer.add_sample(sample)
            indexes.append(writer.finish(plan=xxhash.xxh3_128_hexdigest(path.encode())))
    save_file(text_of("", text_dtype), folder / EMPTY_TEXT)
    for bucket in sorted({shard[2] for shard in SHARDS}):
        blank = {"masked_latents": numbers(bucket, 16, *Bucket.parse(bucket).latent_size).bfloat16()}
        save_file(blank, folder / full_mask_name(bucket))
    path, dataset, bucket, split, _ = SHARDS[2]
    item = ValidationItem(f"{keys_of(path, 1)[0]}", split, dataset, path, 0, "a caption")
    grey = np.full((*hole("", Bucket.parse(bucket)).shape, 3), 90, dtype=np.uint8)
    write_validation_items(folder, [(item, Pixels(grey, grey, hole("", Bucket.parse(bucket))))], lambda: None)
    counts: dict[str, dict[str, int]] = {}
    for _, dataset, _, split, count in SHARDS:
        splits = counts.setdefault(dataset, {TRAIN: 0, HOLDOUT: 0})
        splits[split] += count
    columns = list(zip(*SHARDS, strict=True))
    table = ShardTable(
        *(np.array(column) for column in columns[:4]),
        samples=np.array(columns[4], dtype=np.int64),
        bytes=np.array([index.tar_bytes for index in indexes], dtype=np.int64),
        sha256=np.array([index.tar_sha256 for index in indexes]),
        plan=np.array([index.plan for index in indexes]),
    )
    manifest = Manifest(
        format_version=format_version,
        order_version=1,
        settings={"data.captions.text_length": TEXT_LENGTH, "data.captions.text_dtype": text_dtype},
        encoders={"vae": "0123456789abcdef0123456789abcdef"},
        vae_shift=0.1159,
        vae_scale=0.3611,
        text_length=TEXT_LENGTH,
        text_dtype=text_dtype,
        text_width=TEXT_WIDTH,
        pooled_width=POOLED_WIDTH,
        mask_variants=dict.fromkeys(counts, VARIANTS),
        samples=counts,
        hole_fractions={
            name: count_hole_fractions(index for index, shard in zip(indexes, SHARDS, strict=True) if shard[1] == name)
            for name in counts
        },
    )
    write_manifest(folder, manifest, table)


if __name__ == "__main__":
    for text_dtype in ("bf16", "int8"):
        shutil.rmtree(HERE / text_dtype, ignore_errors=True)
        make(HERE / text_dtype, text_dtype)
