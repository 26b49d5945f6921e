"""Encode once: pictures, masks and captions -> a cache folder of shards.

data/cache/shard_writer.py says what a shard holds.

The plan comes first and is a pure function of the pictures, so an interrupted job goes on where it stopped: a shard
with an index is whole, one made from other pictures is made anew, one no longer planned is deleted. manifest.json comes
last and goes first: a cache that has it is complete.

Any number of processes do it together, started in any way and at any time: each takes shards that nobody has, one
completes the cache when all are there, and all of them end when it is complete.

    fluxfill preprocess CONFIG.yaml [key=value ...] [--worker I --workers N] [--dry-run]
    accelerate launch data/preprocess.py --config CONFIG.yaml [key=value ...]
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from itertools import chain
from pathlib import Path

from configs.library_warnings import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()

from rich.console import Console
from rich.progress import Progress

from configs.cache_settings import tensor_settings, worker_settings
from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config
from configs.supervision import BAD_INPUT
from data.cache.build_manifest import delete_unplanned, describe_cache, is_current
from data.cache.dropout_tensors import dropout_tensors_are_current, write_dropout_tensors
from data.cache.manifest import FORMAT_VERSION, read_shard_table, write_manifest
from data.cache.validation_items import (
    ValidationItem,
    choose_validation_items,
    num_watched,
    write_validation_items,
)
from data.cache_layout import CREW, MANIFEST
from data.encoders.load import Encoders, load_encoders
from data.encoders.model_folder import encoder_fingerprints, find_model, read_part_number
from data.encoders.stored_text import text_bytes
from data.preprocessing.dry_run import bytes_by_part, measure, print_bytes, print_counts, print_hours
from data.preprocessing.encode_shards import Turn, encode_shards
from data.preprocessing.plan_file import PlanFile
from data.preprocessing.progress import Waiting, advancing, open_progress, print_report
from data.preprocessing.shard_queue import SHARD_CLAIMS, ShardQueue, read_finished_of
from data.preprocessing.share_plan import agree_on_plan
from data.preprocessing.worker import Worker, which_worker
from data.preprocessing.worker_group import WorkerGroup, join
from data.samples.decode import DecodedBatch, decode_batches
from data.samples.geometry import Pixels
from data.samples.plan import plan_samples
from data.samples.shard_plan import PlannedShard, plan_shards
from data.sources.download_cache import delete_copies
from data.sources.problems import Findings, ProblemsFound, print_problems
from data.sources.scan import scan_dataset
from data.storage.disk_full import DiskFull, raise_disk_full

_CONSTANTS, _HEAD = "constants", "head"  # what can be claimed, besides shards

_ALONE = Worker()


@dataclass(frozen=True)
class Job:
    """What is to be encoded, by which model.  encoders: part -> fingerprint."""

    config: Config
    model: Path
    encoders: dict[str, str]

    @property
    def encoding(self) -> dict[str, object]:
        """What shapes the tensors besides the pictures and captions."""
        return {"encoders": dict(self.encoders), **tensor_settings(self.config.data)}

    @property
    def settings(self) -> dict[str, object]:
        """What workers on one cache must agree in: all that shapes the plan."""
        encoders = {f"model's {part}": print for part, print in self.encoders.items()}
        return {"format": FORMAT_VERSION, **encoders, **worker_settings(self.config.data)}

    @property
    def text_bytes(self) -> int:
        """Of one caption's tensors."""
        t5_width = int(read_part_number(self.model, "text_encoder_2", "d_model"))
        captions = self.config.data.captions
        return text_bytes(captions.text_length, t5_width, captions.text_dtype)


def preprocess(config: Config, console: Console, worker: Worker = _ALONE) -> None:
    """Bring data.cache up to date with the datasets, model and settings of a config, together with whoever else does;
    touch nothing if it is. Returns when the cache is complete.

    Raises InputError for whatever the user can mend, and Evicted: shards finished by then stay, parts of one do
    not.
    """
    cache = config.data.cache_folder
    model = find_model(config.model.base)
    job = Job(config, model, encoder_fingerprints(model))
    try:
        with (
            raise_disk_full(cache),
            join(cache / CREW, job.settings) as group,
            open_progress(console, worker) as progress,
        ):
            try:
                num_encoded = _take_part(job, group, worker, progress)
            except FileNotFoundError:
                group.touch()  # which tells if others took what it had half written for a dead worker's
                raise
    finally:
        with suppress(OSError):
            cache.rmdir()  # if nothing came of it
    print_report(console, cache, read_shard_table(cache), worker, num_encoded=num_encoded)


