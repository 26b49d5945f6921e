"""The printed estimate of a preprocessing job: counts, bytes by part, shards to do, measured hours."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.data_schema import DataConfig
from data.encoders.device import raise_out_of_memory
from data.encoders.encode import collate_pixels, encode_captions, encode_pixels
from data.encoders.load import Encoders
from data.preprocessing.worker import Worker
from data.samples.decode import load_pixels
from data.samples.geometry import Bucket
from data.samples.plan import PlannedSample
from data.samples.shard_plan import PlannedShard

_REST_BYTES = 3072  # of a sample: headers of tar and safetensors, JSON


def print_counts(console: Console, cache: Path, plans: Sequence[PlannedShard], todo: Sequence[PlannedShard]) -> None:
    """A row for each dataset, bucket and split: pictures and shards, and how many of them are still to be made."""
    numbers = ("pictures", "to encode", "shards", "to write")
    table = Table("dataset", "bucket", "split", *numbers, title=f"cache {escape(str(cache))}", title_justify="left")
    for column in table.columns[3:]:
        column.justify = "right"
    counts: dict[tuple[str, Bucket, str], Counter[str]] = defaultdict(Counter)
    for plan in plans:
        counts[plan.dataset, plan.bucket, plan.split] += Counter({"pictures": len(plan.samples), "shards": 1})
    for plan in todo:
        counts[plan.dataset, plan.bucket, plan.split] += Counter({"to encode": len(plan.samples), "to write": 1})
    for (dataset, bucket, split), count in sorted(counts.items()):
        table.add_row(dataset, str(bucket), split, *(str(count[number]) for number in numbers))
    console.print(table)


def bytes_by_part(plans: Sequence[PlannedShard], *, text_bytes: int) -> dict[str, int]:
    """Bytes of a cache by what they hold.  text_bytes: of one caption."""
    parts: Counter[str] = Counter()
    for plan in plans:
        count, latents = len(plan.samples), math.prod(plan.bucket.latent_shape) * 2
        masks = sum(sample.recipe.variants for sample in plan.samples)
        parts["latents"] += count * latents
        parts["masked latents"] += masks * latents
        parts["masks"] += masks * plan.bucket.mask_bytes
        parts["texts"] += len({sample.text for sample in plan.samples}) * text_bytes
        parts["headers and JSON, about"] += count * _REST_BYTES
    return dict(parts)


def print_bytes(console: Console, parts: dict[str, int]) -> None:
    listing = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in parts.items())
    console.print(f"{sum(parts.values()) / 2**30:.2f} GiB in all: {listing}.", highlight=False)


@dataclass(frozen=True)
class Estimate:
    """Seconds that the shards to do take one worker: of its device (of the busier one, where text has its own), and
    of its decoding threads, which run beside each other."""

    device: float
    decode: float


def measure(
    todo: Sequence[PlannedShard], encoders: Encoders, data: DataConfig, worker: Worker, console: Console
) -> Estimate:
    """Encode one batch of every size there is, of this very data on this very device, and scale by the counts.

    The size is that of the fullest bucket near each resolution: buckets of one have about the same area.
    """
    vae = text = decode = 0.0
    for plans in _by_size(todo, data):
        count = sum(len(plan.samples) for plan in plans)
        captions = sum(len({sample.text for sample in plan.samples}) for plan in plans)
        fullest = max(plans, key=lambda plan: len(plan.samples))
        samples = fullest.samples[: data.encode_batch_size]
        pictures = samples[: data.pictures_at_once(fullest.bucket.pixels)]
        decode_each = _time_decoding(samples, data, worker.decode_threads)
        vae_each = time_pixels(pictures, encoders, data)
        text_each = time_captions(samples, encoders, data)
        vae += count * vae_each
        text += captions * text_each
        decode += count * decode_each
        console.print(
            f"{fullest.bucket}, measured: VAE {1 / vae_each:.1f} pictures/s, {len(pictures)} at once, "
            f"text {1 / text_each:.1f} captions/s, {len(samples)} at once, "
            f"decoding {1 / decode_each:.1f} pictures/s by {worker.decode_threads} threads",
            highlight=False,
        )
    return Estimate(max(vae, text) if encoders.text_has_its_own_device else vae + text, decode)


def print_hours(console: Console, estimate: Estimate, worker: Worker) -> None:
    seconds = max(estimate.device, estimate.decode)
    slower = "the encoders" if estimate.device >= estimate.decode else "decoding"
    all_of_them = f", {_hours(seconds / worker.count)} with {worker.count} like it" if worker.count > 1 else ""
    console.print(f"About {_hours(seconds)} with one such worker{all_of_them}; {slower} set the pace.", highlight=False)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _by_size(todo: Sequence[PlannedShard], data: DataConfig) -> list[list[PlannedShard]]:
    """Shards by the resolution whose area is nearest to theirs, and by the masks of a picture."""
    sizes: dict[tuple[int, int], list[PlannedShard]] = defaultdict(list)
    for plan in todo:
        side = (plan.bucket.height * plan.bucket.width) ** 0.5
        nearest = min(data.resolution, key=lambda resolution: abs(resolution - side))
        sizes[nearest, plan.samples[0].recipe.variants].append(plan)
    return [plans for _, plans in sorted(sizes.items())]


def _time_decoding(samples: Sequence[PlannedSample], data: DataConfig, threads: int) -> float:
    """Seconds per picture with all threads at work."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        many = [*samples] * -(-2 * threads // len(samples))
        list(pool.map(partial(load_pixels, data=data), many))
    return (time.perf_counter() - start) / len(many)


def time_pixels(samples: Sequence[PlannedSample], encoders: Encoders, data: DataConfig) -> float:
    """Seconds per picture, the second time."""
    batch = collate_pixels([load_pixels(sample, data) for sample in samples])
    for _ in range(2):
        start = time.perf_counter()
        with raise_out_of_memory(encoders.vae.device, f"encode {len(samples)} pictures at once"):
            encode_pixels(encoders.vae, batch)
            _wait_for(encoders.vae.device)
    return (time.perf_counter() - start) / len(samples)


def time_captions(samples: Sequence[PlannedSample], encoders: Encoders, data: DataConfig) -> float:
    """Seconds per caption, the second time."""
    captions = [sample.triple.caption for sample in samples]
    for _ in range(2):
        start = time.perf_counter()
        with raise_out_of_memory(encoders.text.t5.device, f"encode {len(captions)} captions at once"):
            encode_captions(encoders.text, captions, text_length=data.captions.text_length)
            _wait_for(encoders.text.t5.device)
    return (time.perf_counter() - start) / len(captions)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
