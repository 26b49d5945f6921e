"""The order of the samples: the sequence of global batches as arithmetic, not state.

A pool is all training shards of one dataset and bucket, dealt to C streams by rows (so that they are equal within one,
a shard at a border belongs to two; a pool of fewer than 4 C shards is not dealt). A stream's rows form an endless
sequence: epoch after epoch, each a permutation made in two steps (shards into blocks, samples within a block), so that
a reader touches few shards at a time. Batch j of a pool takes rows [j * GB / C, (j + 1) * GB / C) of each stream: laid
end to end, so no sample is ever left out and a pool smaller than a batch trains too. Neighbouring ranks get
neighbouring rows: with a stream a node, a node reads only its own shards.

The run's batches are the pools' batches, interleaved by weight. In epoch e a pool has as many batches as its share of
the rows says, rounded by a running total, so over epochs the shares are met exactly; within the epoch each pool's
batches are spread evenly with a random offset. Nothing knows of ranks; any batch is found without walking to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import xxhash

from configs.errors import InputError

ORDER_VERSION = 1
BLOCK_SHARDS = 8  # 2 GiB at the default shard size: enough to mix, little enough to keep near

_SHARDS, _ROWS, _OFFSETS, _PHASE, _DEAL = range(5)  # what a permutation is for: a word of its counter
_SHARDS_PER_STREAM = 4  # at the least: else the streams of a small pool would each be a handful of neighbours


@dataclass(frozen=True)
class OrderSettings:
    """All that the order depends on. Stored in checkpoints and kept on resume, whatever the machines and the config.

    streams: C.  block_shards: shards that are shuffled together, per stream.  weights: dataset -> share of the mix.
    shards: hash of the training shards' names, sample counts and plans (what they are made from).
    """

    version: int
    seed: int
    global_batch_size: int
    streams: int
    block_shards: int
    weights: dict[str, float]
    shards: str

    @classmethod
    def current(
        cls,
        *,
        seed: int,
        global_batch_size: int,
        weights: Mapping[str, float],
        shards: str,
        streams: int = 1,
        block_shards: int = BLOCK_SHARDS,
    ) -> "OrderSettings":
        """Those of a run that starts now.

        Raises InputError if the streams cannot share a global batch evenly: samples of one would come more often.
        """
        if global_batch_size % streams:
            raise InputError(
                f"data.streams is {streams}, but must divide train.global_batch_size, {global_batch_size}. "
                f"Nearest below: {next(n for n in range(streams, 0, -1) if global_batch_size % n == 0)}."
            )
        return cls(ORDER_VERSION, seed, global_batch_size, streams, block_shards, dict(weights), shards)


def hash_shards(paths: np.ndarray, samples: np.ndarray, plans: np.ndarray) -> str:
    """OrderSettings.shards: of shards' paths, samples that train and plans, in the shard table's order.

    Not of their bytes: shards that were encoded again from the same pictures, on another GPU, are the same run's.
    """
    digest = xxhash.xxh3_128("\n".join(paths[samples > 0].tolist()).encode())
    digest.update(plans[samples > 0].astype("S32").data)  # 32 hex digits; a million of them as one piece
    digest.update(np.ascontiguousarray(samples[samples > 0], dtype="<i8").data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """One global batch, or a part of it.  shards, rows: int64, row `rows[i]` of shard `shards[i]` (index into the shard
    table) is row `part[i]` of the batch.  stream_epochs: how often its stream had been passed before.

    pool: its dataset and bucket.  epoch: of the run.  position: of the batch's first row in the order; row i stands at
    position + i.
    """

    index: int
    pool: tuple[str, str]
    epoch: int
    position: int
    part: range
    shards: np.ndarray
    rows: np.ndarray
    stream_epochs: np.ndarray


def _generator(key: np.ndarray, purpose: int, epoch: int = 0, block: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key, counter=[0, block, epoch, purpose]))


def _key(seed: int, name: str) -> np.ndarray:
    # As uint64: of Python's own numbers numpy would make floats, and drop the low bits of both.
    return np.array([seed, xxhash.xxh3_64_intdigest(name.encode())], dtype=np.uint64)


class _Stream:
    """An endless row sequence.  Segment i of it is `counts[i]` rows of shard `shards[i]`, from row `firsts[i]` on."""

    def __init__(
        self, shards: np.ndarray, firsts: np.ndarray, counts: np.ndarray, key: np.ndarray, block_shards: int
    ) -> None:
        self._shards, self._firsts, self._counts = shards, firsts, counts
        self._num_rows = int(counts.sum())
        self._key = key
        self._block_shards = block_shards
        # Epoch and block change rarely from batch to batch. Two of each cover a batch that crosses a border, and as
        # many those who look ahead.
        self._epoch = lru_cache(maxsize=4)(self._permute_shards)
        self._block = lru_cache(maxsize=8)(self._permute_block)

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(segments in this epoch's order, rows before each block and in all)."""
        order = _generator(self._key, _SHARDS, epoch).permutation(len(self._shards))
        ends = np.cumsum(self._counts[order])
        return order, np.concatenate([[0], ends[self._block_shards - 1 :: self._block_shards], ends[-1:]])

    def _permute_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) of each place in one block, shuffled."""
        order, _ = self._epoch(epoch)
        members = order[block * self._block_shards : (block + 1) * self._block_shards]
        shards = np.repeat(self._shards[members], self._counts[members])
        rows = np.concatenate([self._firsts[member] + np.arange(self._counts[member]) for member in members])
        shuffle = _generator(self._key, _ROWS, epoch, block).permutation(len(rows))
        return shards[shuffle], rows[shuffle]

    def slice(self, start: int, count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Runs of (shards, rows, stream_epochs), `count` rows in all, of the sequence from `start` on."""
        runs = []
        while count:
            epoch, inside = divmod(start, self._num_rows)
            _, starts = self._epoch(epoch)
            block = int(np.searchsorted(starts, inside, side="right")) - 1
            shards, rows = self._block(epoch, block)
            first = inside - int(starts[block])
            taken = min(count, len(rows) - first)
            runs.append((shards[first : first + taken], rows[first : first + taken], np.full(taken, epoch)))
            start, count = start + taken, count - taken
        return runs


