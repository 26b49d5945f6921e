"""The stream of micro-batches that a rank trains on."""

import logging
from collections import Counter

import numpy as np

from configs.errors import InputError
from configs.schema import Config
from data.cache import Cache
from data.manifest import TRAIN
from data.order import BLOCK_SHARDS, Order, OrderSettings, hash_shards
from data.reader import BatchStream
from data.row_filler import RowPolicy
from trainer.engine import Engine
from trainer.run_state import RunState

log = logging.getLogger("fluxfill")


def choose_order(config: Config, cache: Cache) -> OrderSettings:
    """What the order of a run that starts now depends on; one that is resumed keeps its own.

    Raises InputError if data.streams cannot share a global batch.
    """
    return OrderSettings.current(
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        weights={dataset.name: dataset.weight for dataset in config.data.datasets},
        shards=hash_shards(cache.table.path, _training_samples(cache)),
        streams=config.data.streams,
        block_shards=_block_shards(cache),
    )


def _block_shards(cache: Cache) -> int:
    """Shards that are shuffled together: fewer where their copies would not fit this node.

    Of each pool (dataset and bucket) the block in use and the one that is fetched for it are held at once.
    Raises InputError if not even blocks of one shard fit.
    """
    if cache.copies is None:
        return BLOCK_SHARDS
    table, trains = cache.table, _training_samples(cache) > 0
    pools = Counter(zip(table.dataset[trains].tolist(), table.bucket[trains].tolist(), strict=True))
    largest = int(table.bytes[trains].max(initial=0))

    def needed(block_shards: int) -> int:
        return sum(min(2 * block_shards, shards) for shards in pools.values()) * largest

    for block_shards in range(BLOCK_SHARDS, 0, -1):
        if needed(block_shards) <= cache.copies.prefetch_bytes:
            return block_shards
    raise InputError(
        f"data.local_cache_gib is {cache.copies.limit_bytes / 2**30:g}, but shards of {largest / 2**30:.2g} GiB in "
        f"{len(pools)} buckets need at least {needed(1) / cache.copies.prefetch_share / 2**30:.2g}. Raise it, or make "
        "smaller shards (data.shard_size_mib)."
    )


def _training_samples(cache: Cache) -> np.ndarray:
    """Samples of each shard, 0 for those held out."""
    return np.where(cache.table.split == TRAIN, cache.table.samples, 0)


def open_stream(config: Config, engine: Engine, cache: Cache, state: RunState) -> BatchStream:
    """This rank's micro-batches from the run's place in the order. Raises InputError if there is nothing to train."""
    table = cache.table
    order = Order(table.dataset, table.bucket, _training_samples(cache), state.order)
    micro = config.train.micro_batch_size
    if micro == "auto":
        micro = 1
        log.info("train.micro_batch_size: auto, so 1 at the largest bucket and as many tokens of smaller ones")
    log.info(
        "data: %d samples, %d a batch, %d process(es)",
        order.num_samples,
        state.order.global_batch_size,
        engine.world_size,
    )
    return BatchStream(
        cache,
        order,
        rank=engine.rank,
        world_size=engine.world_size,
        micro_batch_size=micro,
        policy=RowPolicy(
            mask_choice=config.data.mask_choice,
            caption_dropout=config.data.captions.dropout,
            mask_dropout=config.data.mask_dropout,
            max_bad_samples=config.guard.max_bad_samples,
        ),
        replaced=state.replaced,
        start=state.batch,
        threads=config.data.reader_threads,
        pin_memory=engine.device.type == "cuda",
    )
