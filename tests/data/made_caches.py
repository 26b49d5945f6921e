"""Small real shards and caches of made-up samples, functions of their names: for tests that need no model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from data.cache.manifest import FORMAT_VERSION, Manifest, ShardTable, write_manifest
from data.cache.open_cache import Cache
from data.cache.shard_index import ShardIndex, count_hole_fractions
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.cache_layout import EMPTY_TEXT, full_mask_name, index_path
from data.encoders.stored_text import store_text
from data.samples.geometry import Bucket
from data.samples.plan import HOLDOUT, TRAIN

TEXT_LENGTH, TEXT_WIDTH, POOLED_WIDTH = 8, 6, 4


def _generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode()) >> 1)


def make_sample(key: str, bucket: Bucket, *, text: str, num_variants: int = 1) -> SampleTensors:
    """A sample that is a function of its key."""
    random = _generator_of(key)

    def latents() -> torch.Tensor:
        return torch.randn(bucket.latent_shape, generator=random).bfloat16()

    masks = [(torch.rand(bucket.height, bucket.width, generator=random) < 0.4).numpy() for _ in range(num_variants)]
    return SampleTensors(
        key=key,
        latents=latents(),
        masked_latents=[latents() for _ in range(num_variants)],
        masks=masks,
        text=text,
        tokens=int(torch.randint(1, TEXT_LENGTH, (), generator=random)),
        meta={"caption": f"the caption of {text}"},
    )


def make_text(text: str, text_dtype: str = "bf16") -> dict[str, torch.Tensor]:
    """A caption's tensors that are a function of the text's name."""
    random = _generator_of(text)
    t5 = torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=random)
    return store_text(t5, torch.randn(POOLED_WIDTH, generator=random), text_dtype)


def index_of(tar: Path) -> Path:
    """The file of the index of a shard that was written here."""
    return index_path(tar, FORMAT_VERSION)


def write_shard(
    path: Path,
    bucket: Bucket,
    keys: Sequence[str],
    *,
    num_texts: int = 2,
    num_variants: int = 1,
    text_dtype: str = "bf16",
) -> ShardIndex:
    """A shard whose samples share `num_texts` texts in turn."""
    texts = [f"text-{number:016x}" for number in range(min(num_texts, len(keys)))]
    with ShardWriter(path) as writer:
        for text in texts:
            writer.add_text(text, **make_text(text, text_dtype))
        for row, key in enumerate(keys):
            writer.add_sample(make_sample(key, bucket, text=texts[row % len(texts)], num_variants=num_variants))
        return writer.finish(plan=xxhash.xxh3_128_hexdigest(str(path.name).encode()))


def write_cache(folder: Path, shards: Sequence[tuple], *, num_variants: int = 1, text_dtype: str = "bf16") -> Cache:
    """A finished cache.  shards: (dataset, bucket, number of samples and, if it is not "train", split) of each."""
    rows = []
    for number, (dataset, bucket, samples, *split) in enumerate(shards):
        path = f"shards/{dataset}/{bucket}-{number:06d}.tar"
        keys = [f"{dataset}-{number}-{row}" for row in range(samples)]
        options: dict[str, Any] = {"num_variants": num_variants, "text_dtype": text_dtype}
        index = write_shard(folder / path, Bucket.parse(bucket), keys, **options)
        rows.append((path, dataset, bucket, *(split or [TRAIN]), samples, index))
    indexes = [row[-1] for row in rows]
    table = ShardTable(
        path=np.array([row[0] for row in rows]),
        dataset=np.array([row[1] for row in rows]),
        bucket=np.array([row[2] for row in rows]),
        split=np.array([row[3] for row in rows]),
        samples=np.array([row[4] for row in rows], dtype=np.int64),
        bytes=np.array([index.tar_bytes for index in indexes], dtype=np.int64),
        sha256=np.array([index.tar_sha256 for index in indexes]),
        plan=np.array([index.plan for index in indexes]),
    )
    datasets = sorted(set(table.dataset.tolist()))
    counts = {name: {TRAIN: 0, HOLDOUT: 0} for name in datasets}
    for row in rows:
        counts[row[1]][row[3]] += row[4]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        order_version=1,
        settings={},
        encoders={},
        vae_shift=0.1159,
        vae_scale=0.3611,
        text_length=TEXT_LENGTH,
        text_dtype=text_dtype,
        text_width=TEXT_WIDTH,
        pooled_width=POOLED_WIDTH,
        mask_variants=dict.fromkeys(datasets, num_variants),
        samples=counts,
        hole_fractions={name: count_hole_fractions(row[-1] for row in rows if row[1] == name) for name in datasets},
    )
    save_file(make_text("the empty caption", text_dtype), folder / EMPTY_TEXT)
    for name in set(table.bucket.tolist()):
        blank = torch.randn(Bucket.parse(name).latent_shape, generator=_generator_of(f"blank {name}"))
        save_file({"masked_latents": blank.bfloat16()}, folder / full_mask_name(name))
    return Cache(folder, write_manifest(folder, manifest, table), table)


def stored_shards(cache: Path) -> dict[Path, bytes]:
    """Path below a cache's folder -> bytes of every tar there."""
    return {path.relative_to(cache): path.read_bytes() for path in sorted(cache.rglob("*.tar"))}
