"""What the tests of several folders share: the demo's triples, the tiny FLUX models and the cache made with them, each
made once a session."""

from __future__ import annotations

import gc
import http.server
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.environment import forget_the_machine, hide_gpus, process_of_before

forget_the_machine(os.environ)  # before what reads it when it is imported

from configs.lighter_imports import lighten_imports  # noqa: E402
from configs.this_machine import available_memory_bytes, count_cores  # noqa: E402

if TYPE_CHECKING:
    from configs.schema import Config
    from data.cache.open_cache import Cache

ROOT = Path(__file__).resolve().parents[1]

lighten_imports()  # as in every program of ours


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        hide_gpus(os.environ)


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_auto_num_workers() -> int:
    """Files at a time, one more than there are cores: those of SLURM and of real launches wait for minutes. Each may
    start four ranks, of 1 GB."""
    room = available_memory_bytes() or float("inf")
    return int(max(1, min(count_cores() + 1, 4, room // (5 * 2**30))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with most tests: a file is one process's, and the last long one would
    leave the other cores idle."""
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a GPU, where they were chosen and there is none, are skipped."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")


def pytest_collection_finish() -> None:
    """What the test files have imported is no garbage: neither a collection nor the exit need go through it."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_a_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """GPU profiles of whoever runs the tests lie in ~/.config, unless that is said to be elsewhere. A real folder:
    Chromium writes there."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(autouse=True)
def a_tests_process() -> Iterator[None]:
    with process_of_before():
        yield


@pytest.fixture(autouse=True, scope="module")
def a_files_process() -> Iterator[None]:
    """A file's shared fixtures may need what they have set until its last test."""
    with process_of_before():
        yield


# The fixtures import what they need themselves: diffusers takes 10 s, and most tests need none of it.


@pytest.fixture(scope="session")
def triples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target/, source/ and mask/: the demo's 96 triples, captions beside the targets. Read only."""
    from demo.photographs import write_triples

    folder = tmp_path_factory.mktemp("demo") / "triples"
    write_triples(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1-Fill in diffusers' folder layout. Read only."""
    from demo.tiny_model import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny-fill"
    build_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dev_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1-dev (64 input channels) in diffusers' folder layout. Read only."""
    from demo.tiny_model import build_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny-dev"
    build_tiny_model(folder, in_channels=64)
    return folder


@pytest.fixture(scope="session")
def demo_config(tiny_model: Path, triples: Path) -> Callable[..., Config]:
    """Makes a config of the demo's triples and the tiny model: `demo_config(cache_folder, "key=value", ...)`.

    Square crops of 64 px and their like, half of the 96 held out, T5 texts of 32 tokens.
    """
    from configs.loading import load_config

    def make(cache: Path, *overrides: str) -> Config:
        folders = [f"data.datasets.0.{role}={triples / role}" for role in ("target", "source", "mask")]
        sizes = ["data.resolution=64", "data.holdout=48", "data.shard_size_mib=1", "data.captions.text_length=32"]
        given = [f"model.base={tiny_model}", f"data.cache={cache}", *folders, *sizes, *overrides]
        return load_config(ROOT / "configs" / "demo.yaml", given)

    return make


@pytest.fixture(scope="session")
def cache(demo_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The demo's triples, encoded by the tiny model as `demo_config` says. Read only: damage a copy of its folder."""
    from rich.console import Console

    from data.cache.open_cache import open_cache
    from data.preprocessing.run import preprocess

    config = demo_config(tmp_path_factory.mktemp("cache") / "cache")
    preprocess(config, Console(quiet=True))
    return open_cache(config, Path(config.model.base))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable], str]]:
    """Starts a server on this machine: `serve(handler)` -> its URL. Plain http is allowed as long as the test runs."""
    monkeypatch.setattr("configs.urls.SCHEMES", ("https", "s3", "gs", "http"))
    servers = []

    def start(get):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                get(self)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
