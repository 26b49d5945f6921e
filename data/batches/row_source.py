"""The interface between the order of the samples and the source of their tensors: shards, or encoders."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from data.batches.batch_memory import BufferLease
from data.batches.order import Batch
from data.batches.row_filler import ReplacedRow
from data.samples.geometry import Bucket


@dataclass(frozen=True)
class PlannedRow:
    """Sample `row` of shard `shard`, at `position` of the order.  stream_epoch: how often its stream was passed."""

    position: int
    shard: int
    row: int
    stream_epoch: int


@dataclass(frozen=True)
class PlannedMicroBatch:
    """One micro-batch to come.  rows: of the global batch.  width: rows per forward, the missing ones padding rows."""

    batch: Batch
    is_last: bool
    rows: range
    bucket: Bucket
    width: int

    def at(self, place: int) -> PlannedRow | None:
        """The row at a place; None for a padding row."""
        if place >= len(self.rows):
            return None
        batch, number = self.batch, self.rows[place]
        at = number - batch.part.start
        return PlannedRow(
            batch.position + number,
            int(batch.shards[at]),
            int(batch.rows[at]),
            stream_epoch=int(batch.stream_epochs[at]),
        )


class RowSource(Protocol):
    """Fills micro-batches with samples, in the background and in the order in which they are begun."""

    @property
    def replaced(self) -> set[ReplacedRow]:
        """Rows that were replaced, those of earlier processes of the run included."""

    def reached(self, batch: Batch) -> None:
        """The stream is at this global batch (`batch.part` of it is its own), or will begin with it."""

    def fill(self, planned: PlannedMicroBatch, memory: BufferLease) -> Future[None]:
        """Begin to fill a micro-batch, and return at once: it is ready when this is done, and cannot be had if this
        raises."""

    def least_depth(self, width: int) -> int:
        """How many micro-batches of `width` rows must be begun before the first of them is waited for."""

    def key(self, shard: int, row: int) -> str:
        """A sample's name."""

    def close(self) -> None:
        """Stop, and release everything."""
