"""How fast cached samples reach assembled batches: this reader, WebDataset with a DataLoader, and `cat`, side by side.

    python benchmarks/reader.py [--out benchmarks/results/reader.jsonl] [--folder TMP] [--gib 1.5] [--repeats 7]

Samples of the real sizes (a T5 text of 512 x 4096 of its own for each, one mask), at 512 and 1024 px, from a warm page
cache; checksums on. Two reader threads against two DataLoader workers, batches of the same size, runs alternating. The
reader's rate is given twice: bytes alone, as the others do, and with the noise and sigma that it draws for each sample.
WebDataset gets tars as its users write them, one member a sample, and stacks in the workers; neither it nor `cat`
checks anything. Rates count the bytes of tensors in batches; those of `cat` the tars.

`cat` reads into 128 KiB that never leave the processor's cache. Batches that fit there too (of 2 samples: 9 and 11 MB,
two or three of them in use) come as fast; with larger ones the memory's speed is the limit, as --batch-sizes shows.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset import TarWriter, WebDataset

from benchmarks.record import add_result
from data.batches.batch_stream import BatchStream
from data.batches.cached_rows import CachedRows
from data.batches.order import Order, OrderSettings, hash_shards
from data.cache.manifest import FORMAT_VERSION, Manifest, ShardTable
from data.cache.open_cache import Cache
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.samples.geometry import Bucket
from data.samples.plan import TRAIN

TEXT_LENGTH, TEXT_WIDTH, POOLED_WIDTH = 512, 4096, 768
SHARD_BYTES = 256 << 20  # data.shard_size_mib
GLOBAL_BATCH_SIZE = 16
WORKERS = 2
SETTLE_SECONDS = 0.5  # after WebDataset: its workers go on until their queues are full
PASSES = 4  # over all samples in a run, of what is fast: `cat` and this reader
TENSORS = ("latents", "masked_latents", "mask", "t5", "pooled")


class SampleMaker:
    """Made-up samples of one size; the numbers repeat, at other offsets, as no reader looks at them."""

    def __init__(self, side: int) -> None:
        random = torch.Generator().manual_seed(side)
        self.bucket = Bucket(side, side)
        self._numbers = torch.randn(TEXT_LENGTH * TEXT_WIDTH + 10_000, generator=random).bfloat16()
        self._mask = torch.rand(side, side, generator=random).numpy() < 0.3

    def take(self, offset: int, *shape: int) -> Tensor:
        return self._numbers[offset : offset + int(np.prod(shape))].view(shape).clone()

    def sample(self, number: int) -> tuple[SampleTensors, dict[str, Tensor]]:
        """A sample and the tensors of its text."""
        latents = self.bucket.latent_shape
        text = {
            "t5": self.take(number, TEXT_LENGTH, TEXT_WIDTH),
            "pooled": self.take(number, POOLED_WIDTH),
        }
        sample = SampleTensors(
            key=f"sample-{number:06d}",
            latents=self.take(number + 1, *latents),
            masked_latents=[self.take(number + 2, *latents)],
            masks=[self._mask],
            text=f"text-{number:06d}",
            tokens=TEXT_LENGTH,
            meta={"caption": f"caption {number}"},
        )
        return sample, text


def sample_bytes(side: int) -> int:
    """Bytes of a sample's tensors."""
    latents = 2 * int(np.prod(Bucket(side, side).latent_shape))
    return 2 * latents + side * side // 8 + 2 * (TEXT_LENGTH * TEXT_WIDTH + POOLED_WIDTH)


def write_cache(folder: Path, side: int, num_samples: int) -> Cache:
    """A cache of shards as `fluxfill preprocess` writes them."""
    maker = SampleMaker(side)
    per_shard = SHARD_BYTES // sample_bytes(side)
    rows = []
    for first in range(0, num_samples, per_shard):
        made = [maker.sample(number) for number in range(first, min(first + per_shard, num_samples))]
        path = f"shards/photos/{side}x{side}-{first // per_shard:06d}.tar"
        with ShardWriter(folder / path) as writer:
            for sample, text in made:
                writer.add_text(sample.text, **text)
            for sample, _ in made:
                writer.add_sample(sample)
            rows.append((path, len(made), writer.finish(plan="0" * 32)))
    table = ShardTable(
        path=np.array([path for path, _, _ in rows]),
        dataset=np.array(["photos"] * len(rows)),
        bucket=np.array([str(maker.bucket)] * len(rows)),
        split=np.array([TRAIN] * len(rows)),
        samples=np.array([count for _, count, _ in rows]),
        bytes=np.array([index.tar_bytes for _, _, index in rows]),
        sha256=np.array([index.tar_sha256 for _, _, index in rows]),
        plan=np.array([index.plan for _, _, index in rows]),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        order_version=1,
        settings={},
        encoders={},
        vae_shift=0.1159,
        vae_scale=0.3611,
        text_length=TEXT_LENGTH,
        text_dtype="bf16",
        text_width=TEXT_WIDTH,
        pooled_width=POOLED_WIDTH,
        mask_variants={"photos": 1},
        samples={},
        hole_fractions={},
    )
    return Cache(folder, manifest, table)


