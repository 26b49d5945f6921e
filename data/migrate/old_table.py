"""Old triples by a table: a .csv or .jsonl whose columns name the target, the masked picture and the mask."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.urls import is_url
from data.migrate.find import Found, OldTriple
from data.sources.picture_file import PictureFile
from data.sources.pictures import PICTURE_SUFFIXES
from data.sources.problems import CAPTIONS, LISTS, NAMES, Findings, Problem
from data.sources.tables import as_on_disk, find_missing_folders, read_rows

# What other trainers and data sets call these columns, most telling first; "image" is the target unless another is.
_COLUMNS = {
    "target": ("target", "groundtruth", "gt", "output", "edited", "image"),
    "mask": ("mask", "masks"),
    "masked": ("masked", "holed", "conditioning", "condition", "cond", "control", "source", "input", "image"),
    "caption": ("caption", "text", "prompt"),
}
_TAIL = re.compile(r"(?<=.)(image|img|picture|filename|file|path)$")
SUFFIXES = (".csv", ".jsonl", ".parquet")


def find_in_table(table: Path) -> Found:
    """The triples of a table, sorted by name; its paths are relative to its folder, or absolute. Rows of pictures in
    folders that are not there are left out. Raises InputError if it cannot be read, or has no column of targets."""
    findings = Findings()
    if table.suffix not in SUFFIXES:
        raise InputError(f"--target {table} is no folder, and no table ({', '.join(SUFFIXES)}). Check the path.")
    rows = [(where, row) for _, where, row in read_rows(str(table), table, findings)]
    columns = _tell_columns({name for _, row in rows for name in row})
    if "target" not in columns:
        names = ", ".join(sorted({name for _, row in rows for name in row})) or "nothing"
        raise InputError(f"--target {table} has no column of targets, but {names}. Call it target, or image.")
    found = [triple for where, row in rows if (triple := _triple_of(where, row, columns, table, findings))]
    missing = find_missing_folders(str(table), (place for triple in found for place in _places(triple)), findings)
    there = [triple for triple in found if missing.isdisjoint(map(os.path.dirname, _places(triple)))]
    return Found(_named(there), [*findings.problems, *findings.notes], {})


def _tell_columns(names: set[str]) -> dict[str, str]:
    """Role -> its column."""
    by_key: dict[str, str] = {}
    for name in sorted(names):
        key = re.sub(r"[^a-z]", "", name.casefold())
        while key != (shorter := _TAIL.sub("", key)):
            key = shorter
        by_key.setdefault(key, name)
    found: dict[str, str] = {}
    for role, keys in _COLUMNS.items():
        column = next((by_key[key] for key in keys if key in by_key and by_key[key] not in found.values()), None)
        if column is not None:
            found[role] = column
    return found


def _triple_of(
    where: str, row: Mapping[str, Any], columns: Mapping[str, str], table: Path, findings: Findings
) -> OldTriple | None:
    files: dict[str, PictureFile] = {}
    of_pictures = {role: column for role, column in columns.items() if role != "caption"}
    for role, column in of_pictures.items():
        cell = row.get(column)
        if isinstance(cell, str) and is_url(cell):
            findings.add(LISTS, f"{where}: {column}", "is a URL", "Fetch the pictures first.")
            return None
        if isinstance(cell, str) and cell:
            files[role] = PictureFile(_resolve(table.parent, cell))
    if "target" not in files:
        findings.add(LISTS, where, f"no path in {columns['target']}", "Add it, or remove the row.")
        return None
    missing = {
        role: Problem(NAMES, where, f"no path in {column}", "Add it, or remove the row.")
        for role, column in of_pictures.items()
        if role not in files
    }
    problems = [missing["mask"]] if "mask" in missing else []
    problems += [
        Problem(NAMES, str(file), "has no suffix of a picture, and would not be trained on", "Call it .png or .jpg.")
        for file in files.values()
        if file.suffix.lower() not in PICTURE_SUFFIXES
    ]
    text = row.get(columns["caption"]) if "caption" in columns else None
    if not isinstance(text, str | None):
        what = f"{columns['caption']} is {text!r:.60}, no text"
        problems.append(Problem(CAPTIONS, where, what, "Correct it."))
        text = None
    return OldTriple(
        "",
        files["target"],
        files.get("mask"),
        files.get("masked"),
        text or None,
        "table" if text else "none",
        missing.get("masked"),
        tuple(problems),
    )


def _places(triple: OldTriple) -> list[str]:
    return [file.place for file in (triple.target, triple.mask, triple.masked) if file is not None]


def _resolve(folder: Path, cell: str) -> str:
    place = os.path.normpath(folder / cell)
    if "\\" in cell and not os.path.exists(place):
        place = os.path.normpath(folder / cell.replace("\\", "/"))  # as Windows writes it
    return as_on_disk(place)


def _named(triples: list[OldTriple]) -> list[OldTriple]:
    """Triples called by their targets' paths below the folder that holds all, sorted; a, a#2, a#3 where a target is in
    several rows."""
    if not triples:
        return []
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(triple.target.place)) for triple in triples])
    named: dict[str, OldTriple] = {}
    for triple in triples:
        name = stem = os.path.splitext(os.path.relpath(triple.target.place, folder))[0].replace(os.sep, "/")
        number = 1
        while name in named:
            number += 1
            name = f"{stem}#{number}"
        named[name] = replace(triple, name=name)
    return [named[name] for name in sorted(named)]
