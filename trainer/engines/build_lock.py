"""Locks of torch's extension builds: whose they are, and stale ones, which torch would wait for without end."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger("fluxfill")

STALE_SECONDS = 15 * 60  # DeepSpeed's own extension takes one minute to build
PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 1.0


@contextmanager
def watched_build_locks(
    *, patience_seconds: float = PATIENCE_SECONDS, stale_seconds: float = STALE_SECONDS
) -> Iterator[None]:
    """A time in which torch may build an extension, or wait for another process that does: after so many seconds the
    log says who, and a lock that gets older than any build takes is removed. By one process of a machine."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    clear_stale_build_locks(stale_seconds=stale_seconds)
    ended = threading.Event()

    def watch() -> None:
        since: dict[Path, float] = {}
        told: set[Path] = set()
        while not ended.wait(min(_LOOK_SECONDS, patience_seconds)):
            now = time.monotonic()
            since = {lock: since.get(lock, now) for lock in _locks()}
            for lock, start in since.items():
                if now - start >= patience_seconds and lock not in told:
                    told.add(lock)
                    log.warning("%s: an extension is built; %s", lock, _holder_of(lock, stale_seconds))
            clear_stale_build_locks(stale_seconds=stale_seconds)

    thread = threading.Thread(target=watch, name="build-locks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def clear_stale_build_locks(*, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """Remove the locks that are older than any build takes; returns them, and logs each. Not those that a process here
    still builds by, however slow it is: torch raises where the lock is gone at the end of a build.
    """
    cleared = []
    for lock in _locks():
        try:
            age = time.time() - lock.stat().st_mtime
            if age > stale_seconds and _builder(lock) is None:
                lock.unlink()
                cleared.append(lock)
                log.warning("%s: removed, left %.0f minutes ago by a build that did not finish", lock, age / 60)
        except FileNotFoundError:  # another rank was quicker, or the build has just finished
            continue
    return cleared


def _locks() -> list[Path]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [*root.glob("*/lock"), *root.glob("*/*/lock")]


def _builder(lock: Path) -> str | None:
    """Id of the process here that has the file open: torch does as long as it builds."""
    wanted = os.path.realpath(lock)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.realpath(file) == wanted for file in (process / "fd").iterdir()):
                return process.name
        except OSError:  # it has ended, or is another user's
            continue
    return None


def _holder_of(lock: Path, stale_seconds: float) -> str:
    """Who builds, in words."""
    if (builder := _builder(lock)) is not None:
        return f"process {builder} of this machine holds the lock, and is waited for"
    return (
        "the lock is of another machine's build, or of one that was killed. It is waited for, and removed when it is "
        f"{stale_seconds / 60:.0f} minutes old; if nothing builds there, remove it now"
    )
