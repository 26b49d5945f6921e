"""The validation items: all held-out pictures and a few of those trained on, kept as pixels beside the manifest.

The trainer measures fills against true pixels, which latents are not; with these it needs neither the datasets nor the
text encoders on the machine it runs on.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from heapq import nsmallest
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import InputError
from data.cache_layout import VALIDATION
from data.samples.geometry import Pixels
from data.samples.plan import HOLDOUT, TRAIN, PlannedSample
from data.samples.shard_plan import PlannedShard
from data.storage.atomic_write import write_text_atomically
from data.storage.disk_full import raise_disk_full

_ROLES = ("target", "image", "mask")
_SAVING_THREADS = 8


@dataclass(frozen=True)
class ValidationItem:
    """One validation sample.

    split: "train" or "holdout".  shard: its tar's path below the cache; row: its place there.
    """

    key: str
    split: str
    dataset: str
    shard: str
    row: int
    caption: str


def choose_validation_items(plans: Iterable[PlannedShard], *, count: int) -> list[tuple[ValidationItem, PlannedSample]]:
    """All held-out samples, and `count` training samples, each split in the order of its targets' hashes.

    Mirror images are left out: they would show the same pictures once more.
    """
    found: dict[str, list[tuple[tuple[str, str, int], PlannedSample]]] = {HOLDOUT: [], TRAIN: []}
    for plan in plans:
        found[plan.split] += [
            ((sample.triple.target_content, plan.path, row), sample)
            for row, sample in enumerate(plan.samples)  # a shard's rows are its plan's
            if not sample.flip
        ]
        # No more than are wanted are kept: of millions, all would fill the memory.
        found[TRAIN] = nsmallest(count, found[TRAIN], key=itemgetter(0))
    found[HOLDOUT].sort(key=itemgetter(0))
    chosen = []
    for split in (HOLDOUT, TRAIN):
        for (_, path, row), sample in found[split]:
            triple = sample.triple
            item = ValidationItem(sample.key, split, triple.dataset, path, row, triple.caption)
            chosen.append((item, sample))
    return chosen


def num_watched(holdout: int) -> int:
    """How many of the training samples can be watched, beside all that are held out."""
    return max(holdout, 8)


def write_validation_items(
    cache: Path,
    items: Iterable[tuple[ValidationItem, Pixels]],
    advance: Callable[[], None],
    check: Callable[[], object] = lambda: None,
) -> None:
    """Write <cache>/validation: items.json and three PNGs per item, in the place of what was there.

    check: called when all are written, before anything changes.  If it raises, or `items`, nothing does.
    """
    folder, temporary = cache / VALIDATION, cache / f"{VALIDATION}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        entries = []
        with ThreadPoolExecutor(_SAVING_THREADS) as pool:  # a PNG of 1024 px takes half a second
            saved: deque[Future[None]] = deque()
            for number, (item, pixels) in enumerate(items):
                saved.append(pool.submit(_save_pixels, temporary, number, pixels))
                entries.append(asdict(item))
                if len(saved) > 2 * _SAVING_THREADS:
                    saved.popleft().result()
                    advance()
            for future in saved:
                future.result()
                advance()
        write_text_atomically(temporary / "items.json", json.dumps(entries, indent=1, ensure_ascii=False))
        check()
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_pixels(folder: Path, number: int, pixels: Pixels) -> None:
    for role, picture in zip(_ROLES, (pixels.target, pixels.image, pixels.mask), strict=True):
        file = folder / _file_name(number, role)
        with raise_disk_full(file):
            Image.fromarray(picture).save(file)


def validation_items_are_there(cache: Path) -> bool:
    """Whether <cache>/validation holds all that its items.json lists. Reads no picture."""
    folder = cache / VALIDATION
    try:
        count = len(json.loads((folder / "items.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
    return all((folder / _file_name(number, role)).is_file() for number in range(count) for role in _ROLES)


def read_validation_items(cache: Path, *, split: str, count: int) -> list[tuple[ValidationItem, Pixels]]:
    """The first `count` items of a split with their pixels. Raises InputError if the folder is missing or damaged."""
    folder = cache / VALIDATION
    try:
        entries = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        items = [(number, ValidationItem(**entry)) for number, entry in enumerate(entries) if entry["split"] == split]
        return [(item, _read_pixels(folder, number)) for number, item in items[:count]]
    except Exception as error:  # of files, JSON, and the dozen that Pillow raises
        raise InputError(
            f"{folder}: damaged ({error}). Delete it and run `fluxfill preprocess CONFIG` again; whole shards are kept."
        ) from error


def _read_pixels(folder: Path, number: int) -> Pixels:
    arrays = []
    for role in _ROLES:
        with Image.open(folder / _file_name(number, role)) as picture:
            arrays.append(np.array(picture))
    target, image, mask = arrays
    return Pixels(target, image, mask.astype(bool))


def _file_name(number: int, role: str) -> str:
    return f"{number:04d}.{role}.png"
