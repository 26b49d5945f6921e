import pytest

from data.samples.geometry import Bucket


@pytest.fixture(params=[1, 3], ids=["one variant", "three variants"])
def shard(request, tmp_path, write_shard):
    """(path, index, keys, variants) of a shard of five samples and two texts."""
    path = tmp_path / "shards" / "48x64-000001.tar"
    keys = [f"sample-{number}" for number in range(5)]
    return path, write_shard(path, Bucket(48, 64), keys, num_variants=request.param), keys, request.param
