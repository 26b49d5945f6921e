"""The place of a picture's bytes: a file, a part of one (a member of a tar), or a URL."""

import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import xxhash

from configs.errors import InputError
from configs.urls import is_url, shown
from data.storage.remote_files import read_range
from data.storage.retry import with_retries

# What a local file itself is to blame for; every other error is its storage's, and may pass.
_OF_THE_FILE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
)


@dataclass(frozen=True)
class PictureBytes:
    """A picture that was read, not decoded. name: how messages call it."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def content(self) -> str:
        """Hash of its bytes, 32 hex digits: the identity by which pictures are held out and changes noticed."""
        return xxhash.xxh3_128_hexdigest(self.data)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture that can be read again and again.

    place: path or URL of a file.  offset, size: its bytes there; size None = to the file's end.  member: what it is
    called there, "" if it is all of the file.  copy: a local file that may hold the same bytes, from copy_offset on.
    """

    place: str
    offset: int = 0
    size: int | None = None
    member: str = ""
    copy: str = ""
    copy_offset: int = 0

    def __str__(self) -> str:
        return f"{shown(self.place)}: {self.member}" if self.member else shown(self.place)

    @property
    def suffix(self) -> str:
        """The last one of its name, ".png"."""
        return Path(self.member or self.place.partition("?")[0]).suffix

    def read(self, limit: int, *, stop: threading.Event | None = None) -> PictureBytes:
        """Its bytes. What storage refuses is tried again, until `stop` is set.

        Raises InputError if they are more than `limit`, or cannot be read; StorageFailed, which is one too, if that is
        no fault of the picture.
        """
        if self.size is not None and self.size > limit:
            raise self._too_large(limit)
        wanted = limit + 1 if self.size is None else self.size
        data = self._read_copy(wanted)
        if data is None and is_url(self.place):
            data = with_retries(lambda: read_range(self.place, self.offset, wanted), str(self), stop=stop)
        elif data is None:
            try:
                data = self._read_place(wanted)
            except OSError as error:
                what = f"{self}: cannot be read ({error.strerror})"
                data = with_retries(lambda: self._read_place(wanted), what, stop=stop)
        if len(data) > limit:
            raise self._too_large(limit)
        if self.size is not None and len(data) != self.size:
            raise InputError(f"{self}: ends after {len(data)} of {self.size} bytes. Restore the file.")
        return PictureBytes(data, str(self))

    def _read_place(self, wanted: int) -> bytes:
        """From a local file. Raises InputError for what is its own fault, OSError for what is its storage's."""
        try:
            return _read_local(self.place, self.offset, wanted)
        except FileNotFoundError:
            if not os.path.isdir(os.path.dirname(self.place) or "."):
                raise  # with its whole folder: a disk or a server that went away
            raise InputError(f"{self}: no such picture. Restore the file, or remove its partners.") from None
        except OSError as error:
            if error.errno not in _OF_THE_FILE:
                raise
            raise InputError(
                f"{self}: cannot be read ({error.strerror}). Restore the file or its permissions."
            ) from error

    def _read_copy(self, wanted: int) -> bytes | None:
        """None if there is no copy, or not any more."""
        try:
            return _read_local(self.copy, self.copy_offset, wanted) if self.copy else None
        except OSError:
            return None

    def _too_large(self, limit: int) -> InputError:
        return InputError(
            f"{self}: more than the {limit >> 20} MiB that a picture of data.max_megapixels can take; it was not read. "
            "Shrink the picture or raise the limit."
        )


def _read_local(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        # Python takes the room for all that is asked for, ahead.
        return file.read(min(size, max(0, os.fstat(file.fileno()).st_size - offset)))


def byte_limit(max_megapixels: float) -> int:
    """The most bytes that a picture's file may have: RGBA of 16 bits, uncompressed, and 16 MiB of other things."""
    return int(max_megapixels * 8e6) + (16 << 20)
