"""Verification of a cache: its manifest, the files beside its shards, and every shard. Changes nothing."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import InputError
from data.cache.manifest import (
    Manifest,
    ShardTable,
    cache_errors_named,
    hash_files,
    read_format,
    read_manifest,
    read_shard_table,
)
from data.cache.members import sample_tensors
from data.cache_layout import INDEX, MANIFEST, SHARD_TABLE, SHARDS, index_path
from data.samples.geometry import Bucket
from data.verify.shard import CheckedShard, ExpectedShard, IntactTar, check_shard
from data.verify.tar import Problem


@dataclass(frozen=True)
class CheckedCache:
    """Outcome of `verify_cache`.

    problems: in the order of the files' names; none if the cache is intact.  table: the list of shards, or None if
    there is none that can be trusted.  rebuildable: intact tars of damaged or lost indexes.  bad: all other files that
    are not as they were written, below the cache folder.  format_version: of the cache.
    """

    problems: list[Problem]
    table: ShardTable | None
    rebuildable: list[IntactTar]
    bad: list[str]
    format_version: int


def refuse_no_cache(folder: Path) -> None:
    """Raise InputError if a folder holds no cache at all, or may not be looked into."""
    with cache_errors_named(folder):
        is_there = any((folder / name).exists() for name in (MANIFEST, SHARD_TABLE, SHARDS))
    if not is_there:
        raise InputError(f"{folder}: no cache is there. Give the folder that `fluxfill preprocess CONFIG` wrote.")


def verify_cache(
    cache: Path,
    *,
    threads: int,
    start: Callable[[int], None],
    advance: Callable[[int], None],
    only: Collection[str] | None = None,
) -> CheckedCache:
    """Read all of a cache, `threads` shards at once (hashing and reading release Python's lock).

    start: told the bytes that will be read.  advance: told the bytes of each stretch, from many threads.
    only: shards to read, below the cache folder, beside the manifest; None: all of them.
    Raises InputError if the folder holds no cache at all.
    """
    refuse_no_cache(cache)
    with cache_errors_named(cache):
        manifest, table, problems = _check_head(cache)
    format_version = read_format(cache)
    if table is None:  # every shard that is there is judged by its own index
        expected = [ExpectedShard(path, format_version) for path in _files_below(cache, ".tar")]
    else:
        expected = _expected_shards(manifest, table, format_version)
        problems += _find_strays(cache, expected)
    if only is not None:
        expected = [shard for shard in expected if shard.path in only]
    start(sum(_size_of(cache / shard.path) for shard in expected))
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        checked = list(pool.map(lambda shard: check_shard(cache, shard, advance), expected))
    if manifest is not None and table is not None and only is None:
        problems += _check_hole_fractions(manifest, table, checked)
    bad = {problem.path for problem in problems}
    rebuildable = []
    for shard, found in zip(expected, checked, strict=True):
        problems += found.problems
        if found.problems and found.intact is not None:
            rebuildable.append(found.intact)
        elif found.problems:
            bad.add(shard.path)
    problems.sort(key=lambda problem: problem.path)
    return CheckedCache(problems, table, rebuildable, sorted(bad), format_version)


def _check_head(cache: Path) -> tuple[Manifest | None, ShardTable | None, list[Problem]]:
    """Manifest and table as far as they can be trusted, and the problems of them and of the files beside."""
    problems = []
    if not (cache / MANIFEST).is_file():
        what = "missing: preprocessing was interrupted, or is still at work; run it again, finished shards are kept"
        # A table without a manifest may be of what the cache was before: preprocessing removes the manifest first.
        return None, None, [Problem(MANIFEST, "", what)]
    manifest, table = None, None
    try:
        manifest = read_manifest(cache)
    except InputError as error:
        problems.append(Problem(MANIFEST, "", _reason(error, cache / MANIFEST)))
    try:
        table = read_shard_table(cache)
    except InputError as error:
        problems.append(Problem(SHARD_TABLE, "", _reason(error, cache / SHARD_TABLE)))
    if manifest is not None:
        found = hash_files(cache, manifest.files)
        problems += [
            Problem(path, "", "differs from what was written" if found[path] else "missing or unreadable")
            for path, written in manifest.files.items()
            if found[path] != written and not (path == SHARD_TABLE and table is None)
        ]
    if manifest is not None and table is not None:
        problems += _compare_counts(manifest, table)
    return manifest, table, problems


def _compare_counts(manifest: Manifest, table: ShardTable) -> list[Problem]:
    """The manifest's samples against those of the table's shards."""
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(splits, 0) for name, splits in manifest.samples.items()}
    for dataset, split, samples in zip(table.dataset.tolist(), table.split.tolist(), table.samples, strict=True):
        of_dataset = counts.setdefault(dataset, {})
        of_dataset[split] = of_dataset.get(split, 0) + int(samples)
    if counts == manifest.samples:
        return []
    return [Problem(SHARD_TABLE, "", f"lists samples {counts}, the manifest {manifest.samples}")]


def _check_hole_fractions(manifest: Manifest, table: ShardTable, checked: Sequence[CheckedShard]) -> list[Problem]:
    """The manifest's histograms against the shards' indexes, where all of them can be read. checked: in the table's
    order."""
    counts = {name: np.zeros(len(of_dataset), dtype=np.int64) for name, of_dataset in manifest.hole_fractions.items()}
    for dataset, shard in zip(table.dataset.tolist(), checked, strict=True):
        if shard.hole_fractions is None:
            return []
        counts[dataset] = counts.get(dataset, 0) + np.array(shard.hole_fractions)
    found = {name: of_dataset.tolist() for name, of_dataset in counts.items()}
    if found == manifest.hole_fractions:
        return []
    what = f"counts hole fractions {manifest.hole_fractions}, the shards hold {found}"
    return [Problem(MANIFEST, "", what)]


def _expected_shards(manifest: Manifest | None, table: ShardTable, format_version: int) -> list[ExpectedShard]:
    """Every shard as manifest and table describe it."""
    tensors = {}
    if manifest is not None:
        tensors = {name: sample_tensors(Bucket.parse(name), manifest) for name in np.unique(table.bucket).tolist()}
    variants = manifest.mask_variants if manifest is not None else {}
    return [
        ExpectedShard(path, format_version, sha256, size, samples, variants.get(dataset), plan, tensors.get(bucket))
        for path, sha256, size, samples, dataset, plan, bucket in zip(
            table.path.tolist(),
            table.sha256.tolist(),
            table.bytes.tolist(),
            table.samples.tolist(),
            table.dataset.tolist(),
            table.plan.tolist(),
            table.bucket.tolist(),
            strict=True,
        )
    ]


def _find_strays(cache: Path, shards: Sequence[ExpectedShard]) -> list[Problem]:
    """Files among the shards and indexes of a finished cache that its table does not list."""
    listed = {shard.path for shard in shards}
    listed |= {index_path(Path(shard.path), shard.format_version).as_posix() for shard in shards}
    found = _files_below(cache, ".tar", ".index", ".part")
    return [Problem(path, "", f"not listed in {SHARD_TABLE}") for path in found if path not in listed]


def _files_below(cache: Path, *suffixes: str) -> list[str]:
    below = [path for folder in (SHARDS, INDEX) for path in (cache / folder).rglob("*")]
    files = (path for path in below if path.suffix in suffixes and path.is_file())
    return sorted(path.relative_to(cache).as_posix() for path in files)


def _reason(error: InputError, path: Path) -> str:
    """An error's problem, without the place (it has a column) and the advice (for those who cannot repair)."""
    return str(error).removeprefix(f"{path}: ").partition(". ")[0]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
