"""This process's ownership of the run folder: rank 0 takes it, or joins, before torch is imported, and writes only as
long as it has it.

Imports nothing heavy: it is in force before torch is imported.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import AlreadyRunning, StorageFailed
from configs.supervision import ALREADY_RUNNING
from data.storage.run_lock import RunLock, is_of_another, take_run_folder

_folder: Path | None = None
_lock: RunLock | None = None
_waits = False
_writing = threading.Lock()


def own(folder: Path, *, is_main: bool = True) -> bool:
    """Make a run folder rank 0's own; other ranks remember which it is. A second call changes nothing.

    Returns whether it became this process's own by this call. Raises AlreadyRunning, before anything is written.
    """
    global _folder, _lock, _waits
    _folder = folder
    if not is_main or _lock is not None:
        return False
    _waits = True
    _lock = take_run_folder(folder, os.environ)
    _waits = False
    _lock.start_heartbeat(_leave)
    return True


def _leave(error: AlreadyRunning) -> None:
    print(error, file=sys.stderr, flush=True)
    os._exit(ALREADY_RUNNING)  # at once: what another thread would write is no longer this run's


def require_ownership() -> None:
    """Raises AlreadyRunning if another start may have taken the run folder. Nothing in a process that never took it: of
    another rank, or of tests."""
    if _lock is not None:
        _lock.require()


def confirm_ownership() -> None:
    """`require_ownership`, by a look at the disk: before what is written once, and would replace another's."""
    if _lock is not None:
        _lock.refuse_loss()


@contextmanager
def owned_for_writing() -> Iterator[None]:
    """A time in which another thread may write to the folder: `disown` waits for its end. Raises as `confirm_ownership`
    does."""
    with _writing:
        confirm_ownership()
        yield


def may_write() -> bool:
    """Whether the folder is this run's, or nobody's: whoever has lost it leaves no outcome there."""
    if _waits:
        return False
    try:
        if _lock is None:
            return _folder is None or not is_of_another(_folder, os.environ)
        confirm_ownership()
    except AlreadyRunning:
        return False
    except (StorageFailed, OSError):  # a disk that does not answer: the folder is not lost
        pass
    return True


def disown() -> None:
    """Give the run folder back, if this process has it."""
    global _lock
    with _writing:
        if _lock is not None:
            _lock.end()
            _lock = None
