"""The samples of a run, and the stream of micro-batches that a rank trains on."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from configs.errors import InputError, StorageFailed
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.batches.order import BLOCK_SHARDS, Order, OrderSettings, hash_shards
from data.batches.row_filler import RowPolicy
from data.batches.training_set import CachedTrainingSet, TrainingSet
from data.cache.open_cache import open_cache
from data.online.training_set import OnlineTrainingSet, encoder_device, plan_online
from data.preprocessing.worker import which_worker
from data.samples.geometry import Bucket
from data.samples.plan import HOLDOUT, TRAIN
from data.samples.summary import explain_untrained
from trainer.checkpoints.run_state import RunState
from trainer.engines.base import Engine

log = logging.getLogger("fluxfill")


def open_samples(config: Config, model: Path, engine: Engine, console: Console) -> TrainingSet:
    """The run's training set: its cache, or with data.mode online its pictures; all ranks call it.

    Raises InputError if the cache is not there or not that of the config; or of pictures and devices.
    """
    if config.data.mode == "cached":
        return CachedTrainingSet(
            open_cache(config, model, check_shards=engine.is_main), threads=config.data.reader_threads
        )
    device = encoder_device(config, local_rank=engine.local_rank, own=engine.device)
    # Rank 0 reads the pictures, for all; and tells all if something is wrong with them.
    planned: Any = None
    if engine.is_main:
        try:
            planned = plan_online(config, model, console)
        except InputError as error:
            planned = (StorageFailed if isinstance(error, StorageFailed) else InputError)(str(error))
    planned = engine.ranks.broadcast_object(planned)
    if isinstance(planned, InputError):
        raise planned
    log.info("data.mode online: pictures are encoded on %s%s", device, " too" if device == engine.device else "")
    return OnlineTrainingSet(config, model, planned, device=device, worker=which_worker(os.environ))


def choose_order(config: Config, samples: TrainingSet, *, num_nodes: int = 1) -> OrderSettings:
    """Settings of the order of a run that starts now; one that is resumed keeps its own.

    num_nodes: that the run's processes are on; only how many shards are shuffled together hangs on it, where copies
    have little room.  Raises InputError if data.streams cannot share a global batch, or if copies have too little.
    """
    streams = config.data.streams
    return OrderSettings.current(
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        weights={dataset.name: dataset.weight for dataset in config.data.datasets},
        shards=hash_shards(samples.table.path, _training_samples(samples), samples.table.plan),
        streams=streams,
        block_shards=BLOCK_SHARDS if samples.copies is None else _fitting_block_shards(samples, streams, num_nodes),
    )


def _fitting_block_shards(samples: TrainingSet, streams: int, num_nodes: int) -> int:
    """Shards that are shuffled together: fewer where their copies would not fit this node. Raises InputError if not
    even blocks of one shard fit."""
    copies = samples.copies
    assert copies is not None
    for block_shards in range(BLOCK_SHARDS, 0, -1):
        if _held_bytes(samples, block_shards, streams, num_nodes) <= copies.prefetch_bytes:
            return block_shards
    needed = _held_bytes(samples, 1, streams, num_nodes) / copies.prefetch_share
    raise InputError(
        f"data.local_cache_gib is {copies.limit_bytes / 2**30:g}, but shards of "
        f"{int(samples.table.bytes.max()) / 2**30:.2g} GiB in {len(_shards_of_pools(samples))} buckets need at least "
        f"{needed / 2**30:.2g}. Raise it, make smaller shards (data.shard_size_mib), or set data.streams to the number "
        "of nodes at most."
    )


def _held_bytes(samples: TrainingSet, block_shards: int, streams: int, num_nodes: int) -> int:
    """Of copies on one node: of each pool (dataset and bucket) and each stream that the node reads, the block in use
    and the one that is fetched for it."""
    blocks = 2 * -(-streams // num_nodes)
    shards = np.minimum(blocks * block_shards, _shards_of_pools(samples))
    return int(shards.sum()) * int(samples.table.bytes.max())


def _shards_of_pools(samples: TrainingSet) -> np.ndarray:
    """How many shards each pool trains on."""
    table, trains = samples.table, _training_samples(samples) > 0
    datasets, dataset_of = np.unique(table.dataset[trains], return_inverse=True)
    buckets, bucket_of = np.unique(table.bucket[trains], return_inverse=True)
    counts = np.bincount(dataset_of * len(buckets) + bucket_of, minlength=len(datasets) * len(buckets))
    return counts[counts > 0]


def _training_samples(samples: TrainingSet) -> np.ndarray:
    """Samples of each shard, 0 for those held out."""
    return np.where(samples.table.split == TRAIN, samples.table.samples, 0)


def largest_bucket(samples: TrainingSet) -> Bucket:
    """Of those that are trained on, the one of the most tokens."""
    trains = _training_samples(samples) > 0
    names = np.unique(samples.table.bucket[trains | ~trains.any()])  # if none is, opening the stream says so
    return max((Bucket.parse(str(name)) for name in names), key=lambda bucket: bucket.tokens)


def open_stream(
    config: Config, engine: Engine, samples: TrainingSet, state: RunState, micro_batch_size: int
) -> BatchStream:
    """This rank's micro-batches from the run's place in the order. Raises InputError if there is nothing to train.

    micro_batch_size: of the largest bucket; of smaller ones as many tokens.
    """
    table = samples.table
    order = Order(table.dataset, table.bucket, _training_samples(samples), state.order)
    if engine.is_main:
        for dataset in sorted(state.order.weights.keys() - set(table.dataset[_training_samples(samples) > 0].tolist())):
            held_out = samples.manifest.samples.get(dataset, {}).get(HOLDOUT, 0)
            log.warning("%s. %s", *explain_untrained(dataset, held_out))
    if (copies := samples.copies) is not None:
        held = _held_bytes(samples, state.order.block_shards, state.order.streams, engine.num_nodes)
        if engine.is_main and held > copies.prefetch_bytes:  # of a run that began with more room, or on more nodes
            log.warning(
                "data.local_cache_gib is %.3g, but this run's order holds up to %.3g GiB of a node: where it does not "
                "fit, shards are fetched more than once",
                copies.limit_bytes / 2**30,
                held / copies.prefetch_share / 2**30,
            )
    log.info(
        "data: %d samples, %d a batch, %d process(es)",
        order.num_samples,
        state.order.global_batch_size,
        engine.world_size,
    )
    return BatchStream(
        samples.manifest,
        order,
        samples.open_rows(order, _row_policy(config), state.replaced),
        rank=engine.rank,
        world_size=engine.world_size,
        micro_batch_size=micro_batch_size,
        start=state.batch,
        excluded=state.excluded,
        pin_memory=engine.device.type == "cuda",
    )


def restart_stream(config: Config, samples: TrainingSet, stream: BatchStream, state: RunState) -> None:
    """Have the stream go on from another place in the order, as one that is opened there."""
    stream.close()  # first: the encoders are at work for it, and two readers would share a node's copies
    source = samples.open_rows(stream.order, _row_policy(config), state.replaced)
    stream.restart(source, state.batch, state.excluded)


def _row_policy(config: Config) -> RowPolicy:
    return RowPolicy(
        mask_choice=config.data.mask_choice,
        caption_dropout=config.data.captions.dropout,
        mask_dropout=config.data.mask_dropout,
        unmasked_probability=config.flow.unmasked_probability,
        max_bad_samples=config.guard.max_bad_samples,
    )
