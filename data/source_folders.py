"""Folders of pictures: files belong together when their path below their folder agrees up to the suffix."""

import os
from pathlib import Path

from configs.errors import InputError
from configs.schema import DatasetConfig
from data.picture_files import PictureFile
from data.pictures import PICTURE_SUFFIXES
from data.source_items import Item, decode_text, is_utf8, listed


def list_folders(target: Path, mask: Path | None, source: Path | None, dataset: str) -> list[Item]:
    """The items of two or three folders, sorted by name, without their captions (`read_caption_beside`).

    mask: None where masks are random.  Raises one InputError that names every target without mask (or source), and
    every mask or source without target.
    """
    folders = {"target": target, "mask": mask, "source": source}
    found = {
        role: _pictures_by_name(folder, role, dataset) if folder is not None else {} for role, folder in folders.items()
    }
    targets, partners = found["target"], [role for role in ("mask", "source") if folders[role] is not None]
    problems = [
        f"{targets[name]}: no {role} of the same name in {folders[role]}. Add it, or remove the target."
        for role in partners
        for name in sorted(targets.keys() - found[role].keys())
    ] + [
        f"{found[role][name]}: no target of the same name in {target}. Add it, or remove this {role}."
        for role in partners
        for name in sorted(found[role].keys() - targets.keys())
    ]
    if problems:
        raise InputError(listed(problems))
    return [
        Item(name, targets[name], found["mask"].get(name), found["source"].get(name), None) for name in sorted(targets)
    ]


def _pictures_by_name(folder: Path, role: str, dataset: str) -> dict[str, PictureFile]:
    """Relative path without suffix -> file, for every picture below a folder.

    Raises InputError if there is none, a folder is missing or cannot be read, a name is not UTF-8, or two pictures
    differ in their suffix alone.
    """
    where = f"dataset {dataset}: {role} folder {folder}"
    if not folder.is_dir():
        raise InputError(f"{where} does not exist. Check data.datasets.*.{role}.")

    def refuse(error: OSError) -> None:  # os.walk would pass over the folder in silence
        raise InputError(
            f"{where}: {error.filename} cannot be read ({error.strerror}). Change its permissions."
        ) from error

    found: dict[str, PictureFile] = {}
    problems = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = Path(parent, file)
            if path.suffix.lower() not in PICTURE_SUFFIXES or file.startswith("."):
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                other = Path(found[name].place).name
                problems.append(f"{where}: {other} and {file} have the same name. Keep one of them.")
            if not is_utf8(name):
                problems.append(f"{where}: the name of {name!a} is not UTF-8. Rename it.")
            found[name] = PictureFile(str(path))
    if problems:
        raise InputError(listed(problems))
    if not found:
        kinds = ", ".join(sorted(PICTURE_SUFFIXES))
        raise InputError(f"{where} holds no picture ({kinds}). Check data.datasets.*.{role}.")
    return found


def read_caption_beside(item: Item) -> str | None:
    """The text of the .txt beside the target, else beside the source, else None."""
    for picture in (item.target, item.source):
        if picture is not None and (file := Path(picture.place).with_suffix(".txt")).is_file():
            try:
                return decode_text(file.read_bytes(), str(file))
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror}). Change its permissions.") from error
    return None


def mask_folder(dataset: DatasetConfig) -> Path | None:
    """The folder of a dataset's own masks, whichever way its config says it; None where masks are random."""
    return dataset.mask if dataset.mask is None or isinstance(dataset.mask, Path) else dataset.mask.folder
