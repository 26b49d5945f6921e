"""What the tests of preprocessing share: the demo's triples, encoded in batches of four."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from configs.schema import Config
from data.preprocessing.run import preprocess
from tests.data.made_caches import stored_shards


@pytest.fixture
def in_fours(demo_config: Callable, tmp_path: Path) -> Config:
    """A config that encodes the demo's 96 triples in batches of four."""
    return demo_config(tmp_path / "cache", "data.encode_batch_size=4")


@pytest.fixture(scope="session")
def shards_of_fours(demo_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    """The shards that come out of `in_fours`, as `stored_shards` reads them."""
    config = demo_config(tmp_path_factory.mktemp("in-fours") / "cache", "data.encode_batch_size=4")
    preprocess(config, Console(quiet=True))
    return stored_shards(config.data.cache_folder)
