"""Pictures, masks and captions, by the scan that preprocessing does; what it found out is kept in data.cache/scan."""

from collections import Counter
from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from configs.errors import InputError, StorageFailed
from data.samples.plan import HOLDOUT, TRAIN, PlannedSample, find_pictures, plan_found
from data.samples.summary import (
    count_captions,
    describe_captions,
    describe_sizes,
    explain_untrained,
    lacking_captions,
)
from data.sources.problems import Findings, Problem, printable, sorted_by_kind
from launch.check.result import Check, State, error_of, ok
from launch.check.situation import Situation


class Pictures(NamedTuple):
    """samples: as planned of all pictures that can be read."""

    samples: list[PlannedSample]


def check_pictures(situation: Situation, progress: Progress) -> tuple[Pictures | None, list[Check]]:
    """What preprocessing would make of the pictures, and all that is wrong with them; None if nothing is left."""
    config = situation.config
    findings = Findings()
    try:
        found = find_pictures(config, progress, findings)
    except StorageFailed as error:
        return None, [error_of("pictures", error)]
    finally:
        for bar in progress.task_ids:
            progress.remove_task(bar)
    checks = [*_group(findings.problems, "error"), *_group(findings.notes, "warning")]
    if not found:
        return None, checks or [Check("pictures", "error", "no dataset has a picture", "Correct data.datasets.")]
    told = StringIO()
    try:
        samples = plan_found(config, found, Console(file=told, width=1000))
    except InputError as error:
        return None, [*checks, error_of("pictures", error)]
    left_out = f"; {told.getvalue().strip()}" if told.getvalue() else ""
    pictures = {(sample.triple.dataset, sample.triple.name): sample.split for sample in samples}
    by_split = {split: Counter(name for (name, _), of in pictures.items() if of == split) for split in (TRAIN, HOLDOUT)}
    datasets = ", ".join(f"{count} of {dataset}" for dataset, count in by_split[TRAIN].items())
    held = f"; {count} are held out" if (count := by_split[HOLDOUT].total()) else ""
    checks.append(ok("pictures", f"{by_split[TRAIN].total()} can be trained on: {datasets}{held}{left_out}"))
    for dataset in config.data.datasets:
        if not by_split[TRAIN][dataset.name] and any(of == dataset for of, _, _ in found):  # else it is told above
            checks.append(
                Check("pictures", "warning", *explain_untrained(dataset.name, by_split[HOLDOUT][dataset.name]))
            )
    checks += _check_captions(samples, situation)
    checks += _check_sizes(samples)
    return Pictures(samples), checks


def _group(problems: Sequence[Problem], state: State) -> Iterator[Check]:
    """One check for those of a kind that need the same."""
    for (kind, cure), group in groupby(sorted_by_kind(problems), key=lambda problem: (problem.kind, problem.cure)):
        found = [printable(f"{p.where}: {p.what}" if p.where else p.what) for p in group]
        what = found[0] if len(found) == 1 else f"{len(found)} of the kind"
        yield Check(kind, state, what, cure, tuple(found) if len(found) > 1 else ())


def _check_captions(samples: Sequence[PlannedSample], situation: Situation) -> Iterator[Check]:
    counts = count_captions(samples, situation.config.data.captions)
    line = f"of {counts.total()} samples: {describe_captions(counts)}"
    if warning := lacking_captions(counts):
        what, _, cure = warning.partition(". ")
        yield Check("captions", "warning", f"{line}. {what}", cure)
    else:
        yield ok("captions", line)


def _check_sizes(samples: Sequence[PlannedSample]) -> Iterator[Check]:
    by_bucket = Counter(str(sample.bucket) for sample in samples)
    held = sum(sample.split == HOLDOUT for sample in samples)
    buckets = ", ".join(f"{count} in {bucket}" for bucket, count in by_bucket.most_common())
    yield ok("buckets", f"{len(samples)} samples, {held} of them held out: {buckets}")
    for line in describe_sizes(samples):
        cure = "Lower data.resolution, or leave such pictures out by data.min_side or data.max_enlarge."
        if line.startswith("cropped"):
            cure = "Buckets go to 2:1; cut longer pictures to what shall be trained."
        yield Check("sizes", "warning", line, cure)
