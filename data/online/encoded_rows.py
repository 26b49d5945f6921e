"""Rows encoded on demand, a few batches ahead of the training:

    threads of their own    decode pictures, draw a row's noise
    a thread of its own     queue a batch's work on the encoders' device, never waiting for it
    a thread of its own     wait for the tensors, copy them into the batch

What goes through the VAE together depends on the order and data.encode_batch_size, never on time: the rows of complete
micro-batches, of one global batch and one rank. So a resumed run encodes what an undisturbed one would. A row whose
shard is finished in data.cache is read from there instead, by the thread that would decode it.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from configs.data_schema import DataConfig
from configs.errors import InputError, StorageFailed
from data.batches.batch_memory import BufferLease
from data.batches.order import Batch
from data.batches.row_filler import ReplacedRow, RowFiller
from data.batches.row_source import PlannedMicroBatch
from data.batches.shard_reader import Buffers, DamagedSample
from data.cache.members import bytes_of
from data.online.batch_encoder import BatchEncoder, EncodedBatch
from data.online.finished_shards import FinishedShards
from data.samples.decode import in_batches, load_pixels
from data.samples.geometry import Pixels
from data.samples.plan import PlannedSample
from data.samples.shard_plan import PlannedShard


@dataclass(frozen=True)
class _DecodedRow:
    """A row that is to be encoded.  out: where its tensors go, by name; those that are not there are not wanted."""

    sample: PlannedSample
    pixels: Pixels
    out: Buffers


@dataclass(frozen=True)
class _Begun:
    """A micro-batch in the making.  decoded: a row each, None where nothing is to be encoded (it was read from a shard,
    or is a padding row).  ready: when all is in place."""

    decoded: Sequence["Future[_DecodedRow | None]"]
    ready: "Future[None]"


class EncodedRows:
    """Planned shards as a RowSource: row i of a shard is sample i of its plan.

    finished: shards of the same plan in the cache, read where they are there.  threads: that decode.
    """

    def __init__(
        self,
        plans: Sequence[PlannedShard],
        num_variants: Mapping[str, int],
        encoder: BatchEncoder,
        filler: RowFiller,
        finished: FinishedShards,
        data: DataConfig,
        *,
        threads: int,
    ) -> None:
        self._plans, self._num_variants, self._data = plans, num_variants, data
        self._encoder, self._filler, self._finished = encoder, filler, finished
        self._decoding = ThreadPoolExecutor(threads, "decode")
        self._encoding = ThreadPoolExecutor(1, "encode", initializer=encoder.own_thread)
        self._delivering = ThreadPoolExecutor(1, "deliver", initializer=encoder.own_thread)
        self._group: list[_Begun] = []
        self._stop = threading.Event()
        self._storage_failure: StorageFailed | None = None

    @property
    def replaced(self) -> set[ReplacedRow]:
        return self._filler.replaced

    def key(self, shard: int, row: int) -> str:
        return self._plans[shard].samples[row].key

    def _group_size(self, width: int) -> int:
        """Micro-batches that are encoded together."""
        return max(1, self._data.encode_batch_size // width)

    def least_depth(self, width: int) -> int:
        # One group in use, one ahead of it, and one micro-batch so that the next can begin.
        return 2 * self._group_size(width) + 1

    def reached(self, batch: Batch) -> None:
        """Nothing to do: `fill` fetches what it needs."""

    def fill(self, planned: PlannedMicroBatch, memory: BufferLease) -> Future[None]:
        decoded = [self._decoding.submit(self._decode, planned, memory, place) for place in range(planned.width)]
        begun = _Begun(decoded, Future())
        self._group.append(begun)
        # The last micro-batch of a global batch may be narrower; the width of the others decides.
        if planned.is_last or len(self._group) == self._group_size(planned.width):
            self._encoding.submit(self._encode, self._group)
            self._group = []
        return begun.ready

    # --- decoding

    def _decode(self, planned: PlannedMicroBatch, memory: BufferLease, place: int) -> _DecodedRow | None:
        rows = memory.rows()
        wanted = planned.at(place)
        if wanted is None:
            rows.pad(place)
            return None
        plan = self._plans[wanted.shard]
        out = self._filler.begin(rows, place, wanted.position)
        variant = self._filler.choose_variant(
            self._num_variants[plan.dataset], row=wanted.row, stream_epoch=wanted.stream_epoch, position=wanted.position
        )
        if self._finished.read(wanted.shard, wanted.row, out, variant=variant):
            return None
        row, pixels = self._filler.first_intact(
            lambda row: self._load(plan.samples[row], variant),
            shard=plan.path,
            num_samples=len(plan.samples),
            row=wanted.row,
            position=wanted.position,
        )
        return _DecodedRow(plan.samples[row], pixels, out)

    def _load(self, sample: PlannedSample, variant: int) -> Pixels:
        try:
            return load_pixels(sample, self._data, stop=self._stop)[variant]
        except StorageFailed as error:
            # Nothing is damaged, and the others would fail like it, after as long a wait. Whichever row the training
            # comes to first says why, not that it was stopped.
            self._storage_failure = self._storage_failure or error
            self._stop.set()
            raise self._storage_failure from error
        except InputError as error:
            raise DamagedSample(str(error)) from error

    # --- encoding

    def _encode(self, group: Sequence[_Begun]) -> None:
        """Queue the work of a group of micro-batches on the device; an error goes to all of them."""
        try:
            decoded = [row for begun in group for future in begun.decoded if (row := future.result()) is not None]
            encoded = [
                (
                    run,
                    self._encoder.encode(
                        [row.sample for row in run],
                        [row.pixels for row in run],
                        with_text=["t5" in row.out for row in run],
                    ),
                )
                for run in in_batches(decoded, self._pictures_at_once(decoded))
            ]
        except BaseException as error:
            _fail(group, error)
            return
        self._delivering.submit(self._deliver, group, encoded)

    def _pictures_at_once(self, decoded: Sequence[_DecodedRow]) -> int:
        """decoded: of one global batch, and so of one bucket."""
        return self._data.pictures_at_once(decoded[0].sample.bucket.pixels) if decoded else 1

    def _deliver(self, group: Sequence[_Begun], encoded: Iterable[tuple[Sequence[_DecodedRow], EncodedBatch]]) -> None:
        try:
            for run, batch in encoded:
                for row, tensors in zip(run, batch.wait(), strict=True):
                    for name, buffer in row.out.items():
                        buffer[:] = bytes_of(tensors[name])
        except BaseException as error:
            _fail(group, error)
            return
        for begun in group:
            begun.ready.set_result(None)

    def close(self) -> None:
        """Waits for what is being encoded, not for what was only queued."""
        self._stop.set()  # whoever waits for a storage that fails
        self._finished.stop()
        for pool in (self._decoding, self._encoding, self._delivering):
            pool.shutdown(wait=True, cancel_futures=True)
        self._finished.close()


def _fail(group: Sequence[_Begun], error: BaseException) -> None:
    for begun in group:
        begun.ready.set_exception(error)
