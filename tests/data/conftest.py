"""Small real shards and caches of made-up samples, for tests that need no model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file

from data.batches.order import ORDER_VERSION
from data.cache.manifest import FORMAT_VERSION, Manifest, ShardTable, write_manifest
from data.cache.open_cache import Cache
from data.cache.shard_index import ShardIndex, count_hole_fractions
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.cache_layout import EMPTY_TEXT, full_mask_name
from data.encoders.stored_text import store_text
from data.samples.geometry import Bucket
from data.samples.plan import HOLDOUT, TRAIN
from tests.data.storage.remote_server import SHARDS, Remote
from tests.data.storage.small_disk import SmallDisk, open_small_disk

TEXT_LENGTH, TEXT_WIDTH, POOLED_WIDTH = 8, 6, 4


def _generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode()) >> 1)


def _make_sample(key: str, bucket: Bucket, *, text: str, num_variants: int = 1) -> SampleTensors:
    """A sample that is a function of its key."""
    random = _generator_of(key)

    def latents() -> torch.Tensor:
        return torch.randn(bucket.latent_shape, generator=random).bfloat16()

    masks = [(torch.rand(bucket.height, bucket.width, generator=random) < 0.4).numpy() for _ in range(num_variants)]
    return SampleTensors(
        key=key,
        latents=latents(),
        masked_latents=[latents() for _ in range(num_variants)],
        masks=masks,
        text=text,
        tokens=int(torch.randint(1, TEXT_LENGTH, (), generator=random)),
        meta={"caption": f"the caption of {text}"},
    )


def _make_text(text: str, text_dtype: str = "bf16") -> dict[str, torch.Tensor]:
    """A caption's tensors that are a function of the text's name."""
    random = _generator_of(text)
    t5 = torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=random)
    return store_text(t5, torch.randn(POOLED_WIDTH, generator=random), text_dtype)


def _write_shard(
    path: Path,
    bucket: Bucket,
    keys: Sequence[str],
    *,
    num_texts: int = 2,
    num_variants: int = 1,
    text_dtype: str = "bf16",
) -> ShardIndex:
    """A shard whose samples share `num_texts` texts in turn."""
    texts = [f"text-{number:016x}" for number in range(min(num_texts, len(keys)))]
    with ShardWriter(path) as writer:
        for text in texts:
            writer.add_text(text, **_make_text(text, text_dtype))
        for row, key in enumerate(keys):
            writer.add_sample(_make_sample(key, bucket, text=texts[row % len(texts)], num_variants=num_variants))
        return writer.finish(plan=xxhash.xxh3_128_hexdigest(str(path.name).encode()))


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., SampleTensors]:
    """Makes a sample: `make_sample(key, bucket, text="text-1", num_variants=1)`, the same every time."""
    return _make_sample


@pytest.fixture(scope="session")
def make_text() -> Callable[[str], dict[str, torch.Tensor]]:
    """Makes the tensors of a text: `make_text(name)`, the same every time."""
    return _make_text


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., ShardIndex]:
    """Writes a shard: `write_shard(path, bucket, keys, num_texts=2, num_variants=1)`, of `make_sample`'s samples."""
    return _write_shard


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

    def make(shards: Sequence[tuple], *, num_variants: int = 1, text_dtype: str = "bf16") -> Cache:
        folder = tmp_path / "made-up-cache"
        rows = []
        for number, (dataset, bucket, samples, *split) in enumerate(shards):
            path = f"shards/{dataset}/{bucket}-{number:06d}.tar"
            keys = [f"{dataset}-{number}-{row}" for row in range(samples)]
            options: dict[str, Any] = {"num_variants": num_variants, "text_dtype": text_dtype}
            index = _write_shard(folder / path, Bucket.parse(bucket), keys, **options)
            rows.append((path, dataset, bucket, *(split or [TRAIN]), samples, index))
        indexes = [row[-1] for row in rows]
        table = ShardTable(
            path=np.array([row[0] for row in rows]),
            dataset=np.array([row[1] for row in rows]),
            bucket=np.array([row[2] for row in rows]),
            split=np.array([row[3] for row in rows]),
            samples=np.array([row[4] for row in rows], dtype=np.int64),
            bytes=np.array([index.tar_bytes for index in indexes], dtype=np.int64),
            sha256=np.array([index.tar_sha256 for index in indexes]),
            plan=np.array([index.plan for index in indexes]),
        )
        datasets = sorted(set(table.dataset.tolist()))
        counts = {name: {TRAIN: 0, HOLDOUT: 0} for name in datasets}
        for row in rows:
            counts[row[1]][row[3]] += row[4]
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            order_version=ORDER_VERSION,
            settings={},
            encoders={},
            vae_shift=0.1159,
            vae_scale=0.3611,
            text_length=TEXT_LENGTH,
            text_dtype=text_dtype,
            text_width=TEXT_WIDTH,
            pooled_width=POOLED_WIDTH,
            mask_variants=dict.fromkeys(datasets, num_variants),
            samples=counts,
            hole_fractions={name: count_hole_fractions(row[-1] for row in rows if row[1] == name) for name in datasets},
        )
        save_file(_make_text("the empty caption", text_dtype), folder / EMPTY_TEXT)
        for name in set(table.bucket.tolist()):
            blank = torch.randn(Bucket.parse(name).latent_shape, generator=_generator_of(f"blank {name}"))
            save_file({"masked_latents": blank.bfloat16()}, folder / full_mask_name(name))
        return Cache(folder, write_manifest(folder, manifest, table), table)

    return make


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
