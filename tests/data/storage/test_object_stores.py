"""s3:// and gs:// by their real drivers, against servers that speak their protocols on this machine."""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

import fsspec
import pytest

from benchmarks.ranks import own_port
from configs.errors import InputError, StorageFailed
from data.cache.node_cache import NodeCache
from data.cache.remote_manifest import fetch_manifest
from data.storage.remote_files import open_url, read_range, url_stamp
from data.storage.retry import with_retries
from tests.data.batches.streams import rows_by_position, take
from tests.data.storage.remote_server import SHARDS
from tests.patience import PATIENCE


class Proxy:
    """Passes connections on to a port, unless it is down: then it hangs up on them, also on those that are open."""

    def __init__(self, port: int) -> None:
        self._target, self.is_down, self.refused = port, threading.Event(), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        # One end may hang up at any time, or not be there yet.
        with client, suppress(ConnectionError), socket.create_connection(("127.0.0.1", self._target)) as server:
            other = {client: server, server: client}
            while True:
                readable, _, _ = select.select(list(other), [], [], 0.02)
                if self.is_down.is_set():
                    self.refused += 1
                    return
                for end in readable:
                    if not (data := end.recv(1 << 16)):
                        return
                    other[end].sendall(data)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def ports():
    """scheme -> port of its server."""
    with own_port() as of_s3, own_port() as of_gs:
        yield {"s3": of_s3, "gs": of_gs}


@pytest.fixture(scope="module")
def proxies(ports):
    """scheme -> Proxy in front of a server of that scheme with a bucket `bucket`. The drivers find it by what their
    documentation names."""
    from gcp_storage_emulator.server import create_server

    moto = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports["s3"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    emulator = create_server("127.0.0.1", ports["gs"], in_memory=True, default_bucket="bucket")
    emulator.start()
    found = {scheme: Proxy(port) for scheme, port in ports.items()}
    settings = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{found['s3'].port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_CONFIG_FILE": os.devnull,  # whoever runs the tests may have settings of their own
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{found['gs'].port}",
    }
    before = {name: os.environ.get(name) for name in (*settings, "AWS_PROFILE", "AWS_SESSION_TOKEN")}
    for name in before:
        os.environ.pop(name, None)
    os.environ.update(settings)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
            break
        except Exception:
            assert moto.poll() is None and time.monotonic() < deadline, "moto's server does not start"
            time.sleep(0.2)
    yield found
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for proxy in found.values():
        proxy.close()
    emulator.stop()
    moto.terminate()
    moto.wait(timeout=PATIENCE)


@pytest.fixture(params=["s3", "gs"])
def store(request, proxies):
    """(URL of a bucket's folder of this test's own, the driver, the Proxy)."""
    scheme = request.param
    url = f"{scheme}://bucket/{request.node.name.split('[')[0]}"
    yield url, fsspec.filesystem(scheme), proxies[scheme]
    proxies[scheme].is_down.clear()


def test_a_file_its_parts_and_its_state_are_read(store):
    url, driver, _ = store
    driver.pipe(f"{url}/a.tar", bytes(range(256)) * 100)
    with open_url(f"{url}/a.tar") as file:
        assert file.read() == bytes(range(256)) * 100
    assert read_range(f"{url}/a.tar", 250, 12) == bytes([*range(250, 256), *range(6)])
    assert read_range(f"{url}/a.tar", 25590, 100) == bytes(range(246, 256)), "fewer where it ends before"
    first = url_stamp(f"{url}/a.tar")
    assert url_stamp(f"{url}/a.tar") == first is not None
    driver.pipe(f"{url}/a.tar", b"other")
    driver.invalidate_cache()
    assert url_stamp(f"{url}/a.tar") != first


def test_what_is_not_there_is_named_at_once(store):
    url, _, _ = store
    for read in (
        lambda: open_url(f"{url}/none.tar").__enter__().read(),
        lambda: read_range(f"{url}/none.tar", 0, 9),
        lambda: url_stamp(f"{url}/none.tar"),
    ):
        with pytest.raises(InputError, match=rf"{url}/none\.tar: not there, or closed to you"):
            with_retries(read, "it")


def test_a_cache_trains_as_its_folder_does(store, make_cache, tmp_path):
    url, driver, _ = store
    cache = make_cache(SHARDS)
    driver.put(str(cache.folder), url, recursive=True)
    copies = NodeCache(url, tmp_path / "node", 1 << 30, cache.table)
    far = replace(cache, folder=fetch_manifest(url, tmp_path / "node"), copies=copies)
    assert [rows_by_position(b) for b in take(far, 6)] == [rows_by_position(b) for b in take(cache, 6)]


@pytest.mark.fault(8, "a bucket that is down for a while")
def test_a_store_that_is_down_for_a_while_is_waited_for(store, make_cache, tmp_path, no_waits):
    """What a driver's error holds on to (its frames hold the copy's lock) keeps nobody waiting afterwards."""
    url, driver, proxy = store
    cache = make_cache(SHARDS)
    driver.put(str(cache.folder), url, recursive=True)
    copies = NodeCache(url, tmp_path / "node", 1 << 30, cache.table)
    proxy.is_down.set()
    found = []
    opening = threading.Thread(
        target=lambda: found.append(copies.open(1, stop=threading.Event(), attempts=1000)), daemon=True
    )
    opening.start()
    before = proxy.refused
    deadline = time.monotonic() + PATIENCE
    while proxy.refused < before + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proxy.refused >= before + 3 and not found
    proxy.is_down.clear()
    opening.join(timeout=PATIENCE)
    assert found and os.fstat(found[0]).st_size == cache.table.bytes[1]


@pytest.mark.fault(8, "a bucket that stays down")
@pytest.mark.parametrize("store", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
def test_a_store_that_stays_down_is_named(store, make_cache, tmp_path, no_waits):
    """Google's driver tries by itself for half a minute; that is one attempt."""
    url, driver, proxy = store
    cache = make_cache(SHARDS)
    driver.put(str(cache.folder), url, recursive=True)
    copies = NodeCache(url, tmp_path / "node", 1 << 30, cache.table)
    proxy.is_down.set()
    with pytest.raises(StorageFailed, match=rf"{url}/shards/a/32x32-000001\.tar: failed 1 time\(s\)"):
        copies.open(1, stop=threading.Event(), attempts=1)
    assert not list((tmp_path / "node").rglob("*.part"))
