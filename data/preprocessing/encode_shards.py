"""Planned shards -> tars and indexes. Reading, decoding, encoding and writing overlap, across the shards' borders too:

    threads of their own    claim a shard, decode its pictures, collate a batch (pinned)      ahead of the device
    the calling thread      queue the batch's work on the device, never waiting for it
    a thread of its own     wait for the tensors, write, hash, fsync, rename                  behind it: write_shards.py

A shard's batches depend on its plan and data.encode_batch_size alone, so its bytes do not depend on who makes it.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.data_schema import DataConfig
from data.encoders.device import HostCopy, raise_out_of_memory
from data.encoders.encode import PixelBatch, collate_pixels, encode_captions, encode_pixels
from data.encoders.load import Encoders
from data.encoders.stored_text import store_text
from data.preprocessing.run_ahead import run_ahead
from data.preprocessing.shard_queue import ShardQueue
from data.preprocessing.write_shards import EncodedTexts, ShardWriting
from data.samples.decode import DecodedBatch, decode_batches, in_batches
from data.samples.plan import PlannedSample
from data.samples.shard_plan import PlannedShard

_BATCHES_AHEAD = 2  # decoded and collated, besides those in the decoding threads


@dataclass(frozen=True)
class _BatchOfShard:
    """Which batch of a shard it is.  texts: the shard's, with its first batch."""

    plan: PlannedShard
    texts: Iterator[EncodedTexts] | None
    is_last: bool


@dataclass(frozen=True)
class _ReadyBatch:
    """A batch as the device takes it.  pixels: None if no sample of it could be decoded."""

    place: _BatchOfShard
    samples: list[PlannedSample]
    pixels: PixelBatch | None
    problems: list[str]


def encode_shards(
    cache: Path,
    shards: Iterable[PlannedShard],
    queue: ShardQueue,
    encoders: Encoders,
    data: DataConfig,
    *,
    threads: int,
) -> None:
    """Make every shard of `shards`, which are claimed from `queue` as they are asked for.

    threads: that decode.
    A picture that cannot be decoded is reported to the queue and stops its shard alone; anything else that is raised
    (DiskFull, InputError where a device has no memory) leaves no part of a shard behind.
    """
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
        closing(_ready_batches(shards, encoders, data, pool, threads)) as batches,
        ShardWriting(cache, queue) as writing,
    ):
        for batch in batches:
            plan = batch.place.plan
            if batch.place.texts is not None:
                for texts in batch.place.texts:
                    writing.add_texts(plan, texts)
            writing.add_problems(plan, batch.problems)
            if batch.pixels is not None and not writing.has_problems(plan):  # else only to find all that is wrong
                with raise_out_of_memory(encoders.vae.device, f"encode {len(batch.samples)} pictures at once"):
                    encoded = encode_pixels(encoders.vae, batch.pixels)
                    latents, masked = (HostCopy(t.bfloat16()) for t in (encoded.latents, encoded.masked_latents))
                writing.add_samples(plan, batch.samples, batch.pixels.masks, latents, masked)
            queue.advance(len(batch.samples) + len(batch.problems))
            if batch.place.is_last:
                writing.finish(plan)


def _ready_batches(
    shards: Iterable[PlannedShard], encoders: Encoders, data: DataConfig, pool: ThreadPoolExecutor, threads: int
) -> Generator[_ReadyBatch]:
    """All batches of all shards in order, decoded and collated ahead of their use."""
    with_texts = ((plan, _encode_texts(plan, encoders, data)) for plan in shards)
    if encoders.text_has_its_own_device:
        # There a shard's text is encoded while the VAE is busy with the shard before.
        with_texts = run_ahead(((plan, iter(list(texts))) for plan, texts in with_texts), depth=1)
    ahead = -(-2 * threads // data.encode_batch_size)
    decoded = decode_batches(_split_into_batches(with_texts, data), data, pool, ahead=ahead)
    return run_ahead((_make_ready(batch, encoders.vae.device) for batch in decoded), _BATCHES_AHEAD)


def _split_into_batches(
    shards: Iterable[tuple[PlannedShard, Iterator[EncodedTexts]]], data: DataConfig
) -> Iterator[tuple[_BatchOfShard, Sequence[PlannedSample]]]:
    for plan, texts in shards:
        count, size = len(plan.samples), data.pictures_at_once(plan.bucket.pixels)
        for first in range(0, count, size):
            place = _BatchOfShard(plan, texts if first == 0 else None, is_last=first + size >= count)
            yield place, plan.samples[first : first + size]


def _encode_texts(plan: PlannedShard, encoders: Encoders, data: DataConfig) -> Iterator[EncodedTexts]:
    """Each caption of a shard once."""
    captions = {sample.text: sample.triple.caption for sample in plan.samples}
    for names in in_batches(captions, data.encode_batch_size):
        batch, length = [captions[name] for name in names], data.captions.text_length
        with raise_out_of_memory(encoders.text.t5.device, f"encode {len(batch)} captions at once"):
            text = encode_captions(encoders.text, batch, text_length=length)
            stored = store_text(text.t5, text.pooled, data.captions.text_dtype)
            copies = {name: HostCopy(tensor) for name, tensor in stored.items()}
        yield EncodedTexts(names, copies, text.tokens)


def _make_ready(batch: DecodedBatch[_BatchOfShard], device: torch.device) -> _ReadyBatch:
    pixels = collate_pixels(batch.pixels, device=device) if batch.pixels else None
    return _ReadyBatch(batch.tag, batch.samples, pixels, batch.problems)
