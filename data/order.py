"""Which sample stands where: the sequence of global batches as arithmetic, not state.

A pool is all training shards of one dataset and bucket. Its rows form an endless sequence: epoch after epoch, each a
permutation made in two steps (shards into blocks, samples within a block), so that a reader touches few shards at a
time. Batch j of a pool is its rows [j * GB, (j + 1) * GB): laid end to end, so no sample is ever left out and a pool
smaller than a batch trains too.

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

_SHARDS, _ROWS, _OFFSETS, _PHASE = range(4)  # what a permutation is for: a word of its counter


@dataclass(frozen=True)
class OrderSettings:
    """All that the order depends on besides the shards and the weights. Stored in checkpoints and kept on resume."""

    version: int
    seed: int
    global_batch_size: int
    block_shards: int

    @classmethod
    def current(cls, *, seed: int, global_batch_size: int) -> "OrderSettings":
        return cls(ORDER_VERSION, seed, global_batch_size, BLOCK_SHARDS)


@dataclass(frozen=True)
class Batch:
    """One global batch.  shards, rows: int64 [GB], row `rows[i]` of shard `shards[i]` (index into the shard table).

    pool: its dataset and bucket.  epoch: of the run.  position: of its first row in the order; row i stands at
    position + i.
    """

    index: int
    pool: tuple[str, str]
    epoch: int
    position: int
    shards: np.ndarray
    rows: np.ndarray


class _Pool:
    """The endless row sequence of one dataset and bucket."""

    def __init__(self, name: tuple[str, str], shards: np.ndarray, samples: np.ndarray, settings: OrderSettings) -> None:
        self.name = name
        self.shards = shards
        self.samples = samples
        self.num_rows = int(samples.sum())
        self._block_shards = settings.block_shards
        # As uint64: of Python's own numbers numpy would make floats, and drop the low bits of both.
        self._key = np.array([settings.seed, xxhash.xxh3_64_intdigest("/".join(name).encode())], dtype=np.uint64)
        # A pool's epoch and block change rarely from batch to batch; two of each cover a batch that crosses a border.
        self._epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._block = lru_cache(maxsize=4)(self._permute_block)

    def _generator(self, purpose: int, epoch: int, block: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, block, epoch, purpose]))

    def phase(self) -> Fraction:
        """Where the pool's running total starts, in [0, 1): else small pools would all come in the same epochs."""
        return Fraction(int(self._generator(_PHASE, 0).integers(1 << 16)), 1 << 16)

    def offsets(self, epoch: int, count: int) -> np.ndarray:
        """Places in (0, 1) of the pool's `count` batches in a run's epoch, ascending: one in each `count`-th."""
        return (np.arange(count) + self._generator(_OFFSETS, epoch).random(count)) / count

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in this epoch's order, rows before each block and in all)."""
        order = self._generator(_SHARDS, epoch).permutation(len(self.shards))
        ends = np.cumsum(self.samples[order])
        return order, np.concatenate([[0], ends[self._block_shards - 1 :: self._block_shards], ends[-1:]])

    def _permute_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) of each place in one block, shuffled."""
        order, _ = self._epoch(epoch)
        members = order[block * self._block_shards : (block + 1) * self._block_shards]
        shards = np.repeat(self.shards[members], self.samples[members])
        rows = np.concatenate([np.arange(self.samples[member]) for member in members])
        shuffle = self._generator(_ROWS, epoch, block).permutation(len(rows))
        return shards[shuffle], rows[shuffle]

    def slice(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards, rows), int64 [count] each, of the sequence from `start` on."""
        shards, rows = [], []
        while count:
            epoch, inside = divmod(start, self.num_rows)
            _, starts = self._epoch(epoch)
            block = int(np.searchsorted(starts, inside, side="right")) - 1
            block_shards, block_rows = self._block(epoch, block)
            first = inside - int(starts[block])
            taken = min(count, len(block_rows) - first)
            shards.append(block_shards[first : first + taken])
            rows.append(block_rows[first : first + taken])
            start, count = start + taken, count - taken
        return np.concatenate(shards), np.concatenate(rows)


class Order:
    """The sequence of global batches of a cache's training shards.

    datasets, buckets: str, and samples: int, one each per shard in the shard table's order; a shard with samples 0 (one
    of another split) is left out.  weights: dataset -> share of the mix (any positive numbers).
    num_samples: rows that train.  buckets: theirs, "HxW".
    Raises InputError if there is no sample to train on, or a dataset without a weight.
    """

    def __init__(
        self,
        datasets: np.ndarray,
        buckets: np.ndarray,
        samples: np.ndarray,
        weights: Mapping[str, float],
        settings: OrderSettings,
    ) -> None:
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

    def batch(self, index: int) -> Batch:
        """Global batch number `index`, counted from the start of the run; costs the same wherever it stands."""
        epoch, inside = self.epoch_of(index)
        pools, ordinals = self._plan(epoch)
        pool = self._pools[pools[inside]]
        size = self.settings.global_batch_size
        shards, rows = pool.slice(int(ordinals[inside]) * size, size)
        return Batch(index, pool.name, epoch, index * size, shards, rows)


def rank_rows(global_batch_size: int, *, rank: int, world_size: int) -> range:
    """The rows of a global batch that one rank trains on: neighbours, floor or ceil of an even share."""
    return range(global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size)


def num_micro_steps(global_batch_size: int, *, world_size: int, micro_batch_size: int) -> int:
    """Forward passes per update, the same on every rank: what the fullest rank needs."""
    most = -(-global_batch_size // world_size)
    return -(-most // micro_batch_size)
