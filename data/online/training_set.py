"""Training without a cache: the samples that preprocessing would plan, encoded while a run trains on them.

The plan is preprocessing's own, so the order, the noise and, up to rounding, the tensors are those of the cached run; a
run may go on in the other mode. What was found out about the pictures is kept in data.cache (data/sources/scan.py), and
shards that are finished there are read, not encoded (finished_shards.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from configs.errors import InputError
from configs.schema import Config
from data.batches.order import Order
from data.batches.row_filler import ReplacedRow, RowFiller, RowPolicy
from data.batches.training_set import ValidationSample
from data.cache.build_manifest import describe_samples
from data.cache.dropout_tensors import encode_empty_caption, encode_full_mask
from data.cache.manifest import ShardTable
from data.cache.members import bytes_of
from data.cache.node_cache import NodeCache
from data.cache.validation_items import choose_validation_items, num_watched
from data.encoders.load import Encoders, cuda_devices, load_encoders
from data.encoders.model_folder import encoder_fingerprints
from data.online.batch_encoder import BatchEncoder
from data.online.encoded_rows import EncodedRows
from data.online.finished_shards import FinishedShards
from data.preprocessing.job import Job, make_plan
from data.preprocessing.progress import open_progress
from data.preprocessing.worker import Worker
from data.samples.decode import in_batches, load_pixels
from data.samples.geometry import Bucket, Pixels
from data.samples.shard_plan import PlannedShard
from data.sources.download_cache import keep_copies


def encoder_device(config: Config, *, local_rank: int, own: torch.device) -> torch.device:
    """The device on which a training process encodes: one of data.encoder_devices, dealt round-robin, or its own.

    Raises InputError if a device that is named there is not here.
    """
    named = config.data.encoder_devices
    for name in named or []:
        if name != "cpu" and torch.device(name).index >= torch.cuda.device_count():
            raise InputError(
                f"data.encoder_devices names {name}, but of CUDA devices there are here: {cuda_devices()}. Name "
                "another, or remove the key to encode on the GPU that trains."
            )
    return torch.device(named[local_rank % len(named)]) if named else own


def plan_online(config: Config, model: Path, console: Console) -> list[PlannedShard]:
    """The shards that preprocessing would make. Raises one InputError that lists all problems of the pictures. A job
    that completes the cache beside this process leaves it the copies that it reads."""
    keep_copies(config.data.cache_folder)
    with open_progress(console, Worker()) as progress:
        return make_plan(Job(config, model, encoder_fingerprints(model)), progress)


class OnlineTrainingSet:
    """Planned samples, encoded when they are needed. The encoders are loaded with the first of them.

    device: of the encoders, where data.encoders does not say otherwise.  worker: which of the processes this one is.
    """

    def __init__(
        self, config: Config, model: Path, plans: Sequence[PlannedShard], *, device: torch.device, worker: Worker
    ) -> None:
        self.manifest = describe_samples(config, model, encoder_fingerprints(model), plans, hole_fractions={})
        self.table = _table_of(plans)
        self.copies: NodeCache | None = None
        self._config, self._model, self._plans = config, model, plans
        self._device, self._worker = device, worker

    @cached_property
    def _encoders(self) -> Encoders:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # with ZeRO-3 every rank would be given a share of the text encoders' weights
        placed = self._config.data.encoders
        on_device = {part: str(self._device) for part in ("vae", "clip", "t5") if getattr(placed, part) == "auto"}
        with _own_gpu() as index:
            return load_encoders(self._model, placed.model_copy(update=on_device), device_index=index)

    @cached_property
    def _encoder(self) -> BatchEncoder:
        return BatchEncoder(self._encoders, self._config.data.captions)

    def open_rows(self, order: Order, policy: RowPolicy, replaced: Iterable[ReplacedRow]) -> EncodedRows:
        captions = self._config.data.captions
        filler = RowFiller(
            order.settings.seed,
            policy,
            empty_caption=_bytes_of(encode_empty_caption(self._encoders, captions)) if policy.caption_dropout else {},
            full_masks={bucket: self._full_mask(bucket) for bucket in _buckets_of(order)}
            if policy.mask_dropout
            else {},
            replaced=replaced,
        )
        return EncodedRows(
            self._plans,
            self.manifest.mask_variants,
            self._encoder,
            filler,
            FinishedShards(self._config.data.cache_folder, self._plans, self.manifest, self.table),
            self._config.data,
            threads=self._worker.decode_threads,
        )

    def _full_mask(self, bucket: Bucket) -> dict[str, memoryview]:
        mask = memoryview(b"\xff" * bucket.mask_bytes)
        return _bytes_of(encode_full_mask(self._encoders, bucket)) | {"mask": mask}

    def validation_samples(self, *, split: str, count: int) -> list[ValidationSample]:
        """Raises InputError, naming the file, if one cannot be decoded."""
        chosen = [
            (item, sample)
            for item, sample in choose_validation_items(self._plans, count=num_watched(self._config.data.holdout))
            if item.split == split
        ][:count]
        pixels = [_copy(load_pixels(sample, self._config.data)[0]) for _, sample in chosen]
        by_bucket: dict[Bucket, list[int]] = defaultdict(list)
        for place, (_, sample) in enumerate(chosen):
            by_bucket[sample.bucket].append(place)
        tensors: dict[int, dict[str, Tensor]] = {}
        for bucket, places in by_bucket.items():
            for run in in_batches(places, self._config.data.pictures_at_once(bucket.pixels)):
                batch = self._encoder.encode(
                    [chosen[place][1] for place in run],
                    [pixels[place] for place in run],
                    with_text=[True] * len(run),
                )
                tensors |= zip(run, batch.wait(), strict=True)
        return [
            ValidationSample(item, pixels[place], sample.bucket, tensors[place])
            for place, (item, sample) in enumerate(chosen)
        ]


def _copy(pixels: Pixels) -> Pixels:
    """In memory of their own: torch warns of arrays, such as Pillow's, that cannot be written to."""
    return Pixels(pixels.target.copy(), pixels.image.copy(), pixels.mask.copy())


def _buckets_of(order: Order) -> list[Bucket]:
    return [Bucket.parse(name) for name in order.buckets]


def _bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, memoryview]:
    return {name: bytes_of(tensor.cpu().contiguous()) for name, tensor in tensors.items()}


def _table_of(plans: Sequence[PlannedShard]) -> ShardTable:
    """The shards as a cache would list them, without sizes and hashes of files."""
    return ShardTable(
        path=np.array([plan.path for plan in plans]),
        dataset=np.array([plan.dataset for plan in plans]),
        bucket=np.array([str(plan.bucket) for plan in plans]),
        split=np.array([plan.split for plan in plans]),
        samples=np.array([len(plan.samples) for plan in plans], dtype=np.int64),
        bytes=np.zeros(len(plans), dtype=np.int64),
        sha256=np.full(len(plans), ""),
        plan=np.array([plan.plan for plan in plans]),
    )


@contextmanager
def _own_gpu() -> Iterator[int]:
    """The index of the GPU that the process trains on. Loading leaves it on the encoders'; the training goes on on its
    own."""
    if not torch.cuda.is_available():
        yield 0
        return
    own = torch.cuda.current_device()
    with torch.cuda.device(own):
        yield own
