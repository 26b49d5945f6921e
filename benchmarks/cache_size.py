"""How many bytes a cached sample takes, beside a cache of one file per sample and mask.

    python benchmarks/cache_size.py [--out benchmarks/results/cache_size.jsonl] [--folder TMP]

Real sizes: T5 512 x 4096, CLIP 768, 16 latent channels, at 512 and 1024 px. A shard of 256 MiB is written for each
case, as `fluxfill preprocess` fills it, and counted as `fluxfill shards show` counts it; the files on the disk are the
judge. Beside it one safetensors file for each sample and mask, with target latents, masked latents, mask (1 bit a
pixel) and text in bf16, as trainers that cache per sample store them: their sizes are measured too. The numbers are
random; no byte is compressed on either side.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.record import add_result
from data.cache.manifest import FORMAT_VERSION, Manifest, ShardTable
from data.cache.shard_index import ShardIndex, count_hole_fractions
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.cache_layout import index_path
from data.encoders.stored_text import store_text, text_bytes
from data.samples.geometry import Bucket
from data.samples.plan import TRAIN
from data.samples.shard_plan import sample_bytes
from data.show.statistics import count_cache

TEXT_LENGTH, TEXT_WIDTH, POOLED_WIDTH = 512, 4096, 768
SHARD_BYTES = 256 << 20  # data.shard_size_mib
PATH = "shards/photos/0.tar"


@dataclass(frozen=True)
class Case:
    """captions: "one" for all samples of the shard, or "unique".  masks: variants of each sample."""

    side: int
    captions: str
    masks: int
    text_dtype: str

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.side, self.side)

    @property
    def samples(self) -> int:
        """As many as fit a shard, by the rule of the planner."""
        text = text_bytes(TEXT_LENGTH, TEXT_WIDTH, self.text_dtype)
        each = sample_bytes(self.bucket, num_variants=self.masks)
        return (SHARD_BYTES - text) // each if self.captions == "one" else SHARD_BYTES // (each + text)


def cases() -> Iterator[Case]:
    for side in (512, 1024):
        for text_dtype in ("bf16", "int8"):
            for captions, masks in (("one", 1), ("unique", 1), ("unique", 4)):
                yield Case(side, captions, masks, text_dtype)


def make_tensors(case: Case) -> tuple[Tensor, np.ndarray, Tensor, Tensor]:
    """(latents bf16, mask, t5 fp32, pooled fp32) that stand for those of every sample: only their sizes count."""
    random = torch.Generator().manual_seed(case.side)
    latents = torch.randn(case.bucket.latent_shape, generator=random).bfloat16()
    mask = torch.rand(case.side, case.side, generator=random).numpy() < 0.3
    t5 = torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=random)
    return latents, mask, t5, torch.randn(POOLED_WIDTH, generator=random)


def write_shard(path: Path, case: Case) -> ShardIndex:
    """One full shard of a case."""
    latents, mask, t5, pooled = make_tensors(case)
    text = store_text(t5, pooled, case.text_dtype)
    texts = 1 if case.captions == "one" else case.samples
    with ShardWriter(path) as writer:
        for number in range(texts):
            writer.add_text(f"text-{number:016x}", **text)
        for number in range(case.samples):
            writer.add_sample(
                SampleTensors(
                    key=f"a-picture-of-some-name-{number:016x}",
                    latents=latents,
                    masked_latents=[latents] * case.masks,
                    masks=[mask] * case.masks,
                    text=f"text-{number % texts:016x}",
                    tokens=40,
                    meta={
                        "caption": "a photograph of a harbour at dusk, boats in front of warehouses",
                        "dataset": "photos",
                        "target": f"harbours/a-picture-of-some-name-{number}.png",
                        "original_size": [3000, 4000],
                        "resized": [case.side, case.side],
                        "crop": [0, 0, case.side, case.side],
                        "fingerprint": "0" * 32,
                    },
                )
            )
        return writer.finish(plan="0" * 32)


def describe(case: Case, shards: Mapping[str, ShardIndex]) -> tuple[Manifest, ShardTable]:
    """The manifest of a cache of a case's shards. shards: path below the cache -> index."""
    indexes = list(shards.values())
    table = ShardTable(
        path=np.array(list(shards)),
        dataset=np.array(["photos"] * len(indexes)),
        bucket=np.array([str(case.bucket)] * len(indexes)),
        split=np.array([TRAIN] * len(indexes)),
        samples=np.array([index.num_samples for index in indexes]),
        bytes=np.array([index.tar_bytes for index in indexes]),
        sha256=np.array([index.tar_sha256 for index in indexes]),
        plan=np.array([index.plan for index in indexes]),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        order_version=1,
        settings={},
        encoders={},
        vae_shift=0.1159,
        vae_scale=0.3611,
        text_length=TEXT_LENGTH,
        text_dtype=case.text_dtype,
        text_width=TEXT_WIDTH,
        pooled_width=POOLED_WIDTH,
        mask_variants={"photos": case.masks},
        samples={"photos": {TRAIN: int(table.samples.sum())}},
        hole_fractions={"photos": count_hole_fractions(indexes)},
    )
    return manifest, table


def file_per_mask(folder: Path, case: Case) -> int:
    """Bytes of one file as per-sample caches store a sample and mask."""
    latents, mask, t5, pooled = make_tensors(case)
    path = folder / "one.safetensors"
    packed = torch.from_numpy(np.packbits(mask, axis=1))
    text = store_text(t5, pooled, "bf16")
    save_file({"latents": latents, "masked_latents": latents.clone(), "mask": packed, **text}, path)
    return path.stat().st_size


def measure(folder: Path, case: Case) -> dict:
    """Bytes per sample of one case, all its masks included."""
    folder.mkdir()
    tar = folder / PATH
    counted = count_cache(folder, *describe(case, {PATH: write_shard(tar, case)}), [0], lambda: None)
    if counted.bytes != tar.stat().st_size or sum(counted.parts.values()) != counted.bytes:
        raise RuntimeError(f"{case}: counted {counted.bytes} bytes, the file has {tar.stat().st_size}")
    apart = case.masks * file_per_mask(folder, case)
    each = counted.bytes / case.samples
    index = index_path(tar, FORMAT_VERSION).stat().st_size / case.samples
    shutil.rmtree(folder)
    return {
        "benchmark": "cache_size",
        **vars(case),
        "samples": case.samples,
        "bytes_per_sample": round(each),
        "parts": {part: round(size / case.samples) for part, size in counted.parts.items()},
        "index_bytes_per_sample": round(index),
        "file_per_mask_bytes_per_sample": apart,
        "times_smaller": round(apart / (each + index), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the results to this file, a JSON line each")
    parser.add_argument("--folder", type=Path, help="where the shards are written, one after another")
    options = parser.parse_args()
    shown = Table("px", "captions", "masks", "T5")
    for column in ("samples a shard", "MiB a sample", "a file per mask", "times smaller"):
        shown.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number, case in enumerate(cases()):
            result = measure(Path(folder) / str(number), case)
            add_result(result, options.out)
            sizes = (result["bytes_per_sample"], result["file_per_mask_bytes_per_sample"])
            what = (str(case.side), case.captions, str(case.masks), case.text_dtype, str(case.samples))
            shown.add_row(*what, *(f"{size / 2**20:.3f}" for size in sizes), f"{result['times_smaller']:.2f}")
    Console().print(shown)


if __name__ == "__main__":
    main()
