"""What the tests of preprocessing share: the demo's triples, encoded in batches of four."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from configs.schema import Config
from data.preprocessing.run import preprocess
from tests.data.made_caches import stored_shards
from tests.data.preprocessing.made_jobs import write_triple
from tests.data.preprocessing.made_shared_job import PICTURES, contents, write_numbered_triple
from tests.workers import start_worker


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


@pytest.fixture
def make_pictures(tmp_path):
    """Writes triples of noise, 32 px, each with a caption of its own: `make_pictures(count)`; returns their folder."""
    folder = tmp_path / "pictures"

    def make(count):
        for number in range(count):
            write_triple(folder, f"picture-{number:02d}", seed=number)
        return folder

    return make


@pytest.fixture
def config_of(demo_config, tmp_path):
    """Makes a config of a folder of `make_pictures`. T5 texts take 64 KiB each, so 16 samples fill a shard of 1 MiB."""

    def make(folder, *overrides, cache="cache"):
        datasets = [f"data.datasets=[{{name: noise, target: {folder}/target, mask: {folder}/mask}}]"]
        sizes = ["data.resolution=32", "data.holdout=0", "data.captions.text_length=512", "data.shard_size_mib=1"]
        return demo_config(tmp_path / cache, *datasets, *sizes, *overrides)

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of triples of noise, 32 px, each with a caption of its own; five shards or more. Read only."""
    folder = tmp_path_factory.mktemp("workers") / "pictures"
    for number in range(PICTURES):
        write_numbered_triple(folder, number)
    return folder


@pytest.fixture(scope="module")
def job_of(demo_config):
    """Makes a config: `job_of(cache, folder, *overrides)`. Texts take 64 KiB each, so 16 samples fill a shard."""

    def make(cache, folder, *overrides):
        datasets = [f"data.datasets=[{{name: noise, target: {folder}/target, mask: {folder}/mask}}]"]
        sizes = ["data.resolution=32", "data.holdout=6", "data.captions.text_length=512", "data.shard_size_mib=1"]
        return demo_config(cache, *datasets, *sizes, "data.encode_batch_size=2", *overrides)

    return make


@pytest.fixture(scope="module")
def undisturbed(job_of, pictures, tmp_path_factory):
    """(files of the cache that one worker made alone, how often it changed the folder)."""
    config = job_of(tmp_path_factory.mktemp("undisturbed") / "cache", pictures)
    code, message, changes = start_worker(config).join()
    assert (code, message) == (0, "")
    files = contents(config.data.cache)
    assert len([name for name in files if name.endswith(".tar")]) >= 5
    return files, changes
