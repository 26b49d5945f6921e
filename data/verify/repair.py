"""Repair of what `verify` found: bad files are moved aside, never deleted; lost indexes rebuilt from intact tars.

Preprocessing makes what is missing then: a shard is a function of its pictures, so its bytes are as before. So nothing
is moved until that can be planned: most samples of a bad shard are good, and are read until it is replaced.
"""

import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.errors import InputError
from configs.schema import Config
from data.cache.manifest import ShardTable, read_manifest, read_shard_table, refuse_other_settings
from data.cache.shard_index import rebuild_index
from data.cache_layout import CREW, QUARANTINE, QUARANTINE_LIST, index_path
from data.encoders.model_folder import encoder_fingerprints, find_model
from data.preprocessing.job import Job
from data.preprocessing.progress import open_progress
from data.preprocessing.run import make_own_plan, preprocess
from data.preprocessing.worker import Worker
from data.preprocessing.worker_group import join
from data.storage.atomic_write import fsync_folder
from data.verify.cache import CheckedCache, refuse_no_cache
from data.verify.shard import IntactTar
from data.verify.tar import Problem

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


def refuse_other_config(config: Config, cache: Path) -> None:
    """Raise InputError if a config is not that of a cache: repaired by it, all of the cache would be encoded again."""
    if config.data.cache_folder.resolve() != cache.resolve():
        raise InputError(f"--repair: data.cache is {config.data.cache}, not {cache}. Give the config of this cache.")
    model = find_model(config.model.base)
    try:
        manifest = read_manifest(cache)
    except (InputError, PermissionError):
        return  # missing or damaged: nothing tells; or not to be read, which the check says, before anything is moved
    refuse_other_settings(config, model, manifest)


def repair_cache(config: Config, check: Callable[[], CheckedCache], console: Console) -> tuple[CheckedCache, list[str]]:
    """Mend what `check` finds in data.cache. Returns that, and the shards that came out with other bytes than the cache
    listed (encoded on another device, say): they are as good, and the cache lists them as they are now.

    check: `verify_cache` of all of the cache.
    Bad files go to <cache>/quarantine/<time>/ and a line each into quarantine.jsonl. Killed at any moment it leaves a
    cache that `verify` judges rightly and preprocessing completes. Raises InputError for what the user can mend, before
    any shard is moved if planning finds it; `console` is told what was moved, and whether it is made again.
    """
    cache = config.data.cache_folder
    refuse_no_cache(cache)
    # From before the check on: what a job writes while it runs, an hour perhaps, would be taken for bad.
    with join(cache / CREW, {"work": "repair"}) as group:
        if other := next(iter(group.others()), None):
            raise InputError(f"data.cache {cache}: {other} is at work in it. Wait for it or stop it.")
        checked = check()

        def index_of(tar: str) -> str:
            return index_path(Path(tar), checked.format_version).as_posix()

        for intact in checked.rebuildable:
            index = index_of(intact.path)
            _quarantine(cache, [index], [problem for problem in checked.problems if problem.path == index], console)
            _rebuild(cache, intact, index)
        if checked.bad:
            _refuse_if_not_planned(config, console)
            # An index after its tar: preprocessing would write over a tar that has no index, but not take an index
            # without one.
            paths = [
                each for path in checked.bad for each in ((path, index_of(path)) if path.endswith(".tar") else (path,))
            ]
            bad = set(checked.bad)
            _quarantine(cache, paths, [problem for problem in checked.problems if problem.path in bad], console)
    if not checked.bad:
        return checked, []
    try:
        preprocess(config, console)
    except InputError:
        console.print(
            "Not all that was bad is made again: see below. The same command makes what is missing.", **_PLAIN
        )
        raise
    if checked.table is None:
        return checked, []
    now = dict(zip(*_paths_and_hashes(read_shard_table(cache)), strict=True))
    before = zip(*_paths_and_hashes(checked.table), strict=True)
    return checked, [path for path, sha256 in before if path in checked.bad and now.get(path) != sha256]


def _refuse_if_not_planned(config: Config, console: Console) -> None:
    """Raise InputError if the cache could not be made again: its pictures are elsewhere, say, or wrong by now."""
    model = find_model(config.model.base)
    try:
        with open_progress(console, Worker()) as progress:
            make_own_plan(Job(config, model, encoder_fingerprints(model)), progress)
    except InputError:
        console.print("No shard was moved: what is bad could not be made again, for what is said below.", **_PLAIN)
        raise


def _paths_and_hashes(table: ShardTable) -> tuple[list[str], list[str]]:
    return table.path.tolist(), table.sha256.tolist()


def _rebuild(cache: Path, intact: IntactTar, index: str) -> None:
    rebuild_index(cache / intact.path, cache / index, plan=intact.plan, sha256=intact.sha256)
    if not (cache / index).is_file():
        raise InputError(f"{cache / index}: cannot be written. Make room on the disk, or change its permissions.")


def _quarantine(cache: Path, paths: Sequence[str], problems: Sequence[Problem], console: Console) -> None:
    now = datetime.now(UTC)
    folder = f"{QUARANTINE}/{now:%Y%m%d-%H%M%S-%f}"
    lines = [
        json.dumps(
            {
                "when": now.isoformat(timespec="seconds"),
                "shard": problem.path,
                "member": problem.member,
                "why": problem.what,
                "moved_to": f"{folder}/{problem.path}" if (cache / problem.path).exists() else None,
            },
            ensure_ascii=False,
        )
        for problem in problems
    ]
    # Said before it is done: killed in between, the files are in their place and the next repair says it again.
    with (cache / QUARANTINE_LIST).open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    for path in paths:
        _move(cache, path, folder)
    if (cache / folder).exists():
        console.print(f"What was bad lies in {cache / folder} now; {cache / QUARANTINE_LIST} says why.", **_PLAIN)


def _move(cache: Path, path: str, folder: str) -> None:
    """Rename a file, if it is there, into a folder of the same filesystem."""
    if not (cache / path).exists():
        return
    to = cache / folder / path
    to.parent.mkdir(parents=True, exist_ok=True)
    (cache / path).rename(to)
    fsync_folder(to.parent)
    fsync_folder((cache / path).parent)
