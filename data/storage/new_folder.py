"""A folder that appears whole or not at all: it is written as <name>.part, by one process at a time."""

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from configs.errors import InputError, is_of_storage
from data.storage.atomic_write import part_path
from data.storage.disk_full import raise_disk_full
from data.storage.processes import process_start, this_place
from data.storage.run_lock import Process

log = logging.getLogger("fluxfill")

_WRITER = ".writer.json"  # in the folder, until it gets its name


@contextmanager
def new_folder(out: Path, *, replace: bool = False, kept: str = "nothing is left of it") -> Iterator[Path]:
    """A folder to write in, which is renamed to `out` in the end; if anything is raised, nothing is left of it.

    replace: an `out` that is there is replaced, and no other process writes it: the caller's run owns its folder.
    kept: what is left of the program's work if the disk is full, in words.  Raises InputError if there is an `out`,
    another process writes it, or it cannot be made; DiskFull if its disk is full.
    """
    if not replace:
        refuse_existing(out)
    temporary = out.with_name(f"{out.name}.part")
    with raise_disk_full(out, kept=kept):
        try:
            _take(temporary, out, replace=replace)
        except OSError as error:
            if replace or is_of_storage(error):
                raise
            raise InputError(f"--out {out}: cannot be made ({error.strerror}). Give one elsewhere.") from error
        try:
            yield temporary
            if replace:
                shutil.rmtree(out, ignore_errors=True)
                temporary.rename(out)
            elif not _rename(temporary, out):
                raise InputError(f"--out {out}: is there already, made meanwhile. Give another, or remove it.")
            with suppress(OSError):  # it is whole
                (out / _WRITER).unlink()
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def clear(folder: Path) -> None:
    """Remove what was written in a new folder, to write it once more."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _WRITER:
            path.unlink()


def refuse_existing(out: Path) -> None:
    """Raises InputError if there is an `out`."""
    if out.exists():
        raise InputError(f"--out {out}: is there already. Give another, or remove it.")


def _take(folder: Path, out: Path, *, replace: bool) -> None:
    """Make the folder, with its writer's name in it, in the place of what a killed one left. Raises InputError if
    another process is writing it, or may be."""
    me = Process("", socket.gethostname(), this_place(), os.getpid(), process_start(os.getpid()) or 0, parent=0)
    own = part_path(folder)
    own.mkdir(parents=True)
    try:
        (own / _WRITER).write_text(json.dumps(asdict(me)), encoding="utf-8")
        while not _rename(own, folder):
            writer = _writer_of(folder)
            if not replace and writer is not None and (not writer.is_here() or writer.runs()):
                raise InputError(
                    f"--out {out}: process {writer.pid} on {writer.host} is writing it, as {folder.name}. Wait for "
                    "it, or give another. If it does not run any more, remove that folder."
                )
            _remove_left(folder, writer)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise


def _remove_left(folder: Path, writer: Process | None) -> None:
    """Remove what a killed process left, unless another that found it too has put its own there meanwhile."""
    left = part_path(folder)
    with suppress(FileNotFoundError):
        folder.rename(left)
        if _writer_of(left) != writer:
            _rename(left, folder)
            return
        log.info("%s: removed, a process that was killed has left it", folder)
        shutil.rmtree(left)


def _rename(folder: Path, name: Path) -> bool:
    """Whether a folder that is not empty got the name; False: one that is not empty has it."""
    try:
        folder.rename(name)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _writer_of(folder: Path) -> Process | None:
    """None: nobody is named."""
    try:
        return Process(**json.loads((folder / _WRITER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
