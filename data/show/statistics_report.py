"""Statistics of a cache as tables for a terminal."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.cache.manifest import Manifest
from data.samples.summary import print_captions
from data.show.statistics import CacheStatistics

BAR = "█"
_LONGEST_BAR = 32  # characters


def print_statistics(console: Console, cache: Path, manifest: Manifest, counted: CacheStatistics) -> None:
    """Print datasets and buckets; a sample's bytes by part; captions; sizes of the holes."""
    groups, parts, holes = statistics_tables(cache, counted)
    console.print(groups)
    console.print()
    console.print(parts)
    for line in describe_texts(manifest, counted):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    print_captions(console, counted.captions)
    console.print()
    console.print(holes)


def statistics_tables(cache: Path, counted: CacheStatistics) -> tuple[Table, Table, Table]:
    """Tables of datasets and buckets, of a sample's bytes by part, and of the sizes of the holes."""
    return _groups_table(cache, counted), _parts_table(counted), _holes_table(counted)


def _groups_table(cache: Path, counted: CacheStatistics) -> Table:
    table = Table("dataset", "bucket", "split", title=f"cache {escape(str(cache))}", title_justify="left")
    for column in ("shards", "samples", "masks", "MiB", "KiB each"):
        table.add_column(column, justify="right")
    for group in counted.groups:
        counts = (group.shards, group.samples, group.variants)
        sizes = (f"{group.bytes / 2**20:.1f}", f"{group.bytes / group.samples / 2**10:.1f}" if group.samples else "")
        table.add_row(group.dataset, group.bucket, group.split, *map(str, counts), *sizes)
    return table


def _parts_table(counted: CacheStatistics) -> Table:
    table = Table("part", title="bytes of a sample", title_justify="left")
    for column in ("KiB a sample", "share", "MiB in all"):
        table.add_column(column, justify="right")
    table.add_column("")
    samples, total = max(counted.samples, 1), max(counted.bytes, 1)
    for part, size in counted.parts.items():
        share = size / total
        numbers = (f"{size / samples / 2**10:.2f}", f"{share:.1%}", f"{size / 2**20:.1f}")
        table.add_row(part, *numbers, BAR * round(share * _LONGEST_BAR))
    table.add_section()
    table.add_row("all", f"{counted.bytes / samples / 2**10:.2f}", "100.0%", f"{counted.bytes / 2**20:.1f}", "")
    return table


def describe_texts(manifest: Manifest, counted: CacheStatistics) -> list[str]:
    """What a sample takes beside a file of its own, and how long and how many the stored texts are, a line each."""
    masks = max(counted.masks, 1)
    middle, longest = counted.tokens
    cut = f"; {counted.cut} samples fill it, their captions may be cut" if counted.cut else ""
    return [
        f"{_size(counted.bytes / masks)} for each sample and mask; the tensors of a file for each, its text and target "
        f"in it, are {_size(counted.apart / masks)}",
        f"text: T5 {manifest.text_length} x {manifest.text_width} {manifest.text_dtype}, of which {middle} tokens are "
        f"real in the middle of the samples and {longest} at most{cut}",
        f"texts: {counted.texts} stored for {counted.samples} samples (each once per shard), "
        f"{counted.samples / max(counted.texts, 1):.1f} samples a text",
    ]


def _size(size: float) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.2f} KiB"


def _holes_table(counted: CacheStatistics) -> Table:
    table = Table("hole, % of the area", title="how much of the picture is painted", title_justify="left")
    table.add_column("masks", justify="right")
    table.add_column("")
    most = max([*counted.hole_fractions, 1])
    for tenth, count in enumerate(counted.hole_fractions):
        table.add_row(f"{tenth * 10} to {tenth * 10 + 10}", str(count), BAR * -(-count * _LONGEST_BAR // most))
    return table
