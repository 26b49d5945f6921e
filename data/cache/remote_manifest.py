"""The manifest of a remote cache and the small files that it lists, copied to this node.

A copy lies in heads/<hash of the URL>-<hash of the manifest>/. The kernel's locks say who does what there, and end with
a process however it ends: whoever fetches, or deletes, holds fetch.lock; whoever reads holds in-use.lock, shared, until
its process ends, and such a copy is not deleted.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import xxhash

from configs.errors import InputError
from data.cache.manifest import Manifest, hash_files, parse_manifest
from data.cache_layout import MANIFEST
from data.storage.atomic_write import part_path, write_atomically
from data.storage.file_handle import FileHandle, is_at
from data.storage.file_locks import lock, require_file_locks, try_lock, unlock
from data.storage.remote_files import open_url
from data.storage.retry import with_retries

_PARALLEL = 8
_FETCH_LOCK, _IN_USE_LOCK = "fetch.lock", "in-use.lock"
_TO_LOCK = os.O_RDWR | os.O_CREAT  # NFS wants a file that is open for writing

_in_use: dict[Path, FileHandle] = {}  # the copies that this process reads


def fetch_manifest(url: str, local_cache: Path) -> Path:
    """The folder of a remote cache's copy without its shards, each file checked against the manifest.

    The processes of a node share it: the first one fetches, the others wait. It stays as long as this process, and
    goes when a later manifest of this URL was fetched and nobody reads it any more. Raises InputError, naming the URL,
    for what cannot be fetched after many attempts, and for a manifest that is none; or naming data.local_cache, if that
    cannot be written to.
    """
    require_file_locks("data.cache at a URL")
    place = f"{url}/{MANIFEST}"
    data = with_retries(partial(_read, place), place)
    manifest = parse_manifest(data, place)
    of_url = xxhash.xxh3_64_hexdigest(url.encode())
    folder = local_cache / "heads" / f"{of_url}-{xxhash.xxh3_64_hexdigest(data)}"
    fetching = _lock_to_fetch(folder, local_cache)
    try:
        missing = _missing(folder, manifest)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for fetched in [pool.submit(_fetch, url, folder, path, manifest.files[path]) for path in missing]:
                fetched.result()
        write_atomically(folder / MANIFEST, lambda temporary: temporary.write_bytes(data))
        _in_use[folder] = FileHandle(folder / _IN_USE_LOCK, _TO_LOCK)
        try_lock(_in_use[folder], shared=True)  # nobody is in the way: who deletes holds fetch.lock
    finally:
        unlock(fetching)  # not left to the handle's end: an error may keep it
    for earlier in folder.parent.glob(f"{of_url}-*"):
        if earlier != folder:
            _delete_unless_used(earlier)
    return folder


def _lock_to_fetch(folder: Path, local_cache: Path) -> FileHandle:
    """fetch.lock of a copy's folder, made and held: the first that is written in data.local_cache. Raises InputError if
    nothing can be."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = FileHandle(folder / _FETCH_LOCK, _TO_LOCK)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and folder.parent.is_dir():
                continue  # deleted meanwhile
            raise InputError(
                f"data.local_cache {local_cache}: cannot be written to ({error.strerror}). Point data.local_cache at a "
                "folder of this node that can."
            ) from error
        lock(handle)
        if is_at(handle, folder / _FETCH_LOCK):
            return handle


def _delete_unless_used(folder: Path) -> None:
    """Delete a copy that no process fetches or reads, or what a killed one left of deleting it."""
    try:
        fetching = FileHandle(folder / _FETCH_LOCK, _TO_LOCK)
        if not (try_lock(fetching) and is_at(fetching, folder / _FETCH_LOCK)):
            return
        in_use = FileHandle(folder / _IN_USE_LOCK, _TO_LOCK)
        if not try_lock(in_use):
            return
        deleted = part_path(folder)
        folder.rename(deleted)  # at once: whoever needs it from now on makes another
    except OSError:  # another process deletes it, or it is another user's
        return
    shutil.rmtree(deleted, ignore_errors=True)


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
