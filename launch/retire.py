"""`fluxfill retire`: the old code goes into a dated backup once the new run has a checkpoint, and comes back by --undo.

DIR/<date>/ holds manifest.json and, under files/, every file at its old absolute path. The manifest says `copying`
while the originals are complete, `removing` once every copy was read back and flushed, then `retired`. So whenever a
command is killed, the manifest tells the next one what is left to do.
"""

import errno
import hashlib
import json
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import InputError, list_problems
from data.storage.atomic_write import fsync_folder, write_atomically, write_text_atomically
from data.storage.disk_full import DiskFull
from data.storage.file_locks import require_file_locks, try_lock
from launch.command import REPO_ROOT
from launch.preprocess_first import has_checkpoint

_MANIFEST = "manifest.json"
_DATES = "????-??-??T??-??-??*"
_OURS = [REPO_ROOT / package for package in ("configs", "data", "trainer", "launch")]

Stage = Literal["copying", "removing", "retired"]


@dataclass(frozen=True)
class Entry:
    """One file, link or folder of a backup.  path: where it was, absolute.  sha256, size: of a file.  target: of a
    link."""

    path: str
    kind: Literal["file", "link", "folder"]
    mode: int
    size: int = 0
    sha256: str = ""
    target: str = ""

    def stored(self, backup: Path) -> Path:
        """Where it lies in the backup."""
        return backup / "files" / self.path.lstrip("/")


def retire(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Old files and folders.", show_default=False)
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The new run, which must have a complete checkpoint.", show_default=False),
    ] = None,
    backup: Annotated[
        Path | None, typer.Option(metavar="DIR", help="They move into a dated folder in it.", show_default=False)
    ] = None,
    undo: Annotated[
        Path | None, typer.Option(metavar="DIR/DATE", help="Put a backup's files back.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be moved.")] = False,
) -> None:
    """Move the old trainer's files into a dated backup. The new run must have a checkpoint; --undo puts them back.

    All of them or none: they are removed after every copy was read back. Ended in the middle, the next command on the
    same backup finishes or undoes it.

    Example: fluxfill retire jobs/process/TrainFineTuneProcess.py --after runs/flux_inpainting --backup backup
    """
    require_file_locks("fluxfill retire")
    try:
        _retire(files or [], after, backup, undo, dry_run)
    except InputError:  # of a full disk, too
        raise
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}. Mend that, and run the same command again: it finishes what it began."
        ) from error


def _retire(files: Sequence[Path], after: Path | None, backup: Path | None, undo: Path | None, dry_run: bool) -> None:
    if undo is not None:
        if files or after or backup:
            raise InputError("--undo puts a whole backup back: give it alone, as in --undo backup/2026-01-31T12-00-00.")
        _put_back(_absolute(undo), dry_run)
        return
    if not files or after is None or backup is None:
        raise InputError(
            "Give the files, --after RUN and --backup DIR, as in: fluxfill retire old.py --after runs/flux_inpainting "
            "--backup backup. Or --undo with a backup's folder."
        )
    if not has_checkpoint(after):
        raise InputError(
            f"--after {after}: no complete checkpoint is there, so the old code may still be needed. Train until "
            "there is one, or name the run that has one."
        )
    _move_away([_absolute(file) for file in files], after.resolve(), _absolute(backup), dry_run)


def _move_away(files: Sequence[Path], run: Path, parent: Path, dry_run: bool) -> None:
    files = list(dict.fromkeys(files))
    if not dry_run and parent.is_dir():
        finished = _finish_all(parent)
        files = [file for file in files if file not in finished or os.path.lexists(file)]
        if not files:
            return
    _refuse(files, run, parent)
    entries = [entry for file in files for entry in _entries(file)]
    if dry_run:
        for entry in entries:
            typer.echo(f"would move {entry.path}")
        return
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        backup = _new_folder(parent)
        try:
            _write_manifest(backup, "copying", entries)
            _copy(entries, source=lambda entry: Path(entry.path), target=lambda entry: entry.stored(backup))
            _write_manifest(backup, "removing", entries)
            _remove(entries, backup)
        except BaseException as error:
            _copy_missing(entries, backup)
            _delete(backup)
            if isinstance(error, OSError) and not isinstance(error, InputError):
                raise InputError(f"{error.filename}: {error.strerror}. Nothing was moved.") from error
            if isinstance(error, DiskFull):
                raise error.with_kept("nothing was moved") from error
            raise
        _write_manifest(backup, "retired", entries)
    typer.echo(f"{len(files)} moved to {backup}. Back again: fluxfill retire --undo {shlex.quote(str(backup))}")


