"""Folders of pictures: files belong together when their path below their folder agrees up to the suffix.

How an accent is written (Unicode's NFC or NFD) makes no other name: macOS and Linux differ in it. A picture may have
several masks: a_mask_01.png and a.mask2.png are masks of a.png, each of which makes a sample of its own.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from configs.errors import InputError
from data.sources.caption_files import (
    CAPTION_SUFFIXES,
    LISTS_OF_PICTURES,
    OTHER_TEXT_SUFFIXES,
    note_other_files,
    note_unused_texts,
)
from data.sources.items import Item, is_utf8
from data.sources.near_names import NearNames
from data.sources.picture_file import PictureFile
from data.sources.pictures import PICTURE_SUFFIXES
from data.sources.problems import LEFT_OUT, LISTS, NAMES, Findings
from data.sources.walk import walk_folder

# Pictures that are not read. They are counted: one that is passed over without a word is missed a month later.
_OTHER_PICTURES = re.compile(
    r"\.(ai|apng|arw|bpg|cr2|cr3|dds|dib|dng|eps|exr|hdr|heic|heif|hif|ico|j2k|jif|jp2|jpf|jxl|jxr|kra|nef|orf|pbm|pcx"
    r"|pef|pfm|pgm|pnm|ppm|psd|qoi|raf|raw|rw2|sr2|srw|svg|tga|xcf)"
)
_FIRST_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")  # of those without a suffix
_ONE_OF_SEVERAL = re.compile(r"(.+?)[._-]mask[._-]?\d*", re.IGNORECASE)


def list_folders(target: Path, mask: Path | None, source: Path | None, dataset: str, findings: Findings) -> list[Item]:
    """The items of two or three folders, sorted by name; captions are the paths of their files (`read_caption_file`).

    mask: None where masks are random.  findings: takes every target without mask (or source), every mask or source
    without target, and notes of what is there and not read.
    """
    folders = {"target": target} | ({"mask": mask} if mask else {}) | ({"source": source} if source else {})
    found: dict[str, FoundPictures] = {}
    for role, folder in folders.items():
        try:
            where = f"dataset {dataset}: {role} folder {folder}"
            found[role] = find_pictures(folder, where, f"data.datasets.*.{role}", findings)
        except InputError as error:
            findings.add_error(error, LISTS)
    if len(found) < len(folders):
        return []
    targets, masks, sources = found["target"], found.get("mask"), found.get("source")
    target_of = {name: name for name in targets.pictures} if masks is None else _target_of_masks(targets, masks)
    unmasked = {name: targets.pictures[name] for name in sorted(targets.pictures.keys() - set(target_of.values()))}
    items: list[Item] = []
    sourceless = {name: picture for name, picture in unmasked.items() if sources and name not in sources.pictures}

    def caption_of(*names: str) -> str | None:
        texts = (each.texts[name] for each in (targets, sources) if each for name in names if name in each.texts)
        return next(texts, None)

    sources_used, texts_used = set(unmasked), set(map(caption_of, unmasked))
    for name, own_target in target_of.items():
        names = (name, own_target)  # what goes with one of several masks may be called like it, or like the target
        caption = caption_of(*names)
        texts_used.add(caption)
        target_picture, mask_picture = targets.pictures[own_target], masks.pictures[name] if masks else None
        source_picture = None
        if sources:
            of_source = next((key for key in names if key in sources.pictures), None)
            if of_source is None:
                sourceless[name] = target_picture if name == own_target or not mask_picture else mask_picture
                continue
            sources_used.add(of_source)
            source_picture = sources.pictures[of_source]
        sample = targets.name_of(name) if name == own_target or masks is None else masks.name_of(name)
        items.append(Item(sample, target_picture, mask_picture, source_picture, caption))
    if masks:
        _report_partners("mask", masks, masks.pictures.keys() - target_of.keys(), targets, unmasked, findings)
    if sources:
        _report_partners("source", sources, sources.pictures.keys() - sources_used, targets, sourceless, findings)
    known = targets.pictures.keys() | target_of.keys()
    texts_found = {path: name for each in found.values() for path, name in each.texts_found.items()}
    note_unused_texts(texts_found, texts_used, known, findings)
    note_other_files({path: name for each in found.values() for path, name in each.others.items()}, known, findings)
    return sorted(items, key=lambda item: item.name)


@dataclass(frozen=True)
class FoundPictures:
    """What a folder holds, by relative path without suffix, in Unicode's NFC.

    doubled: names of several pictures, of which one is in `pictures`.  texts: paths of captions' files, one a name.
    left_out: paths of pictures that are not read.  texts_found, others: of all captions' files, and of others that may
    hold some, path -> name.
    """

    folder: Path
    pictures: dict[str, PictureFile] = field(default_factory=dict)
    doubled: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    texts_found: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def name_of(self, name: str) -> str:
        """A picture's name as its file has it."""
        if name.isascii():
            return name
        return os.path.splitext(os.path.relpath(self.pictures[name].place, self.folder))[0].replace(os.sep, "/")


