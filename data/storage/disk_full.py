"""The error of a full disk: which file, how much is free, how much is needed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import StorageFailed

FINISHED_IS_KEPT = "what is finished is kept"  # of programs that go on where they ended

# Of the disk, of a user's quota, of a file (ulimit -f, or what the filesystem can hold).
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(StorageFailed, OSError):
    """There is no room for a file. An OSError too: whoever goes on without what could not be written still does.

    needed: bytes that there must be room for, if known.  kept: what is left of the program's work, in words.
    """

    def __init__(self, path: Path, number: int, *, needed: int | None = None, kept: str = "") -> None:
        wanted = "" if needed is None else f", about {_in_words(needed)} are needed"
        super().__init__(
            f"{path}: cannot be written ({os.strerror(number)}). {_free(path)}{wanted}. Make room and run the same "
            f"command again{kept and f': {kept}'}."
        )
        self.path, self.errno, self._number, self._needed, self._kept = path, number, number, needed, kept

    def with_needed(self, num_bytes: int) -> "DiskFull":
        """The same with what is needed for more than this file."""
        return DiskFull(self.path, self._number, needed=num_bytes, kept=self._kept)

    def with_kept(self, kept: str, needed: int | None = None) -> "DiskFull":
        """The same with what is left of the program's work, and what is needed, unless that was said."""
        needed = needed if self._needed is None else self._needed
        return DiskFull(self.path, self._number, needed=needed, kept=self._kept or kept)


@contextmanager
def raise_disk_full(path: Path, *, needed: int | None = None, kept: str = "") -> Iterator[None]:
    """Raises DiskFull, naming `path`, where its disk turns out to be full. Whatever else is raised stays as it is.

    needed: bytes of what is written, if known.  kept: what is left of the program's work then: whoever calls knows
    whether the same command goes on, or begins anew.
    """
    try:
        yield
    except DiskFull as error:  # of a file that was named already
        raise error.with_kept(kept, needed) from error.__cause__
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFull(path, error.errno, needed=needed, kept=kept) from error


def _free(path: Path) -> str:
    try:
        there = next(parent for parent in path.absolute().parents if parent.exists())
        return f"{_in_words(shutil.disk_usage(there).free)} are free there"
    except OSError:
        return "How much is free there cannot be told"


def _in_words(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
