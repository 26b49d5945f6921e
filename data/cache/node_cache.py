"""The node cache: shards of a remote cache, copied to a folder of this node that its processes share.

A copy has its content's name, <sha256>.tar, so runs and caches share it too, and is there only when its sha256 agreed.
The kernel's locks say who does what, and end with a process however it ends: whoever fetches a shard locks its .part
exclusively, the others wait; whoever reads a copy holds it by a shared lock, and such a copy is not removed.
"""

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import InputError, StorageFailed
from data.cache.manifest import FORMAT_VERSION, ShardTable
from data.cache.shard_index import read_index
from data.cache_layout import SHARDS, index_path
from data.storage.atomic_write import fsync_folder, write_atomically
from data.storage.file_handle import FileHandle, is_at
from data.storage.file_locks import lock, try_lock, unlock
from data.storage.remote_files import open_url
from data.storage.retry import ATTEMPTS, with_retries

log = logging.getLogger("fluxfill")

_CHUNK = 1 << 20
_POLL_SECONDS = 0.05


class NodeCache:
    """The copies of one cache's shards; safe to use from many threads and processes.

    url, format_version: of the cache.  folder: made if it is not there.  limit_bytes: what all copies in the folder may
    take; those not held by anyone go first, the longest unused of them first. Only a shard that is needed at once may
    exceed it.  prefetch_share: of it, that may be held for later.
    """

    prefetch_share = 0.6

    def __init__(
        self, url: str, folder: Path, limit_bytes: int, table: ShardTable, format_version: int = FORMAT_VERSION
    ) -> None:
        self.url, self.folder, self.limit_bytes = url, folder, limit_bytes
        self._table, self._format_version = table, format_version
        self._shards = folder / SHARDS
        self._shards.mkdir(parents=True, exist_ok=True)

    @property
    def prefetch_bytes(self) -> int:
        """Bytes that may be held for later; the rest is for what is open."""
        return int(self.limit_bytes * self.prefetch_share)

    @property
    def max_open(self) -> int:
        """Copies that one reader may keep open: each is held, also when nothing needs it any more."""
        return max(4, int(self.limit_bytes * (1 - self.prefetch_share)) // int(self._table.bytes.max()))

    def path(self, number: int) -> Path:
        """The path of a shard's copy, which may not be there."""
        return self._shards / f"{self._table.sha256[number]}.tar"

    def index_path(self, number: int) -> Path:
        """The path of its index: beside it, whatever its format."""
        return _index_of(self.path(number))

    def url_of(self, number: int) -> str:
        """The URL of a shard."""
        return f"{self.url}/{self._table.path[number]}"

    def open(
        self, number: int, *, stop: threading.Event, may_exceed: bool = True, attempts: int = ATTEMPTS
    ) -> FileHandle | None:
        """A shard's copy, fetched if need be, held as long as the handle lives.

        None if there is no room and it may not exceed the limit.  Raises InputError, naming shard and URL, if it cannot
        be fetched after so many attempts, or once `stop` is set.
        """
        while True:
            if (held := self._hold(number, stop)) is not None:
                if os.fstat(held).st_size == int(self._table.bytes[number]):
                    return held
                self.discard(number, held)
            if not self._fetch(number, stop, may_exceed, attempts):
                return None

    def discard(self, number: int, handle: FileHandle) -> None:
        """Delete a copy that is damaged, and its index: the next `open` fetches it again. Its readers read on.

        handle: of that copy. What others have fetched in its place since stays.
        """
        path = self.path(number)
        if is_at(handle, path):  # at worst a copy that came in this very moment goes too, and is fetched once more
            _index_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def _hold(self, number: int, stop: threading.Event) -> FileHandle | None:
        """A shared lock on a copy, which is now the one used last; None if it is not there."""
        try:
            handle = FileHandle(self.path(number))
            while not try_lock(handle, shared=True):
                if stop.wait(_POLL_SECONDS / 10):  # it is being made room with, or has just been fetched
                    raise _closed(self.url_of(number))
            if os.fstat(handle).st_nlink == 0:
                return None
            with suppress(PermissionError):  # fetched by somebody else: it only goes the earlier
                os.utime(handle)
        except FileNotFoundError:
            return None
        return handle

    def _fetch(self, number: int, stop: threading.Event, may_exceed: bool, attempts: int) -> bool:
        """Bring a copy into the folder, or wait while another does. False if there is no room for it."""
        path, url = self.path(number), self.url_of(number)
        part = path.with_suffix(".part")
        handle = FileHandle(part, os.O_RDWR | os.O_CREAT)
        while not (is_ours := try_lock(handle)) and is_at(handle, part):
            if stop.wait(_POLL_SECONDS):
                raise _closed(url)
        if not (is_ours and is_at(handle, part)):
            return True  # whoever had it has finished, or given up: look again
        try:
            if path.exists():
                return True  # it came between the look and the lock
            if not self._make_room(handle, int(self._table.bytes[number]), may_exceed):
                return False
            with_retries(lambda: self._download(number, handle, url, stop), url, stop=stop, attempts=attempts)
            self._fetch_index(number)
            part.rename(path)
            fsync_folder(self._shards)
            return True
        finally:
            if is_at(handle, part):
                part.unlink()
            # Not left to the handle's end: an error of fsspec's drivers holds itself, and with it every frame that it
            # passed through, until Python's collector comes by; the copy would be locked for as long.
            unlock(handle)

    def _download(self, number: int, handle: FileHandle, url: str, stop: threading.Event) -> None:
        """Fill a .part. Raises OSError if it is not, to the last bit, the shard of the manifest."""
        size, sha256 = int(self._table.bytes[number]), str(self._table.sha256[number])
        digest, received, head = hashlib.sha256(), 0, b""
        os.lseek(handle, 0, os.SEEK_SET)  # an attempt before this one may have written some of it
        with open_url(url) as file:
            while chunk := file.read(_CHUNK):
                if stop.is_set():
                    raise _closed(url)
                head = head or bytes(chunk[:40])
                if received + len(chunk) > size:
                    raise OSError(f"more than the {size} bytes of the manifest; it begins with {head!r}")
                digest.update(chunk)
                with self._full_named():
                    _write(handle, chunk)
                received += len(chunk)
        if received != size:
            raise OSError(f"{received} bytes, the manifest says {size}; it begins with {head!r}")
        if digest.hexdigest() != sha256:
            raise OSError(f"sha256 {digest.hexdigest()[:12]}, the manifest says {sha256[:12]}; it begins with {head!r}")
        with self._full_named():  # some filesystems (NFS, quotas) find out no earlier
            os.fsync(handle)

    @contextmanager
    def _full_named(self) -> Iterator[None]:
        """Raises StorageFailed where the disk of the copies turns out to be full: to fetch again would be in vain."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFailed(
                f"data.local_cache {self.folder}: {error.strerror}. Free room there, or lower data.local_cache_gib."
            ) from error

    def _fetch_index(self, number: int) -> None:
        """Bring a shard's index too; one that is missing or of another shard is rebuilt from the copy by its reader."""
        target = self.index_path(number)
        url = f"{self.url}/{index_path(Path(self._table.path[number]), self._format_version).as_posix()}"
        try:
            with open_url(url) as file:
                data = file.read()
            write_atomically(target, lambda temporary: temporary.write_bytes(data))
            if read_index(target).tar_sha256 != self._table.sha256[number]:
                target.unlink()
        except Exception as error:  # of any driver
            log.info("%s: rebuilt from its shard (%s)", url, error)
            target.unlink(missing_ok=True)

    def _make_room(self, part: FileHandle, size: int, may_exceed: bool) -> bool:
        """Remove copies until one of `size` bytes fits, and reserve its room by making the .part that large."""
        with (self.folder / "room.lock").open("w") as gate:
            lock(gate)
            os.ftruncate(part, 0)
            copies = []
            for path in self._shards.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    copies.append((status.st_mtime_ns, status.st_size, path))
            used = sum(copy_size for _, copy_size, _ in copies)
            for _, copy_size, path in sorted(copies):
                if used + size <= self.limit_bytes:
                    break
                if path.suffix in (".tar", ".part") and _remove_unheld(path):
                    used -= copy_size
            if used + size > self.limit_bytes:
                if not may_exceed:
                    return False
                log.warning(
                    "data.local_cache %s: %.1f GiB are in use at once, more than data.local_cache_gib",
                    self.folder,
                    (used + size) / 2**30,
                )
            os.ftruncate(part, size)
            return True


def _write(handle: FileHandle, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _closed(url: str) -> InputError:
    return InputError(f"{url}: not fetched, the reader was closed.")


def _index_of(copy: Path) -> Path:
    return copy.with_suffix(".index")


def _remove_unheld(path: Path) -> bool:
    """Remove a copy, or what a killed process left of one, unless somebody reads or writes it."""
    try:
        handle = FileHandle(path, os.O_RDWR)  # NFS wants a file that is open for writing for a lock of this kind
    except FileNotFoundError:
        return True
    except PermissionError:  # somebody else's
        return False
    if not try_lock(handle):
        return False
    path.unlink(missing_ok=True)
    if not path.with_suffix(".tar").exists():
        _index_of(path).unlink(missing_ok=True)
    return True
