"""Folders of pictures: files belong together when their path below their folder agrees up to the suffix."""

import os
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError
from data.sources.items import Item, decode_text, is_utf8
from data.sources.picture_file import PictureFile
from data.sources.pictures import PICTURE_SUFFIXES
from data.sources.problems import LISTS, NAMES, Findings
from data.sources.walk import walk_folder


def list_folders(target: Path, mask: Path | None, source: Path | None, dataset: str, findings: Findings) -> list[Item]:
    """The items of two or three folders, sorted by name; captions are the paths of their files (`read_caption_file`).

    mask: None where masks are random.  findings: takes every target without mask (or source), and every mask or source
    without target.
    """
    folders = {"target": target} | ({"mask": mask} if mask else {}) | ({"source": source} if source else {})
    found = {}
    for role, folder in folders.items():
        try:
            found[role] = _find(folder, role, dataset, findings)
        except InputError as error:
            findings.add_error(error, LISTS)
    if len(found) < len(folders):
        return []
    targets, partners = found["target"].pictures, [role for role in folders if role != "target"]
    for role in partners:
        pictures = found[role].pictures
        for name in sorted(targets.keys() - pictures.keys()):
            what = f"no {role} of the same name in {folders[role]}"
            findings.add(NAMES, targets[name], what, "Add it, or remove the target.")
        for name in sorted(pictures.keys() - targets.keys()):
            what = f"no target of the same name in {target}"
            findings.add(NAMES, pictures[name], what, f"Add it, or remove this {role}.")
    masks, sources = (found.get(role, _Found({}, {})) for role in ("mask", "source"))
    texts = sources.texts | found["target"].texts  # the one beside the target comes first
    complete = [name for name in sorted(targets) if all(name in found[role].pictures for role in partners)]
    return [
        Item(name, targets[name], masks.pictures.get(name), sources.pictures.get(name), texts.get(name))
        for name in complete
    ]


class _Found(NamedTuple):
    """What a folder holds, by relative path without suffix: pictures, and paths of .txt files."""

    pictures: dict[str, PictureFile]
    texts: dict[str, str]


def _find(folder: Path, role: str, dataset: str, findings: Findings) -> _Found:
    """Raises InputError if there is no picture, a name is not UTF-8, two pictures differ in their suffix alone, the
    folder is missing, or `walk_folder` refuses one below it."""
    where = f"dataset {dataset}: {role} folder {folder}"
    if not folder.is_dir():
        raise InputError(f"{where} does not exist. Check data.datasets.*.{role}.")

    found = _Found({}, {})
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
                findings.add(NAMES, where, f"{other} and {file} have the same name", "Keep one of them.")
            if not is_utf8(name):
                findings.add(NAMES, where, f"the name of {name!a} is not UTF-8", "Rename it.")
                continue
            found.pictures[name] = PictureFile(os.path.join(parent, file))
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
