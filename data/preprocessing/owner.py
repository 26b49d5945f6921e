"""The owner of a cache: the run that its shards were made for. A config of another run may use the cache and add to it,
but it deletes none of them unasked: they are hours of somebody's work.

Shards go without asking where pictures or settings of the owner's own datasets changed, and with a dataset that its
config no longer names. owner.json is written before the first shard, so an unfinished cache has an owner too.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from configs.cache_settings import picture_settings, plan_settings
from configs.errors import InputError
from data.cache.shard_index import ShardIndex, read_index
from data.cache_layout import OWNER, SHARDS, index_path, tars_of
from data.preprocessing.job import Job
from data.samples.shard_plan import PlannedShard
from data.storage.atomic_write import write_text_atomically

_READ_THREADS = 16


@dataclass(frozen=True)
class Owner:
    """A run, and by the name of each of its datasets a hash of which pictures it has, and of all else that shapes its
    shards."""

    run: str
    pictures: dict[str, str]
    settings: dict[str, str]


def owner_of(job: Job) -> Owner:
    """The owner that a cache has once a job has made it."""
    data, encoders = job.config.data, dict(job.encoders)
    return Owner(
        job.config.run.name,
        {dataset.name: _hash(picture_settings(dataset)) for dataset in data.datasets},
        {dataset.name: _hash([encoders, plan_settings(data, dataset)]) for dataset in data.datasets},
    )


def _hash(settings: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())


def read_owner(cache: Path) -> Owner | None:
    """None if a cache has none: it is new, or older than owners."""
    try:
        return Owner(**json.loads((cache / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_owner(job: Job) -> None:
    """Make a job's run the owner of its cache, unless the cache is another's and stays as it is."""
    cache, owner = job.config.data.cache_folder, owner_of(job)
    before = read_owner(cache)
    if before is None or replace(before, run=owner.run) != owner:
        cache.mkdir(parents=True, exist_ok=True)
        write_text_atomically(cache / OWNER, json.dumps(asdict(owner), indent=1) + "\n")


def refuse_to_delete(job: Job, plans: Sequence[PlannedShard] | None = None) -> None:
    """Raise InputError that counts the shards and samples which a job's plan would delete, or make of other pictures,
    though they are not its own to.

    plans: None while there is no plan, which takes long: then of the datasets that it cannot name.
    """
    cache, wanted = job.config.data.cache_folder, owner_of(job)
    owner = read_owner(cache)
    lost = []
    for dataset in sorted(path.name for path in (cache / SHARDS).glob("*")):
        if _may_change(dataset, owner, wanted) or (plans is None and dataset in wanted.pictures):
            continue
        shards = _read_indexes(cache, dataset, job.format_version)
        planned = {plan.path: plan for plan in plans or () if plan.dataset == dataset}
        gone = [index for path, index in shards.items() if path not in planned or planned[path].plan != index.plan]
        if gone and not (owner and owner.run == wanted.run and _are_of_same_names(shards.values(), planned.values())):
            samples = sum(index.num_samples for index in gone)
            lost.append(f"dataset {dataset}: {len(gone)} of its {len(shards)} shards, {samples} samples")
    if lost:
        whose = f", which it holds for the run {owner.run}" if owner else ""
        raise InputError(
            f"data.cache {cache}: this config (run {wanted.run}) would delete{whose}:\n  " + "\n  ".join(lost) + "\n"
            "Give this config a data.cache of its own; or, if they may go, run `fluxfill preprocess CONFIG --replace`."
        )


def _may_change(dataset: str, owner: Owner | None, wanted: Owner) -> bool:
    """Whether a job may do with a dataset's shards what its plan says, whichever samples they hold."""
    is_named = dataset in wanted.pictures
    if owner is None:
        return is_named  # nothing tells what they were made from
    if dataset not in owner.pictures:
        return True  # left by a job that was allowed to delete them, and did not come to its end
    if not is_named:  # removed from the config; unless nothing is left of it, which is another one then
        return owner.run == wanted.run and bool(owner.pictures.keys() & wanted.pictures.keys())
    if owner.pictures[dataset] != wanted.pictures[dataset]:
        return False
    return owner.run == wanted.run or owner.settings[dataset] == wanted.settings[dataset]


def _are_of_same_names(shards: Iterable[ShardIndex], planned: Iterable[PlannedShard]) -> bool:
    """Whether half of the stored samples at least are planned, of the same pictures or others: those of a dataset that
    got a source or better masks, not those of another one under its name."""
    names = {sample.key for plan in planned for sample in plan.samples}
    keys = [key for index in shards for key in index.keys]
    return 2 * sum(key in names for key in keys) >= len(keys)


def _read_indexes(cache: Path, dataset: str, format_version: int) -> dict[str, ShardIndex]:
    """Path below the cache -> index, of a dataset's shards that are finished."""
    paths = tars_of(cache, dataset)

    def read(tar: Path) -> ShardIndex | None:
        try:
            return read_index(index_path(tar, format_version))
        except (FileNotFoundError, InputError):
            return None  # not finished, or damaged

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        found = zip(paths, pool.map(read, paths), strict=True)
        return {path.relative_to(cache).as_posix(): index for path, index in found if index is not None}
