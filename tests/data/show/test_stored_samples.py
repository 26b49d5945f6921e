import numpy as np
import pytest
import torch

from configs.errors import InputError
from data.cache.shard_index import read_index
from data.samples.geometry import Bucket
from data.show.stored_samples import read_samples, spread_samples
from tests.data.made_caches import index_of

SHARDS = [("photos", "48x64", 5), ("photos", "48x64", 1), ("photos", "32x32", 4), ("removal", "48x64", 2)]


def test_stored_samples_are_what_was_written(make_cache, make_sample):
    cache = make_cache(SHARDS, num_variants=2)
    for sample in read_samples(cache.folder, cache.manifest, cache.table, [(0, 3), (2, 0), (3, 1)]):
        number, row = sample.key.split("-")[1:]
        text = f"text-{int(row) % 2:016x}"
        bucket = Bucket.parse(SHARDS[int(number)][1])
        written = make_sample(sample.key, bucket, text=text, num_variants=2)
        assert torch.equal(sample.latents, written.latents)
        for variant in range(2):
            assert torch.equal(sample.masked_latents[variant], written.masked_latents[variant])
            np.testing.assert_array_equal(sample.masks[variant], written.masks[variant])
        assert sample.meta["caption"] == written.meta["caption"]
        assert (sample.bucket, sample.shard) == (str(bucket), str(cache.table.path[int(number)]))


def test_samples_are_spread_over_all_shards(make_cache):
    table = make_cache(SHARDS).table
    everything = [(shard, row) for shard, (_, _, count) in enumerate(SHARDS) for row in range(count)]
    assert spread_samples(table, [0, 1, 2, 3], 100) == everything
    assert spread_samples(table, [0, 1, 2, 3], 4) == [(0, 1), (0, 4), (2, 1), (3, 0)]
    assert spread_samples(table, [2], 2) == [(2, 1), (2, 3)]
    for count in range(1, 13):
        chosen = spread_samples(table, [0, 1, 2, 3], count)
        assert len(set(chosen)) == count and set(chosen) <= set(everything)


def test_a_damaged_sample_is_not_shown(make_cache):
    cache = make_cache(SHARDS)
    path = cache.folder / str(cache.table.path[0])
    data = bytearray(path.read_bytes())
    data[int(read_index(index_of(path)).latents[2, 0]) + 300] ^= 1
    path.write_bytes(data)
    assert len(list(read_samples(cache.folder, cache.manifest, cache.table, [(0, 1)]))) == 1
    with pytest.raises(InputError, match=r"48x64-000000.tar: the \d+ bytes at \d+ do not match their checksum"):
        list(read_samples(cache.folder, cache.manifest, cache.table, [(0, 2)]))
