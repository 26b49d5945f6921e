"""Retries: of what storage or a network refused, and of files that were replaced while they were read."""

import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from configs.errors import InputError, StorageFailed

log = logging.getLogger("fluxfill")

ATTEMPTS = 8
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
# No attempt begins later than this: a silent server takes a minute for each, and the other processes of a run wait for
# this one until their collectives time out, after ten minutes.
LAST_ATTEMPT_SECONDS = 240.0

STALE_ATTEMPTS = 6
FIRST_STALE_WAIT_SECONDS = 0.05

_T = TypeVar("_T")


def with_retries(
    attempt: Callable[[], _T], what: str, *, stop: threading.Event | None = None, attempts: int = ATTEMPTS
) -> _T:
    """The outcome of `attempt`, tried up to 8 times over about a minute and a half, four minutes if each takes long.

    Waits double from 1 to 30 s and are spread by half to either side, so that the processes of a cluster do not come
    back all at once. InputError is final; any other Exception is tried again (drivers have their own kinds).
    what: begins the log lines and the error, "s3://bucket/shard.tar".  stop: once set, the last error is raised.
    Raises StorageFailed after the last attempt.
    """
    stop, start = stop or threading.Event(), time.monotonic()
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (number - 1)) * random.uniform(0.5, 1.5)
            in_time = time.monotonic() + wait <= start + LAST_ATTEMPT_SECONDS
            goes_on = number < attempts and in_time and not stop.is_set()
            if goes_on:
                log.warning("%s: %s; attempt %d of %d in %.1f s", what, reason, number + 1, attempts, wait)
            if not goes_on or stop.wait(wait):  # closed meanwhile: no further attempt, which might take a minute
                raise StorageFailed(
                    f"{what}: failed {number} time(s), at last with {reason}. Look at the storage and the network, "
                    "then start again: a run goes on from its last checkpoint."
                ) from error
    raise AssertionError("unreachable")


def retry_if_stale(path: Path, read: Callable[[], _T]) -> _T:
    """The outcome of `read`, which opens `path` by its name, tried again where the file was replaced under it (NFS'
    ESTALE: what was opened is gone before it is read).

    Raises StorageFailed, naming the file, if that does not end.
    """
    for attempt in range(STALE_ATTEMPTS):
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            stale = error
        time.sleep(FIRST_STALE_WAIT_SECONDS * 2**attempt)
    raise StorageFailed(
        f"{path}: the file server says again and again that it was replaced while it was read ({stale.strerror}). Look "
        "at the mount and start the same command again: it does what is left."
    ) from stale
