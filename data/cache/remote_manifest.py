"""The manifest of a remote cache and the small files that it lists, copied to this node."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TextIO

import xxhash

from configs.errors import InputError
from data.cache.manifest import Manifest, hash_files, parse_manifest
from data.cache_layout import MANIFEST
from data.storage.atomic_write import write_atomically
from data.storage.file_locks import lock, require_file_locks
from data.storage.remote_files import open_url
from data.storage.retry import with_retries

_PARALLEL = 8


def fetch_manifest(url: str, local_cache: Path) -> Path:
    """The folder of a remote cache's copy without its shards, each file checked against the manifest.

    The processes of a node share it: the first one fetches, the others wait. Raises InputError, naming the URL, for
    what cannot be fetched after many attempts, and for a manifest that is none; or naming data.local_cache, if that
    cannot be written to.
    """
    require_file_locks("data.cache at a URL")
    place = f"{url}/{MANIFEST}"
    data = with_retries(partial(_read, place), place)
    manifest = parse_manifest(data, place)
    folder = local_cache / "heads" / f"{xxhash.xxh3_64_hexdigest(url.encode())}-{xxhash.xxh3_64_hexdigest(data)}"
    with _open_lock(folder / "fetch.lock", local_cache) as fetching:
        lock(fetching)
        missing = _missing(folder, manifest)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for fetched in [pool.submit(_fetch, url, folder, path, manifest.files[path]) for path in missing]:
                fetched.result()
        write_atomically(folder / MANIFEST, lambda temporary: temporary.write_bytes(data))
    return folder


def _open_lock(path: Path, local_cache: Path) -> TextIO:
    """The first that is written in data.local_cache. Raises InputError if nothing can be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise InputError(
            f"data.local_cache {local_cache}: cannot be written to ({error.strerror}). Point data.local_cache at a "
            "folder of this node that can."
        ) from error


def _missing(folder: Path, manifest: Manifest) -> list[str]:
    return [path for path, found in hash_files(folder, manifest.files).items() if found != manifest.files[path]]


def _fetch(url: str, folder: Path, path: str, xxh3: str) -> None:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)

    def attempt() -> None:
        data = _read(f"{url}/{path}")
        if xxhash.xxh3_128_hexdigest(data) != xxh3:
            raise OSError(f"{len(data)} bytes that the manifest does not speak of; they begin with {data[:40]!r}")
        write_atomically(target, lambda temporary: temporary.write_bytes(data))

    with_retries(attempt, f"{url}/{path}")


def _read(url: str) -> bytes:
    with open_url(url) as file:
        return file.read()
