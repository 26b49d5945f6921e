"""The scan of a dataset: every picture read once, for its size and the hash of its bytes, and a mask's levels.

One result file per unit (a tar, or some hundred files), keyed by a hash of its inputs: names, and sizes and times of
files, or what a storage says of its objects. Concurrent scanners shuffle the units and reuse each other's results; the
next run reads only what is new. The URLs in a table are taken for what they were at first: delete <cache>/scan when
what they name changed.
"""

import random
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError, StorageFailed, list_problems
from configs.mask_recipe import mask_folder, recipe_of
from configs.urls import is_url
from data.cache_layout import COPIES, OWN_FOLDERS
from data.sources.download_cache import DownloadCache, Pack, open_new_file
from data.sources.file_stamps import outwait_the_clock, stamp_of
from data.sources.folders import list_folders, read_caption_file
from data.sources.items import Item
from data.sources.picture_file import PictureFile
from data.sources.pictures import load_mask, picture_size, read_picture
from data.sources.scan_cache import (
    ITEM_COLUMNS,
    PictureInfo,
    ScanCache,
    ScannedItem,
    is_in_pack,
    item_of,
    row_of_infos,
    row_of_item,
    with_infos,
)
from data.sources.tables import find_tables, list_table, names_are_below
from data.sources.tars import expand_tars, list_tar

_SCAN_VERSION = 2
_UNIT_THREADS, _PICTURE_THREADS = 4, 8  # they wait for disks and networks, and decode masks
_UNIT_ITEMS = 1024


def scan_dataset(dataset: DatasetConfig, data: DataConfig, advance: Callable[[int], None]) -> list[ScannedItem]:
    """All items of a dataset, sorted by name, with the infos of their pictures.

    advance: told how many more are done.  Raises one InputError that lists all that is wrong with items and pictures.
    """
    scanner = _Scanner(dataset, data)
    tars = expand_tars(dataset.tars or [], dataset.name)
    _refuse_the_caches_own(dataset, tars, data.cache_folder)
    if dataset.tars is not None:
        units = [partial(scanner.scan_tar, tar) for tar in tars]
    else:
        units = [partial(scanner.scan_files, items) for items in _deal_to_units(scanner.list_items())]

    def run(unit: Callable[[], list[ScannedItem]]) -> list[ScannedItem] | str:
        try:
            scanned = unit()
        except StorageFailed:  # no fault of a picture: the next would fail like it, after as long a wait each
            raise
        except InputError as error:
            return str(error)
        advance(len(scanned))
        return scanned

    random.shuffle(units)  # else one that catches up with another would go on in step with it, unit by unit
    with ThreadPoolExecutor(_UNIT_THREADS) as pool, scanner.picture_pool:
        outcomes = list(pool.map(run, units))
    problems = sorted(line for outcome in outcomes if isinstance(outcome, str) for line in outcome.splitlines())
    if problems:
        raise InputError(list_problems(problems))
    scanned = [entry for outcome in outcomes if not isinstance(outcome, str) for entry in outcome]
    scanned.sort(key=lambda entry: entry.item.name)
    for first, second in pairwise(scanned):
        if first.item.name == second.item.name:
            problems.append(
                f"dataset {dataset.name}: {first.item.target} and {second.item.target} make two samples of the name "
                f"{first.item.name}. Rename one; in a table, say in columns.name which column has names of their own."
            )
    if problems:
        raise InputError(list_problems(problems))
    scanner.results.delete_unused()
    return scanned


def _refuse_the_caches_own(dataset: DatasetConfig, tars: Sequence[str], cache: Path) -> None:
    """Raise InputError if a dataset's pictures lie in a folder of the cache from which it deletes."""
    places = {place for place in (dataset.target, mask_folder(dataset), dataset.source) if place is not None}
    places |= {Path(tar).parent for tar in tars if not is_url(tar)}
    places |= {Path(table) for table in [dataset.table] if table is not None and not is_url(table)}
    own = [(cache / name).resolve() for name in OWN_FOLDERS]
    for place in sorted(places):
        if any(place.resolve().is_relative_to(folder) for folder in own):
            raise InputError(
                f"dataset {dataset.name}: {place} lies in a folder of data.cache {cache} itself, which deletes what it "
                "does not know there. Move the pictures elsewhere, or point data.cache at another folder."
            )


