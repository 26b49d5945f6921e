from dataclasses import replace

import pytest

from configs.errors import InputError
from data.shard_copies import ShardCopies
from trainer.batches import choose_order


@pytest.mark.parametrize("room, block_shards", [(100, 8), (11, 4), (6, 2), (2.8, 1)])
def test_blocks_are_as_large_as_the_nodes_copies_may_be(config, cache, tmp_path, room, block_shards):
    """One pool of many shards: the block in use and the next one are held, in three quarters of the room."""
    train = cache.table.split == "train"
    table = replace(cache.table, **{name: column[train][:1].repeat(20) for name, column in vars(cache.table).items()})
    copies = ShardCopies("https://host/cache", tmp_path, int(room * table.bytes[0]), table)
    remote = replace(cache, table=table, copies=copies)
    assert choose_order(config, remote).block_shards == block_shards
    assert choose_order(config, replace(remote, copies=None)).block_shards == 8


def test_copies_without_room_for_the_least_are_refused(config, cache, tmp_path):
    copies = ShardCopies("https://host/cache", tmp_path, 1000, cache.table)
    with pytest.raises(
        InputError, match=r"data\.local_cache_gib is .*e-07, but shards of .* GiB in \d+ buckets need at least"
    ):
        choose_order(config, replace(cache, copies=copies))
