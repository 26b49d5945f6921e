"""The download cache: copies of remote files, so that what planning reads is not fetched again to be encoded."""

import atexit
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from configs.urls import is_url, shown
from data.cache_layout import COPIES
from data.storage.atomic_write import write_atomically
from data.storage.disk_full import raise_disk_full
from data.storage.remote_files import open_url, refuse_short
from data.storage.retry import with_retries

_ABANDONED_SECONDS = 24 * 3600.0
_IN_USE = ".in-use"
_IN_USE_SECONDS = 600.0  # far below the above, by which machines' clocks may differ


@dataclass(frozen=True)
class DownloadCache:
    """A folder of copies, which all processes and machines of a job may share.

    limit: bytes that they may take together; what goes beyond it is deleted as soon as it was looked at, and single
    pictures are read from their URL again.
    """

    folder: Path
    limit: int

    def path(self, place: str, stamp: str, suffix: str) -> Path:
        """The path of a file's copy, in the state that `stamp` says."""
        return self.folder / f"{xxhash.xxh3_128_hexdigest(f'{place} {stamp}'.encode())}{suffix}"

    @contextmanager
    def local(self, place: str, stamp: str) -> Iterator[Path]:
        """A local file of the same bytes, good within the block: the file itself, or a copy, fetched if it is not
        there. A copy that was fetched stays, at `path`, if the block raises nothing and there is room."""
        if not is_url(place):
            yield Path(place)
            return
        copy = self.path(place, stamp, ".copy")
        if copy.exists():
            try:
                yield copy
            except BaseException:
                copy.unlink(missing_ok=True)  # who put it there read it without a fault: perhaps it is damaged now
                raise
            return
        # One's own until it was looked at, and there to stay once it has its name: others open it by that at any time.
        self.folder.mkdir(parents=True, exist_ok=True)
        own = copy.with_name(f"{copy.name}.{secrets.token_hex(4)}.part")
        try:
            with_retries(lambda: _fetch(place, own), shown(place))
            yield own
            if not self.are_too_many():
                write_atomically(copy, lambda temporary: own.replace(temporary))
        finally:
            own.unlink(missing_ok=True)

    def are_too_many(self) -> bool:
        """Whether they take all that they may, or more."""
        taken = 0
        for file in self.folder.glob("*"):
            with suppress(FileNotFoundError):  # others delete theirs meanwhile
                taken += file.stat().st_size
        return taken >= self.limit


class Pack:
    """A file to which threads append pictures."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def add(self, data: bytes) -> tuple[int, int]:
        """(offset, size) of the bytes in the file."""
        with self._lock:
            offset = self._file.tell()
            self._file.write(data)
        return offset, len(data)


@contextmanager
def open_new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which gets its name at the end; none if nothing is written to it, or something raises."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with raise_disk_full(path), temporary.open("wb") as file:
            yield file
            size = file.tell()
        if size:
            write_atomically(path, lambda place: os.replace(temporary, place))
    finally:
        temporary.unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> None:
    with open_url(url) as remote, path.open("wb") as file:
        shutil.copyfileobj(remote, file, 1 << 20)
        refuse_short(remote)


def keep_copies(cache: Path) -> None:
    """Have `delete_copies` delete nothing beside a cache as long as this process lives: a run that encodes while it
    trains reads the copies in every epoch, and of a picture inside a table nothing else can be opened."""
    mark, is_over = cache / COPIES / f"{secrets.token_hex(8)}{_IN_USE}", threading.Event()

    def give_back() -> None:
        is_over.set()
        with suppress(OSError):
            mark.unlink()
            mark.parent.rmdir()  # if there are no copies

    def beat() -> None:
        while not is_over.wait(_IN_USE_SECONDS):
            with suppress(OSError):  # a server that is away for a moment
                os.utime(mark)

    with suppress(OSError):  # of another user's cache, where there is nothing to be made beside it either
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        atexit.register(give_back)
        threading.Thread(target=beat, name="copies-in-use", daemon=True).start()


def delete_copies(cache: Path) -> None:
    """Delete the copies beside a cache, once all is encoded, unless a run reads them.

    What other processes are just writing stays (a late worker's, a dry run's); what a killed one left goes after a day.
    """
    folder = cache / COPIES
    if any(_age_seconds(mark) <= _ABANDONED_SECONDS for mark in folder.glob(f"*{_IN_USE}")):
        return
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            if file.suffix != ".part" or _age_seconds(file) > _ABANDONED_SECONDS:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            folder.rmdir()


def _age_seconds(file: Path) -> float:
    """Since it was last written to; 0 if it is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
