import pytest

from data.batches.training_set import CachedTrainingSet
from data.online.training_set import OnlineTrainingSet
from tests.data.online.online_streams import open_online


@pytest.fixture(scope="module")
def config(demo_config, tmp_path_factory):
    """That of the demo's cache, with nothing in data.cache."""
    return demo_config(tmp_path_factory.mktemp("online") / "scan", "data.mode=online", "data.encode_batch_size=3")


@pytest.fixture(scope="module")
def online(config) -> OnlineTrainingSet:
    return open_online(config)


@pytest.fixture(scope="module")
def cached(cache) -> CachedTrainingSet:
    return CachedTrainingSet(cache)
