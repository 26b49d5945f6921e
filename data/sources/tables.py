"""Lists of pictures: JSONL, Parquet and Arrow tables, and folders as Hugging Face's `datasets` writes them.

A cell holds a path relative to its table, a URL, or (Parquet and Arrow) the picture itself, as bytes or as the struct
of bytes and path that `datasets` stores. Pictures inside tables are copied out once, to one file a table beside the
cache: a table is read a group of rows at a time, encoding wants single pictures in another order.
"""

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.urls import is_url, shown
from data.sources.caption_files import LISTS_OF_PICTURES
from data.sources.items import HALF_A_CHARACTER, Item, is_utf8
from data.sources.picture_file import PictureFile
from data.sources.problems import CAPTIONS, LISTS, NAMES, Findings
from data.sources.walk import walk_folder
from data.storage.remote_files import check_url

_ROW_BATCH = 64  # rows of a table that are in memory at a time
_NEEDS_PYARROW = (".parquet", ".arrow")


def find_tables(place: str, dataset: str) -> list[str]:
    """The tables that a dataset's `table` names: itself, or all of a Hugging Face folder, sorted.

    Raises InputError if there is none, or `walk_folder` refuses the folder.
    """
    where = f"dataset {dataset}: table {shown(place)}"
    path = Path(place)
    if is_url(place) or path.is_file():
        if not place.partition("?")[0].endswith((".jsonl", ".csv", *_NEEDS_PYARROW)):
            raise InputError(f"{where} is no .jsonl, .csv, .parquet or .arrow file. Correct data.datasets.*.table.")
        return [place]
    if not path.is_dir():
        raise InputError(f"{where} does not exist. Correct data.datasets.*.table.")
    metadata, tables = [], []
    for parent, names in walk_folder(path, where):
        metadata += [Path(parent, name) for name in names if name in LISTS_OF_PICTURES]
        tables += [Path(parent, name) for name in _data_files(Path(parent), names) if name.endswith(_NEEDS_PYARROW)]
    tables = metadata or tables
    if not tables:
        raise InputError(
            f"{where} is a folder without metadata.jsonl (or .csv), .parquet or .arrow files below it. Point "
            "data.datasets.*.table at a list, or at a folder that Hugging Face's datasets wrote."
        )
    return sorted(map(str, tables))


# What map and filter of `datasets` leave beside the data: cache-<fingerprint>.arrow, or one of several such.
_INTERMEDIATE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")


