"""Room on disks: for what the cache still lacks, for checkpoints, and for what the end of the run writes."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from configs.flux_shape import FluxShape
from configs.memory import GIB, checkpoint_bytes
from launch.check.paths import existing
from launch.check.result import Check, ok
from launch.check.situation import Situation

_MARGIN = 1.1  # others write to the same disk


def check_disk(situation: Situation, base: FluxShape, bytes_to_encode: int) -> Iterator[Check]:
    """Each disk that the run writes to, with all that it writes there at once."""
    config = situation.config
    one, end = checkpoint_bytes(config, base)
    kept = most_checkpoints(situation)
    wanted: dict[Path, list[tuple[float, str]]] = defaultdict(list)
    run = existing(config.run.folder)
    wanted[run].append((kept * one, f"{kept} x {_size(one)} of checkpoints"))
    if config.checkpoint.at_end:
        wanted[run].append((end, f"final/ of {_size(end)}"))
    if bytes_to_encode and isinstance(config.data.cache, Path):
        wanted[existing(config.data.cache)].append((bytes_to_encode, f"shards of {_size(bytes_to_encode)}"))
    for place, parts in _by_disk(wanted).items():
        needed, usage = sum(size for size, _ in parts), shutil.disk_usage(place)
        if usage.total == 0:
            continue  # no disk, as /proc: what is written there is for the check of the paths
        free = usage.free
        listing = ", ".join(text for _, text in parts)
        what = f"{place}: {listing}; {_size(free)} free"
        if needed > free:
            cure = "Free some, lower checkpoint.keep_last, or point run.dir and data.cache at other disks."
            yield Check("disk", "error", f"{what}, {_size(needed)} needed", cure)
        elif needed * _MARGIN > free:
            yield Check("disk", "warning", f"{what}, {_size(needed)} needed", "Free some: others may write there too.")
        else:
            yield ok("disk", what)


def most_checkpoints(situation: Situation) -> int:
    """How many lie beside each other at most: those that are kept, the best one, and the one that is being written."""
    config = situation.config.checkpoint
    steps = situation.config.train.steps
    written = steps // config.every_steps if config.every_steps else 0
    if config.at_end and (not config.every_steps or steps % config.every_steps):
        written += 1
    if config.keep_last is None:
        return written
    most = config.keep_last + (config.keep_best is not None) + 1
    return min(steps if config.every_minutes else written, most)  # by the clock after any step


def _by_disk(wanted: dict[Path, list[tuple[float, str]]]) -> dict[Path, list[tuple[float, str]]]:
    """What is written below each place, those on one filesystem together."""
    place_of: dict[int, Path] = {}
    together: dict[Path, list[tuple[float, str]]] = defaultdict(list)
    for place, parts in wanted.items():
        together[place_of.setdefault(os.stat(place).st_dev, place)] += parts
    return together


def _size(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < GIB else f"{size / GIB:,.1f} GiB"
