"""The samples of a run, and the stream of micro-batches that a rank trains on."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from configs.errors import InputError
from configs.schema import Config
from data.cache import open_cache
from data.manifest import TRAIN
from data.online import OnlineSamples, encoder_device, plan_online
from data.order import BLOCK_SHARDS, Order, OrderSettings, hash_shards
from data.reader import BatchStream
from data.row_filler import RowPolicy
from data.samples import CachedSamples, Samples
from data.which_worker import which_worker
from trainer.engine import Engine
from trainer.run_state import RunState

log = logging.getLogger("fluxfill")


def open_samples(config: Config, model: Path, engine: Engine, console: Console) -> Samples:
    """What the run trains on: its cache, or with data.mode online its pictures; all ranks call it.

    Raises InputError if the cache is not there or not that of the config; or of pictures and devices.
    """
    if config.data.mode == "cached":
        return CachedSamples(open_cache(config, model, check_shards=engine.is_main), threads=config.data.reader_threads)
    device = encoder_device(config, local_rank=engine.local_rank, own=engine.device)
    # Rank 0 reads the pictures, for all; and tells all if something is wrong with them.
    planned: Any = None
    if engine.is_main:
        try:
            planned = plan_online(config, model, console)
        except InputError as error:
            planned = str(error)
    planned = engine.share(planned)
    if isinstance(planned, str):
        raise InputError(planned)
    log.info("data.mode online: pictures are encoded on %s%s", device, " too" if device == engine.device else "")
    threads = which_worker(os.environ).decode_threads
    return OnlineSamples(config, model, planned, device=device, decode_threads=threads)


def choose_order(config: Config, samples: Samples) -> OrderSettings:
    """What the order of a run that starts now depends on; one that is resumed keeps its own.

    Raises InputError if data.streams cannot share a global batch.
    """
    return OrderSettings.current(
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        weights={dataset.name: dataset.weight for dataset in config.data.datasets},
        shards=hash_shards(samples.table.path, _training_samples(samples)),
        streams=config.data.streams,
        block_shards=_block_shards(samples),
    )


def _block_shards(samples: Samples) -> int:
    """Shards that are shuffled together: fewer where their copies would not fit this node.

    Of each pool (dataset and bucket) the block in use and the one that is fetched for it are held at once.
    Raises InputError if not even blocks of one shard fit.
    """
    copies = samples.copies
    if copies is None:
        return BLOCK_SHARDS
    table, trains = samples.table, _training_samples(samples) > 0
    pools = Counter(zip(table.dataset[trains].tolist(), table.bucket[trains].tolist(), strict=True))
    largest = int(table.bytes[trains].max(initial=0))

    def needed(block_shards: int) -> int:
        return sum(min(2 * block_shards, shards) for shards in pools.values()) * largest

    for block_shards in range(BLOCK_SHARDS, 0, -1):
        if needed(block_shards) <= copies.prefetch_bytes:
            return block_shards
    raise InputError(
        f"data.local_cache_gib is {copies.limit_bytes / 2**30:g}, but shards of {largest / 2**30:.2g} GiB in "
        f"{len(pools)} buckets need at least {needed(1) / copies.prefetch_share / 2**30:.2g}. Raise it, or make "
        "smaller shards (data.shard_size_mib)."
    )


def _training_samples(samples: Samples) -> np.ndarray:
    """Samples of each shard, 0 for those held out."""
    return np.where(samples.table.split == TRAIN, samples.table.samples, 0)


def open_stream(config: Config, engine: Engine, samples: Samples, state: RunState) -> BatchStream:
    """This rank's micro-batches from the run's place in the order. Raises InputError if there is nothing to train."""
    table = samples.table
    order = Order(table.dataset, table.bucket, _training_samples(samples), state.order)
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
    policy = RowPolicy(
        mask_choice=config.data.mask_choice,
        caption_dropout=config.data.captions.dropout,
        mask_dropout=config.data.mask_dropout,
        max_bad_samples=config.guard.max_bad_samples,
    )
    return BatchStream(
        samples.manifest,
        order,
        samples.open_rows(order, policy, state.replaced),
        rank=engine.rank,
        world_size=engine.world_size,
        micro_batch_size=micro,
        start=state.batch,
        pin_memory=engine.device.type == "cuda",
    )