def _put_back(backup: Path, dry_run: bool) -> None:
    _, entries = _read_manifest(backup)
    if dry_run:
        for entry in entries:
            typer.echo(f"would put back {entry.path}")
        return
    with _locked(backup.parent):
        stage, entries = _read_manifest(backup)  # a command that was at work may have brought it further
        if stage == "copying":  # the originals never left
            _delete(backup)
        else:
            _restore(backup, entries)
    typer.echo(f"put back from {backup}: {sum(entry.kind != 'folder' for entry in entries)} files")


def _restore(backup: Path, entries: Sequence[Entry]) -> None:
    """Copy back what is missing, then delete the backup. Raises InputError if something else is there now, or a copy is
    not what it was."""
    problems = [
        f"{entry.path}: something else is there now. Move it away, then --undo again."
        for entry in entries
        if os.path.lexists(entry.path) and not _is_same(entry, Path(entry.path))
    ]
    problems += [
        f"{entry.stored(backup)}: was changed or is missing. Copy back by hand what you need."
        for entry in entries
        if not os.path.lexists(entry.path) and not _is_same(entry, entry.stored(backup))
    ]
    if problems:
        raise InputError(list_problems(problems))
    try:
        _copy_missing(entries, backup)
        for entry in reversed(entries):  # those that an interrupted --undo put there, too
            if entry.kind != "link":
                Path(entry.path).chmod(entry.mode)
    except InputError:  # of a full disk
        raise
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}. The backup is complete; mend that, then --undo again."
        ) from error
    _delete(backup)


def _finish_all(parent: Path) -> set[Path]:
    """Bring to an end what earlier commands were killed in; what they had been told to move away, and now is."""
    moved: set[Path] = set()
    with _locked(parent):
        for backup in sorted(path.parent for path in parent.glob(f"{_DATES}/{_MANIFEST}")):
            stage, entries = _read_manifest(backup)
            if stage == "copying":
                _delete(backup)
                typer.echo(f"{backup}: left by a command that was ended; removed, the originals are in place")
            elif stage == "removing":
                _finish_removing(backup, entries)
                moved |= {Path(entry.path) for entry in entries}
                typer.echo(f"{backup}: finished what a command that was ended had begun")
    return moved


def _finish_removing(backup: Path, entries: Sequence[Entry]) -> None:
    try:
        _remove(entries, backup)
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}. An earlier move was ended in the middle: move this file away, or put "
            f"the others back by fluxfill retire --undo {backup}"
        ) from error
    _write_manifest(backup, "retired", entries)


def _refuse(files: Sequence[Path], run: Path, parent: Path) -> None:
    """Raise one InputError for all files that may not be moved."""
    problems = []
    for file in files:
        inner = next((other for other in files if other in file.parents), None)
        if not os.path.lexists(file):
            problems.append(f"{file}: there is no such file.")
        elif inner is not None:
            problems.append(f"{file}: is in {inner}, which is given too. Give one of the two.")
        elif any(_overlap(file, package) for package in _OURS):
            problems.append(f"{file}: is part of fluxfill, or holds it. Leave it out.")
        elif _overlap(file, run):
            problems.append(f"{file}: belongs to the run {run}, or holds it. Leave it out.")
        elif os.path.lexists(parent) and not parent.is_dir():
            problems.append(f"--backup {parent}: is a file. Give a folder.")
        elif _overlap(file, parent):
            problems.append(f"{file}: belongs to the backup {parent}, or holds it. Give another --backup.")
        elif not _may_write(file.parent):
            problems.append(f"{file}: its folder may not be written, so it cannot be moved. Ask its owner.")
    if problems:
        raise InputError(list_problems(problems))


def _may_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


def _overlap(file: Path, folder: Path) -> bool:
    return file == folder or file in folder.parents or folder in file.parents


def _absolute(path: Path) -> Path:
    """Absolute, through the links of its folders; a link itself stays one."""
    path = Path(os.path.abspath(path.expanduser()))
    return path.parent.resolve() / path.name


