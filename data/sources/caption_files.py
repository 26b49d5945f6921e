"""Captions in files beside pictures: reading one, and naming those that belong to no picture."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from configs.errors import InputError
from data.sources.items import decode_text
from data.sources.near_names import NearNames
from data.sources.pictures import PICTURE_SUFFIXES
from data.sources.problems import CAPTIONS, Findings

CAPTION_SUFFIXES = (".txt", ".caption")  # of two, the first is read
# Not read: what they hold beside a caption, or how it is written, differs from tool to tool.
OTHER_TEXT_SUFFIXES = frozenset({".json", ".cap", ".captions", ".md", ".prompt", ".tags", ".text", ".yaml", ".yml"})
LISTS_OF_PICTURES = frozenset({"metadata.jsonl", "metadata.csv", "metadata.parquet"})


def read_caption_file(path: str) -> str:
    """The text of a caption's file. Raises InputError if it cannot be read, or is not UTF-8."""
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Change its permissions.") from error


def note_unused_texts(
    texts: Mapping[str, str], used: Collection[str | None], names: Collection[str], findings: Findings
) -> None:
    """Note every caption's file that belongs to no picture, with the one that it may be meant for.

    texts: path -> name, without suffix.  used: paths of those that are read.  names: of the pictures.
    """
    unused = [(name, path) for path, name in texts.items() if path not in used]
    if not unused:
        return
    by_folded = {name.casefold(): name for name in names}
    near = NearNames(sorted(names))
    read = {name: os.path.basename(path) for path, name in texts.items() if path in used}
    for name, path in unused:
        meant = _without_picture_suffix(name, names) or by_folded.get(name.casefold())
        if meant is None:
            nearest = near.nearest(name)
            what = "belongs to no picture" + (f"; the nearest is {nearest}" if nearest else "")
            findings.note(CAPTIONS, path, what, "Call it like its picture, or remove it.")
        elif name in read:
            findings.note(CAPTIONS, path, f"is not read, but {read[name]}", "Keep one of them.")
        elif meant == name:
            cure = "A caption stands beside its target, in one file: move it there, or remove it."
            findings.note(CAPTIONS, path, "is not read", cure)
        else:
            cure = "Call a caption like its picture up to the suffix: cat.txt for cat.png."
            findings.note(CAPTIONS, path, f"is not read as the caption of {meant}", cure)


def note_other_files(files: Mapping[str, str], names: Collection[str], findings: Findings) -> None:
    """Note other texts beside a picture (a.json, a.png.json, a.tags), and lists of pictures.  files: path -> name,
    without suffix."""
    for path, name in files.items():
        if os.path.basename(path).lower() in LISTS_OF_PICTURES:
            what = "a list of pictures is not read where target is a folder"
            findings.note(CAPTIONS, path, what, "For its captions set data.datasets.*.table in the place of target.")
        elif name in names or _without_picture_suffix(name, names):
            cure = "If it holds the picture's caption, write that as .txt, or make a list of the pictures (table)."
            findings.note(CAPTIONS, path, "is not read as a caption", cure)


def _without_picture_suffix(name: str, names: Collection[str]) -> str | None:
    """The picture "a" that a.png.txt is meant for; None if there is none."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PICTURE_SUFFIXES and stem in names else None
