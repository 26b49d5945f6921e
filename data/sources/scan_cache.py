"""The scan cache: result files of what was found out about pictures, one a unit, and their rows."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import xxhash

from configs.errors import os_errors_named
from data.cache_layout import SCAN
from data.sources.items import Item
from data.sources.mask_checks import Fault
from data.sources.picture_file import PictureFile
from data.sources.pictures import Header
from data.storage.atomic_write import write_text_atomically

Row = list[Any]

_FITTING = "fitting-1"  # of masks that were held against their bucket: see `ScanCache.read_fitting`


class PictureInfo(NamedTuple):
    """What was found out about one picture.

    content: hash of its bytes, 32 hex digits.  width, height: upright.  darkest, brightest: a mask's levels, else 0.
    copy_offset, size: where its bytes are in a pack of remote pictures; size 0 = nowhere.  orientation: EXIF's, by
    which it was turned upright; 1 = not at all.  reach: of a mask, as `measure_reach` gives it, else "".
    """

    content: str
    width: int
    height: int
    darkest: int = 0
    brightest: int = 0
    copy_offset: int = 0
    size: int = 0
    orientation: int = 1
    reach: str = ""

    @property
    def header(self) -> Header:
        return Header(self.width, self.height, self.orientation)


class ScannedItem(NamedTuple):
    """An item and the infos of its pictures: target, mask (None where masks are random), source (or None).

    fault: what is seen to be wrong with its mask, or with its pair of source and target.
    """

    item: Item
    target: PictureInfo
    mask: PictureInfo | None
    source: PictureInfo | None
    fault: Fault | None = None

    @property
    def infos(self) -> list[PictureInfo]:
        """Of the pictures it has: target, mask, source."""
        return [info for info in (self.target, self.mask, self.source) if info is not None]


class ScanCache:
    """A folder of results, each a list of rows under a key: a hash of all its inputs."""

    def __init__(self, cache: Path, dataset: str) -> None:
        """Makes nothing that stays. Raises InputError if nothing can be written to <cache>/scan/<dataset>: before an
        hour of reading pictures, not after it."""
        self._cache, self.folder = cache, cache / SCAN / dataset
        self._used = {_FITTING}
        for place in (self.folder, *self.folder.absolute().parents):  # up to the first that is there
            with self._errors_named(place), suppress(FileNotFoundError), TemporaryFile(dir=place):
                break

    def _errors_named(self, place: Path) -> AbstractContextManager[None]:
        cure = (
            f" Whoever looks at pictures, an online run too, keeps what was found in data.cache {self._cache}: have it "
            "made writable to you, or point data.cache at a folder that is. A complete one is trained on as it is with "
            "data.mode=cached data.preprocess=never data.encoder_devices=null."
        )
        return os_errors_named(place, "written to", path_cure=cure)

    def key(self, *parts: object) -> str:
        """The key of a result with these inputs (of JSON's types)."""
        key = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
        self._used.add(key)
        return key

    def read(self, key: str) -> list[Row] | None:
        """None if there is no such result, or it is damaged."""
        try:
            checksum, rows = (self.folder / f"{key}.json").read_text(encoding="utf-8").split("\n", 1)
            return json.loads(rows) if checksum == xxhash.xxh3_128_hexdigest(rows.encode()) else None
        except (OSError, ValueError):
            return None

    def write(self, key: str, rows: Sequence[Row]) -> None:
        text = json.dumps(rows, ensure_ascii=False)
        file = self.folder / f"{key}.json"
        with self._errors_named(file), suppress(FileNotFoundError):  # one that was done took it for a dead worker's:
            self.folder.mkdir(parents=True, exist_ok=True)  # then it is found out again
            write_text_atomically(file, f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}")

    def read_fitting(self) -> list[Row]:
        """(hash of a triple's pictures, bucket, label) of masks of which enough is left in that bucket, as far as they
        had to be decoded to tell. Unlike the other results this one grows."""
        return self.read(_FITTING) or []

    def write_fitting(self, rows: Sequence[Row]) -> None:
        self.write(_FITTING, rows)

    def delete_unused(self) -> None:
        """Forget what was found about files that changed or are gone: all whose key was not made. And what a worker
        that was killed had half written."""
        for file in [*self.folder.glob("*.json"), *self.folder.glob("*.part")]:
            if file.suffix == ".part" or file.stem not in self._used:
                file.unlink(missing_ok=True)


# --- rows: items and infos in types of JSON ---------------------------------------------------------------------------

ITEM_COLUMNS = 5  # name, target, mask, source, caption


def row_of_item(item: Item, file: str = "") -> Row:
    """An item as a row. file: the tar or the pack that holds its pictures; it is called differently elsewhere, so the
    row does not name it."""
    pictures = [
        picture and ["" if picture.place == file else picture.place, picture.offset, picture.size, picture.member]
        for picture in (item.target, item.mask, item.source)
    ]
    return [item.name, *pictures, item.caption]


def is_in_pack(row: Row) -> bool:
    """Whether a picture of a table's row is in the table's pack."""
    return any(picture is not None and picture[0] == "" for picture in row[1 : ITEM_COLUMNS - 1])


def item_of(row: Row, file: str = "", copy: str = "") -> Item:
    """The item of a row. file: of `row_of_item`, as it is called here.  copy: of it, if it is a tar on a server."""

    def picture(place: str, offset: int, size: int | None, member: str) -> PictureFile:
        return PictureFile(place or file, offset, size, member, copy, offset if copy else 0)

    name, target, mask, source, caption = row[:ITEM_COLUMNS]
    return Item(name, picture(*target), mask and picture(*mask), source and picture(*source), caption)


def row_of_infos(scanned: ScannedItem) -> Row:
    """The infos of an item as a row of four, its fault the last."""
    return [info and list(info) for info in (scanned.target, scanned.mask, scanned.source, scanned.fault)]


def with_infos(item: Item, row: Row, pack: Path | None = None) -> ScannedItem:
    """An item with the infos of a row. pack: where copies of its remote pictures are, if there are any."""
    *infos, fault = row
    target, mask, source = (None if info is None else PictureInfo(*info) for info in infos)

    def copied(file: PictureFile, info: PictureInfo) -> PictureFile:
        if not info.size:
            return file
        return replace(file, size=info.size, copy=str(pack), copy_offset=info.copy_offset)

    assert target is not None
    item = replace(
        item,
        target=copied(item.target, target),
        mask=item.mask and mask and copied(item.mask, mask),
        source=item.source and source and copied(item.source, source),
    )
    return ScannedItem(item, target, mask, source, fault and Fault(*fault))
