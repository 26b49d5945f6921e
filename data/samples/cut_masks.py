"""Masks of which a bucket's crop leaves no hole, or nothing else: found before anything is encoded.

What the scan keeps of a mask tells of most that both are left. The others, those of thin strokes and of small or far
holes, are brought to their bucket's size as encoding does it, so both always agree.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.mask_recipe import recipe_of
from data.samples.geometry import Bucket, Crop, fit_mask
from data.sources.mask_reach import is_surely_left
from data.sources.picture_file import PictureFile
from data.sources.pictures import load_mask
from data.sources.problems import MASKS, UNREADABLE, Findings
from data.sources.scan_cache import ScanCache
from data.sources.triples import FoundTriple, Triple

_THREADS = 8
_LEAST_CELL = 2.0  # pixels, in the picture or at the bucket's size, of which one at least is left

Crops = Sequence[tuple[Bucket, Crop]]


class _Doubtful(NamedTuple):
    """A mask and a bucket in which too little of it may be left."""

    triple: Triple
    mask: PictureFile
    bucket: Bucket
    crop: Crop

    @property
    def row(self) -> list[str]:
        """What the answer depends on, besides the dataset's label."""
        return [self.triple.content, str(self.bucket)]


def find_cut_masks(
    dataset: DatasetConfig,
    found: Sequence[FoundTriple],
    data: DataConfig,
    crops_of: Callable[[tuple[int, int]], Crops],
    findings: Findings,
) -> None:
    """Look for masks of a dataset of which nothing to paint, or nothing to keep, is left in a bucket.

    crops_of: the buckets and crops of a picture of some (width, height).  findings: takes those masks.
    """
    doubtful = [
        _Doubtful(triple, triple.mask, bucket, crop)
        for triple, size, reach in found
        if triple.mask is not None and reach is not None
        for bucket, crop in crops_of(size)
        if not _is_surely_left(reach, size, bucket, crop)
    ]
    label = recipe_of(dataset).label
    results = ScanCache(data.cache_folder, dataset.name)
    kept = results.read_fitting()
    known = {tuple(row) for row in kept if row[2:] == [label]}

    def fits(entry: _Doubtful) -> bool:
        try:
            mask = load_mask(entry.mask, max_megapixels=data.max_megapixels, label=label)
        except InputError as error:
            findings.add_error(error, UNREADABLE, entry.mask)
            return False
        if lack := what_lacks(fit_mask(mask, entry.bucket)):
            findings.add(MASKS, entry.mask, *describe_lack(lack, entry.bucket, entry.crop))
        return lack is None

    new = [entry for entry in doubtful if (*entry.row, label) not in known]
    with ThreadPoolExecutor(_THREADS) as pool:
        fitting = [entry for entry, is_fitting in zip(new, pool.map(fits, new), strict=True) if is_fitting]
    if fitting:
        used = {entry.triple.content for entry in doubtful}
        results.write_fitting([*(row for row in kept if row[0] in used), *([*e.row, label] for e in fitting)])


def _is_surely_left(reach: str, size: tuple[int, int], bucket: Bucket, crop: Crop) -> bool:
    shares = bucket.width / crop.width, bucket.height / crop.height
    scale = min(1.0, crop.width / size[0], crop.height / size[1])
    return max(shares) == 1 and is_surely_left(reach, _LEAST_CELL / scale, *shares)


def what_lacks(mask: np.ndarray) -> str | None:
    """What is lacking in a mask, bool, at its bucket's size; None if there is something to paint and something to
    keep."""
    if not mask.any():
        return "nothing to paint"
    return "nothing to keep" if mask.all() else None


def describe_lack(lack: str, bucket: Bucket, crop: Crop) -> tuple[str, str]:
    """What is wrong with a mask in which that is lacking, and what to do."""
    return (
        f"at the size of its bucket, {bucket}, there is {lack}: of the picture, resized to {crop.width} px wide and "
        f"{crop.height} px high, the middle is kept, and that part is cut off, or smaller than a pixel",
        "Crop the triple yourself, or remove it.",
    )
