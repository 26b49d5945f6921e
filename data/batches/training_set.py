"""The samples of a run, cached or encoded online: one interface for both."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.batches.cached_rows import CachedRows
from data.batches.micro_batch import row_fields
from data.batches.order import Order
from data.batches.row_filler import ReplacedRow, RowPolicy
from data.batches.row_source import RowSource
from data.batches.shard_reader import ShardReader
from data.cache.manifest import Manifest, ShardTable
from data.cache.members import bytes_of
from data.cache.node_cache import NodeCache
from data.cache.open_cache import Cache
from data.cache.validation_items import ValidationItem, read_validation_items
from data.samples.geometry import Bucket, Pixels


@dataclass(frozen=True)
class ValidationSample:
    """A sample for validation.  tensors: its stored ones, of its first mask variant, by name."""

    item: ValidationItem
    pixels: Pixels
    bucket: Bucket
    tensors: dict[str, Tensor]


class TrainingSet(Protocol):
    """The samples of a run.

    manifest: what is true of all of them.  table: the shards that hold them, or would.  copies: of the shards of a
    remote cache.
    """

    manifest: Manifest
    table: ShardTable
    copies: NodeCache | None

    def open_rows(self, order: Order, policy: RowPolicy, replaced: Iterable[ReplacedRow]) -> RowSource:
        """The source of this rank's micro-batches.  replaced: rows that earlier processes of the run replaced."""

    def validation_samples(self, *, split: str, count: int) -> Sequence[ValidationSample]:
        """The first `count` validation samples of a split."""


class CachedTrainingSet:
    """The samples of a finished cache: nothing is encoded, no encoder is loaded.  threads: that read."""

    def __init__(self, cache: Cache, *, threads: int = 2) -> None:
        self.manifest, self.table, self.copies = cache.manifest, cache.table, cache.copies
        self._cache, self._threads = cache, threads

    def open_rows(self, order: Order, policy: RowPolicy, replaced: Iterable[ReplacedRow]) -> CachedRows:
        return CachedRows(self._cache, order, policy=policy, replaced=replaced, threads=self._threads)

    def validation_samples(self, *, split: str, count: int) -> list[ValidationSample]:
        """Raises InputError if they, or the shards that they are in, are damaged."""
        reader = ShardReader(self._cache)
        found = read_validation_items(self._cache.folder, split=split, count=count)
        validation_samples = []
        for item, pixels in found:
            shard = int(np.flatnonzero(self.table.path == item.shard)[0])
            validation_samples.append(ValidationSample(item, pixels, *_read(reader, shard, item.row)))
        reader.close()
        return validation_samples


def _read(reader: ShardReader, shard: int, row: int) -> tuple[Bucket, dict[str, Tensor]]:
    bucket = Bucket.parse(str(reader.table.bucket[shard]))
    fields = [field for field in row_fields(bucket, reader.manifest) if field.is_stored]
    tensors = {field.name: torch.empty(field.shape, dtype=field.dtype) for field in fields}
    reader.read(shard, row, {name: bytes_of(tensor) for name, tensor in tensors.items()})
    return bucket, tensors
