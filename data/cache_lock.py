"""One process at a time changes a cache."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import InputError


@contextmanager
def lock_cache(cache: Path) -> Iterator[None]:
    """Keep other processes out of a cache while it changes; makes its folder. Raises InputError if one is in, or if the
    folder cannot be written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "preprocess.lock").open("w")
    except OSError as error:
        raise InputError(
            f"data.cache {cache}: cannot be written to ({error.strerror}). Point data.cache at a folder that can."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise InputError(
                f"data.cache {cache}: another process is encoding into it. Wait for it or stop it; a single process "
                "does all of the work."
            ) from None
        except OSError:
            pass  # a filesystem without locks: nothing can be told
        yield
