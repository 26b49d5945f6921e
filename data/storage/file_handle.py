"""File handles that many threads read at once, each at offsets of its own.

Linux and macOS read at an offset by one call. Windows has none: there a handle is moved and read under a lock.
"""

import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path

_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends
_one_at_a_time = threading.Lock()


class FileHandle(int):
    """A file descriptor that closes itself, and gives its locks back, with its last reference."""

    def __new__(cls, path: Path, flags: int = os.O_RDONLY) -> "FileHandle":
        return super().__new__(cls, os.open(path, flags | _BINARY, 0o644))

    def __del__(self, close=os.close) -> None:  # bound here: at exit the module may be gone before the last handle
        close(self)


def is_at(handle: FileHandle, path: Path) -> bool:
    """Whether a path still names the file of a handle."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


if hasattr(os, "preadv"):

    def read_at(handle: int, size: int, offset: int) -> bytes:
        """At most `size` bytes of a file from an offset on; none at its end."""
        return os.pread(handle, size, offset)

    def read_into(handle: int, parts: Sequence[memoryview], offset: int) -> int:
        """Fill buffers, one after the other, with the bytes of a file from an offset on; how many were read: fewer at
        the file's end, and where a network filesystem answers with less than was asked for."""
        return os.preadv(handle, parts, offset)

else:

    def read_at(handle: int, size: int, offset: int) -> bytes:
        with _one_at_a_time:
            os.lseek(handle, offset, os.SEEK_SET)
            return os.read(handle, size)

    def read_into(handle: int, parts: Sequence[memoryview], offset: int) -> int:
        received = 0
        with _one_at_a_time, io.FileIO(handle, closefd=False) as file:
            file.seek(offset)
            for part in parts:
                count = file.readinto(part)
                received += count
                if count < len(part):
                    break
        return received
