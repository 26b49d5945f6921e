"""Reading, over NFS, files that others replace: what was opened may be gone before it is read (ESTALE)."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from configs.errors import StorageFailed

_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 0.05

_T = TypeVar("_T")


def retry_if_stale(path: Path, read: Callable[[], _T]) -> _T:
    """The outcome of `read`, which opens `path` by its name, tried again where the file was replaced under it.

    Raises StorageFailed, naming the file, if that does not end.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            stale = error
        time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
    raise StorageFailed(
        f"{path}: the file server says again and again that it was replaced while it was read ({stale.strerror}). Look "
        "at the mount and start the same command again: it does what is left."
    ) from stale
