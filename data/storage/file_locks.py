"""Locks that processes on one machine take on files, and that end with a process however it ends. Windows has none."""

from typing import TextIO

from configs.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def require_file_locks(what: str) -> None:
    """Raises InputError, which begins with `what`, on a system without them."""
    if fcntl is None:
        raise InputError(f"{what} needs file locks, which this system does not have. Use Linux, or WSL2 on Windows.")


def lock(handle: int | TextIO) -> None:
    """Hold a file for this process alone, once nobody else holds it."""
    fcntl.flock(handle, fcntl.LOCK_EX)


def try_lock(handle: int | TextIO, *, shared: bool = False) -> bool:
    """Hold a file, alone or with others that share it, unless somebody is in the way; returns whether it is held."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(handle: int | TextIO) -> None:
    """Hold a file no longer."""
    fcntl.flock(handle, fcntl.LOCK_UN)