def _entries(path: Path) -> Iterator[Entry]:
    """The path and all below it, folders before what is in them. Raises InputError for what is no file."""
    try:
        details = path.lstat()
        mode = stat.S_IMODE(details.st_mode)
        if stat.S_ISLNK(details.st_mode):
            yield Entry(str(path), "link", mode, target=os.readlink(path))
        elif stat.S_ISREG(details.st_mode):
            yield Entry(str(path), "file", mode, details.st_size, _sha256(path))
        elif stat.S_ISDIR(details.st_mode):
            yield Entry(str(path), "folder", mode)
            children = sorted(path.iterdir())
            if children and not _may_write(path):
                raise InputError(f"{path}: may not be written, so what it holds cannot be moved. chmod u+w it first.")
            for child in children:
                yield from _entries(child)
        else:
            raise InputError(f"{path}: is neither a file, a folder nor a link. Leave it out.")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Ask its owner, or leave it out.") from error


def _is_same(entry: Entry, place: Path) -> bool:
    """Whether what lies at a place is what the entry was."""
    if entry.kind == "link":
        return place.is_symlink() and os.readlink(place) == entry.target
    if place.is_symlink():
        return False
    if entry.kind == "folder":
        return place.is_dir()
    return place.is_file() and place.stat().st_size == entry.size and _sha256(place) == entry.sha256


def _copy(entries: Sequence[Entry], *, source: Callable[[Entry], Path], target: Callable[[Entry], Path]) -> None:
    """Copy with times and modes, flush to disk and read back. Raises OSError if a file changed or cannot be written."""
    for entry in entries:
        old, new = source(entry), target(entry)
        new.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "folder":
            new.mkdir(exist_ok=True)
        elif entry.kind == "link":
            new.symlink_to(entry.target)
        else:
            write_atomically(new, partial(shutil.copy2, old), num_bytes=entry.size)
            new.chmod(entry.mode)
            if not _is_same(entry, new):
                new.unlink()
                raise OSError(errno.EIO, "its copy differs: it was changed meanwhile, or the disk fails", str(old))
    for entry in reversed(entries):  # a folder without write permission takes no more files
        if entry.kind == "folder":
            shutil.copystat(source(entry), target(entry))
            fsync_folder(target(entry))


def _copy_missing(entries: Sequence[Entry], backup: Path) -> None:
    """Put back those that are not at their old places; in an interrupted move they are those already removed."""
    missing = [entry for entry in entries if not os.path.lexists(entry.path) and os.path.lexists(entry.stored(backup))]
    _copy(missing, source=lambda entry: entry.stored(backup), target=lambda entry: Path(entry.path))


def _remove(entries: Sequence[Entry], backup: Path) -> None:
    """Remove the originals, those in a folder before it. Raises OSError for one that is not as it was copied."""
    for entry in reversed(entries):
        path = Path(entry.path)
        if not os.path.lexists(path):
            continue
        if not (_is_same(entry, path) and _is_same(entry, entry.stored(backup))):
            raise OSError(errno.EBUSY, f"it is not what {backup} has of it", str(path))
        if entry.kind == "folder":
            path.rmdir()
        else:
            path.unlink()


def _delete(backup: Path) -> None:
    """The manifest goes last, so that a deletion cut short is gone on with."""
    shutil.rmtree(backup / "files", ignore_errors=True)
    shutil.rmtree(backup)


def _new_folder(parent: Path) -> Path:
    """DIR/<date and time>, new."""
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    for name in (stamp, *(f"{stamp}-{number}" for number in range(2, 100))):
        try:
            (parent / name).mkdir()
            return parent / name
        except FileExistsError:
            continue
    raise InputError(f"{parent}: a hundred backups of {stamp} are there already. Give another --backup.")


def _write_manifest(backup: Path, stage: Stage, entries: Sequence[Entry]) -> None:
    contents = {"version": 1, "stage": stage, "entries": [asdict(entry) for entry in entries]}
    write_text_atomically(backup / _MANIFEST, json.dumps(contents, indent=1) + "\n")


def _read_manifest(backup: Path) -> tuple[Stage, list[Entry]]:
    path = backup / _MANIFEST
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        return contents["stage"], [Entry(**entry) for entry in contents["entries"]]
    except FileNotFoundError as error:
        raise InputError(f"{backup}: no backup is there (it has no {_MANIFEST}). Give DIR/<date> of one.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read as a backup's manifest ({error}). Its files are under files/."
        ) from error


@contextmanager
def _locked(parent: Path) -> Iterator[None]:
    """One command at a time on a folder of backups. Raises InputError if another is at work."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise InputError(f"{parent}: another fluxfill retire is at work there. Run this again when it is done.")
        yield
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
