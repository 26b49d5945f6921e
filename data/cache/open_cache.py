"""Opening a finished cache: a folder, or a URL whose shards are copied to this node as they are needed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError, list_problems
from configs.schema import Config
from data.cache.manifest import (
    Manifest,
    ShardTable,
    cache_errors_named,
    hash_files,
    read_manifest,
    read_shard_table,
    refuse_other_settings,
)
from data.cache.node_cache import NodeCache
from data.cache.remote_manifest import fetch_manifest
from data.cache.same_pictures import refuse_other_pictures
from data.cache_layout import MANIFEST, SHARD_TABLE

_PARALLEL, _CHUNK = 16, 256  # threads that look at shards, shards that one looks at in a go


@dataclass(frozen=True)
class Cache:
    """A finished cache.  folder: of its manifest.  copies: of a remote cache's shards; None: they are in the folder."""

    folder: Path
    manifest: Manifest
    table: ShardTable
    copies: NodeCache | None = None


def open_cache(config: Config, model: Path, *, check_shards: bool = True) -> Cache:
    """The cache of a config, checked against the model that is to be trained on it, and for its shards to be there.

    Raises InputError that lists every setting and encoder in which they differ, or every shard that is missing or of
    another size, or that names a dataset which lies elsewhere now and has other pictures there (one process of a run is
    enough to look). Shards of a remote cache are checked as they are fetched.
    """
    data = config.data
    if isinstance(data.cache, Path):
        folder = data.cache
    else:
        assert data.local_cache is not None  # the config's own check
        folder = fetch_manifest(data.cache, data.local_cache)
    with cache_errors_named(folder):
        manifest, table = read_manifest(folder), read_shard_table(folder)
    refuse_other_settings(config, model, manifest)
    if hash_files(folder, [SHARD_TABLE])[SHARD_TABLE] != manifest.files.get(SHARD_TABLE):
        raise InputError(
            f"{folder / SHARD_TABLE}: not the one that {MANIFEST} beside it was written with. Run `fluxfill preprocess "
            "CONFIG` again; whole shards are kept."
        )
    if not isinstance(data.cache, Path):
        assert data.local_cache is not None
        if check_shards:
            refuse_other_pictures(config, None, manifest, table)
        limit = int(data.local_cache_gib * 2**30)
        copies = NodeCache(data.cache, data.local_cache, limit, table, manifest.format_version)
        return Cache(folder, manifest, table, copies)
    if check_shards:
        with cache_errors_named(folder):
            _refuse_missing_shards(folder, table)
        refuse_other_pictures(config, folder, manifest, table)
    return Cache(folder, manifest, table)


def _refuse_missing_shards(folder: Path, table: ShardTable) -> None:
    def look(first: int) -> list[str]:
        chunk = slice(first, first + _CHUNK)
        return [
            f"{folder / path}: missing"
            if found is None
            else f"{folder / path}: {found} bytes, the manifest says {size}"
            for path, size in zip(table.path[chunk].tolist(), table.bytes[chunk].tolist(), strict=True)
            if (found := _size_of(folder / path)) != size
        ]

    with ThreadPoolExecutor(_PARALLEL) as pool:  # a network filesystem answers many questions in the time of one
        damaged = [problem for problems in pool.map(look, range(0, len(table), _CHUNK)) for problem in problems]
    if damaged:
        raise InputError(
            list_problems(damaged)
            + "\nRestore them, or run `fluxfill preprocess CONFIG` again: only those are encoded again."
        )


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