def write_plain_tars(folder: Path, side: int, num_samples: int) -> list[str]:
    """The same samples as a WebDataset user would store them: all tensors of one in one member."""
    maker = SampleMaker(side)
    per_shard = SHARD_BYTES // sample_bytes(side)
    folder.mkdir()
    paths = []
    for first in range(0, num_samples, per_shard):
        paths.append(str(folder / f"{first // per_shard:06d}.tar"))
        with TarWriter(paths[-1], encoder=False) as tar:
            for number in range(first, min(first + per_shard, num_samples)):
                sample, text = maker.sample(number)
                tensors = text | {
                    "latents": sample.latents,
                    "masked_latents": sample.masked_latents[0],
                    "mask": torch.from_numpy(np.packbits(sample.masks[0], axis=1)),
                }
                tar.write({"__key__": sample.key, "safetensors": save(tensors)})
    return paths


def _load_member(sample: dict) -> dict[str, Tensor]:
    return load(sample["safetensors"])


def _stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in TENSORS}


def open_webdataset(paths: list[str], batch_size: int) -> DataLoader:
    """WebDataset's reader in worker processes, batches stacked there, nothing shuffled."""
    dataset = WebDataset(paths, shardshuffle=False).map(_load_member).batched(batch_size, collation_fn=_stack)
    return DataLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True, prefetch_factor=4)


def open_stream(cache: Cache, batch_size: int) -> BatchStream:
    """This project's reader over a cache."""
    table = cache.table
    settings = OrderSettings.current(
        seed=0,
        global_batch_size=max(GLOBAL_BATCH_SIZE, batch_size),
        weights={"photos": 1.0},
        shards=hash_shards(table.path, table.samples, table.plan),
    )
    order = Order(table.dataset, table.bucket, table.samples, settings)
    rows = CachedRows(cache, order, threads=WORKERS)
    return BatchStream(cache.manifest, order, rows, rank=0, world_size=1, micro_batch_size=batch_size)


def _draw_nothing(seed: int, position: int, out: np.ndarray) -> None:
    """In the place of `draw_noise`. A plain function: a mock takes longer than reading a small row."""


def rate(batches: Iterator, count: Callable[[Any], int], num_samples: int) -> float:
    """Samples per second, after a few batches that are not counted."""
    for _ in range(4):
        next(batches)
    start, seen = time.perf_counter(), 0
    while seen < num_samples:
        seen += count(next(batches))
    return seen / (time.perf_counter() - start)


def _endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def _micro_batches(stream: BatchStream) -> Iterator:
    for batch in stream:
        yield from batch


def rate_of_cat(paths: list[Path]) -> float:
    """Bytes per second."""
    start = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, paths * PASSES)], stdout=nowhere, check=True)
    return PASSES * sum(path.stat().st_size for path in paths) / (time.perf_counter() - start)


def measure(cache: Cache, plain: list[str], side: int, batch_size: int, *, repeats: int) -> dict:
    """All rates at one size of samples and batches, each the median of `repeats` alternating runs.

    plain: the tars that WebDataset reads.
    """
    size, num_samples = sample_bytes(side), int(cache.table.samples.sum())
    tars = [cache.folder / str(path) for path in cache.table.path]
    webdataset = _endless(open_webdataset(plain, batch_size))
    runs: dict[str, list[float]] = {name: [] for name in ("cat", "webdataset", "fluxfill", "fluxfill_with_noise")}
    rate_of_cat(tars)
    rate_of_cat([Path(path) for path in plain])
    for _ in range(repeats):
        runs["cat"].append(rate_of_cat(tars))
        runs["webdataset"].append(rate(webdataset, lambda batch: len(batch["t5"]), num_samples))
        time.sleep(SETTLE_SECONDS)
        for name in ("fluxfill", "fluxfill_with_noise"):
            stream = open_stream(cache, batch_size)
            no_noise = mock.patch("data.batches.row_filler.draw_noise", _draw_nothing)
            with no_noise if name == "fluxfill" else nullcontext():
                runs[name].append(rate(_micro_batches(stream), lambda rows: len(rows.weight), PASSES * num_samples))
                stream.close()
    medians = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "benchmark": "reader",
        "side": side,
        "sample_bytes": size,
        "samples": num_samples,
        "batch_size": batch_size,
        "threads": WORKERS,
        "repeats": repeats,
        "cat_gb_per_s": round(medians["cat"] / 1e9, 2),
        **{
            f"{name}_{key}": value
            for name in ("webdataset", "fluxfill", "fluxfill_with_noise")
            for key, value in (
                ("samples_per_s", round(medians[name], 1)),
                ("gb_per_s", round(medians[name] * size / 1e9, 2)),
            )
        },
        "times_webdataset": round(medians["fluxfill"] / medians["webdataset"], 1),
        "share_of_cat": round(medians["fluxfill"] * size / medians["cat"], 2),
        "runs": {name: [float(f"{value:.4g}") for value in values] for name, values in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the results here, a JSON line per size")
    parser.add_argument("--folder", type=Path, help="where the samples are written (default: the tmp folder)")
    parser.add_argument("--gib", type=float, default=1.5, help="samples of each size, twice: for us and for WebDataset")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2], help="rows a forward pass")
    options = parser.parse_args()
    for side in options.sides:
        folder = Path(tempfile.mkdtemp(prefix="reader-benchmark-", dir=options.folder))
        try:
            num_samples = int(options.gib * 2**30) // sample_bytes(side)
            cache = write_cache(folder / "cache", side, num_samples)
            plain = write_plain_tars(folder / "plain", side, num_samples)
            for batch_size in options.batch_sizes:
                add_result(measure(cache, plain, side, batch_size, repeats=options.repeats), options.out)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
