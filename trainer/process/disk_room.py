"""Room on the run's disk for what is small and must be written: a file that is removed once the disk is full.

Imports nothing heavy.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from configs.errors import AlreadyRunning, InputError
from data.storage.disk_full import FINISHED_IS_KEPT, raise_disk_full

log = logging.getLogger("fluxfill")

_NAME = ".room"
_BYTES = 2 << 20  # thousands of lines of metrics.jsonl
_T = TypeVar("_T")


def keep_room(run: Path) -> None:
    """Keep room in a run's folder, if there is any. Of zeros that are written: a hole in a file is no room."""
    path = run / _NAME
    with suppress(OSError):
        if not path.exists() or path.stat().st_size < _BYTES:
            path.write_bytes(bytes(_BYTES))


def release_room(run: Path) -> None:
    """Remove the file: at the end of a run."""
    with suppress(OSError):
        (run / _NAME).unlink(missing_ok=True)


def with_room(run: Path, write: Callable[[], _T]) -> _T:
    """What `write` returns, which is tried again with the room that was kept if the disk is full. It must leave nothing
    half-written. Raises DiskFull if there is none."""
    with raise_disk_full(run, kept=FINISHED_IS_KEPT):
        try:
            return write()
        except OSError:
            path = run / _NAME
            if not path.exists():
                raise
            path.unlink(missing_ok=True)
            return write()


@contextmanager
def told_if_not_written(what: str) -> Iterator[None]:
    """A time in which a disk that takes nothing is told of, no more: it must not stand in for why a run ended."""
    try:
        yield
    except AlreadyRunning:  # the folder is another start's
        raise
    except Exception as error:
        # safetensors has an error of its own for a full disk.
        if not isinstance(error, (InputError, OSError)) and type(error).__name__ != "SafetensorError":
            raise
        log.error("not written: %s: %s", what, error)


def append_text(path: Path, text: str) -> None:
    """Add a text to a file, all of it or nothing."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size, data = os.fstat(file).st_size, text.encode("utf-8")
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