def _data_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Of a folder's files those that hold its rows: where `datasets` saved it, what its state.json lists."""
    if "state.json" in names:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [PurePosixPath(entry["filename"]).name for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # of something else
    return [name for name in names if not _INTERMEDIATE.fullmatch(name)]


def names_are_below(table: str, place: str) -> str:
    """The folder or URL that the names of a table's pictures begin below: a Hugging Face folder, or the table's own."""
    if table == place:
        return table.partition("?")[0].rpartition("/")[0]
    return str(
        Path(place)
    )  # as the tables found there are called, whichever way the config calls it: ./hub, /data/hub/


def list_table(
    table: str,
    file: Path,
    below: str,
    dataset: DatasetConfig,
    findings: Findings,
    *,
    masks: bool,
    pack: Path,
    packed: BinaryIO,
) -> list[Item]:
    """The items of one table, in its order.

    table: its path or URL.  file: what to read, `table` itself if it is local.  below: see `names_are_below`.
    findings: takes every row at fault, and whatever keeps the rest from being read.  masks: whether they are in it.
    pack: the file to which pictures inside the table are copied, open as `packed`.
    """
    columns = dataset.columns
    wanted = {"target": columns.target} | ({"mask": columns.mask} if masks else {})
    if columns.source is not None:
        wanted["source"] = columns.source
    stem = str(PurePosixPath(_below(table, below)).with_suffix(""))

    def caption_column(row: dict[str, Any]) -> str:
        """The one that the config names, or else caption, or text where a row has none."""
        caption = row.get(columns.caption)
        is_none = caption is None or (isinstance(caption, str) and not caption.strip())
        named = "caption" in columns.model_fields_set or not is_none
        return columns.caption if named else "text"

    def find_picture(cell: object, where: str, number: int) -> PictureFile:
        if (inside := _picture_inside(cell)) is None:
            return PictureFile(_resolve(table, cell, where))
        data, suffix = inside
        offset = packed.tell()
        packed.write(data)
        return PictureFile(str(pack), offset, len(data), f"{stem}/{number:08d}{suffix}")

    def read_row(number: int, where: str, row: dict[str, Any]) -> Item:
        for role, column in wanted.items():
            if row.get(column) is None:
                raise InputError(
                    f"{where}: no {column}, but {', '.join(sorted(row)) or 'nothing'}. Add it, or correct "
                    f"data.datasets.*.columns.{role}."
                )
        column = caption_column(row)
        caption = row.get(column)
        if not isinstance(caption, str | None):
            raise InputError(f"{where}: {column} is {caption!r:.60}, no text. Correct it.")
        files = {role: find_picture(row[column], f"{where}: {column}", number) for role, column in wanted.items()}
        name = _name(row, columns.name, files["target"], below, where)
        return Item(name, files["target"], files.get("mask"), files.get("source"), caption)

    items: list[Item] = []
    seen: set[str] = set()
    try:
        for number, where, row in read_rows(table, file, findings):
            try:
                seen |= row.keys()
                items.append(read_row(number, where, row))
            except InputError as error:
                findings.add_error(error, LISTS, where)
    except InputError as error:
        findings.add_error(error, LISTS, shown(table))
    if "caption" in columns.model_fields_set and columns.caption not in seen:
        findings.add(
            LISTS,
            shown(table),
            f"no row has the column {columns.caption}, but {', '.join(sorted(seen))}",
            "Correct data.datasets.*.columns.caption.",
        )
    others = sorted(seen - {*wanted.values(), columns.name})
    if "caption" not in columns.model_fields_set and others and not seen & {"caption", "text"}:
        texts = ", ".join(others)
        cure = "If one of them holds captions, name it in data.datasets.*.columns.caption."
        findings.note(CAPTIONS, shown(table), f"no row has the column caption or text, but {texts}", cure)
    if not items and not findings.problems:
        findings.add(LISTS, shown(table), "holds no row", "Correct data.datasets.*.table.")
    return items


def _below(place: str, folder: str) -> str:
    """A path or URL, without query, as it is called from a folder above it."""
    return place.partition("?")[0].removeprefix(f"{folder}/")


def _name(row: dict[str, Any], column: str | None, target: PictureFile, below: str, where: str) -> str:
    """A row's name: its own column, its place inside the table, or its target's path without suffix."""
    if column is not None:
        name = row.get(column)
        if not isinstance(name, str | int) or name == "":
            raise InputError(f"{where}: {column} is {name!r:.60}, no name. Correct it.")
        return str(name)
    if target.member:
        path = target.member
    elif is_url(target.place) and not target.place.startswith(f"{below}/"):
        parts = urlsplit(target.place)
        path = f"{parts.netloc}{parts.path}"  # without the query, which may hold a token
    else:
        path = _below(target.place, below)
    if not PurePosixPath(path).name:
        raise InputError(f"{where}: {target} names a folder, no picture. Correct it.")
    return str(PurePosixPath(path).with_suffix(""))


def _picture_inside(cell: object) -> tuple[bytes, str] | None:
    """(bytes, suffix) of a cell that holds its picture, plain or as `datasets` stores it; None: it does not."""
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        path = cell.get("path")
        return cell["bytes"], PurePosixPath(path).suffix if isinstance(path, str) else ""
    return (cell, "") if isinstance(cell, bytes) else None


def _resolve(table: str, cell: object, where: str) -> str:
    """A cell's path or URL as one that can be opened. Raises InputError if it leads out of the table's folder."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(path, str) or not path:
        raise InputError(f"{where} is {cell!r:.60}: no path, URL or picture. Correct it.")
    has_drive = re.match(r"[A-Za-z]:[\\/]", path) is not None
    if is_url(path) and not has_drive:
        check_url(path, where)
        return path
    folder, separator, _ = table.partition("?")[0].rpartition("/")
    if "\\" in path and (is_url(table) or not os.path.exists(os.path.join(folder, path))):
        path = path.replace("\\", "/")  # as Windows writes it; a file may be called so elsewhere
    if ".." in PurePosixPath(path).parts:
        path = os.path.normpath(path)  # a/../b.png is below the folder
    if path.startswith("/") and not is_url(table):
        path = path.removeprefix(f"{os.path.abspath(folder or '.')}/")
    if has_drive or path.startswith("/") or ".." in PurePosixPath(path).parts or "\0" in path:
        below = shown(folder) if is_url(table) else os.path.abspath(folder or ".")
        raise InputError(
            f"{where} is {path!a}, which leads out of the table's folder {below}. Write a path relative to the table, "
            "below it."
        )
    if not PurePosixPath(path).name:
        raise InputError(f"{where} is {path!r}, the table's folder, no picture. Correct it.")
    return as_on_disk(f"{folder}{separator}{PurePosixPath(path)}")


def as_on_disk(place: str) -> str:
    """A path in the one of Unicode's forms in which there is such a file: macOS and Linux differ in it."""
    if place.isascii() or is_url(place) or os.path.exists(place):
        return place
    forms = (unicodedata.normalize(form, place) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.exists(form)), place)


def find_missing_folders(table: str, places: Iterable[str], findings: Findings) -> set[str]:
    """The folders of a table's pictures that are not there. findings: takes each once.

    Read one by one, their pictures would each be tried again and again, as where a disk went away.
    """
    counts = Counter(os.path.dirname(place) for place in places if not is_url(place))
    missing = {folder for folder in counts if not os.path.isdir(folder or ".")}
    for folder in sorted(missing):
        pictures = f"{counts[folder]} picture{'s' * (counts[folder] > 1)}"
        findings.add(
            LISTS,
            table,
            f"names {pictures} in {folder}, which is no folder",
            "Restore it, or mend the paths: they are relative to the list's own folder.",
        )
    return missing


