"""What the tests of data/ share: makers of small shards and caches, a disk that can be filled, servers."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from data.cache.open_cache import Cache
from data.cache.shard_index import ShardIndex
from data.cache.shard_writer import SampleTensors
from tests.data import made_caches
from tests.data.made_caches import write_cache
from tests.data.storage.remote_server import SHARDS, Remote
from tests.data.storage.small_disk import SmallDisk, open_small_disk


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., SampleTensors]:
    """Makes a sample: `make_sample(key, bucket, text="text-1", num_variants=1)`, the same every time."""
    return made_caches.make_sample


@pytest.fixture(scope="session")
def make_text() -> Callable[[str], dict[str, torch.Tensor]]:
    """Makes the tensors of a text: `make_text(name)`, the same every time."""
    return made_caches.make_text


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., ShardIndex]:
    """Writes a shard: `write_shard(path, bucket, keys, num_texts=2, num_variants=1)`, of `make_sample`'s samples."""
    return made_caches.write_shard


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried at once."""
    monkeypatch.setattr("data.storage.retry.LONGEST_WAIT_SECONDS", 0.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A folder on a disk that can be filled."""
    with open_small_disk(tmp_path) as disk:
        yield disk


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., Cache]:
    """Makes a cache: `make_cache([("photos", "48x64", 5), ("photos", "48x64", 3), ("removal", "32x32", 4)])`.

    One entry a shard: dataset, bucket, number of samples and, if it is not "train", split.
    """

    return partial(write_cache, tmp_path / "made-up-cache")


@pytest.fixture
def serve_folder(serve):
    """Serves a folder: `serve_folder(folder)` -> (URL, list of (path, Range header) of every request).

    It knows ranges, and says the state of a file by an ETag of its size and time.
    """

    def start(folder: Path, *, ranges: bool = True):
        requests: list[tuple[str, str | None]] = []

        def get(handler):
            wanted = handler.headers.get("Range")
            requests.append((handler.path, wanted))
            path = folder / handler.path.lstrip("/")
            if not path.is_file():
                handler.send_error(404)
                return
            data, status = path.read_bytes(), path.stat()
            if wanted and ranges:
                begin, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
                handler.send_response(206)
                handler.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
                data = data[begin : end + 1]
            else:
                handler.send_response(200)
            handler.send_header("ETag", f'"{status.st_size}-{status.st_mtime_ns}"')
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

        return serve(get), requests

    return start


@pytest.fixture
def remote(make_cache: Callable[..., Cache], serve: Callable[[Callable], str]) -> tuple[str, Remote, Cache]:
    """(URL, server, the cache in its folder) of a cache of four small shards."""
    cache = make_cache(SHARDS, num_variants=2)
    server = Remote(cache.folder)
    return serve(server.get), server, cache
