"""What preprocessing shows: bars while it works, a table of the cache at the end."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data.manifest import ShardTable


class _SpeedColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


def open_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def print_report(console: Console, cache: Path, table: ShardTable, *, num_encoded: int) -> None:
    summary = Table(
        "dataset", "bucket", "split", *("shards", "samples", "MiB"), title=f"cache {cache}", title_justify="left"
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
    console.print(summary)
    console.print(
        f"{num_encoded} of {int(table.samples.sum())} samples were encoded now, the others were there already."
    )