def number_repeats(items: Sequence[Item], findings: Findings) -> list[Item]:
    """Items with names of their own: of a picture in several rows, with other masks or captions, a, a#2, a#3 and so on
    in their order.  findings: takes rows that are there twice."""
    counts = Counter(item.name for item in items)
    numbers: Counter[str] = Counter()
    seen: set[Item] = set()
    named = []
    for item in items:
        if counts[item.name] == 1:  # nearly all
            named.append(item)
            continue
        if item in seen:
            cure = "Remove one: data.datasets.*.weight says how often a set is seen."
            findings.add(NAMES, item.target, "is there twice, with the same mask, source and caption", cure)
            continue
        seen.add(item)
        numbers[item.name] += 1
        while numbers[item.name] > 1 and f"{item.name}#{numbers[item.name]}" in counts:
            numbers[item.name] += 1
        number = numbers[item.name]
        named.append(item if number == 1 else replace(item, name=f"{item.name}#{number}"))
    return named


# --- rows: (number from 0, how messages call it, column -> cell) ------------------------------------------------------


def read_rows(table: str, file: Path, findings: Findings) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The rows of a table. findings: takes those at fault.  Raises InputError if the rest cannot be read."""
    suffix = PurePosixPath(table.partition("?")[0]).suffix
    try:
        if suffix == ".jsonl":
            yield from _read_jsonl(table, file, findings)
        elif suffix == ".csv":
            yield from _read_csv(table, file, findings)
        else:
            yield from _read_with_pyarrow(table, file)
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(table)}: not UTF-8 text ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{shown(table)}: cannot be read ({error}). Restore the file or its permissions.") from error


def _read_jsonl(table: str, file: Path, findings: Findings) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            where = f"{shown(table)}, line {number + 1}"
            try:
                row = json.loads(line)
                is_text = "\\u" not in line or is_utf8(json.dumps(row, ensure_ascii=False))
            except (ValueError, RecursionError) as error:
                findings.add(LISTS, where, f"no JSON ({error})", "Correct the line, or write the list again.")
                continue
            if not isinstance(row, dict):
                findings.add(LISTS, where, "no JSON object", 'Write {"target": ..., "mask": ...}.')
            elif not is_text:
                findings.add(LISTS, where, HALF_A_CHARACTER, "Correct the line, or write the list again.")
            else:
                yield number, where, _with_file_names(row)


def _read_csv(table: str, file: Path, findings: Findings) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        # strict: else a quote that is never closed swallows the rows behind it
        rows = csv.DictReader(lines, strict=True, skipinitialspace=True)
        try:
            first = ",".join(rows.fieldnames or ())
            if "," not in first and (separator := next((each for each in ";\t|" if each in first), None)):
                raise InputError(
                    f"{shown(table)}, line 1: no CSV (its columns are separated by {separator!r}). Separate them by "
                    "commas."
                )
            for number, row in enumerate(rows):
                where = f"{shown(table)}, line {rows.line_num}"
                if None in row:
                    findings.add(
                        LISTS,
                        where,
                        f"{len(row[None])} cell(s) more than the first line has columns, from {row[None][0]!r:.60} on",
                        'Put a text with commas in quotes: "a red, old car".',
                    )
                    continue
                yield number, where, _with_file_names({name: cell or None for name, cell in row.items()})
        except csv.Error as error:
            raise InputError(
                f"{shown(table)}, line {rows.line_num + 1}: no CSV ({error}). Correct the line."
            ) from error


def _with_file_names(row: dict[str, Any]) -> dict[str, Any]:
    """`datasets` calls the column `image` whose files its metadata names under file_name or image_file_name."""
    columns = {"image" if name == "file_name" else name.removesuffix("_file_name"): row[name] for name in row}
    return row | columns


def _read_with_pyarrow(table: str, file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{shown(table)}: .parquet and .arrow need pyarrow ({error}). Run `pip install 'fluxfill[parquet]'`, "
            "or write the list as .jsonl."
        ) from error
    try:
        if table.partition("?")[0].endswith(".parquet"):
            batches = parquet.ParquetFile(file).iter_batches(batch_size=_ROW_BATCH)
        else:
            batches = _arrow_batches(pa, file)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield number, f"{shown(table)}, row {number + 1}", _with_file_names(row)
                number += 1
    except pa.ArrowException as error:
        raise InputError(f"{shown(table)}: damaged ({error}). Fetch or write it again.") from error


def _arrow_batches(pa, file: Path) -> Iterator[Any]:
    """Arrow's stream format, as `datasets` writes it, or its file format."""
    with pa.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        for batch in batches:
            for begin in range(0, batch.num_rows, _ROW_BATCH):
                yield batch.slice(begin, _ROW_BATCH)
