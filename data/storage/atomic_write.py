"""Files that are either complete or not there, and that the user's umask says who may read."""

import os
import secrets
from collections.abc import Callable
from io import BufferedRandom, BufferedReader
from pathlib import Path

from data.storage.disk_full import raise_disk_full

_MOST_CHARACTERS = 60  # of at most four bytes each
_FOLDERS_CAN_BE_OPENED = hasattr(os, "O_DIRECTORY")  # not on Windows


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut. Windows opens no folder: there it is left to NTFS."""
    if not _FOLDERS_CAN_BE_OPENED:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part_path(path: Path) -> Path:
    """A new name beside a path for what is written before it gets its own: `<its beginning>.<8 hex digits>.part`.

    A name may have 255 bytes, so of a long one only a part is in it.
    """
    return path.with_name(f"{path.name[:_MOST_CHARACTERS]}.{secrets.token_hex(4)}.part")


def open_to_fsync(path: Path) -> BufferedReader | BufferedRandom:
    """A finished file, open to be read and given to os.fsync, for which Windows wants one that may be written."""
    return path.open("rb") if _FOLDERS_CAN_BE_OPENED else path.open("r+b")


def write_atomically(path: Path, write: Callable[[Path], object], *, num_bytes: int | None = None) -> None:
    """Let `write` fill a temporary neighbour of `path`, flush it to disk, then rename it into place.

    If `write` raises, nothing is left. Several processes may write one path at the same time: the last one's stays.
    num_bytes: of what is written, if known.  Raises DiskFull if there is no room for it.
    """
    with raise_disk_full(path, needed=num_bytes):
        _write_and_rename(path, write)


def _write_and_rename(path: Path, write: Callable[[Path], object]) -> None:
    # Of its own name in every process and on every machine: ranks that repair one file must not cut each other's.
    temporary = part_path(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # see apply_umask
        with open_to_fsync(temporary) as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """`write_atomically` for bytes."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data), num_bytes=len(data))


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_bytes_atomically(path, text.encode("utf-8"))


def apply_umask(folder: Path) -> None:
    """Give the safetensors files directly in a folder the mode that the user's umask says.

    safetensors makes them readable by their owner alone: a team's other members could not load an adapter.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
