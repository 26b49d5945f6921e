"""How fast `fluxfill shards verify` reads a cache, beside `cat` and coreutils' `sha256sum` on the same tars.

    python benchmarks/verify.py [--out benchmarks/results/verify.jsonl] [--folder TMP] [--shards 8] [--repeats 5]

Full shards of 256 MiB at 1024 px, from a warm page cache: so the processor is measured, and a disk slower than
the result is read at its own speed. sha256sum runs as many processes as verify has threads. Runs alternate; medians.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cache_size import Case, describe, write_shard
from benchmarks.record import add_result
from data.cache.manifest import write_manifest
from data.verify.cache import verify_cache

CASE = Case(1024, "unique", 1, "bf16")


def write_cache(folder: Path, shards: int) -> list[Path]:
    """A whole cache of `shards` full shards; returns their tars."""
    paths = [f"shards/photos/{number}.tar" for number in range(shards)]
    write_manifest(folder, *describe(CASE, {path: write_shard(folder / path, CASE) for path in paths}))
    return [folder / path for path in paths]


def verify(folder: Path, threads: int) -> None:
    checked = verify_cache(folder, threads=threads, start=lambda _: None, advance=lambda _: None)
    if checked.problems:
        raise RuntimeError(f"a whole cache has problems: {checked.problems[:3]}")


def run_each(program: Sequence[str], tars: Sequence[Path], processes: int) -> None:
    """Run a program over the tars, one at a time in each of `processes`."""
    names = "\n".join(map(str, tars)).encode()
    command = ["xargs", "-n", "1", "-P", str(processes), *program]
    subprocess.run(command, input=names, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result to this file, a JSON line")
    parser.add_argument("--folder", type=Path, help="where the shards are written")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tars = write_cache(Path(folder), options.shards)
        num_bytes = sum(tar.stat().st_size for tar in tars)
        ways: dict[str, Callable[[], None]] = {
            "cat, 1 process": lambda: run_each(["cat"], tars, 1),
            f"cat, {cores} processes": lambda: run_each(["cat"], tars, cores),
            "sha256sum, 1 process": lambda: run_each(["sha256sum"], tars, 1),
            f"sha256sum, {cores} processes": lambda: run_each(["sha256sum"], tars, cores),
            "verify, 1 thread": lambda: verify(Path(folder), 1),
            f"verify, {cores} threads": lambda: verify(Path(folder), cores),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                rates[name].append(num_bytes / (time.perf_counter() - start) / 1e9)
    medians = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    add_result({"benchmark": "verify", "bytes": num_bytes, "gb_per_s": medians}, options.out)


if __name__ == "__main__":
    main()
