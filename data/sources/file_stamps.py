"""Stamps of files and objects: by them a scan knows that what it found out is still true."""

import os
import secrets
import time
from collections.abc import Iterable

from configs.urls import is_url, shown
from data.storage.remote_files import url_stamp
from data.storage.retry import with_retries

_CLOCK_SECONDS = 0.05  # file times come from a clock that ticks every 1 to 10 ms


def stamp_of(place: str) -> str:
    """A text that is another one when the file or object at a path or URL has changed. Raises as `url_stamp` does."""
    if is_url(place):
        # Of a storage that tells nothing, what is found is good for this once.
        return with_retries(lambda: url_stamp(place), shown(place)) or secrets.token_hex(8)
    try:
        status = os.stat(place)
    except OSError:
        return "gone"  # which reading it will say
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def outwait_the_clock(places: Iterable[str]) -> None:
    """Wait until a change of these files would show in their stamps: one written just now could be written again within
    the same tick."""
    newest = max((os.stat(place).st_ctime for place in places if os.path.exists(place)), default=0.0)
    if 0 < (wait := newest + _CLOCK_SECONDS - time.time()) <= _CLOCK_SECONDS:
        time.sleep(wait)