def _take_part(job: Job, group: WorkerGroup, worker: Worker, progress: Progress) -> int:
    """Plan, encode and complete, with whoever else does; how many samples were encoded here."""
    cache = job.config.data.cache_folder
    before, waiting = manifest_stamp(cache), Waiting(progress)
    plan = agree_on_plan(
        group,
        partial(make_plan, job, progress),
        help_planning=partial(_scan, job, progress),
        waiting=waiting,
    )
    backlog = ShardQueue(cache, plan, group, worker)
    backlog.advance = advancing(progress, progress.add_task("encoding", total=backlog.num_samples))
    load = once(partial(load_encoders, job.model, job.config.data.encoders, device_index=worker.device_index))
    try:
        encode_what_is_left(job, plan, backlog, group, load, waiting, threads=worker.decode_threads)
    except DiskFull as error:
        if not backlog.remaining:  # a constant did not fit
            raise
        raise error.with_needed(sum(head.num_bytes for head in backlog.remaining.values())) from error
    complete(job, plan, group, worker, progress, waiting, before=before)
    return backlog.num_encoded


def dry_run(config: Config, console: Console, worker: Worker = _ALONE) -> None:
    """Print what `preprocess` would do: pictures and shards by dataset, bucket and split, bytes by part, and hours,
    measured on a batch of each size. Writes no shard and claims none.

    Raises InputError as `preprocess` does.
    """
    data = config.data
    model = find_model(config.model.base)
    job = Job(config, model, encoder_fingerprints(model))
    with raise_disk_full(data.cache_folder), open_progress(console, worker) as progress:
        plans = make_plan(job, progress)
    finished = read_finished_of(data.cache_folder, plans)
    todo = [plan for plan, index in zip(plans, finished, strict=True) if index is None]
    print_counts(console, data.cache_folder, plans, todo)
    print_bytes(console, bytes_by_part(plans, text_bytes=job.text_bytes))
    if todo:
        encoders = load_encoders(model, data.encoders, device_index=worker.device_index)
        print_hours(console, measure(todo, encoders, data, worker, console), worker)


def _scan(job: Job, progress: Progress) -> None:
    """Read the pictures that nobody has read yet; what is found is kept in the cache, for the one who plans."""
    bar = progress.add_task("reading pictures", total=None)
    for dataset in job.config.data.datasets:
        scan_dataset(dataset, job.config.data, partial(progress.advance, bar), Findings())


def make_plan(job: Job, progress: Progress) -> list[PlannedShard]:
    """Every shard of a job's cache: a function of the pictures and the settings. Raises InputError as `plan_samples`
    does."""
    return plan_shards(
        plan_samples(job.config, progress),
        size_limit=job.config.data.shard_size_mib << 20,
        text_bytes=job.text_bytes,
        encoding=job.encoding,
        format_version=FORMAT_VERSION,
    )


def encode_what_is_left(
    job: Job,
    plan: PlanFile,
    backlog: ShardQueue,
    group: WorkerGroup,
    load: Callable[[], Encoders],
    waiting: Callable[[str], object],
    *,
    threads: int,
    turn: Turn = nullcontext,
) -> None:
    """Take part until every shard is there, and the constants. Waits for what others have in work: they may die.

    load: gives the encoders, once there is something to encode: T5 takes a minute.  waiting: waits a moment, told for
    whom.  threads: that decode.  turn: entered for each batch that is encoded.
    Raises one InputError that lists all pictures at fault, once every shard without one is written.
    """
    data = job.config.data
    buckets = sorted({head.bucket for head in plan.heads})
    while True:
        constants = dropout_tensors_are_current(data.cache_folder, buckets, job.encoding)
        if not constants and group.claim(_CONSTANTS):
            encoders = load()
            group.require_claim(_CONSTANTS)
            (data.cache_folder / MANIFEST).unlink(missing_ok=True)
            still_mine = partial(group.require_claim, _CONSTANTS)
            write_dropout_tensors(
                data.cache_folder, encoders, buckets, job.encoding, data.captions, still_mine, turn=turn
            )
            group.release(_CONSTANTS)
            constants = True
        shards = backlog.claim_shards()
        if first := next(shards, None):
            claimed = chain([first], shards)
            encode_shards(data.cache_folder, claimed, backlog, load(), data, threads=threads, turn=turn)
        elif constants and not backlog.remaining:
            break
        else:
            waiting(backlog.waiting_for())
    backlog.raise_problems()


