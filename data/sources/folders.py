"""Folders of pictures: files belong together when their path below their folder agrees up to the suffix."""

import os
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError, list_problems
from data.sources.items import Item, decode_text, is_utf8
from data.sources.picture_file import PictureFile
from data.sources.pictures import PICTURE_SUFFIXES
from data.sources.walk import walk_folder


def list_folders(target: Path, mask: Path | None, source: Path | None, dataset: str) -> list[Item]:
    """The items of two or three folders, sorted by name; captions are the paths of their files (`read_caption_file`).

    mask: None where masks are random.  Raises one InputError that names every target without mask (or source), and
    every mask or source without target.
    """
    folders = {"target": target, "mask": mask, "source": source}
    found = {role: _find(folder, role, dataset) if folder else _Found({}, {}) for role, folder in folders.items()}
    targets, partners = found["target"].pictures, [role for role in ("mask", "source") if folders[role] is not None]
    problems = [
        f"{targets[name]}: no {role} of the same name in {folders[role]}. Add it, or remove the target."
        for role in partners
        for name in sorted(targets.keys() - found[role].pictures.keys())
    ] + [
        f"{found[role].pictures[name]}: no target of the same name in {target}. Add it, or remove this {role}."
        for role in partners
        for name in sorted(found[role].pictures.keys() - targets.keys())
    ]
    if problems:
        raise InputError(list_problems(problems))
    masks, sources = found["mask"].pictures, found["source"].pictures
    texts = found["source"].texts | found["target"].texts  # the one beside the target comes first
    return [Item(name, targets[name], masks.get(name), sources.get(name), texts.get(name)) for name in sorted(targets)]


class _Found(NamedTuple):
    """What a folder holds, by relative path without suffix: pictures, and paths of .txt files."""

    pictures: dict[str, PictureFile]
    texts: dict[str, str]


def _find(folder: Path, role: str, dataset: str) -> _Found:
    """Raises InputError if there is no picture, a name is not UTF-8, two pictures differ in their suffix alone, the
    folder is missing, or `walk_folder` refuses one below it."""
    where = f"dataset {dataset}: {role} folder {folder}"
    if not folder.is_dir():
        raise InputError(f"{where} does not exist. Check data.datasets.*.{role}.")

    found = _Found({}, {})
    problems = []
    for parent, files in walk_folder(folder, where):
        below = os.path.relpath(parent, folder)
        for file in files:  # of a million: no Path is made of each
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in _SUFFIXES:
                continue
            name = stem if below == "." else f"{below}/{stem}"
            if suffix.lower() == ".txt":
                found.texts[name] = os.path.join(parent, file)
                continue
            if name in found.pictures:
                other = os.path.basename(found.pictures[name].place)
                problems.append(f"{where}: {other} and {file} have the same name. Keep one of them.")
            if not is_utf8(name):
                problems.append(f"{where}: the name of {name!a} is not UTF-8. Rename it.")
            found.pictures[name] = PictureFile(os.path.join(parent, file))
    if problems:
        raise InputError(list_problems(problems))
    if not found.pictures:
        kinds = ", ".join(sorted(PICTURE_SUFFIXES))
        raise InputError(f"{where} holds no picture ({kinds}). Check data.datasets.*.{role}.")
    return found


_SUFFIXES = PICTURE_SUFFIXES | {".txt"}


def read_caption_file(path: str) -> str:
    """The text of a caption's file. Raises InputError if it cannot be read, or is not UTF-8."""
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Change its permissions.") from error