class _Pool:
    """The batches of one dataset and bucket."""

    def __init__(self, name: tuple[str, str], shards: np.ndarray, samples: np.ndarray, settings: OrderSettings) -> None:
        self.name = name
        self.num_rows = int(samples.sum())
        self.num_streams = settings.streams if len(shards) >= _SHARDS_PER_STREAM * settings.streams else 1
        self._settings = settings
        self._key = _key(settings.seed, "/".join(name))
        if self.num_streams > 1:  # which shards lie together must not depend on how they were made
            dealt = _generator(self._key, _DEAL).permutation(len(shards))
            shards, samples = shards[dealt], samples[dealt]
        self._shards, self._samples = shards, samples
        self._ends = np.cumsum(samples)
        self._stream = lru_cache(maxsize=None)(self._cut_stream)

    def _cut_stream(self, number: int) -> _Stream:
        """One of the streams: an equal share of the rows, neighbouring shards, the first and the last in part."""
        if self.num_streams == 1:
            firsts = np.zeros(len(self._shards), dtype=np.int64)
            return _Stream(self._shards, firsts, self._samples, self._key, self._settings.block_shards)
        start, end = (self.num_rows * n // self.num_streams for n in (number, number + 1))
        low = int(np.searchsorted(self._ends, start, side="right"))
        high = int(np.searchsorted(self._ends, end, side="left")) + 1
        ends = self._ends[low:high]
        begins = ends - self._samples[low:high]
        firsts = np.maximum(start - begins, 0)
        counts = np.minimum(ends, end) - np.maximum(begins, start)
        key = _key(self._settings.seed, f"{'/'.join(self.name)}/{number}")
        return _Stream(self._shards[low:high], firsts, counts, key, self._settings.block_shards)

    def phase(self) -> Fraction:
        """Where the pool's running total starts, in [0, 1): else small pools would all come in the same epochs."""
        return Fraction(int(_generator(self._key, _PHASE).integers(1 << 16)), 1 << 16)

    def offsets(self, epoch: int, count: int) -> np.ndarray:
        """Places in (0, 1) of the pool's `count` batches in a run's epoch, ascending: one in each `count`-th."""
        return (np.arange(count) + _generator(self._key, _OFFSETS, epoch).random(count)) / count

    def batch(self, ordinal: int, part: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shards, rows, stream_epochs), int64 [len(part)] each, of some rows of the pool's batch number `ordinal`."""
        share = self._settings.global_batch_size // self.num_streams  # rows of each stream, one after the other
        runs = []
        for number in range(part.start // share, -(-part.stop // share)):
            low, high = max(part.start, number * share), min(part.stop, (number + 1) * share)
            runs += self._stream(number).slice(ordinal * share + low - number * share, high - low)
        if not runs:
            return (np.empty(0, dtype=np.int64),) * 3
        shards, rows, stream_epochs = zip(*runs, strict=True)
        return np.concatenate(shards), np.concatenate(rows), np.concatenate(stream_epochs)


class Order:
    """The sequence of global batches of a cache's training shards.

    datasets, buckets: str, and samples: int, one each per shard in the shard table's order; a shard with samples 0 (one
    of another split) is left out.
    num_samples: rows that train.  buckets: theirs, "HxW".
    Raises InputError if there is no sample to train on, or a dataset without a weight.
    """

    def __init__(
        self,
        datasets: np.ndarray,
        buckets: np.ndarray,
        samples: np.ndarray,
        settings: OrderSettings,
    ) -> None:
        weights = settings.weights
        if settings.version != ORDER_VERSION:
            raise InputError(
                f"the run's order is of version {settings.version}, this fluxfill has {ORDER_VERSION}. "
                "Go on with the version that started the run, or start a new one."
            )
        self.settings = settings
        used = np.flatnonzero(samples > 0)
        if not len(used):
            raise InputError(
                "the cache holds no training sample. Add pictures or lower data.holdout, then run "
                "`fluxfill preprocess CONFIG` again."
            )
        dataset_names, dataset_of = np.unique(datasets[used], return_inverse=True)
        bucket_names, bucket_of = np.unique(buckets[used], return_inverse=True)
        pool_ids, pool_of = np.unique(dataset_of * len(bucket_names) + bucket_of, return_inverse=True)
        members_of = np.split(used[np.argsort(pool_of, kind="stable")], np.cumsum(np.bincount(pool_of))[:-1])
        self.buckets = tuple(str(name) for name in bucket_names)
        self._pools = [
            _Pool(
                (str(dataset_names[i // len(bucket_names)]), str(bucket_names[i % len(bucket_names)])),
                members,
                samples[members].astype(np.int64),
                settings,
            )
            for i, members in zip(pool_ids.tolist(), members_of, strict=True)
        ]
        rows_of: dict[str, int] = {}
        for pool in self._pools:
            rows_of[pool.name[0]] = rows_of.get(pool.name[0], 0) + pool.num_rows
        if missing := rows_of.keys() - weights.keys():
            raise InputError(f"the cache holds datasets without a weight in the config: {', '.join(sorted(missing))}.")
        total_weight = sum(Fraction(str(weights[dataset])) for dataset in rows_of)
        self.num_samples = sum(rows_of.values())
        self._mean_epoch = max(1, round(Fraction(self.num_samples, settings.global_batch_size)))
        self._shares = [
            Fraction(str(weights[pool.name[0]])) / total_weight * Fraction(pool.num_rows, rows_of[pool.name[0]])
            for pool in self._pools
        ]
        self._phases = [pool.phase() for pool in self._pools]
        self._plan = lru_cache(maxsize=2)(self._plan_epoch)

    def _batches_before(self, epoch: int) -> list[int]:
        """Per pool, its batches in all epochs before `epoch`."""
        return [
            int(epoch * self._mean_epoch * share + phase)
            for share, phase in zip(self._shares, self._phases, strict=True)
        ]

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(pool, ordinal of the batch within its pool) of every batch of one epoch, in order."""
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        counts = [end - start for start, end in zip(before, after, strict=True)]
        places = np.concatenate([pool.offsets(epoch, n) for pool, n in zip(self._pools, counts, strict=True)])
        pool = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        ordinal = np.concatenate([np.arange(start, end) for start, end in zip(before, after, strict=True)])
        order = np.argsort(places, kind="stable")
        return pool[order], ordinal[order]

    def epoch_of(self, batch: int) -> tuple[int, int]:
        """(epoch, index within it) of a batch. Epochs differ in length by at most the number of pools."""
        slack = len(self._pools) // self._mean_epoch + 2
        low = max(0, batch // self._mean_epoch - slack)
        high = batch // self._mean_epoch + slack
        while low + 1 < high:  # the last epoch that starts at or before the batch
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._batches_before(middle)) <= batch else (low, middle)
        return low, batch - sum(self._batches_before(low))

    def batch(self, index: int, part: range | None = None) -> Batch:
        """Global batch number `index`, counted from the start of the run; O(1) whatever the index.

        part: only these of its rows are found, for whoever needs no others.
        """
        epoch, inside = self.epoch_of(index)
        pools, ordinals = self._plan(epoch)
        pool = self._pools[pools[inside]]
        size = self.settings.global_batch_size
        part = range(size) if part is None else part
        return Batch(index, pool.name, epoch, index * size, part, *pool.batch(int(ordinals[inside]), part))


def rank_rows(global_batch_size: int, *, rank: int, world_size: int) -> range:
    """The rows of a global batch that one rank trains on: neighbours, floor or ceil of an even share."""
    return range(global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size)


def num_micro_steps(global_batch_size: int, *, world_size: int, micro_batch_size: int) -> int:
    """Forward passes per update, the same on every rank: what the fullest rank needs."""
    most = -(-global_batch_size // world_size)
    return -(-most // micro_batch_size)
