"""Progress of a preprocessing job: bars while it works, a table of the cache at the end."""

import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from data.cache.manifest import ShardTable
from data.preprocessing.worker import Worker
from data.samples.plan import HOLDOUT

_POLL_SECONDS = 0.5
_LINE_SECONDS = 60.0
_MUCH_HELD_OUT = 0.2  # of all samples


class _SpeedColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


def open_progress(console: Console, worker: Worker) -> Progress:
    """Bars for the first of the processes that share a terminal: its bar counts what all of them do."""
    if worker.count > 1:
        console.print(str(worker), highlight=False)
    return Progress(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=worker.rank > 0,
        speed_estimate_period=120,  # what other workers finish is seen now and then, many at once
    )


def advancing(progress: Progress, bar: TaskID) -> Callable[[int], None]:
    """Moves a bar on; where there is no terminal to show it, a batch job's log, a line a minute says as much."""
    said = time.monotonic()

    def advance(count: int) -> None:
        nonlocal said
        progress.advance(bar, count)
        shown = progress.console.is_terminal or progress.disable
        if shown or time.monotonic() - said < _LINE_SECONDS:
            return
        said = time.monotonic()
        task = next(task for task in progress.tasks if task.id == bar)
        speed = f", {task.speed:.1f}/s" if task.speed else ""
        left = f", {timedelta(seconds=int(task.time_remaining))} left" if task.time_remaining is not None else ""
        progress.console.print(
            f"{task.description}: {task.completed:.0f} of {task.total:.0f}{speed}{left}", highlight=False
        )

    return advance


class Waiting:
    """Called again and again while there is nothing to do but wait; says once for whom."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._said = ""
        self._seconds = _POLL_SECONDS

    def __call__(self, for_whom: str) -> None:
        if for_whom != self._said and not self._progress.disable:
            self._progress.console.print(f"waiting for {for_whom}", highlight=False, markup=False)
        if for_whom != self._said:
            self._said, self._seconds = for_whom, _POLL_SECONDS
        # Not in step with the others: who comes at the same time gets nothing.
        time.sleep(self._seconds * random.uniform(0.5, 1.5))
        self._seconds = min(1.2 * self._seconds, 10 * _POLL_SECONDS)


def print_report(console: Console, cache: Path, table: ShardTable, worker: Worker, *, num_encoded: int) -> None:
    """The finished cache, once for all that share a terminal, and what this worker did for it."""
    if worker.rank == 0:
        console.print(_summarise(cache, table))
        held = int(table.samples[table.split == HOLDOUT].sum())
        if held > _MUCH_HELD_OUT * table.samples.sum():
            console.print(
                f"data.holdout keeps {held} of {int(table.samples.sum())} samples back from training; lower it if that "
                "is more than you want to watch the run by.",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
    by_whom = f"by {worker}" if worker.count > 1 else "the others were there already"
    total = int(table.samples.sum())
    console.print(f"{num_encoded} of {total} samples were encoded now, {by_whom}.", highlight=False, soft_wrap=True)


def _summarise(cache: Path, table: ShardTable) -> Table:
    summary = Table(
        *("dataset", "bucket", "split", "shards", "samples", "MiB"),
        title=f"cache {escape(str(cache))}",
        title_justify="left",
    )
    for column in summary.columns[3:]:
        column.justify = "right"
    groups = sorted(
        {(str(d), str(b), str(s)) for d, b, s in zip(table.dataset, table.bucket, table.split, strict=True)}
    )
    for dataset, bucket, split in groups:
        rows = (table.dataset == dataset) & (table.bucket == bucket) & (table.split == split)
        samples, mib = int(table.samples[rows].sum()), table.bytes[rows].sum() / 2**20
        summary.add_row(dataset, bucket, split, str(int(rows.sum())), str(samples), f"{mib:.1f}")
    return summary