def complete(
    job: Job,
    plan: PlanFile,
    group: WorkerGroup,
    worker: Worker,
    progress: Progress,
    waiting: Callable[[str], object],
    *,
    before: tuple[int, int] | None,
) -> None:
    """Give the cache its head when everything else is there: one worker does, the others wait for it.

    before: the manifest's stamp when this worker came; another one now is by this group.
    """
    cache = job.config.data.cache_folder
    while manifest_stamp(cache) in (None, before):
        # Who is still at a shard took it for unfinished: it will see that it is not, or write the same bytes again.
        if group.claim(_HEAD):
            if not group.held(SHARD_CLAIMS):
                return _write_head(job, plan, group, worker, progress)
            group.release(_HEAD)
        waiting(f"{group.holder(_HEAD) or 'another worker'}, which completes the cache")


def manifest_stamp(cache: Path) -> tuple[int, int] | None:
    """What tells one manifest from another; None if there is none."""
    try:
        status = (cache / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


def _write_head(job: Job, plan: PlanFile, group: WorkerGroup, worker: Worker, progress: Progress) -> None:
    cache, config = job.config.data.cache_folder, job.config
    found = read_finished_of(cache, plan.heads)
    shards = [shard for shard in found if shard is not None]
    if len(shards) < len(found):
        gone = [head.path for head, shard in zip(plan.heads, found, strict=True) if shard is None]
        others = f", and so are {len(gone) - 1} other shards" if len(gone) > 1 else ""
        raise InputError(
            f"{cache / gone[0]}: was written and is gone, or is another now{others}. See that nothing else changes the "
            "cache, then run the same command again: it makes what is missing."
        )
    head = describe_cache(config, job.model, job.encoders, plan.heads, shards)
    if is_current(cache, *head):
        return delete_copies(cache)
    group.require_claim(_HEAD)
    (cache / MANIFEST).unlink(missing_ok=True)
    delete_unplanned(cache, plan.heads)
    chosen = choose_validation_items(plan.shards(), count=num_watched(config.data.holdout))
    bar = progress.add_task("validation pictures", total=len(chosen))
    with ThreadPoolExecutor(worker.decode_threads) as pool:
        singly = ((item, [sample]) for item, sample in chosen)
        decoded = decode_batches(singly, config.data, pool, ahead=2 * worker.decode_threads)
        pixels = map(_only_pixels, decoded)
        write_validation_items(cache, pixels, lambda: progress.advance(bar), partial(group.require_claim, _HEAD))
    write_manifest(cache, *head)
    delete_copies(cache)


def _only_pixels(decoded: DecodedBatch[ValidationItem]) -> tuple[ValidationItem, Pixels]:
    """An item with its picture, behind the first of its masks. Raises InputError if it cannot be decoded."""
    if decoded.problems:
        raise InputError(decoded.problems[0])
    return decoded.tag, decoded.pixels[0][0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `accelerate launch data/preprocess.py`; returns the exit code."""
    parser = argparse.ArgumentParser(description="Encode the datasets of a config into its cache.")
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--worker", type=int, help="this worker, from 0; with --workers")
    parser.add_argument("--workers", type=int, help="how many there are")
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, how large and how long")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.resolution=[512]")
    options = parser.parse_args(arguments)
    try:
        worker = which_worker(os.environ, worker=options.worker, workers=options.workers)
        run = dry_run if options.dry_run else preprocess
        run(load_config(options.config, options.overrides), Console(), worker)
    except ProblemsFound as error:
        title = f"{len(error.problems)} problems" if len(error.problems) > 1 else "1 problem"
        print_problems(Console(stderr=True), error.problems, title=title, listed_in=error.listed_in)
        return BAD_INPUT
    except InputError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
