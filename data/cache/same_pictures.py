"""Whether the pictures that a config names are those that its cache was made from.

A run reads none of them, and they may lie elsewhere by now: in a folder that was moved, on a cluster's mount. So
another place than the manifest names is no fault; a few pictures there tell by their hashes whether they are the same.
"""

import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from configs.cache_settings import is_place, picture_settings
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.mask_recipe import mask_folder, recipe_of
from configs.schema import Config
from configs.urls import is_url
from data.cache.manifest import Manifest, ShardTable
from data.cache.shard_index import read_index, rebuild_index
from data.cache_layout import index_path
from data.sources.folders import list_folders
from data.sources.items import Item
from data.sources.pictures import read_picture
from data.sources.problems import Findings
from data.sources.tables import list_table, names_are_below, number_repeats
from data.sources.tars import expand_tars, list_tar, tar_name
from data.sources.triples import content_of, key_of

log = logging.getLogger("fluxfill")

_LOOKED_AT = 16  # pictures of a dataset


def refuse_other_pictures(config: Config, folder: Path | None, manifest: Manifest, table: ShardTable) -> None:
    """Raise InputError if a dataset lies elsewhere than it was encoded from and its pictures there are others. Where
    that cannot be told, a warning names the places.

    folder: of the cache; None: its shards are on a server.
    """
    for dataset in config.data.datasets:
        if not (moved := _moved_places(dataset, manifest)):
            continue
        where = " and ".join(moved)
        if reason := _reason_not_to_look(dataset, folder):
            log.warning(
                "%s. Whether the same pictures are there is not known (%s): this run trains on what the cache holds. "
                "If others are, run `fluxfill preprocess CONFIG` first.",
                where,
                reason,
            )
            continue
        assert folder is not None
        try:
            stored = dict(_some_samples(folder, manifest, table, dataset.name))
            problem = _first_other(dataset, stored, config.data.max_megapixels)
        except InputError as error:  # of the pictures, or a damaged shard, which who reads it judges
            log.warning("%s. Whether the same pictures are there could not be found out: %s", where, error)
            continue
        if problem is not None:
            raise InputError(
                f"data.cache {config.data.cache} was made from other pictures: {where}, and {problem}.\n"
                "Run `fluxfill preprocess CONFIG` to encode them; or, to train on what the cache holds, name its place."
            )
        log.info("data: %s; %d pictures there are those of the cache", where, len(stored))


def _moved_places(dataset: DatasetConfig, manifest: Manifest) -> list[str]:
    """The places of a dataset that are not the cache's, each as a phrase."""
    before = manifest.settings
    return [
        f"{key} is {place}, the cache {f'was made from {before[key]}' if before.get(key) else 'does not name its own'}"
        for key, place in picture_settings(dataset).items()
        if is_place(key) and place and place != before.get(key)
    ]


def _reason_not_to_look(dataset: DatasetConfig, folder: Path | None) -> str | None:
    """Why a dataset's pictures cannot be compared; None: they can."""
    if folder is None:
        return "the cache is on a server"
    if any(map(is_url, [*(dataset.tars or []), dataset.table])):
        return "they are on a server"
    if dataset.table is not None and not dataset.table.endswith((".jsonl", ".csv")):
        return "to read them would take as long as preprocessing: pictures may be inside the table"
    tars = [Path(tar) for tar in expand_tars(dataset.tars or [], dataset.name)]
    other = [dataset.target, mask_folder(dataset), dataset.source, dataset.table and Path(dataset.table)]
    if missing := next((place for place in [*other, *tars] if place and not place.exists()), None):
        return f"{missing} is not on this machine"
    return None


def _some_samples(
    folder: Path, manifest: Manifest, table: ShardTable, dataset: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Key -> JSON member of some samples of a dataset, from up to 16 shards."""
    shards = np.flatnonzero(table.dataset == dataset)
    few = shards[np.linspace(0, len(shards) - 1, min(len(shards), _LOOKED_AT)).astype(int)]
    for shard in few:
        path = folder / str(table.path[shard])
        index_file = index_path(path, manifest.format_version)
        try:
            index = read_index(index_file)
        except FileNotFoundError:  # as for who reads the samples
            plan, sha256 = str(table.plan[shard]), str(table.sha256[shard])
            index = rebuild_index(path, index_file, plan=plan, sha256=sha256)
        rows = np.linspace(0, index.num_samples - 1, min(index.num_samples, -(-_LOOKED_AT // len(few)))).astype(int)
        with path.open("rb") as tar:
            for row in rows:
                offset, size = map(int, index.metas[row])
                tar.seek(offset)
                meta = json.loads(tar.read(size))
                yield index.keys[row].removesuffix("-flip" if meta["flip"] else ""), meta


def _first_other(dataset: DatasetConfig, stored: dict[str, dict[str, str]], max_megapixels: float) -> str | None:
    """What is another picture than the cache's, or missing, as a phrase. stored: key -> JSON member."""
    items = {key_of(dataset.name, item.name): item for item in _list_items(dataset, stored.values())}
    for key, meta in stored.items():
        if (item := items.get(key)) is None:
            return f"{meta['target']} is not there"
        contents = [read_picture(file, max_megapixels=max_megapixels).content for file in item.pictures]
        if content_of(contents) != meta["fingerprint"]:
            return f"{item.target} there, its mask or its source is another"
    return None


def _list_items(dataset: DatasetConfig, metas: Iterable[dict[str, str]]) -> list[Item]:
    """The items of a dataset; of tars, of those that hold these samples."""
    findings = Findings()  # which are preprocessing's to tell
    if dataset.target is not None:
        return list_folders(dataset.target, mask_folder(dataset), dataset.source, dataset.name, findings)
    has_masks = not recipe_of(dataset).shares
    if dataset.table is not None:
        table = Path(dataset.table)
        below = names_are_below(dataset.table, dataset.table)
        inside = io.BytesIO()  # nothing: such tables are not looked at
        items = list_table(dataset.table, table, below, dataset, findings, masks=has_masks, pack=table, packed=inside)
        return items if dataset.columns.name is not None else number_repeats(items, findings)
    wanted = {meta["target"].partition("/")[0] for meta in metas}
    tars = [tar for tar in expand_tars(dataset.tars or [], dataset.name) if tar_name(tar) in wanted]
    return [item for tar in tars for item in list_tar(tar, Path(tar), dataset, findings, masks=has_masks)]
