"""A worker's way through a job: agree on the plan, encode shards that nobody has, complete the cache.

The plan is a pure function of the pictures, so an interrupted job goes on where it stopped: a shard with an index is
finished, one made of other pictures is made again, one no longer planned is deleted. manifest.json comes last and goes
first: a cache that has it is complete.

Any number of processes do it together, started in any way and at any time: each takes shards that nobody has, one
completes the cache when all are there, and all of them end when it is complete.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache as once
from functools import partial
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from configs.errors import InputError
from configs.schema import Config
from data.cache.build_manifest import delete_unplanned, describe_cache, is_current
from data.cache.dropout_tensors import dropout_tensors_are_current, write_dropout_tensors
from data.cache.manifest import read_shard_table, write_manifest
from data.cache.validation_items import (
    ValidationItem,
    choose_validation_items,
    num_watched,
    write_validation_items,
)
from data.cache_layout import CREW, MANIFEST
from data.encoders.load import Encoders, load_encoders
from data.encoders.model_folder import encoder_fingerprints, find_model
from data.preprocessing.dry_run import bytes_by_part, measure, print_bytes, print_counts, print_hours
from data.preprocessing.encode_shards import encode_shards
from data.preprocessing.job import Job, make_plan
from data.preprocessing.owner import refuse_to_delete, write_owner
from data.preprocessing.plan_file import PlanFile
from data.preprocessing.progress import Waiting, advancing, open_progress, print_report
from data.preprocessing.shard_queue import SHARD_CLAIMS, ShardQueue, read_finished_of
from data.preprocessing.share_plan import agree_on_plan
from data.preprocessing.worker import Worker
from data.preprocessing.worker_group import WorkerGroup, join
from data.samples.decode import DecodedBatch, decode_batches
from data.samples.geometry import Pixels
from data.samples.shard_plan import PlannedShard
from data.sources.download_cache import delete_copies
from data.sources.problems import Findings
from data.sources.scan import scan_dataset
from data.storage.disk_full import FINISHED_IS_KEPT, DiskFull, raise_disk_full

_DROPOUT_TENSORS, _MANIFEST = "constants", "head"  # what can be claimed, besides shards

_ALONE = Worker()


def preprocess(
    config: Config, console: Console, worker: Worker = _ALONE, *, thorough: bool = False, replace: bool = False
) -> None:
    """Bring data.cache up to date with the datasets, model and settings of a config, together with other workers;
    touch nothing if it is. Returns when the cache is complete.

    thorough: decode every picture in full before any is encoded.  replace: delete what the cache holds for another run,
    where it is in the way.
    Raises InputError for whatever the user can mend, and Evicted: shards finished by then stay, parts of one do
    not.
    """
    cache = config.data.cache_folder
    model = find_model(config.model.base)
    job = Job(config, model, encoder_fingerprints(model), thorough, replace)
    try:
        with (
            raise_disk_full(cache, kept=FINISHED_IS_KEPT),
            join(cache / CREW, job.settings) as group,
            open_progress(console, worker) as progress,
        ):
            try:
                num_encoded = _take_part(job, group, worker, progress)
            except FileNotFoundError:
                group.touch()  # raises Evicted if others deleted what this worker had half written
                raise
    finally:
        with suppress(OSError):
            cache.rmdir()  # if nothing came of it
    print_report(console, cache, read_shard_table(cache), worker, num_encoded=num_encoded)


def _take_part(job: Job, group: WorkerGroup, worker: Worker, progress: Progress) -> int:
    """Plan, encode and complete, with other workers. Returns how many samples were encoded here."""
    cache = job.config.data.cache_folder
    before, waiting = _manifest_stamp(cache), Waiting(progress)
    plan = agree_on_plan(
        group,
        partial(_plan, job, progress),
        help_planning=partial(_scan, job, progress),
        waiting=waiting,
    )
    queue = ShardQueue(cache, plan, group, worker)
    queue.advance = advancing(progress, progress.add_task("encoding", total=queue.num_samples))
    try:
        encode_what_is_left(job, plan, queue, group, worker, waiting)
    except DiskFull as error:
        if not queue.remaining:  # a dropout tensor did not fit
            raise
        raise error.with_needed(sum(spec.num_bytes for spec in queue.remaining.values())) from error
    complete(job, plan, group, worker, progress, waiting, before=before)
    return queue.num_encoded


def _plan(job: Job, progress: Progress) -> list[PlannedShard]:
    """The plan of a job, whose run owns the cache from now on."""
    plans = make_own_plan(job, progress)
    write_owner(job)
    return plans


def make_own_plan(job: Job, progress: Progress) -> list[PlannedShard]:
    """The plan of a job. Raises InputError if it would delete what the cache holds for another run."""
    if not job.replace:
        refuse_to_delete(job)
    plans = make_plan(job, progress)
    if not job.replace:
        refuse_to_delete(job, plans)
    return plans


def _scan(job: Job, progress: Progress) -> None:
    """Scan the pictures that no worker has scanned yet; results are kept in the cache, for the one that plans."""
    bar = progress.add_task("reading pictures", total=None)
    for dataset in job.config.data.datasets:
        scan_dataset(dataset, job.config.data, partial(progress.advance, bar), Findings(), thorough=job.thorough)


def encode_what_is_left(
    job: Job,
    plan: PlanFile,
    queue: ShardQueue,
    group: WorkerGroup,
    worker: Worker,
    waiting: Callable[[str], object],
) -> None:
    """Encode until every shard is there, and the dropout tensors. Waits for what others have in work: they may die.

    waiting: waits a moment; its argument says for whom.
    Raises one InputError that lists all pictures at fault, once every shard without one is written.
    """
    data = job.config.data
    buckets = sorted({spec.bucket for spec in plan.specs})

    @once
    def load() -> Encoders:  # only if there is something to encode: T5 takes a minute
        return load_encoders(job.model, data.encoders, device_index=worker.device_index)

    while True:
        has_dropout_tensors = dropout_tensors_are_current(data.cache_folder, buckets, job.encoding)
        if not has_dropout_tensors and group.claim(_DROPOUT_TENSORS):
            encoders = load()
            group.require_claim(_DROPOUT_TENSORS)
            (data.cache_folder / MANIFEST).unlink(missing_ok=True)
            still_mine = partial(group.require_claim, _DROPOUT_TENSORS)
            write_dropout_tensors(data.cache_folder, encoders, buckets, job.encoding, data.captions, still_mine)
            group.release(_DROPOUT_TENSORS)
            has_dropout_tensors = True
        shards = queue.claim_shards()
        if first := next(shards, None):
            claimed = chain([first], shards)
            encode_shards(data.cache_folder, claimed, queue, load(), data, threads=worker.decode_threads)
        elif has_dropout_tensors and not queue.remaining:
            break
        else:
            waiting(queue.waiting_for())
    queue.raise_problems()


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
    """Write the manifest when everything else is there: one worker does, the others wait for it.

    before: the manifest's stamp when this worker came; another one now is by this group.
    """
    cache = job.config.data.cache_folder
    while _manifest_stamp(cache) in (None, before):
        # Who is still at a shard took it for unfinished: it will see that it is not, or write the same bytes again.
        if group.claim(_MANIFEST):
            if not group.claims_of_others(SHARD_CLAIMS):
                return _write_manifest(job, plan, group, worker, progress)
            group.release(_MANIFEST)
        waiting(f"{group.holder(_MANIFEST) or 'another worker'}, which completes the cache")


def _manifest_stamp(cache: Path) -> tuple[int, int] | None:
    """Inode and time of the manifest, another one's differ; None if there is none."""
    try:
        status = (cache / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


def _write_manifest(job: Job, plan: PlanFile, group: WorkerGroup, worker: Worker, progress: Progress) -> None:
    cache, config = job.config.data.cache_folder, job.config
    found = read_finished_of(cache, plan.specs)
    shards = [shard for shard in found if shard is not None]
    if len(shards) < len(found):
        gone = [spec.path for spec, shard in zip(plan.specs, found, strict=True) if shard is None]
        others = f", and so are {len(gone) - 1} other shards" if len(gone) > 1 else ""
        raise InputError(
            f"{cache / gone[0]}: was written and is gone, or is another now{others}. See that nothing else changes the "
            "cache, then run the same command again: it makes what is missing."
        )
    manifest, table = describe_cache(config, job.model, job.encoders, plan.specs, shards)
    if is_current(cache, manifest, table):
        delete_unplanned(cache, plan.specs)  # half-written files of a worker that woke and died after the others' end
        return delete_copies(cache)
    group.require_claim(_MANIFEST)
    (cache / MANIFEST).unlink(missing_ok=True)
    delete_unplanned(cache, plan.specs)
    chosen = choose_validation_items(plan.shards(), count=num_watched(config.data.holdout))
    bar = progress.add_task("validation pictures", total=len(chosen))
    with ThreadPoolExecutor(worker.decode_threads) as pool:
        singly = ((item, [sample]) for item, sample in chosen)
        decoded = decode_batches(singly, config.data, pool, ahead=2 * worker.decode_threads)
        pixels = map(_only_pixels, decoded)
        write_validation_items(cache, pixels, lambda: progress.advance(bar), partial(group.require_claim, _MANIFEST))
    write_manifest(cache, manifest, table)
    delete_copies(cache)


def _only_pixels(decoded: DecodedBatch[ValidationItem]) -> tuple[ValidationItem, Pixels]:
    """An item with its picture, behind the first of its masks. Raises InputError if it cannot be decoded."""
    if decoded.problems:
        raise InputError(decoded.problems[0])
    return decoded.tag, decoded.pixels[0][0]


def dry_run(
    config: Config, console: Console, worker: Worker = _ALONE, *, thorough: bool = False, replace: bool = False
) -> None:
    """Print what `preprocess` would do: pictures and shards by dataset, bucket and split, bytes by part, and hours,
    measured on a batch of each size. Writes no shard and claims none.

    Raises InputError as `preprocess` does.
    """
    data = config.data
    model = find_model(config.model.base)
    job = Job(config, model, encoder_fingerprints(model), thorough, replace)
    with raise_disk_full(data.cache_folder), open_progress(console, worker) as progress:
        plans = make_own_plan(job, progress)
    finished = read_finished_of(data.cache_folder, plans)
    todo = [plan for plan, shard in zip(plans, finished, strict=True) if shard is None]
    print_counts(console, data.cache_folder, plans, todo)
    print_bytes(console, bytes_by_part(plans, text_bytes=job.text_bytes))
    if todo:
        encoders = load_encoders(model, data.encoders, device_index=worker.device_index)
        print_hours(console, measure(todo, encoders, data, worker, console), worker)
