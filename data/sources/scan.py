"""The scan of a dataset: every picture read once, for its size and the hash of its bytes, and a mask's levels.

One result file per unit (a tar, or some hundred files), keyed by a hash of its inputs: names, and sizes and times of
files, or what a storage says of its objects. Concurrent scanners shuffle the units and reuse each other's results; the
next run reads only what is new. The URLs in a table are taken for what they were at first: delete <cache>/scan when
what they name changed.
"""

import os
import random
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

import xxhash
from PIL import Image

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.mask_recipe import mask_folder, recipe_of
from configs.urls import is_url
from data.cache_layout import COPIES, OWN_FOLDERS
from data.sources.caption_files import read_caption_file
from data.sources.download_cache import DownloadCache, Pack, open_new_file
from data.sources.file_stamps import outwait_the_clock, stamp_of
from data.sources.folders import list_folders
from data.sources.items import Item
from data.sources.mask_checks import Fault, find_fault_of_mask, find_fault_of_pair
from data.sources.mask_reach import measure_reach
from data.sources.picture_file import PictureBytes, PictureFile
from data.sources.pictures import load_mask, load_picture, read_header, read_picture
from data.sources.problems import CAPTIONS, LISTS, NAMES, TRUNCATED, UNREADABLE, Findings, Problem
from data.sources.scan_cache import (
    ITEM_COLUMNS,
    PictureInfo,
    Row,
    ScanCache,
    ScannedItem,
    is_in_pack,
    item_of,
    row_of_infos,
    row_of_item,
    with_infos,
)
from data.sources.tables import (
    find_missing_folders,
    find_tables,
    list_table,
    names_are_below,
    number_repeats,
)
from data.sources.tars import expand_tars, list_tar

_SCAN_VERSION = 7
_UNIT_THREADS, _PICTURE_THREADS = 4, 8  # they wait for disks and networks, and decode masks
_UNIT_ITEMS = 1024


def scan_dataset(
    dataset: DatasetConfig,
    data: DataConfig,
    advance: Callable[[int], None],
    findings: Findings,
    *,
    thorough: bool = False,
) -> list[ScannedItem]:
    """The items of a dataset whose pictures can be read, sorted by name, with the infos of their pictures.

    advance: told how many more are done.  findings: takes all that is wrong with items and pictures.  thorough: decode
    every picture in full, once: a file that was cut off looks sound by its header.
    Raises StorageFailed, of which no picture is at fault.
    """
    problems_before = len(findings.problems)
    try:
        scanner = _Scanner(dataset, data, findings, thorough=thorough)
        tars = expand_tars(dataset.tars or [], dataset.name)
        _refuse_the_caches_own(dataset, tars, data.cache_folder)
        if dataset.tars is not None:
            units = [partial(scanner.scan_tar, tar) for tar in tars]
        else:
            units = [partial(scanner.scan_files, items) for items in _deal_to_units(scanner.list_items())]
    except InputError as error:
        findings.add_error(error, LISTS)
        return []

    def run(unit: Callable[[], list[ScannedItem]]) -> list[ScannedItem]:
        try:
            scanned = unit()
        except InputError as error:
            findings.add_error(error, LISTS)
            return []
        advance(len(scanned))
        return scanned

    random.shuffle(units)  # else one that catches up with another would go on in step with it, unit by unit
    with ThreadPoolExecutor(_UNIT_THREADS) as pool, scanner.picture_pool:
        scanned = [entry for entries in pool.map(run, units) for entry in entries]
    scanned.sort(key=lambda entry: entry.item.name)
    for first, second in pairwise(scanned):
        if first.item.name == second.item.name:
            findings.add(
                NAMES,
                second.item.target,
                f"makes a second sample of the name {first.item.name} in dataset {dataset.name}, beside "
                f"{first.item.target}",
                "Rename one; in a table, say in columns.name which column has names of their own.",
            )
    if len(findings.problems) == problems_before:  # else what could not be listed would be forgotten
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


class _Seen(NamedTuple):
    """A picture that was read; of a mask, its decoded levels."""

    info: PictureInfo
    picture: PictureBytes
    levels: Image.Image | None


