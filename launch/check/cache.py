"""The cache: finished and of this config, begun, another run's, or still to be made."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from configs.errors import InputError
from configs.schema import Config
from configs.urls import shown
from data.cache_layout import MANIFEST
from data.samples.plan import PlannedSample
from launch.check.model import Model
from launch.check.result import Check, error_of, ok
from launch.check.situation import Situation


def has_finished_cache(config: Config) -> bool:
    """Whether a run could be given the cache as it is; of one at a URL only opening it tells."""
    cache = config.data.cache
    return not isinstance(cache, Path) or (cache / MANIFEST).is_file()


class CacheState(NamedTuple):
    """can_be_read: training can take it as it is.  bytes_to_encode: about what is still to be written to it."""

    can_be_read: bool
    bytes_to_encode: int


def check_cache(
    situation: Situation, model: Model, samples: Sequence[PlannedSample] | None
) -> tuple[CacheState, list[Check]]:
    """The cache, and what is to be said of it.

    samples: as planned of the pictures; None where they are not here, or not right.
    """
    config, data = situation.config, situation.config.data
    if data.mode == "online":
        what = f"data.mode online encodes while training; {data.cache} keeps what the scan found out"
        return CacheState(False, 0), [ok("cache", what)]
    is_finished = has_finished_cache(config)
    can_be_read, to_encode, checks = False, 0, []
    if is_finished:
        try:
            checks.append(ok("cache", _open(config, model.folder)))
            can_be_read = True
        except InputError as error:
            checks.append(error_of("cache", error))
    elif data.preprocess == "never":
        cure = f"Run `fluxfill preprocess {situation.config_path}` first, or set data.preprocess=auto."
        what = f"{data.cache}: not finished, and data.preprocess is never"
        return CacheState(False, 0), [Check("cache", "error", what, cure)]
    if isinstance(data.cache, Path) and samples is not None:
        to_encode, compared = _compare_with_pictures(situation, model, samples)
        checks += compared
    elif not is_finished:
        checks.append(ok("cache", f"{data.cache} is to be made"))
    return CacheState(can_be_read, to_encode), checks


def _open(config: Config, model: Path) -> str:
    """What a finished cache holds. Raises InputError if it cannot be trained on by this config and model: settings,
    encoders, shards that are missing or of another size. Of one at a URL the manifest alone is fetched, and dropped."""
    from data.cache.open_cache import open_cache

    with contextlib.ExitStack() as stack:
        if not isinstance(config.data.cache, Path):
            place = Path(stack.enter_context(TemporaryDirectory(prefix="fluxfill-check-")))
            config = config.model_copy(update={"data": config.data.model_copy(update={"local_cache": place})})
        table = open_cache(config, model).table
    size = int(table.bytes.sum()) / 2**30
    samples, shards = int(table.samples.sum()), len(table)
    return f"{shown(str(config.data.cache))}: {samples} samples in {shards} shards, {size:.2f} GiB, by these encoders"


def _compare_with_pictures(
    situation: Situation, model: Model, samples: Sequence[PlannedSample]
) -> tuple[int, list[Check]]:
    """(bytes of the shards that are still to be encoded, what is to be said of them, and of those of another run that
    would have to go first)."""
    from data.encoders.model_folder import encoder_fingerprints
    from data.preprocessing.job import Job
    from data.preprocessing.owner import refuse_to_delete
    from data.preprocessing.shard_queue import read_finished_of
    from data.samples.shard_plan import plan_shards

    config, data = situation.config, situation.config.data
    try:
        job = Job(config, model.folder, encoder_fingerprints(model.folder))
        plans = plan_shards(
            samples,
            size_limit=data.shard_size_mib << 20,
            text_bytes=job.text_bytes,
            encoding=job.encoding,
            format_version=job.format_version,
        )
        refuse_to_delete(job, plans)
    except InputError as error:
        return 0, [error_of("cache", error)]
    finished = read_finished_of(data.cache_folder, plans)
    todo = [plan for plan, shard in zip(plans, finished, strict=True) if shard is None]
    if not todo:
        return 0, []
    size, count = sum(plan.num_bytes for plan in todo), sum(plan.num_samples for plan in todo)
    of_all = f"{count} samples in {len(todo)} of {len(plans)} shards"
    what = f"{data.cache}: {of_all} are to be encoded, {size / 2**20:,.1f} MiB"
    if data.preprocess == "never":
        cure = f"Run `fluxfill preprocess {situation.config_path}` to train on the pictures as they are now."
        return 0, [Check("cache", "warning", what, cure)]
    return size, [ok("cache", what)]
