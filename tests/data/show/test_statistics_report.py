import io
from pathlib import Path

import numpy as np
from rich.console import Console

from data.show.statistics import count_cache, find_shards
from data.show.statistics_report import print_statistics

SHARDS = [("photos", "48x64", 5), ("photos", "48x64", 3), ("photos", "32x32", 4, "holdout"), ("removal", "48x64", 1)]


def count(cache, name=None):
    rows = find_shards(cache.table, name)
    return count_cache(cache.folder, cache.manifest, cache.table, rows, lambda: None)


def test_the_report_shows_what_was_counted(make_cache):
    cache = make_cache(SHARDS, num_variants=2, text_dtype="int8")
    counted = count(cache)
    console = Console(file=io.StringIO(), record=True, width=120)
    print_statistics(console, cache.folder, cache.manifest, counted)
    shown = console.export_text()
    for part, size in counted.parts.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"│ {part} "))
        assert f"{size / 13 / 1024:.2f}" in line and f"{size / counted.bytes:.1%}" in line
    assert "T5 8 x 6 int8" in shown and "7 stored for 13 samples" in shown
    assert f"{counted.bytes / 26 / 1024:.2f} KiB for each sample and mask" in shown
    tenths = [int(line.split("│")[2]) for line in shown.splitlines() if " to " in line and "│" in line]
    assert tenths == counted.hole_fractions and np.sum(tenths) == 26


def test_a_path_is_shown_as_it_is_whatever_rich_makes_of_brackets(make_cache):
    cache = make_cache(SHARDS)
    console = Console(file=io.StringIO(), record=True, width=120)
    print_statistics(console, Path("/d/[bold]x[/y]"), cache.manifest, count(cache))
    assert "cache /d/[bold]x[/y]" in console.export_text()