def _deal_to_units(items: Sequence[Item]) -> list[list[Item]]:
    """Items by a hash of their names, so that a new one changes the unit it goes to and no other."""
    bits = max(min(4, (len(items) // 64).bit_length()), (len(items) // _UNIT_ITEMS).bit_length())
    units: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        units[xxhash.xxh3_64_intdigest(item.name.encode("utf-8", "surrogateescape")) & (1 << bits) - 1].append(item)
    return list(units.values())


class _Scanner:
    """The scan of one dataset."""

    def __init__(self, dataset: DatasetConfig, data: DataConfig) -> None:
        self.dataset = dataset
        self.max_megapixels = data.max_megapixels
        self.masks = not recipe_of(dataset).shares  # whether the dataset has its own
        self.results = ScanCache(data.cache_folder, dataset.name)
        self.copies = DownloadCache(data.cache_folder / COPIES, int(data.copies_gib * 2**30))
        self.picture_pool = ThreadPoolExecutor(_PICTURE_THREADS)

    # --- listing ---

    def list_items(self) -> list[Item]:
        """Of folders or tables: items by their names alone."""
        if self.dataset.target is not None:
            return list_folders(self.dataset.target, mask_folder(self.dataset), self.dataset.source, self.dataset.name)
        place = self.dataset.table or ""
        tables = find_tables(place, self.dataset.name)
        with ThreadPoolExecutor(_UNIT_THREADS) as pool:
            return [item for items in pool.map(partial(self._list_table, place), tables) for item in items]

    def _list_table(self, place: str, table: str) -> list[Item]:
        below = names_are_below(table, place)
        stamp = stamp_of(table)
        key = self._key("table", table, below, stamp, self.dataset.columns.model_dump())
        pack = self.copies.path(table, key, ".pictures")
        rows = self.results.read(key)
        if rows is not None and (pack.exists() or not any(map(is_in_pack, rows))):
            return [item_of(row, str(pack)) for row in rows]
        outwait_the_clock([table])
        with self.copies.local(table, stamp) as file, open_new_file(pack) as packed:
            items = list_table(table, file, below, self.dataset, masks=self.masks, pack=pack, packed=packed)
        self.results.write(key, [row_of_item(item, str(pack)) for item in items])
        return items

    # --- scanning ---

    def scan_tar(self, tar: str) -> list[ScannedItem]:
        """The samples of a tar."""
        stamp = stamp_of(tar)
        key = self._key("tar", tar, stamp, self.dataset.members.model_dump())
        copy = str(self.copies.path(tar, stamp, ".copy")) if is_url(tar) else ""
        if (rows := self.results.read(key)) is None:
            outwait_the_clock([tar])
            with self.copies.local(tar, stamp) as file:
                scanned = self._scan(list_tar(tar, file, self.dataset, masks=self.masks), packed=None)
            rows = [[*row_of_item(entry.item, tar), *row_of_infos(entry)] for entry in scanned]
            self.results.write(key, rows)
        # Of the rows even if the items were just list_problems: those have their copy where it was while they were.
        return [with_infos(item_of(row, tar, copy), row[ITEM_COLUMNS:]) for row in rows]

    def scan_files(self, items: Sequence[Item]) -> list[ScannedItem]:
        """Items whose pictures are files of their own, or in a table's."""
        if self.dataset.target is not None:
            texts = dict.fromkeys(item.caption for item in items if item.caption is not None)
            captions = dict(zip(texts, self.picture_pool.map(read_caption_file, texts), strict=True))
            items = [replace(item, caption=captions.get(item.caption or "")) for item in items]
        places = {file.place for item in items for file in item.pictures}
        stamps = {place: place if is_url(place) else self._stamp_of_file(place) for place in places}
        described = [[item.name, *([stamps[f.place], f.offset, f.size] for f in item.pictures)] for item in items]
        key = self._key("files", described)
        if (found := self.results.read(key)) is None:
            outwait_the_clock(places)
            if any(map(is_url, places)) and not self.copies.are_too_many():
                # Of a name of its own: who scans the same at the same time packs in another order. The name stands
                # with the offsets, so whichever result is read later, its offsets are those of its pack.
                pack = f"{key}-{secrets.token_hex(4)}.pictures"
                with open_new_file(self.copies.folder / pack) as packed:
                    scanned = self._scan(items, packed=Pack(packed))
            else:
                pack, scanned = "", self._scan(items, packed=None)
            found = [[pack], *(row_of_infos(entry) for entry in scanned)]
            self.results.write(key, found)
        (pack,), *rows = found
        return [with_infos(item, row, self.copies.folder / pack) for item, row in zip(items, rows, strict=True)]

    def _stamp_of_file(self, place: str) -> str:
        """As `stamp_of`; of a table's pack its name, which is a hash of the table's own stamp: when it is gone it is
        written again, with the same bytes."""
        path = Path(place)
        return path.name if path.parent == self.copies.folder else stamp_of(place)

    def _key(self, *parts: object) -> str:
        return self.results.key(_SCAN_VERSION, self.max_megapixels, self.masks, *parts)

    def _scan(self, items: Sequence[Item], packed: Pack | None) -> list[ScannedItem]:
        """Read every picture. Raises one InputError that lists those at fault."""

        def scan(item: Item) -> ScannedItem | str:
            try:
                return ScannedItem(
                    item,
                    self._look(item.target, packed, is_mask=False),
                    None if item.mask is None else self._look(item.mask, packed, is_mask=True),
                    None if item.source is None else self._look(item.source, packed, is_mask=False),
                )
            except StorageFailed:
                raise
            except InputError as error:
                return str(error)

        outcomes = list(self.picture_pool.map(scan, items))
        problems = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if problems:
            raise InputError("\n".join(problems))
        return [outcome for outcome in outcomes if not isinstance(outcome, str)]

    def _look(self, file: PictureFile, packed: Pack | None, *, is_mask: bool) -> PictureInfo:
        limit = self.max_megapixels
        picture = read_picture(file, max_megapixels=limit)
        width, height = picture_size(picture, max_megapixels=limit)
        darkest, brightest = 0, 0
        if is_mask:
            levels = np.asarray(load_mask(picture, max_megapixels=limit))
            darkest, brightest = int(levels.min()), int(levels.max())
        copied = packed.add(picture.data) if packed is not None and is_url(file.place) else (0, 0)
        return PictureInfo(picture.content, width, height, darkest, brightest, *copied)
