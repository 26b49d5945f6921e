"""Streams of made-up caches, for the tests of what reads them."""

import os
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.batches.batch_stream import BatchStream
from data.batches.cached_rows import CachedRows
from data.batches.micro_batch import MicroBatch
from data.batches.order import Order, OrderSettings, hash_shards
from data.batches.shard_reader import ShardReader
from data.samples.plan import TRAIN

SEED = 11
SHARDS = [
    ("photos", "48x64", 5),
    ("photos", "48x64", 3),
    ("photos", "32x32", 4),
    ("photos", "64x32", 3),
    ("photos", "48x64", 9, "holdout"),
    ("removal", "48x64", 7),
]


def open_stream(
    cache,
    *,
    size=7,
    rank=0,
    world_size=1,
    micro=2,
    streams=1,
    start=0,
    excluded=(),
    depth=3,
    pin_memory=False,
    **options,
):
    """options: of ShardRows."""
    table = cache.table
    samples = np.where(table.split == TRAIN, table.samples, 0)
    weights = dict.fromkeys(table.dataset.tolist(), 1.0)
    settings = OrderSettings.current(
        seed=SEED,
        global_batch_size=size,
        weights=weights,
        shards=hash_shards(table.path, samples, table.plan),
        streams=streams,
    )
    order = Order(table.dataset, table.bucket, samples, settings)
    return BatchStream(
        cache.manifest,
        order,
        CachedRows(cache, order, **options),
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro,
        start=start,
        excluded=excluded,
        depth=depth,
        pin_memory=pin_memory,
    )


def copy_of(rows: MicroBatch) -> MicroBatch:
    return replace(rows, **{name: value.clone() for name, value in vars(rows).items() if isinstance(value, Tensor)})


def take(cache, num_batches, **options):
    """The first batches of a stream: a list of micro-batches each."""
    stream = open_stream(cache, **options)
    batches = [[copy_of(rows) for rows in next(stream)] for _ in range(num_batches)]
    stream.close()
    return batches


def rows_by_position(micro_batches):
    """Position -> bytes of all of a row's tensors, for the rows that count."""
    found = {}
    for rows in micro_batches:
        for place in torch.nonzero(rows.weight).flatten().tolist():
            position = int(rows.position[place])
            assert position not in found, "a row came twice"
            found[position] = tuple(
                bytes(value[place].contiguous().view(-1).view(torch.uint8).numpy())
                for value in vars(rows).values()
                if isinstance(value, Tensor)
            )
    return found


def open_tars(cache):
    """The shards of a cache that this process has open."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue
    return [path for path in paths if path.startswith(str(cache.folder)) and path.endswith(".tar")]


def damage(cache, *rows, part="latents", shard=0):
    """Flip a bit in a member of some rows of a shard."""
    path = cache.folder / str(cache.table.path[shard])
    index = ShardReader(cache).shard(shard).index
    data = bytearray(path.read_bytes())
    for row in rows:
        place = {
            "latents": index.latents[row],
            "masked": index.masked[row, -1],
            "text": index.texts[index.text_row[row]],
        }
        data[int(place[part].sum()) - 20] ^= 1
    path.write_bytes(data)
