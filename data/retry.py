"""Trying again what storage or a network refused once."""

import logging
import random
import threading
from collections.abc import Callable
from typing import TypeVar

from configs.errors import InputError

log = logging.getLogger("fluxfill")

ATTEMPTS = 8
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0

_T = TypeVar("_T")


def with_retries(attempt: Callable[[], _T], what: str, *, stop: threading.Event | None = None) -> _T:
    """The outcome of `attempt`, tried up to 8 times over about a minute and a half.

    Waits double from 1 to 30 s and are spread by half to either side, so that the processes of a cluster do not come
    back all at once. InputError is final; any other Exception is tried again (drivers have their own kinds).
    what: begins the log lines and the error, "s3://bucket/shard.tar".  stop: once set, the last error is raised.
    Raises InputError after the last attempt.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if number == ATTEMPTS or (stop is not None and stop.is_set()):
                raise InputError(
                    f"{what}: failed {number} time(s), at last with {reason}. Look at the storage and the network, "
                    "then start again: a run goes on from its last checkpoint."
                ) from error
            wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (number - 1)) * random.uniform(0.5, 1.5)
            log.warning("%s: %s; attempt %d of %d in %.1f s", what, reason, number + 1, ATTEMPTS, wait)
            (stop or threading.Event()).wait(wait)
    raise AssertionError("unreachable")
