"""Checkpoint folders, complete or not there: checkpoints/step-<nnnnnnnn>/.

A save goes to a new folder, is flushed to disk, gets a manifest with the sha256 of every file, and last of all its
COMPLETE marker. A folder without the marker is never read; one whose files do not match its manifest is passed over for
the one before, and the log says so. Old folders go only after the new one is there.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath

from data.storage.atomic_write import fsync_folder, open_to_fsync, write_text_atomically
from data.storage.checkpoint_folders import (
    COMPLETE,
    checkpoint_folder,
    checkpoint_folders,
    complete_checkpoints,
    step_of,
)
from data.storage.retry import with_retries

_PASSED_OVER = "%s is damaged (%s); trying the checkpoint before it"

log = logging.getLogger("fluxfill")

MANIFEST = "manifest.json"
_READ_ATTEMPTS = 4  # over about ten seconds; a supervisor starts the run again


def save_checkpoint(run: Path, step: int, write: Callable[[Path], Mapping[str, str] | None]) -> Path:
    """The complete checkpoint folder of a step, which `write` fills.

    `write` may return the sha256 of files (by name) that were flushed to disk already: they are not read again.

    Raises OSError if the disk is full or the like; earlier checkpoints are untouched by then, and nothing is left of
    this one: it would fill the disk.
    """
    folder = checkpoint_folder(run, step)
    if folder.exists():  # a half-written or damaged one of an earlier try
        _delete(folder)
    folder.mkdir(parents=True)
    try:
        _fill(run, folder, step, write)
    except BaseException:
        _delete(folder)
        raise
    return folder


def _fill(run: Path, folder: Path, step: int, write: Callable[[Path], Mapping[str, str] | None]) -> None:
    hashes = dict(write(folder) or {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        hashes[name] = hashes.get(name) or flush_and_hash(path)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)  # the files are on disk, now their names
    write_text_atomically(folder / MANIFEST, json.dumps(hashes, indent=1))
    set_later_ones_aside(run, step)
    write_text_atomically(folder / COMPLETE, "")
    fsync_folder(folder.parent)


def set_later_ones_aside(run: Path, step: int) -> None:
    """Rename complete checkpoints of later steps to step-<number>.undone.

    The run went back behind them, by choice or because they are damaged. Left in place they would be the newest: the
    next resume would take one, and pruning would delete the checkpoint that was just saved.
    """
    for folder in complete_checkpoints(run):
        if step_of(folder) > step:
            names = (f"{folder.name}.undone{number or ''}" for number in count())
            aside = next(path for name in names if not (path := folder.with_name(name)).exists())
            folder.rename(aside)
            log.warning("%s: the run went back behind it; kept as %s, to be deleted by hand", folder, aside.name)


def flush_and_hash(path: Path) -> str:
    """Flush a file to disk; its sha256."""
    with open_to_fsync(path) as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """Damage of a complete checkpoint's files, in words, or None. Reads every byte.

    rank, world_size: of those who share the reading; the answer is then of this rank's share of the files.  Raises
    StorageFailed where the storage does not answer: what cannot be read now may be whole.
    """
    try:
        manifest = with_retries(partial(_read, folder / MANIFEST), f"{folder / MANIFEST}", attempts=_READ_ATTEMPTS)
        if manifest is None:
            return f"{MANIFEST} is missing"
        hashes = dict(json.loads(manifest))
    except (ValueError, TypeError) as error:
        return str(error)
    for name, sha256 in list(hashes.items())[rank::world_size]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{MANIFEST} names {name}, which lies outside"
        found = with_retries(partial(_hash, folder / name), f"{folder / name}", attempts=_READ_ATTEMPTS)
        if found != sha256:
            return f"{name} is missing" if found is None else f"{name} does not match its sha256"
    return None


def _read(path: Path) -> bytes | None:
    """None if there is no such file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _hash(path: Path) -> str | None:
    """None if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is intact; damaged ones are named in the log and passed over.

    One that its run, which goes on, deletes while it is read is not damaged: a newer one is there by then.
    """
    damaged: list[Path] = []
    while folders := [folder for folder in complete_checkpoints(run) if folder not in damaged]:
        newest = folders[-1]
        damage = find_damage(newest)
        if damage is None:
            return newest
        if (newest / COMPLETE).is_file():  # it goes first
            log.warning(_PASSED_OVER, newest, damage)
            damaged.append(newest)
    return None


def newest_intact(
    folders: Sequence[Path], find_damage: Callable[[Path], str | None], *, log_skipped: bool = True
) -> Path | None:
    """The last of the folders in which `find_damage` finds nothing.  log_skipped: name those passed over in the log."""
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            return folder
        if log_skipped:
            log.warning(_PASSED_OVER, folder, damage)
    return None


def prune_checkpoints(run: Path, *, keep_last: int, others: Sequence[Path] = ()) -> None:
    """Delete all but the newest `keep_last` complete checkpoints and the others that are named, and half-written ones
    older than the newest, from the oldest on. One that cannot be deleted is named in the log, and tried again the next
    time: on NFS a folder stays as long as another process, an export perhaps, reads a file of it.
    """
    newest = complete_checkpoints(run)[-keep_last:]
    if not newest:
        return
    kept = [*newest, *others]
    for folder in checkpoint_folders(run):
        if folder not in kept and step_of(folder) < step_of(newest[-1]):
            try:
                _delete(folder)
            except OSError as error:
                log.warning("%s: not deleted (%s); tried again after the next save", folder, error)


def _delete(folder: Path) -> None:
    """The marker goes first, so that a deletion cut short leaves no folder that looks whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    fsync_folder(folder)
    shutil.rmtree(folder)
