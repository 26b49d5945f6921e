"""Planned shards -> tars and indexes. Reading, decoding, encoding and writing overlap, across the shards' borders too:

    threads of their own    claim a shard, decode its pictures, collate a batch (pinned)      ahead of the device
    the calling thread      queue the batch's work on the device, never waiting for it
    a thread of its own     wait for the tensors, write, hash, fsync, rename                  behind the device

A shard's batches are a matter of its plan and the batch size alone, so its bytes do not hang on who makes it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import DataConfig
from data.cache.shard_writer import NotFinite, SampleTensors, ShardWriter
from data.encoders.device import raise_out_of_memory
from data.encoders.encode import HostCopy, PixelBatch, collate_pixels, encode_captions, encode_pixels
from data.encoders.load import Encoders
from data.encoders.stored_text import store_text
from data.preprocessing.run_ahead import run_ahead
from data.preprocessing.shard_queue import ShardQueue
from data.samples.decode import DecodedBatch, decode_batches, in_batches
from data.samples.shard_plan import PlannedSample, PlannedShard
from data.sources.triples import listed

_BATCHES_AHEAD = 2  # decoded and collated, besides those in the decoding threads
_BYTES_BEHIND = 512 << 20  # of tensors that wait to be written: while a shard is flushed, the next goes on


@dataclass(frozen=True)
class _Texts:
    """A batch of captions on its way to the host.  names: of their members.  tensors: what each stores, stacked.
    tokens: real ones of each."""

    names: Sequence[str]
    tensors: dict[str, HostCopy]
    tokens: Sequence[int]


@dataclass(frozen=True)
class _Place:
    """Where a batch stands.  texts: its shard's, if it is the first."""

    plan: PlannedShard
    texts: Iterator[_Texts] | None
    is_last: bool


@dataclass(frozen=True)
class _ReadyBatch:
    """A batch as the device takes it, if its samples could be decoded."""

    place: _Place
    samples: list[PlannedSample]
    pixels: PixelBatch | None
    problems: list[str]


def encode_shards(
    cache: Path,
    shards: Iterable[PlannedShard],
    backlog: ShardQueue,
    encoders: Encoders,
    data: DataConfig,
    *,
    threads: int,
) -> None:
    """Make every shard of `shards`, which are claimed from `backlog` as they are asked for.

    threads: that decode.
    A picture that cannot be decoded is told to the backlog and stops its shard alone; anything else that is raised
    (DiskFull, InputError where a device has no memory) leaves no part of a shard behind.
    """
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
        closing(_ready_batches(shards, encoders, data, pool, threads)) as batches,
        _Writing(cache, backlog) as writing,
    ):
        for batch in batches:
            plan = batch.place.plan
            if batch.place.texts is not None:
                for texts in batch.place.texts:
                    writing.add_texts(plan, texts)
            writing.add_problems(plan, batch.problems)
            if batch.pixels is not None and not writing.has_problems(plan):  # else only to find all that is wrong
                doing = f"encode {len(batch.samples)} pictures at once"
                with raise_out_of_memory(encoders.vae.device, doing):
                    encoded = encode_pixels(encoders.vae, batch.pixels)
                    latents, masked = (HostCopy(t.bfloat16()) for t in (encoded.latents, encoded.masked_latents))
                writing.add_samples(plan, batch.samples, batch.pixels.masks, latents, masked)
            backlog.advance(len(batch.samples) + len(batch.problems))
            if batch.place.is_last:
                writing.finish(plan)


# --- ahead of the device ----------------------------------------------------------------------------------------------


