"""Streams of samples that are encoded when they are needed, beside those of a cache, for the tests of both."""

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from data.batches.batch_stream import BatchStream
from data.batches.micro_batch import MicroBatch
from data.batches.order import Order, OrderSettings, hash_shards
from data.batches.row_filler import RowPolicy
from data.online.training_set import OnlineTrainingSet, plan_online
from data.preprocessing.worker import Worker
from data.samples.plan import TRAIN
from data.samples.shard_plan import PlannedShard
from tests.data.batches.streams import copy_of

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
POLICY = RowPolicy(caption_dropout=0.3, mask_dropout=0.2)
_WORKER = Worker(decode_threads=2)
DRAWN = ("mask", "noise", "uniform", "unmasked", "weight", "position")


def open_online(config, worker=_WORKER) -> OnlineTrainingSet:
    return OnlineTrainingSet(config, Path(config.model.base), plan_of(config), device=CPU, worker=worker)


def plan_of(config) -> list[PlannedShard]:
    return plan_online(config, Path(config.model.base), QUIET)


def settings_of(samples, size) -> OrderSettings:
    table = samples.table
    counts = np.where(table.split == TRAIN, table.samples, 0)
    return OrderSettings.current(
        seed=5, global_batch_size=size, weights={"photographs": 1.0}, shards=hash_shards(table.path, counts, table.plan)
    )


def open_stream(samples, *, size=7, rank=0, world_size=1, micro=2, start=0, policy=POLICY, replaced=()) -> BatchStream:
    table = samples.table
    order = Order(
        table.dataset, table.bucket, np.where(table.split == TRAIN, table.samples, 0), settings_of(samples, size)
    )
    rows = samples.open_rows(order, policy, replaced)
    shape = {"rank": rank, "world_size": world_size, "micro_batch_size": micro}
    return BatchStream(samples.manifest, order, rows, start=start, **shape)


def take(samples, num_batches, **options) -> list[list[MicroBatch]]:
    stream = open_stream(samples, **options)
    try:
        return [[copy_of(rows) for rows in next(stream)] for _ in range(num_batches)]
    finally:
        stream.close()


def ulps(one: Tensor, other: Tensor) -> Tensor:
    """Steps of bf16 between the numbers of two tensors."""
    steps = [value.view(torch.int16).to(torch.int32) for value in (one, other)]
    ordered = [torch.where(value < 0, -32768 - value, value) for value in steps]
    return (ordered[0] - ordered[1]).abs()


def near(one: Tensor, other: Tensor) -> bool:
    """Equal before they were rounded to bf16, up to 1e-5: next to zero that is many steps, elsewhere one."""
    return bool(((ulps(one, other) <= 1) | ((one.float() - other.float()).abs() <= 2e-5)).all())


def assert_same(one: MicroBatch, other: MicroBatch, *, exactly: bool = False) -> None:
    assert (one.bucket, one.is_last) == (other.bucket, other.is_last)
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            found = getattr(other, name)
            assert (value.shape, value.dtype) == (found.shape, found.dtype)
            assert torch.equal(value, found) if exactly or name in DRAWN else near(value, found), name
