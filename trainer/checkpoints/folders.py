"""Checkpoint folders, complete or not there: checkpoints/step-<nnnnnnnn>/.

A save goes to a new folder, is flushed to disk, gets a manifest with the sha256 of every file, and last of all its
COMPLETE marker. A folder without the marker is never read; one whose files do not match its manifest is passed over for
the one before, and the log says so. Old folders go only after the new one is there.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path

from configs.errors import InputError
from data.storage.atomic_write import fsync_folder, write_text_atomically

log = logging.getLogger("fluxfill")

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


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
    _set_later_ones_aside(run, step)
    write_text_atomically(folder / COMPLETE, "")
    fsync_folder(folder.parent)


def _set_later_ones_aside(run: Path, step: int) -> None:
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
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_checkpoints(run: Path) -> list[Path]:
    """Folders with the marker, oldest first. By step number, never by time: clocks differ between machines."""
    folders = (run / "checkpoints").glob("step-*")
    found = [path for path in folders if _NAME.fullmatch(path.name) and (path / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name. Raises InputError if it is no such folder."""
    if (match := _NAME.fullmatch(folder.name)) is None:
        raise InputError(f"{folder}: not a checkpoint folder (step-<number>).")
    return int(match[1])


def find_damage(folder: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """Damage of a complete checkpoint's files, in words, or None. Reads every byte.

    rank, world_size: of those who share the reading; the answer is then of this rank's share of the files.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, sha256 in list(hashes.items())[rank::world_size]:
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{name} does not match its sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is intact; damaged ones are named in the log and passed over."""
    return newest_intact(complete_checkpoints(run), find_damage)


def newest_intact(
    folders: Sequence[Path], find_damage: Callable[[Path], str | None], *, log_skipped: bool = True
) -> Path | None:
    """The last of the folders in which `find_damage` finds nothing.  log_skipped: name those passed over in the log."""
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            return folder
        if log_skipped:
            log.warning("%s is damaged (%s); trying the checkpoint before it", folder, damage)
    return None


def prune_checkpoints(run: Path, *, keep_last: int, best: Path | None = None) -> None:
    """Delete all but the newest `keep_last` complete checkpoints and `best`, and half-written ones older than the
    newest, from the oldest on."""
    newest = complete_checkpoints(run)[-keep_last:]
    if not newest:
        return
    kept = [*newest, best]
    folders = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    for folder in sorted(folders, key=step_of):
        if folder not in kept and step_of(folder) < step_of(newest[-1]):
            _delete(folder)


def _delete(folder: Path) -> None:
    """The marker goes first, so that a deletion cut short leaves no folder that looks whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    fsync_folder(folder)
    shutil.rmtree(folder)
