import pytest
import torch

from configs.errors import InputError
from data.batches.training_set import CachedTrainingSet
from data.cache.open_cache import Cache
from data.show.stored_samples import read_samples


def test_validation_samples_have_the_tensors_that_are_stored_of_them(cache):
    """Read by another reader."""
    samples = CachedTrainingSet(cache).validation_samples(split="holdout", count=3)
    shards = cache.table.path.tolist()
    chosen = [(shards.index(sample.item.shard), sample.item.row) for sample in samples]
    for sample, stored in zip(samples, read_samples(cache.folder, cache.manifest, cache.table, chosen), strict=True):
        assert sample.item.key == stored.key
        assert torch.equal(sample.tensors["latents"], stored.latents)
        assert torch.equal(sample.tensors["masked_latents"], stored.masked_latents[0])
        assert sample.pixels.target.shape == (sample.bucket.height, sample.bucket.width, 3)


def test_a_cache_without_validation_pictures_says_so(make_cache):
    made: Cache = make_cache([("a", "32x32", 4)])
    with pytest.raises(InputError, match="fluxfill preprocess"):
        CachedTrainingSet(made).validation_samples(split="holdout", count=1)