def find_pictures(folder: Path, where: str, key: str, findings: Findings) -> FoundPictures:
    """The pictures and captions of a folder and all below it. where, key: how messages call the folder, and what names
    it.

    findings: takes pictures whose name is not UTF-8 or differs in the suffix alone, and notes of those not read.
    Raises InputError if there is no picture, the folder is missing, or `walk_folder` refuses one below it.
    """
    if not folder.is_dir():
        raise InputError(f"{where} does not exist. Check {key}.")

    found = FoundPictures(folder)
    for parent, files in walk_folder(folder, where):
        below = os.path.relpath(parent, folder).replace(os.sep, "/")  # a name is the same on every system
        for file in files:  # of a million: no Path is made of each
            stem, suffix = os.path.splitext(file)
            suffix = suffix.lower()
            name = unicodedata.normalize("NFC", stem if below == "." else f"{below}/{stem}")
            path = os.path.join(parent, file)
            if suffix in PICTURE_SUFFIXES:
                if name in found.pictures:
                    other = os.path.basename(found.pictures[name].place)
                    findings.add(NAMES, where, f"{other} and {file} have the same name", "Keep one of them.")
                    found.doubled.add(name)
                if is_utf8(name):
                    found.pictures[name] = PictureFile(path)
                else:
                    findings.add(NAMES, where, f"the name of {name!a} is not UTF-8", "Rename it.")
            elif suffix in CAPTION_SUFFIXES:
                found.texts_found[path] = name
                if suffix == CAPTION_SUFFIXES[0] or name not in found.texts:
                    found.texts[name] = path
            elif _OTHER_PICTURES.fullmatch(suffix) or (not suffix and _begins_like_a_picture(path)):
                found.left_out.setdefault(name, []).append(path)
            elif suffix in OTHER_TEXT_SUFFIXES or file.lower() in LISTS_OF_PICTURES:
                found.others[path] = name
    _note_left_out(found, findings)
    if not found.pictures:
        kinds = ", ".join(sorted(PICTURE_SUFFIXES))
        raise InputError(f"{where} holds no picture ({kinds}). Check {key}.")
    return found


def _note_left_out(found: FoundPictures, findings: Findings) -> None:
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for path in chain.from_iterable(found.left_out.values()):
        by_suffix[os.path.splitext(path)[1].lower()].append(os.path.basename(path))
    for suffix, files in by_suffix.items():
        which = ", ".join(sorted(files)[:3]) + (", ..." if len(files) > 3 else "")
        cure = "Save them as PNG or JPEG, or move them away."
        called = suffix or "without a suffix"
        findings.note(LEFT_OUT, found.folder, f"{len(files)} {called} not read: {which}", cure)


def _begins_like_a_picture(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4).startswith(_FIRST_BYTES)
    except OSError:
        return False


def _target_of_masks(targets: FoundPictures, masks: FoundPictures) -> dict[str, str]:
    """Mask -> its target, by name, of masks that have one."""
    target_of = {}
    for name in masks.pictures:
        if name in targets.pictures:
            target_of[name] = name
        elif (match := _ONE_OF_SEVERAL.fullmatch(name)) and match[1] in targets.pictures:
            target_of[name] = match[1]
    return target_of


def _report_partners(
    role: str,
    partners: FoundPictures,
    orphans: Set[str],
    targets: FoundPictures,
    lacking: Mapping[str, PictureFile],
    findings: Findings,
) -> None:
    """What has no partner, and the file that it may be meant for. orphans: of `partners`.  lacking: name -> a picture
    that has none."""

    def add(picture: PictureFile, name: str, what: str, others: FoundPictures, near: NearNames, cure: str) -> None:
        hint = ""
        if name in others.left_out:
            hint = f"; {os.path.basename(others.left_out[name][0])} is there, which is not read"
        elif nearest := near.nearest(name):
            hint = f"; the nearest is {os.path.relpath(others.pictures[nearest].place, others.folder)}"
        findings.add(NAMES, picture, f"{what} in {others.folder}{hint}", cure)

    near_partners = NearNames(sorted(orphans))
    near_targets = NearNames(sorted(lacking.keys() & targets.pictures.keys()))
    for name, picture in lacking.items():
        add(picture, name, f"no {role} of the same name", partners, near_partners, "Add it, or remove the target.")
    for name in sorted(orphans):
        cure = f"Add it, or remove this {role}."
        add(partners.pictures[name], name, "no target of the same name", targets, near_targets, cure)
