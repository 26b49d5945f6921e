"""The new folders: each file is complete or not there, and what an earlier migration wrote and this one does not goes.

files.json lists what is written, ahead of it, each file with a key that says from what: a file whose key is listed is
complete. So a second run goes on where one was interrupted, and nobody else's file is ever deleted.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import xxhash
from PIL import Image

from configs.errors import InputError
from data.migrate.holes import load_hole, load_opaque
from data.migrate.page import PAGE, is_page
from data.migrate.report import REPORT, How, MigratedTriple
from data.sources.picture_file import PictureFile
from data.sources.pictures import PICTURE_SUFFIXES
from data.storage.atomic_write import fsync_folder, part_path, write_atomically, write_text_atomically

FILES, QUARANTINE = "files.json", "quarantine/list.jsonl"
ROLES = ("target", "mask", "source")
_VERSION = 1
_THREADS = 8
_UNFINISHED = re.compile(r".+\.[0-9a-f]{8}\.part")
# What refuses a hard link and takes a copy: another file system, one without links, another's file, too many links.
_NO_LINKS = {
    *(errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK),
    *(errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS),  # macOS has the two apart, FUSE answers with the third
}


class NewFile(NamedTuple):
    """A file of the dataset. key: of all that it is made from.  make: writes it to a path that is not there; returns
    whether a copy had to do for a link."""

    key: str
    make: Callable[[Path], bool]


def plan_files(
    triples: Sequence[MigratedTriple],
    contents: Sequence[Mapping[str, str]],
    how: How,
    *,
    max_megapixels: float,
) -> dict[str, NewFile]:
    """The files of the triples that are kept, by their path below OUT. contents: of each triple, role -> hash."""
    files: dict[str, NewFile] = {}

    def transfer(role: str, triple: MigratedTriple, old: str | None, content: str) -> None:
        assert old is not None
        path = f"{role}/{triple.name}{os.path.splitext(old)[1]}"
        files[path] = NewFile(f"{how} {content} {os.path.abspath(old)}", partial(_TRANSFER[how], old))

    for triple, content in zip(triples, contents, strict=True):
        if not triple.kept:
            continue
        every = " ".join(content.values())
        if triple.opaque_target:
            make = partial(_write_opaque, triple.target, max_megapixels)
            files[f"target/{triple.name}.png"] = NewFile(f"opaque {every}", make)
        else:
            transfer("target", triple, triple.target, content["target"])
        if triple.hole_from == "mask":
            transfer("mask", triple, triple.mask, content["mask"])
        elif triple.hole_from != "none":
            make = partial(_write_hole, triple, max_megapixels)
            files[f"mask/{triple.name}.png"] = NewFile(f"{triple.hole_from} {every}", make)
        if triple.keeps_source:
            transfer("source", triple, triple.masked, content["masked"])
        if triple.caption is not None:
            text = f"{triple.caption}\n"
            key = _key_of_text(text.encode())
            files[f"target/{triple.name}.txt"] = NewFile(key, partial(_write_text, text))
    return files


def refuse_others_files(out: Path) -> None:
    """Raise InputError if OUT holds what no migration wrote and this one would overwrite, or pictures in the folders of
    the dataset, which would be trained on, or have no partner."""
    listed = _read_listed(out)
    others = [path for path in _files_below(out) if path not in listed and _is_picture(path)]
    if not (out / FILES).exists():
        others += [name for name in (REPORT, QUARANTINE) if (out / name).exists()]
    if (out / PAGE).exists() and not is_page(out / PAGE):  # which a dry run writes alone
        others.append(PAGE)
    if others:
        which = ", ".join(sorted(others)[:3]) + ", ..." * (len(others) > 3)
        raise InputError(
            f"--out {out} holds {len(others)} file{'s' * (len(others) > 1)} that no migration wrote: {which}. Choose "
            "another folder, or move them away."
        )


def write_files(out: Path, files: Mapping[str, NewFile], advance: Callable[[], None]) -> int:
    """Bring OUT to hold these files, those that are there already left alone, and of what an earlier migration wrote
    nothing else. advance: called as each is there, by any thread.  Returns how many links became copies.

    A caption of the user's own in the place of one of them, or one that was edited, stays. Raises DiskFull.
    """
    listed = {path: key for path, key in _read_listed(out).items() if not _is_edited(out / path, key)}
    (out / REPORT).unlink(missing_ok=True)
    for path in _files_below(out):
        if _UNFINISHED.fullmatch(path):
            (out / path).unlink()
    for path in listed.keys() - {path for path, file in files.items() if file.key == listed.get(path)}:
        _remove(out, path)
    own = {path: file for path, file in files.items() if path in listed or not os.path.lexists(out / path)}
    own = {path: file for path, file in files.items() if path in own or not path.endswith(".txt")}
    for folder in {out, *((out / path).parent for path in own)}:
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": _VERSION, "files": {path: file.key for path, file in own.items()}}, indent=0)
    write_text_atomically(out / FILES, text + "\n")

    def write(path: str) -> bool:
        is_copy = path in own and not os.path.lexists(out / path) and files[path].make(out / path)
        advance()
        return is_copy

    with ThreadPoolExecutor(_THREADS) as pool:
        num_copies = sum(pool.map(write, files))
    for folder in {(out / path).parent for path in own}:
        fsync_folder(folder)
    return num_copies


def write_quarantine(out: Path, triples: Sequence[MigratedTriple]) -> None:
    """Write OUT/quarantine/list.jsonl: a line for each reason why a triple is left out."""
    lines = [
        json.dumps(
            {"target": triple.target, "mask": triple.mask, "masked": triple.masked}
            | {"kind": problem.kind, "reason": str(problem._replace(cure="")), "cure": problem.cure},
            ensure_ascii=False,
        )
        for triple in triples
        if not triple.kept
        for problem in triple.problems
    ]
    (out / QUARANTINE).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / QUARANTINE, "".join(f"{line}\n" for line in lines))


def _read_listed(out: Path) -> dict[str, str]:
    """Path -> key of what an earlier migration wrote, or was about to."""
    path = out / FILES
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != _VERSION:
            raise ValueError("it is of another version of fluxfill")
        return dict(record["files"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no list of what a migration wrote ({error}). Choose another --out, or remove the folder."
        ) from error


def _files_below(out: Path) -> Iterator[str]:
    """All files in the folders of the dataset, as they are called from OUT."""
    for role in ROLES:
        for parent, _, names in os.walk(out / role):
            below = os.path.relpath(parent, out).replace(os.sep, "/")
            yield from (f"{below}/{name}" for name in names)


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES


def _key_of_text(data: bytes) -> str:
    return f"text {xxhash.xxh3_128_hexdigest(data)}"


def _is_edited(path: Path, key: str) -> bool:
    """Whether a file was written as a caption, and holds another one now."""
    return key.startswith("text ") and path.is_file() and _key_of_text(path.read_bytes()) != key


def _remove(out: Path, path: str) -> None:
    """Remove a file, and the folders that it leaves empty."""
    (out / path).unlink(missing_ok=True)
    for folder in (out / path).parents[: path.count("/")]:
        try:
            folder.rmdir()
        except OSError:
            return


def _copy(old: str, new: Path) -> bool:
    write_atomically(new, lambda temporary: shutil.copyfile(old, temporary), num_bytes=os.path.getsize(old))
    return False


def _link(old: str, new: Path) -> bool:
    temporary = part_path(new)
    try:
        os.link(os.path.realpath(old), temporary)  # of a link itself, Linux would make another link
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy(old, new)
        return True
    temporary.rename(new)
    return False


def _reference(old: str, new: Path) -> bool:
    os.symlink(os.path.abspath(old), new)
    return False


_TRANSFER: dict[How, Callable[[str, Path], bool]] = {"copy": _copy, "link": _link, "reference": _reference}


def _write_opaque(target: str, max_megapixels: float, new: Path) -> bool:
    picture = load_opaque(PictureFile(target), max_megapixels=max_megapixels)
    return _save_png(picture, picture.info.get("icc_profile"), new)


def _write_hole(triple: MigratedTriple, max_megapixels: float, new: Path) -> bool:
    hole = load_hole(triple, max_megapixels=max_megapixels)
    assert hole is not None
    return _save_png(hole, None, new)  # the profile of the picture that it was read from is of colours


def _save_png(picture: Image.Image, icc_profile: bytes | None, new: Path) -> bool:
    write_atomically(new, lambda temporary: picture.save(temporary, "PNG", icc_profile=icc_profile))
    return False


def _write_text(text: str, new: Path) -> bool:
    write_text_atomically(new, text)
    return False