def _ready_batches(
    shards: Iterable[PlannedShard],
    encoders: Encoders,
    data: DataConfig,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Generator[_ReadyBatch]:
    """All batches of all shards in order, decoded and collated ahead of their use."""
    if encoders.text_has_its_own_device:
        # There a shard's text is encoded while the VAE is busy with the shard before.
        with_texts = run_ahead(((plan, iter(list(_encode_texts(plan, encoders, data)))) for plan in shards), depth=1)
    else:
        with_texts = ((plan, _encode_texts(plan, encoders, data)) for plan in shards)
    ahead = -(-2 * threads // data.encode_batch_size)
    decoded = decode_batches(_split_into_batches(with_texts, data.encode_batch_size), data, pool, ahead=ahead)
    return run_ahead((_make_ready(batch, encoders.vae.device) for batch in decoded), _BATCHES_AHEAD)


def _split_into_batches(
    shards: Iterable[tuple[PlannedShard, Iterator[_Texts]]], size: int
) -> Iterator[tuple[_Place, Sequence[PlannedSample]]]:
    for plan, texts in shards:
        count = len(plan.samples)
        for first in range(0, count, size):
            place = _Place(plan, texts if first == 0 else None, is_last=first + size >= count)
            yield place, plan.samples[first : first + size]


def _encode_texts(plan: PlannedShard, encoders: Encoders, data: DataConfig) -> Iterator[_Texts]:
    """Each caption of a shard once."""
    captions = {sample.text: sample.triple.caption for sample in plan.samples}
    for names in in_batches(captions, data.encode_batch_size):
        batch, length = [captions[name] for name in names], data.captions.text_length
        with raise_out_of_memory(encoders.text.t5.device, f"encode {len(batch)} captions at once"):
            text = encode_captions(encoders.text, batch, text_length=length)
            stored = store_text(text.t5, text.pooled, data.captions.text_dtype)
            copies = {name: HostCopy(tensor) for name, tensor in stored.items()}
        yield _Texts(names, copies, text.tokens)


def _make_ready(batch: DecodedBatch[_Place], device: torch.device) -> _ReadyBatch:
    pixels = collate_pixels(batch.pixels, device=device) if batch.pixels else None
    return _ReadyBatch(batch.tag, batch.samples, pixels, batch.problems)


# --- behind the device ------------------------------------------------------------------------------------------------


class _LostClaim(Exception):
    """Another worker has the shard: this one was stopped for so long that it was taken for dead."""


class _OpenShard:
    """A shard in the writing. Used by the writing thread alone, but for `problems`."""

    def __init__(self, cache: Path, plan: PlannedShard) -> None:
        self.plan = plan
        self.writer = ShardWriter(cache / plan.path)
        self.tokens: dict[str, int] = {}
        self.problems: list[str] = []


class _Writing:
    """A thread that writes what the device has encoded, in order and a bounded number of bytes behind it."""

    def __init__(self, cache: Path, backlog: ShardQueue) -> None:
        self._cache, self._backlog = cache, backlog
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0  # of what is pending
        self._open: dict[str, _OpenShard] = {}
        self._stopped = False

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Wait until all is written; or, if something failed, leave no part of a shard behind."""
        if kind is not None:
            self._stopped = True
        try:
            while self._pending and kind is None:
                self._wait_for_one()
        finally:
            self._thread.shutdown(cancel_futures=True)
            with ExitStack() as parts:  # the others go even if one cannot be removed
                for shard in self._open.values():
                    parts.push(shard.writer)

    def _submit(self, num_bytes: int, function: Callable[..., None], *arguments: object) -> None:
        self._pending.append((self._thread.submit(self._run, function, *arguments), num_bytes))
        self._bytes += num_bytes
        while self._pending and (self._pending[0][0].done() or self._bytes > _BYTES_BEHIND):
            self._wait_for_one()

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        """Nothing, once something failed: what is queued behind it would finish a shard that lacks what it wrote."""
        if self._stopped:
            return
        try:
            function(*arguments)
        except BaseException:
            self._stopped = True
            raise

    def _wait_for_one(self) -> None:
        written, num_bytes = self._pending.popleft()
        self._bytes -= num_bytes
        written.result()

    def _shard(self, plan: PlannedShard) -> _OpenShard:
        if plan.path not in self._open:
            self._open[plan.path] = _OpenShard(self._cache, plan)
        return self._open[plan.path]

    def add_problems(self, plan: PlannedShard, problems: Sequence[str]) -> None:
        self._shard(plan).problems += problems

    def has_problems(self, plan: PlannedShard) -> bool:
        return bool(self._shard(plan).problems)

    def add_texts(self, plan: PlannedShard, texts: _Texts) -> None:
        num_bytes = sum(copy.num_bytes for copy in texts.tensors.values())
        self._submit(num_bytes, _write_texts, self._shard(plan), texts)

    def add_samples(
        self,
        plan: PlannedShard,
        samples: Sequence[PlannedSample],
        masks: Tensor,
        latents: HostCopy,
        masked_latents: HostCopy,
    ) -> None:
        num_bytes = masks.nbytes + latents.num_bytes + masked_latents.num_bytes
        self._submit(num_bytes, _write_samples, self._shard(plan), samples, masks, latents, masked_latents)

    def finish(self, plan: PlannedShard) -> None:
        self._submit(0, self._finish, plan, self._shard(plan))

    def _finish(self, plan: PlannedShard, shard: _OpenShard) -> None:
        with shard.writer:
            if shard.problems:
                self._backlog.fail(plan, listed(shard.problems))
            else:
                self._publish(plan, shard.writer)
        del self._open[plan.path]

    def _publish(self, plan: PlannedShard, writer: ShardWriter) -> None:
        if writer.num_samples != len(plan.samples):
            raise RuntimeError(f"{plan.path}: {writer.num_samples} of its {len(plan.samples)} samples were written")

        def check() -> None:
            if not self._backlog.may_publish(plan):
                raise _LostClaim

        try:
            writer.finish(plan=plan.plan, check=check)
        except _LostClaim:
            pass
        except FileNotFoundError:
            if self._backlog.may_publish(plan):
                raise
            # Taken for dead in this moment: whoever has the shard now has cleared this one's part away.
        self._backlog.finish(plan)


def _write_texts(shard: _OpenShard, texts: _Texts) -> None:
    tensors = {name: copy.wait() for name, copy in texts.tensors.items()}
    for row, name in enumerate(texts.names):
        try:
            shard.writer.add_text(name, **{tensor: stacked[row] for tensor, stacked in tensors.items()})
        except NotFinite as error:
            said = next(sample for sample in shard.plan.samples if sample.text == name)
            shard.problems.append(f"{said.triple.target}: {error} The caption: {said.triple.caption!r}")
        shard.tokens[name] = texts.tokens[row]


def _write_samples(
    shard: _OpenShard,
    samples: Sequence[PlannedSample],
    masks: Tensor,
    latents: HostCopy,
    masked_latents: HostCopy,
) -> None:
    for row, sample in enumerate(samples):
        tensors = SampleTensors(
            key=sample.key,
            latents=latents.wait()[row],
            masked_latents=list(masked_latents.wait()[:, row]),
            masks=list(masks[:, row].numpy()),
            text=sample.text,
            tokens=shard.tokens[sample.text],
            meta=_describe_sample(sample),
        )
        try:
            if not shard.problems:  # else the shard will not be, and the text may not be there
                shard.writer.add_sample(tensors)
        except NotFinite as error:
            shard.problems.append(f"{sample.triple.target}: {error}")


def _describe_sample(sample: PlannedSample) -> dict:
    triple, crop = sample.triple, sample.crop
    return {
        "caption": triple.caption,
        "dataset": triple.dataset,
        # Below its dataset's folder: a shard's bytes are the same wherever the pictures lie.
        "target": f"{triple.name}{triple.target.suffix}",
        "original_size": [sample.size[1], sample.size[0]],
        "resized": [crop.height, crop.width],
        "crop": [crop.top, crop.left, sample.bucket.height, sample.bucket.width],
        "flip": sample.flip,  # after the crop
        "fingerprint": triple.content,
    }