class _Scanner:
    """The scan of one dataset."""

    def __init__(self, dataset: DatasetConfig, data: DataConfig, findings: Findings, *, thorough: bool) -> None:
        self.findings, self.thorough = findings, thorough
        self.dataset = dataset
        self.max_megapixels = data.max_megapixels
        recipe = recipe_of(dataset)
        self.masks, self.label = not recipe.shares, recipe.label  # masks: whether the dataset has its own
        self.checks = dataset.check_masks != "off"  # whether pairs of source and target are compared
        self.results = ScanCache(data.cache_folder, dataset.name)
        self.copies = DownloadCache(data.cache_folder / COPIES, int(data.copies_gib * 2**30))
        self.picture_pool = ThreadPoolExecutor(_PICTURE_THREADS)

    # --- listing ---

    def list_items(self) -> list[Item]:
        """Of folders or tables: items by their names alone."""
        dataset = self.dataset
        if dataset.target is not None:
            return list_folders(dataset.target, mask_folder(dataset), dataset.source, dataset.name, self.findings)
        place = dataset.table or ""
        tables = find_tables(place, dataset.name)
        with ThreadPoolExecutor(_UNIT_THREADS) as pool:
            items = [item for items in pool.map(partial(self._list_table, place), tables) for item in items]
        return items if dataset.columns.name is not None else number_repeats(items, self.findings)

    def _list_table(self, place: str, table: str) -> list[Item]:
        below = names_are_below(table, place)
        stamp = stamp_of(table)
        columns = self.dataset.columns
        key = self._key("table", table, below, stamp, columns.model_dump(), sorted(columns.model_fields_set))
        pack = self.copies.path(table, key, ".pictures")
        found = self.results.read(key)
        if found is None or (not pack.exists() and any(map(is_in_pack, found[1:]))):
            outwait_the_clock([table])
            own = Findings()
            with self.copies.local(table, stamp) as file, open_new_file(pack) as packed:
                listed = list_table(table, file, below, self.dataset, own, masks=self.masks, pack=pack, packed=packed)
            missing = find_missing_folders(table, (file.place for item in listed for file in item.pictures), own)
            items = [
                item for item in listed if missing.isdisjoint(os.path.dirname(file.place) for file in item.pictures)
            ]
            found = [own.notes, *(row_of_item(item, str(pack)) for item in items)]
            self._keep(key, found, own)
        notes, *rows = found
        self.findings.notes += [Problem(*note) for note in notes]
        return [item_of(row, str(pack)) for row in rows]

    # --- scanning ---

    def scan_tar(self, tar: str) -> list[ScannedItem]:
        """The samples of a tar."""
        stamp = stamp_of(tar)
        key = self._key("tar", tar, stamp, self.dataset.members.model_dump())
        copy = str(self.copies.path(tar, stamp, ".copy")) if is_url(tar) else ""
        if (found := self.results.read(key)) is None:
            outwait_the_clock([tar])
            own = Findings()
            with self.copies.local(tar, stamp) as file:
                scanned = self._scan(list_tar(tar, file, self.dataset, own, masks=self.masks), own, packed=None)
            found = [own.notes, *([*row_of_item(entry.item, tar), *row_of_infos(entry)] for entry in scanned)]
            self._keep(key, found, own)
        notes, *rows = found
        self.findings.notes += [Problem(*note) for note in notes]
        # Of the rows even if the items were just listed: those have their copy where it was while they were.
        scanned = [with_infos(item_of(row, tar, copy), row[ITEM_COLUMNS:]) for row in rows]
        return self._decoded(scanned, key)

    def scan_files(self, items: Sequence[Item]) -> list[ScannedItem]:
        """Items whose pictures are files of their own, or in a table's."""
        if self.dataset.target is not None:
            texts = dict.fromkeys(item.caption for item in items if item.caption is not None)
            captions = dict(zip(texts, self.picture_pool.map(self._read_caption, texts), strict=True))
            items = [replace(item, caption=captions.get(item.caption or "")) for item in items]
        places = {file.place for item in items for file in item.pictures}
        stamps = {place: place if is_url(place) else self._stamp_of_file(place) for place in places}
        described = [[item.name, *([stamps[f.place], f.offset, f.size] for f in item.pictures)] for item in items]
        key = self._key("files", described)
        if (found := self.results.read(key)) is not None:
            (pack,), *rows = found
            pack_path = self.copies.folder / pack
            return self._decoded([with_infos(*pair, pack_path) for pair in zip(items, rows, strict=True)], key)
        outwait_the_clock(places)
        own = Findings()
        if any(map(is_url, places)) and not self.copies.are_too_many():
            # Of a name of its own: who scans the same at the same time packs in another order. The name stands
            # with the offsets, so whichever result is read later, its offsets are those of its pack.
            pack = f"{key}-{secrets.token_hex(4)}.pictures"
            with open_new_file(self.copies.folder / pack) as packed:
                scanned = self._scan(items, own, packed=Pack(packed))
        else:
            pack, scanned = "", self._scan(items, own, packed=None)
        self._keep(key, [[pack], *(row_of_infos(entry) for entry in scanned)], own)
        pack_path = self.copies.folder / pack
        return self._decoded([with_infos(entry.item, row_of_infos(entry), pack_path) for entry in scanned], key)

    def _keep(self, key: str, rows: list[Row], own: Findings) -> None:
        """Store what was found out by a key if nothing was wrong; what was is told again by the next scan."""
        self.findings.problems += own.problems
        if not own.problems:
            self.results.write(key, rows)

    def _read_caption(self, path: str) -> str | None:
        try:
            return read_caption_file(path)
        except InputError as error:
            self.findings.add_error(error, CAPTIONS, path)
            return None

    def _stamp_of_file(self, place: str) -> str:
        """As `stamp_of`; of a table's pack its name, which is a hash of the table's own stamp: when it is gone it is
        written again, with the same bytes."""
        path = Path(place)
        return path.name if path.parent == self.copies.folder else stamp_of(place)

    def _key(self, *parts: object) -> str:
        return self.results.key(_SCAN_VERSION, self.max_megapixels, self.masks, self.label, self.checks, *parts)

    def _scan(self, items: Sequence[Item], own: Findings, packed: Pack | None) -> list[ScannedItem]:
        """Read every picture; the items of which all can be. own: takes what is wrong with the others."""

        def look(file: PictureFile | None, *, is_mask: bool = False) -> _Seen | None:
            try:
                return None if file is None else self._look(file, packed, is_mask=is_mask)
            except InputError as error:
                own.add_error(error, UNREADABLE, file)
                return None

        def scan(item: Item) -> ScannedItem | None:
            target, mask, source = look(item.target), look(item.mask, is_mask=True), look(item.source)
            if target is None or (mask is None) != (item.mask is None) or (source is None) != (item.source is None):
                return None
            try:
                fault = self._find_fault(target, mask, source) if mask else None
            except InputError as error:
                at_fault = (file for file in item.pictures if str(error).startswith(f"{file}: "))
                own.add_error(error, TRUNCATED, next(at_fault, ""))
                return None
            return ScannedItem(item, target.info, mask and mask.info, source and source.info, fault)

        return [scanned for scanned in self.picture_pool.map(scan, items) if scanned is not None]

    def _decoded(self, scanned: list[ScannedItem], key: str) -> list[ScannedItem]:
        """If it is to be thorough, those of a unit whose pictures can be decoded in full. key: of the unit; a second
        result says that all of them could."""
        all_decode = self.results.key("decoded", key)
        if not self.thorough or self.results.read(all_decode) is not None:
            return scanned
        own = Findings()

        def decodes(file: PictureFile) -> bool:
            try:
                load_picture(file, max_megapixels=self.max_megapixels)
            except InputError as error:
                own.add_error(error, TRUNCATED, file)
                return False
            return True

        def all_of(entry: ScannedItem) -> bool:
            return all([decodes(file) for file in entry.item.pictures])

        sound = list(self.picture_pool.map(all_of, scanned))
        self._keep(all_decode, [], own)
        return [entry for entry, is_sound in zip(scanned, sound, strict=True) if is_sound]

    def _look(self, file: PictureFile, packed: Pack | None, *, is_mask: bool) -> _Seen:
        """One read serves for the hash, the header and the pixels."""
        limit = self.max_megapixels
        picture = read_picture(file, max_megapixels=limit)
        width, height, orientation = read_header(picture, max_megapixels=limit)
        levels, darkest, brightest, reach = None, 0, 0, ""
        if is_mask:
            levels = load_mask(picture, max_megapixels=limit, label=self.label)
            darkest, brightest = cast(tuple[int, int], levels.getextrema())  # of its one channel
            reach = measure_reach(levels)
        copied = packed.add(picture.data) if packed is not None and is_url(file.place) else (0, 0)
        info = PictureInfo(picture.content, width, height, darkest, brightest, *copied, orientation, reach)
        return _Seen(info, picture, levels)

    def _find_fault(self, target: _Seen, mask: _Seen, source: _Seen | None) -> Fault | None:
        """What is seen to be wrong with a mask, or with a pair."""
        assert mask.levels is not None
        limit = self.max_megapixels
        if self.label is None:
            fault = find_fault_of_mask(target.picture, mask.picture, mask.levels, max_megapixels=limit)
            if fault is not None:
                return fault
        has_both = mask.info.darkest < 128 <= mask.info.brightest
        of_one_size = source and len({(seen.info.width, seen.info.height) for seen in (target, mask, source)}) == 1
        if source is None or not self.checks or not has_both or not of_one_size:
            return None
        return find_fault_of_pair(target.picture, source.picture, mask.levels, max_megapixels=limit)
